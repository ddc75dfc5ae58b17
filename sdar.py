"""SDAR: Self-Distilled Agentic Reinforcement Learning (arXiv 2605.15155), to read beside the paper.

An agent plays text games over several turns and is rewarded only at the end. GRPO turns that one
number into an advantage for every token of the episode. SDAR adds a dense signal: a teacher, which
is the same network shown the same conversation plus a skill text that the student never sees,
scores every token that the student sampled. A gate decides how far the teacher is trusted on that
token. At test time there is no skill: by then the policy must know what the skill said.

    python sdar.py                            # the carried tiny policy, a toy household, a CPU
    python sdar.py --model Qwen/Qwen3-0.6B    # a checkpoint from the hub, through the same code
    python sdar.py --steps 0 --model FOLDER   # only play the held-out tasks
    python sdar.py --help                     # all flags, and the instruments

The algorithm on one screen. The order of the file is its order:

    for step in 1, 2, ...:                                      train
        episodes = G tries of each of some tasks                rollout
        old, teacher = log-probs of what was sampled,           score
                       without and with the skill
        A = (reward - its group's mean) / its group's std       group_advantages
        for each part of the episodes:                          update
            logprobs = those of now, with gradient              response_logprobs
            ratio = exp(logprobs - old)                         policy_loss
            L_GRPO = max(-A * ratio, -A * clip(ratio))
                     + beta_KL * KL                             kl_k3
            gap = teacher - logprobs                            sdar_loss
            gate = sigmoid(beta * gap), without gradient        GATES
            L_SDAR = gate * gap (minimised: logprobs rise)
            L = L_GRPO + lambda * L_SDAR                        objective
            its mean over the tokens, backward, optimiser step  update

    the paper's              is called               in
    s_t, the student's view  Episode.ids             Episode.view(with_skill=False)
    c+, the skill (in s_t+)  Episode.skill_ids       Episode.view(with_skill=True)
    y_t, a sampled token     ids where mask is 1     answer
    pi_theta, the student    model                   rollout, update
    pi_T, the teacher        model, or a copy of it  train, score(with_skill=True)
    log pi                   logprobs                response_logprobs
    A, G                     advantages, group_size  step_batch, group_advantages
    epsilon, beta_KL         clip_eps, kl_coef       policy_loss, objective
    L_GRPO                   policy_loss, kl_k3      objective
    Delta_t, the gap         gap                     sdar_loss
    g_t, beta                gate, gate_beta         GATES
    L_SDAR, lambda           sdar_loss, sdar_coef    objective

An episode is one growing conversation, as in the paper's section 2.1; the official code makes every
turn a row of its own. The defaults are the toy's: PRESETS has the paper's. How paper, official code
and this file differ is in .lab/READING.md.

Axes: B episodes, S tokens of a whole conversation (padded), N sampled tokens of all episodes, one
after the other, V vocabulary, H width of the model, G episodes of a group.
"""

import argparse
import inspect
import json
import os
import re
import sys
from collections import defaultdict
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache, partial
from math import sqrt
from pathlib import Path
from time import perf_counter

# Threads that wait must sleep: on cores that do something else, busy waiting takes several times as
# long. OpenMP reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from envs import HERE, SkillBank, UserError, call_all, load_skills, make_env, naming, require

# =================================== PART I: THE PAPER ===================================

# --- 1. Configuration (paper, section 3 and appendix C) ----------------------------------
#
# The defaults are the toy's: a network of 309 thousand parameters that learns in minutes on a CPU.
# A preset replaces some of them, and so does a method.

PRESETS = {
    "toy": {},
    "paper": {  # ALFWorld's published values, but for micro_batch, rollout_batch, minibatches
        "steps": 150,
        "dtype": "bfloat16",
        "micro_batch": 2,
        "rollout_batch": 16,
        "gradient_checkpointing": True,
        "tasks_per_step": 16,
        "max_new_tokens": 512,
        "lr": 1e-6,
        "sdar_coef": 0.01,
        "rlsd_decay": 100,
        "eval_every": 5,
        "eval_episodes": 128,
    },
    "small": {  # a language model of 0.1 to 3 billion parameters on the toy, on one card
        "dtype": "bfloat16",
        "micro_batch": 4,
        "gradient_checkpointing": True,
        "group_size": 4,
        "max_new_tokens": 64,
        "lr": 3e-5,
        "kl_coef": 0.0,
        "teacher": "frozen",
        "eval_episodes": 60,
    },
}


@dataclass
class Config:
    """One run. Every field is a flag, its comment the flag's help. "paper: 2": in that preset;
    "published": the authors' value, if different."""

    # what is run
    env: str = "toy"  # toy, alfworld, webshop, search, or an environment of your own, module:Class
    env_data: str = ""  # the environment's games, checkout or questions; the toy has none
    search_url: str = ""  # retrieval server of search; empty: on this machine, port 8000
    skills: str = ""  # skill bank in a JSON file; empty: the environment's own
    model: str = "tiny"  # tiny (carried along), a name on the hub, or a checkpoint's folder
    preset: str = ""  # toy, paper or small; empty: toy for the tiny model, paper for others
    method: str = "sdar"  # sdar, grpo, opsd, grpo_opsd, skill_grpo, skill_sd, rlsd: see METHODS
    seed: int = 0  # of tasks, sampling and order; never of the evaluation panel
    steps: int = 60  # training steps, each one batch of episodes; 0: evaluate only; paper: 150
    out: str = ""  # folder of the run; empty: runs/<env>-<method>-s<seed>
    resume: bool = False  # go on with the run in --out from its last checkpoint
    overwrite: bool = False  # replace the run in --out
    save_every: int = 10  # steps between checkpoints

    # the machine: what changes memory and speed, and results by rounding alone
    device: str = ""  # cpu, cuda or mps; empty: cuda if there is one, for any model but tiny
    dtype: str = "float32"  # of forward passes: float32 or bfloat16; paper: bfloat16
    micro_batch: int = 32  # episodes in one scoring or training pass; paper: 2
    rollout_batch: int = 64  # episodes played at once; paper: 16
    gradient_checkpointing: bool = False  # recompute activations, do not keep them; paper: True
    kernel: bool = False  # CUDA kernel for log-probs, compiled at first use

    # rollouts
    tasks_per_step: int = 8  # tasks per step, each of which makes one group; paper: 16
    group_size: int = 8  # G, episodes of one task from the same initial state
    temperature: float = 1.0  # of sampling in training, and therefore of every log-prob
    max_turns: int = 0  # turns per episode; 0: the environment's own number, 10 in the toy
    max_new_tokens: int = 8  # tokens per response; paper: 512
    skilled: bool = False  # the student itself reads the skill while it trains

    # GRPO, the backbone
    lr: float = 6e-4  # learning rate of AdamW, constant; paper: 1e-06
    minibatches: int = 4  # optimiser steps per batch; published: up to 30, see .lab/MODELS.md
    policy_coef: float = 1.0  # weight of the policy loss
    clip_eps: float = 0.2  # epsilon, PPO's clip of the ratio
    kl_coef: float = 0.01  # weight of the k3 KL to the frozen start policy
    invalid_penalty: float = 0.01  # what an invalid answer costs; published: 0.1, the reward 10
    grad_clip: float = 1.0  # largest norm of the gradient

    # SDAR
    distil: str = "gate"  # which loss the teacher is used in: gate (SDAR's), skill_sd, rlsd or none
    sdar_coef: float = 1.0  # lambda, weight of the loss of gate and skill_sd; paper: 0.01
    gate: str = "gap"  # what opens SDAR's gate on a token: gap, entropy, soft_or; none: always open
    gate_beta: float = 5.0  # beta, the sharpness of the gate
    teacher: str = "live"  # whose weights read the skill: live (each step's), frozen (the start's)
    retrieval: str = "keyword"  # which skills it reads: keyword, full, random or ucb
    rlsd_decay: int = 40  # steps until RLSD's teacher no longer changes advantages; paper: 100

    # evaluation
    eval_every: int = 10  # steps between evaluations; 0: before and after only; paper: 5
    eval_episodes: int = 300  # episodes of the fixed panel; paper: 128
    eval_temperature: float = 0.4  # of sampling in evaluation
    eval_split: str = "eval"  # held-out tasks: dev to choose settings, eval to report


METHODS = {  # the trained rows of the paper's Table 1, by what they change
    "sdar": {},
    "grpo": {"distil": "none"},
    "opsd": {"policy_coef": 0.0},  # SDAR without the policy loss; the KL stays
    "grpo_opsd": {"gate_beta": 0.0},  # as officially: a gate of 1/2, which teaches nothing
    "skill_grpo": {"distil": "none", "skilled": True},
    "skill_sd": {"distil": "skill_sd"},
    "rlsd": {"distil": "rlsd"},
}
METHOD_SETTINGS = {  # what a method changes in a preset; the toy's were chosen on the split `dev`
    "toy": {"grpo": {"lr": 1e-3}, "opsd": {"lr": 3e-4}, "skill_sd": {"sdar_coef": 0.1}},
    "paper": {"skill_sd": {"sdar_coef": 0.001}},
}


def configure(**given):
    """The Config of a run: the defaults, replaced by the preset's settings, then by the method's,
    then by what is given. UserError for what no run could use."""
    tiny = given.get("model", "tiny") == "tiny"
    method = given.get("method", "sdar")
    preset = given.get("preset") or ("toy" if tiny else "paper")
    chosen = METHODS.get(method, {}) | METHOD_SETTINGS.get(preset, {}).get(method, {})
    config = Config(**PRESETS.get(preset, {}) | chosen | given | {"preset": preset})

    config.out = config.out or f"runs/{config.env.split(':')[-1]}-{method}-s{config.seed}"
    on_card = torch.cuda.is_available() and not tiny
    config.device = config.device or ("cuda" if on_card else "cpu")
    check_config(config)
    return config


# --- 2. Conversation: token in, token out (paper, section 2.1) ---------------------------
#
# An episode is one growing list of ids: system message, task and first observation, then response,
# observation, response ... What the policy sampled is kept as ids and never turned into text and
# back, so what is scored later is what was sampled, id by id. The mask remembers which ids these
# are. The teacher reads the same list with the skill's ids put in at one place. The ids of texts
# come from Chat, in Part II, with the frames of the model's chat template: first() makes the first
# prompt, next() what stands between two responses. A plain chat, the tiny network's, reads no hints
# and writes no tags.


@dataclass
class Episode:
    """One conversation and what became of it."""

    env: object
    task: str
    task_type: str
    random: np.random.Generator  # its own: what it samples does not depend on its neighbours
    ids: list  # the whole conversation
    mask: list  # 1 exactly on the ids that the policy sampled, its ends of turn among them
    skill_at: int  # where in ids the skill would stand
    skills: list  # what was retrieved for the task
    skill_ids: list  # what the teacher reads there, and the student does not; may be empty
    logprobs: list = field(default_factory=list)  # the sampler's, of the sampled ids
    begin: int = 0  # where in ids the newest response begins
    read: int = 0  # how many ids of the conversation the sampler has read
    turns: int = 0
    invalid: int = 0  # turns whose answer was not valid
    reward: float = 0.0  # raw: 0 or 1
    won: bool = False

    def add(self, ids, sampled):
        """Append ids to the conversation. sampled: 1 if the policy chose them, else 0."""
        self.ids += ids
        self.mask += [sampled] * len(ids)

    def view(self, with_skill):
        """(ids, mask) as the student or, with the skill spliced in, the teacher reads them.

        student  <user>       Your task: heat a mug. <assistant> go to microwave 2 <end> <user> ...
        teacher  <user> SKILL Your task: heat a mug. <assistant> go to microwave 2 <end> <user> ...
        mask                                                     1  1  1         1 1
        """
        skill = self.skill_ids if with_skill else []
        ids = self.ids[: self.skill_at] + skill + self.ids[self.skill_at :]
        return ids, [0] * len(skill) + self.mask  # in front will do: all is 0 up to the skill


# --- 3. Rollout (paper, section 2.1 and appendix B) --------------------------------------
#
# Many episodes are played in lockstep: all answer, all environments reply, all answer again. Those
# that have ended leave the batch. Sampler, at the end of this section, reads what is new in each
# conversation (feed), and draws the next id of each (draw).


def in_parts(rows, size):
    """The list cut into parts of at most `size`."""
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def padded(rows, device="cpu", side="right"):
    """Lists of numbers as one tensor (rows, longest), filled up with 0 on one side."""
    return pad_sequence(
        [torch.tensor(row, dtype=torch.long) for row in rows],
        batch_first=True,
        padding_side=side,
    ).to(device)


@torch.no_grad()
def rollout(model, chat, envs, starts, config, temperature, with_skill=False):
    """Play an episode from each (task, seed, numbers) of `starts`, as many at once as there are
    environments. Returns Episodes, in the order of the starts.

    numbers: ints that seed an episode's random numbers; the first is 1 in evaluation, 3 in
    training. with_skill: the student reads the skill, too."""
    if config.dtype == "bfloat16":  # a copy, cast once: autocast would cast at every token
        model = deepcopy(model)
        for weight in model.parameters():
            weight.data = weight.data.bfloat16()
    episodes = []
    progress = tqdm(desc="playing", delay=2, leave=False)
    for now in in_parts(starts, len(envs)):
        resets = [partial(env.reset, task, seed) for env, (task, seed, _) in zip(envs, now)]
        playing = [
            start_episode(chat, env, start, result, with_skill)
            for env, start, result in zip(envs, now, call_all(resets, in_threads=envs[0].slow))
        ]
        episodes += playing
        longest = max(len(episode.ids + episode.skill_ids) for episode in playing)
        require(  # else a UserError; act looks at the later turns
            longest + config.max_new_tokens <= model.config.max_position_embeddings,
            f"a first prompt of {longest} ids fills the model's context",
        )

        # One cache for these episodes: a row leaves it when its episode has ended.
        sampler = Sampler(model, temperature)
        while playing:
            responses = answer(sampler, chat, playing, config)
            rows = act(chat, playing, responses, model.config.max_position_embeddings, config)
            progress.update(len(responses))
            playing = [playing[row] for row in rows]
            if playing:
                sampler.keep(rows)
    return episodes


def start_episode(chat, env, start, result, with_skill):
    """The Episode after its first observation. result: what env.reset returned."""
    _, seed, numbers = start
    observation, info = result
    env.plain = chat.plain  # so its parse asks for no tags
    skills = env.bank.retrieve(info["task"], info["task_type"], seed)
    skill = "Skill: " + " ".join(skill.text for skill in skills) + "\n"
    skill_ids = chat.encode(skill) if skills else []
    ids, at = chat.first(env, as_read(chat, observation, info))
    if with_skill:  # the student reads it: a part of the conversation, and no teacher
        ids = ids[:at] + skill_ids + ids[at:]
        skill_ids = []
    return Episode(
        env=env,
        task=info["task"],
        task_type=info["task_type"],
        random=np.random.default_rng(numbers),
        ids=ids,
        mask=[0] * len(ids),
        skill_at=at,
        skills=skills,
        skill_ids=skill_ids,
    )


def as_read(chat, observation, info):
    """An observation as the policy reads it: plainly, or with the environment's hint: the actions
    that are new, the turn, and the form of an answer."""
    if chat.plain:
        return observation
    return (observation + info["hint"]).strip()  # some templates drop blanks at the ends


def answer(sampler, chat, episodes, config):
    """Sample a response to each conversation, and append it. Rows that have finished wait for the
    slowest. Returns the responses' texts."""
    draws = [episode.random.random(config.max_new_tokens, np.float32) for episode in episodes]
    for episode in episodes:
        episode.begin = len(episode.ids)
    talking = range(len(episodes))  # rows that still answer
    for uniform in np.transpose(draws):  # token by token, a number for each row
        ids, logprobs = sampler.draw(sampler.feed(episodes), uniform)
        for row in talking:
            episodes[row].add([ids[row]], sampled=1)
            episodes[row].logprobs.append(logprobs[row])
        talking = [row for row in talking if not has_answered(chat, episodes[row])]
        if not talking:
            break
    responses = [episode.ids[episode.begin :] for episode in episodes]
    for row in talking:
        if chat.plain:  # cut by the limit: no answer. (With tags, parse sees that.)
            responses[row] = []
    return chat.tokenizer.batch_decode(responses, skip_special_tokens=True)


def has_answered(chat, episode):
    """True if the newest response is whole. It ends with an end of turn, or with the tag that
    closes its action: then the next prompt's frame adds the end of turn."""
    ended = episode.ids[-1] in chat.end_ids
    if ended or chat.plain:
        return ended
    tail = chat.tokenizer.decode(episode.ids[episode.begin :][-16:])  # enough for any tag
    return any(tag in tail.lower() for tag in episode.env.closing_tags)


def act(chat, episodes, responses, context, config):
    """The environments read an action out of each response and reply. The reply becomes the next
    prompt. An episode that would fill the model's context ends. Returns the rows of those that go
    on."""
    envs = [episode.env for episode in episodes]
    actions, readable = zip(*[env.parse(text) for env, text in zip(envs, responses)])
    results = envs[0].step_all(envs, actions)

    running = []  # rows
    for row, (episode, could_read, result) in enumerate(zip(episodes, readable, results)):
        observation, reward, terminated, truncated, info = result
        episode.turns += 1
        episode.invalid += not (could_read and info["valid"])  # to parse, and to the environment
        episode.reward += reward
        episode.won = info["won"]

        # The reply is all that is added to the conversation here. It is not sampled: its mask is 0.
        prompt = chat.next(as_read(chat, observation, info), episode.ids[-1])
        needed = len(episode.ids + prompt + episode.skill_ids) + config.max_new_tokens
        if not (terminated or truncated or needed > context):
            episode.add(prompt, sampled=0)
            running.append(row)
    return running


# --- Sampler: for speed alone. At a first reading go on to section 4. ---
#
# Between turns the model keeps attention's keys and values of what it has read: the KV cache, a
# column for each id. A sampled id is read in the next pass. Here two conversations have prompts of
# five and three ids. They answer "a b e" and "e" (e: the end of turn), and then get observations of
# three and two ids:
#
#              read 1      read 2  read 3  read 4
#     row 1    p p p p p   a       b       e o o o
#     row 2    . . p p p   e       .       . . o o
#
# A dot is a hole: the row has nothing new to read, since it had less, or had finished its answer.


class Sampler:
    """Samples from a batch of conversations, and keeps their KV cache between turns.

    The library's generate() does not keep the cache of a batch whose rows go on at different
    lengths, and its draws depend on the rest of the batch. Here what is new is padded on the left.
    That leaves holes in the cache. The mask hides them and positions skip them, so log-probs are
    those of an unpadded pass over the conversation."""

    def __init__(self, model, temperature):
        from transformers import DynamicCache  # imported here, since it takes seconds

        self.model = model
        self.temperature = max(temperature, 1e-4)  # 0: greedy
        self.cache = DynamicCache(config=model.config)
        renamed = "cache" in inspect.signature(model.forward).parameters  # in transformers 5.24
        self.argument = "cache" if renamed else "past_key_values"
        self.real = None  # (B, columns of the cache) 1: a token, 0: a hole

    def feed(self, episodes):
        """Read what is new in each conversation -> logits (B, V) after its newest token. Those of
        a row without anything new mean nothing: it waits."""
        device = self.model.device
        rows = [episode.ids[episode.read :] for episode in episodes]
        for episode in episodes:
            episode.read = len(episode.ids)
        new = padded([[1] * len(row) for row in rows], device, "left")
        self.real = new if self.real is None else torch.cat([self.real, new], 1)
        output = self.model(
            input_ids=padded(rows, device, "left"),
            attention_mask=self.real,
            # A position is how many tokens stand before: holes do not count.
            position_ids=(self.real.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :],
            use_cache=True,
            logits_to_keep=1,
            **{self.argument: self.cache},
        )
        return output.logits[:, -1].float()

    def draw(self, logits, uniform):
        """An id for each row and its log-prob, lists, from uniform (B,) in [0, 1).

        By inverting the row's own cumulative distribution: what a row draws cannot depend on its
        neighbours, as it would with one generator for the batch."""
        logprobs = torch.log_softmax(logits / self.temperature, -1)  # (B, V)
        cdf = logprobs.exp().cumsum(-1)
        uniform = logits.new_tensor(uniform)[:, None]
        end = cdf[:, -1:]  # 1, but for rounding
        chosen = torch.searchsorted(cdf, uniform * end, right=True)
        chosen = chosen.clamp(max=logits.shape[1] - 1)  # for logits that are NaN
        return chosen.flatten().tolist(), logprobs.gather(1, chosen).flatten().tolist()

    def keep(self, rows):
        """The batch becomes these rows of it."""
        rows = self.real.new_tensor(rows)
        self.cache.reorder_cache(rows)
        self.real = self.real[rows]


# --- 4. Log-probs of the sampled ids (Delta_t's two halves) ------------------------------
#
# The same function scores for the student, the teacher, the start policy and the training pass.
# Only weights, the skill and the graph differ. It returns a value for each sampled token and
# nothing else: student and teacher stand at different places of different sequences, but token n of
# the one is token n of the other.

LOGITS_AT_ONCE = 2**26  # 256 MB in float32; more than any vocabulary


def token_logprobs(hidden, head_weight, ids, temperature=1.0, kernel=None):
    """Log-softmax of hidden @ head_weight.T / temperature at ids, and its exact entropy in nats.

    hidden (N, H), head_weight (V, H), ids (N,) -> logprobs (N,), entropy (N,), in float32. kernel:
    a function that does it from logits. Rows go in chunks, which the backward pass computes again:
    the float32 logits of all rows never exist at once (16,384 rows of Qwen's 151,936 tokens would
    take 10 GB)."""

    # Only one of V log-probs a row is wanted, but all V logits are needed for its denominator.
    def chunk(hidden, ids):
        logits = F.linear(hidden, head_weight)
        if kernel:
            return kernel(logits, ids, temperature)
        logprobs = torch.log_softmax(logits.float() / temperature, -1)  # (rows, V)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(1, ids[:, None]).flatten(), entropy

    rows = LOGITS_AT_ONCE // len(head_weight)
    chunks = [
        checkpoint(chunk, *part, use_reentrant=False)
        for part in zip(hidden.split(rows), ids.split(rows))
    ]
    logprobs, entropy = zip(*chunks)
    return torch.cat(logprobs), torch.cat(entropy)


def forward_dtype(model, config):
    """Context of every pass that scores or learns: with --dtype bfloat16 it computes in that;
    weights stay float32."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")


def response_logprobs(model, episodes, config, with_skill=False):
    """Log-probs and entropies, each (N,), of the sampled ids as one of the two readers sees them.

    Two sequences with three and two sampled ids become N = 5:
        ids      p  p  p  a  b  o  c         p  p  a  o  b     p: prompt, o: observation
        mask     0  0  0  1  1  0  1         0  0  1  0  1
        token             0  1     2               3     4     the same for the teacher
    """
    # One pass reads a whole conversation: attention is causal, so the state at each place has seen
    # only what stood before, as when it was sampled. Padding is on the right, where no token looks.
    views = [episode.view(with_skill) for episode in episodes]
    ids, mask = (padded(rows, model.device) for rows in zip(*views))  # (B, S); mask 1: sampled
    sampled = mask[:, 1:].bool()  # the state at position s - 1 predicts the id at s
    with forward_dtype(model, config):
        output = model.base_model(input_ids=ids, use_cache=False)  # no head: token_logprobs has it
        return token_logprobs(
            output.last_hidden_state[:, :-1][sampled],
            model.get_output_embeddings().weight,
            ids[:, 1:][sampled],
            config.temperature,
            load_kernel(config.dtype) if config.kernel else None,
        )


@torch.no_grad()
def score(model, episodes, config, with_skill=False):
    """Log-probs (N,) of all sampled tokens of a step's episodes, without a graph."""
    return torch.cat(
        [
            response_logprobs(model, part, config, with_skill)[0]
            for part in in_parts(episodes, config.micro_batch)
        ]
    )


# --- 5. Objectives (paper, sections 2.2 to 2.4): pure functions on (N,) tensors ----------
#
# No model, no configuration, no mask: a value for each sampled token (of group_advantages, for each
# episode). Copy what you need into your own trainer, and give it logprobs[mask], and an episode's
# advantage for each of its tokens. Only logprobs may carry a gradient; a teacher's and a
# gate's would be cut here. What comes back as a dict is logged under its keys. The mean is taken in
# `update`, over the tokens of a mini-batch: a long episode weighs more than a short one.


def group_advantages(rewards, eps=1e-6):
    """GRPO's advantage (section 2.2): how much better an episode is than its group. A row of
    rewards is a group: (groups, G) -> (groups, G).

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    tensor([[ 1.5000, -0.5000, -0.5000, -0.5000]])
    """
    # The mean is what the policy can do at this task today: an episode is good or bad against it.
    # Dividing by the deviation gives every group the same weight: one with a single win, and one
    # whose episodes are all lost and differ only in a penalty. Where all are equal, all get 0.
    rewards = rewards.double()  # else equal rewards may miss their mean by 1e-7, and eps is 1e-6
    mean = rewards.mean(1, keepdim=True)
    std = rewards.std(1, keepdim=True)  # with G - 1
    return ((rewards - mean) / (std + eps)).float()


def policy_loss(logprobs, old, advantages, clip_eps=0.2):
    """PPO's clipped loss (section 2.2), all (N,), with the ratio and where the clip acts.

    old: log-probs of the policy that sampled."""
    # At ratio 1 the gradient of the plain loss is that of REINFORCE, -A grad log pi. The larger of
    # the two losses counts, the paper's -min: where a token has moved by more than eps in the way
    # that its advantage asks for, the loss is constant, and pushes no further. A move the other
    # way is never clipped.
    ratio = (logprobs - old).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_eps, 1 + clip_eps)
    loss = torch.maximum(unclipped, clipped)
    return {"policy_loss": loss, "ratio": ratio, "clipped": clipped > unclipped}


def kl_k3(logprobs, ref):
    """The k3 estimate of KL(policy || reference) on each token (section 2.2), (N,):
    exp(d) - d - 1 with d = ref - logprobs; the result is clamped to [-10, 10] as in the official
    code.

    Under the policy -d has the KL as its mean, but on a single token either sign. exp(d) - 1 has
    mean 0. With it added the mean stays, and no token is below 0. The mean of its gradient, though,
    is the gradient of the other KL, KL(reference || policy): on policy, within the clamp."""
    d = (ref - logprobs).clamp(max=20)  # keeps exp, and so the gradient, finite
    return (d.exp() - d - 1).clamp(-10, 10)


# The gate g_t (section 2.4): how far the teacher is trusted on a token. The entropy is the same
# whichever token was sampled: its gate weighs places, and says nothing for or against a token.
# Soft-OR's argument, with h for the entropy, is h + (1 - h) gap: above one nat the gap counts
# negatively.
GATES = {
    "gap": lambda gap, entropy, beta: torch.sigmoid(beta * gap),
    "entropy": lambda gap, entropy, beta: torch.sigmoid(beta * entropy),
    "soft_or": lambda gap, entropy, beta: torch.sigmoid(beta * (1 - (1 - entropy) * (1 - gap))),
    "none": lambda gap, entropy, beta: torch.ones_like(gap),
}


def sdar_loss(logprobs, teacher_logprobs, entropy=None, kind="gap", beta=5.0):
    """L_SDAR, the gated self-distillation loss (section 2.4): g_t (log pi_T - log pi), all (N,),
    with the gate. entropy: the student's, in nats, for the gates that need it.

    Gate and teacher are constants here, so minimising raises log pi: the gradient on a token is
    -g_t grad log pi. Every sampled token is pushed up, under the gap's gate harder where the gap is
    larger. On policy E[grad log pi] = 0: what does not depend on which token was sampled cancels on
    average (to order 1 / B: the N that the mean divides by is random, too). So a constant gate
    teaches nothing, and the entropy's gate nothing, either. Of the gap's gate

        sigmoid(beta gap) = 1/2 + 1/2 tanh(beta gap / 2)

    only the second part is left in expectation: -1/2 E[tanh(beta gap / 2) grad log pi]. From the
    second optimiser step on the constant part does not cancel: it is half the gradient of KL(old ||
    pi), a pull back to the policy that sampled. An episode without a skill has gap 0 when the step
    starts: a gate that does not depend on the token, and no teaching."""
    gap = teacher_logprobs.detach() - logprobs
    gate = GATES[kind](gap, entropy, beta).detach()  # the paper's sg[...]
    return {"sdar_loss": gate * gap, "gate": gate, "gate_active": gate > 0.5}


def skill_sd_loss(logprobs, teacher_logprobs, old):
    """Skill-SD (arXiv 2604.10674, a baseline of section 3): rho (exp(gap) - gap - 1), gap = teacher
    - student, rho = exp(student - old), not detached; all (N,).

    Within the clamps the gradient on a token is -rho gap grad log pi, that of the reverse KL's
    estimate: it can also push down, and without bound."""
    gap = teacher_logprobs.detach() - logprobs
    k3 = gap.clamp(max=20).exp() - gap - 1
    rho = (logprobs - old).clamp(max=10).exp()
    return {"sdar_loss": rho * k3}  # under this name objective finds the term that lambda weighs


def rlsd_advantages(advantages, gap, mix=0.5, clip_eps=0.2):
    """RLSD's advantages (a baseline of section 3): A ((1 - mix) + mix clip(exp(sign(A) gap),
    1 - eps, 1 + eps)), gap = teacher - old; all (N,).

    The reward keeps the direction; the teacher moves the size, with mix 0.5 from 0.9 A to 1.1 A."""
    weight = (advantages.sign() * gap).exp().clamp(1 - clip_eps, 1 + clip_eps)
    return advantages * (1 - mix + mix * weight)


# --- 6. Update (paper, section 2.4 and appendix B): L = L_GRPO + lambda L_SDAR -----------
#
# Four policies meet here. The one that sampled: its log-probs (old) are fixed for the step. The
# student: it starts the step as that policy and moves with every optimiser step. The teacher: it
# scores once, before the first optimiser step, so a live teacher has the weights of the start of
# the step, and a frozen one those of the start of the run. The start policy: the KL pulls to it.


def rewards_of(episodes, config):
    """Rewards less the penalties, (groups, G). Rows are groups, since the episodes of a group stand
    one after the other and none is dropped."""
    return torch.tensor(
        [episode.reward - config.invalid_penalty * episode.invalid for episode in episodes]
    ).view(-1, config.group_size)


DRIFT = {"float32": 1e-3, "bfloat16": 0.1}  # mean nats per token by which two passes may differ


def step_batch(model, start_policy, teacher, episodes, config, step, score=score):
    """All that the update compares the moving student with: {name: a value for each sampled token
    (N,)}, from before the step's first optimiser step.

    old: log-probs of the policy that sampled; ref: of the start policy, if the KL counts; teacher:
    of the teacher, who reads the skill, if the method has one; advantages."""
    # The sampler has log-probs, too. They are scored again, since the ratio must compare two
    # policies, not two ways of computing. It is also a check for faults that no curve shows: a
    # shift by one, a text that was tokenised again, another temperature. Weights that an earlier
    # step has made nan are refused here, too.
    old = score(model, episodes, config)
    sampled = sum([episode.logprobs for episode in episodes], [])
    drift = (old - old.new_tensor(sampled)).abs().mean()
    require(
        drift < DRIFT[config.dtype],
        f"ids sampled are not ids scored ({drift:.2g} nats apart); or --lr was too large",
    )
    batch = {"old": old}
    if config.kl_coef:
        batch["ref"] = score(start_policy, episodes, config)

    # One advantage for all tokens of an episode.
    advantages = group_advantages(rewards_of(episodes, config))
    lengths = torch.tensor([len(episode.logprobs) for episode in episodes])
    batch["advantages"] = advantages.flatten().repeat_interleave(lengths).to(old)
    if config.distil == "none":
        return batch

    # Where no skill fits the task there is no teacher: `old` stands in for it, so the gap begins at
    # 0, and nothing is taught: see sdar_loss.
    taught = torch.tensor([bool(episode.skill_ids) for episode in episodes])
    taught = taught.repeat_interleave(lengths).to(old.device)
    batch["teacher"] = torch.where(taught, score(teacher, episodes, config, with_skill=True), old)
    gap = batch["teacher"] - old
    if config.distil == "rlsd":
        mix = 0.5 * max(0, 1 - step / config.rlsd_decay)
        batch["advantages"] = rlsd_advantages(batch["advantages"], gap, mix)
    if config.retrieval == "ucb":  # the bank, which all share, learns what its skills were worth
        gaps = [of_episode.mean().item() for of_episode in gap.split(lengths.tolist())]
        gaps = in_parts(gaps, config.group_size)  # rows are groups
        episodes[0].env.bank.learn(episodes, advantages.tolist(), gaps)
    return batch


def objective(model, episodes, tokens, config):
    """L = L_GRPO + lambda L_SDAR (section 2.4) of some episodes: {"loss": (N,), and its terms}.

    tokens: step_batch's values of these episodes' tokens."""
    logprobs, entropy = response_logprobs(model, episodes, config)
    terms = policy_loss(logprobs, tokens["old"], tokens["advantages"], config.clip_eps)
    if config.kl_coef:
        terms["kl"] = kl_k3(logprobs, tokens["ref"])
    if config.distil == "gate":
        terms |= sdar_loss(logprobs, tokens["teacher"], entropy, config.gate, config.gate_beta)
    if config.distil == "skill_sd":
        terms |= skill_sd_loss(logprobs, tokens["teacher"], tokens["old"])

    terms["loss"] = (
        config.policy_coef * terms["policy_loss"]  # L_GRPO: the clipped policy loss,
        + config.kl_coef * terms.get("kl", 0.0)  # the pull to the start policy;
        + config.sdar_coef * terms.get("sdar_loss", 0.0)  # lambda L_SDAR, or Skill-SD's loss
    )
    terms["entropy"] = entropy
    if config.distil != "none":
        # For the log: teacher minus the policy that sampled. In sdar_loss it is teacher minus the
        # student of now.
        terms["gap"] = tokens["teacher"] - tokens["old"]
    return terms


def update(model, optimizer, episodes, batch, config, rng, objective=objective):
    """One pass over the shuffled episodes, in `minibatches` optimiser steps. Returns metrics: means
    over all tokens of the step, and of grad_norm over the optimiser steps.

    The first optimiser step is on policy: the student is the policy that sampled, every ratio is 1
    but for rounding, and PPO's clip does nothing. From the second one on it has moved. In the
    policy loss the ratio corrects for that, token by token, and the clip removes the reason to
    move far: a good token that is already 20 % likelier than when it was sampled is pushed no
    further by the reward."""
    lengths = [len(episode.logprobs) for episode in episodes]
    by_episode = {name: values.split(lengths) for name, values in batch.items()}
    metrics = defaultdict(float)

    # Episodes are drawn into mini-batches at random, not by group: an advantage already knows its
    # group.
    n = min(config.minibatches, len(episodes))
    for chosen in np.array_split(rng.permutation(len(episodes)), n):
        # A mini-batch makes one optimiser step; its micro-batches are what the memory allows. Each
        # divides by the tokens of the whole mini-batch: a mean of means would be another mean.
        total = sum(lengths[row] for row in chosen)
        # Only layers that checkpoint need training mode, and get it: so nothing is dropped out.
        for layer in model.modules():
            layer.training = getattr(layer, "gradient_checkpointing", False)
        for rows in in_parts(chosen, config.micro_batch):
            tokens = {}
            for name, values in by_episode.items():
                tokens[name] = torch.cat([values[row] for row in rows])
            terms = objective(model, [episodes[row] for row in rows], tokens, config)
            # A term has a value for each token; an experiment's may be one for all, a mean.
            terms = {name: values.expand_as(tokens["old"]) for name, values in terms.items()}
            (terms["loss"].sum() / total).backward()
            for name, values in terms.items():
                metrics[name] += values.float().sum().item() / len(batch["old"])
        model.eval()

        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        require(norm.isfinite(), "the gradient is not finite: lower --lr")
        metrics["grad_norm"] += norm.item() / n
        optimizer.step()
        optimizer.zero_grad()
    return metrics


# --- 7. Evaluation and the training loop (paper, section 3 and appendix B) ---------------
#
# Held-out tasks are played without the skill: that is what counts. They are played with it, too:
# that is how good a live teacher is, and if it is no better than the student there is nothing to
# learn from it.


def evaluate(model, chat, envs, config):
    """Play the panel, a fixed list of held-out tasks, without and with the skill in the prompt.

    Returns success, success_skill, episodes, by_type {task type: [episodes, won without, won with
    the skill]}, and valid, the share of answers without the skill that are valid."""
    # The panel, and the random numbers it is played with, are the same at every call, and for every
    # run: two runs differ only in their policies. (i alone would do; older logs stay comparable.)
    panel = envs[0].panel(config.eval_split, config.eval_episodes)
    starts = [(*start, (1, i - i % 64, i % 64)) for i, start in enumerate(panel)]
    play = partial(rollout, model, chat, envs, starts, config, config.eval_temperature)
    alone = play()
    skilled = play(with_skill=True)

    by_type = {}
    for (task, _), unaided, helped in zip(panel, alone, skilled):
        counts = by_type.setdefault(envs[0].label(task), [0, 0, 0])
        counts[0] += 1
        counts[1] += unaided.won
        counts[2] += helped.won
    n, won, won_skill = map(sum, zip(*by_type.values()))
    invalid, turns = np.sum([(episode.invalid, episode.turns) for episode in alone], 0).tolist()
    return {
        "success": won / n,
        "success_skill": won_skill / n,
        "episodes": n,
        "by_type": by_type,
        "valid": 1 - invalid / turns,
    }


def draw_starts(env, config, step, rng):
    """A step's starts (task, seed, numbers), group after group: each task that is drawn is played
    group_size times, from one state."""
    tasks = env.tasks("train")
    n = config.tasks_per_step
    starts = []
    for index in rng.choice(len(tasks), n, replace=len(tasks) < n):
        seed = int(rng.integers(1_000_000))
        for _ in range(config.group_size):
            starts.append((tasks[index], seed, (3, config.seed, step, len(starts))))
    return starts


def train(config, step_batch=step_batch, objective=objective, score=score, skill_bank=SkillBank):
    """A whole run. It writes only below config.out. Returns the last step's metrics; with steps=0
    what evaluate returns.

    A step: play, score, learn, look. On one CPU the same seed gives the same run, even if it was
    stopped and resumed: nothing is drawn from a generator that lives longer than a step.

    An experiment hands in its own step_batch, objective, score or skill bank, and leaves the rest
    as it is: train(configure(seed=1), objective=mine). --resume notices a changed setting, not
    changed code: write what you changed into the config. See .lab/experiments/variants.py."""
    envs = make_envs(config, skill_bank)
    env = envs[0]  # they all have the same tasks, and share one skill bank
    model, chat = load_policy(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    start_policy = deepcopy(model)  # before a checkpoint is loaded; the KL pulls to it
    teacher = start_policy if config.teacher == "frozen" else model
    room = getattr(model.config, "max_position_embeddings", 0)
    require(
        env.max_turns * config.max_new_tokens < room,
        f"--max-turns x --max-new-tokens do not fit the model's context of {room}",
    )

    done = load_checkpoint(config, model, optimizer, env.bank)
    if done == 0:
        began = perf_counter()
        metrics = evaluate(model, chat, envs, config)
        say_before(config, metrics, perf_counter() - began)
    for step in tqdm(range(done + 1, config.steps + 1), config.method):
        # Play: the tasks of this step, each by a group of episodes.
        clock = [perf_counter()]
        rng = np.random.default_rng([2, config.seed, step])  # 2: no episode's numbers begin so
        starts = draw_starts(env, config, step, rng)
        episodes = rollout(model, chat, envs, starts, config, config.temperature, config.skilled)

        # Score: the sampled tokens as the student and, with the skill, the teacher read them.
        clock.append(perf_counter())
        batch = step_batch(model, start_policy, teacher, episodes, config, step, score)

        # Learn: some optimiser steps on this one batch.
        clock.append(perf_counter())
        metrics = update(model, optimizer, episodes, batch, config, rng, objective)
        clock.append(perf_counter())

        # Look: the held-out panel, the log, a checkpoint.
        last = step == config.steps
        result = {}
        if last or (config.eval_every and step % config.eval_every == 0):
            result = evaluate(model, chat, envs, config)
        metrics = log_step(config, step, episodes, metrics, result, clock)
        if last or step % config.save_every == 0:
            save_checkpoint(config, model, chat, optimizer, env.bank, step)
    return metrics


# ============== PART II: AROUND THE RUN. The reader of the paper can stop here. ==============

# --- 8. Loading: settings, environments, a model -----------------------------------------
#
# Bad input ends here, in one line that names the thing and the fix, before anything is written.

TINY_FOLDER = HERE / ".assets/tiny-policy"
CHOICES = {
    "preset": PRESETS,
    "method": METHODS,
    "device": ("cpu", "cuda", "mps"),
    "dtype": DRIFT,
    "distil": ("gate", "skill_sd", "rlsd", "none"),
    "gate": GATES,
    "teacher": ("live", "frozen"),
    "retrieval": SkillBank.STRATEGIES,
}
POSITIVE = (  # all other numbers may be 0
    "lr temperature grad_clip minibatches micro_batch rollout_batch save_every tasks_per_step "
    "max_new_tokens rlsd_decay eval_episodes"
).split()


def flag(name):
    """A field of Config as it is typed."""
    return "--" + name.replace("_", "-")


def check_config(config):
    """Make every setting a value of its own type. UserError for one that no run could use, or for
    two that make no sense together."""
    for name, kind in Config.__annotations__.items():
        value = getattr(config, name)
        with naming(f"{flag(name)} {value!r}"):
            typed = kind(value)
            if kind is str:
                require(typed.isprintable(), "it holds a character that cannot be written")
                typed = os.path.expanduser(typed)
            else:
                least = 1e-9 if name in POSITIVE else 0
                require(
                    float(value) == typed and least <= typed <= 1e9,
                    f"must be {kind.__name__}, from {least:g} to 1e9",
                )
            choices = CHOICES.get(name, [typed])
            require(typed in choices, f"known are {', '.join(map(str, choices))}")
            setattr(config, name, typed)

    require(config.group_size > 1, "--group-size: at least 2, an advantage compares")
    require(config.lr <= 1, "--lr: at most 1, every weight moves by about so much a step")
    require(not (config.resume and config.overwrite), "--resume or --overwrite? not both")
    if config.distil == "none":
        require(config.retrieval != "ucb", "--retrieval ucb learns from a teacher: there is none")
    else:
        require(not config.skilled, "--skilled: the teacher would read what the student reads")
    require(
        config.policy_coef or (config.sdar_coef and config.distil in ("gate", "skill_sd")),
        "--policy-coef 0 and no distillation: nothing is learned",
    )
    require(
        getattr(torch, config.device).is_available(),
        f"--device: there is no {config.device.upper()} device here",
    )
    require(
        config.device == "cuda" or not config.kernel,
        "--kernel is for CUDA: it needs --device cuda",
    )


def make_envs(config, skill_bank=SkillBank):
    """As many environments as episodes are played at once, with one skill bank."""
    options = {"data": config.env_data, "url": config.search_url, "max_turns": config.max_turns}
    options = {name: value for name, value in options.items() if value}
    envs = [make_env(config.env, **options) for _ in range(config.rollout_batch)]
    if config.steps:
        envs[0].tasks("train")  # there are none? say so now
    envs[0].tasks(config.eval_split)
    skills = load_skills(config.skills) if config.skills else envs[0].skills
    require(
        skills or (config.distil == "none" and not config.skilled),
        f"{config.env} has no skills, so nobody knows more: --skills FILE, or grpo",
    )
    bank = skill_bank(skills, config.retrieval)
    for env in envs:
        env.bank = bank
    return envs


def load_policy(config):
    """The start policy (a causal language model) and its Chat. UserError if it is not usable.

    Weights are float32, whatever the files hold: small steps would be lost in bfloat16. --dtype
    chooses what forward passes compute in."""
    from transformers.utils import logging  # here, since it takes seconds

    # Attention on a card: cuDNN's makes a new plan for every new length, and so for every token.
    torch.backends.cuda.enable_cudnn_sdp(False)
    logging.set_verbosity_error()
    path = config.model
    if path == "tiny":
        path = str(TINY_FOLDER)
        torch.set_num_threads(1)  # a second one is no faster, and on busy cores much slower
        logging.disable_progress_bar()
    with naming(f"--model {path} cannot be used"):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        require(
            not Path(path, "adapter_config.json").exists(),
            "merge its LoRA adapter first, peft: merge_and_unload",
        )
        for file in Path(path).glob("*.[js]*"):
            require(
                file.stat().st_size >= 1000 or b"git-lfs" not in file.read_bytes(),
                f"{file.name} is a pointer of git-lfs, not the file: git lfs pull",
            )
        tokenizer = AutoTokenizer.from_pretrained(path)
        require(tokenizer.tokenize("go"), "copy the tokenizer's files into it, too")
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
        missing = report["missing_keys"]  # the library would draw them at random
        require(not missing, f"its files lack the tensor {min(missing, default='')}")
        ids = max(tokenizer.get_vocab().values())
        rows = len(model.get_input_embeddings().weight)
        require(ids < rows, f"its tokenizer has {ids + 1} ids, its embedding only {rows} rows")
        chat = Chat(tokenizer, model.generation_config.eos_token_id)
        model.generation_config.do_sample = True  # else some are not saved: transformers 5.17

    if config.gradient_checkpointing:
        renamed = getattr(model, "activation_checkpointing_enable", None)  # in transformers 5.24
        enable = renamed or model.gradient_checkpointing_enable
        enable()
    tqdm.write(f"{path}: {model.num_parameters():,} parameters, {config.dtype} on {config.device}")
    return model.to(config.device), chat


@lru_cache
def load_kernel(dtype):
    """The CUDA kernel for logits of a dtype, or None where it cannot be compiled."""
    sys.path.append(str(HERE / ".lab/kernel"))
    with naming("--kernel comes with the repository, in its folder .lab"):
        from kernel import row_logprobs

        return row_logprobs(dtype)


# --- 9. Chat: texts become ids, in a chat template's frames ------------------------------
#
# Models differ in what stands around a message: Qwen opens one with "<|im_start|>user\n" and closes
# it with "<|im_end|>\n". Chat finds such frames by rendering a conversation of marks.


class Chat:
    """Turns texts into the ids of one growing conversation, in the chat template's own frames.

    Ids are only ever appended. Rendering the conversation again each turn would not do: Qwen3's
    template drops earlier reasoning, and text that is tokenised again may give other ids than the
    policy sampled. So the template is rendered once, around marks, and its frames are kept."""

    def __init__(self, tokenizer, eos=None):
        """eos: the checkpoint's own ends of a generation, an id or several."""
        self.tokenizer = tokenizer
        self.encode = lru_cache(256)(self._encode)  # environments repeat themselves
        # Plain: no hints, examples or tags. So for the tiny policy, and after warmstart.py --plain.
        self.plain = tokenizer.init_kwargs.get("plain", False)
        roles = "system user assistant user assistant user".split()
        # Marks hold < and, inside, a line break: a template that escapes or rewraps is found out.
        marks = "<RULES>\nx <FIRST>\nx <SAID>\nx <NEXT>\nx <SAID>\nx <NEXT>\nx".split(" ")
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks)]
        rendered = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
            date_string="26 Jul 2024",  # else Llama 3.2 reads another prompt every day
        )
        parts = re.split(f"({'|'.join(marks)})", rendered)  # frame, mark, frame, mark, ..., frame
        kept = parts[1::2]
        require(
            kept == marks or (self.plain and kept == marks[1:]),  # tiny has no system message
            "its chat template moves, repeats or drops a message, or changes its text",
        )

        # The frames, in order. `begin`: before the system message, before the first observation.
        # `after`: from an observation to its answer. `between`: from an answer to the next
        # observation, in Qwen2.5 "<|im_end|>\n<|im_start|>user\n"; `after` is the same with
        # assistant. The policy answers behind the last `after`, the generation prompt.
        frames = tokenizer(parts[::2], add_special_tokens=False)["input_ids"]
        *self._begin, after, self._between, after_2, between_2, self._after = frames
        # That may be longer than the others (Qwen3: an empty thought) or shorter (GLM: no line
        # break). The longer is taken, and the shorter must be its beginning.
        short, self._after = sorted((after, self._after))  # a prefix sorts before the whole list
        require(
            (after, self._between, self._after[: len(short)]) == (after_2, between_2, short),
            "its chat template frames a second turn otherwise, or its generation prompt",
        )

        # A response is finished by the template's end of turn, or by another end of the checkpoint.
        self.end_id = self._between[0]
        self.end_ids = {self.end_id, tokenizer.eos_token_id, *np.ravel(eos).tolist()}
        self._added = tokenizer.get_added_vocab()  # {text: id}, special or not
        require(
            self.end_id in self._added.values(),
            "its chat template closes a turn with no control token",
        )

    def _encode(self, text):
        """Ids of a text from outside. Whatever it contains, none of them is a control token."""
        text = text.encode(errors="replace").decode()  # half a character becomes a ?

        # The tokenizer can be told not to see special tokens. But Qwen3's <think> is added and not
        # special: each added token in the text is cut after its first character.
        for token in filter(str.strip, self._added):  # Gemma's has runs of line breaks
            text = text.replace(token, f"{token[0]}\0{token[1:]}")
        parts = self.tokenizer(
            text.split("\0"), add_special_tokens=False, split_special_tokens=True
        )
        return sum(parts["input_ids"], [])

    def first(self, env, prompt):
        """Ids of the first prompt, and where in it the skill goes: before the first observation.
        The environment's examples stand before it, as turns of this conversation. A plain policy
        reads at most a line of instructions, no examples, and answers with the bare action.
        """
        instructions = env.instructions.strip()
        examples = env.examples
        if self.plain:
            instructions = instructions.split("\n")[0]
            examples = ()
        ids = list(self._begin[0])
        for frame in self._begin[1:]:  # one, or none where there is no system message
            ids += self.encode(instructions) + frame
        for seen, said in examples:
            ids += self.encode(seen) + self._after + self.encode(said) + self._between
        return ids + self.encode(prompt) + self._after, len(ids)

    def next(self, prompt, last_id):
        """Ids between two responses. The response before may already end with an end of turn."""
        frame = self._between[1:] if last_id == self.end_id else self._between
        return frame + self.encode(prompt) + self._after


# --- 10. The run's folder: metrics.jsonl, state.pt, checkpoint/ ---------------------------
#
# A run that is killed at any moment goes on with --resume. On one CPU, with the same flags, its
# metrics, the seconds apart, are then those of a run that was never killed. Two things make that
# possible: every random number of a step comes from (seed, step), and state.pt, which holds all
# that a run is, is replaced as a whole.

MAY_DIFFER = (  # between a run and its continuation
    "steps out search_url resume overwrite save_every eval_every device micro_batch rollout_batch "
    "gradient_checkpointing kernel"
).split()


def load_checkpoint(config, model, optimizer, bank):
    """Steps that are done: 0, or with --resume those of the run's last state, which goes into
    model, optimizer, bank and log. Later steps are played again. UserError if the folder holds
    something that must not be overwritten."""
    if not (config.steps or config.resume):
        return 0
    folder = Path(config.out)
    log = folder / "metrics.jsonl"
    path = folder / "state.pt"
    folder.mkdir(parents=True, exist_ok=True)
    require(
        Path(config.model).resolve() != (folder / "checkpoint").resolve(),
        "--out would overwrite --model: take another folder",
    )
    require(
        ((config.resume or config.overwrite) and log.exists()) or not any(folder.iterdir()),
        f"--out {folder} is not empty: --resume or --overwrite the run in it",
    )
    if not (config.resume and path.exists()):
        return 0

    with naming(f"--resume: {path}"):
        state = torch.load(path, map_location="cpu")  # what belongs on a card is copied there below
        step = state["step"]
        require(step < config.steps, f"all of its {step} steps are done, raise --steps")
        for name in vars(config) | state["config"]:  # an experiment may have written more into it
            value = vars(config).get(name)
            was = state["config"].get(name)
            require(
                name in MAY_DIFFER
                or os.path.realpath(f"{value}") == os.path.realpath(f"{was}"),  # as paths
                f"{flag(name)} was {was!r}, now it is {value!r}",
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        bank.arms = state["arms"]
        log.write_text(state["log"], "utf-8")
        return step


def save_checkpoint(config, model, chat, optimizer, bank, step):
    """state.pt, to resume from: it takes the old one's place when it is whole. Beside it
    checkpoint/, a model folder like any other, and config.json."""
    folder = Path(config.out)
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "config": vars(config),
        "arms": bank.arms,
        "log": (folder / "metrics.jsonl").read_text("utf-8"),
    }
    with naming(f"--out {folder}"):  # each library has its own error for a full disk
        model.save_pretrained(folder / "checkpoint")
        chat.tokenizer.save_pretrained(folder / "checkpoint")
        (folder / "config.json").write_text(json.dumps(vars(config), indent=1))
        torch.save(state, folder / "state.new")  # last: a run killed before this writes all again
        (folder / "state.new").replace(folder / "state.pt")


def log_step(config, step, episodes, metrics, result, clock):
    """Append a line to metrics.jsonl. Returns it.

    result: what evaluate returned, if it was called. clock: seconds at the start, and after
    rollout, scoring and update. Rates and means are over all episodes, turns or tokens of the step;
    response_tokens is an episode's, of all its turns.
    flat_groups is the share of groups whose episodes all have the same reward, less penalties:
    there every advantage is 0, and GRPO learns nothing."""
    rows = [(e.won, e.reward, e.turns, e.invalid, len(e.logprobs)) for e in episodes]
    success, reward, turns, invalid, tokens = np.mean(rows, 0).tolist()
    rewards = rewards_of(episodes, config)
    seconds = np.diff(clock).tolist()
    line = {
        "step": step,
        **metrics,  # an experiment's term takes no name of what follows; none may be called step
        "success": success,
        "reward": reward,
        "turns": turns,
        "invalid_rate": invalid / turns,
        "response_tokens": tokens,
        "flat_groups": (rewards.amax(1) == rewards.amin(1)).float().mean().item(),
        "seconds_rollout": seconds[0],
        "seconds_score": seconds[1],
        "seconds_update": seconds[2],
        "tokens_per_second": tokens * len(rows) / sum(seconds),
        **{f"eval_{name}": value for name, value in result.items()},
    }
    folder = Path(config.out)
    if step == 1:  # nothing of a run that is replaced may be resumed, or taken for this one's
        for old in ("state.pt", "config.json"):
            (folder / old).unlink(missing_ok=True)
    with open(folder / "metrics.jsonl", "w" if step == 1 else "a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")
    if result:
        say_success(f"step {step}", result)
    return line


def wilson(wins, n, z=1.96):
    """95 % Wilson score interval of a proportion: (low, high). Unlike mean +- 2 standard errors it
    is right near 0 and 1, where a trained policy ends (Wilson, JASA 22, 1927)."""
    total = n + z * z
    middle = (wins + z * z / 2) / total
    half = z / total * sqrt(wins * (n - wins) / n + z * z / 4)
    return max(0.0, middle - half), middle + half


def say_success(title, result):
    """Print what evaluate returned, with 95 % intervals."""
    n = result["episodes"]
    for name, reader in (("success", "alone"), ("success_skill", "with the skill")):
        low, high = wilson(result[name] * n, n)
        tqdm.write(f"{title}, {reader}: won {result[name]:.1%} of {n} [{low:.0%}, {high:.0%}]")


def say_before(config, result, seconds):
    """Say what the evaluation before training, which took so many seconds, tells of the run."""
    say_success("before", result)
    alone = result["success"]
    valid = result["valid"]
    an_episode = seconds / result["episodes"] / 2
    hours = an_episode * config.steps * config.tasks_per_step * config.group_size / 3600
    tqdm.write(
        f"{valid:.0%} of the answers are valid; {an_episode:.2g} s an episode, some {hours:.2g} "
        f"hours to play {config.steps} steps, and up to four times that to learn"
    )
    taught = config.distil != "none"
    helps = result["success_skill"] > alone and (taught or config.skilled)
    if valid < 0.5:
        tqdm.write(
            "Warning: most answers are not valid; .lab/warmstart.py teaches the toy's format"
        )
    if taught and not helps:
        tqdm.write("Warning: the skill does not help: nobody knows better; take other --skills")
    if alone in (0, 1) and not helps:
        tqdm.write("Warning: all episodes end alike; take other tasks, or more --max-turns")


# --- 11. Command line --------------------------------------------------------------------
#
# A field of Config is a flag: --group-size 4 sets group_size. Its help is the comment beside it.

SYMBOLS = {  # of the paper, which are flags, too
    "sdar_coef": "--lambda",
    "gate_beta": "--beta",
    "clip_eps": "--epsilon",
    "group_size": "--G",
}
INSTRUMENTS = """instruments, each with its own --help:
  python .lab/microscope.py          look at a group of episodes, token by token
  python .lab/compare.py             train several methods or settings over seeds: a table
  python .lab/plots.py               draw the curves of runs
  python .lab/bench.py               where the time of a step goes
  python .lab/memory.py              does a model fit the card? bytes, by arithmetic
  python .lab/probe.py               what a policy would answer first, place by place
  python .lab/warmstart.py           build the tiny policy again, or teach a model the toy's format
  python .lab/player.py              play an environment yourself
  python .lab/search_server.py       a small search server
  python .lab/convert.py             questions and skills of other formats
  python .lab/experiments/variants.py    train with what the paper does not have
  python .lab/trl/trainer.py         the same method on TRL, for several cards
  python .lab/course/exercise.py     the course: functions to write again, bugs to find"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message):
        raise UserError(message)


def make_parser(usage="python sdar.py [flags]", **more):
    """A parser of Config's fields. What is not typed is not in its result: a preset fills it in."""
    parser = Parser(
        usage=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        **more,
    )
    help = dict(re.findall(r"(\w+): \w+ = .*?  # (.*)", inspect.getsource(Config)))
    for name, kind in Config.__annotations__.items():
        # A switch is --resume or --no-resume.
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"metavar": "VALUE"}
        parser.add_argument(
            flag(name),
            *SYMBOLS.get(name, "").split(),
            dest=name,
            help=f"{help[name]} [{getattr(Config, name)}]",
            **how,
        )
    return parser


def run(command, *arguments):
    """Call a function, and turn what it raises into an exit code: 0; 2 bad input (one line on
    stderr, no traceback); 130 Ctrl-C. Whatever else goes wrong is a fault of ours or of a library,
    and shows its traceback."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has none
        sys.stdout.reconfigure(errors="backslashreplace")
    code = 2
    try:
        return command(*arguments) or 0
    except (UserError, OSError) as error:
        message = error
    except RuntimeError as error:
        # These words of a CPU, MPS, a card and its libraries: memory ran out. All else is a fault.
        if not re.search("allocate|out of memory|ALLOC_FAILED|Invalid buffer size", str(error)):
            raise
        message = (
            "out of memory: where it learns, --gradient-checkpointing, then a lower --micro-batch; "
            "where it plays, a lower --rollout-batch, then a lower --max-new-tokens; "
            "or a smaller --model"
        )
    except KeyboardInterrupt:
        message = "stopped; a run that trains goes on with --resume"
        code = 130
    print(f"{Path(sys.argv[0]).name}:", *str(message).splitlines(), file=sys.stderr)
    return code


def main(argv):
    """Train as a command line says. Returns the exit code."""

    def command():
        config = configure(**vars(make_parser(epilog=INSTRUMENTS).parse_args(argv)))
        train(config)
        if config.steps:
            print(f"What was learned: python .lab/microscope.py --run {config.out}")

    return run(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
