"""SDAR: Self-Distilled Agentic Reinforcement Learning (arXiv 2605.15155), the whole method in one file to read.

An agent plays text games over several turns and is rewarded only at the end. GRPO turns that one number into an
advantage for every token of the episode. SDAR adds a dense signal: a teacher, which is the same network shown the same
conversation plus a skill text that the student never sees, scores every token that the student sampled, and a gate
decides how far it is trusted on that token. At test time there is no skill: what it said has been learned.

    python sdar.py                                    # train the carried tiny policy on the toy household, on a CPU
    python sdar.py --model Qwen/Qwen3-0.6B            # a checkpoint from the hub, through the same code
Sections: 1 configuration (Config), 2 conversation (Chat, Episode.view), 3 rollout, 4 log-probs
(response_mask), 5 objectives (group_advantages, gate, sdar_loss), 6 update (update), 7 evaluation and training (train).
Axes: B episodes, T sampled tokens of an episode (padded), S tokens of its whole sequence, V vocabulary, H width.
"""
import inspect
import math
import re
import time
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from envs import Bandit, EnvUnavailable, retrieve, skill_text  # skills: paper, section 2.1

# ======== PART I: THE PAPER. What it calls of Part II does what its name says; share and gathered are for torchrun. ========
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
    env_data: str = option("the environment's games, checkout or questions ('': ALFWORLD_DATA or WEBSHOP_ROOT; toy: none)", "")
    search_url: str = option("retrieval server of search ('': http://127.0.0.1:8000/retrieve)", "")
    model: str = option("'tiny' (carried with the code), a hub name or a checkpoint folder", "tiny")
    preset: str = option("column of defaults: toy with the tiny model, paper with any other", "toy", "paper")
    method: str = option("row of the paper's Table 1", "sdar")
    seed: int = option("of tasks, sampling and order; never of the evaluation panel", 0)
    steps: int = option("training steps, each one batch of episodes", 60, 150)
    out: str = option("folder of the run ('': runs/<env>-<method>-s<seed>)", "")
    resume: bool = option("continue the run in `out` from its checkpoint", False)
    overwrite: bool = option("replace the run in `out`", False)
    save_every: int = option("steps between checkpoints", 10)
    max_bad_steps: int = option("steps in a row with an update skipped, its gradient not finite, that end the run", 3)
    device: str = option("cpu or cuda ('': cuda if there is one and the model is not tiny)", "")
    dtype: str = option("precision of forward passes; weights, log-probs and optimiser are float32", "float32", "bfloat16")
    micro_tokens: int = option("memory: padded tokens in one training pass; never changes the result", 8192, 16384)
    rollout_batch: int = option("memory: episodes played at once", 64)
    gradient_checkpointing: bool = option("memory: compute activations again in the backward pass", False)
    offload: bool = option("memory: keep the start policy and the lagged teacher on the CPU between their passes", False)
    kernel: bool = option("CUDA kernel for log-probs, compiled at first use", False)
    # rollouts
    tasks_per_step: int = option("tasks a step; each makes one group", 8, 16)
    group_size: int = option("G, episodes of one task from the same initial state", 8)
    temperature: float = option("of sampling, and therefore of every log-prob", 1.0)
    max_turns: int = option("turns an episode (0: the environment's own; toy 10)", 0)
    max_new_tokens: int = option("tokens a response", 8, 512)
    max_obs_tokens: int = option("tokens an observation, the admissible actions under it not counted", 512)
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
        method = METHODS.get(self.method or "sdar", Method())  # check_config refuses an unknown name
        own = {"toy": method.toy, "paper": method.paper}.get(self.preset, {})
        for f in fields(self):
            if getattr(self, f.name) is None:
                setattr(self, f.name, own.get(f.name, f.metadata.get(self.preset)))
        self.out = self.out or f"runs/{self.env}-{self.method}-s{self.seed}"
        self.device = self.device or ("cuda" if self.model != "tiny" and torch.cuda.is_available() else "cpu")
        check_config(self)

# --- 2. Conversation: token in, token out (paper, section 2.1) --------------------------------
class Chat:
    """The chat template's own frames around messages, found by rendering it once around marks. Ids are only appended:
    rendered again, Qwen3's template drops earlier reasoning; tokenised again, text may give other ids than were sampled.
    (The official code makes a row of every turn, its prompt rebuilt from the last two, the skill before the template.)"""
    def __init__(self, tokenizer, eos=None):  # eos: the checkpoint's own ends of a generation, an id or several
        self.tokenizer = tokenizer
        self._tokenize = lambda text, **options: tokenizer(text, add_special_tokens=False, **options)["input_ids"]
        roles = {"SYSTEMTEXT": "system", "FIRSTTEXT": "user", "ANSWERTEXT": "assistant", "NEXTTEXT": "user"}
        text = tokenizer.apply_chat_template([{"role": role, "content": mark} for mark, role in roles.items()],
                                             tokenize=False, add_generation_prompt=True, enable_thinking=False)
        self._before_first = [self._tokenize(part) for part in text.split("FIRSTTEXT")[0].split("SYSTEMTEXT")]
        between, after = text.split("ANSWERTEXT")[1].split("NEXTTEXT")
        self._between, self._after = self._tokenize(between), self._tokenize(after)
        self.end_id = self._between[0]  # end of turn: the last id of a finished response
        self.stop_ids = sorted({self.end_id, tokenizer.eos_token_id, *np.ravel(eos).tolist()} - {None})
        added, harmless = tokenizer.get_added_vocab(), {tokenizer.unk_token_id} - {*self.stop_ids}  # added: {text: id}
        if self.end_id not in added.values():
            raise ValueError("its chat template closes a turn with no control token, so a response could not end")
        cut = re.compile(f"(?s)(?<=(?={'|'.join(map(re.escape, added))}).)")
        self.pieces = lambda text: cut.split(text.encode(errors="replace").decode())  # lone surrogates become ?
        special = lambda id: not tokenizer.decode([id], skip_special_tokens=True)
        self._control = {id for text, id in added.items() if len(text) > 1 or special(id)} - harmless
        cached = lru_cache(maxsize=5000)(self._encode)  # environments repeat themselves, in short texts
        self.encode = lambda text: (cached if len(text) < 500 else self._encode)(text)

    def _encode(self, text):
        """Ids of foreign text, which never becomes control: what looks like an added token (Qwen3's <think> is one that is
        not even marked special) is cut after its first character; what a normaliser makes look like one is left out."""
        parts = self._tokenize(self.pieces(text), split_special_tokens=True)
        return [id for ids in parts for id in ids if id not in self._control]

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
    overflowed: bool = False                        # ended because the model's context was full

    def view(self, with_skill):
        """(ids, mask) of the sequence as the student or, with the skill spliced in, the teacher reads it."""
        at, skill = self.skill_at, self.skill_ids if with_skill else []
        return self.ids[:at] + skill + self.ids[at:], self.mask[:at] + [0] * len(skill) + self.mask[at:]

# --- 3. Rollout (paper, section 2.1 and appendix B) ---------------------------------------------
@lru_cache
def cache_class():
    """The library's growing KV cache, its keys kept in the dtype of the values: under autocast RoPE leaves them in float32,
    at twice the memory. A function, since importing transformers takes seconds."""
    from transformers import DynamicCache

    class ValuesDtypeCache(DynamicCache):
        def update(self, key_states, value_states, *more, **named):
            return super().update(key_states.to(value_states.dtype), value_states, *more, **named)

    return ValuesDtypeCache

def cache_name(model):
    """What the installed library calls the KV cache in a forward pass: its name changed in 5.24. None: it takes no cache."""
    names = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in names), None)

class Sampler:
    """A policy and the KV cache of a batch of growing conversations: each turn feeds only what is new. Blocks of new
    ids are padded on the left. The holes stay in the cache, masked out, and positions count real tokens only, so
    log-probs equal those of an unpadded pass."""
    def __init__(self, model, temperature):
        self.model, self.temperature, self.real = model, temperature, None  # real (B, columns): 1 token, 0 hole
        self.cache = cache_class()(config=model.config)
        self.named_cache = {cache_name(model): self.cache}

    def feed(self, ids, new):
        """Append a block of columns, ids (B, n) and new (B, n) 1 where real; keep the logits of its last column."""
        past = new[:, :0] if self.real is None else self.real
        positions = (past.sum(1, keepdim=True) + new.cumsum(1) - 1).clamp(min=0)
        self.real = torch.cat([past, new], 1)
        causal = torch.ones(new.shape[1], self.real.shape[1], device=ids.device).tril(past.shape[1]).bool()
        mask = (causal & self.real[:, None].bool())[:, None]  # (B, 1, n, columns); the library's own costs a host sync
        self.logits = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True,
                                 logits_to_keep=1, **self.named_cache).logits[:, -1].float()

    def feed_rows(self, rows):
        """Append a list of ids to each conversation. A long first prompt that several share, as in a group, is fed once."""
        given = rows
        if self.real is None and max(map(len, rows)) > 64:
            rows = list(map(list, dict.fromkeys(map(tuple, rows))))
        ids, new = (pad_sequence(list(map(torch.tensor, block)), True, 0, "left").to(self.model.device)
                    for block in (rows, [[1] * len(row) for row in rows]))
        self.feed(ids, new)
        if len(rows) < len(given):
            self.keep([rows.index(row) for row in given])

    def respond(self, uniforms, stop_ids, stop_text=None):
        """Sample a response to each conversation, until a stop id, stop_text(ids) or the end of uniforms (B,
        max_new_tokens). Returns [(ids, logprobs)]. The last id of a response is not fed yet."""
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
            if stop_text:
                running = running & ~stop_text(torch.stack([ids for ids, _, _ in columns[-32:]], 1), None)
            if not running.any():  # the only host sync of a token
                break
        ids, logprobs, alive = (torch.stack(column, 1) for column in zip(*columns))
        return [(row[:n], scores[:n]) for row, scores, n in zip(ids.tolist(), logprobs.tolist(), alive.sum(1).tolist())]

    def keep(self, rows):
        """The batch of conversations becomes these rows of it; a row may be named several times."""
        rows = torch.tensor(rows, device=self.real.device)
        self.cache.reorder_cache(rows)
        self.real, self.logits = self.real[rows], self.logits[rows]

@torch.no_grad()
def rollout(model, chat, envs, starts, config, stream, with_skill=False, temperature=None, bandit=None):
    """Play an episode from each (task, seed, group) of `starts`, all in lockstep; returns the Episodes, but for those whose
    engine or server failed (EnvUnavailable if half of them did). stream: ints (first 1: evaluation, 3: training, 4: inspect);
    episode i samples from (*stream, i), whatever its neighbours do. with_skill: in the prompt. bandit: of --retrieval ucb."""
    strategy = {"right": config.retrieval, "wrong": "wrong", "empty": "none"}[config.skills]
    for env in envs:
        env.cut = partial(cut_text, chat, config.max_obs_tokens)
    mine = share(range(len(starts)))  # under torchrun every process plays its own; else all
    episodes = dict(zip(mine, call_all([partial(envs[i].reset, *starts[i][:2]) for i in mine], envs[0].slow)))
    # of each episode first (observation, info), then the Episode; a failure stays in its place
    playing = [i for i, begun in episodes.items() if not isinstance(begun, EnvUnavailable)]
    for i in playing:
        (observation, info), (_, seed, group) = episodes[i], starts[i]
        skills = retrieve(envs[i].skills, info["task"], info["task_type"], strategy, seed, bandit)
        ids, at = chat.first(envs[i].instructions, observation)
        episode = Episode(info["task"], info["task_type"], group, ids, [0] * len(ids), at, skills,
                          chat.encode(skill_text(skills)), transcript=[observation])
        if with_skill:  # it becomes part of the conversation, which both readers then see
            episode.ids, episode.mask = episode.view(with_skill)
            episode.skill_ids = []
        episodes[i] = episode
    check_context(model, envs[0], [episodes[i] for i in playing], config)
    streams = [np.random.default_rng([*stream, i]) for i in range(len(starts))]
    for first in range(0, len(playing), config.rollout_batch):
        live = playing[first:first + config.rollout_batch]
        sampler, fed = Sampler(model, config.temperature if temperature is None else temperature), [0] * len(starts)
        while live:
            uniforms = np.stack([streams[i].random(config.max_new_tokens, dtype=np.float32) for i in live])
            with forward_dtype(model, config):
                sampler.feed_rows([episodes[i].ids[fed[i]:] for i in live])
                responses = sampler.respond(torch.tensor(uniforms, device=model.device), chat.stop_ids,
                                            stop_criteria(chat, envs[0].stop_strings))
            texts = [chat.tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in responses]
            parsed, keep = [envs[i].parse(text) for i, text in zip(live, texts)], []
            results = call_all([partial(envs[i].step, action) for i, (action, _) in zip(live, parsed)], envs[0].slow)
            for row, (i, (ids, logprobs), text, (_, valid), result) in enumerate(zip(live, responses, texts, parsed, results)):
                if isinstance(result, EnvUnavailable):
                    episodes[i] = result
                    continue
                episode, (observation, reward, terminated, truncated, info) = episodes[i], result
                episode.ids, episode.mask = episode.ids + ids, episode.mask + [1] * len(ids)
                episode.logprobs += logprobs
                fed[i] = len(episode.ids) - 1  # the last sampled id is fed with the next observation
                episode.turns += 1
                episode.invalid += not (valid and info["valid"])
                episode.reward += reward
                episode.won = info["won"]
                episode.transcript += [text, observation]
                if terminated or truncated:
                    continue
                between = chat.next(observation, ended=ids[-1] == chat.end_id)
                length = len(episode.ids) + len(between) + len(episode.skill_ids) + config.max_new_tokens
                episode.overflowed = length > model.config.max_position_embeddings
                if not episode.overflowed:
                    episode.ids, episode.mask = episode.ids + between, episode.mask + [0] * len(between)
                    keep.append(row)
            live = [live[row] for row in keep]
            if live:
                sampler.keep(keep)
    return survivors(gathered([*episodes.values()]))

# --- 4. Log-probs of the sampled ids (Delta_t's two halves) -------------------------------------
LOGITS_AT_ONCE = 2 ** 26  # 256 MB in float32
KERNEL = None  # the function of logits that --kernel puts here
DRIFT = {"float32": 1e-3, "bfloat16": 0.1}  # nats a token by which two passes over the same ids may differ on average

def forward_dtype(model, config):
    """Context of every forward pass, sampling included: --dtype bfloat16 computes in it, on float32 weights."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")

def token_logprobs(hidden, head_weight, ids, temperature=1.0, with_entropy=False):
    """Log-softmax of hidden (N, H) @ head_weight (V, H).T / temperature at ids (N,), and its exact entropy in nats.
    Returns (logprobs (N,), entropy (N,) or None) in at least float32. Rows go in chunks that the backward pass computes
    again: float32 logits of all rows never exist at once (16,384 rows of Qwen's 151,936 tokens would take 10 GB)."""
    def chunk(hidden, head_weight, ids):
        logits = F.linear(hidden, head_weight)  # not @ .T: of a view, autocast would keep no copy for the next chunk
        if KERNEL and logits.is_cuda and len(ids):
            return KERNEL(logits, ids, temperature, with_entropy)
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
    ids, mask = zip(*(episode.view(with_skill) for episode in episodes))
    ids, mask, real = (pad_sequence(list(map(torch.tensor, rows)), True).to(model.device)  # (B, S)
                       for rows in (ids, mask, [[1] * len(row) for row in ids]))
    sampled = mask[:, 1:].bool()  # the state at position s-1 predicts the id at s
    with forward_dtype(model, config):
        hidden = model.base_model(input_ids=ids, attention_mask=real, use_cache=False).last_hidden_state
        logprobs, entropy = token_logprobs(hidden[:, :-1][sampled], model.get_output_embeddings().weight,
                                           ids[:, 1:][sampled], config.temperature, with_entropy)
    inside = response_mask(episodes, model.device) > 0
    place = lambda x: torch.zeros(inside.shape, device=x.device).masked_scatter(inside, x)
    return place(logprobs), place(entropy) if with_entropy else None

@torch.no_grad()
def score(model, episodes, config, with_skill=False):
    """response_logprobs of all of a step's episodes, without graph: (B, T)."""
    home = model.device  # the CPU for --offload's frozen copies
    model.to(config.device)
    parts = [response_logprobs(model, micro, config, with_skill)[0].cpu()  # .cpu() waits for the GPU, whose clock we read
             for micro in micro_batches(share(episodes), config.micro_tokens)]
    model.to(home)
    return pad_sequence([row for part in gathered(parts) for row in part], True).to(config.device)

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
            mean = (w * x).sum() / n if x.min() < x.max() else x[0]  # else rounding would tell equal scores apart
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
    """The k3 estimate of KL(policy || reference) (section 2.2) on each token: exp(d) - d - 1, d = reference - policy; the value
    is clamped to [-10, 10], as in the official code, its gradient finite everywhere."""
    d = (ref_logprobs - logprobs).clamp(max=20)  # keeps exp finite, and NaN under a mask out of the gradient
    return (d.exp() - d - 1).clamp(-10, 10)

BATCH_GATES = ("constant", "shuffled", "centred")  # gates whose value on a token depends on the other tokens of the batch

def gate(kind, gap, entropy=None, beta=5.0, mask=None, generator=None):
    """The gate g_t (section 2.4): how far the teacher is trusted on each token. Detached, shaped like gap (B, T).
    gap is Delta_t = teacher - student, entropy the student's h_t in nats. The paper's: "gap" sigmoid(beta gap), "entropy"
    sigmoid(beta h), "soft_or" sigmoid(beta [1 - (1 - h)(1 - gap)]); "none" 1. Controls, over the tokens where mask is 1:
    "constant" the gap gate's mean; "shuffled" its values permuted (by generator); "centred" the gap gate less its mean: the same
    expected gradient (up to 1/batch), less variance. "reverse_kl" the gap itself: the signed gradient of the reverse KL.
    >>> gate("gap", torch.tensor([0.5, -0.2, 0.0]))   # 0.924, 0.269, 0.500
    """
    gap = gap.detach()
    g, mask = torch.sigmoid(beta * gap), torch.ones_like(gap) if mask is None else mask.expand_as(gap)
    order = lambda: torch.randperm(int((mask > 0).sum()), generator=generator)
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
    advantages, taught (B, 1) and, with a start policy, ref. Asserts that both readers score what was sampled."""
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
    token mean: neither the gradient nor the metrics, which are returned, depend on how it is cut or which processes share it."""
    method, order, norms, sums = METHODS[config.method], rng.permutation(len(episodes)), [], []
    total = batch["mask"].sum().item()
    metrics = dict.fromkeys(("kl", "sdar_loss", "gap_mean", "gate_mean", "gate_active"))  # None: not in this method
    kind = config.gate if method.beta else "gap"  # GRPO+OPSD is the gap gate with beta 0
    beta, generator = config.gate_beta * method.beta, torch.Generator().manual_seed(int(rng.integers(2 ** 31)))
    for chosen in np.array_split(order, min(config.minibatches, len(order))):
        tokens, rest, mini = batch["mask"][chosen].sum().item(), share(chosen), [episodes[i] for i in chosen]
        if method.teacher == "gate" and kind in BATCH_GATES:  # they need the gaps of the whole mini-batch
            now, mask = score(model, mini, config), response_mask(mini, model.device)
            gap = torch.where(batch["taught"][chosen], batch["teacher"][chosen, :now.shape[1]] - now, 0.0)
            batch.setdefault("gate", torch.zeros_like(batch["mask"]))[chosen, :now.shape[1]] = gate(
                kind, gap, None, beta, mask, generator)
        for micro in micro_batches(share(mini), config.micro_tokens):
            rows, rest = rest[:len(micro)], rest[len(micro):]
            model.train(config.gradient_checkpointing)  # in this mode alone the library checkpoints, and drops KV caches
            logprobs, entropy = response_logprobs(model, micro, config, with_entropy=True)
            model.eval()
            part = {key: value[rows, :logprobs.shape[1]] for key, value in batch.items()}
            mask = part["mask"]
            drift = masked_mean((logprobs - part["old"]).abs(), mask)
            assert norms or drift < DRIFT[config.dtype], "before any update the ratio must be 1"
            policy, stats = policy_loss(logprobs, part["old"], part["advantages"], mask, config.clip_eps, config.dual_clip)
            terms = {"policy_loss": (method.policy, policy), "entropy": (-config.entropy_coef, masked_mean(entropy, mask))}
            if "ref" in part:
                terms["kl"] = (config.kl_coef, masked_mean(kl_k3(logprobs, part["ref"]), mask))
            if method.teacher in ("gate", "skill_sd"):
                teacher = torch.where(part["taught"], part["teacher"], logprobs.detach())  # no skill: gap 0
                if method.teacher == "gate":
                    distil, more = sdar_loss(logprobs, teacher, mask, part.get("gate", kind), beta, entropy)
                else:
                    distil, more = skill_sd_loss(logprobs, teacher, part["old"], mask)
                terms["sdar_loss"] = (config.sdar_coef, distil)
                stats |= more
            loss = sum(weight * term for weight, term in terms.values())
            (loss * (mask.sum().item() / tokens)).backward()
            stats |= {"loss": loss.item(), **{name: term.item() for name, (_, term) in terms.items()}}
            sums += [(name, value * mask.sum().item() / total) for name, value in stats.items()]
        sum_gradients([*model.parameters()])
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).item())
        if math.isfinite(norms[-1]):  # one NaN would be in all weights for good
            optimizer.step()
        optimizer.zero_grad()
    for name, value in gathered(sums):
        metrics[name] = (metrics.get(name) or 0.0) + value
    return metrics | {"grad_norm": sum(norms) / len(norms), "skipped_updates": sum(not math.isfinite(norm) for norm in norms)}

# --- 7. Evaluation and the training loop (paper, section 4.1 and appendix B) --------------------
EVAL_BATCH = 64  # episodes of the panel in one call; fixed, since their random streams depend on it

def evaluate(model, chat, envs, config, bandit=None):
    """Play the panel without and with the skill in the prompt. Plain n/N of single tries: success, success_skill,
    episodes, and by_type {task type: [episodes, won, won with the skill]}."""
    played, by_type = ({}, {}), {}
    starts = [(*start, i) for i, start in enumerate(envs[0].panel(config.eval_split, config.eval_episodes))]
    for with_skill in (False, True):
        for first in range(0, len(starts), EVAL_BATCH):
            some = starts[first:first + EVAL_BATCH]
            for e in rollout(model, chat, envs, some, config, (1, first), with_skill, config.eval_temperature, bandit):
                played[with_skill][e.group] = e
    for i in played[0].keys() & played[1].keys():  # a failing environment may have cost some
        row = by_type.setdefault(played[0][i].task_type, [0, 0, 0])
        row[:] = row[0] + 1, row[1] + played[0][i].won, row[2] + played[1][i].won
    episodes, won, won_skill = map(sum, zip(*by_type.values()))
    return {"success": won / episodes, "success_skill": won_skill / episodes, "episodes": episodes, "by_type": by_type}

def training_step(run, step):
    """Rollouts, teacher, update. Returns (episodes, metrics, clock): seconds at the start and after each of the three."""
    config, method, model, chat, envs = run.config, METHODS[run.config.method], run.model, run.chat, run.envs
    rng, tasks = np.random.default_rng([2, config.seed, step]), envs[0].tasks("train")  # so a resumed run draws the same
    chosen = rng.choice(len(tasks), config.tasks_per_step, replace=len(tasks) < config.tasks_per_step)
    starts = [(tasks[task], int(rng.integers(10 ** 6)), group) for group, task in enumerate(chosen)]
    starts = [one for one in starts for _ in range(config.group_size)]
    clock = [time.perf_counter()]
    episodes = rollout(model, chat, envs, starts, config, (3, config.seed, step), method.skilled, bandit=run.bandit)
    clock.append(time.perf_counter())
    batch = {}
    if method.teacher:
        if config.teacher == "lagged" and (step - 1) % config.teacher_refresh == 0:
            run.lagged = run.frozen_copy()
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
    return episodes, metrics, clock + [time.perf_counter()]

def train(config):
    """The whole run, written below config.out alone. Returns the last step's metrics and start_* from before training."""
    run = Run(config)
    check = lambda: evaluate(run.model, run.chat, run.envs, config, run.bandit)
    if not run.step:
        run.begin(check())
    with run.kept_on_disk() as steps:  # whatever stops it
        for step in steps:
            episodes, metrics, clock = run.results = training_step(run, step)  # kept, since the evaluation may fail
            if step == config.steps or (config.eval_every and step % config.eval_every == 0):
                metrics.update({"eval_" + key: value for key, value in check().items()})
            run.log(step, episodes, metrics, clock)
    return run.finish() if RANK == 0 else None

# ======== PART II: THE WORKSHOP. The reader of the paper can stop here. ========
import argparse
import copy
import difflib
import hashlib
import html
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tqdm.contrib.concurrent import thread_map

from envs import CLASSES, ENVS, PHRASES, PLACES, UserError, demonstration, make_env, require, unknown
os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_VERBOSITY="error", TRANSFORMERS_VERBOSITY="error")

# --- 8. The CUDA kernel: log-prob and entropy of a row of logits in one read ---------------------
# Why online: sum e^(x - max) needs the maximum, so a row (300 kB of Qwen's 151,936 logits) would be read twice; carrying the
# maximum along, and rescaling the sums when it grows, reads it once. Why one block per row: its threads' sums meet in shared
# memory, and thousands of rows fill any card. What limits it: reading. So a thread takes 32 bytes at a time, branch-free.
KERNEL_SOURCE = r"""
#if TYPE == 2  // float16: by the conversion instructions
__device__ float decode(Bits b) { float x; asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(b)); return x; }
__device__ Bits encode(float x) { Bits b; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(b) : "f"(x)); return b; }
#else  // float32 or bfloat16, which is its upper half, rounded to the nearest, ties to even
__device__ float decode(Bits b) { return __uint_as_float((unsigned)b << 16 * TYPE); }
__device__ Bits encode(float x) {
    unsigned b = __float_as_uint(x);
    return TYPE == 0 ? b : x != x ? 0x7fff : (b + 0x7fff + (b >> 16 & 1)) >> 16;
}
#endif
const int PACK = 32 / sizeof(Bits);
union Pack { uint4 loads[2]; Bits at[PACK]; };
__device__ int packs(const Bits *x, int V) { return (size_t)x % 16 ? 0 : V / PACK; }  // the rest goes one by one

struct Sums { float max, s, u; };  // the largest x; the sums of e^(t (x - max)) and of (x - max) e^(t (x - max))
__device__ Sums merged(Sums a, Sums b, float k) {  // the online step
    float max = fmaxf(a.max, b.max), p = exp2f(k * (a.max - max)), q = exp2f(k * (b.max - max));  // fmaxf drops NaN, s does not
    float u = p > 0 ? p * (a.u + (a.max - max) * a.s) : 0, v = q > 0 ? q * (b.u + (b.max - max) * b.s) : 0;
    return {max, p * a.s + q * b.s, u + v};
}

// Of each row of logits (N, V) times t: log-prob of ids, entropy in nats, max, log s
extern "C" __global__ void forward(const Bits *logits, const long long *ids, float4 *out, int V, double scale) {
    const Bits *x = logits + (size_t)blockIdx.x * V;  // 64 bits: N V passes 2^31
    const float t = scale, k = t * 1.44269504f;  // e^(t x) = 2^(k x)
    Sums a = {-3e38f, 0, 0};  // not -inf: -inf - -inf is NaN
    for (int i = threadIdx.x; i < packs(x, V); i += blockDim.x) {
        Pack p = ((const Pack *)x)[i];
        Sums b = {-3e38f, 0, 0};
        for (int j = 0; j < PACK; j++) b.max = fmaxf(b.max, decode(p.at[j]));
        for (int j = 0; j < PACK; j++) {
            float d = decode(p.at[j]) - b.max, e = exp2f(k * d);
            b.s += e, b.u += fmaxf(d, -3e38f) * e;  // of -inf: 0, not NaN
        }
        a = merged(a, b, k);
    }
    for (int i = packs(x, V) * PACK + threadIdx.x; i < V; i += blockDim.x) a = merged(a, {decode(x[i]), 1, 0}, k);
    __shared__ Sums all[512];
    all[threadIdx.x] = a;
    for (int half = blockDim.x / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) all[threadIdx.x] = a = merged(a, all[threadIdx.x + half], k);
    }
    float logp = t * (decode(x[ids[blockIdx.x]]) - a.max) - logf(a.s), entropy = logf(a.s) - t * a.u / a.s;
    if (threadIdx.x == 0) out[blockIdx.x] = {logp, entropy, a.max, logf(a.s)};
}

// The gradient of g logprob + h entropy, t (g [i = id] - p_i (g + h (log p_i + entropy))), takes the place of logit i
extern "C" __global__ void backward(Bits *logits, const long long *ids, const float4 *out, const float *g, const float *h,
                                    int V, double scale) {
    Bits *x = logits + (size_t)blockIdx.x * V;
    const float t = scale, G = g[blockIdx.x], H = h[blockIdx.x];
    const float entropy = out[blockIdx.x].y, max = out[blockIdx.x].z, log_s = out[blockIdx.x].w;
    auto gradient = [=, id = ids[blockIdx.x]](Bits b, int i) {
        float logp = fmaxf(t * (decode(b) - max) - log_s, -1e30f), p = exp2f(1.44269504f * logp);
        return encode(t * ((i == id ? G : 0) - p * (G + H * (logp + entropy))));
    };
    for (int i = threadIdx.x; i < packs(x, V); i += blockDim.x) {
        Pack p = ((Pack *)x)[i];
        for (int j = 0; j < PACK; j++) p.at[j] = gradient(p.at[j], i * PACK + j);
        ((Pack *)x)[i] = p;
    }
    for (int i = packs(x, V) * PACK + threadIdx.x; i < V; i += blockDim.x) x[i] = gradient(x[i], i);
}
"""

@lru_cache(maxsize=None)
def compiled(name, dtype):
    """A kernel of KERNEL_SOURCE for logits of dtype, by NVRTC. PyTorch has no public compiler of CUDA source that needs no
    toolkit: _compile_kernel is private, used here alone; where it is gone or changed, load_policy says so in one line and
    PyTorch's own functions do the work."""
    from torch.utils import cpp_extension
    kind = (torch.float32, torch.bfloat16, torch.float16).index(dtype)
    cpp_extension.CUDA_HOME = cpp_extension.CUDA_HOME or "/nowhere"  # it would ask for a toolkit; no header is needed
    options = ["--ftz=true", f"-DTYPE={kind}", f"-DBits=unsigned {'short' if kind else 'int'}"]
    return torch.cuda._compile_kernel(KERNEL_SOURCE, name, nvcc_options=options)

class KernelLogprobs(torch.autograd.Function):
    """Log-probs and entropy (N,) of ids in logits (N, V): no other tensor of N x V, the gradient overwrites the logits."""
    @staticmethod
    def forward(ctx, logits, ids, temperature, with_entropy):
        logits, out, ctx.scale = logits.contiguous(), torch.empty(len(ids), 4, device=logits.device), 1 / temperature
        ctx.save_for_backward(logits, ids, out)
        compiled("forward", logits.dtype)((len(ids), 1, 1), (512, 1, 1), [logits, ids, out, logits.shape[1], ctx.scale])
        return out[:, 0].clone(), out[:, 1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        logits, ids, out = ctx.saved_tensors
        torch.autograd.graph.increment_version(logits)  # a second backward pass is an error
        args = [logits, ids, out, *(g.float().contiguous() for g in gradients), logits.shape[1], ctx.scale]
        compiled("backward", logits.dtype)((len(ids), 1, 1), (512, 1, 1), args)
        return logits, None, None, None

# --- 9. Configuration errors, models, the run's folder -----------------------------------------
CHOICES = {"preset": ("toy", "paper"), "env": tuple(ENVS), "method": tuple(METHODS), "device": ("cpu", "cuda"),
           "gate": ("gap", "entropy", "soft_or", "none", "reverse_kl", *BATCH_GATES), "teacher": ("live", "lagged", "frozen"),
           "retrieval": ("keyword", "ucb", "full", "random", "none"), "skills": ("right", "wrong", "empty"),
           "dtype": ("float32", "bfloat16"), "eval_split": ("dev", "eval")}
MAY_BE_ZERO = ("seed", "max_turns", "eval_every", "eval_temperature", "clip_eps", "dual_clip", "kl_coef", "entropy_coef",
               "invalid_penalty", "sdar_coef", "gate_beta", "rlsd_mix")
flag = lambda name: "--" + name.replace("_", "-")  # a field of Config as it is typed

def check_config(config):
    """UserError for a value that no run could use."""
    for name, known in CHOICES.items():
        require(getattr(config, name) in known, unknown(flag(name), getattr(config, name), known))
    for name, value in vars(config).items():
        good = type(value) not in (int, float) or 0 < value < math.inf or value == 0 and name in MAY_BE_ZERO
        require(good, f"{flag(name)} {value}: must be {'at least' if name in MAY_BE_ZERO else 'more than'} 0")
    require(config.retrieval != "ucb" or not METHODS[config.method].skilled,
            f"--retrieval ucb learns from a teacher, and --method {config.method} has none")
    require(config.retrieval != "ucb" or config.skills == "right", "--retrieval ucb learns from its own choice: --skills right")
    require(config.device == "cpu" or torch.cuda.device_count() > LOCAL_RANK, f"--device cuda: no CUDA device {LOCAL_RANK} here")
    require(not config.kernel or config.device == "cuda", "--kernel is a CUDA kernel: it needs --device cuda")
    require(config.group_size > 1, "--group-size must be at least 2: an advantage compares the episodes of one task")

def load_policy(config):
    """The start policy and its Chat, ready for use. UserError if it is no usable checkpoint."""
    global KERNEL
    import transformers  # late: it takes seconds
    transformers.utils.logging.disable_progress_bar()
    KERNEL = None
    try:
        if config.kernel and all(compiled(name, getattr(torch, config.dtype)) for name in ("forward", "backward")):
            KERNEL = KernelLogprobs.apply
    except Exception as error:  # whatever a private function raises when it has changed
        print(f"--kernel: this PyTorch cannot compile it, its own functions do the work: {error!r:.200}", file=sys.stderr)
    path = tiny_policy(Chat(toy_tokenizer())) if config.model == "tiny" else config.model
    is_path = Path(path).exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") != 1
    require(not is_path or (Path(path) / "config.json").is_file(), f"--model {path}: no folder with a config.json")
    require(not (Path(path) / "checkpoint").is_dir(), f"--model {path}: a run's folder; its model is {path}/checkpoint")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        require(tokenizer.chat_template, "it has no chat template; take the -Instruct checkpoint of its family")
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, attn_implementation="sdpa", output_loading_info=True,
            ignore_mismatched_sizes=True)  # check_model does not: it names what is wrong
        model = model.to(config.device).eval()
        if config.gradient_checkpointing:  # renamed in 5.24; it works in training mode alone: see update
            new = hasattr(model, "activation_checkpointing_enable")
            enable = model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        check_model(model, tokenizer, report, config.gradient_checkpointing)
        return model, Chat(tokenizer, model.generation_config.eos_token_id)
    except Exception as error:  # whatever a broken or absent checkpoint makes the library raise
        raise UserError(f"--model {path}: cannot be used: {(str(error).strip() or repr(error)).splitlines()[0]:.200}") from error

def check_model(model, tokenizer, report, checkpointing=False):
    """UserError if the model is not what the rest of this file takes for granted: an ordinary causal language model whose
    attention sees everything before a token, read whole. report: what from_pretrained says of the files' tensors.
    checkpointing: it will also run in training mode, which must compute the same."""
    for key, fault in (("missing_keys", "its files lack"), ("unexpected_keys", "it has no place for"),
                       ("mismatched_keys", "its files have in another shape")):
        names = sorted(entry if isinstance(entry, str) else entry[0] for entry in report[key])  # else with the two shapes
        require(not names, f"{fault} the tensor {''.join(names[:1])} (in all {len(names)} of this kind)")
    for name, weights in model.named_parameters():
        require(weights.isfinite().all(), f"its weights are not finite: {name}")
    ids, rows = max(tokenizer.get_vocab().values()) + 1, len(model.get_input_embeddings().weight)
    require(ids <= rows, f"its tokenizer has {ids} ids, its embedding only {rows} rows")

    settings = model.config
    require(getattr(settings, "max_position_embeddings", None), "its config does not say how long its context is")
    windows = [name for name in ("sliding_window", "attention_chunk_size") if getattr(settings, name, None)]
    kinds = getattr(settings, "layer_types", None) or windows
    partial_view = sorted({*kinds} - {"full_attention"})
    require(not partial_view, f"not all of its layers attend to everything before a token: {', '.join(partial_view)}")
    lacking = {"attention_mask", "position_ids", "use_cache", "logits_to_keep"} - {*inspect.signature(model.forward).parameters}
    require(not lacking and cache_name(model), f"its forward pass takes no {', '.join(sorted(lacking)) or 'KV cache'}")

    # Names can be wrong; from here on it is what the model computes that counts.
    def same(a, b):
        return (a - b).abs().max() <= 1e-2 * b.abs().max()  # a card's rounding is coarser than a CPU's

    def plain(ids):
        return model(torch.tensor([ids], device=model.device)).logits[0]

    with torch.no_grad():
        short, long = [1, 2, 3], [4, 5, 6, 7, 8]
        logits = plain(long)
        require(same(plain(long[:3]), logits[:3]), "its logits are not causal: those of a token change with what follows it")
        hidden = model.base_model(torch.tensor([long], device=model.device)).last_hidden_state[0]
        require(same(hidden @ model.get_output_embeddings().weight.T, logits), "its logits are not its last states times one matrix")
        sampler = Sampler(model, 1.0)
        sampler.feed_rows([short, long])
        sampler.keep([1, 0])
        sampler.feed_rows([[2, 1], [3]])
        expected = torch.stack([plain(long + [2, 1])[-1], plain(short + [3])[-1]])
        require(same(sampler.logits, expected), "padded rows in its KV cache change its logits: has it recurrent layers?")
        if checkpointing:
            model.train()
            require(same(plain(long), logits), "it computes otherwise in training mode (dropout?): leave out --gradient-checkpointing")
            model.eval()

REQUIREMENTS = Path(__file__).resolve().parent / "requirements.txt"

def untested_versions():
    """What main says when it starts: which installed libraries are outside the range that is tested, and that range; "" if none
    is, or where requirements.txt, the one place with the ranges, was not copied along."""
    from importlib.metadata import PackageNotFoundError, version
    from packaging.requirements import InvalidRequirement, Requirement  # transformers needs it, too
    found = []
    for line in REQUIREMENTS.read_text("utf-8").splitlines() if REQUIREMENTS.exists() else ():
        try:
            wanted = Requirement(line)
            installed = version(wanted.name)
        except (InvalidRequirement, PackageNotFoundError):  # a line of the user's own; pytest, which only the tests need
            continue
        if not wanted.specifier.contains(installed, prereleases=True):
            tested = " to ".join(re.findall(r"=([\d.]+)", line))
            found.append(f"{wanted.name} {installed} (tested: {tested})")
    return "untested versions, which may do otherwise: " + ", ".join(found) if found else ""

def make_envs(config):
    """One environment for each episode of a step or of a part of the panel."""
    require(config.env != "toy" or not config.env_data, "--env toy takes no --env-data")
    require(config.env == "search" or not config.search_url, f"--env {config.env} takes no --search-url")
    options = {name: value for name, value in (("data", config.env_data), ("url", config.search_url)) if value}
    number = max(EVAL_BATCH, config.tasks_per_step * config.group_size)
    envs = [make_env(config.env, max_turns=config.max_turns, **options) for _ in range(number)]
    envs[0].tasks(config.eval_split)  # none? say so now
    return envs

@lru_cache
def stop_criteria(chat, strings):
    """A function of ids (B, n): which rows now hold one of the strings. None if the tokenizer cannot write them."""
    from transformers import StopStringCriteria
    writable = [text for text in strings if chat.tokenizer.decode(chat.encode(text)) == text]
    return StopStringCriteria(chat.tokenizer, writable) if writable else None

def cut_text(chat, limit, text):
    """The text or, if it has more than `limit` tokens, the first ones as the tokenizer writes them."""
    start = text[:64 * limit]  # of blanks, a tokenizer may make few tokens or none
    ids = chat.encode(start)
    return text if len(ids) <= limit and start == text else chat.tokenizer.decode(ids[:limit]) + " ..."

def call_all(calls, at_once):
    """The results of functions without arguments, in order; where one raised EnvUnavailable, that error. at_once: in threads."""
    def result(call):
        try:
            return call()
        except EnvUnavailable as error:
            return error
    if not at_once:
        return list(map(result, calls))
    with ThreadPoolExecutor(64) as pool:
        return list(pool.map(result, calls))

def survivors(results):
    """The Episodes among what rollout got. EnvUnavailable if half of it or more are failures."""
    failures = [result for result in results if isinstance(result, EnvUnavailable)]
    for failure in failures[:1]:
        message = f"{len(failures)} of {len(results)} episodes failed: {failure}"
        require(2 * len(failures) < len(results), message, EnvUnavailable)
        say(message)
    return [result for result in results if isinstance(result, Episode)]

def micro_batches(episodes, budget):
    """Cut a list of episodes, in order, into lists whose padded sequences hold at most `budget` tokens."""
    batches = [[]][:len(episodes)]
    for episode in episodes:
        longest = max(len(e.ids) + len(e.skill_ids) for e in batches[-1] + [episode])
        if batches[-1] and longest * (len(batches[-1]) + 1) > budget:
            batches.append([])
        batches[-1].append(episode)
    return batches

def check_context(model, env, episodes, config):
    """UserError if episodes of `env` that start with these prompts cannot fit the model's context."""
    prompt, context = max((len(episode.view(True)[0]) for episode in episodes), default=0), model.config.max_position_embeddings
    require(prompt + env.max_turns * config.max_new_tokens <= context, f"a prompt of {prompt} tokens and {env.max_turns} turns "
            f"(--max-turns) of {config.max_new_tokens} (--max-new-tokens) do not fit the model's context of {context}" +
            " (--preset toy fits a checkpoint of the tiny policy)" * (config.preset == "paper"))

torchrun = os.environ if "TORCHELASTIC_RUN_ID" in os.environ else {}  # where it tells each process which of how many it is
RANK, LOCAL_RANK, RANKS = int(torchrun.get("RANK", 0)), int(torchrun.get("LOCAL_RANK", 0)), int(torchrun.get("WORLD_SIZE", 1))
rank_0 = lambda function: function if RANK == 0 else lambda *args: None  # decorates what one of them does for all
say = rank_0(lambda text: tqdm.write(text, sys.stderr))  # above a progress bar, if there is one
share = lambda rows: rows[len(rows) * RANK // RANKS:len(rows) * (RANK + 1) // RANKS]  # this process's part of a sequence

def gathered(rows):
    """The lists of all processes, one after the other. Between share and gathered they differ, elsewhere all do the same."""
    parts = [rows] * RANKS
    RANKS > 1 and torch.distributed.all_gather_object(parts, rows)
    return sum(parts, [])

def sum_gradients(weights):
    """The gradients of all processes, each from its share of the rows, become their sum."""
    if RANKS == 1:
        return
    flat = torch.cat([(torch.zeros_like(w) if w.grad is None else w.grad).flatten() for w in weights])  # None: it had no rows
    torch.distributed.all_reduce(flat)  # one call: for small weights a call takes longer than its numbers
    for weight, gradient in zip(weights, flat.split([w.numel() for w in weights])):
        weight.grad = gradient.view_as(weight)

class Run:
    """The chores of a run: environments, policies, folder, log, checkpoint, final table. Bad input is found before writing."""
    MAY_DIFFER = ("steps", "out", "search_url", "resume", "overwrite", "device", "micro_tokens", "rollout_batch", "offload",
            "gradient_checkpointing", "kernel", "eval_every", "save_every", "max_bad_steps")  # may change

    def __init__(self, config):
        self.folder, self.log_file, self.step = Path(config.out), Path(config.out, "metrics.jsonl"), 0
        self.config, self.envs, self.bandit, self.lagged = config, make_envs(config), Bandit(), None
        self.bad_steps, self.first_metrics, self.alarmed, self.stop_signal, self.results = 0, None, set(), None, None
        self.envs[0].tasks("train")
        parent = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        require(parent.is_dir() and os.access(parent, os.W_OK), f"--out {config.out}: {parent} is no folder that can be written")
        over = config.resume or config.overwrite and self.log_file.exists()
        require(over or not any(self.folder.glob("*")), f"--out {config.out} is not empty: --resume it or --overwrite it")
        self.model, self.chat = load_policy(config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.lr, weight_decay=0.01, fused=config.model != "tiny")
        self.frozen_copy = lambda: copy.deepcopy(self.model).to("cpu" if config.offload else config.device)
        self.start = self.frozen_copy() if config.kl_coef or config.teacher == "frozen" else None
        if config.resume:
            self.load()

    @rank_0
    def begin(self, before):
        """Say where training starts from, and write the folder's first files."""
        self.before = {"start_" + key: value for key, value in before.items()}
        print("{method} on {env} with {model} ({size:,} parameters), {preset} preset, seed {seed}: {steps} steps of "
              "{tasks_per_step} tasks x {group_size} episodes\nbefore training, {episodes} held-out episodes: success "
              "{success:.2f}, with the skill {success_skill:.2f}".format(
                  size=self.model.num_parameters(), **vars(self.config), **before))
        if {*self.envs[0].tasks("train")} & {*self.envs[0].tasks(self.config.eval_split)}:
            print("Nothing is held out, though: these are training tasks, since the data has no other split.")
        if self.config.model == "tiny" and self.config.env != "toy":
            print("The tiny policy knows the words of the toy alone: here it shows that everything works, and learns nothing.")
        if before["success_skill"] <= before["success"]:
            print("The teacher is not better than the student: there is nothing to distil. Can this model use a skill?")
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob("checkpoint*"):  # of a run that is overwritten
            shutil.rmtree(leftover)
        self.log_file.write_text("")
        self.save()

    @contextmanager
    def kept_on_disk(self):
        """Around the training loop, whose steps it gives: Ctrl-C and SIGTERM wait for the end of a step, a second one does not;
        an environment that fails ends the run. In both cases all that was learned is then on disk."""
        def wait(number, frame):
            self.stop_signal = number
            signal.signal(number, before[number])

        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        before = {number: signal.signal(number, wait) for number in numbers}
        todo = range(self.step + 1, self.config.steps + 1)
        self.bar = tqdm(todo, self.config.method, self.config.steps, initial=self.step, unit="step", disable=RANK > 0)
        try:
            yield self.bar
        except EnvUnavailable:
            if self.results:  # only the evaluation failed
                self.log(self.step + 1, *self.results)
            self.save()
            gathered([])  # nobody ends before it is saved
            raise
        finally:
            self.bar.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def log(self, step, episodes, metrics, clock):
        """Append a line to metrics.jsonl; save when due. clock: seconds at the start, after rollout, teacher, update."""
        turns, tokens, n = sum(e.turns for e in episodes), sum(sum(e.mask) for e in episodes), len(episodes)
        seconds = dict(zip(("seconds_rollout", "seconds_teacher", "seconds_update"), np.diff(clock).tolist()))
        scores = {(e.group, e.reward - self.config.invalid_penalty * e.invalid) for e in episodes}  # a flat group has one
        groups = [group for group, _ in scores]
        metrics = {"step": step, "success": sum(e.won for e in episodes) / n, "reward": sum(e.reward for e in episodes) / n,
                   "turns": turns / n, "invalid_rate": sum(e.invalid for e in episodes) / turns,
                   "response_tokens": tokens / n, "overflowed": sum(e.overflowed for e in episodes),
                   "flat_groups": np.mean([groups.count(group) == 1 for group in {*groups}]),
                   "dropped": self.config.tasks_per_step * self.config.group_size - n, **seconds,
                   "tokens_per_second": tokens / (clock[-1] - clock[0]), **metrics}
        strange = [key for key, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]
        metrics.update(dict.fromkeys(strange))  # null: NaN is no JSON
        if RANK == 0:
            with open(self.log_file, "a") as lines:
                lines.write(json.dumps(metrics) + "\n")
        shown = ("success", "gap_mean", "gate_mean", "loss")
        self.bar.set_postfix({key: metrics[key] for key in shown if metrics[key] is not None})
        self.step, self.metrics, self.episodes, self.results = step, metrics, episodes, None
        self.bad_steps = self.bad_steps + 1 if metrics["skipped_updates"] else 0
        require(self.bad_steps < self.config.max_bad_steps, f"step {step} is number {self.bad_steps} in a row (--max-bad-steps) "
                f"whose gradient is not finite: try a lower --lr or --dtype float32; {self.folder} has the last good checkpoint")
        asked = [number for number in gathered([self.stop_signal]) if number]  # of any process
        if step == self.config.steps or step % self.config.save_every == 0 and not self.bad_steps or asked:
            self.save()
        if asked and step < self.config.steps:
            gathered([])  # nobody ends before it is saved
            raise KeyboardInterrupt(128 + asked[0])
        self.first_metrics = self.first_metrics or metrics
        for alarm in {*alarms(metrics, self.first_metrics)} - self.alarmed:
            self.alarmed.add(alarm)
            say(f"step {step}: {alarm}")

    @rank_0
    def save(self):
        """Checkpoint: Hugging Face format, and the trainer's state. All randomness depends on (seed, step): none to keep."""
        state = {"step": self.step, "bad": self.bad_steps, "before": self.before, "optimizer": self.optimizer.state_dict(),
                 "lagged": self.lagged and self.lagged.state_dict(), "arms": self.bandit.arms, "config": vars(self.config)}
        write_checkpoint(self.folder / "checkpoint", self.model, self.chat, state)
        self.replace_file("config.json", json.dumps(vars(self.config), indent=1) + "\n")

    @rank_0
    def replace_file(self, name, text):
        """A file of the run's folder becomes this text, or stays as it was."""
        new = self.folder / f"{name}.new"
        new.write_text(text)
        new.replace(self.folder / name)

    def load(self):
        """Continue from the newest checkpoint that is whole; metrics of later steps are dropped."""
        found = [folder for name in ("checkpoint", "checkpoint.new", "checkpoint.old") if (folder := self.folder / name).is_dir()]
        whole = [folder for folder in found if is_whole(folder)]
        if not whole:
            ours = {"metrics.jsonl", "checkpoint.new"}  # what a run leaves that is killed before it saves
            found = {path.name for path in self.folder.glob("*")}
            require(found <= ours, f"--resume: {self.folder} holds no run that can be read")
            return say(f"--resume: nothing was saved in {self.folder}, so this run begins anew")
        if whole[0] != found[0]:
            say(f"--resume: {found[0]} is damaged, {whole[0]} takes its place")
        state = torch.load(whole[0] / "trainer.pt", weights_only=True, map_location=self.model.device)
        changed = {flag(key): key in self.MAY_DIFFER for key, value in vars(self.config).items()
                   if state["config"].get(key) != value and key != "resume"}
        fixed = [name for name, free in changed.items() if not free]
        require(not fixed, f"--resume: {', '.join(fixed)} not as in {self.folder}/config.json")
        require(state["step"] < self.config.steps, f"--resume: {self.folder} has all of its {state['step']} steps; raise --steps")
        lines = self.log_file.read_text().splitlines(keepends=True)[:state["step"]]  # a later one may be torn
        try:
            logged = [json.loads(line)["step"] for line in lines]
        except ValueError:
            logged = []
        require(len(logged) == state["step"], f"--resume: {self.log_file} lacks steps of the checkpoint's {state['step']}")
        weights = load_policy(replace(self.config, model=str(whole[0])))[0].state_dict()
        self.lagged = self.frozen_copy() if state["lagged"] else None
        state["lagged"] and self.lagged.load_state_dict(state["lagged"])
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.bad_steps, self.before, self.bandit.arms = state["step"], state["bad"], state["before"], state["arms"]
        self.first_metrics = json.loads(lines[0]) if lines else None
        self.replace_file("metrics.jsonl", "".join(lines))
        say(f"--resume: from step {self.step}; other than before: {', '.join(changed) or '-'}")

    def finish(self):
        """Print the table and a sample episode. Returns the last step's metrics, with start_* from before training."""
        before, after = [self.before["start_by_type"]], [self.metrics["eval_by_type"]]
        print_table([("before", before, ""), ("before*", before, ""), ("after", after, ""), ("after*", after, "")])
        spent = lambda part: sum(json.loads(line)["seconds_" + part] for line in open(self.log_file))
        print(f"\n{self.folder}; seconds: " + ", ".join(f"{part} {spent(part):.1f}" for part in ("rollout", "teacher", "update")))
        sample = max(self.episodes, key=lambda episode: (episode.won, -episode.turns))
        print(f"\nA training episode of step {self.step}, {'won' if sample.won else 'lost'} (the teacher also read: "
              f"{self.chat.tokenizer.decode(sample.skill_ids)!r}):")
        shown = "\n".join("  " + "> " * (i % 2) + text for i, text in enumerate(sample.transcript))
        print("".join(c if c.isprintable() or c == "\n" else " " for c in shown))  # a terminal would obey the others
        return {**self.before, **self.metrics}

def alarms(now, first):
    """What looks like a run going wrong, in plain words with what usually helps. now, first: metrics of two steps."""
    length = lambda metrics: metrics["response_tokens"] / metrics["turns"]
    return [text for text, wrong in {
        "no group's episodes differ in score, so the reward says nothing (all lost? easier tasks, a larger --group-size help)":
            now["flat_groups"] == 1,
        "the entropy is near zero and most episodes are lost, always in the same way: a lower --lr or more --entropy-coef helps":
            now["entropy"] is not None and now["entropy"] < 0.1 and now["success"] < 0.5,
        "far more actions are invalid than at first: a lower --lr or more --kl-coef helps, or more --invalid-penalty":
            now["invalid_rate"] > first["invalid_rate"] + 0.2,
        "responses have shrunk to less than half: a lower --lr or more --kl-coef helps": length(now) < length(first) / 2,
        "an update was skipped, its gradient was not finite: a lower --lr or --dtype float32 helps": now["skipped_updates"] > 0,
        "the teacher does worse than the student, so it has nothing to teach: a lower --lr or --teacher lagged helps":
            now.get("eval_success_skill", 1) < now.get("eval_success", 0) - 0.05,
    }.items() if wrong]

def wilson(wins, n, z=1.96):
    """95 % Wilson score interval of a proportion: (low, high)."""
    p, scale = wins / n, 1 + z * z / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half) / scale, (middle + half) / scale

def print_table(rows):
    """Success by task type, mean±sd over runs; of one also n/N, Wilson. rows: (title, [by_type], remark); title*: skilled."""
    kinds, width = sorted(rows[0][1][0]), max(len(title) for title, *_ in rows) + 2
    wide = max(11, *(len(kind) + 2 for kind in kinds))
    print("\n" + " " * width + "".join(f"{kind:<{wide}}" for kind in [*kinds, "all"]) + "(*: with the skill in the prompt)")
    for title, runs, remark in rows:
        line = f"{title:<{width}}"
        for group in [[kind] for kind in kinds] + [kinds] if runs else []:
            counts = [[sum(run[kind][i] for kind in group) for i in (1 + title.endswith("*"), 0)] for run in runs]
            shares = [wins / n for wins, n in counts]
            line += f"{np.mean(shares):.2f}{f'±{np.std(shares, ddof=1):.2f}' if len(runs) > 1 else '':<{wide - 4}}"
        line += "{}/{} [{:.2f}, {:.2f}]  ".format(*counts[0], *wilson(*counts[0])) if len(runs) == 1 else ""
        print((line + remark).rstrip())

# --- 10. The tiny policy, and its warm start by imitation ----------------------------------------
TOY_TEMPLATE = (  # no system role: what the system message says, the tiny policy learned in its warm start
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|assistant|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}")

def toy_tokenizer():
    """One token each of PHRASES and things of the toy world, articles and punctuation dropped; an episode has some 90."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    things = [*PLACES, *CLASSES, *(f"{c} {n}" for c in CLASSES for n in (1, 2))]
    words = sorted({*PHRASES, *things}, key=lambda word: (-len(word), word))
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>"] + words)}, unk_token="<unk>"))
    known = "|".join(map(re.escape, words))
    other = r"(?!(?:a|an|and|the|The)(?!\w))[^\s.,:]+"
    core.pre_tokenizer = pre_tokenizers.Split(Regex(rf"(?<!\w)(?:{known})(?!\w)|(?<!\w){other}"), "removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>", unk_token="<unk>",
                                   additional_special_tokens=["<|user|>", "<|assistant|>"], chat_template=TOY_TEMPLATE)

WARMSTART = 1  # raise it with every change of warmstart()
TINY_FOLDER = Path(__file__).resolve().parent / ".assets" / "tiny-policy"

def recipe(chat):
    """Hash of what the tiny policy is made from: WARMSTART and sample demonstrations, in which the world, the scripted
    player, the skills, the tokenizer and the chat template show. chat: of toy_tokenizer()."""
    rng = random.Random("recipe")
    sample = [WARMSTART, len(chat.tokenizer), [demonstration(chat, rng) for _ in range(32)]]
    return hashlib.sha256(json.dumps(sample).encode()).hexdigest()

def warmstart(folder, chat, steps=900):
    """Train the tiny policy by imitation and save it in `folder`. Deterministic on one machine and PyTorch. Muon on the
    matrices matters: with AdamW alone the policy needs several times the steps before it reads the skill."""
    import transformers
    transformers.utils.logging.disable_progress_bar()
    folder.with_name(folder.name + ".new").mkdir(parents=True, exist_ok=True)  # cannot be written? say so now
    rng = random.Random(0)
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
        ids, weights, real = (pad_sequence(list(map(torch.tensor, column)), True) for column in columns)
        logits = model(input_ids=ids, attention_mask=real).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        ((losses * weights[:, 1:]).sum() / weights[:, 1:].sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for item in (*optimizers, *schedulers):
            item.step()
        model.zero_grad()
    write_checkpoint(folder, model, chat, recipe=recipe(chat))
    shutil.rmtree(folder.with_name(folder.name + ".old"), ignore_errors=True)

def tiny_policy(chat):
    """The folder of the tiny policy. It is built anew when absent, of another recipe, or not as it was written."""
    if RANK == 0 and not is_whole(TINY_FOLDER, recipe=recipe(chat)):
        say(f"{TINY_FOLDER} is absent, changed or of another recipe: building it, once, in some minutes.")
        warmstart(TINY_FOLDER, chat)
    gathered([])  # all wait for it
    return TINY_FOLDER

def write_checkpoint(folder, model, chat, state=None, **origin):
    """Write a checkpoint to folder.new, flush it to the disk, and put it in the place of `folder`, which becomes folder.old.
    Wherever this is cut short, one of the three is whole. state: the trainer's. origin: what else its sums.json says."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        model.save_pretrained(fresh)  # makes the folder
        chat.tokenizer.save_pretrained(fresh)
        if state:
            torch.save(state, fresh / "trainer.pt")
        (fresh / "sums.json").write_text(json.dumps(hashes(fresh) | origin, indent=1) + "\n")
        for path in (*fresh.iterdir(), fresh, *fresh.parent.glob("*.jsonl"), fresh.parent):
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.close(file)
    except Exception as error:  # a full disk is an OSError only to some libraries
        shutil.rmtree(fresh, ignore_errors=True)
        raise UserError(f"{folder} cannot be written, and what was there stays: {str(error).splitlines()[0]:.200}") from error
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)

def hashes(folder):
    """{file: SHA-256} of a checkpoint, but for sums.json, which keeps them."""
    paths = sorted(path for path in folder.iterdir() if path.name != "sums.json")
    return {path.name: hashlib.file_digest(path.open("rb"), "sha256").hexdigest() for path in paths}

def is_whole(folder, **origin):
    """True if a checkpoint is as it was written, and of this origin."""
    try:
        return json.loads((folder / "sums.json").read_text()) == hashes(folder) | origin
    except (OSError, ValueError):
        return False

# --- 11. Comparison: methods, or values of a setting, over seeds --------------------------------
def plan(config, given, methods, seeds, sweep, out):
    """What compare runs: {label: {seed: Config}}. given: the flags that made config, {field: value}."""
    typed = lambda name, text: getattr(parse_args([f"--{name}={text}"])[1], name.replace("-", "_"))
    name, _, values = (sweep or f"method={methods}").partition("=")
    rows = [{"method": "grpo"}] * bool(sweep) + [{name.replace("-", "_"): typed(name, value)} for value in values.split(",")]
    require(not {"seed", "resume"} & {name, *given} and name != "out" and (sweep or "method" not in given),
            "compare takes --seeds, --methods (--method with --sweep) and one --out, and goes on without --resume")
    seeds, runs = [typed("seed", seed) for seed in seeds.split(",")], {}
    for row in rows:
        plain = Config(env=config.env, model=config.model, preset=config.preset, method=row.get("method", config.method))
        label = plain.method + "".join(f" {key}={value}" for key, value in row.items() if value != getattr(plain, key))
        folder = out / label.replace(" ", "-")
        runs[label] = {seed: Config(**{**given, **row, "seed": seed, "out": f"{folder}-s{seed}"}) for seed in seeds}
    return runs

def read_run(folder):
    """(settings, lines of metrics) of a run's folder."""
    try:
        lines = [json.loads(line) for line in open(Path(folder, "metrics.jsonl"))]
        return dict(json.loads(Path(folder, "config.json").read_text())), lines
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} holds no run that can be read: {error}") from error

def finished(config):
    """The evaluations of a run, if it is complete, else None. UserError if it was made with other settings."""
    try:
        old, lines = read_run(config.out)
    except UserError:
        return None
    read = {*vars(config)} - {*Run.MAY_DIFFER} | {"steps", "eval_every"}
    same = all(old.get(key) == getattr(config, key) for key in read)
    require(same or config.overwrite, f"{config.out} holds a run with other settings: choose another --out, or --overwrite it")
    return [line for line in lines if "eval_success" in line] if same and len(lines) == config.steps else None

def launch(config):
    """Train from the first step, on one thread of a process of its own. Returns "" or what went wrong."""
    settings = json.dumps({**vars(config), "overwrite": True})  # of what is left of a run that did not finish
    code = "import json, sys, sdar; sdar.train(sdar.Config(**json.loads(sys.argv[1])))"
    place = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code, settings], env=place, capture_output=True, text=True)
    return f"exit code {done.returncode}: {' '.join(done.stderr.split()[-20:])}" if done.returncode else ""

def t_interval(gains):
    """[mean, low, high]: 95 % interval of Student's t; with t = sqrt(df) tan(x) its density is prop. to cos(x)^(df-1)."""
    df, x = len(gains) - 1, np.linspace(-np.pi / 2, np.pi / 2, 10 ** 6 + 1)
    mass = (np.cos(x) ** (df - 1)).cumsum()
    half = math.sqrt(df) * math.tan(np.interp(0.975, mass / mass[-1], x)) * np.std(gains, ddof=1) / math.sqrt(len(gains))
    return [np.mean(gains), np.mean(gains) - half, np.mean(gains) + half]

def command_compare(config, given, *, methods=",".join(METHODS), seeds="0,1,2,3,4", sweep="", jobs=0):
    """Run --methods, or --sweep NAME=VALUE,..., over --seeds, --jobs at once (0: one a core). Returns True if a run failed."""
    out = Path(given.get("out") or "runs/compare")
    runs = plan(config, given, methods, seeds, sweep, out)
    todo = [run for row in runs.values() for run in row.values() if finished(run) is None]
    print(f"{sum(map(len, runs.values()))} runs in {out}, {len(todo)} of them to do")
    envs = make_envs(config)
    start = evaluate(*load_policy(config), envs, config)
    torch.cuda.empty_cache()  # for the processes
    at_once = max(jobs, 0) or (1 if config.device == "cuda" else os.cpu_count())
    reasons = dict(zip((run.out for run in todo), thread_map(launch, todo, max_workers=at_once, unit="run")))
    done = {label: {seed: lines for seed, run in row.items() if (lines := finished(run))} for label, row in runs.items()}
    success = {label: {seed: lines[-1]["eval_success"] for seed, lines in row.items()} for label, row in done.items()}
    rows = [("vanilla", [start["by_type"]], ""), ("skill_prompt*", [start["by_type"]], "")]
    for label, row in runs.items():
        base = success.get("grpo", {}) if label != "grpo" else {}
        gains = [won - base[seed] for seed, won in success[label].items() if seed in base]
        remark = ["minus grpo {:+.3f} [{:+.2f}, {:+.2f}]".format(*t_interval(gains))] if len(gains) > 1 else []
        remark += [f"seed {seed} failed: {reasons[row[seed].out]}" for seed in row if seed not in success[label]]
        by_type = [lines[-1]["eval_by_type"] for lines in done[label].values()]
        rows += [(label, by_type, "  ".join(remark))] + [(label + "*", by_type, "")] * METHODS[label.split()[0]].skilled
    print_table(rows)
    out.mkdir(parents=True, exist_ok=True)
    report = out / "-".join(["compare", *sweep.split("=")[:1]]).strip("-")
    report.with_suffix(".json").write_text(json.dumps({"start": start, "evaluations": done}) + "\n")
    curves = {label: np.array([[(0, start["success"]), *((line["step"], line["eval_success"]) for line in lines)]
                               for lines in row.values()]) for label, row in done.items() if row}
    draw({"held-out success without the skill at training steps": curves}, report.with_suffix(".svg"))
    return any(len(row) > len(done[label]) for label, row in runs.items())

def draw(panels, path):
    """Means over runs of {title: {label: (runs, points, x and y)}}, as text and, with sd bands, a picture."""
    for title, curves in panels.items():
        means = [y for curve in curves.values() for y in curve.mean(0)[:, 1]]
        low, high = (0, 1) if "success" in title or "share" in title else (min(means), max(means) + 1e-9)
        print("\n" + title)
        for label, curve in curves.items():
            points = curve.mean(0)[np.linspace(0, curve.shape[1] - 1, min(curve.shape[1], 7)).astype(int)]
            bars = "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * (y - low) / (high - low)))] for _, y in points)
            print(bars + "".join(f"  {x:.4g}: {y:.3f}" for x, y in points) + f"  {label}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no picture was drawn: it takes matplotlib (pip install matplotlib)")
    wide, high = min(len(panels), 3), -(-len(panels) // 3)
    figure = Figure(figsize=(max(7, 4 * wide), max(4.2, 3 * high)), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(high, wide, squeeze=False).flat, panels.items()):
        for label, curve in curves.items():
            (x, mean), sd = curve.mean(0).T, curve[..., 1].std(0, ddof=min(1, len(curve) - 1))
            axes.plot(x, mean, label=label)
            axes.fill_between(x, mean - sd, mean + sd, alpha=0.15, linewidth=0)
        axes.set_title(title, fontsize="medium")
        axes.legend(fontsize="small")
    figure.savefig(path)
    print(f"\n{path}")

BENCH_SECONDS = 0.5  # of each timing, at least

def command_bench(config):
    """Where the time of a training step goes; then token_logprobs on each of its paths."""
    global KERNEL, LOGITS_AT_ONCE
    from torch.utils.benchmark import Timer
    run = Run(replace(config, out=config.out + "-bench", resume=False))  # which writes nothing before it begins
    steps, _, clocks = zip(*[training_step(run, step) for step in (1, 2, 3)][1:])  # the first warms up
    seconds, tokens = np.diff(clocks).mean(0), np.mean([sum(len(e.logprobs) for e in episodes) for episodes in steps])
    peak = torch.cuda.max_memory_allocated() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"a step: {len(steps[0])} episodes, {tokens:,.0f} sampled tokens, peak memory {peak / 1e9:.2f} GB; the teacher "
          f"adds {seconds[1] / (seconds[0] + seconds[2]):.0%} to it")
    for part, spent in zip(("rollout", "teacher", "update"), seconds):
        print(f"{part:<9}{spent:8.2f} s {spent / seconds.sum():5.0%} {tokens / spent:10,.0f} tokens/s")
    time_of = lambda work: Timer("work()", globals={"work": work}).blocked_autorange(min_run_time=BENCH_SECONDS).median  # one thread
    head = run.model.get_output_embeddings().weight.detach().to(getattr(torch, config.dtype)).requires_grad_()
    rows = config.micro_tokens if head.is_cuda else max(1, min(config.micro_tokens, 2 ** 28 // len(head)))
    hidden = torch.randn(rows, head.shape[1], device=head.device).to(head.dtype).requires_grad_()
    ids, (a, b) = torch.randint(len(head), (rows,), device=head.device), torch.zeros(2, 2 ** 27, device=head.device)
    exact = torch.log_softmax((hidden[:64] @ head.T).double(), -1).gather(1, ids[:64, None])[:, 0]
    product, copy_speed = time_of(lambda: hidden @ head.T), 2 * a.nbytes / time_of(lambda: a.copy_(b))
    print(f"\n{rows:,} x {len(head):,} logits, {config.dtype}: product {product * 1e3:.1f} ms; copy {copy_speed / 1e9:.0f} GB/s")
    paths = [("chunked", None, LOGITS_AT_ONCE), ("kernel", KERNEL, LOGITS_AT_ONCE), ("plain", None, 2 ** 62)]
    for name, KERNEL, LOGITS_AT_ONCE in paths if KERNEL else paths[::2]:
        logprobs = lambda: token_logprobs(hidden, head, ids)[0]
        torch.cuda.is_available() and torch.cuda.reset_peak_memory_stats()
        forward, before = time_of(logprobs), torch.cuda.memory_allocated()
        both = time_of(lambda: torch.autograd.grad(logprobs().sum(), (hidden, head)))
        read = rows * len(head) * head.itemsize / max(forward - product, 1e-9)  # of logits, a second, after the product
        peak, error = torch.cuda.max_memory_allocated() - before, (logprobs()[:64] - exact).abs().max()
        print(f"{name:<8} forward {forward * 1e3:.1f} ms ({read / 1e9:.0f} GB/s, {read / copy_speed:.0%} of a copy), with "
              f"backward {both * 1e3:.1f} ms, GPU memory {peak / 1e6:.0f} MB, largest error {error:.1e}")

# --- 12. To look at: an episode token by token, and the curves of runs ----------------------------
@torch.no_grad()
def dissect(model, episodes, config):
    """Of the sampled tokens of a group's episodes, a dict of (B, T): log-probs, advantage, gap, gate, and push: what a first
    update multiplies the gradient of log pi with. test_the_push_is_the_losses_gradient"""
    method, batch = METHODS[config.method], step_batch(model, None, episodes, config)
    entropy, student = response_logprobs(model, episodes, config, with_entropy=True)[1], batch["old"]
    teacher = torch.where(batch["taught"], score(model, episodes, config, with_skill=True), student)
    trust = gate(config.gate if method.beta else "gap", teacher - student, entropy, config.gate_beta * method.beta, batch["mask"])
    return {"student": student, "teacher": teacher, "advantage": batch["advantages"], "gap": teacher - student, "gate": trust,
            "push": method.policy * batch["advantages"] + config.sdar_coef * trust}

def command_inspect(config, *, episode=0, page="inspect.html"):
    """Play the group of the training task that --seed chooses; show its --episode token by token, here and as a web --page."""
    require(METHODS[config.method].teacher == "gate", f"inspect shows the gate, and --method {config.method} has none")
    (model, chat), envs = load_policy(config), make_envs(config)
    tasks, decode = envs[0].tasks("train"), chat.tokenizer.decode
    starts = [(tasks[config.seed % len(tasks)], config.seed, 0)] * config.group_size
    group = rollout(model, chat, envs, starts, config, (4, config.seed))
    require(0 <= episode < len(group) and any(group[episode].mask), f"--episode {episode}: there is none with a sampled token")
    e, first = group[episode], group[episode].mask.index(1)
    require(2 * e.ids[:first].count(chat.tokenizer.unk_token_id) < first,
            f"--model {config.model} cannot read --env {config.env}: its tokenizer does not know most of the prompt")
    values = dissect(model, group, config)
    scores = [f"{'won' if x.won else 'lost'} {a:+.2f}" for x, a in zip(group, values["advantage"][:, 0].tolist())]
    texts = {"task": e.task, "episode": f"{episode}: {scores[episode]}", "group": ", ".join(scores), "skill": decode(e.skill_ids),
             "before": decode(e.ids[:e.skill_at]), "after": decode(e.ids[e.skill_at:first])}
    plain = lambda text: repr(text)[1:-1]  # no control character reaches the terminal
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    show = lambda code, text: print(f"\033[{code}m{text}\033[0m" if colour else text)
    room, shown = (20, slice(6)) if shutil.get_terminal_size().columns >= 80 else (10, slice(3, 6))  # 80 columns or 40
    line = lambda text, cells: f"{plain(text)[:room - 1]:<{room}}" + "".join(f"{cell:>10}" for cell in cells[shown])
    show(1, "\n".join([*(f"{name}: {plain(texts[name])}" for name in [*texts][:4]), line("", list(values))]))
    rows, tokens = zip(*(value[episode].tolist() for value in values.values())), []
    for sampled, run in itertools.groupby(zip(e.ids, e.mask), lambda pair: pair[1]):
        ids = [i for i, _ in run]
        if not sampled:
            show(2, plain(decode(ids)))
            tokens.append(f"<p>{html.escape(decode(ids)[:999])}</p>")
        for i, row in zip(ids, rows) if sampled else ():
            text, cells = decode([i]), [f"{value:.2f}" for value in row[:-1]] + [f"{'▲▼'[row[-1] < 0]}{row[-1]:+.2f}"]
            show(32 if row[3] > 0 else 31, line(text, cells))
            numbers = ", ".join(map(" ".join, zip(values, cells)))
            tokens.append(f'<i tabindex="0" style="--d:{row[3]:.3f};--p:{row[4]:.3f}" data-n="{numbers}">{html.escape(text)}</i>')
    counts, edges = np.histogram(values["gap"][episode][:sum(e.mask)].cpu().clamp(-3, 3), 25, (-3, 3))
    bars = [f'<b style="--d:{d:.2f};--n:{n / counts.max():.3f}" title="{n}"></b>' for n, d in zip(counts, edges + 0.12)]
    filled = {name: html.escape(text[:20000]) for name, text in texts.items()} | {"tokens": "".join(tokens[1:1200]),
              "histogram": "".join(bars), "beta": f"{config.gate_beta * METHODS[config.method].beta:g}"}  # at most 500 kB
    Path(page).write_text(re.sub(r"\{(\w+)\}", lambda name: filled[name[1]], (TINY_FOLDER.parent / "inspect.html").read_text()))
    print(f"\n{page}: the same, for a browser")

def command_plot(config, *, runs=(), picture="plot.svg"):
    """Draw the curves of runs, given by their folders; those that differ in nothing but the seed are one curve with a band."""
    alike, panels = {}, {}
    for run in runs:
        made, lines = read_run(run)
        settings = [made.get(f.name) for f in fields(Config) if f.name not in (*Run.MAY_DIFFER, "seed")]
        alike.setdefault((re.sub(r"-s\d+$", "", run), str(settings)), []).append(lines)
    titles = {"success": "success in training", "eval_success": "held-out success without the skill", "kl": "KL",
              "eval_success_skill": "held-out success with the skill", "gap_mean": "mean gap, nats",
              "gate_active": "share of active gates", "entropy": "entropy, nats"}
    for name, title in titles.items():
        for (label, _), group in alike.items():
            found = [[(line["step"], line[name]) for line in lines if line.get(name) is not None] for lines in group]
            if points := min(map(len, found)):
                panels.setdefault(title, {})[label] = np.array([curve[:points] for curve in found])
    require(panels, "plot takes folders of runs that have finished a step: python sdar.py plot runs/toy-sdar-s0")
    draw(panels, picture)

# --- 13. Command line ---------------------------------------------------------------------------
def command_evaluate(config):
    """Play the panel with the given model and print the table."""
    envs = make_envs(config)
    by_type = evaluate(*load_policy(config), envs, config)["by_type"]
    RANK == 0 and print_table([("student", [by_type], ""), ("student*", [by_type], "")])

COMMANDS = {"train": train, "evaluate": command_evaluate, "compare": command_compare, "bench": command_bench,
            "inspect": command_inspect, "plot": command_plot,
            "warmstart": lambda config: warmstart(TINY_FOLDER, Chat(toy_tokenizer())) or command_evaluate(config)}

def parse_args(argv):
    """Command line -> (command, Config). The flags are Config's fields; - and _ are the same in them."""
    argv = [re.sub(r"^--[^=]+", lambda typed: flag(typed[0][2:]), arg) for arg in argv]
    command = argv.pop(0) if argv and not argv[0].startswith("-") else "train"
    require(command in COMMANDS, unknown("command", command, list(COMMANDS)))
    run, text = COMMANDS[command], f"Commands: {', '.join(COMMANDS)}."
    parser = argparse.ArgumentParser(f"python sdar.py {command}", description=text, epilog=run.__doc__, allow_abbrev=False,
                                     exit_on_error=False, argument_default=argparse.SUPPRESS)  # what is not typed is not there
    flags = ["--help"]
    for f in fields(Config):
        known = f": {', '.join(CHOICES[f.name])}" if f.name in CHOICES else ""
        default = " paper: ".join(dict.fromkeys(map(str, (f.metadata["toy"], f.metadata["paper"]))))
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type, "metavar": f.type.__name__}
        flags += parser.add_argument(flag(f.name), help=f"{f.metadata['help']}{known} [{default}]", **kind).option_strings
    own = run.__kwdefaults__ or {}  # the command's own flags: its keyword-only arguments
    for name, default in own.items():
        kind = {"nargs": "*"} if default == () else {"type": type(default)}  # a list comes without a flag
        flags += parser.add_argument(name if default == () else flag(name), help=f"[{default}]", **kind).option_strings
    values, rest = parser.parse_known_args(argv)
    near = difflib.get_close_matches("".join(rest[:1]).split("=")[0], flags, 1)
    require(not rest, f"unknown flag {''.join(rest[:1])}: " + (f"did you mean {near[0]}?" if near else "see --help"))
    given = vars(values)
    options = {name: given.pop(name) for name in own if name in given}
    return partial(run, **options, **({"given": given} if command == "compare" else {})), Config(**given)

def main(argv=None):
    """Run a command. Returns the exit code: 0; 1 another run or process failed; 2 bad input (one line on stderr); 130 Ctrl-C, 143
    SIGTERM."""
    def terminate(number, frame):
        raise KeyboardInterrupt(143)

    try:
        signal.signal(signal.SIGTERM, terminate)
        command, config = parse_args(sys.argv[1:] if argv is None else list(argv))
        if untested := untested_versions():
            say(f"sdar.py: {untested}")
        if RANKS > 1:
            require(command.func in (train, command_evaluate) and RANKS <= config.tasks_per_step,
                    f"torchrun is for train and evaluate, and for --tasks-per-step {config.tasks_per_step} processes at most")
            config.device == "cuda" and torch.cuda.set_device(LOCAL_RANK)
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if config.device == "cuda" else "gloo")
        return int(command(config) is True)
    except BrokenPipeError:  # of a pipe to `head`, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, EnvUnavailable, argparse.ArgumentError, OSError) as error:
        message, code = error, 2
    except KeyboardInterrupt as error:
        message, code = "stopped; train goes on with the same command and --resume, compare without", *(error.args or (130,))
    except (RuntimeError, MemoryError) as error:
        if RANKS > 1 and re.search("by peer|Broken pipe|NCCL", str(error)):
            return print("sdar.py: another process of this run ended; --resume continues it", file=sys.stderr) or 1
        if not (isinstance(error, MemoryError) or re.search("out of memory|allocate memory|ALLOC_FAILED", str(error))):
            raise
        message, code = "out of memory: lower --rollout-batch, --micro-tokens, or add --gradient-checkpointing, --offload", 2
    finally:
        if torch.distributed.is_initialized():  # else its threads may abort a process that ends
            torch.distributed.destroy_process_group()
    time.sleep(2 * (RANK > 0))  # where all fail alike, rank 0 says it, and torchrun ends the others
    print(f"sdar.py: {message}", file=sys.stderr)
    return code

if __name__ == "__main__":
    sys.exit(main())
