"""SDAR: Self-Distilled Agentic Reinforcement Learning (arXiv 2605.15155), to read beside the paper.

An agent plays text games over several turns and is rewarded only at the end. GRPO turns that one
number into an advantage for every token of the episode. SDAR adds a dense signal: a teacher, which
is the same network shown the same conversation plus a skill text that the student never sees,
scores every token that the student sampled. A gate decides how far the teacher is trusted on that
token. At test time there is no skill: what it said has been learned.

    python sdar.py                            # the carried tiny policy, a toy household, a CPU
    python sdar.py --model Qwen/Qwen3-0.6B    # a checkpoint from the hub, through the same code
    python sdar.py --help                     # commands and flags

First reading, 20 minutes: Episode.view, rollout, response_logprobs, gate, sdar_loss, objective,
train. Then top to bottom: the order of the file is the order of the algorithm.

    the paper's              is called               and stands in
    s_t, the student's view  Episode.ids             Episode.view(with_skill=False)
    s_t+, with the skill c+  Episode.skill_ids       Episode.view(with_skill=True)
    y_t, a sampled token     Episode.mask == 1       take_turn, record_turn
    pi_theta, the student    model                   rollout, update
    pi_T, the teacher        model, or a copy of it  train, score(with_skill=True)
    log pi                   logprobs                response_logprobs
    A, G                     advantages, group_size  group_advantages
    epsilon                  clip_eps                policy_loss
    L_GRPO                   policy_loss, kl_k3      objective
    Delta_t, the gap         gap                     teacher's minus student's log-prob
    g_t, beta                gate, gate_beta         gate
    L_SDAR, lambda           sdar_loss, sdar_coef    objective

Where this is not the paper's published run: an episode is one growing conversation, as in the
paper's section 2.1 (the official code makes a row of every turn); the defaults are the toy's, and
PRESETS has the paper's beside them; UCB retrieval, which the paper only names, is ours.

Axes: B episodes, T sampled tokens of an episode (padded), S tokens of its whole sequence (padded),
V vocabulary, H width of the model, N rows of any kind, G episodes of a group.
"""

import argparse
import copy
import difflib
import hashlib
import importlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import gettempdir
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from envs import (
    Bandit,
    EnvUnavailable,
    UserError,
    as_typed,
    call_all,
    load_skills,
    make_env,
    naming,
    require,
    retrieve,
    skill_text,
    tolerant_output,
    unknown,
)

# =================================== PART I: THE PAPER ===================================

# --- 1. Configuration (paper, section 4.1 and appendix C) --------------------------------
#
# The defaults are the toy's: a network of 309 thousand parameters that learns in a minute on a CPU.
# PRESETS has the values of the published run beside them. A method is a row of the paper's table:
# which losses it has, where the teacher's log-probs go, and who reads the skill.


class Method(NamedTuple):
    """A row of the paper's Table 1."""

    policy_weight: float = 1  # of GRPO's policy loss
    # Where the teacher's log-probs go: into the loss "gate" or "skill_sd", into the "advantage", or
    # nowhere.
    teacher: str = ""
    skilled: bool = False  # the student itself reads the skill while it trains


METHODS = {
    "grpo": Method(),
    "opsd": Method(policy_weight=0, teacher="gate"),  # the official baseline keeps the gate
    "grpo_opsd": Method(teacher="gate"),  # as sdar, but beta is 0: see METHOD_SETTINGS
    "skill_grpo": Method(skilled=True),
    "skill_sd": Method(teacher="skill_sd"),
    "rlsd": Method(teacher="advantage"),
    "sdar": Method(teacher="gate"),
}
BATCH_GATES = ("constant", "shuffled", "centred")  # controls that look at the whole batch
GATES = ("gap", "entropy", "soft_or", "none", "reverse_kl", *BATCH_GATES)

PRESETS = {
    "toy": {},  # Config's own defaults, for the tiny policy
    "paper": {  # the published run, for any other model
        "steps": 150,
        "dtype": "bfloat16",
        "micro_tokens": 16384,
        "tasks_per_step": 16,
        "max_new_tokens": 512,
        "lr": 1e-6,
        "entropy_coef": 0.001,
        "turn_weights": True,
        "sdar_coef": 0.01,
        "rlsd_decay": 100,
        "eval_every": 5,
        "eval_episodes": 128,
    },
    "small": {  # a language model of 0.1 to 3 billion parameters on the toy, on one card
        "dtype": "bfloat16",
        "micro_tokens": 16384,
        "max_new_tokens": 64,
        "lr": 5e-6,
        "sdar_coef": 0.1,
        "teacher": "frozen",
        "eval_episodes": 60,
    },
}
METHOD_SETTINGS = {  # what a method changes in a preset; the toy's were chosen on `dev`
    ("toy", "grpo"): {"lr": 1e-3},
    ("toy", "opsd"): {"lr": 3e-4},
    ("toy", "skill_sd"): {"sdar_coef": 0.1},
    ("paper", "skill_sd"): {"sdar_coef": 0.001},
    ("toy", "grpo_opsd"): {"gate_beta": 0.0},  # a gate of 1/2 on every token
    ("paper", "grpo_opsd"): {"gate_beta": 0.0},
}


CHOICES = {
    "preset": PRESETS,
    "method": METHODS,
    "device": ("cpu", "cuda"),
    "dtype": ("float32", "bfloat16"),
    "gate": GATES,
    "distil": ("loss", "advantage"),
    "divergence": ("sampled", "reverse", "forward", "jsd"),
    "teacher": ("live", "lagged", "frozen", "ema"),
    "retrieval": ("keyword", "ucb", "full", "random", "wrong", "none"),
}


@dataclass(init=False)
class Config:
    """One run. Every field is a flag, its comment the flag's help. What is given by hand wins over
    the method's own settings, these over the preset's, and these over the defaults."""

    # what is run
    env: str = "toy"  # toy, alfworld, webshop, search, or an environment of your own, module:Class
    env_data: str = ""  # the environment's games, checkout or questions; the toy has none
    skill_bank: str = ""  # skills in a file, ours or official (skill_mapping.json); empty: built in
    search_url: str = ""  # retrieval server of search; empty: on this machine, port 8000
    model: str = "tiny"  # tiny (carried along), a name on the hub, or a checkpoint's folder
    preset: str = ""  # toy, paper or small; empty: toy for the tiny model, paper for others
    method: str = "sdar"  # grpo, opsd, grpo_opsd, skill_grpo, skill_sd, rlsd, sdar: Table 1's rows
    seed: int = 0  # of tasks, sampling and order; never of the evaluation panel
    steps: int = 60  # training steps, each one batch of episodes; paper: 150
    out: str = ""  # folder of the run; empty: runs/<env>-<method>-s<seed>
    anyway: bool = False  # train even if the first evaluation says that nothing will be learned
    resume: bool = False  # go on with the run in --out from its checkpoint
    overwrite: bool = False  # replace the run in --out
    save_every: int = 10  # steps between checkpoints

    # the machine: what changes memory and speed, and results by rounding alone
    device: str = ""  # cpu or cuda; empty: cuda if there is one, for any model but tiny
    dtype: str = "float32"  # of forward passes: float32 or bfloat16; paper: bfloat16
    micro_tokens: int = 8192  # padded tokens in one training pass; paper: 16384
    rollout_batch: int = 64  # episodes played at once
    gradient_checkpointing: bool = False  # compute activations again instead of keeping them
    kernel: bool = False  # CUDA kernel for log-probs, compiled at first use

    # rollouts
    tasks_per_step: int = 8  # tasks a step, each of which makes one group; paper: 16
    group_size: int = 8  # G, episodes of one task from the same initial state
    temperature: float = 1.0  # of sampling, and therefore of every log-prob
    max_turns: int = 0  # turns an episode; 0: the environment's own, of the toy 10
    max_new_tokens: int = 8  # tokens a response; paper: 512
    max_obs_tokens: int = 512  # tokens an observation, its admissible actions not counted

    # GRPO, the backbone
    lr: float = 6e-4  # learning rate of AdamW, constant; paper: 1e-06
    minibatches: int = 4  # optimiser steps a batch
    clip_eps: float = 0.2  # epsilon, PPO's clip of the ratio
    dual_clip: float = 3.0  # cap on a bad action's loss, in advantages; 0: off (official code)
    kl_coef: float = 0.01  # weight of the k3 KL to the frozen start policy
    entropy_coef: float = 0.0  # entropy bonus, of the official code alone; paper: 0.001
    invalid_penalty: float = 0.01  # taken off the score per invalid action, in rewards
    turn_weights: bool = False  # an episode counts once a turn in its group; paper: True
    normalize_std: bool = True  # divide advantages by the group's standard deviation
    grad_clip: float = 1.0  # largest norm of the gradient

    # SDAR
    sdar_coef: float = 1.0  # lambda, weight of the distillation loss; paper: 0.01
    gate: str = "gap"  # gap, entropy, soft_or, none; reverse_kl, constant, shuffled, centred
    gate_beta: float = 5.0  # beta, the sharpness of the gate
    distil: str = "loss"  # gate or gap: in a loss of its own, or in PPO's clipped advantage
    divergence: str = "sampled"  # sampled: of the sampled token; reverse, forward, jsd: of all
    teacher: str = "live"  # weights that read the skill: live, lagged, frozen (the start's) or ema
    teacher_refresh: int = 10  # steps between copies of the lagged teacher; ema: its horizon
    retrieval: str = "keyword"  # keyword, ucb, full, random, none; control: wrong
    skill_accuracy: float = 1.0  # share of groups with these skills; the others' are wrong ones
    rlsd_decay: int = 40  # steps until RLSD's teacher has lost its share; paper: 100

    # evaluation
    eval_every: int = 10  # steps between evaluations; 0: before and after only; paper: 5
    eval_episodes: int = 300  # episodes of the fixed panel; all: each task once; paper: 128
    eval_temperature: float = 0.4  # of sampling in evaluation
    eval_split: str = "eval"  # held-out tasks: dev to choose settings, eval to report

    def __init__(self, **given):
        tiny = given.get("model", "tiny") == "tiny"
        preset = given.get("preset") or ("toy" if tiny else "paper")
        own = METHOD_SETTINGS.get((preset, given.get("method", "sdar")), {})
        settings = PRESETS.get(preset, {}) | own | given | {"preset": preset}
        for f in fields(self):
            setattr(self, f.name, settings.pop(f.name, f.default))
        if settings:
            raise TypeError(f"Config has no field {', '.join(settings)}")

        self.out = self.out or f"runs/{self.env.split(':')[-1]}-{self.method}-s{self.seed}"
        on_card = torch.cuda.is_available() and not tiny
        self.device = self.device or ("cuda" if on_card else "cpu")
        check_config(self)


# --- 2. Conversation: token in, token out (paper, section 2.1) ---------------------------
#
# An episode is one growing list of ids: system message, task and first observation, then response,
# observation, response ... What the policy sampled is kept as ids and never turned into text and
# back, so what is scored later is what was sampled, id by id. The mask remembers which ids these
# are. The teacher reads the same list with the skill's ids put in at one place.


class Chat:
    """Turns texts into the ids of one growing conversation, in the chat template's own frames.

    Ids are only ever appended. Rendering the conversation again each turn would not do: Qwen3's
    template drops earlier reasoning, and text that is tokenised again may give other ids than the
    policy sampled. So the template is rendered once, around marks, and its frames are kept.
    """

    def __init__(self, tokenizer, eos=None):
        """eos: the checkpoint's own ends of a generation, an id or several."""
        self.tokenizer = tokenizer
        self.whole_words = bool(tokenizer.init_kwargs.get("whole_words"))  # the tiny policy's
        self.encode = lru_cache(maxsize=256)(self._encode)  # environments repeat themselves

        # Three turns, each text a mark; what stands between two marks is a frame.
        roles = "system user assistant user assistant user".split()
        marks = "SYSTEMTEXT FIRSTTEXT ANSWERTEXT NEXTTEXT ANSWERTEXT NEXTTEXT".split()
        messages = [{"role": role, "content": f" {mark} "} for role, mark in zip(roles, marks)]
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        parts = re.split(f"( ?(?:{'|'.join(marks)}) ?)", rendered)
        frames, texts = parts[::2], parts[1::2]
        found = [text.strip() for text in texts]
        require(found in (marks, marks[1:]), "its chat template moves, repeats or drops a message")
        kept = [f" {mark} " for mark in found] == texts
        require(kept, "its chat template strips the blanks around a message")
        self.takes_instructions = found == marks  # else it has no place for a system message
        *before_first, answer, between, answer_again, between_again, after = frames
        alike = (answer, between) == (answer_again, between_again) and after.startswith(answer)
        require(alike, "its chat template frames a second turn otherwise than the first")
        self._before_first = [self._tokenize(part) for part in before_first]
        self._between = self._tokenize(between)  # end of a response, start of the user's message
        self._after = self._tokenize(after)  # end of the user's message, start of a response

        # A response is finished by the template's end of turn, or by another end of the checkpoint.
        self.end_id = self._between[0]
        ends = {self.end_id, tokenizer.eos_token_id, *np.ravel(eos).tolist()}
        self.stop_ids = sorted(ends - {None})

        # What a text from outside must never become: an added token, special or not.
        added = tokenizer.get_added_vocab()  # {text: id}
        if self.end_id not in added.values():
            raise ValueError("its chat template closes a turn with no control token")
        self._control = set(added.values()) - ({tokenizer.unk_token_id} - set(self.stop_ids))
        any_added = "|".join(map(re.escape, added))
        self._after_first_character = re.compile(f"(?s)(?<=(?={any_added}).)")

    def _tokenize(self, text, **options):
        return self.tokenizer(text, add_special_tokens=False, **options)["input_ids"]

    def _encode(self, text):
        """Ids of a text from outside. Whatever it contains, none of them is a control token."""
        text = text.encode(errors="replace").decode()  # a lone surrogate becomes a ?

        # What looks like an added token (Qwen3's <think> is one, and not even marked special) is
        # cut after its first character. What a normaliser makes look like one is left out.
        pieces = self._after_first_character.split(text)
        parts = self._tokenize(pieces, split_special_tokens=True)
        return [id for ids in parts for id in ids if id not in self._control]

    def first(self, instructions, observation, examples=()):
        """Ids of the first prompt, and where in it the skill goes: before the first observation.
        examples: (observation, response) pairs, turns that stand before it as if they had been."""
        head = list(self._before_first[0])
        if self.takes_instructions:
            head += self.encode(instructions) + self._before_first[1]
        for seen, said in examples:
            head += self.encode(seen) + self._after + self.encode(said) + self._between
        return head + self.encode(observation) + self._after, len(head)

    def next(self, observation, ended):
        """Ids between two responses. ended: the first one sampled its own end of turn."""
        frame = self._between[1:] if ended else self._between
        return frame + self.encode(observation) + self._after


@dataclass
class Episode:
    """One conversation and what became of it."""

    task: str
    task_type: str
    group: int  # episodes of one group play the same task from the same state
    ids: list  # the whole conversation
    mask: list  # 1 exactly on the ids that the policy sampled, its ends of turn among them
    skill_at: int  # where in ids the skill would stand
    skills: list  # what the teacher reads there and the student does not
    skill_ids: list  # its ids; empty where no skill fits the task
    logprobs: list = field(default_factory=list)  # the sampler's, of the sampled ids
    transcript: list = field(default_factory=list)  # observation, response, observation, ...
    turns: int = 0
    invalid: int = 0  # turns whose action was invalid
    reward: float = 0.0  # raw: 0 or 1
    won: bool = False
    overflowed: bool = False  # ended because the model's context was full

    def add(self, ids, sampled):
        """Append ids to the conversation. sampled: 1 if the policy chose them, else 0."""
        self.ids += ids
        self.mask += [sampled] * len(ids)

    def view(self, with_skill):
        """(ids, mask) as the student or, with the skill spliced in, the teacher reads them.

        student   <user> Your task: heat a mug. <assistant> go to microwave 2 <end> <user> ...
        teacher   <user> SKILL Your task: heat a mug. <assistant> go to microwave 2 <end> <user> ...
        mask                                                1  1  1         1  1
        """
        skill = self.skill_ids if with_skill else []
        ids = self.ids[: self.skill_at] + skill + self.ids[self.skill_at :]
        mask = self.mask[: self.skill_at] + [0] * len(skill) + self.mask[self.skill_at :]
        return ids, mask


# --- 3. Rollout (paper, section 2.1 and appendix B) --------------------------------------
#
# Many episodes are played in lockstep: all answer, all environments reply, all answer again. Those
# that have ended leave the batch. Between turns the model keeps what it has read in a KV cache.
#
#     turn 1   fed: p p p p p            sampled: a b <end>
#              fed: . . p p p            sampled: a <end>        . a hole: padding, on the left
#     turn 2   fed: <end> o o o          sampled: ...            o the next observation
#              fed: . <end> o o          (the last sampled id is fed with what follows it)


LATE = {"delay": 2, "leave": False}  # a bar for what takes more than two seconds, gone afterwards


def padded(rows, device="cpu", side="right"):
    """Lists of numbers as one tensor (rows, longest), filled up with 0 on one side."""
    tensors = [torch.tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_side=side).to(device)


def forward_dtype(model, config):
    """Context of every forward pass: bfloat16 computes in it, on weights that stay float32."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")


@lru_cache
def cache_class():
    """The library's growing KV cache, its keys in the dtype of the values: under autocast rotary
    embeddings leave them in float32, at twice the memory."""
    from transformers import DynamicCache  # imported here, since it takes seconds

    class ValuesDtypeCache(DynamicCache):
        def update(self, key_states, value_states, *more, **named):
            return super().update(key_states.to(value_states.dtype), value_states, *more, **named)

    return ValuesDtypeCache


class Sampler:
    """Samples responses to a batch of conversations, and keeps their KV cache between turns.

    The library's generate() would do for one turn. It does not keep the cache of a batch whose rows
    go on at different lengths, and its draws depend on the rest of the batch.

    A turn feeds only what is new. News differ in length, so a block of columns is padded on the
    left, and a row that has finished its response is fed on until the slowest one has. Both leave
    holes in the cache. The mask hides them and positions skip them: log-probs are those of an
    unpadded pass over the conversation.
    """

    def __init__(self, model, temperature):
        self.model = model
        self.temperature = temperature  # 0: greedy
        self.cache = cache_class()(config=model.config)
        names = inspect.signature(model.forward).parameters  # transformers 5.24 renamed one
        self.cache_name = "cache" if "cache" in names else "past_key_values"
        self.real = None  # (B, columns of the cache) 1: a token, 0: a hole
        self.logits = None  # (B, V) after each row's newest token

    def feed(self, ids, new):
        """Append a block of columns: ids (B, n), new (B, n) 1 where real."""
        if self.real is None:
            self.real = new[:, :0]
        known = self.real.shape[1]
        positions = self.real.sum(1, keepdim=True) + new.cumsum(1) - 1
        self.real = torch.cat([self.real, new], 1)

        # A column sees those up to its own that are no holes. Building the mask here is cheaper
        # than the library's, which waits for the GPU.
        causal = torch.ones(new.shape[1], known + new.shape[1], device=ids.device).tril(known)
        mask = causal.bool() & self.real[:, None].bool()  # (B, n, columns)
        output = self.model(
            input_ids=ids,
            attention_mask=mask[:, None],
            position_ids=positions.clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: self.cache},
        )
        self.logits = output.logits[:, -1].float()

    def feed_rows(self, rows):
        """Append to each conversation its list of new ids."""
        new = [[1] * len(row) for row in rows]
        device = self.model.device
        self.feed(padded(rows, device, side="left"), padded(new, device, side="left"))

    def draw(self, uniform):
        """An id for each row and its log-prob, both (B,), from uniform (B, 1) in [0, 1).

        By inverting the row's own cumulative distribution: what a row draws cannot depend on its
        neighbours, as it would with one generator for the batch."""
        logprobs = torch.log_softmax(self.logits / (self.temperature or 1.0), -1)  # (B, V)
        if self.temperature:
            cdf = logprobs.exp().cumsum(-1)
            chosen = torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True)
            chosen = chosen.clamp(max=cdf.shape[1] - 1)
        else:
            chosen = logprobs.argmax(-1, keepdim=True)
        return chosen[:, 0], logprobs.gather(1, chosen)[:, 0]

    def respond(self, uniforms, stop_ids, stop_text=None):
        """Sample a response to each conversation: [(ids, log-probs)], lists.

        A response ends with a stop id, where stop_text(ids, None) says so, or with the columns of
        uniforms (B, max_new_tokens). Its last id is fed only with what comes after it."""
        stop_ids = torch.tensor(stop_ids, device=uniforms.device)
        running = torch.ones_like(uniforms[:, 0], dtype=torch.bool)
        ids, logprobs = [], []  # columns, each (B,)
        real = []
        for uniform in uniforms.split(1, dim=1):
            if ids:
                self.feed(ids[-1][:, None], running[:, None].long())
            chosen, logprob = self.draw(uniform)
            ids.append(chosen)
            logprobs.append(logprob)
            real.append(running)

            running = running & ~torch.isin(chosen, stop_ids)
            if stop_text:
                running = running & ~stop_text(torch.stack(ids[-32:], 1), None)
            if not running.any():  # the only time that a token waits for the GPU
                break

        ids = torch.stack(ids, 1).tolist()
        logprobs = torch.stack(logprobs, 1).tolist()
        lengths = sum(real).tolist()
        return [(ids[row][:n], logprobs[row][:n]) for row, n in enumerate(lengths)]

    def keep(self, rows):
        """The batch becomes these rows of it; a row may be named several times."""
        rows = torch.tensor(rows, device=self.real.device)
        self.cache.reorder_cache(rows)
        self.real = self.real[rows]
        self.logits = self.logits[rows]


@dataclass
class Player:
    """An episode while it is played, and what only the rollout needs to know about it."""

    env: object
    episode: Episode
    random: np.random.Generator  # its own: what it samples does not depend on its neighbours
    fed: int = 0  # how many of its ids the KV cache holds
    running: bool = True
    failure: EnvUnavailable = None  # the engine or server that died under it


@torch.no_grad()
def rollout(
    model,
    chat,
    envs,
    starts,
    config,
    stream,
    temperature,
    with_skill=False,
    bandit=None,
    first=0,
    sampler_class=None,
):
    """Play an episode from each (task, seed, group) of `starts`, in lockstep. Returns Episodes.

    stream: ints that name the random numbers (1, ...: evaluation, 3: training, 4: inspect); episode
    i samples from (*stream, first + i). with_skill: put the skill into the prompt for the student,
    too. bandit: of --retrieval ucb. Episodes whose engine or server failed are left out;
    EnvUnavailable if that was half of them or more."""
    for env in envs:
        env.cut = partial(cut_text, chat, config.max_obs_tokens)
        env.tagged = not chat.whole_words
        env.show_admissible |= env.tagged

    # Start. Where an engine fails, its episode is left out, and the others play as if nothing was.
    resets = [partial(env.reset, task, seed) for env, (task, seed, _) in zip(envs, starts)]
    players, failures = [], []
    for i, begun in enumerate(call_all(resets, envs[0].slow)):
        if isinstance(begun, EnvUnavailable):
            failures.append(begun)
            continue
        episode = start_episode(chat, envs[i], starts[i], begun, config, with_skill, bandit)
        players.append(Player(envs[i], episode, np.random.default_rng([*stream, first + i])))
    check_context(model, envs[0], [player.episode for player in players], config)

    # Play, as many at once as the memory allows. Who has ended leaves the batch, and its cache.
    progress = tqdm(desc="evaluation" if stream[0] == 1 else "playing", unit="token", **LATE)
    for start in range(0, len(players), config.rollout_batch):
        playing = players[start : start + config.rollout_batch]
        sampler = (sampler_class or Sampler)(model, temperature)
        while playing:
            tokens = take_turn(sampler, chat, playing, config)
            rows = [row for row, player in enumerate(playing) if player.running]
            playing = [playing[row] for row in rows]
            if playing:
                sampler.keep(rows)
            progress.set_postfix(
                turns=max(player.episode.turns for player in players), refresh=False
            )
            progress.update(tokens)
    progress.close()

    failures += [player.failure for player in players if player.failure]
    report_failures(failures, len(starts))
    return [player.episode for player in players if not player.failure]


def start_episode(chat, env, start, begun, config, with_skill, bandit):
    """The Episode after its first observation. begun: what env.reset returned."""
    _, seed, group = start
    observation, info = begun
    task, task_type = info["task"], info["task_type"]
    strategy = config.retrieval
    draw = np.random.default_rng([seed, *task.encode(errors="replace")])  # alike in a group
    if draw.random() >= config.skill_accuracy:
        strategy = "wrong"
    skills = retrieve(env.skills, task, task_type, strategy, seed, bandit)
    examples = env.examples if env.tagged else ()
    ids, at = chat.first(env.instructions, as_read(observation, env, turn=1), examples)
    mask, skill_ids = [0] * len(ids), chat.encode(skill_text(skills))
    episode = Episode(task, task_type, group, ids, mask, at, skills, skill_ids)
    episode.transcript.append(observation)
    if with_skill:  # it becomes part of the conversation: both readers see it, nobody is taught
        episode.ids, episode.mask = episode.view(with_skill)
        episode.skill_ids = []
    return episode


def as_read(observation, env, turn):
    """An observation as the policy reads it. A language model is told the turn, and the form."""
    if not env.tagged:
        return observation
    return f"{observation}\nTurn {turn} of {env.max_turns}. {env.reminder}"


def take_turn(sampler, chat, players, config):
    """One turn of each episode: the policy answers, the environment replies, both are recorded.
    Returns how many tokens were sampled."""
    # The policy: what is new since its last turn is fed, then a response is sampled.
    size = config.max_new_tokens
    uniforms = np.stack([player.random.random(size, dtype=np.float32) for player in players])
    uniforms = torch.tensor(uniforms, device=sampler.model.device)  # (B, max_new_tokens)
    stop_text = stop_criteria(chat, players[0].env.stop_strings)
    with forward_dtype(sampler.model, config):
        sampler.feed_rows([player.episode.ids[player.fed :] for player in players])
        responses = sampler.respond(uniforms, chat.stop_ids, stop_text)

    # The environments: each reads an action out of its response, and all take their step.
    texts = [chat.tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in responses]
    actions = [player.env.parse(text) for player, text in zip(players, texts)]
    steps = [partial(player.env.step, action) for player, (action, _) in zip(players, actions)]
    results = call_all(steps, players[0].env.slow)

    room = sampler.model.config.max_position_embeddings - config.max_new_tokens
    for player, response, text, (_, valid), result in zip(
        players, responses, texts, actions, results
    ):
        if isinstance(result, EnvUnavailable):  # never shown to the policy
            player.failure, player.running = result, False
        else:
            record_turn(player, chat, response, text, valid, result, room)
    return sum(len(ids) for ids, _ in responses)


def record_turn(player, chat, response, text, valid, result, room):
    """Write a response, what came of it and the next prompt into the episode. valid: its action
    could be read; room: ids that a sequence may have before a response."""
    episode, (ids, logprobs) = player.episode, response
    observation, reward, terminated, truncated, info = result
    episode.add(ids, sampled=1)
    episode.logprobs += logprobs
    episode.transcript += [text, observation]
    player.fed = len(episode.ids) - 1  # the last sampled id is fed with the next observation

    episode.turns += 1
    episode.invalid += not (valid and info["valid"])
    episode.reward += reward
    episode.won = info["won"]

    # Only what is added here, and the responses, the policy ever reads; nothing of it is sampled.
    prompt = as_read(observation, player.env, turn=episode.turns + 1)
    between = chat.next(prompt, ended=ids[-1] == chat.end_id)
    fits = len(episode.ids) + len(between) + len(episode.skill_ids) <= room
    player.running = fits and not (terminated or truncated)
    episode.overflowed = not (fits or terminated or truncated)
    if player.running:
        episode.add(between, sampled=0)


# --- 4. Log-probs of the sampled ids (Delta_t's two halves) ------------------------------
#
# The same function scores for the student, the teacher, the start policy and the training pass;
# only weights, the skill and the graph differ. Its rows are episodes, its columns the sampled ids
# alone: student and teacher stand at different places of different sequences, and share column t.

LOGITS_AT_ONCE = 2**26  # 256 MB in float32
DRIFT = {"float32": 1e-3, "bfloat16": 0.1}  # nats a token by which two passes may differ on average


def token_logprobs(
    hidden,
    head_weight,
    ids,
    temperature=1.0,
    with_entropy=False,
    kernel=None,
    logits_at_once=LOGITS_AT_ONCE,
):
    """Log-softmax of hidden @ head_weight.T / temperature at ids, and its exact entropy in nats.

    hidden (N, H), head_weight (V, H), ids (N,) -> logprobs (N,), entropy (N,) or None, in at least
    float32. kernel: a function that does it from logits, see part II. Rows go in chunks, which the
    backward pass computes again: the float32 logits of all rows never exist at once (16,384 rows
    of Qwen's 151,936 tokens would take 10 GB)."""

    # Only one of V log-probs a row is wanted, but all V logits are needed for its denominator.
    def chunk(hidden, head_weight, ids):
        logits = F.linear(hidden, head_weight)  # of a view like .T, autocast would keep no copy
        if kernel and len(ids):
            return kernel(logits, ids, temperature, with_entropy)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logprobs = torch.log_softmax(logits / temperature, -1)  # (rows, V)
        entropy = logprobs[:, 0]  # of the right shape, where nobody asks for it
        if with_entropy:
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(1, ids[:, None])[:, 0], entropy

    rows = max(1, logits_at_once // len(head_weight))
    if len(ids) > rows:
        chunk = partial(checkpoint, chunk, use_reentrant=False)
    parts = zip(hidden.split(rows), ids.split(rows))
    chunks = [chunk(some, head_weight, their_ids) for some, their_ids in parts]
    logprobs, entropy = map(torch.cat, zip(*chunks))
    return logprobs, entropy if with_entropy else None


def response_mask(episodes, device="cpu"):
    """(B, T) 1.0 where an episode has a t-th sampled id. From here on column t means that id, for
    student and teacher alike, wherever it stands in their sequences."""
    return padded([[1.0] * sum(episode.mask) for episode in episodes], device)


def predicting_states(model, episodes, with_skill):
    """The states (N, H) that predict the N sampled ids of all episodes, and these ids (N,)."""
    # One pass reads a whole conversation: attention is causal, so the state at each place is what
    # the policy had there when it sampled.
    views = [episode.view(with_skill) for episode in episodes]
    ids = padded([ids for ids, _ in views], model.device)  # (B, S)
    mask = padded([mask for _, mask in views], model.device)  # (B, S) 1: sampled
    real = padded([[1] * len(ids) for ids, _ in views], model.device)  # (B, S) 0: padding

    sampled = mask[:, 1:].bool()  # the state at position s - 1 predicts the id at s
    output = model.base_model(input_ids=ids, attention_mask=real, use_cache=False)
    return output.last_hidden_state[:, :-1][sampled], ids[:, 1:][sampled]


def response_logprobs(model, episodes, config, with_skill=False, with_entropy=False):
    """Log-probs (B, T), and entropies or None, of the sampled ids as one of the two readers sees
    them.

    A sequence of S = 9 with two responses becomes T = 5 columns:
        ids      p  p  p  a  b  o  c  d  e      p: prompt, o: observation
        mask     0  0  0  1  1  0  1  1  1
        column            0  1     2  3  4      the same for the teacher, whose S is longer
    """
    with forward_dtype(model, config):
        states, ids = predicting_states(model, episodes, with_skill)
        logprobs, entropy = token_logprobs(
            states,
            model.get_output_embeddings().weight,
            ids,
            config.temperature,
            with_entropy,
            load_kernel(config.dtype) if config.kernel else None,
        )

    inside = response_mask(episodes, model.device).bool()
    empty = torch.zeros(inside.shape, device=model.device)
    logprobs = empty.masked_scatter(inside, logprobs)
    return logprobs, empty.masked_scatter(inside, entropy) if with_entropy else None


def micro_batches(rows, episodes, budget):
    """Cut `rows`, numbers of episodes, into parts of at most `budget` tokens, padding included."""
    longest = max(len(episodes[row].ids) + len(episodes[row].skill_ids) for row in rows)
    at_once = max(1, budget // longest)
    return [rows[first : first + at_once] for first in range(0, len(rows), at_once)]


def full_divergence(model, teacher, episodes, config):
    """divergence() of the whole next-token distributions of student and teacher at each sampled id,
    (B, T), exactly, in chunks like token_logprobs. The gradient goes through the student."""
    # Student and teacher stand at different places of different sequences, but predict the same N
    # sampled ids: row i of the one belongs to row i of the other.
    heads = [one.get_output_embeddings().weight for one in (model, teacher)]
    with forward_dtype(model, config):
        own, _ = predicting_states(model, episodes, with_skill=False)
        with torch.no_grad():
            told, _ = predicting_states(teacher, episodes, with_skill=True)

        def chunk(own, told):
            logits = F.linear(own, heads[0]), F.linear(told, heads[1].detach())
            student, skilled = (  # each (rows, V)
                torch.log_softmax(x.float() / config.temperature, -1) for x in logits
            )
            return divergence(student, skilled, config.divergence)

        rows = max(1, LOGITS_AT_ONCE // len(heads[0]))
        parts = zip(own.split(rows), told.split(rows))
        values = torch.cat([checkpoint(chunk, *part, use_reentrant=False) for part in parts])
    inside = response_mask(episodes, model.device).bool()
    return torch.zeros(inside.shape, device=model.device).masked_scatter(inside, values)


@torch.no_grad()
def score(model, episodes, config, with_skill=False):
    """response_logprobs of all of a step's episodes, without a graph: (B, T)."""
    scored = []
    parts = micro_batches(range(len(episodes)), episodes, config.micro_tokens)
    for rows in tqdm(parts, "scoring", **LATE):
        micro = [episodes[row] for row in rows]
        logprobs, _ = response_logprobs(model, micro, config, with_skill)
        scored += logprobs.cpu()  # waits for the GPU, whose time is being taken
    return pad_sequence(scored, batch_first=True).to(model.device)


# --- 5. Objectives (paper, sections 2.2 to 2.4): pure functions on (B, T) tensors --------
#
# No model, no configuration, no I/O: copy what you need into your own trainer. Every mean runs over
# the tokens where mask is 1, of all episodes together: a long episode weighs more than a short one.


def visible(mask, *tensors):
    """The tensors with 0 wherever mask is 0: what stands there, NaN included, reaches neither a
    value nor a gradient. Multiplying by the mask would not stop NaN."""
    return [x.masked_fill((mask == 0).expand_as(x), 0.0) for x in tensors]


def masked_mean(x, mask):
    """Mean of x over the tokens where mask is 1; 0 if there are none."""
    (x,) = visible(mask, x)
    return (x * mask).sum() / mask.sum().clamp(min=1)


def group_advantages(scores, groups, weights=None, normalize_std=True, eps=1e-6):
    """GRPO's advantage (section 2.2): how much better an episode is than its group.

    scores (N,), groups (N,) ints -> (N,): (score - mean) / (std + eps), std with n - 1.
    weights (N,): count a row as that many rows (the official code: an episode's turns).
    normalize_std=False leaves the std out. A group of one row has mean 0 and std 1; where all of a
    group score the same, its advantages are exactly 0.

    >>> group_advantages(torch.tensor([1., 0., 0., 0.]), torch.tensor([7, 7, 7, 7]))
    tensor([ 1.5000, -0.5000, -0.5000, -0.5000])
    """
    if not scores.is_floating_point():
        scores = scores.float()
    if weights is None:
        weights = torch.ones_like(scores)
    groups = torch.as_tensor(groups, device=scores.device)
    weights = torch.as_tensor(weights).to(scores)

    advantages = torch.empty_like(scores)
    # The mean is what the policy can do at this task today: an episode is good or bad against it.
    # The deviation makes tasks that few win, or few lose, as loud as the others.
    for group in groups.unique():
        rows = groups == group
        x, w = scores[rows], weights[rows]
        n = w.sum()  # how many rows these count as
        mean = (w * x).sum() / n
        std = ((w * (x - mean) ** 2).sum() / (n - 1)).sqrt()

        if n <= 1:
            mean, std = 0.0, 1.0
        elif x.min() == x.max():  # rounding of the mean would tell equal scores apart
            mean, std = x[0], 0.0
        advantages[rows] = (x - mean) / (std + eps) if normalize_std else x - mean
    return advantages


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps=0.2, dual_clip=3.0):
    """PPO's clipped loss (section 2.2), a scalar, and stats: clip_fraction, ratio_mean.

    logprobs, old_logprobs (B, T); advantages broadcastable to it: (B, 1) is one an episode.
    dual_clip (official code; None: off) caps the loss of a token with negative advantage A at
    -A dual_clip."""
    advantages = torch.as_tensor(advantages).to(logprobs).expand_as(logprobs)
    logprobs, old_logprobs, advantages = visible(mask, logprobs, old_logprobs.detach(), advantages)

    # At ratio 1 the gradient of the plain loss is that of REINFORCE, -A grad log pi. The larger of
    # the two losses counts: where a token has moved by more than eps in the direction that its
    # advantage asks for, it is a constant, and pushes no further. Moving back is never clipped.
    ratio = (logprobs - old_logprobs).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_eps, 1 + clip_eps)
    loss = torch.maximum(plain, clipped)

    # A bad token that has become many times likelier would have a loss without bound.
    if dual_clip:
        capped = torch.minimum(loss, -advantages * dual_clip)
        loss = torch.where(advantages < 0, capped, loss)

    stats = {
        "clip_fraction": masked_mean((clipped > plain).float(), mask).item(),
        "ratio_mean": masked_mean(ratio, mask).item(),
    }
    return masked_mean(loss, mask), stats


def kl_k3(logprobs, ref_logprobs):
    """The k3 estimate of KL(policy || reference) on each token (section 2.2), (B, T):
    exp(d) - d - 1 with d = reference - policy, clamped to [-10, 10] as in the official code. Its
    gradient is finite however far the two are apart.

    On the policy's own samples -d has the KL as its mean, but either sign on a token. exp(d) - 1
    has mean 0 there: added to it, the mean stays, the noise shrinks, and no token is below 0."""
    d = (ref_logprobs - logprobs).clamp(max=20)  # keeps exp, and so the gradient, finite
    return (d.exp() - d - 1).clamp(-10, 10)


def gate(kind, gap, entropy=None, beta=5.0, mask=None, generator=None):
    """The gate g_t (section 2.4): how far the teacher is trusted on each token.

    gap (B, T): Delta_t, teacher - student; entropy (B, T): the student's, h_t, in nats.
    Returns (B, T), detached. kind:

        "gap"         sigmoid(beta gap)                         the paper's
        "entropy"     sigmoid(beta h)
        "soft_or"     sigmoid(beta [1 - (1 - h)(1 - gap)])
        "none"        1
        "reverse_kl"  gap                                       the signed gradient of that KL
        "constant"    the mean of the gap gate                  controls: their statistics run
        "centred"     the gap gate less that mean               over the tokens where mask is 1
        "shuffled"    the gap gate's values on other tokens     (permuted by generator)

    >>> gate("gap", torch.tensor([0.5, -0.2, 0.0]))
    tensor([0.9241, 0.2689, 0.5000])
    """
    gap = gap.detach()
    if entropy is not None:
        entropy = entropy.detach()

    # The paper's three. The entropy is the same whichever token was sampled: its gate weighs
    # places, and says nothing for or against a token. Soft-OR is "a or b" of two shares; a gap is
    # no share, and neither is an entropy: above one nat it turns the gap's sign.
    if kind == "gap":
        return torch.sigmoid(beta * gap)
    if kind == "entropy":
        return torch.sigmoid(beta * entropy)
    if kind == "soft_or":
        return torch.sigmoid(beta * (1 - (1 - entropy) * (1 - gap)))

    # Without a gate; and the gap itself.
    if kind == "none":
        return torch.ones_like(gap)
    if kind == "reverse_kl":
        return gap

    # What of the gap gate does the work? Its mean? Its values, on whatever token? Less its mean it
    # has the same expected gradient (up to 1/batch) with less noise, and negative weights.
    mask = torch.ones_like(gap) if mask is None else mask.expand_as(gap)
    g = torch.sigmoid(beta * gap)
    if kind == "constant":
        return masked_mean(g, mask).expand_as(g)
    if kind == "centred":
        return g - masked_mean(g, mask)
    if kind == "shuffled":
        values = g[mask > 0]
        order = torch.randperm(len(values), generator=generator).to(g.device)
        return g.masked_scatter(mask > 0, values[order])
    raise ValueError(f"unknown gate {kind!r}")


def sdar_loss(logprobs, teacher_logprobs, mask, kind="gap", beta=5.0, entropy=None):
    """L_SDAR, the gated self-distillation loss (section 2.4): mean of g_t (log pi_T - log pi).

    logprobs, teacher_logprobs (B, T); kind: a gate, or its values (B, T). Returns the scalar and
    stats: gate_mean, gate_active (share of g > 0.5), gap_mean.

    The gradient goes through the student alone; on a token it is -g_t grad log pi. So every sampled
    token is pushed up, harder where the teacher agrees. In expectation, on policy, that is
    REINFORCE with the reward sigmoid(beta gap), or -1/2 E[tanh(beta gap / 2) grad log pi]: a
    constant gate has expected gradient zero."""
    logprobs, teacher_logprobs = visible(mask, logprobs, teacher_logprobs.detach())
    gap = teacher_logprobs - logprobs
    g = kind if torch.is_tensor(kind) else gate(kind, gap, entropy, beta, mask)
    stats = {
        "gate_mean": masked_mean(g, mask).item(),
        "gate_active": masked_mean((g > 0.5).float(), mask).item(),
        "gap_mean": masked_mean(gap.detach(), mask).item(),
    }
    return masked_mean(g * gap, mask), stats


def divergence(student, teacher, kind):
    """Between log-distributions (..., V), over all tokens, not the sampled one alone: "reverse",
    KL(student || teacher), which the sampled form estimates; "forward", KL(teacher || student),
    which also teaches what the student never samples; "jsd", between the two."""
    if kind == "jsd":
        middle = torch.logaddexp(student, teacher) - math.log(2)
        to_middle = [divergence(x, middle, "reverse") for x in (student, teacher)]
        return sum(to_middle) / 2
    if kind == "forward":
        student, teacher = teacher, student
    return (student.exp() * (student - teacher)).sum(-1)


def distil_advantages(advantages, gap, mask, kind="gap", beta=5.0, coef=1.0):
    """A + lambda w, (B, T): distillation as an advantage, under PPO's ratio and clip, as trainers
    elsewhere do it. w is the gap itself for "reverse_kl", else the gate less its mean: a mean
    pushes nowhere on average, and would only add noise."""
    # Under the clip a token that has moved by eps is left alone until it is sampled again. A loss
    # of its own has no such stop.
    weight = gate(kind, gap, None, beta, mask)
    if kind != "reverse_kl":
        weight = weight - masked_mean(weight, mask)
    return advantages + coef * weight


def skill_sd_loss(logprobs, teacher_logprobs, old_logprobs, mask):
    """Skill-SD (arXiv 2604.10674, a baseline of section 4): mean of rho k3(l), a scalar, and stats:
    gap_mean. l = student - teacher; rho = exp(student - old), not detached.

    On policy the gradient on a token is l grad log pi: signed, as the reverse KL's, and unbounded.
    """
    logprobs, teacher_logprobs, old_logprobs = visible(
        mask, logprobs, teacher_logprobs.detach(), old_logprobs.detach()
    )
    excess = logprobs - teacher_logprobs
    k3 = (-excess).clamp(max=20).exp() - 1 + excess
    rho = (logprobs - old_logprobs).clamp(max=10).exp()
    return masked_mean(rho * k3, mask), {"gap_mean": -masked_mean(excess.detach(), mask).item()}


def rlsd_advantages(advantages, teacher_logprobs, old_logprobs, mask, mix=0.5, clip_eps=0.2):
    """RLSD's advantages (a baseline of section 4), (B, T), detached:
    A ((1 - mix) + mix clip(exp(sign(A) gap), 1 - eps, 1 + eps)), gap = teacher - old.

    The reward keeps the direction; the teacher moves the size, with mix 0.5 from 0.9 A to 1.1 A."""
    advantages = advantages.expand_as(old_logprobs)
    advantages, gap = visible(mask, advantages, teacher_logprobs - old_logprobs)
    weight = (advantages.sign() * gap).exp().clamp(1 - clip_eps, 1 + clip_eps)
    return (advantages * (1 - mix + mix * weight)).detach()


# --- 6. Update (paper, section 2.4 and appendix B): L = L_GRPO + lambda L_SDAR -----------
#
# Three policies meet here. The one that sampled: its log-probs (old) are fixed for the step. The
# student: it starts the step as that policy and moves with every optimiser step. The teacher: it is
# scored once, before the first optimiser step, so within a step it is as old as the samples.


def check_scored(episodes, old_logprobs, config):
    """AssertionError unless both readers score exactly what was sampled, the teacher with its
    skill, and the policy gives the sampled ids the log-probs with which it sampled them."""
    # Three mistakes that no curve would show: a shift by one, a text that was tokenised again, a
    # teacher without its skill.
    sampled_logprobs = []
    for episode in episodes:
        student = [i for i, sampled in zip(*episode.view(False)) if sampled]
        ids, mask = episode.view(True)
        teacher = [i for i, sampled in zip(ids, mask) if sampled]
        require(student == teacher, "student and teacher must score the same ids", AssertionError)
        skill = ids[episode.skill_at :][: len(episode.skill_ids)]
        require(skill == episode.skill_ids, "the teacher must read the skill", AssertionError)
        sampled_logprobs += episode.logprobs

    scored = old_logprobs[response_mask(episodes, old_logprobs.device) > 0]
    drift = (scored - torch.tensor(sampled_logprobs, device=scored.device)).abs().mean()
    require(
        drift.isfinite(), "log-probs are not finite: the weights have grown too large, lower --lr"
    )
    message = f"ids sampled are not ids scored: {drift:.2g} nats apart"
    require(drift < DRIFT[config.dtype], message, AssertionError)


def total_score(episode, config):
    """What an advantage compares: the reward less the penalties for invalid actions."""
    return episode.reward - config.invalid_penalty * episode.invalid


def step_batch(model, start, teacher_logprobs, episodes, config, step=1, bandit=None):
    """All that the update compares the moving student with: a dict of (B, T) tensors.

    mask; old, the log-probs of the policy that sampled; ref, those of the start policy, if there is
    one; advantages; and, of a method with a teacher, teacher, gap and taught (B, 1). All are from
    before the step's first optimiser step: within a step the student moves, these do not."""
    method = METHODS[config.method]
    mask = response_mask(episodes, model.device)
    old = score(model, episodes, config)
    check_scored(episodes, old, config)
    batch = {"mask": mask, "old": old}
    if config.kl_coef and start is not None:
        batch["ref"] = score(start, episodes, config)

    # One advantage for all tokens of an episode.
    scores = [total_score(episode, config) for episode in episodes]
    scores = torch.tensor(scores, device=model.device)
    groups = [episode.group for episode in episodes]
    weights = [episode.turns for episode in episodes] if config.turn_weights else None
    advantages = group_advantages(scores, groups, weights, config.normalize_std)
    batch["advantages"] = advantages[:, None].expand_as(mask)
    if teacher_logprobs is None:
        return batch

    # Where no skill fits the task, nobody was taught: the "teacher" read what the student reads.
    # Its log-probs are then those of other weights (lagged, frozen) or of the student before it
    # moved, and a gap to them would say nothing about a skill. There the gap is set to 0.
    taught = torch.tensor([[bool(episode.skill_ids)] for episode in episodes], device=model.device)
    teacher = torch.where(taught, teacher_logprobs, old)
    gap = mask * (teacher - old)
    batch |= {"teacher": teacher, "taught": taught, "gap": gap}

    if config.retrieval == "ucb":
        bandit.learn(episodes, advantages.tolist(), (gap.sum(1) / mask.sum(1)).tolist())
    if method.teacher == "advantage":
        mix = 0.5 * max(0, 1 - step / config.rlsd_decay)
        batch["advantages"] = rlsd_advantages(batch["advantages"], teacher, old, mask, mix)

    if config.distil == "advantage":
        own = method.policy_weight * batch["advantages"]
        more = config.gate, config.gate_beta, config.sdar_coef
        batch["advantages"] = distil_advantages(own, gap, mask, *more)

    # A control that needs the whole batch takes the gaps of now, once. The other gates follow the
    # student through the optimiser steps: they are computed in the loss.
    if method.teacher == "gate" and config.gate in BATCH_GATES:
        generator = torch.Generator().manual_seed(config.seed + 1000 * step)
        batch["gate"] = gate(config.gate, gap, None, config.gate_beta, mask, generator)
    return batch


def objective(logprobs, entropy, batch, config):
    """L = L_GRPO + lambda L_SDAR (section 2.4) of some episodes: a scalar, and its terms and stats.

    logprobs, entropy (B, T): the student's, with graph; batch: step_batch's tensors of them."""
    method = METHODS[config.method]
    mask, old = batch["mask"], batch["old"]
    policy, stats = policy_loss(
        logprobs, old, batch["advantages"], mask, config.clip_eps, config.dual_clip
    )
    mean_entropy = masked_mean(entropy, mask)
    terms = {"policy_loss": policy, "entropy": mean_entropy}

    # What a method, or a weight of 0, leaves out is 0 in the sum and null in the log.
    kl = distillation = 0.0
    if "ref" in batch:
        kl = terms["kl"] = masked_mean(kl_k3(logprobs, batch["ref"]), mask)
    if method.teacher in ("gate", "skill_sd"):
        # Where nobody was taught the gap stays 0, although the student moves.
        teacher = torch.where(batch["taught"], batch["teacher"], logprobs.detach())
        if method.teacher == "gate":
            kind = batch.get("gate", config.gate)  # a control's values, or the name of a gate
            distillation, more = sdar_loss(logprobs, teacher, mask, kind, config.gate_beta, entropy)
        else:
            distillation, more = skill_sd_loss(logprobs, teacher, old, mask)
        if "divergence" in batch:
            gap = (teacher - logprobs).detach()
            weight = (
                gate(kind, gap, entropy, config.gate_beta, mask) if isinstance(kind, str) else kind
            )
            distillation = masked_mean(batch["taught"] * weight * batch["divergence"], mask)
        terms["sdar_loss"] = distillation
        stats |= more

    in_advantage = config.distil == "advantage"
    loss = (
        (method.policy_weight or in_advantage) * policy  # L_GRPO: the clipped policy loss,
        - config.entropy_coef * mean_entropy  # the official code's entropy bonus,
        + config.kl_coef * kl  # the pull to the start policy;
        + (not in_advantage) * config.sdar_coef * distillation  # lambda L_SDAR
    )
    terms["loss"] = loss
    return loss, stats | {name: term.item() for name, term in terms.items()}


def update(model, optimizer, episodes, batch, config, rng, teacher=None):
    """One pass over the shuffled episodes, in `minibatches` optimiser steps. Returns metrics.
    teacher: the model, for a --divergence of whole distributions.

    The first optimiser step is on policy: the student is the policy that sampled, every ratio is 1,
    and PPO's clip does nothing. From the second one on it has moved. The ratio corrects for that,
    and the clip takes away the reason to move far: a token that is already 20 % likelier than when
    it was sampled is not pushed further."""
    metrics = dict.fromkeys(("kl", "sdar_loss", "gap_mean", "gate_mean", "gate_active"))
    total = batch["mask"].sum().item()
    norms = []
    # Episodes are drawn into mini-batches at random, not by group: an advantage already knows its
    # group.
    order = rng.permutation(len(episodes))
    for chosen in np.array_split(order, min(config.minibatches, len(order))):
        # A mini-batch makes one optimiser step; its micro-batches are what the memory allows.
        tokens = batch["mask"][chosen].sum().item()
        parts = micro_batches(chosen, episodes, config.micro_tokens)
        for rows in tqdm(parts, "learning", **LATE):
            micro = [episodes[row] for row in rows]
            model.train(config.gradient_checkpointing)  # the library checkpoints in this mode alone
            logprobs, entropy = response_logprobs(model, micro, config, with_entropy=True)
            whole = {}
            if config.divergence != "sampled":
                whole["divergence"] = full_divergence(model, teacher, micro, config)
            model.eval()

            # Rows of these episodes, as many columns as their longest one has.
            part = {name: x[rows, : logprobs.shape[1]] for name, x in batch.items()} | whole
            if not norms:
                drift = masked_mean((logprobs - part["old"]).abs(), part["mask"])
                message = "before any update the ratio must be 1"
                require(drift < DRIFT[config.dtype], message, AssertionError)

            # A micro-batch counts by its share of the tokens: means over 300 and 100 tokens become
            # the mean over 400 as 3/4 and 1/4 of it. Then neither the gradient nor the metrics
            # depend on how the memory makes us cut.
            loss, stats = objective(logprobs, entropy, part, config)
            part_tokens = part["mask"].sum().item()
            (loss * (part_tokens / tokens)).backward()
            for name, value in stats.items():
                metrics[name] = (metrics.get(name) or 0.0) + value * part_tokens / total

        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).item()
        norms.append(norm)
        if math.isfinite(norm):  # one NaN would be in all weights for good
            optimizer.step()
        optimizer.zero_grad()

    metrics["grad_norm"] = sum(norms) / len(norms)
    metrics["skipped_updates"] = sum(not math.isfinite(norm) for norm in norms)
    if "gap" in batch:  # to the student that sampled, not to one that moves
        metrics["gap_mean"] = masked_mean(batch["gap"], batch["mask"]).item()
    return metrics


# --- 7. Evaluation and the training loop (paper, section 4.1 and appendix B) -------------
#
# Held-out tasks are played without the skill: that is what counts. They are played with it, too:
# that is how good the teacher is, and if it is no better than the student there is nothing to learn
# from it.

EVAL_BATCH = 64  # episodes of the panel in one call; fixed, since their random numbers depend on it


def evaluate(model, chat, envs, config, bandit=None):
    """Play the panel without and with the skill in the prompt: plain n/N of single tries.

    Returns success, success_skill, episodes, by_type {task type or data set: [episodes, won
    without, won with the skill]}, and of those without: valid_rate, the share of answers with an
    action that could be read; response_tokens, tokens an answer."""
    # The panel, and what is sampled on it, is the same at every call, and for every run: two runs
    # differ in their policies alone.
    panel = envs[0].panel(config.eval_split, config.eval_episodes)
    starts = [(task, seed, number) for number, (task, seed) in enumerate(panel)]

    def play(with_skill):
        played = []
        for first in range(0, len(starts), EVAL_BATCH):
            some, stream = starts[first : first + EVAL_BATCH], (1, first)
            played += rollout(
                model, chat, envs, some, config, stream, config.eval_temperature, with_skill, bandit
            )
        return {episode.group: episode for episode in played}

    plain, skilled = play(False), play(True)
    by_type = {}
    for number in sorted(plain.keys() & skilled.keys()):  # a failing environment may cost some
        counts = by_type.setdefault(envs[0].label(panel[number][0]), [0, 0, 0])
        counts[0] += 1
        counts[1] += plain[number].won
        counts[2] += skilled[number].won
    episodes, won, won_skill = map(sum, zip(*by_type.values()))
    answers = sum(episode.turns for episode in plain.values())
    return {
        "success": won / episodes,
        "success_skill": won_skill / episodes,
        "episodes": episodes,
        "by_type": by_type,
        "valid_rate": 1 - sum(episode.invalid for episode in plain.values()) / answers,
        "response_tokens": sum(len(one.logprobs) for one in plain.values()) / answers,
    }


def draw_starts(env, config, rng):
    """A step's (task, seed, group): each task drawn is played group_size times, from one state."""
    # Each entry of the list at most once, where it is long enough.
    tasks, n = env.tasks("train"), config.tasks_per_step
    starts = []
    for group, task in enumerate(rng.choice(len(tasks), n, replace=len(tasks) < n)):
        starts += [(tasks[task], int(rng.integers(10**6)), group)] * config.group_size
    return starts


COPIES = ("lagged", "ema")  # teachers with weights of their own, which a checkpoint keeps


@torch.no_grad()
def follow(teacher, model, config, step):
    """Before a step's scoring, move a teacher that is a copy to where the student is: a part of the
    way (ema), or all of it, every `teacher_refresh` steps (lagged) or each (live)."""
    # Of what the student was n steps ago an ema keeps (1 - 1/refresh)^n: a memory of about
    # `refresh` steps.
    if config.teacher == "ema":
        for weight, target in zip(teacher.parameters(), model.parameters()):
            weight.lerp_(target, 1 / config.teacher_refresh)
    elif config.teacher == "live" or (step - 1) % config.teacher_refresh == 0:
        teacher.load_state_dict(model.state_dict())


def train(config):
    """A whole run, written below config.out alone. Returns the last step's metrics, and start_*
    from before training.

    A step: play, score, learn, look. The same seed gives the same run, also where it was stopped
    and resumed: nothing is drawn from a generator that lives longer than a step."""
    # Bad input is found before anything is written.
    envs = make_envs(config)
    envs[0].tasks("train")  # none? say so now
    check_out(config)
    model, chat = load_policy(config)
    lock = only_writer(config.out)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.01)
    method, bandit = METHODS[config.method], Bandit()

    # The start policy, which the KL pulls to; and the teacher: the student itself, or a copy that
    # stays behind.
    start, teacher = copy.deepcopy(model), model
    if config.teacher == "frozen":
        teacher = start
    elif config.teacher in COPIES or config.divergence != "sampled":
        teacher = copy.deepcopy(model)

    def save(step):
        """All randomness comes from (seed, step), so there is no generator to keep."""
        state = {"step": step, "before": before, "optimizer": optimizer.state_dict()}
        state |= {"arms": bandit.arms, "config": vars(config)}
        if config.teacher in COPIES:
            state["teacher"] = teacher.state_dict()
        save_checkpoint(config, model, chat, state)

    done, before = load_checkpoint(config, model, optimizer, teacher, bandit)
    if before is None:
        begun = time.perf_counter()
        before = evaluate(model, chat, envs, config, bandit)
        preflight(config, before, time.perf_counter() - begun)
        begin_run(config, model, envs[0], before)
        save(done)

    temperature = config.temperature
    with steps_to_do(config, done) as (progress, stop):
        for step in progress:
            # Play: the tasks of this step, each by a group of episodes.
            clock = [time.perf_counter()]
            rng = np.random.default_rng([2, config.seed, step])
            starts, stream = draw_starts(envs[0], config, rng), (3, config.seed, step)
            episodes = rollout(
                model, chat, envs, starts, config, stream, temperature, method.skilled, bandit
            )

            # Score: the sampled tokens as the teacher reads them, with the skill.
            clock.append(time.perf_counter())
            if teacher not in (model, start):
                follow(teacher, model, config, step)
            teacher_logprobs = None
            if method.teacher:
                teacher_logprobs = score(teacher, episodes, config, with_skill=True)

            # Learn: some optimiser steps on this one batch.
            clock.append(time.perf_counter())
            batch = step_batch(model, start, teacher_logprobs, episodes, config, step, bandit)
            metrics = update(model, optimizer, episodes, batch, config, rng, teacher)
            clock.append(time.perf_counter())

            # Look: the held-out panel, the log, a checkpoint.
            if step == config.steps or (config.eval_every and step % config.eval_every == 0):
                after = evaluate(model, chat, envs, config, bandit)
                metrics |= {f"eval_{name}": value for name, value in after.items()}
                alone, skilled = after["success"], after["success_skill"]
                say(f"step {step}: held-out success {alone:.2f} (with the skill {skilled:.2f})")
            metrics = log_step(config, step, episodes, metrics, clock)
            shown = {"success": "success", "gap": "gap_mean", "gate": "gate_mean"}
            progress.set_postfix({word: metrics[name] for word, name in shown.items()})
            if step == config.steps or step % config.save_every == 0 or stop:
                save(step)
            if stop and step < config.steps:
                raise KeyboardInterrupt

    lock.close()
    print_success("after", after)
    print(
        f"Held-out success without the skill: {before['success']:.0%} -> {after['success']:.0%}. "
        f"What was learned, token by token: python sdar.py inspect --run {config.out}"
    )
    return {f"start_{name}": value for name, value in before.items()} | metrics


# ================= PART II: THE WORKSHOP. The reader of the paper can stop here. =================

# --- 8. The CUDA kernel: log-prob and entropy of a row of logits in one read -------------
#
# Optional (--kernel). A row of Qwen's logits holds 151,936 numbers; PyTorch reads and writes it
# several times for log-softmax, entropy and their gradient. The kernel reads it once forward and
# once backward: what limits it is reading. Its source explains how.

HERE = Path(__file__).resolve().parent
KERNEL_SOURCE = HERE / ".assets" / "logprobs.cu"


@lru_cache
def compiled(name, dtype):
    """A function of logprobs.cu for logits of a dtype, compiled by NVRTC at its first use.

    PyTorch has no public compiler of CUDA source that needs no toolkit. _compile_kernel is private
    and used here alone; load_kernel falls back where it is gone or changed."""
    from torch.utils import cpp_extension

    kind = (torch.float32, torch.bfloat16).index(dtype)
    bits = ("int", "short")[kind]
    options = ["--ftz=true", f"-DTYPE={kind}", f"-DBits=unsigned {bits}"]
    if not cpp_extension.CUDA_HOME:  # it asks for a toolkit's folder, and needs nothing of it
        cpp_extension.CUDA_HOME = "/nowhere"
    source = KERNEL_SOURCE.read_text("utf-8")
    return torch.cuda._compile_kernel(source, name, nvcc_options=options)  # noqa: SLF001


class KernelLogprobs(torch.autograd.Function):
    """Log-probs and entropies (N,) of ids (N,) in logits (N, V), in float32.

    No other tensor of N x V is made: the backward pass writes the gradient over the logits. That is
    allowed because nobody else reads them, and a second backward pass is made an error. With p the
    softmax of a row at temperature 1 / scale, the gradient of logit i is

        scale (g [i = id] - p_i (g + h (log p_i + entropy)))

    where g and h are the gradients that come in for log-prob and entropy."""

    @staticmethod
    def forward(ctx, logits, ids, temperature, with_entropy):
        logits = logits.contiguous()
        out = torch.empty(len(ids), 4, device=logits.device)  # log-prob, entropy, max, log of sum
        ctx.scale = 1 / temperature
        ctx.save_for_backward(logits, ids, out)
        launch("forward", logits, ids, out, logits.shape[1], ctx.scale)
        return out[:, 0].clone(), out[:, 1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_logprobs, of_entropy):
        logits, ids, out = ctx.saved_tensors
        torch.autograd.graph.increment_version(logits)  # a second backward pass is an error
        gradients = [of_logprobs.float().contiguous(), of_entropy.float().contiguous()]
        launch("backward", logits, ids, out, *gradients, logits.shape[1], ctx.scale)
        return logits, None, None, None


def launch(name, logits, *arguments):
    """Run a function of logprobs.cu with one block of 512 threads a row."""
    compiled(name, logits.dtype)((len(logits), 1, 1), (512, 1, 1), [logits, *arguments])


@lru_cache
def load_kernel(dtype):
    """The kernel for logits of a dtype ("float32" or "bfloat16"); None, and a line, if it fails."""
    try:
        for name in ("forward", "backward"):
            compiled(name, getattr(torch, dtype))
    except Exception as error:  # whatever a private function raises when it has changed
        say(f"--kernel: not compiled, PyTorch's own functions do the work: {error!r:.200}")
        return None
    return KernelLogprobs.apply


# --- 9. Loading: the configuration, environments, a model --------------------------------
#
# Bad input ends here, in one line that names the thing and the fix, before anything is written. A
# model is taken by what it computes, not by its name: it must be causal, see everything before a
# token, bear a padded KV cache, and give its logits as last states times one matrix.

TINY_FOLDER = HERE / ".assets" / "tiny-policy"
SMALLEST, LARGEST = {int: 1, float: 1e-9}, 1e9  # of a setting: float32 can square them
PROBE = "Où est the Mug?\n<action>go to drawer 12</action>"  # a tokenizer must give it back
MAY_BE_ZERO = (
    *("seed", "max_turns", "eval_every", "eval_temperature", "clip_eps", "dual_clip", "kl_coef"),
    *("entropy_coef", "invalid_penalty", "sdar_coef", "gate_beta", "skill_accuracy"),
)


def say(text):
    """Print a line on stderr, above a progress bar, if there is one."""
    tqdm.write(text, sys.stderr)


def flag(name):
    """A field of Config as it is typed."""
    return "--" + name.replace("_", "-")


def check_config(config):
    """UserError for a value that no run could use: a choice that does not exist, a number that is
    negative, not finite or out of float32's reach, or settings that do not go together."""
    for name, choices in CHOICES.items():
        value = getattr(config, name)
        require(value in choices, unknown(flag(name), value, choices))
    for name, value in vars(config).items():
        if type(value) in (int, float):
            least, nothing = SMALLEST[type(value)], value == 0 and name in MAY_BE_ZERO
            fine = nothing or least <= value <= LARGEST
            require(fine, f"{flag(name)} {value}: must be from {least:g} to {LARGEST:g}")

    episodes = config.tasks_per_step * config.group_size
    panel = 0 if config.eval_episodes == "all" else config.eval_episodes
    require(type(panel) is int, f"--eval-episodes {panel}: a number, or all")
    fits = episodes <= 10**4 and panel <= 10**6
    require(fits, "--tasks-per-step, --group-size, --eval-episodes: too many episodes at once")
    require(config.lr <= 1, "--lr: at most 1: every weight moves by about so much a step")
    require(config.group_size > 1, "--group-size must be at least 2: an advantage compares")
    require(not (config.resume and config.overwrite), "--resume or --overwrite? not both")
    learns = METHODS[config.method].teacher or config.retrieval != "ucb"
    require(learns, f"--retrieval ucb learns from a teacher, --method {config.method} has none")
    gated = METHODS[config.method].teacher == "gate"
    for name, plain in (("distil", "loss"), ("divergence", "sampled")):
        value = getattr(config, name)
        message = (
            f"{flag(name)} {value} is for methods with a gate, --method {config.method} has none"
        )
        require(gated or value == plain, message)
    both = config.distil == "advantage" and config.divergence != "sampled"
    require(not both, "--distil advantage is of the sampled token: leave --divergence out")
    knows_gap = config.gate not in ("entropy", "soft_or", *BATCH_GATES)
    require(
        knows_gap or config.distil == "loss", f"--distil advantage: not with --gate {config.gate}"
    )
    require(config.skill_accuracy <= 1, "--skill-accuracy: a share, from 0 to 1")
    on_cpu = config.device == "cpu"
    require(on_cpu or torch.cuda.is_available(), "--device cuda: there is no CUDA device here")
    require(not (on_cpu and config.kernel), "--kernel is for CUDA: it needs --device cuda")


def make_envs(config):
    """One environment for each episode of a step, or of a part of the panel: they are played in
    lockstep, so all of them are in use at once."""
    options = {"data": config.env_data, "url": config.search_url}
    options = {name: value for name, value in options.items() if value}
    number = max(EVAL_BATCH, config.tasks_per_step * config.group_size)
    envs = [make_env(config.env, max_turns=config.max_turns, **options) for _ in range(number)]
    envs[0].tasks(config.eval_split)  # none in it? say so now
    if config.skill_bank:
        bank = load_skills(config.skill_bank, envs[0])
        for env in envs:
            env.skills = bank
    return envs


def report_failures(failures, episodes):
    """A line for failed episodes of a rollout. EnvUnavailable if they are half of it or more: then
    what is left is no fair sample of the tasks, and something is wrong with the whole engine."""
    if failures:
        message = f"{len(failures)} of {episodes} episodes failed: {failures[0]}"
        require(2 * len(failures) < episodes, message, EnvUnavailable)
        say(message)


@lru_cache
def stop_criteria(chat, strings):
    """A function of ids (B, n): which rows now hold one of the strings, however the tokenizer cuts
    them. None if it cannot write them, as the tiny policy's, which knows whole words alone."""
    from transformers import StopStringCriteria

    writable = [text for text in strings if chat.tokenizer.decode(chat.encode(text)) == text]
    return StopStringCriteria(chat.tokenizer, writable) if writable else None


def cut_text(chat, limit, text):
    """The text; if it has more than `limit` tokens, what the tokenizer makes of the first ones."""
    start = text[: 64 * limit]  # of blanks, a tokenizer may make few tokens or none
    ids = chat.encode(start)
    if start == text and len(ids) <= limit:
        return text
    return chat.tokenizer.decode(ids[:limit]) + " ..."


def check_context(model, env, episodes, config):
    """UserError if episodes that start with these prompts cannot fit the model's context."""
    prompt = max((len(episode.view(True)[0]) for episode in episodes), default=0)
    context = model.config.max_position_embeddings
    require(
        prompt + env.max_turns * config.max_new_tokens <= context,
        f"a prompt of {prompt} tokens and {env.max_turns} responses (--max-turns) of "
        f"--max-new-tokens {config.max_new_tokens} do not fit the model's context of {context}",
    )


def load_policy(config):
    """The start policy (a causal language model) and its Chat. UserError if it is not usable.

    Weights are float32, whatever the files hold: small steps would be lost in bfloat16. --dtype
    chooses what forward passes compute in."""
    import transformers  # here, since it takes seconds

    if "TRANSFORMERS_VERBOSITY" not in os.environ:  # unless somebody wants to read its log
        transformers.utils.logging.set_verbosity_error()
    path = Path(TINY_FOLDER if config.model == "tiny" else config.model)
    if path.exists() or path.is_absolute() or config.model.startswith("."):  # else on the hub
        require(not (path / "checkpoint").is_dir(), f"--model {path}: take {path}/checkpoint")
        require(
            (path / "config.json").is_file(),
            f"--model {path}: no folder with a config.json (the tiny one: `git checkout "
            ".assets/tiny-policy` or `python sdar.py warmstart`)",
        )
        if sum(file.stat().st_size for file in path.glob("*.safetensors")) < 5e8:
            transformers.utils.logging.disable_progress_bar()  # it takes no two seconds
        merged = not (path / "adapter_config.json").exists()
        require(merged, f"--model {path}: merge its LoRA adapter first (peft: merge_and_unload)")

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        require(tokenizer.chat_template, "it has no chat template; take the -Instruct checkpoint")
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            use_safetensors=True,
            attn_implementation="sdpa",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_files does not: it names what is wrong
        )
        model = model.to(config.device).eval()
        check_files(model, tokenizer, report)
        check_computation(model)
        if config.gradient_checkpointing:
            enable_checkpointing(model)
        chat = Chat(tokenizer, model.generation_config.eos_token_id)
        read = tokenizer.decode(chat.encode(PROBE)).strip()
        fine = read == PROBE or chat.whole_words
        require(fine, f"its tokenizer loses text: it reads {PROBE!r} as {read!r}")
        message = "its chat template has no place for a system message: it would miss the rules"
        require(chat.takes_instructions or chat.whole_words, message)
        return model, chat
    except Exception as error:  # whatever a broken or absent checkpoint makes the library raise
        reason = (str(error) or repr(error)).strip().split("\n")[0]
        raise UserError(f"--model {path}: cannot be used: {reason:.200}") from error


def enable_checkpointing(model):
    """Turn on the library's own checkpointing of activations, renamed in transformers 5.24. It
    works in training mode alone: see update."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def check_files(model, tokenizer, report):
    """UserError unless the checkpoint was read whole, and says that every layer sees all that came
    before a token.

    report: what from_pretrained says of its tensors. It does not stop at missing ones, but draws
    them at random: two runs of one seed would differ, and no metric would say why."""
    reshaped = [name for name, *_ in report["mismatched_keys"]]
    for names, fault in (
        (report["missing_keys"], "its files lack"),
        (report["unexpected_keys"], "it has no place for"),
        (reshaped, "its files have in another shape"),
    ):
        require(not names, f"{fault} the tensor {min(names, default='')}")
    for name, weights in model.named_parameters():
        require(weights.isfinite().all(), f"its weights are not finite in the tensor {name}")
    ids = max(tokenizer.get_vocab().values()) + 1
    rows = len(model.get_input_embeddings().weight)
    require(ids <= rows, f"its tokenizer has {ids} ids, its embedding only {rows} rows")

    settings = model.config.to_dict()
    context = settings.get("max_position_embeddings")
    require(context, "its config does not say how long its context is")
    kinds = settings.get("layer_types")
    sees_all = set(kinds) == {"full_attention"} if kinds else not settings.get("sliding_window")
    require(sees_all, "some of its layers do not attend to everything before a token")


@torch.no_grad()
def check_computation(model):
    """UserError unless the model computes what this file takes for granted, whatever it says.

    Three passes over a few ids show it: a token's state must not change with what follows it, nor
    in training mode; and sampling through a padded cache must give the logits of a plain pass."""

    def states(ids):
        return model.base_model(torch.tensor([ids], device=model.device)).last_hidden_state[0]

    def require_same(a, b, message):
        close = (a - b).abs().max() <= 1e-2 * b.abs().max()  # a card rounds more than a CPU
        require(close, message)

    short, long = [1, 2, 3], [4, 5, 6, 7, 8]
    causal = states(long)
    require_same(states(long[:3]), causal[:3], "it is not causal: a token's state knows the next")
    model.train()  # as in update with --gradient-checkpointing
    in_training = states(long)
    model.eval()
    require_same(in_training, causal, "it computes otherwise in training mode: has it dropout?")

    # As in a rollout: rows of two lengths, so padding, then two more blocks in another order.
    sampler = Sampler(model, 1.0)
    sampler.feed_rows([short, long])
    sampler.keep([1, 0])
    sampler.feed_rows([[2, 1], [3]])
    last = torch.stack([states(long + [2, 1])[-1], states(short + [3])[-1]])
    expected = F.linear(last, model.get_output_embeddings().weight)
    message = "with a KV cache and padding its logits are not its last states times one matrix"
    require_same(sampler.logits, expected, message)


# --- 10. The run's folder: config.json, metrics.jsonl, checkpoint/ -----------------------
#
# A run that is killed at any moment goes on with --resume, and its metrics become those of a run
# that was never killed. Two things make that possible: every random number of a step comes from
# (seed, step), and a checkpoint is either whole or not used.

# A run's folder holds config.json (its settings), metrics.jsonl (one object a step), and:
#   checkpoint/       a model folder like any other (config.json, model.safetensors, tokenizer),
#                     with trainer.pt (optimizer, settings, step) and sums.json (hashes) beside it
#   checkpoint.new/   the same, while it is written
#   checkpoint.old/   the one before
PLACES = ("checkpoint", "checkpoint.new", "checkpoint.old")  # the newest first
MAY_DIFFER = (  # between a run and its continuation; nothing else may
    *("steps", "out", "search_url", "resume", "overwrite", "save_every", "eval_every", "device"),
    *("micro_tokens", "rollout_batch", "gradient_checkpointing", "kernel", "anyway"),
)


def check_out(config):
    """UserError if the run's folder cannot be written, or holds something that may not go."""
    folder = Path(config.out)
    place = next(path for path in (folder / "x").absolute().parents if path.exists())
    writable = place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    require(writable, f"--out {folder}: {place} is no folder that can be written")
    replaced = config.overwrite and (folder / "metrics.jsonl").exists()
    free = config.resume or replaced or not any(folder.glob("*"))
    require(free, f"--out {folder} is not empty: --resume it or --overwrite it")


def only_writer(folder):
    """An open file; until it is closed, at the latest when this process ends, every other process
    of this machine that asks for the same folder gets a UserError. Without locks on Windows.

    The file is in the system's temporary folder: a run's own one may not exist yet."""
    key = hashlib.sha256(os.fsencode(Path(folder).resolve())).hexdigest()
    lock = open(Path(gettempdir(), f"sdar-{key[:20]}.lock"), "a+")
    try:
        if fcntl:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        raise UserError(f"--out {folder} is being written by process {lock.read()}") from None
    lock.truncate(0)
    print(os.getpid(), end="", file=lock, flush=True)
    return lock


def write_whole(path, text):
    """Write a text file beside and rename it: what was there is lost only when the new is whole."""
    fresh = Path(f"{path}.new")
    fresh.write_text(text, "utf-8", errors="replace")
    fresh.replace(path)


ENOUGH = 16  # episodes of an evaluation that may stop a run


def preflight(config, before, seconds):
    """Say what the evaluation before training tells of the run. before: what evaluate returned,
    after so many seconds. UserError, unless --anyway, if nothing will be learned."""
    n, method = before["episodes"], METHODS[config.method]
    an_episode = seconds / (2 * n)
    episodes = config.steps * config.tasks_per_step * config.group_size
    text = (
        f"{before['valid_rate']:.0%} of the answers are valid; {before['response_tokens']:.1f} "
        f"tokens an answer, {an_episode:.2g} s an episode: playing the run's {episodes} episodes "
        f"takes about {an_episode * episodes / 60:.1f} minutes, learning as long again or longer"
    )
    print(text)

    alone = before["success"]
    taught = method.teacher and before["success_skill"] > before["success"]
    problems = []
    if before["valid_rate"] < 0.5:
        problems.append(
            "fewer than half of the answers are valid: `python sdar.py warmstart --model` teaches "
            "the toy's format; prompts are in .assets/environments.json"
        )
    if method.teacher and not taught:
        problems.append(
            "the skill helps nothing, so there is no teacher: other skills, a larger model, or "
            "--method grpo"
        )
    if alone in (0, 1) and not (taught or method.skilled):
        outcome = "won" if alone else "lost"
        problems.append(
            f"no group has two different scores, all are {outcome}: other tasks, more --max-turns "
            "or a warm start"
        )
    if problems and n >= ENOUGH and not config.anyway:
        raise UserError("; ".join(problems) + " (--anyway: train nevertheless)")
    for problem in problems:
        print(f"Nothing may be learned: {problem}.")


def begin_run(config, model, env, before):
    """Say where training starts from, and empty the folder of what is overwritten.

    Only now is anything written: bad input has been found before. What is removed has a name that
    runs give; other files stay."""
    text = (
        "{method} on {env} with {model} ({size:,} parameters), {preset} preset, seed {seed}: "
        "{steps} steps of {tasks_per_step} tasks x {group_size} episodes"
    )
    print(text.format(size=model.num_parameters(), **vars(config)))
    if {*env.tasks("train")} & {*env.tasks(config.eval_split)}:
        print("Nothing is held out: these are training tasks, the data has no other split.")
    print_success("before", before)

    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    for name in PLACES:  # else --resume could take them for this run's
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "metrics.jsonl").write_text("")


@contextmanager
def steps_to_do(config, done):
    """Around the training loop: (its steps, a progress bar; a list of the signals received). Ctrl-C
    and SIGTERM wait for the end of a step, which is then saved; a second one does not wait."""
    stop = []

    def wait(number, frame):
        stop.append(number)
        signal.signal(number, signal.default_int_handler)

    handlers = {number: signal.signal(number, wait) for number in (signal.SIGINT, signal.SIGTERM)}
    steps = range(done + 1, config.steps + 1)
    try:
        with tqdm(steps, config.method, config.steps, initial=done, unit="step") as progress:
            yield progress, stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def log_step(config, step, episodes, metrics, clock):
    """Append a line to metrics.jsonl. Returns it.

    clock: seconds at the start, and after rollout, teacher and update. Rates and means are over all
    episodes or tokens of the step. flat_groups is the share of groups whose episodes all scored the
    same: there every advantage is 0, and GRPO learns nothing. dropped: episodes whose engine died;
    overflowed: those that filled the model's context. NaN becomes null, since NaN is no JSON."""
    n = len(episodes)
    turns = sum(episode.turns for episode in episodes)
    tokens = sum(len(episode.logprobs) for episode in episodes)
    seconds = np.diff(clock)
    scores = {(episode.group, total_score(episode, config)) for episode in episodes}
    kinds = Counter(group for group, _ in scores)  # different scores of each group

    line = {
        "step": step,
        "success": sum(episode.won for episode in episodes) / n,
        "reward": sum(episode.reward for episode in episodes) / n,
        "turns": turns / n,
        "invalid_rate": sum(episode.invalid for episode in episodes) / turns,
        "response_tokens": tokens / n,
        "overflowed": sum(episode.overflowed for episode in episodes),
        "flat_groups": [*kinds.values()].count(1) / len(kinds),
        "dropped": config.tasks_per_step * config.group_size - n,
        "seconds_rollout": seconds[0],
        "seconds_teacher": seconds[1],
        "seconds_update": seconds[2],
        "tokens_per_second": tokens / sum(seconds),
        **metrics,
    }
    for name, value in line.items():
        if isinstance(value, float) and not math.isfinite(value):
            line[name] = None
    skipped = line["skipped_updates"]
    if skipped:
        say(f"step {step}: {skipped} updates skipped, their gradients were not finite: lower --lr?")
    with open(Path(config.out, "metrics.jsonl"), "a") as log:
        log.write(json.dumps(line) + "\n")
    return line


def hashes(folder):
    """{file: SHA-256} of a checkpoint, but for sums.json, which keeps them: the last file that is
    written, so that a checkpoint that was cut short has none."""
    files = [path for path in folder.iterdir() if path.name != "sums.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def is_whole(folder):
    """True if a checkpoint is as it was written."""
    try:
        return json.loads((folder / "sums.json").read_text()) == hashes(folder)
    except (OSError, ValueError):
        return False


def save_checkpoint(config, model, chat, state):
    """Write the model in Hugging Face format with the trainer's state, and config.json beside it.

    A new checkpoint is written to checkpoint.new; when it is whole it takes the place of the old
    one, which becomes checkpoint.old. Wherever this is cut short, one of the three is whole."""
    folder = Path(config.out)
    fresh, old = folder / "checkpoint.new", folder / "checkpoint.old"
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)  # makes the folder
    chat.tokenizer.save_pretrained(fresh)
    torch.save(state, fresh / "trainer.pt")
    (fresh / "sums.json").write_text(json.dumps(hashes(fresh)))

    shutil.rmtree(old, ignore_errors=True)
    if (folder / "checkpoint").exists():
        (folder / "checkpoint").rename(old)
    fresh.rename(folder / "checkpoint")
    write_whole(folder / "config.json", json.dumps(vars(config), indent=1))


def load_checkpoint(config, model, optimizer, teacher, bandit):
    """With --resume, go on from the newest whole checkpoint of the run's folder.

    Returns (steps done, the evaluation before training); (0, None) where there is nothing to go on
    from. Model, optimizer, a lagged teacher and the bandit are set to what they were; lines of the
    log after the checkpoint are cut off, their steps are played again."""
    if not config.resume:
        return 0, None
    folder = Path(config.out)
    log = folder / "metrics.jsonl"
    whole = [folder / name for name in PLACES if is_whole(folder / name)]
    if not whole:
        strange = {path.name for path in folder.glob("*")} - {"metrics.jsonl", "checkpoint.new"}
        require(not strange, f"--resume: {folder} holds no run that can be read")
        return 0, None  # it was killed before it saved: begin anew

    # Only the same run can go on: no setting may differ that decides its numbers.
    with naming(f"--resume: {whole[0]} cannot be used", UserError):
        state = torch.load(whole[0] / "trainer.pt", weights_only=True, map_location=model.device)
        step, before, settings = state["step"], dict(state["before"]), dict(state["config"])
        optimizer.load_state_dict(state["optimizer"])
        for weights, moments in optimizer.state.items():
            shapes = {moments["exp_avg"].shape, moments["exp_avg_sq"].shape}
            require(shapes == {weights.shape}, "its optimizer is of another model")
        if config.teacher in COPIES:
            teacher.load_state_dict(state["teacher"])
        bandit.arms = dict(state["arms"])
    for name, value in vars(config).items():
        same = settings.get(name) == value or name in MAY_DIFFER
        require(same, f"--resume: {flag(name)} is not as in {folder}/config.json")
    require(step < config.steps, f"--resume: {folder} has all of its {step} steps; raise --steps")
    with naming(f"--resume: {log} lacks steps of the checkpoint's {step}", UserError):
        lines = log.read_text("utf-8").split("\n")[:step]  # later ones are played again
        steps = [json.loads(line)["step"] for line in lines]
        require(steps == [*range(1, step + 1)], f"it has {steps}")

    weights, _ = load_policy(replace(config, model=str(whole[0])))
    model.load_state_dict(weights.state_dict())
    write_whole(log, "\n".join(lines) + "\n" * (step > 0))
    say(f"--resume: from {whole[0]}, step {step}")
    return step, before


def wilson(wins, n, z=1.96):
    """95 % Wilson score interval of a proportion: (low, high). Unlike mean +- 2 standard errors it
    is right near 0 and 1, where a trained policy ends (Wilson, JASA 22, 1927)."""
    square = z * z
    middle = wins + square / 2
    half = z * math.sqrt(wins * (n - wins) / n + square / 4)
    total = n + square
    return max(0.0, middle - half) / total, (middle + half) / total


def print_success(title, result):
    """Print what evaluate returned, without and with the skill, with 95 % intervals."""
    n = result["episodes"]
    for name, reader in (("success", "alone"), ("success_skill", "with the skill")):
        low, high = wilson(result[name] * n, n)
        print(f"{title}, {reader}: won {result[name]:.3f} of {n} [{low:.2f}, {high:.2f}]")


# --- 11. Command line --------------------------------------------------------------------
#
# A field of Config is a flag: --group-size 4 sets group_size. Its help is the comment beside it.
# The instruments (compare, inspect, ...) are scripts in the folder .lab, with the same flags and
# some of their own. Bad input is one line on stderr and exit code 2, from whichever function.

SYMBOLS = {  # of the paper, which are flags, too
    "sdar_coef": ["--lambda"],
    "gate_beta": ["--beta"],
    "clip_eps": ["--epsilon"],
    "group_size": ["--G"],
}
GROUPS = {  # the field at which a group of flags begins
    "env": "what is run",
    "device": "the machine",
    "tasks_per_step": "rollouts",
    "lr": "GRPO",
    "sdar_coef": "SDAR",
    "eval_every": "evaluation",
}
OF_TRAINING = ("steps", "out", "anyway", "resume", "overwrite", "save_every", "eval_every")
COMMANDS = """commands
  train      train a policy; what `python sdar.py` does
  evaluate   play the held-out panel with a model
  compare    train several methods or settings over seeds: a table and curves
  inspect    look at one group of episodes, token by token
  plot       draw the curves of runs
  bench      where the time and the memory of a step go
  warmstart  build the tiny policy again, in some minutes
  exercise   the course: functions to write again, bugs to find"""
INSTRUMENTS = {  # {command: its script in the folder .lab}
    "compare": "compare.py",
    "inspect": "microscope.py",
    "plot": "plots.py",
    "bench": "bench.py",
    "warmstart": "warmstart.py",
    "exercise": "course/exercise.py",
}


def number_or_all(text):
    """An int, or "all"."""
    return text if text == "all" else int(text)


def parse_flags(command, description, argv, own=(), without=()):
    """The flags that were typed, {name: value}: of Config, and the command's own. What was not
    typed is not in it, so that a preset can fill it in.

    own: (flag, keywords of add_argument) pairs; without: fields of Config that the command would
    ignore. UserError for an unknown flag, which names its neighbour; argparse.ArgumentError for a
    value of another type."""
    parser = argparse.ArgumentParser(
        usage=f"python sdar.py {command} [flags]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
        argument_default=argparse.SUPPRESS,  # what is not typed is not there
    )
    known = ["--help"]
    for name, keywords in own:
        if "action" not in keywords:
            keywords = {"type": as_typed, **keywords}
        known += parser.add_argument(name, **keywords).option_strings
    help = dict(re.findall(r"(\w+): \w+ = .*?  # (.*)", inspect.getsource(Config)))
    for f in fields(Config):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        if f.name in without:
            continue
        names = [flag(f.name), *SYMBOLS.get(f.name, [])]
        kind = {"type": as_typed if f.type is str else f.type, "metavar": "VALUE"}
        if f.name == "eval_episodes":
            kind["type"] = number_or_all
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        text = f"{help[f.name]} [{f.default}]"
        known += group.add_argument(*names, dest=f.name, help=text, **kind).option_strings

    typed, rest = parser.parse_known_args(argv)
    if rest:
        near = difflib.get_close_matches(rest[0].split("=")[0], known, 1, cutoff=0)
        raise UserError(f"unknown flag {rest[0]}: did you mean {near[0]}?")
    return vars(typed)


def untested_versions():
    """Which installed libraries are outside the range that is tested, in words; "" if none is, or
    where requirements.txt, the one place with the ranges, was not copied along."""
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import InvalidRequirement, Requirement  # transformers needs it, too

    path, found = HERE / "requirements.txt", []
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            wanted = Requirement(line)
            installed = version(wanted.name)
        except (InvalidRequirement, PackageNotFoundError):  # a line of the user's; pytest
            continue
        if not wanted.specifier.contains(installed, prereleases=True):
            found.append(f"{wanted.name} {installed} (tested: {wanted.specifier})")
    return ", ".join(found)


def run_command(argv):
    """Run what a command line says. Returns an exit code, or None for 0."""
    command, *rest = argv or ["train"]
    if command.startswith("-"):
        command, rest = "train", argv
    known = ["train", "evaluate", *INSTRUMENTS]
    require(command in known, unknown("command", command, known))
    if command in INSTRUMENTS:
        script = HERE / ".lab" / INSTRUMENTS[command]
        require(script.exists(), f"{command} comes with the repository, in its folder .lab")
        sys.path.insert(0, str(script.parent))
        return importlib.import_module(script.stem).main(rest)

    ignored = OF_TRAINING if command == "evaluate" else ()
    config = Config(**parse_flags(command, COMMANDS, rest, without=ignored))
    untested = untested_versions()
    if untested:
        say(f"sdar.py: untested versions, which may do otherwise: {untested}")
    if command == "train":
        train(config)
    else:
        envs = make_envs(config)
        print_success(config.model, evaluate(*load_policy(config), envs, config))


def main(argv):
    """Run a command. Returns the exit code: 0; 1 a run of compare failed; 2 bad input (one line on
    stderr, no traceback); 130 Ctrl-C. Whatever else goes wrong is a fault of ours or of a library,
    and shows its traceback."""
    tolerant_output()
    try:
        return run_command(argv) or 0
    except (UserError, EnvUnavailable, argparse.ArgumentError, OSError) as error:
        message, code = error, 2
    except KeyboardInterrupt:
        message, code = "stopped; the same command with --resume goes on with a training run", 130
    print(f"sdar.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
