"""SDAR: Self-Distilled Agentic Reinforcement Learning (arXiv 2605.15155), the whole method in one file to read.

An agent plays text games over several turns and is rewarded only at the end. GRPO turns that one number into an
advantage for every token of the episode. SDAR adds a dense signal: a teacher, which is the same network shown the
same conversation plus a skill text that the student never sees, scores every token that the student sampled, and a
gate decides how far it is trusted on that token. At test time there is no skill: what it said has been learned.

    python sdar.py                                    # train the carried tiny policy on the toy household, on a CPU
    python sdar.py --method grpo                      # the same without the teacher
    python sdar.py --model Qwen/Qwen3-0.6B            # a checkpoint from the hub, through the same code
    python sdar.py --help                             # every flag and command, with the toy's and the paper's values

Contents: 1 configuration, 2 skills, 3 conversation, 4 rollout, 5 log-probs, 6 objectives, 7 update, 8 evaluation and
training loop. Part II: 9 the tiny policy, 10 models and the run's folder, 11 command line.

Axes: B episodes, T sampled tokens of an episode (padded), S tokens of its whole sequence, V vocabulary, H width.

| paper          | here                       | where                          |
|----------------|----------------------------|--------------------------------|
| pi_theta       | `model`, logprobs (B, T)   | response_logprobs              |
| pi_T, c+       | `teacher`, skill_ids       | score(with_skill=True)         |
| y_t, s_t, s_t+ | Episode.ids, mask, view()  | rollout                        |
| G, A           | group_size, advantages     | group_advantages               |
| epsilon, beta_KL | clip_eps, kl_coef        | policy_loss, kl_k3             |
| Delta_t        | gap                        | sdar_loss                      |
| g_t, beta      | gate, gate_beta            | gate                           |
| lambda         | sdar_coef                  | update                         |

Where this file departs from the paper or from its official code (README.md has the table with reasons):
- one growing conversation an episode, as in the paper's formulas; the official code makes a row of every turn, its
  prompt rebuilt from the last two, and writes the skill in front of the chat template, not in the user's message;
- losses are means over all tokens of a mini-batch, metrics of a step; the official ones are means of micro-batch means;
- an invalid action costs the episode, not the turn; dual clip, entropy bonus and turn-weighted group statistics are
  the official code's, not the paper's: --dual-clip, --entropy-coef, --turn-weights;
"""
import argparse
import copy
import difflib
import hashlib
import json
import math
import os
import random
import re
import shutil
import sys
import time
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_VERBOSITY", "error")
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from envs import (CLASSES, ENVS, PHRASES, PLACES, TASK_TEXT, EnvUnavailable, Household, ToyEnv, make_env,
                  scripted_action)

# ======== PART I: THE PAPER ========

# --- 1. Configuration (paper, section 4.1 and appendix C) ------------------------------------

METHODS = {  # row of the paper's Table 1: (weight of the policy loss, of the distillation loss, factor on gate_beta)
    "sdar": (1, 1, 1),
    "grpo": (1, 0, 1),
    "grpo_opsd": (1, 1, 0),  # beta 0: the gate is 1/2 on every token, and the expected gradient zero
    "opsd": (0, 1, 1),       # like the official baseline it keeps the gate and drops the policy loss
}


def option(help, toy, paper=None):
    """A field of Config: its default is the preset's column, `toy` or, where the paper's run differs, `paper`."""
    return field(default=None, metadata={"help": help, "toy": toy, "paper": toy if paper is None else paper})


@dataclass
class Config:
    """One run. Every field is also a flag; a value given by hand wins over the preset's."""
    # what to run
    env: str = option("environment", "toy")
    model: str = option("'tiny' (carried with the code), a hub name or a checkpoint folder", "tiny")
    preset: str = option("column of defaults: toy with the tiny model, paper with any other", "toy", "paper")
    method: str = option("row of the paper's Table 1", "sdar")
    seed: int = option("of tasks, sampling and order; never of the evaluation panel", 0)
    steps: int = option("training steps, each one batch of episodes", 60, 150)
    out: str = option("folder of the run ('': runs/<env>-<method>-s<seed>)", "")
    resume: bool = option("continue the run in `out` from its checkpoint", False)
    overwrite: bool = option("replace the run in `out`", False)
    save_every: int = option("steps between checkpoints", 10)
    device: str = option("cpu or cuda ('': cuda if there is one and the model is not tiny)", "")
    dtype: str = option("of forward passes; weights, log-probs and optimiser are float32", "float32", "bfloat16")
    micro_tokens: int = option("padded tokens in one training pass; never changes the result", 8192, 16384)
    # rollouts
    tasks_per_step: int = option("tasks a step; each makes one group", 8, 16)
    group_size: int = option("G, episodes of one task from the same initial state", 8)
    temperature: float = option("of sampling, and therefore of every log-prob", 1.0)
    max_turns: int = option("turns an episode (0: the environment's own; toy 10)", 0)
    max_new_tokens: int = option("tokens a response", 8, 512)
    # GRPO, the backbone
    lr: float = option("learning rate of AdamW, constant", 6e-4, 1e-6)
    minibatches: int = option("optimiser steps a batch", 4)
    clip_eps: float = option("epsilon, the PPO clip of the ratio", 0.2)
    dual_clip: float = option("cap on the loss of a bad action, in advantages (official code; 0: off)", 3.0)
    kl_coef: float = option("weight of the k3 KL to the frozen start policy", 0.01)
    entropy_coef: float = option("entropy bonus (official code; not in the paper's loss)", 0.0, 0.001)
    invalid_penalty: float = option("taken off the score per invalid action, in rewards", 0.01)
    turn_weights: bool = option("an episode counts once a turn in its group's statistics (official code)", False, True)
    normalize_std: bool = option("divide advantages by the group's standard deviation", True)
    adam_beta2: float = option("decay of AdamW's second moment", 0.999)
    weight_decay: float = option("of AdamW", 0.01)
    grad_clip: float = option("largest norm of the gradient", 1.0)
    # SDAR
    sdar_coef: float = option("lambda, the weight of the gated distillation loss", 1.0, 0.01)
    gate: str = option("trust in the teacher on each token", "gap")
    gate_beta: float = option("beta, the sharpness of the gate", 5.0)
    teacher: str = option("weights that read the skill: the step's own, a lagged copy, the start's", "live")
    teacher_refresh: int = option("steps between copies of the lagged teacher", 10)
    retrieval: str = option("how a task's skills are chosen", "keyword")
    # evaluation
    eval_every: int = option("steps between evaluations (0: before and after only)", 10, 5)
    eval_episodes: int = option("episodes of the fixed panel", 300, 128)
    eval_temperature: float = option("of sampling in evaluation", 0.4)
    eval_split: str = option("held-out tasks: dev for choosing settings, eval for reporting", "eval")

    def __post_init__(self):
        self.preset = self.preset or ("toy" if self.model in (None, "tiny") else "paper")
        for f in fields(self):
            if getattr(self, f.name) is None:
                setattr(self, f.name, f.metadata.get(self.preset))
        check_config(self)
        self.out = self.out or f"runs/{self.env}-{self.method}-s{self.seed}"
        self.device = self.device or ("cuda" if self.model != "tiny" and torch.cuda.is_available() else "cpu")


# --- 2. Skills: the privileged context c+ (paper, section 2.1) --------------------------------

def retrieve(bank, task, task_type, strategy):
    """The skills of a task. keyword: those whose task type and whole-word keywords fit it, each once."""
    return [skill for skill in bank if strategy == "keyword" and skill.matches(task, task_type)]


def skill_text(skills):
    """What the teacher reads in front of the task; empty without skills."""
    return "Skill: " + " ".join(skill.text for skill in skills) + "\n" if skills else ""


# --- 3. Conversation: token in, token out (paper, section 2.1) --------------------------------

class Chat:
    """The chat template's own frames around messages, found by rendering it once around marks. Ids are only appended:
    rendered again, Qwen3's template drops earlier reasoning; tokenised again, text may give other ids than were sampled.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        roles = {"SYSTEMTEXT": "system", "FIRSTTEXT": "user", "ANSWERTEXT": "assistant", "NEXTTEXT": "user"}
        text = tokenizer.apply_chat_template([{"role": role, "content": mark} for mark, role in roles.items()],
                                             tokenize=False, add_generation_prompt=True, enable_thinking=False)
        self._before_first = [self._frame(part) for part in text.split("FIRSTTEXT")[0].split("SYSTEMTEXT")]
        between, after = text.split("ANSWERTEXT")[1].split("NEXTTEXT")
        self._between, self._after = self._frame(between), self._frame(after)
        self.end_id = self._between[0]  # end of turn: the last id of a finished response
        self.stop_ids = sorted({self.end_id, tokenizer.eos_token_id} - {None})
        control = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values()]
        self._control = re.compile(f"(?={'|'.join(control)})")
        self.encode = lru_cache(maxsize=20000)(self._encode)  # environments repeat themselves

    def _frame(self, text, **options):
        return self.tokenizer(text, add_special_tokens=False, **options)["input_ids"]

    def _encode(self, text):
        """Ids of foreign text, which never becomes control: what looks like an added token (Qwen3's <think> is one
        that is not even marked special) is cut after its first character."""
        cuts = [0, *(match.start() + 1 for match in self._control.finditer(text)), len(text)]
        return sum((self._frame(text[a:b], split_special_tokens=True) for a, b in zip(cuts, cuts[1:])), [])

    def first(self, instructions, observation):
        """Ids of the first prompt, and where in it the skill goes: the start of the user's first message."""
        head = list(self._before_first[0])
        for part in self._before_first[1:]:  # the tiny policy's template has no place for a system message
            head += self.encode(instructions) + part
        return head + self.encode(observation) + self._after, len(head)

    def next(self, observation, ended):
        """Ids between two responses. ended: the first response came to its end of turn by itself."""
        return self._between[1 if ended else 0:] + self.encode(observation) + self._after


@dataclass
class Episode:
    """One conversation and what became of it. mask is 1 exactly on the ids that the policy sampled."""
    task: str
    task_type: str
    group: int
    ids: list
    mask: list
    skill_at: int                                   # place of the skill in ids
    skill_ids: list                                 # what the teacher reads there and the student does not
    logprobs: list = field(default_factory=list)    # the sampler's, of the sampled ids
    transcript: list = field(default_factory=list)  # observation, response, observation, ...
    turns: int = 0
    invalid: int = 0                                # turns whose action was invalid
    reward: float = 0.0                             # raw: 0 or 1
    won: bool = False

    def append(self, ids, sampled):
        self.ids += ids
        self.mask += [int(sampled)] * len(ids)

    def view(self, with_skill):
        """(ids, mask) of the sequence as the student or, with the skill spliced in, the teacher reads it."""
        at, skill = self.skill_at, self.skill_ids if with_skill else []
        return self.ids[:at] + skill + self.ids[at:], self.mask[:at] + [0] * len(skill) + self.mask[at:]


# --- 4. Rollout (paper, section 2.1 and appendix B) ---------------------------------------------

class Sampler:
    """A policy and the KV cache of a batch of growing conversations: each turn feeds only what is new.

    Blocks of new ids are padded on the left. The holes stay in the cache, masked out, and positions count real tokens
    only, so log-probs equal those of an unpadded pass.
    """

    def __init__(self, model, rows, temperature):
        from transformers import DynamicCache
        self.model, self.temperature, self.cache = model, temperature, DynamicCache(config=model.config)
        self.real = torch.zeros(rows, 0, dtype=torch.long, device=model.device)  # (B, columns) 1 token, 0 hole

    def feed(self, ids, new):
        """Append a block of columns, ids (B, n) and new (B, n) 1 where real; keep the logits of its last column."""
        positions = (self.real.sum(1, keepdim=True) + new.cumsum(1) - 1).clamp(min=0)
        self.real = torch.cat([self.real, new], 1)
        self.logits = self.model(input_ids=ids, attention_mask=self.real, position_ids=positions, use_cache=True,
                                 past_key_values=self.cache, logits_to_keep=1).logits[:, -1].float()

    def feed_rows(self, rows):
        """Append a list of ids to each conversation."""
        width = max(map(len, rows))
        ids = [[0] * (width - len(row)) + row for row in rows]
        new = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        self.feed(*torch.tensor([ids, new], device=self.real.device))

    def respond(self, uniforms, stop_ids):
        """Sample a response to each conversation, until a stop id or the end of uniforms (B, max_new_tokens).
        Returns [(ids, logprobs)]. The last id of a response is not fed yet."""
        stop = torch.tensor(stop_ids, device=self.real.device)
        running, columns = torch.ones_like(uniforms[:, 0], dtype=torch.bool), []
        for uniform in uniforms.split(1, dim=1):
            if columns:
                self.feed(columns[-1][0][:, None], running[:, None].long())
            scores = torch.log_softmax(self.logits / (self.temperature or 1.0), -1)  # (B, V)
            cdf = scores.exp().cumsum(-1)  # its inverse: a row's draw never depends on the other rows
            draw = torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True).clamp(max=cdf.shape[1] - 1)
            chosen = draw if self.temperature else scores.argmax(-1, keepdim=True)
            columns.append((chosen[:, 0], scores.gather(1, chosen)[:, 0], running))
            running = running & ~torch.isin(chosen[:, 0], stop)
            if not running.any():
                break
        ids, logprobs, alive = (torch.stack(column, 1) for column in zip(*columns))
        return [(row[:n], scores[:n]) for row, scores, n in zip(ids.tolist(), logprobs.tolist(), alive.sum(1).tolist())]

    def keep(self, rows):
        """Drop the other conversations from the batch."""
        self.cache.batch_select_indices(torch.tensor(rows, device=self.real.device))
        self.real = self.real[rows]


@torch.no_grad()
def rollout(model, chat, envs, starts, config, stream, with_skill=False, temperature=None):
    """Play an episode from each (task, seed, group) of `starts`, all in lockstep; returns the Episodes.

    stream: ints; episode i samples from the random stream (*stream, i), whatever its neighbours in the batch do.
    with_skill: the skill is in the prompt that is sampled from.
    """
    episodes = []
    for env, (task, seed, group) in zip(envs, starts):
        observation, info = env.reset(task, seed)
        skill = chat.encode(skill_text(retrieve(env.skills, info["task"], info["task_type"], config.retrieval)))
        ids, at = chat.first(env.instructions, observation)
        episode = Episode(task, info["task_type"], group, ids, [0] * len(ids), at, skill, transcript=[observation])
        if with_skill:
            (episode.ids, episode.mask), episode.skill_ids = episode.view(with_skill), []
        episodes.append(episode)
    check_context(model, envs[0], episodes, config)
    streams = [np.random.default_rng([*stream, i]) for i in range(len(episodes))]
    sampler = Sampler(model, len(episodes), config.temperature if temperature is None else temperature)
    live, fed = list(range(len(episodes))), [0] * len(episodes)
    while live:
        uniforms = np.stack([streams[i].random(config.max_new_tokens, dtype=np.float32) for i in live])
        with forward_dtype(model, config):
            sampler.feed_rows([episodes[i].ids[fed[i]:] for i in live])
            responses = sampler.respond(torch.tensor(uniforms, device=model.device), chat.stop_ids)
        keep = []
        for row, (i, (ids, logprobs)) in enumerate(zip(live, responses)):
            episode = episodes[i]
            episode.append(ids, sampled=True)
            episode.logprobs += logprobs
            fed[i] = len(episode.ids) - 1  # the last sampled id is fed with the next observation
            text = chat.tokenizer.decode(ids, skip_special_tokens=True)
            action, valid = envs[i].parse(text)
            observation, reward, terminated, truncated, info = envs[i].step(action)
            episode.turns += 1
            episode.invalid += not (valid and info["valid"])
            episode.reward += reward
            episode.won = info["won"]
            episode.transcript += [text, observation]
            if terminated or truncated:
                continue
            episode.append(chat.next(observation, ended=ids[-1] == chat.end_id), sampled=False)
            if len(episode.ids) + len(episode.skill_ids) + config.max_new_tokens <= model.config.max_position_embeddings:
                keep.append(row)  # else the model's context is full, and the episode ends here
        live = [live[row] for row in keep]
        if live:
            sampler.keep(keep)
    return episodes


# --- 5. Log-probs of the sampled ids (Delta_t's two halves) -------------------------------------

LOGITS_AT_ONCE = 2 ** 26  # 256 MB in float32
DRIFT = {"float32": 1e-3, "bfloat16": 0.1}  # nats a token by which two passes over the same ids may differ on average


def forward_dtype(model, config):
    """Context of every forward pass, sampling included: --dtype bfloat16 computes in it, on float32 weights."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")


def token_logprobs(hidden, head_weight, ids, temperature=1.0, with_entropy=False):
    """Log-softmax of hidden (N, H) @ head_weight (V, H).T / temperature at ids (N,), and its exact entropy in nats.

    Returns (logprobs (N,), entropy (N,) or None) in at least float32. Rows go in chunks that the backward pass computes
    again: float32 logits of all rows never exist at once (16,384 rows of Qwen's 151,936 tokens would take 10 GB).
    """
    def chunk(hidden, head_weight, ids):
        logits = hidden @ head_weight.T
        scores = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, -1)
        entropy = -(scores.exp() * scores).sum(-1) if with_entropy else scores[:, 0]
        return scores.gather(1, ids[:, None])[:, 0], entropy

    rows = max(1, LOGITS_AT_ONCE // len(head_weight))
    run = chunk if len(ids) <= rows else lambda *args: checkpoint(chunk, *args, use_reentrant=False)
    parts = [run(h, head_weight, i) for h, i in zip(hidden.split(rows), ids.split(rows))]
    logprobs, entropy = (torch.cat(part) for part in zip(*parts))
    return logprobs, entropy if with_entropy else None


def response_mask(episodes, device="cpu"):
    """(B, T) 1.0 where an episode has a t-th sampled id. From here on column t is the t-th sampled id of its episode,
    in the student's sequence and in the teacher's alike."""
    counts = torch.tensor([sum(episode.mask) for episode in episodes], device=device)
    return (torch.arange(int(counts.max()), device=device) < counts[:, None]).float()


def response_logprobs(model, episodes, config, with_skill=False, with_entropy=False):
    """Log-probs (and entropy) of the sampled ids as the student or, with_skill, the teacher sees them: (B, T)."""
    views = [episode.view(with_skill) for episode in episodes]
    width = max(len(ids) for ids, _ in views)
    ids, mask, real = torch.tensor([[row + [0] * (width - len(row)) for row in rows] for rows in
                                    (*zip(*views), [[1] * len(ids) for ids, _ in views])], device=model.device)  # (B, S)
    sampled = mask[:, 1:].bool()  # the state at position s-1 predicts the id at s
    with forward_dtype(model, config):
        hidden = model.base_model(input_ids=ids, attention_mask=real, use_cache=False).last_hidden_state
        logprobs, entropy = token_logprobs(hidden[:, :-1][sampled], model.get_output_embeddings().weight,
                                           ids[:, 1:][sampled], config.temperature, with_entropy)
    inside = response_mask(episodes, model.device) > 0
    place = lambda x: torch.zeros(inside.shape, device=x.device).masked_scatter(inside, x)
    return place(logprobs), place(entropy) if with_entropy else None


def micro_batches(episodes, budget):
    """Cut a list of episodes, in order, into lists whose padded sequences hold at most `budget` tokens."""
    batches = [[]]
    for episode in episodes:
        longest = max(len(e.ids) + len(e.skill_ids) for e in batches[-1] + [episode])
        if batches[-1] and longest * (len(batches[-1]) + 1) > budget:
            batches.append([])
        batches[-1].append(episode)
    return batches


@torch.no_grad()
def score(model, episodes, config, with_skill=False):
    """response_logprobs of all of a step's episodes, without graph: (B, T)."""
    parts = [response_logprobs(model, micro, config, with_skill)[0]
             for micro in micro_batches(episodes, config.micro_tokens)]
    width = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, width - part.shape[1])) for part in parts])


# --- 6. Objectives (paper, sections 2.2 to 2.4): pure functions on (B, T) tensors ----------------

def visible(mask, *tensors):
    """The tensors with 0 wherever mask is 0: what stands there, NaN included, reaches no value and no gradient."""
    return [x.masked_fill((mask == 0).expand_as(x), 0.0) for x in tensors]


def masked_mean(x, mask):
    """Mean of x over the tokens where mask is 1; 0 if there are none."""
    return (visible(mask, x)[0] * mask).sum() / mask.sum().clamp(min=1)


def group_advantages(scores, groups, weights=None, normalize_std=True, eps=1e-6):
    """GRPO's advantage (section 2.2): (score - mean) / (std + eps) within each group, std with n-1.

    scores (N,), groups (N,) ints -> (N,). weights (N,) count a row as that many rows (the official code counts an
    episode once per turn). A group of one row has mean 0 and std 1.
    >>> group_advantages(torch.tensor([1., 0., 0., 0.]), torch.tensor([7, 7, 7, 7]))   # 1.5, -0.5, -0.5, -0.5
    """
    scores = scores if scores.is_floating_point() else scores.float()
    groups = torch.as_tensor(groups, device=scores.device)
    weights = torch.ones_like(scores) if weights is None else torch.as_tensor(weights).to(scores)
    advantages = torch.empty_like(scores)
    for group in groups.unique():
        rows = groups == group
        x, w = scores[rows], weights[rows]
        n, mean, std = w.sum(), 0.0, 1.0
        if n > 1:
            mean = (w * x).sum() / n
            std = ((w * (x - mean) ** 2).sum() / (n - 1)).sqrt()
        advantages[rows] = (x - mean) / (std + eps) if normalize_std else x - mean
    return advantages


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps=0.2, dual_clip=3.0):
    """PPO's clipped loss (section 2.2); advantages (B, T) or broadcastable, or (B,): one an episode.

    dual_clip (official code; None: off) caps the loss of a token with negative advantage A at -A dual_clip.
    Returns (loss, stats): clip_fraction, ratio_mean.
    """
    advantages = torch.as_tensor(advantages).to(logprobs)
    advantages = (advantages[:, None] if advantages.ndim == 1 else advantages).expand_as(logprobs)
    logprobs, old_logprobs, advantages = visible(mask, logprobs, old_logprobs.detach(), advantages)
    ratio = (logprobs - old_logprobs).exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_eps, 1 + clip_eps)
    loss = torch.maximum(plain, clipped)
    if dual_clip:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return masked_mean(loss, mask), {"clip_fraction": masked_mean((clipped > plain).float(), mask).item(),
                                     "ratio_mean": masked_mean(ratio, mask).item()}


def kl_k3(logprobs, ref_logprobs):
    """The k3 estimate of KL(policy || reference) on each token: exp(d) - d - 1 with d = reference - policy, >= 0."""
    d = (ref_logprobs - logprobs).clamp(max=20)  # beyond the clamp of the value; keeps exp, and its gradient, finite
    d = torch.where(d.isnan(), d.detach(), d)  # NaN stays NaN but sends no gradient: it may stand under a mask
    return (d.exp() - d - 1).clamp(-10, 10)


def gate(kind, gap, entropy=None, beta=5.0, mask=None, generator=None):
    """The gate g_t (section 2.4): how far the teacher is trusted on each token. Detached, shaped like gap.

    gap is Delta_t = teacher - student. "gap", the paper's choice: sigmoid(beta gap). "none": 1.
    >>> gate("gap", torch.tensor([0.5, -0.2, 0.0]))   # 0.924, 0.269, 0.500
    """
    gap = gap.detach()
    if kind == "gap":
        return torch.sigmoid(beta * gap)
    if kind == "none":
        return torch.ones_like(gap)
    raise ValueError(f"unknown gate {kind!r}")


def sdar_loss(logprobs, teacher_logprobs, mask, kind="gap", beta=5.0, entropy=None):
    """The gated self-distillation loss (section 2.4): mean of g_t (log pi_T - log pi_theta).

    Its gradient on a token is -g_t grad log pi_theta, through the student alone: every sampled token is pushed up,
    harder where the teacher agrees. On policy that is, in expectation, REINFORCE with reward sigmoid(beta Delta_t);
    any constant gate has expected gradient zero; and for small gaps it is beta/4 of the reverse KL's gradient.
    Returns (loss, stats): gate_mean, gate_active (share of g > 0.5), gap_mean.
    """
    logprobs, teacher_logprobs = visible(mask, logprobs, teacher_logprobs.detach())
    gap = teacher_logprobs - logprobs
    g = gate(kind, gap, entropy, beta, mask)
    return masked_mean(g * gap, mask), {"gate_mean": masked_mean(g, mask).item(),
                                        "gate_active": masked_mean((g > 0.5).float(), mask).item(),
                                        "gap_mean": masked_mean(gap.detach(), mask).item()}


# --- 7. Update (paper, section 2.4 and appendix B): L = L_GRPO + lambda L_SDAR --------------------

def step_batch(model, start, episodes, config):
    """What the update reads besides the teacher, from before its first optimiser step: (B, T) tensors mask, old,
    advantages and, with a start policy, ref. Asserts that what was sampled is what is scored, by both readers."""
    for e in episodes:
        student, teacher = ([i for i, m in zip(*e.view(skilled)) if m] for skilled in (False, True))
        assert student == teacher and len(student) == len(e.logprobs), "student and teacher must score the sampled ids"
        assert e.view(True)[0][e.skill_at:][:len(e.skill_ids)] == e.skill_ids, "the teacher must read the skill"
    batch = {"mask": response_mask(episodes, model.device), "old": score(model, episodes, config)}
    sampled = torch.tensor([x for episode in episodes for x in episode.logprobs], device=model.device)
    drift = (batch["old"][batch["mask"] > 0] - sampled).abs().mean().item()
    assert drift < DRIFT[config.dtype], f"ids sampled are not ids scored: {drift:.2g} nats apart"
    scores, groups, turns = torch.tensor([[e.reward - config.invalid_penalty * e.invalid, e.group, e.turns]
                                          for e in episodes], device=model.device).T
    advantages = group_advantages(scores, groups, turns if config.turn_weights else None, config.normalize_std)
    batch["advantages"] = advantages[:, None].expand_as(batch["mask"])  # one for all tokens of an episode
    if start is not None:
        batch["ref"] = score(start, episodes, config)
    return batch


def update(model, optimizer, episodes, batch, config, order):
    """One pass over the episodes, in `order`, in `minibatches` optimiser steps. Returns metrics, weighted by tokens.

    A mini-batch's loss is the mean over all of its tokens, to which a micro-batch adds its share: neither gradient nor
    metrics depend on how it is cut.
    """
    pg_weight, distil_weight, beta_factor = METHODS[config.method]
    metrics = dict.fromkeys(("kl", "sdar_loss", "gap_mean", "gate_mean", "gate_active"))  # None: not in this method
    norms, all_tokens = [], batch["mask"].sum().item()
    for chosen in np.array_split(order, min(config.minibatches, len(order))):
        chosen_tokens, rest = batch["mask"][chosen].sum().item(), chosen
        for micro in micro_batches([episodes[i] for i in chosen], config.micro_tokens):
            rows, rest = rest[:len(micro)], rest[len(micro):]
            logprobs, entropy = response_logprobs(model, micro, config, with_entropy=True)
            part = {key: value[rows, :logprobs.shape[1]] for key, value in batch.items()}
            mask = part["mask"]
            drift = masked_mean((logprobs - part["old"]).abs(), mask)
            assert norms or drift < DRIFT[config.dtype], "before any update the ratio must be 1"
            policy, stats = policy_loss(logprobs, part["old"], part["advantages"], mask, config.clip_eps, config.dual_clip)
            terms = {"policy_loss": (pg_weight, policy), "entropy": (-config.entropy_coef, masked_mean(entropy, mask))}
            if "ref" in part:
                terms["kl"] = (config.kl_coef, masked_mean(kl_k3(logprobs, part["ref"]), mask))
            if "teacher" in part:
                distil, gate_stats = sdar_loss(logprobs, part["teacher"], mask, config.gate,
                                               config.gate_beta * beta_factor, entropy)
                terms["sdar_loss"] = (config.sdar_coef * distil_weight, distil)
                stats |= gate_stats
            loss = sum(weight * term for weight, term in terms.values())
            (loss * (mask.sum().item() / chosen_tokens)).backward()
            stats |= {"loss": loss.item(), **{name: term.item() for name, (_, term) in terms.items()}}
            for name, value in stats.items():
                metrics[name] = (metrics.get(name) or 0.0) + value * mask.sum().item() / all_tokens
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).item())
        if math.isfinite(norms[-1]):  # one NaN would be in all weights for good
            optimizer.step()
        optimizer.zero_grad()
    return {**metrics, "grad_norm": sum(norms) / len(norms)}


# --- 8. Evaluation and the training loop (paper, section 4.1 and appendix B) --------------------

def evaluate(model, chat, envs, config):
    """Play the panel without and with the skill in the prompt. Plain n/N of single tries: success, success_skill,
    episodes, and by_type {task type: [episodes, won, won with the skill]}."""
    by_type, tasks = {}, envs[0].panel(config.eval_split, config.eval_episodes)
    for with_skill in (False, True):
        for first in range(0, len(tasks), EVAL_BATCH):
            starts = [(task, seed, 0) for task, seed in tasks[first:first + EVAL_BATCH]]
            for episode in rollout(model, chat, envs, starts, config, (1, first), with_skill, config.eval_temperature):
                row = by_type.setdefault(episode.task_type, [0, 0, 0])
                row[0] += not with_skill
                row[1 + with_skill] += episode.won
    episodes, won, won_skill = map(sum, zip(*by_type.values()))
    return {"success": won / episodes, "success_skill": won_skill / episodes, "episodes": episodes, "by_type": by_type}


def train(config):
    """The whole run: evaluate, then roll out, score, update, `steps` times over. Writes only below config.out.
    Returns the last step's metrics, with start_success and the like from before training."""
    run = Run(config)
    model, chat, envs, tasks = run.model, run.chat, run.envs, run.envs[0].tasks("train")
    distils = METHODS[config.method][1] > 0
    start = run.start_policy() if config.kl_coef or config.teacher == "frozen" else None
    if not run.step:
        run.begin(evaluate(model, chat, envs, config))
    for step in run.steps():
        rng = np.random.default_rng([2, config.seed, step])  # so a resumed run draws the same
        chosen = rng.choice(len(tasks), config.tasks_per_step, replace=len(tasks) < config.tasks_per_step)
        starts = [(tasks[task], int(rng.integers(10 ** 6)), group) for group, task in enumerate(chosen)]
        starts = [one for one in starts for _ in range(config.group_size)]
        clock = [time.perf_counter()]
        episodes = rollout(model, chat, envs, starts, config, (3, config.seed, step))
        clock.append(time.perf_counter())
        batch = {}
        if distils:
            if config.teacher == "lagged" and (step - 1) % config.teacher_refresh == 0:
                run.lagged = copy.deepcopy(model)
            teacher = {"live": model, "lagged": run.lagged, "frozen": start}[config.teacher]
            batch["teacher"] = score(teacher, episodes, config, with_skill=True)
        clock.append(time.perf_counter())
        batch |= step_batch(model, start if config.kl_coef else None, episodes, config)
        metrics = update(model, run.optimizer, episodes, batch, config, rng.permutation(len(episodes)))
        clock.append(time.perf_counter())
        if step == config.steps or (config.eval_every and step % config.eval_every == 0):
            metrics |= {"eval_" + key: value for key, value in evaluate(model, chat, envs, config).items()}
        run.log(step, episodes, metrics, clock)
    return run.finish()


# ======== PART II: THE WORKSHOP. The reader of the paper can stop here. ========

# --- 9. The tiny policy: a real Qwen3 with a real tokenizer, warm-started in random households --

TINY = {  # the recipe: a change here, or in the world, makes the carried policy be rebuilt
    "version": 1,  # raise it with every change of warmstart() itself
    "steps": 900, "batch": 32, "muon_lr": 0.05, "adam_lr": 4e-3, "warmup": 50, "seed": 0,
    "model": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8,
              "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 512},
    "skilled": 0.75,      # share of demonstrations whose player has read the skills of its task
    "distracted": 0.3,    # share in which skills of other tasks stand between them
    "takeover": 0.5,      # share of skilled ones whose first 1-8 turns an explorer plays: the teacher will have to
                          # judge states that the student got itself into
    "noise": 0.05,        # random actions: played, so that the policy sees states off the path, but never imitated
    "observation": 0.2,   # weight of observation tokens in the loss; knowing the world helps acting in it
}
TINY_FOLDER = Path(__file__).resolve().parent / ".assets" / "tiny-policy"
TINY_TEMPLATE = (  # no system role: what the system message says, these weights learned in the warm start
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|assistant|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def tiny_tokenizer():
    """One token a phrase of the toy world, articles and punctuation dropped: an episode is some 90 tokens."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    things = [*PLACES, *CLASSES, *(f"{c} {n}" for c in CLASSES for n in (1, 2))]
    words = sorted({*PHRASES, *things}, key=lambda word: (-len(word), word))
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>"] + words)}, unk_token="<unk>"))
    known = "|".join(map(re.escape, words))
    other = r"(?!(?:a|an|and|the|The)(?!\w))[^\s.,:]+"
    core.pre_tokenizer = pre_tokenizers.Split(Regex(rf"(?<!\w)(?:{known})(?!\w)|(?<!\w){other}"), "removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>", unk_token="<unk>",
                                   additional_special_tokens=["<|user|>", "<|assistant|>"], chat_template=TINY_TEMPLATE)


def demonstration(chat, rng):
    """One scripted episode in a fresh random household, so that weights can learn the format, exploring and reading
    a skill, but nothing of the household of training and evaluation. Returns (ids, loss weight of each id)."""
    env = ToyEnv(Household.random(rng), max_turns=12)
    kind = rng.choice(sorted(TASK_TEXT))
    task = rng.choice([task for task, goal in env.goals.items() if goal[0] == kind])
    observation, info = env.reset(task, rng.random())
    relevant = retrieve(env.skills, task, kind, "keyword")
    skills = relevant if rng.random() < TINY["skilled"] else []
    if rng.random() < TINY["distracted"]:
        others = [skill for skill in env.skills if skill not in relevant]
        skills = skills + rng.sample(others, rng.randint(1, len(others)))
        rng.shuffle(skills)
    known, over = {skill.name for skill in skills}, False
    explores = rng.randint(1, 8) if known and rng.random() < TINY["takeover"] else 0
    prompt, at = chat.first(env.instructions, observation)
    ids = prompt[:at] + chat.encode(skill_text(skills)) + prompt[at:]
    weights, turn = [0.0] * len(ids), 0
    while not over:
        noisy = rng.random() < TINY["noise"]
        action = scripted_action(env, known if turn >= explores else set(), rng)
        action = re.sub(r" (from|in/on|with) .*", "", rng.choice(info["admissible"])) if noisy else action
        observation, _, terminated, truncated, info = env.step(action)
        over = terminated or truncated
        response = chat.encode(action) + [chat.end_id]
        between = [] if over else chat.next(observation, ended=True)
        ids += response + between
        weights += [float(turn >= explores and not noisy)] * len(response) + [TINY["observation"]] * len(between)
        turn += 1
    return ids, weights


def tiny_fingerprint(chat):
    """Hash of what the warm start depends on: TINY and, through sample demonstrations, the world, the scripted player,
    the skills, the tokenizer and the chat template."""
    rng = random.Random("fingerprint")
    sample = [TINY, len(chat.tokenizer), [demonstration(chat, rng) for _ in range(32)]]
    return hashlib.sha256(json.dumps(sample, sort_keys=True).encode()).hexdigest()


def file_hashes(folder):
    """{file name: SHA-256} of a folder's files, its own record apart."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.iterdir()) if path.name != "fingerprint.json"}


def warmstart(folder, steps=TINY["steps"]):
    """Train the tiny policy by imitation and save it in `folder` (Hugging Face format), replacing what is there.

    Deterministic on one machine and PyTorch. Muon on the matrices matters: with AdamW alone the policy needs several
    times the steps before it reads the skill."""
    check_writable(Path(folder))
    transformers = quiet_transformers()
    chat = Chat(tiny_tokenizer())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(TINY["seed"])
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
            vocab_size=len(chat.tokenizer), tie_word_embeddings=True, bos_token_id=None,
            eos_token_id=chat.tokenizer.eos_token_id, pad_token_id=chat.tokenizer.pad_token_id, **TINY["model"]))
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    rest = [p for name, p in model.named_parameters() if "layers." not in name or p.ndim < 2]
    optimizers = [torch.optim.Muon(matrices, lr=TINY["muon_lr"], weight_decay=0.01),
                  torch.optim.AdamW(rest, lr=TINY["adam_lr"], betas=(0.9, 0.98), weight_decay=0.01)]
    schedule = lambda step: min(1, (step + 1) / TINY["warmup"]) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) for optimizer in optimizers]
    rng = random.Random(TINY["seed"])
    bar = tqdm(range(steps), desc="warm start of the tiny policy", unit="step")
    for _ in bar:
        rows = [demonstration(chat, rng) for _ in range(TINY["batch"])]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in rows])
        weights = torch.tensor([w + [0.0] * (width - len(w)) for _, w in rows])[:, 1:]
        real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in rows])
        logits = model(input_ids=ids, attention_mask=real).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for item in (*optimizers, *schedulers):
            item.step()
        model.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")

    def write(target):
        model.save_pretrained(target)
        chat.tokenizer.save_pretrained(target)
        record = {"recipe": tiny_fingerprint(chat), "files": file_hashes(target)}
        (target / "fingerprint.json").write_text(json.dumps(record, indent=1) + "\n")
    replace_folder(Path(folder), write)


def tiny_policy():
    """The folder of the tiny policy. It is built anew when absent, of another recipe, or not as it was written."""
    try:
        record = json.loads((TINY_FOLDER / "fingerprint.json").read_text())
        trusted = record == {"recipe": tiny_fingerprint(Chat(tiny_tokenizer())), "files": file_hashes(TINY_FOLDER)}
    except (OSError, ValueError):
        trusted = False
    if not trusted:
        why = "of another recipe, or changed" if TINY_FOLDER.exists() else "not there"
        print(f"The tiny policy in {TINY_FOLDER} is {why}: building it, once (two to three minutes).", file=sys.stderr)
        warmstart(TINY_FOLDER)
    return TINY_FOLDER


# --- 10. Configuration errors, models, the run's folder -----------------------------------------

CHOICES = {"preset": ("toy", "paper"), "env": tuple(ENVS), "method": tuple(METHODS), "gate": ("gap", "none"),
           "teacher": ("live", "lagged", "frozen"), "retrieval": ("keyword", "none"),
           "dtype": ("float32", "bfloat16"), "eval_split": ("dev", "eval")}
MAY_BE_ZERO = ("seed", "max_turns", "eval_every", "eval_temperature", "clip_eps", "dual_clip", "kl_coef", "entropy_coef",
               "invalid_penalty", "adam_beta2", "weight_decay", "sdar_coef", "gate_beta")


class UserError(ValueError):
    """Bad input; main() prints it as one line and exits with 2."""


def unknown(what, value, known):
    """The message for a bad choice, the nearest good one first."""
    near = difflib.get_close_matches(str(value), known, 1)
    return f"unknown {what} {value!r}: " + (f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(known)}"


def check_config(config):
    """UserError for a value that no run could use."""
    for name, known in CHOICES.items():
        if getattr(config, name) not in known:
            raise UserError(unknown(flag(name), getattr(config, name), known))
    for name, value in vars(config).items():
        if type(value) in (int, float) and not (0 < value < math.inf or value == 0 and name in MAY_BE_ZERO):
            raise UserError(f"{flag(name)} {value}: must be {'at least' if name in MAY_BE_ZERO else 'more than'} 0")
    if config.adam_beta2 >= 1:
        raise UserError("--adam-beta2 must be less than 1")
    if config.group_size < 2:
        raise UserError("--group-size must be at least 2: an advantage compares the episodes of one task")
    if config.device.split(":")[0] not in ("", "cpu", "cuda"):
        raise UserError(unknown("--device", config.device, ("cpu", "cuda")))


def flag(name):
    """A field of Config as it is typed."""
    return "--" + name.replace("_", "-")


def quiet_transformers():
    """The library, imported late (it takes seconds) and without progress bars and advice."""
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def load_policy(config):
    """The start policy and its Chat, ready for use. UserError if it is no usable checkpoint."""
    transformers = quiet_transformers()
    if config.device != "cpu" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
    path = tiny_policy() if config.model == "tiny" else config.model
    if not Path(path).exists() and (str(path).startswith((".", "/", "~")) or str(path).count("/") != 1):
        raise UserError(f"--model {path}: no such folder (a hub name looks like Qwen/Qwen3-0.6B)")
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise UserError(f"--model {path}: no config.json in it, so it is no Hugging Face checkpoint")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
        return model.to(config.device).eval(), Chat(tokenizer)
    except Exception as error:  # whatever a broken or absent checkpoint makes the library raise
        raise UserError(f"--model {path}: cannot be used: {(str(error).strip() or repr(error)).splitlines()[0]}") from error


EVAL_BATCH = 64  # episodes of the panel played at once; fixed, so that their sampling is too


def check_context(model, env, episodes, config):
    """UserError if episodes of `env` that start with these prompts cannot fit the model's context."""
    prompt, context = max(len(episode.view(True)[0]) for episode in episodes), model.config.max_position_embeddings
    if prompt + env.max_turns * config.max_new_tokens > context:
        raise UserError(f"a prompt of {prompt} tokens and --max-turns {env.max_turns} x --max-new-tokens "
                        f"{config.max_new_tokens} do not fit the model's context of {context}")


def make_envs(config):
    """One environment for each episode of a step or of a part of the panel."""
    return [make_env(config.env, max_turns=config.max_turns)
            for _ in range(max(EVAL_BATCH, config.tasks_per_step * config.group_size))]


def check_writable(folder):
    """UserError if `folder` cannot be made or written."""
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{folder}: {parent} is not a folder that can be written")


def replace_folder(folder, write):
    """Let write(temporary folder) fill a folder, then put it in the place of `folder`."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    try:
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        fresh.mkdir(parents=True)
        write(fresh)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error


class Run:
    """The chores of a run: environment, start policy, folder, log, progress bar, checkpoint and final table.

    What can be wrong with the input is found in the constructor, before anything is written.
    """
    FREE = ("steps", "out", "resume", "overwrite", "device", "micro_tokens", "eval_every", "save_every")  # may change

    def __init__(self, config):
        self.config, self.folder, self.step, self.lagged = config, Path(config.out), 0, None
        self.envs = make_envs(config)
        self.claim()
        self.model, self.chat = load_policy(config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.lr, betas=(0.9, config.adam_beta2),
                                           weight_decay=config.weight_decay)
        if config.resume:
            try:
                self.load()
            except Exception as error:  # whatever a torn file makes torch.load raise
                raise UserError(f"--resume: the checkpoint in {self.folder} cannot be read: {error!r:.200}") from error
            if self.step >= config.steps:
                raise UserError(f"--resume: the run in {self.folder} has all of its {self.step} steps; raise --steps")

    def claim(self):
        """Check that the folder can be written and that nothing in it would be lost."""
        config, folder = self.config, self.folder
        check_writable(folder)
        if config.resume:
            if not (folder / "checkpoint" / "trainer.pt").is_file():
                raise UserError(f"--resume: there is no checkpoint in {folder}")
            try:
                old = dict(json.loads((folder / "config.json").read_text()))
            except (OSError, ValueError, TypeError) as error:
                raise UserError(f"--resume: {folder}/config.json cannot be read") from error
            changed = [flag(key) for key, value in vars(config).items() if key not in self.FREE and old.get(key) != value]
            if changed:
                raise UserError(f"--resume: {', '.join(changed)} not as in {folder}/config.json")
        elif (folder / "metrics.jsonl").exists():
            if not config.overwrite:
                raise UserError(f"--out {folder} already holds a run: --resume continues it, --overwrite replaces it")
        elif folder.exists() and any(folder.iterdir()):
            raise UserError(f"--out {folder} is not empty and holds no run")

    def begin(self, before):
        """Say where training starts from, and write the folder's first files."""
        config, self.before = self.config, {"start_" + key: value for key, value in before.items()}
        size, student, teacher = sum(p.numel() for p in self.model.parameters()), before["success"], before["success_skill"]
        print(f"{config.method} on {config.env} with {config.model} ({size:,} parameters), {config.preset} preset, seed "
              f"{config.seed}: {config.steps} steps of {config.tasks_per_step} tasks x {config.group_size} episodes\n"
              f"before training, {before['episodes']} held-out episodes: success {student:.2f} without the skill, "
              f"{teacher:.2f} with it")
        if teacher <= student:
            print("The teacher is not better than the student: there is nothing to distil. Look at the skill bank, or at "
                  "whether this model can use a skill at all.")
        self.save()
        (self.folder / "config.json").write_text(json.dumps(vars(config), indent=1) + "\n")
        (self.folder / "metrics.jsonl").write_text("")

    def start_policy(self):
        """A frozen copy of the weights that the run started from."""
        return load_policy(self.config)[0] if self.step else copy.deepcopy(self.model)

    def steps(self):
        """The steps still to do, as a progress bar."""
        self.bar = tqdm(range(self.step + 1, self.config.steps + 1), initial=self.step, total=self.config.steps,
                        desc=self.config.method, unit="step")
        return self.bar

    def log(self, step, episodes, metrics, clock):
        """Append a line to metrics.jsonl and show it; save when due. clock: seconds at the start of the step and after
        its rollout, teacher and update."""
        turns, tokens, n = sum(e.turns for e in episodes), sum(sum(e.mask) for e in episodes), len(episodes)
        seconds = dict(zip(("seconds_rollout", "seconds_teacher", "seconds_update"), np.diff(clock).tolist()))
        metrics = {"step": step, "success": sum(e.won for e in episodes) / n, "reward": sum(e.reward for e in episodes) / n,
                   "turns": turns / n, "invalid_rate": sum(e.invalid for e in episodes) / turns,
                   "response_tokens": tokens / n, **seconds, "tokens_per_second": tokens / (clock[-1] - clock[0]), **metrics}
        with open(self.folder / "metrics.jsonl", "a") as lines:
            lines.write(json.dumps(metrics) + "\n")
        shown = {"success": "success", "gap": "gap_mean", "gate": "gate_mean", "loss": "loss"}
        self.bar.set_postfix({name: f"{metrics[key]:.3g}" for name, key in shown.items() if metrics[key] is not None})
        self.step, self.metrics, self.episodes = step, metrics, episodes
        if step == self.config.steps or step % self.config.save_every == 0:
            self.save()

    def save(self):
        """Checkpoint: Hugging Face format, and the trainer's state. Every chance hangs on (seed, step), so there is no
        random state to keep."""
        def write(folder):
            self.model.save_pretrained(folder)
            self.chat.tokenizer.save_pretrained(folder)
            lagged = self.lagged.state_dict() if self.lagged is not None else None
            torch.save({"step": self.step, "before": self.before, "optimizer": self.optimizer.state_dict(), "lagged": lagged},
                       folder / "trainer.pt")
        replace_folder(self.folder / "checkpoint", write)

    def load(self):
        """Continue from the checkpoint: weights, optimiser, lagged teacher; metrics of later steps are dropped."""
        folder = self.folder / "checkpoint"
        state = torch.load(folder / "trainer.pt", weights_only=True, map_location=self.model.device)
        weights = load_policy(replace(self.config, model=str(folder)))[0].state_dict()
        if state["lagged"]:
            self.lagged = copy.deepcopy(self.model)
            self.lagged.load_state_dict(state["lagged"])
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.before = state["step"], state["before"]
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()[:self.step]
        (self.folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))

    def finish(self):
        """Print the table and a sample episode. Returns the last step's metrics, with start_* from before training."""
        self.bar.close()
        rows = self.before["start_by_type"]
        print_table([("before", rows, 1), ("before, with skill", rows, 2), ("after", self.metrics["eval_by_type"], 1),
                     ("after, with skill", self.metrics["eval_by_type"], 2)])
        lines = [json.loads(line) for line in open(self.folder / "metrics.jsonl")]
        seconds = {part: sum(line[f"seconds_{part}"] for line in lines) for part in ("rollout", "teacher", "update")}
        print("\nseconds: " + ", ".join(f"{part} {value:.1f}" for part, value in seconds.items()))
        sample = max(self.episodes, key=lambda episode: (episode.won, -episode.turns))
        print(f"\nA training episode of step {self.step}, {'won' if sample.won else 'lost'} (the teacher also read: "
              f"{self.chat.tokenizer.decode(sample.skill_ids)!r}):")
        for i, text in enumerate(sample.transcript):
            print(f"  > {text}" if i % 2 else f"  {text}")
        print(f"\n{self.folder}: config.json, metrics.jsonl, checkpoint/")
        return {**self.before, **self.metrics}


def wilson(wins, n, z=1.96):
    """95 % Wilson score interval of a proportion: (low, high)."""
    p, scale = wins / n, 1 + z * z / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / scale, (middle + half) / scale


def print_table(columns):
    """Success by task type and over all. columns: (title, by_type, index of the wins); 95 % Wilson interval for all."""
    kinds = sorted(columns[0][1])
    print("\nheld-out success" + "".join(f"{title:>26}" for title, _, _ in columns))
    for kind in kinds + ["all"]:
        cells = []
        for _, by_type, index in columns:
            row = by_type[kind] if kind != "all" else [sum(column) for column in zip(*by_type.values())]
            low, high = wilson(row[index], row[0])
            cells.append(f"{row[index]}/{row[0]} {row[index] / row[0]:.2f}" + (f" [{low:.2f}, {high:.2f}]" if kind == "all" else ""))
        print(f"{kind:<16}" + "".join(f"{cell:>26}" for cell in cells))


# --- 11. Command line ---------------------------------------------------------------------------

def command_evaluate(config):
    """Play the panel with the given model and print the table."""
    envs = make_envs(config)
    by_type = evaluate(*load_policy(config), envs, config)["by_type"]
    print_table([("without skill", by_type, 1), ("with skill", by_type, 2)])


def command_warmstart(config):
    """Rebuild the tiny policy that the repository carries."""
    warmstart(TINY_FOLDER)
    command_evaluate(replace(config, model="tiny"))


COMMANDS = {"train": train, "evaluate": command_evaluate, "warmstart": command_warmstart}


def parse_args(argv):
    """Command line -> (command, Config). The flags are Config's fields; - and _ are the same in them."""
    parser = argparse.ArgumentParser("python sdar.py [command]", allow_abbrev=False, exit_on_error=False,
                                     description=f"Commands: {', '.join(COMMANDS)} (default: train).")
    for f in fields(Config):
        toy, paper = f.metadata["toy"], f.metadata["paper"]
        known = f": {', '.join(CHOICES[f.name])}" if f.name in CHOICES else ""
        default = f"{toy}; paper: {paper}" if toy != paper else toy
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type, "metavar": f.type.__name__}
        parser.add_argument(flag(f.name), default=None, help=f"{f.metadata['help']}{known} [{default}]", **kind)
    argv = [re.sub(r"^--[^=]+", lambda typed: flag(typed[0][2:]), arg) for arg in argv]
    command = argv.pop(0) if argv and not argv[0].startswith("-") else "train"
    if command not in COMMANDS:
        raise UserError(unknown("command", command, list(COMMANDS)))
    values, rest = parser.parse_known_args(argv)
    if rest and rest[0] in COMMANDS:
        raise UserError(f"the command comes first: python sdar.py {rest[0]} [flags]")
    if rest:
        near = difflib.get_close_matches(rest[0].split("=")[0], [flag(f.name) for f in fields(Config)], 1)
        raise UserError(f"unknown flag {rest[0]}: " + (f"did you mean {near[0]}?" if near else "--help lists the flags"))
    return COMMANDS[command], Config(**{key: value for key, value in vars(values).items() if value is not None})


def main(argv=None):
    """Run a command; returns the exit code: 0, 2 on bad input (one line on stderr), 130 on Ctrl-C."""
    try:
        command, config = parse_args(sys.argv[1:] if argv is None else list(argv))
        command(config)
        return 0
    except (UserError, EnvUnavailable, argparse.ArgumentError) as error:
        print(f"sdar.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sdar.py: stopped; if this was a training run, --resume continues it", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
