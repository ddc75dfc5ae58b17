"""The proof of sdar.py and envs.py, in their order: hand numbers, oracles, the whole pipeline on small
models, and silent bugs that are planted to see that a test finds them.

    python -m pytest -q test_sdar.py

What takes longer (many kills, real engines, TRL, the instruments) is in .lab/tests.
"""

import ast
import copy
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest import approx, fixture, mark, raises

import envs
import sdar
from envs import make_env
from sdar import configure, main

ROOT = Path(__file__).resolve().parent
DATA = ROOT / ".assets" / "test"
torch.set_num_threads(1)  # with tensors as small as these more threads only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start, too

# Tomorrow's break, seen today: what a library is about to take away is an error here. Exceptions
# follow, if there have to be any, as "ignore:<message>" with the reason beside them.
pytestmark = mark.filterwarnings(
    "error::FutureWarning",
    "error::DeprecationWarning",
    "error::PendingDeprecationWarning",
)


@fixture(scope="session")
def tiny():
    """The carried policy: (model, chat)."""
    return sdar.load_policy(configure())


@fixture
def policy(tiny):
    """A copy of it that a test may train."""
    return copy.deepcopy(tiny[0]), tiny[1]


@fixture(scope="session", params=["qwen2", "qwen3"])
def checkpoint(request, tmp_path_factory):
    """A folder as the hub would have it: byte-level BPE, Qwen's control tokens and chat template,
    a random small model. qwen2's padding is its end of turn; qwen3's <think> is an added token not
    marked special. Both have two ends of a generation."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(DATA / request.param)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return shutil.copytree(DATA / request.param, folder, dirs_exist_ok=True)


@fixture(scope="session")
def hub(checkpoint):
    """The same, loaded: (model, chat)."""
    return sdar.load_policy(configure(model=str(checkpoint), device="cpu"))


def small(tmp_path, name="run", **changes):
    """A config for a run of seconds, in tmp_path/name."""
    size = {"steps": 2, "tasks_per_step": 2, "group_size": 4, "eval_episodes": 6, "eval_every": 0}
    return configure(**{"out": str(tmp_path / name), "rollout_batch": 8, **size, **changes})


def lines(folder):
    """metrics.jsonl without the timings."""
    rows = [json.loads(line) for line in open(Path(folder, "metrics.jsonl"))]
    for row in rows:
        for key in [key for key in row if "second" in key]:
            del row[key]
    return rows


def trained(tmp_path, name="run", hooks=None, **changes):
    """A small run: (what train() returned, the lines of its metrics.jsonl)."""
    final = sdar.train(small(tmp_path, name, **changes), **hooks or {})
    return final, lines(tmp_path / name)


def play(policy, config, episodes=8, stream=0, with_skill=False, **more):
    """Roll out the first tasks of the toy, `group_size` episodes each, of at most 8 to 10 turns."""
    worlds = [make_env("toy", max_turns=10 - i % 3) for i in range(episodes)]
    bank = envs.SkillBank(worlds[0].skills, config.retrieval)
    for world in worlds:
        world.bank = bank
    tasks = worlds[0].tasks("train")
    starts = [(tasks[i // config.group_size], 0, (stream, i)) for i in range(episodes)]
    return sdar.rollout(*policy, worlds, starts, config, config.temperature, with_skill)


def table(text):
    """Rows of a text table: cells are Python values, with two blanks between them."""
    rows = [re.split("  +", line.strip()) for line in text.strip().splitlines()]
    return [tuple(map(ast.literal_eval, row)) for row in rows]
