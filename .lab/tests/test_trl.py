"""Tests of the method on TRL: python -m pytest -q .lab/tests/test_trl.py"""

import copy
import os
import re
import runpy
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import LAB, call, refused
from pytest import approx, fixture, mark

pytest.importorskip("trl", minversion="1")  # a version, since our folder has the same name
pytest.importorskip("peft")

import trainer

import envs
import sdar
from test_sdar import lines, small, table

pytestmark = mark.filterwarnings("ignore")  # what TRL and PEFT use of the deprecated is not ours
PLAIN = ["optim=sgd", "weight_decay=0", "disable_tqdm=true"]  # Adam turns rounding into steps


class Lottery(envs.ToyEnv):
    """A world with examples, in which a random language model wins now and then."""

    examples = [("You see a mug.", "<action>take the mug</action>")]

    def parse(self, response):
        return response.strip() or "-", True

    def _step(self, action):
        observation, state = super()._step(action)
        return observation, {**state, "won": len(action) % 2 == 0}


class NotingTrainer(trainer.SDARTrainer):
    """Trains; keeps the starts and episodes of the last step."""

    def __init__(self, config, changes=(), lora=0):
        arguments = trainer.make_arguments(config, [*PLAIN, *changes])
        super().__init__(config, arguments, lora)
        self.train()

    def rollout(self, *played):
        self.starts = played[3]
        self.episodes = sdar.rollout(*played)
        return self.episodes


EVERY_METHOD = """
"grpo"       {}
"sdar"       {}
"opsd"       {"gate": "soft_or", "teacher": "frozen"}
"grpo_opsd"  {}
"""


@mark.parametrize("checkpoint", ["qwen2"], indirect=True)
@mark.parametrize("method, changes", table(EVERY_METHOD))
@mark.parametrize("model", ["tiny", "qwen2"])
def test_trl_takes_the_steps_of_update(model, method, changes, checkpoint, tmp_path):
    """The same episodes, two optimiser steps on all of them: the first is on policy, in the second
    one there is a ratio, a clip and a KL. Weights and metrics are equal to 1e-5. Of the tiny
    policy, and of a random Qwen2 in its own prompts, with hints and examples."""
    changes = {"minibatches": 1, "group_size": 8, "lr": 0.3, "seed": 5, **changes}
    if model == "qwen2":
        changes |= {"model": str(checkpoint), "env": f"{__name__}:Lottery", "preset": "toy"}
        changes |= {"device": "cpu", "max_turns": 2, "max_new_tokens": 6}
        changes |= {"tasks_per_step": 1, "group_size": 4}
    config = small(tmp_path, method=method, **changes)
    theirs = NotingTrainer(config, ["num_iterations=2", "max_steps=2"])

    model, _ = sdar.load_policy(config)
    start, optimizer = copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=config.lr)
    teacher = start if config.teacher == "frozen" else model
    batch = sdar.step_batch(model, start, teacher, theirs.episodes, config, 1)
    assert batch["advantages"].any()
    other_names = {"ratio", "policy_loss"} | ({"clipped"} if method == "opsd" else set())
    for logged in theirs.state.log_history[:2]:
        rng = np.random.default_rng(0)
        metrics = sdar.update(model, optimizer, theirs.episodes, batch, config, rng)
        logged["clipped"] = logged["clip_ratio/region_mean"]
        for name in {*metrics} - other_names:
            near = 0.02 if name == "gate_active" else 1e-5  # a gap of 0 may be rounded up or down
            assert logged[name] == approx(metrics[name], abs=near), name
    assert metrics["kl"] > 1e-4
    weights = theirs.policy.state_dict()
    for name, values in model.state_dict().items():
        assert torch.allclose(weights[name], values, atol=1e-5), name


SIZE = {"steps": 1, "tasks_per_step": 4, "group_size": 8, "minibatches": 1, "lr": 0.1}


@fixture(scope="module")
def one_process(tmp_path_factory):
    """A step of a single process: its trainer."""
    return NotingTrainer(small(tmp_path_factory.mktemp("one"), **SIZE))


def check_same(one_process, weights, logged):
    expected = one_process.state.log_history[0]
    for name in ("loss", "grad_norm", "gap", "gate", "sdar_loss"):
        assert logged[name] == approx(expected[name], abs=1e-5), name
    for name, values in one_process.policy.state_dict().items():
        assert name not in weights or torch.allclose(weights[name], values, atol=1e-6), name


def test_accumulation_changes_nothing(one_process, tmp_path):
    halved = ["steps_per_generation=2", "per_device_train_batch_size=16"]
    two = NotingTrainer(small(tmp_path, **SIZE), [*halved, "gradient_accumulation_steps=2"])
    check_same(one_process, two.policy.state_dict(), two.state.log_history[0])

    # Two optimiser steps that do not move have the same loss on average.
    still = [*halved, "max_steps=2", "logging_steps=2", "learning_rate=0"]
    loss = NotingTrainer(small(tmp_path, **SIZE), still).state.log_history[0]["loss"]
    assert loss == approx(one_process.state.log_history[0]["loss"], abs=1e-5)


def test_two_processes_change_nothing(one_process, tmp_path, capsys):
    """They play the tasks of sdar.py, and leave what it loads."""
    from safetensors.torch import load_file

    rng = np.random.default_rng([2, 0, 1])
    expected = sdar.draw_starts(envs.make_env("toy"), small(tmp_path, **SIZE), 1, rng)
    assert one_process.starts == expected

    flags = [text for name, value in SIZE.items() for text in (sdar.flag(name), str(value))]
    flags += [text for change in PLAIN for text in ("--set", change)]
    flags += ["--device", "cpu", "--eval-episodes", "6", "--out", str(tmp_path / "two")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launch += [LAB / "trl/trainer.py", *flags]
    place = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(launch, env=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    checkpoint = tmp_path / "two" / "checkpoint"
    weights = load_file(checkpoint / "model.safetensors")
    check_same(one_process, weights, lines(tmp_path / "two")[0])

    config = small(tmp_path, model=str(checkpoint), preset="toy", device="cpu", steps=0)
    assert sdar.train(config)["episodes"] == 6
    assert "is not empty" in refused(capsys, "trainer", *flags)


def test_lora_needs_no_second_copy(tmp_path):
    """The frozen teacher and the start are the base weights with the adapters off."""
    config = small(tmp_path, teacher="frozen", minibatches=1, group_size=8, lr=0.1)
    base, _ = sdar.load_policy(config)
    lora = NotingTrainer(config, lora=4)
    assert lora.teacher is lora.policy
    assert lora.ref_model is None
    frozen = lora.score(lora.teacher, lora.episodes, config, with_skill=True)
    expected, live = (sdar.score(m, lora.episodes, config, True) for m in (base, lora.policy))
    assert torch.allclose(frozen, expected, atol=1e-5)
    assert not torch.allclose(live, expected, atol=1e-3)
    lora.accelerator.unwrap_model(lora.model).merge_and_unload()
    merged = sdar.score(lora.policy, lora.episodes, config, with_skill=True)
    assert torch.allclose(merged, live, atol=1e-4)
    assert lora.policy.state_dict().keys() == base.state_dict().keys()


def test_without_trl_a_line_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(trainer, "GRPOTrainer", object)
    assert "pip install trl==" in refused(capsys, "trainer", "--out", tmp_path / "run")
    assert not [*tmp_path.iterdir()]


def test_bench_times_both(capsys):
    bench = runpy.run_path(str(LAB / "trl/bench.py"))  # .lab has another module bench
    bench["main"].__globals__["ALTERNATIONS"] = 1
    size = "--steps 3 --tasks-per-step 2 --group-size 2 --max-turns 3".split()
    assert sdar.run(partial(bench["main"], size)) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"teacher: here [\d.]+, TRL [\d.]+, ratio [\d.]+", printed)) == 2
    assert sdar.run(partial(bench["main"], ["--steps", "2"])) == 2
