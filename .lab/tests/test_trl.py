"""Tests of the method on TRL: python -m pytest -q .lab/tests/test_trl.py"""

import copy
import os
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from pytest import approx, mark

pytest.importorskip("trl", minversion="1")  # a version, since our folder has the same name
pytest.importorskip("peft")

import trainer

import envs
import sdar
from test_sdar import ROOT, lines, small, table

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
    """Keeps the starts and episodes of the last step."""

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
    theirs = NotingTrainer(config, [*PLAIN, "num_iterations=2", "max_steps=2"])
    theirs.train()

    model, _ = sdar.load_policy(config)
    start, optimizer = copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=config.lr)
    teacher = start if config.teacher == "frozen" else model
    batch = sdar.step_batch(model, start, teacher, theirs.episodes, config, 1)
    assert batch["advantages"].any()
    no_names = (
        {"ratio", "policy_loss"} if config.policy_coef else {"ratio", "policy_loss", "clipped"}
    )
    for step in range(2):
        rng = np.random.default_rng(0)
        metrics = sdar.update(model, optimizer, theirs.episodes, batch, config, rng)
        logged = theirs.state.log_history[step]
        logged = {**logged, "clipped": logged["clip_ratio/region_mean"]}
        for name in {*metrics} - no_names:
            some = 0.02 if name == "gate_active" else 1e-5  # a gap of 0 may be rounded up or down
            assert logged[name] == approx(metrics[name], abs=some), name
    assert metrics["kl"] > 1e-4
    weights = theirs.policy.state_dict()
    for name, values in model.state_dict().items():
        assert torch.allclose(weights[name], values, atol=1e-5), name


def test_processes_and_accumulation_change_nothing(tmp_path, capsys):
    """What two processes leave is what sdar.py loads."""
    from safetensors.torch import load_file

    size = {"steps": 1, "tasks_per_step": 4, "group_size": 8, "minibatches": 1, "lr": 0.1}
    halved = ["steps_per_generation=2", "per_device_train_batch_size=16"]
    still = [*halved, "max_steps=2", "logging_steps=2", "learning_rate=0"]  # two optimiser steps
    found = []
    for changes in ([], [*halved, "gradient_accumulation_steps=2"], still):
        one = NotingTrainer(small(tmp_path, **size), [*PLAIN, *changes])
        one.train()
        found.append((one.policy.state_dict(), one.state.log_history[0]))
    assert found.pop()[1]["loss"] == approx(found[0][1]["loss"], abs=1e-5)
    seeds = [start[:2] for start in one.starts]
    assert all(seeds[row] == seeds[row - row % 8] for row in range(32)), "a group begins alike"
    assert len(set(seeds)) == 4

    flags = [text for name, value in size.items() for text in (sdar.flag(name), str(value))]
    flags += [text for change in PLAIN for text in ("--set", change)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [str(ROOT / ".lab/trl/trainer.py"), "--device", "cpu", "--eval-episodes", "6"]
    place = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
    out = ["--out", str(tmp_path / "two")]
    done = subprocess.run(
        [*launch, *script, *flags, *out], env=place, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    checkpoint = tmp_path / "two" / "checkpoint"
    found.append((load_file(checkpoint / "model.safetensors"), lines(tmp_path / "two")[0]))

    (weights, logged), *others = found
    for its_weights, its_log in others:
        for name in ("loss", "grad_norm", "gap", "gate", "sdar_loss"):
            assert its_log[name] == approx(logged[name], abs=1e-5), name
        for name, values in its_weights.items():
            assert torch.allclose(values, weights[name], atol=1e-6), name

    panel = ["--preset", "toy", "--device", "cpu", "--eval-episodes", "6"]
    assert sdar.main(["--steps", "0", "--model", str(checkpoint), *panel]) == 0
    assert trainer.main(out) == 2
    assert "is not empty" in capsys.readouterr().err


def test_lora_needs_no_second_copy(tmp_path):
    """The frozen teacher and the start are the base weights with the adapters off."""
    config = small(tmp_path, teacher="frozen", minibatches=1, group_size=8, lr=0.01)
    base, _ = sdar.load_policy(config)
    lora = NotingTrainer(config, PLAIN[2:], lora=4)
    assert lora.teacher is lora.policy
    assert lora.ref_model is None
    lora.train()
    frozen = lora.score(lora.teacher, lora.episodes, config, with_skill=True)
    expected = sdar.score(base, lora.episodes, config, with_skill=True)
    live = sdar.score(lora.policy, lora.episodes, config, with_skill=True)
    assert torch.allclose(frozen, expected, atol=1e-5)
    assert not torch.allclose(live, expected, atol=1e-3)
    lora.accelerator.unwrap_model(lora.model).merge_and_unload()
    merged = sdar.score(lora.policy, lora.episodes, config, with_skill=True)
    assert torch.allclose(merged, live, atol=1e-4)
    assert lora.policy.state_dict().keys() == base.state_dict().keys()


REFUSED = """
"--method rlsd"                              "--method rlsd: not on TRL"
"--save-every 2"                             "--save-every: not on TRL"
"--steps 0"                                  "--steps 0"
"--kernel"                                   "--kernel is for CUDA"
"--set optim"                                "NAME=VALUE"
"--set use_vllm=true"                        "--set use_vllm"
"--set nonsense=1"                           "GRPOConfig"
"--set optim=nonsense"                       "GRPOConfig"
"--tasks-per-step 3 --minibatches 5"         "3 tasks do not fit 1 processes, 5 --minibatches"
"--lora -1"                                  "--lora -1"
"--lora many"                                "--lora"
"--lr many"                                  "--lr"
"--out .assets"                              ".assets is not empty"
"""


@mark.parametrize("flags, message", table(REFUSED))
def test_what_trl_cannot_do_is_refused_in_one_line(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = ["--out", str(tmp_path / "run")]
    assert trainer.main([*out, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


@mark.parametrize("found, message", [(None, "pip install peft=="), ("9.9", "peft 9.9")])
def test_a_package_that_is_missing_or_untested_is_a_line(found, message, monkeypatch, capsys):
    def version(name):
        if found is None:
            raise ModuleNotFoundError(name)
        return found

    monkeypatch.setattr(trainer, "version", version)
    code = sdar.run(lambda: trainer.check_version("peft"))
    error = capsys.readouterr().err
    assert code == (2 if found is None else 0)
    assert message in error
    assert len(error.splitlines()) == 1


def test_bench_times_both(capsys):
    bench = runpy.run_path(str(ROOT / ".lab/trl/bench.py"))  # .lab has another module bench
    bench["main"].__globals__["ALTERNATIONS"] = 1
    size = "--steps 3 --tasks-per-step 2 --group-size 2 --max-turns 3".split()
    assert bench["main"](size) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"teacher: here [\d.]+, TRL [\d.]+, ratio [\d.]+", printed)) == 2
    assert bench["main"](["--steps", "2"]) == 2
