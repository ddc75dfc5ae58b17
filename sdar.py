"""SDAR: Self-Distilled Agentic Reinforcement Learning (arXiv 2605.15155), the whole method in one file to read.

An agent plays text games over several turns and is rewarded only at the end. GRPO turns that one number into an
advantage for every token of the episode. SDAR adds a dense signal: a teacher, which is the same network shown the same
conversation plus a skill text that the student never sees, scores every token that the student sampled, and a gate
decides how far it is trusted on that token. At test time there is no skill: what it said has been learned.

    python sdar.py                                    # train the carried tiny policy on the toy household, on a CPU
    python sdar.py --model Qwen/Qwen3-0.6B            # a checkpoint from the hub, through the same code
Sections: 1 configuration, 2 conversation, 3 rollout, 4 log-probs, 5 objectives, 6 update, 7 evaluation and training.
Axes: B episodes, T sampled tokens of an episode (padded), S tokens of its whole sequence, V vocabulary, H width.
"""
import copy
import math
import re
import time
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from envs import Bandit, retrieve, skill_text  # the skill banks, and which skills a task gets (paper, section 2.1)

# ======== PART I: THE PAPER ========
# --- 1. Configuration (paper, section 4.1 and appendix C) ---------------------------------------
class Method(NamedTuple):
    """A row of the paper's Table 1. toy, paper: what it changes in the presets (chosen on `dev`, like SDAR's own)."""
    policy: float = 1      # weight of GRPO's policy loss
    teacher: str = ""      # what the teacher's log-probs go into: "gate", "skill_sd" (losses), "advantage" or nothing
    beta: float = 1        # factor on gate_beta
    skilled: bool = False  # the student itself reads the skill while it trains
    toy: dict = {}
    paper: dict = {}


METHODS = {
    "grpo": Method(toy={"lr": 1e-3}),
    "opsd": Method(policy=0, teacher="gate", toy={"lr": 3e-4}),  # like the official baseline it keeps the gate
    "grpo_opsd": Method(teacher="gate", beta=0),  # the gate is 1/2 on every token: on policy, expected gradient zero
    "skill_grpo": Method(skilled=True),
    "skill_sd": Method(teacher="skill_sd", toy={"sdar_coef": 0.1}, paper={"sdar_coef": 0.001}),
    "rlsd": Method(teacher="advantage"),
    "sdar": Method(teacher="gate"),
}


def option(help, toy, paper=None):
    """A field of Config: its default is the preset's column, `toy` or, where the paper's run differs, `paper`."""
    return field(default=None, metadata={"help": help, "toy": toy, "paper": toy if paper is None else paper})


@dataclass
class Config:
    """One run. Every field is also a flag; a value given by hand wins over the preset's."""
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
    lr: float = option("learning rate of AdamW, constant (toy: grpo 1e-3, opsd 3e-4)", 6e-4, 1e-6)
    minibatches: int = option("optimiser steps a batch", 4)
    clip_eps: float = option("epsilon, the PPO clip of the ratio", 0.2)
    dual_clip: float = option("cap on the loss of a bad action, in advantages (official code; 0: off)", 3.0)
    kl_coef: float = option("weight of the k3 KL to the frozen start policy", 0.01)
    entropy_coef: float = option("entropy bonus (official code; not in the paper's loss)", 0.0, 0.001)
    invalid_penalty: float = option("taken off the score per invalid action, in rewards", 0.01)
    turn_weights: bool = option("an episode counts once a turn in its group's statistics (official code)", False, True)
    normalize_std: bool = option("divide advantages by the group's standard deviation", True)
    grad_clip: float = option("largest norm of the gradient", 1.0)
    # SDAR
    sdar_coef: float = option("lambda, the weight of the distillation loss (skill_sd: 0.1, paper 0.001)", 1.0, 0.01)
    gate: str = option("trust in the teacher on each token; the last four are controls", "gap")
    gate_beta: float = option("beta, the sharpness of the gate", 5.0)
    teacher: str = option("weights that read the skill: the step's own, a lagged copy, the start's", "live")
    teacher_refresh: int = option("steps between copies of the lagged teacher", 10)
    retrieval: str = option("how a task's skills are chosen", "keyword")
    skills: str = option("control: the retrieved skills, ones of another task type, or an empty text", "right")
    rlsd_mix: float = option("share of the teacher in RLSD's advantages, at the start", 0.5)
    rlsd_decay: int = option("steps until that share is 0", 40, 100)
    eval_every: int = option("steps between evaluations (0: before and after only)", 10, 5)
    eval_episodes: int = option("episodes of the fixed panel", 300, 128)
    eval_temperature: float = option("of sampling in evaluation", 0.4)
    eval_split: str = option("held-out tasks: dev for choosing settings, eval for reporting", "eval")

    def __post_init__(self):
        self.preset = self.preset or ("toy" if self.model in (None, "tiny") else "paper")
        own = getattr(METHODS.get(self.method or "sdar"), self.preset if self.preset in ("toy", "paper") else "", {})
        for f in fields(self):
            if getattr(self, f.name) is None:
                setattr(self, f.name, own.get(f.name, f.metadata.get(self.preset)))
        check_config(self)
        self.out = self.out or f"runs/{self.env}-{self.method}-s{self.seed}"
        self.device = self.device or ("cuda" if self.model != "tiny" and torch.cuda.is_available() else "cpu")


# --- 2. Conversation: token in, token out (paper, section 2.1) --------------------------------
class Chat:
    """The chat template's own frames around messages, found by rendering it once around marks. Ids are only appended:
    rendered again, Qwen3's template drops earlier reasoning; tokenised again, text may give other ids than were sampled.
    (The official code makes a row of every turn, its prompt rebuilt from the last two, the skill before the template.)"""

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
    skills: list                                    # what the teacher reads there and the student does not,
    skill_ids: list                                 # and its ids
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


# --- 3. Rollout (paper, section 2.1 and appendix B) ---------------------------------------------
class Sampler:
    """A policy and the KV cache of a batch of growing conversations: each turn feeds only what is new. Blocks of new
    ids are padded on the left. The holes stay in the cache, masked out, and positions count real tokens only, so
    log-probs equal those of an unpadded pass."""

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
def rollout(model, chat, envs, starts, config, stream, with_skill=False, temperature=None, bandit=None):
    """Play an episode from each (task, seed, group) of `starts`, all in lockstep; returns the Episodes.
    stream: ints; episode i samples from the random stream (*stream, i), whatever its neighbours in the batch do.
    with_skill: the skill is in the prompt that is sampled from. bandit: chooses it under --retrieval ucb."""
    episodes, strategy = [], {"right": config.retrieval, "wrong": "wrong", "empty": "none"}[config.skills]
    for env, (task, seed, group) in zip(envs, starts):
        observation, info = env.reset(task, seed)
        skills = retrieve(env.skills, info["task"], info["task_type"], strategy, seed, bandit)
        ids, at = chat.first(env.instructions, observation)
        episode = Episode(info["task"], info["task_type"], group, ids, [0] * len(ids), at, skills,
                          chat.encode(skill_text(skills)), transcript=[observation])
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


# --- 4. Log-probs of the sampled ids (Delta_t's two halves) -------------------------------------
EVAL_BATCH = 64  # episodes of the panel played at once; fixed, so that their sampling is too
LOGITS_AT_ONCE = 2 ** 26  # 256 MB in float32
DRIFT = {"float32": 1e-3, "bfloat16": 0.1}  # nats a token by which two passes over the same ids may differ on average


def forward_dtype(model, config):
    """Context of every forward pass, sampling included: --dtype bfloat16 computes in it, on float32 weights."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")


def token_logprobs(hidden, head_weight, ids, temperature=1.0, with_entropy=False):
    """Log-softmax of hidden (N, H) @ head_weight (V, H).T / temperature at ids (N,), and its exact entropy in nats.
    Returns (logprobs (N,), entropy (N,) or None) in at least float32. Rows go in chunks that the backward pass computes
    again: float32 logits of all rows never exist at once (16,384 rows of Qwen's 151,936 tokens would take 10 GB)."""
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
    """(B, T) 1.0 where an episode has a t-th sampled id: that is what column t is from here on, for both readers."""
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


# --- 5. Objectives (paper, sections 2.2 to 2.4): pure functions on (B, T) tensors ----------------
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
    Returns (loss, stats): clip_fraction, ratio_mean."""
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
    """The k3 estimate of KL(policy || reference) (section 2.2) on each token: exp(d) - d - 1 with d = reference - policy, >= 0."""
    d = (ref_logprobs - logprobs).clamp(max=20)  # beyond the clamp of the value; keeps exp, and its gradient, finite
    d = torch.where(d.isnan(), d.detach(), d)  # NaN stays NaN but sends no gradient: it may stand under a mask
    return (d.exp() - d - 1).clamp(-10, 10)


CONTROLS = ("constant", "shuffled", "centred")  # gates whose value on a token depends on the other tokens of the batch


def gate(kind, gap, entropy=None, beta=5.0, mask=None, generator=None):
    """The gate g_t (section 2.4): how far the teacher is trusted on each token. Detached, shaped like gap (B, T).
    gap is Delta_t = teacher - student, entropy the student's h_t in nats. The paper's: "gap" sigmoid(beta gap),
    "entropy" sigmoid(beta h), "soft_or" sigmoid(beta [1 - (1 - h)(1 - gap)]); "none" 1. Controls, over the tokens where
    mask is 1: "constant" the gap gate's mean; "shuffled" its values permuted (by generator); "centred" the gap gate less
    its mean: the same expected gradient (up to 1/batch), less variance. "reverse_kl" the gap itself: the signed gradient of the reverse
    KL to the teacher, which also pushes down.
    >>> gate("gap", torch.tensor([0.5, -0.2, 0.0]))   # 0.924, 0.269, 0.500
    """
    gap = gap.detach()
    g, mask = torch.sigmoid(beta * gap), torch.ones_like(gap) if mask is None else mask.expand_as(gap)
    gates = {
        "gap": lambda: g,
        "none": lambda: torch.ones_like(gap),
        "entropy": lambda: torch.sigmoid(beta * entropy.detach()),
        "soft_or": lambda: torch.sigmoid(beta * (1 - (1 - entropy.detach()) * (1 - gap))),
        "reverse_kl": lambda: gap,
        "constant": lambda: masked_mean(g, mask).expand_as(g),
        "centred": lambda: g - masked_mean(g, mask),
        "shuffled": lambda: g.masked_scatter(mask > 0, g[mask > 0][order().to(g.device)]),
    }
    order = lambda: torch.randperm(int((mask > 0).sum()), generator=generator)
    if kind not in gates:
        raise ValueError(f"unknown gate {kind!r}")
    return gates[kind]()


def sdar_loss(logprobs, teacher_logprobs, mask, kind="gap", beta=5.0, entropy=None):
    """The gated self-distillation loss (section 2.4): mean of g_t (log pi_T - log pi_theta).
    Its gradient on a token is -g_t grad log pi_theta, through the student alone: every sampled token is pushed up,
    harder where the teacher agrees. On policy that is, in expectation, REINFORCE with reward sigmoid(beta Delta_t);
    any constant gate has expected gradient zero; and for small gaps it is beta/4 of the reverse KL's gradient.
    kind: a gate, or its values (B, T). Returns (loss, stats): gate_mean, gate_active (share of g > 0.5), gap_mean."""
    logprobs, teacher_logprobs = visible(mask, logprobs, teacher_logprobs.detach())
    gap = teacher_logprobs - logprobs
    entropy = None if entropy is None else visible(mask, entropy)[0]
    g = kind if torch.is_tensor(kind) else gate(kind, gap, entropy, beta, mask)
    return masked_mean(g * gap, mask), {"gate_mean": masked_mean(g, mask).item(),
                                        "gate_active": masked_mean((g > 0.5).float(), mask).item(),
                                        "gap_mean": masked_mean(gap.detach(), mask).item()}


def skill_sd_loss(logprobs, teacher_logprobs, old_logprobs, mask):
    """Skill-SD (arXiv 2604.10674, a baseline of section 4): mean of rho k3(l), l = student - teacher, rho = exp(student -
    old), not detached. On policy the gradient on a token is l grad log pi_theta: signed, as the reverse KL's, and
    unbounded. Returns (loss, stats): gap_mean."""
    logprobs, teacher_logprobs, old = visible(mask, logprobs, teacher_logprobs.detach(), old_logprobs.detach())
    l = logprobs - teacher_logprobs
    k3, rho = (-l).clamp(max=20).exp() - 1 + l, (logprobs - old).clamp(max=10).exp()
    return masked_mean(rho * k3, mask), {"gap_mean": -masked_mean(l.detach(), mask).item()}


def rlsd_advantages(advantages, teacher_logprobs, old_logprobs, mask, mix=0.5, clip_eps=0.2):
    """RLSD's advantages (B, T), a baseline of section 4: A ((1 - mix) + mix clip(exp(sign(A) gap), 1 - eps, 1 + eps)), with
    gap = teacher - old. The reward keeps the direction; the teacher moves the size, mix 0.5 from 0.9 A to 1.1 A."""
    advantages, gap = visible(mask, advantages.expand_as(old_logprobs), teacher_logprobs - old_logprobs)
    weight = (advantages.sign() * gap).exp().clamp(1 - clip_eps, 1 + clip_eps)
    return (advantages * (1 - mix + mix * weight)).detach()


# --- 6. Update (paper, section 2.4 and appendix B): L = L_GRPO + lambda L_SDAR --------------------
def step_batch(model, start, episodes, config):
    """What the update reads besides the teacher, from before its first optimiser step: (B, T) tensors mask, old,
    advantages, taught (B, 1) and, with a start policy, ref. Asserts that what was sampled is what is scored, by both readers."""
    for e in episodes:
        student, teacher = ([i for i, m in zip(*e.view(skilled)) if m] for skilled in (False, True))
        assert student == teacher and len(student) == len(e.logprobs), "student and teacher must score the sampled ids"
        assert e.view(True)[0][e.skill_at:][:len(e.skill_ids)] == e.skill_ids, "the teacher must read the skill"
    batch = {"mask": response_mask(episodes, model.device), "old": score(model, episodes, config)}
    batch["taught"] = torch.tensor([[bool(e.skill_ids)] for e in episodes], device=model.device)  # no skill: no teacher
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


def update(model, optimizer, episodes, batch, config, rng):
    """One pass over the shuffled episodes in `minibatches` optimiser steps. A micro-batch adds its share to its mini-batch's
    token mean: neither the gradient nor the metrics, which are returned, depend on how it is cut."""
    method, order, norms = METHODS[config.method], rng.permutation(len(episodes)), []
    metrics = dict.fromkeys(("kl", "sdar_loss", "gap_mean", "gate_mean", "gate_active"))  # None: not in this method
    kind = config.gate if method.beta else "gap"  # GRPO+OPSD is the gap gate with beta 0
    beta, generator = config.gate_beta * method.beta, torch.Generator().manual_seed(int(rng.integers(2 ** 31)))
    for chosen in np.array_split(order, min(config.minibatches, len(order))):
        tokens, rest, mini = batch["mask"][chosen].sum().item(), chosen, [episodes[i] for i in chosen]
        if method.teacher == "gate" and kind in CONTROLS:  # they need the gaps of the whole mini-batch
            now, mask = score(model, mini, config), response_mask(mini, model.device)
            gap = torch.where(batch["taught"][chosen], batch["teacher"][chosen, :now.shape[1]] - now, 0.0)
            batch.setdefault("gate", torch.zeros_like(batch["mask"]))[chosen, :now.shape[1]] = gate(
                kind, gap, None, beta, mask, generator)
        for micro in micro_batches(mini, config.micro_tokens):
            rows, rest = rest[:len(micro)], rest[len(micro):]
            logprobs, entropy = response_logprobs(model, micro, config, with_entropy=True)
            part = {key: value[rows, :logprobs.shape[1]] for key, value in batch.items()}
            mask = part["mask"]
            drift = masked_mean((logprobs - part["old"]).abs(), mask)
            assert norms or drift < DRIFT[config.dtype], "before any update the ratio must be 1"
            policy, stats = policy_loss(logprobs, part["old"], part["advantages"], mask, config.clip_eps, config.dual_clip)
            terms = {"policy_loss": (method.policy, policy), "entropy": (-config.entropy_coef, masked_mean(entropy, mask))}
            if "ref" in part:
                terms["kl"] = (config.kl_coef, masked_mean(kl_k3(logprobs, part["ref"]), mask))
            if method.teacher in ("gate", "skill_sd"):
                teacher = torch.where(part["taught"], part["teacher"], logprobs.detach())  # else its gap is 0
                if method.teacher == "gate":
                    distil, more = sdar_loss(logprobs, teacher, mask, part.get("gate", kind), beta, entropy)
                else:
                    distil, more = skill_sd_loss(logprobs, teacher, part["old"], mask)
                terms["sdar_loss"] = (config.sdar_coef, distil)
                stats |= more
            loss = sum(weight * term for weight, term in terms.values())
            (loss * (mask.sum().item() / tokens)).backward()
            stats |= {"loss": loss.item(), **{name: term.item() for name, (_, term) in terms.items()}}
            for name, value in stats.items():
                metrics[name] = (metrics.get(name) or 0.0) + value * mask.sum().item()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).item())
        if math.isfinite(norms[-1]):  # one NaN would be in all weights for good
            optimizer.step()
        optimizer.zero_grad()
    means = {name: value and value / batch["mask"].sum().item() for name, value in metrics.items()}
    return means | {"grad_norm": sum(norms) / len(norms)}


# --- 7. Evaluation and the training loop (paper, section 4.1 and appendix B) --------------------
def evaluate(model, chat, envs, config, bandit=None):
    """Play the panel without and with the skill in the prompt. Plain n/N of single tries: success, success_skill,
    episodes, and by_type {task type: [episodes, won, won with the skill]}."""
    by_type, tasks = {}, envs[0].panel(config.eval_split, config.eval_episodes)
    for with_skill in (False, True):
        for first in range(0, len(tasks), EVAL_BATCH):
            starts = [(task, seed, 0) for task, seed in tasks[first:first + EVAL_BATCH]]
            for episode in rollout(model, chat, envs, starts, config, (1, first), with_skill, config.eval_temperature, bandit):
                row = by_type.setdefault(episode.task_type, [0, 0, 0])
                row[0] += not with_skill
                row[1 + with_skill] += episode.won
    episodes, won, won_skill = map(sum, zip(*by_type.values()))
    return {"success": won / episodes, "success_skill": won_skill / episodes, "episodes": episodes, "by_type": by_type}


def train(config):
    """The whole run, written below config.out alone. Returns the last step's metrics and start_* from before training."""
    run, method = Run(config), METHODS[config.method]
    model, chat, envs, tasks = run.model, run.chat, run.envs, run.envs[0].tasks("train")
    if not run.step:
        run.begin(evaluate(model, chat, envs, config, run.bandit))
    run.bar = tqdm(range(run.step + 1, config.steps + 1), config.method, config.steps, initial=run.step, unit="step")
    for step in run.bar:
        rng = np.random.default_rng([2, config.seed, step])  # so a resumed run draws the same
        chosen = rng.choice(len(tasks), config.tasks_per_step, replace=len(tasks) < config.tasks_per_step)
        starts = [(tasks[task], int(rng.integers(10 ** 6)), group) for group, task in enumerate(chosen)]
        starts = [one for one in starts for _ in range(config.group_size)]
        clock = [time.perf_counter()]
        episodes = rollout(model, chat, envs, starts, config, (3, config.seed, step), method.skilled, bandit=run.bandit)
        clock.append(time.perf_counter())
        batch = {}
        if method.teacher:
            if config.teacher == "lagged" and (step - 1) % config.teacher_refresh == 0:
                run.lagged = copy.deepcopy(model)
            teacher = {"live": model, "lagged": run.lagged, "frozen": run.start}[config.teacher]
            batch["teacher"] = score(teacher, episodes, config, with_skill=True)
        clock.append(time.perf_counter())
        batch |= step_batch(model, run.start if config.kl_coef else None, episodes, config)
        advice = torch.where(batch["taught"], batch.get("teacher", batch["old"]), batch["old"])
        gap = batch["mask"] * (advice - batch["old"])
        if config.retrieval == "ucb":
            run.bandit.learn(episodes, batch["advantages"][:, 0].tolist(), (gap.sum(1) / batch["mask"].sum(1)).tolist())
        if method.teacher == "advantage":
            mix = config.rlsd_mix * max(0, 1 - step / config.rlsd_decay)
            batch["advantages"] = rlsd_advantages(batch["advantages"], advice, batch["old"], batch["mask"], mix)
        metrics = update(model, run.optimizer, episodes, batch, config, rng)
        metrics["gap_mean"] = masked_mean(gap, batch["mask"]).item() if method.teacher else None
        clock.append(time.perf_counter())
        if step == config.steps or (config.eval_every and step % config.eval_every == 0):
            metrics |= {"eval_" + k: value for k, value in evaluate(model, chat, envs, config, run.bandit).items()}
        run.log(step, episodes, metrics, clock)
    return run.finish()


# ======== PART II: THE WORKSHOP. The reader of the paper can stop here. ========

import argparse
import difflib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from envs import ENVS, EnvUnavailable, demonstration, make_env, toy_tokenizer
os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_VERBOSITY="error", TRANSFORMERS_VERBOSITY="error")

# --- 8. The tiny policy: a real Qwen3 with a real tokenizer, warm-started in random households --
WARMSTART = 1  # raise it with every change of warmstart()
TINY_FOLDER = Path(__file__).resolve().parent / ".assets" / "tiny-policy"


def fingerprint(folder):
    """Hashes of a tiny policy's files and of its recipe: WARMSTART and sample demonstrations, in which the world, the
    scripted player, the skills, the tokenizer and the chat template show."""
    chat, rng = Chat(toy_tokenizer()), random.Random("fingerprint")
    sample = [WARMSTART, len(chat.tokenizer), [demonstration(chat, rng) for _ in range(32)]]
    parts = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "fingerprint.json"}
    parts["recipe"] = json.dumps(sample).encode()
    return {name: hashlib.sha256(data).hexdigest() for name, data in parts.items()}


def warmstart(folder, steps=900):
    """Train the tiny policy by imitation and save it in `folder`. Deterministic on one machine and PyTorch. Muon on the
    matrices matters: with AdamW alone the policy needs several times the steps before it reads the skill."""
    import transformers
    transformers.utils.logging.disable_progress_bar()
    folder.with_name(folder.name + ".new").mkdir(parents=True, exist_ok=True)  # cannot be written? say so now
    chat, rng = Chat(toy_tokenizer()), random.Random(0)
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=len(chat.tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=16, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=chat.tokenizer.eos_token_id, pad_token_id=chat.tokenizer.pad_token_id))
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    rest = [p for name, p in model.named_parameters() if "layers." not in name or p.ndim < 2]
    optimizers = [torch.optim.Muon(matrices, lr=0.05, weight_decay=0.01),
                  torch.optim.AdamW(rest, lr=4e-3, betas=(0.9, 0.98), weight_decay=0.01)]
    schedule = lambda step: min(1, (step + 1) / 50) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) for optimizer in optimizers]
    for _ in tqdm(range(steps), desc="warm start of the tiny policy", unit="step"):
        rows = [demonstration(chat, rng) for _ in range(32)]
        columns = (*zip(*rows), [[1] * len(ids) for ids, _ in rows])
        ids, weights, real = (torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, c)), batch_first=True) for c in columns)
        logits = model(input_ids=ids, attention_mask=real).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for item in (*optimizers, *schedulers):
            item.step()
        model.zero_grad()

    def write(target):
        model.save_pretrained(target)
        chat.tokenizer.save_pretrained(target)
        (target / "fingerprint.json").write_text(json.dumps(fingerprint(target), indent=1) + "\n")
    replace_folder(folder, write)


def tiny_policy():
    """The folder of the tiny policy. It is built anew when absent, of another recipe, or not as it was written."""
    try:
        trusted = json.loads((TINY_FOLDER / "fingerprint.json").read_text()) == fingerprint(TINY_FOLDER)
    except (OSError, ValueError):
        trusted = False
    if not trusted:
        print(f"{TINY_FOLDER} is absent, changed or of another recipe: building it, once, in some minutes.", file=sys.stderr)
        warmstart(TINY_FOLDER)
    return TINY_FOLDER


# --- 9. Configuration errors, models, the run's folder -----------------------------------------
CHOICES = {"preset": ("toy", "paper"), "env": tuple(ENVS), "method": tuple(METHODS),
           "gate": ("gap", "entropy", "soft_or", "none", "reverse_kl", *CONTROLS),
           "teacher": ("live", "lagged", "frozen"), "retrieval": ("keyword", "ucb", "full", "random", "none"),
           "skills": ("right", "wrong", "empty"), "dtype": ("float32", "bfloat16"), "eval_split": ("dev", "eval"),
           "device": ("", "cpu", "cuda")}
MAY_BE_ZERO = ("seed", "max_turns", "eval_every", "eval_temperature", "clip_eps", "dual_clip", "kl_coef", "entropy_coef",
               "invalid_penalty", "sdar_coef", "gate_beta", "rlsd_mix")
flag = lambda name: "--" + name.replace("_", "-")  # a field of Config as it is typed


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
    if config.retrieval == "ucb" and METHODS[config.method].skilled:
        raise UserError(f"--retrieval ucb learns from a teacher, and --method {config.method} has none")
    if config.group_size < 2:
        raise UserError("--group-size must be at least 2: an advantage compares the episodes of one task")


def load_policy(config):
    """The start policy and its Chat, ready for use. UserError if it is no usable checkpoint."""
    import transformers  # late: it takes seconds
    transformers.utils.logging.disable_progress_bar()
    if config.device != "cpu" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
    path = tiny_policy() if config.model == "tiny" else config.model
    is_path = Path(path).exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") != 1
    if is_path and not (Path(path) / "config.json").is_file():
        raise UserError(f"--model {path}: no folder with a config.json (a hub name looks like Qwen/Qwen3-0.6B)")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
        return model.to(config.device).eval(), Chat(tokenizer)
    except Exception as error:  # whatever a broken or absent checkpoint makes the library raise
        raise UserError(f"--model {path}: cannot be used: {(str(error).strip() or repr(error)).splitlines()[0]}") from error


def check_context(model, env, episodes, config):
    """UserError if episodes of `env` that start with these prompts cannot fit the model's context."""
    prompt, context = max(len(episode.view(True)[0]) for episode in episodes), model.config.max_position_embeddings
    if prompt + env.max_turns * config.max_new_tokens > context:
        raise UserError(f"a prompt of {prompt} tokens and --max-turns {env.max_turns} x --max-new-tokens "
                        f"{config.max_new_tokens} do not fit the model's context of {context}")


def make_envs(config):
    """One environment for each episode of a step or of a part of the panel."""
    number = max(EVAL_BATCH, config.tasks_per_step * config.group_size)
    return [make_env(config.env, max_turns=config.max_turns) for _ in range(number)]


def replace_folder(folder, write):
    """Let write(temporary folder) fill a folder, then put it in the place of `folder`."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    write(fresh)  # save_pretrained makes the folder
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


class Run:
    """The chores of a run: environments, policies, folder, log, checkpoint, final table. Bad input is found before writing."""
    FREE = ("steps", "out", "resume", "overwrite", "device", "micro_tokens", "eval_every", "save_every")  # may change

    def __init__(self, config):
        self.config, self.folder, self.step, self.lagged = config, Path(config.out), 0, None
        self.envs, self.bandit = make_envs(config), Bandit()
        parent = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        if not (parent.is_dir() and os.access(parent, os.W_OK)):
            raise UserError(f"--out {config.out}: {parent} is not a folder that can be written")
        run_there = (self.folder / "metrics.jsonl").exists()
        if not config.resume and any(self.folder.glob("*")) and not (run_there and config.overwrite):
            raise UserError(f"--out {config.out} is not empty: --resume continues a run there, --overwrite replaces it")
        self.model, self.chat = load_policy(config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.lr, weight_decay=0.01)
        self.start = copy.deepcopy(self.model) if config.kl_coef or config.teacher == "frozen" else None  # frozen
        if config.resume:
            self.load()

    def begin(self, before):
        """Say where training starts from, and write the folder's first files."""
        config, self.before = self.config, {"start_" + key: value for key, value in before.items()}
        size, student, teacher = sum(p.numel() for p in self.model.parameters()), before["success"], before["success_skill"]
        print(f"{config.method} on {config.env} with {config.model} ({size:,} parameters), {config.preset} preset, seed "
              f"{config.seed}: {config.steps} steps of {config.tasks_per_step} tasks x {config.group_size} episodes\n"
              f"before training, {before['episodes']} held-out episodes: success {student:.2f}, with the skill {teacher:.2f}")
        if teacher <= student:
            print("The teacher is not better than the student: there is nothing to distil. Can this model use a skill?")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "metrics.jsonl").write_text("")
        (self.folder / "config.json").write_text(json.dumps(vars(config), indent=1) + "\n")
        self.save()

    def log(self, step, episodes, metrics, clock):
        """Append a line to metrics.jsonl; save when due. clock: seconds at the start, after rollout, teacher, update."""
        turns, tokens, n = sum(e.turns for e in episodes), sum(sum(e.mask) for e in episodes), len(episodes)
        seconds = dict(zip(("seconds_rollout", "seconds_teacher", "seconds_update"), np.diff(clock).tolist()))
        metrics = {"step": step, "success": sum(e.won for e in episodes) / n, "reward": sum(e.reward for e in episodes) / n,
                   "turns": turns / n, "invalid_rate": sum(e.invalid for e in episodes) / turns,
                   "response_tokens": tokens / n, **seconds, "tokens_per_second": tokens / (clock[-1] - clock[0]), **metrics}
        with open(self.folder / "metrics.jsonl", "a") as lines:
            lines.write(json.dumps(metrics) + "\n")
        shown = {key: metrics[key] for key in ("success", "gap_mean", "gate_mean", "loss") if metrics[key] is not None}
        self.bar.set_postfix(shown)
        self.step, self.metrics, self.episodes = step, metrics, episodes
        if step == self.config.steps or step % self.config.save_every == 0:
            self.save()

    def save(self):
        """Checkpoint: Hugging Face format, and the trainer's state. All randomness hangs on (seed, step): none to keep."""
        def write(folder):
            self.model.save_pretrained(folder)
            self.chat.tokenizer.save_pretrained(folder)
            torch.save({"step": self.step, "before": self.before, "optimizer": self.optimizer.state_dict(),
                        "lagged": self.lagged and self.lagged.state_dict(), "arms": self.bandit.arms}, folder / "trainer.pt")
        replace_folder(self.folder / "checkpoint", write)

    def load(self):
        """Continue from the checkpoint; metrics of later steps are dropped."""
        try:
            old = dict(json.loads((self.folder / "config.json").read_text()))
            state = torch.load(self.folder / "checkpoint" / "trainer.pt", weights_only=True, map_location=self.model.device)
            weights = load_policy(replace(self.config, model=str(self.folder / "checkpoint")))[0].state_dict()
        except Exception as error:  # whatever a torn file makes a library raise
            raise UserError(f"--resume: {self.folder} holds no run that can be read: {error!r:.200}") from error
        changed = [flag(key) for key, value in vars(self.config).items() if key not in self.FREE and old.get(key) != value]
        if changed:
            raise UserError(f"--resume: {', '.join(changed)} not as in {self.folder}/config.json")
        if state["step"] >= self.config.steps:
            raise UserError(f"--resume: the run in {self.folder} has all of its {state['step']} steps; raise --steps")
        if state["lagged"]:
            self.lagged = copy.deepcopy(self.model)
            self.lagged.load_state_dict(state["lagged"])
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.before, self.bandit.arms = state["step"], state["before"], state["arms"]
        (self.folder / "config.json").write_text(json.dumps(vars(self.config), indent=1) + "\n")
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()[:self.step]
        (self.folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))

    def finish(self):
        """Print the table and a sample episode. Returns the last step's metrics, with start_* from before training."""
        played = {"before": [self.before["start_by_type"]], "after": [self.metrics["eval_by_type"]]}
        print_table([(title + "*" * skilled, runs, skilled, "") for title, runs in played.items() for skilled in (0, 1)])
        lines = [json.loads(line) for line in open(self.folder / "metrics.jsonl")]
        parts = {name: sum(line["seconds_" + name] for line in lines) for name in ("rollout", "teacher", "update")}
        print("\nseconds: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items()))
        sample = max(self.episodes, key=lambda episode: (episode.won, -episode.turns))
        print(f"\nA training episode of step {self.step}, {'won' if sample.won else 'lost'} (the teacher also read: "
              f"{self.chat.tokenizer.decode(sample.skill_ids)!r}):")
        print("\n".join("  " + "> " * (i % 2) + text for i, text in enumerate(sample.transcript)))
        print(f"\n{self.folder}: config.json, metrics.jsonl, checkpoint/")
        return {**self.before, **self.metrics}


def wilson(wins, n, z=1.96):
    """95 % Wilson score interval of a proportion: (low, high)."""
    p, scale = wins / n, 1 + z * z / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / scale, (middle + half) / scale


def print_table(rows):
    """Success by task type, mean±sd over runs; of one run also n/N, Wilson. rows: (title, [by_type], 1 if skilled, remark)."""
    kinds, width = sorted(rows[0][1][0]), max(len(title) for title, *_ in rows) + 2
    print("\n" + " " * width + "".join(f"{kind:<11}" for kind in [*kinds, "all"]) + "(*: with the skill in the prompt)")
    for title, runs, skilled, remark in rows:
        line = f"{title:<{width}}"
        for group in [[kind] for kind in kinds] + [kinds] if runs else []:
            counts = [[sum(run[kind][i] for kind in group) for i in (1 + skilled, 0)] for run in runs]
            shares = [wins / n for wins, n in counts]
            line += f"{np.mean(shares):.2f}" + (f"±{np.std(shares, ddof=1):.2f}  " if len(runs) > 1 else " " * 7)
        if len(runs) == 1:
            line += "{}/{} [{:.2f}, {:.2f}]  ".format(*counts[0], *wilson(*counts[0]))
        print((line + remark).rstrip())


# --- 10. Comparison: methods, or values of a setting, over seeds --------------------------------
def plan(given, methods, seeds, sweep, out):
    """What compare runs: {row: [its Config for each seed]}. given: the other flags, {field: value}."""
    def typed(name, text):
        return name.replace("-", "_"), getattr(parse_args([f"--{name}={text}"])[1], name.replace("-", "_"))

    name, _, values = sweep.partition("=")
    rows = [typed(name, value) for value in values.split(",")] if sweep else []
    rows = [("method", "grpo"), *rows] if sweep else [typed("method", method) for method in methods.split(",")]
    seeds, runs = list(dict.fromkeys(typed("seed", seed)[1] for seed in seeds.split(","))), {}
    if {"seed", "resume", "out"} & {field for field, _ in rows} or {"seed", "resume"} & set(given):
        raise UserError("compare takes --seeds and one --out, and continues by itself")
    for field, value in rows:
        row = {**given, field: value}
        if METHODS[row.get("method", "sdar")].teacher == "":  # what it does not read does not make it another run
            row = {key: value for key, value in row.items() if key not in ("gate", "gate_beta", "sdar_coef", "teacher")}
        plain = Config(**{key: given[key] for key in ("env", "model", "preset") if key in given}, method=row.get("method"))
        changed = {key: value for key, value in row.items() if key not in ("out", "overwrite") and value != getattr(plain, key)}
        folder = re.sub(r"[^\w.=+-]+", "_", "-".join([plain.method, *(f"{key}={value}" for key, value in changed.items())]))
        label = f"{plain.method} {field}={value}" if field in changed else plain.method
        new = [Config(**{**row, "seed": seed, "out": str(out / f"{folder}-s{seed}")}) for seed in seeds]
        if runs.setdefault(label, new) != new:
            raise UserError(f"--sweep {sweep}: two rows would both be called {label!r}")
    return runs


def finished(config):
    """The evaluations of a run, if it is complete, else None. UserError if it was made with other settings."""
    try:
        old = dict(json.loads(Path(config.out, "config.json").read_text()))
        lines = [json.loads(line) for line in open(Path(config.out, "metrics.jsonl"))]
    except (OSError, ValueError, TypeError):
        return None
    same = {**old, "overwrite": config.overwrite, "out": config.out} == vars(config)
    if not same and not config.overwrite:
        raise UserError(f"{config.out} holds a run with other settings: choose another --out, or --overwrite it")
    return [line for line in lines if "eval_success" in line] if same and len(lines) == config.steps else None


def launch(config):
    """Train from the first step, on one thread of a process of its own. Returns "" or what went wrong."""
    code = (f"import sys; sys.path[0] = {str(Path(__file__).resolve().parent)!r}; import json, sdar; "
            "sdar.train(sdar.Config(**json.loads(sys.argv[1])))")
    settings = json.dumps({**vars(config), "overwrite": True})  # of what is left of a run that did not finish
    done = subprocess.run([sys.executable, "-c", code, settings], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    return f"exit code {done.returncode}: {' '.join(done.stderr.split()[-20:])}" if done.returncode else ""


def t_interval(gains):
    """[mean, low, high]: 95 % interval of Student's t; with t = sqrt(df) tan(x) its density is prop. to cos(x)^(df-1)."""
    df, x = len(gains) - 1, np.linspace(-np.pi / 2, np.pi / 2, 10 ** 6 + 1)
    mass = (np.cos(x) ** (df - 1)).cumsum()
    half = math.sqrt(df) * math.tan(np.interp(0.975, mass / mass[-1], x)) * np.std(gains, ddof=1) / math.sqrt(len(gains))
    return [np.mean(gains), np.mean(gains) - half, np.mean(gains) + half]


def command_compare(config, given, methods, seeds, sweep, jobs):
    """Run methods, or values of one setting, over seeds from the same start policy, and report: the gain is over
    GRPO at its defaults. Finished runs in the folder are kept: a comparison can be stopped, continued, extended (by one
    compare at a time). Exit code 1 if a run failed."""
    out = Path(given.get("out") or "runs/compare")
    runs = plan(given, methods, seeds, sweep, out)
    todo = [run for row in runs.values() for run in row if finished(run) is None]
    print(f"{sum(map(len, runs.values()))} runs in {out}, {len(todo)} of them to do")
    start = evaluate(*load_policy(config), make_envs(config), config)
    with ThreadPoolExecutor(max(jobs, 0) or (1 if config.device == "cuda" else os.cpu_count())) as pool:
        try:
            reasons = list(tqdm(pool.map(launch, todo), total=len(todo), unit="run"))
        finally:
            pool.shutdown(cancel_futures=True)
    failed = {run.out: why or "no finished run" for run, why in zip(todo, reasons) if why or finished(run) is None}
    base = {run.seed: finished(run) for run in runs.get("grpo", ()) if run.out not in failed}
    report, table = {}, [("vanilla", [start["by_type"]], 0, ""), ("skill_prompt*", [start["by_type"]], 1, "")]
    for label, row in runs.items():
        done = {run.seed: finished(run) for run in row if run.out not in failed}
        gains = [lines[-1]["eval_success"] - base[seed][-1]["eval_success"] for seed, lines in done.items() if seed in base]
        gain = t_interval(gains) if len(gains) > 1 and label != "grpo" else None
        report[label] = {"evaluations": done, "failed": {run.seed: failed[run.out] for run in row if run.out in failed},
                         "minus_grpo": gain}
        remark = "minus grpo {:+.3f} [{:+.2f}, {:+.2f}]".format(*gain) if gain else ""
        remark += "".join(f"  seed {seed} failed: {why}" for seed, why in report[label]["failed"].items())
        by_type = [lines[-1]["eval_by_type"] for lines in done.values()]
        table += [(label, by_type, 0, remark)] + [(label + "*", by_type, 1, "")] * METHODS[row[0].method].skilled
    print_table(table)
    out.mkdir(parents=True, exist_ok=True)
    name = "-".join(["compare", *sweep.split("=")[:1]]).strip("-")
    (out / f"{name}.json").write_text(json.dumps({"start": start, "rows": report}) + "\n")
    draw({label: [[(0, start["success"]), *((line["step"], line["eval_success"]) for line in lines)]
                  for lines in row["evaluations"].values()] for label, row in report.items()}, out / f"{name}.svg")
    return int(bool(failed))


def draw(curves, path):
    """Mean learning curves, {label: [[(step, value), ...] of each run]}: as text and, with bands of one sd, as a picture."""
    print("\nheld-out success without the skill at training steps")
    curves = {label: (np.array(runs)[0, :, 0], np.array(runs)[:, :, 1]) for label, runs in curves.items() if runs}
    for label, (steps, values) in curves.items():
        bars = "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * mean))] for mean in values.mean(0))
        print(bars + "".join(f"  {step:.0f}: {mean:.2f}" for step, mean in zip(steps, values.mean(0))) + f"  {label}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no picture was drawn: it takes matplotlib (pip install matplotlib)")
    axes = Figure(figsize=(7, 4.2), layout="constrained").subplots()
    for label, (steps, values) in curves.items():
        mean, sd = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0
        line, = axes.plot(steps, mean, label=label)
        axes.fill_between(steps, mean - sd, mean + sd, alpha=0.15, color=line.get_color(), linewidth=0)
    axes.set(xlabel="training step", ylabel="held-out success without the skill", ylim=(0, 1))
    axes.legend(fontsize="small")
    axes.figure.savefig(path)
    print(path)


# --- 11. Command line ---------------------------------------------------------------------------
def command_evaluate(config, rebuild=False):
    """Play the panel with the given model and print the table. rebuild: first build the carried tiny policy anew."""
    if rebuild:
        warmstart(TINY_FOLDER)
    by_type = evaluate(*load_policy(config), make_envs(config), config)["by_type"]
    print_table([("student", [by_type], 0, ""), ("student*", [by_type], 1, "")])


COMMANDS = {"train": train, "evaluate": command_evaluate, "compare": command_compare,
            "warmstart": partial(command_evaluate, rebuild=True)}
COMPARE = {"methods": (str, ",".join(METHODS), "rows"), "seeds": (str, "0,1,2,3,4", "of each row"),
           "sweep": (str, "", "NAME=VALUE,VALUE,...: rows of one setting instead"), "jobs": (int, 0, "at once (0: one a core)")}


def parse_args(argv):
    """Command line -> (command, Config). The flags are Config's fields; - and _ are the same in them."""
    argv = [re.sub(r"^--[^=]+", lambda typed: flag(typed[0][2:]), arg) for arg in argv]
    command = argv.pop(0) if argv and not argv[0].startswith("-") else "train"
    if command not in COMMANDS:
        raise UserError(unknown("command", command, list(COMMANDS)))
    parser = argparse.ArgumentParser(f"python sdar.py {command}", allow_abbrev=False, exit_on_error=False,
                                     description=f"Commands: {', '.join(COMMANDS)} (default: train).")
    for f in fields(Config):
        known = f": {', '.join(CHOICES[f.name])}" if f.name in CHOICES else ""
        default = " paper: ".join(dict.fromkeys(map(str, (f.metadata["toy"], f.metadata["paper"]))))
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type, "metavar": f.type.__name__}
        parser.add_argument(flag(f.name), default=None, help=f"{f.metadata['help']}{known} [{default}]", **kind)
    for name, (kind, default, text) in COMPARE.items() if command == "compare" else ():
        parser.add_argument(flag(name), type=kind, default=default, help=f"{text} [{default}]")
    values, rest = parser.parse_known_args(argv)
    if rest:
        near = difflib.get_close_matches(rest[0].split("=")[0], parser._option_string_actions, 1)
        raise UserError(f"unknown flag {rest[0]}: " + (f"did you mean {near[0]}?" if near else "--help lists them, after the command"))
    given = {key: value for key, value in vars(values).items() if value is not None}
    if command == "compare":
        options = {name: given.pop(name) for name in COMPARE}
        return partial(command_compare, given=given, **options), Config(**given)
    return COMMANDS[command], Config(**given)


def main(argv=None):
    """Run a command. Returns the exit code: 0; 1 a compared run failed; 2 bad input (one line on stderr); 130 Ctrl-C."""
    try:
        command, config = parse_args(sys.argv[1:] if argv is None else list(argv))
        code = command(config)
        return code if type(code) is int else 0
    except (UserError, EnvUnavailable, argparse.ArgumentError, OSError) as error:
        print(f"sdar.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sdar.py: stopped; if this was a training run, --resume continues it", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
