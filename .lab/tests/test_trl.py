"""Tests of the method on TRL: python -m pytest -q .lab/tests/test_trl.py"""

import copy
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import LAB, call, refused
from pytest import approx, mark
from torch.nn.utils import parameters_to_vector as vector

pytest.importorskip("trl", minversion="1")  # a version, since our folder has the same name

import trainer

import sdar
from test_sdar import lines, small, table

pytestmark = mark.filterwarnings("ignore")  # what TRL and PEFT use of the deprecated is not ours
PLAIN = "optim=sgd weight_decay=0 disable_tqdm=true "  # Adam turns rounding into steps


class Lucky(trainer.SDARTrainer):
    """Trains on episodes of which every second one won; keeps those of the last step."""

    def __init__(self, config, changes="", lora=0):
        super().__init__(config, trainer.make_arguments(config, (PLAIN + changes).split()), lora)
        self.train()

    def rollout(self, *played):
        assert "forward" not in vars(self.policy)  # else a copy would still run the original
        self.episodes = sdar.rollout(*played)
        for row, episode in enumerate(self.episodes):
            episode.reward = row % 2
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
    policy, and of a random Qwen2 in the toy's own prompts, with instructions and hints."""
    if model == "qwen2":
        changes = {"model": checkpoint, "preset": "toy", "device": "cpu", **changes}
    changes |= {"minibatches": 1, "lr": 1, "grad_clip": 0.1, "clip_eps": 0.01, "temperature": 0.8}
    config = small(tmp_path, method=method, max_turns=3, sdar_coef=0.5, **changes)
    theirs = Lucky(config, "num_iterations=2 max_steps=2")

    model, _ = sdar.load_policy(config)
    start = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr)
    batch = sdar.step_batch(model, start, start, theirs.episodes, config, 1)
    for logged in theirs.state.log_history[:2]:
        metrics = sdar.update(model, optimizer, theirs.episodes, batch, config, np.random)
        for name in {*metrics} - {"ratio", "clipped", "policy_loss", "gate_active"}:
            assert logged[name] == approx(metrics[name], abs=1e-5)
    assert min(metrics["kl"], metrics["clipped"]) > 1e-4
    weights = vector(model.parameters()), vector(theirs.policy.parameters())
    assert torch.allclose(*weights, atol=1e-5)
    assert (theirs.teacher is theirs.policy) == (config.teacher == "live")


SIZE = """--tasks-per-step 4 --minibatches 1 --steps 2 --eval-episodes 2 --device cpu --overwrite
    --set=learning_rate=0 --set=disable_tqdm=true"""
SPLIT = """--set=steps_per_generation=4 --set=gradient_accumulation_steps=2 --set=max_steps=4
    --set=logging_steps=2 --set=per_device_train_batch_size=4"""


def test_processes_and_accumulation_change_nothing(tmp_path, monkeypatch):
    """Two optimiser steps a batch that do not move have the same loss on average as one."""
    monkeypatch.chdir(tmp_path)

    def logged():
        names = "loss gap gate sdar_loss".split()
        return [row[name] for row in lines("runs/trl")[:2] for name in names]

    assert call("trainer", *SIZE.split()) == 0
    one = logged()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launch += [LAB / "trl/trainer.py", *SIZE.split(), *SPLIT.split()]
    subprocess.run(launch, check=True)
    assert logged() == approx(one, abs=1e-5)


def test_lora_needs_no_second_copy(tmp_path):
    """The frozen teacher and the start are the base weights with the adapters off; what is left is
    an ordinary checkpoint."""
    config = small(tmp_path, teacher="frozen", minibatches=1, lr=1)
    base, _ = sdar.load_policy(config)
    lora = Lucky(config, lora=4)
    assert lora.teacher is lora.policy
    frozen = lora.score(lora.teacher, lora.episodes, config, with_skill=True)
    old = tmp_path / "run/config.json"
    old.touch()  # of the run that is replaced
    lora.finish()
    assert not old.exists()
    config.model = f"{config.out}/checkpoint"
    merged, _ = sdar.load_policy(config)
    expected, learned = (sdar.score(m, lora.episodes, config, True) for m in (base, merged))
    assert torch.allclose(frozen, expected, atol=1e-5)
    assert not torch.allclose(learned, expected, atol=1e-3)


def test_without_trl_a_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(trainer, "GRPOTrainer", object)
    assert "pip install trl==" in refused(capsys, "trainer")


def test_bench_times_both(capsys):
    bench = runpy.run_path(str(LAB / "trl/bench.py"))["main"]  # .lab has another module bench
    bench("--tasks-per-step 2 --group-size 2 --max-turns 3".split())
    assert capsys.readouterr().out.count(", ratio ") == 2
