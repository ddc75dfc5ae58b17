"""Whole runs: killed at any moment, odd settings, what a run shows while it plays, and what it
keeps in memory."""

import math
import os
import random
import signal
import sys
from multiprocessing import get_context
from unittest.mock import Mock

import torch
from pytest import approx

import sdar
from test_sdar import lines, one_update, play, small, trained

# --- Kills -------------------------------------------------------------------------------


def train_until(config, left):
    """In a process: train, and be killed before a file of the run is opened or replaced: the
    `left`-th time."""

    def touched(event, args):
        nonlocal left
        if event in ("open", "os.rename") and config.out in str(args[0]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(touched)
    sdar.train(config)


def test_killed_at_any_moment_a_run_resumes_exactly(tmp_path):
    """Before one of its next files, drawn at random, again and again. A step opens or replaces
    eight; between two of them nothing on the disk changes."""
    flags = {"save_every": 1, "max_turns": 4, "retrieval": "ucb", "resume": True}
    whole = trained(tmp_path, "whole", **flags)[1]
    draw, context, codes = random.Random(22), get_context("forkserver"), [-signal.SIGKILL]
    context.set_forkserver_preload(["sdar", "transformers"])  # what takes long
    while codes[-1] == -signal.SIGKILL:
        config = small(tmp_path, **flags)
        process = context.Process(target=train_until, args=[config, draw.randrange(1, 18)])
        process.start()
        process.join()
        codes.append(process.exitcode)
    assert (codes[-1], len(codes) > 5) == (0, True)
    assert lines(tmp_path / "run") == whole
    assert len({path.read_bytes() for path in tmp_path.glob("*/checkpoint/model.saf*")}) == 1


# --- Settings --------------------------------------------------------------------------


def test_the_largest_and_smallest_settings_run(tmp_path):
    odd = {
        "minibatches": 99,
        "micro_batch": 1,
        "rollout_batch": 1,
        "max_new_tokens": 1,
        "temperature": 9,
        "eval_temperature": 0,
        "clip_eps": 0,
        "gate_beta": 1e4,
    }
    assert math.isfinite(trained(tmp_path, steps=1, **odd)[0]["loss"])


# --- What is shown, and what is kept in memory -------------------------------------------


def test_a_rollout_has_a_bar_that_moves(tiny, monkeypatch):
    bar = Mock()
    monkeypatch.setattr(sdar, "tqdm", bar)
    play(tiny, sdar.configure(group_size=2), episodes=2, max_turns=3)
    assert [move.args[0] for move in bar.return_value.update.mock_calls] == [2, 2, 1]


def test_only_little_waits_for_the_backward_pass_and_nothing_is_dropped_out():
    """Logits, and with gradient checkpointing the inside of a layer, are computed again. With
    dropout the first ratio would not be 1."""
    policy = sdar.load_policy(sdar.configure(gradient_checkpointing=True))
    widths = set()
    model = policy[0]
    model.model.layers[0].self_attn.attention_dropout = 0.5

    def noting(kept):
        widths.update(kept.shape[-1:])
        return kept

    with torch.autograd.graph.saved_tensors_hooks(noting, lambda kept: kept):
        metrics = one_update(policy, method="grpo", kl_coef=0)[1]
    assert metrics["ratio"] == approx(1, abs=1e-6)
    assert not {model.config.vocab_size, model.config.intermediate_size} & widths
