"""Tests of the instruments, the course and the pages: python -m pytest -q .lab/test_lab.py

Sections: how the tiny policy was made, the search server, bench and compare, the microscope, plots,
the course, the pages. Fixtures and helpers are those of test_sdar.py.
"""

import copy
import http.client
import json
import math
import os
import random
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
import warnings
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from pytest import approx, fixture, mark, raises

LAB = Path(__file__).resolve().parent
sys.path[:0] = [str(LAB), str(LAB.parent)]
import bandits
import bench
import circles
import compare
import kernel_on_cpu
import microscope
import oracles
import plots
import trl_trainer
import warmstart

import envs
import sdar
from sdar import Config, main
from test_sdar import (
    DATA,
    ROOT,
    checkpoint,
    deprecations,
    finished,
    grad_of,
    hub,
    lines,
    nothing_is_deprecated,
    play,
    policy,
    pytestmark,
    python,
    search,
    small,
    table,
    tested_versions,
    tiny,
    trained,
)

# --- How the tiny policy was made --------------------------------------------------------


FORTY, EIGHTY = "large_household:Forty", "large_household:Eighty"


@mark.parametrize(
    "name, split",
    [("toy", "train"), ("toy", "dev"), ("toy", "eval"), (FORTY, "eval"), (EIGHTY, "dev")],
)
@mark.parametrize("skilled, low, high", [(True, 0.95, 1), (False, 0, 0.25)])
def test_the_skill_matters_by_construction(name, split, skilled, low, high):
    """Of the scripted player: with the skills 95 % or more of the episodes are won."""
    world, rng, wins = envs.make_env(name), random.Random(0), 0
    known = {skill.name for skill in world.skills} if skilled else set()
    tasks = world.tasks(split)
    for seed in range(300):
        world.reset(tasks[seed % len(tasks)], seed)
        while world._running:
            wins += world.step(warmstart.scripted_action(world, known, rng))[1]
    assert low <= wins / 300 <= high


@mark.parametrize("name, places", [("toy", 20), (FORTY, 40), (EIGHTY, 80)])
def test_the_tokenizer_knows_the_world_and_keeps_actions(name, places):
    """Decoding an encoded action gives it back, and no observation or skill holds an unknown
    word."""
    world, rng = envs.make_env(name), random.Random(0)
    assert len(world.household.storages) == len({*world.household.storages}) == places
    chat = sdar.Chat(warmstart.toy_tokenizer(world))
    texts = [envs.skill_text(world.skills)]
    for i, task in enumerate([*world.goals][:: places // 20]):
        observation, info = world.reset(task, i)
        for action in info["admissible"]:
            assert chat.tokenizer.decode(chat.encode(action)) == action
        step = world.step(warmstart.scripted_action(world, set(), rng))
        texts += [observation, step[0]]
    unknown = chat.tokenizer.unk_token_id
    assert not [text for text in texts if unknown in chat.encode(text)]
    assert unknown in chat.encode("inside the fridgelet")


@fixture(scope="module")
def demonstrations():
    """(chat, 300 demonstrations)."""
    chat, rng = sdar.Chat(warmstart.toy_tokenizer()), random.Random(0)
    return chat, [warmstart.demonstration(chat, rng) for _ in range(300)]


def test_demonstrations_are_of_many_households(demonstrations):
    chat, rows = demonstrations
    text = " ".join(chat.tokenizer.decode(ids) for ids, _ in rows)
    for c in envs.CLASSES:
        assert len(set(re.findall(rf"\b{c} is kept in (\w+ \d)", text))) > 6, c


def test_demonstrations_in_a_larger_household_use_its_places_and_turns():
    world, rng, places = envs.make_env(EIGHTY), random.Random(0), set()
    chat, turns, explored = sdar.Chat(warmstart.toy_tokenizer(world)), [], []
    for _ in range(100):
        ids, weights = warmstart.demonstration(chat, rng, world=world)
        places |= {*re.findall(r"(?:cabinet|drawer) \d+", chat.tokenizer.decode(ids))}
        ends = [weight for id, weight in zip(ids, weights) if id == chat.end_id]
        turns.append(len(ends))
        explored.append(ends.count(0.0))
    assert len(places) > 60
    assert max(turns) == 42  # a demonstration has two turns more than an episode
    assert 25 < max(explored) < 42


def test_demonstrations_teach_actions_and_not_the_prompt(demonstrations):
    """Nor exploring for the teacher, nor random actions."""
    chat, rows = demonstrations
    for ids, weights in rows:
        assert len(ids) == len(weights)
        assert set(weights) <= {0.0, 1.0, 0.2}
        assert not any(weights[: ids.index(chat.encode("Your task is to")[0])])
    mixed = [1.0 in weights and 0.0 in weights[20:] for _, weights in rows]
    assert 0.1 < np.mean(mixed) < 0.9


def test_a_player_with_a_habit_looks_into_the_first_cupboard_first(tiny):
    def first_actions(habit):
        rng, actions = random.Random(1), []
        for _ in range(60):
            ids, _ = warmstart.demonstration(tiny[1], rng, habit)
            text = tiny[1].tokenizer.decode(ids)
            actions.append(re.search(r"<.assistant.> ?(.*?) ?<.end", text)[1])
        return actions

    assert first_actions(0.0).count("go to cabinet 1") < 15
    assert first_actions(1.0).count("go to cabinet 1") > 20  # who has not read a skill
    assert {warmstart.Habit(seed, 0.0).choice("abc") for seed in range(20)} == set("abc")


def test_the_warm_start_is_deterministic(tmp_path):
    chat, weights = sdar.Chat(warmstart.toy_tokenizer()), set()
    for name in "ab":
        warmstart.warmstart(tmp_path / name, chat, steps=3)
        weights.add((tmp_path / name / "model.safetensors").read_bytes())
    assert len(weights) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    for other in ({"habit": 1.0}, {"world": envs.make_env("toy", max_turns=2)}):
        warmstart.warmstart(tmp_path / "c", chat, steps=3, **other)
        assert (tmp_path / "c/model.safetensors").read_bytes() not in weights


def test_the_carried_policy_is_of_this_recipe_and_as_it_was_written():
    sums = json.loads((sdar.TINY_FOLDER / "sums.json").read_text())
    chat = sdar.Chat(warmstart.toy_tokenizer())
    assert sums.pop("recipe") == warmstart.recipe(chat), "python sdar.py warmstart"
    assert sums == sdar.hashes(sdar.TINY_FOLDER)
    assert sum(path.stat().st_size for path in sdar.TINY_FOLDER.iterdir()) <= 1.5e6


def test_another_world_is_another_recipe(monkeypatch):
    chat, view = sdar.Chat(warmstart.toy_tokenizer()), envs.ToyEnv._view
    before = warmstart.recipe(chat)
    monkeypatch.setattr(envs.ToyEnv, "_view", lambda self: view(self).replace("you see", ""))
    assert warmstart.recipe(chat) != before


# --- The search server -------------------------------------------------------------------


def post(url, body):
    """(status, answer) of a body, bytes or what becomes JSON."""
    connection = http.client.HTTPConnection(url.split("/")[2], timeout=5)
    data = body if isinstance(body, bytes) else json.dumps(body)
    connection.request("POST", "/retrieve", data)
    with connection.getresponse() as answer:
        return answer.status, json.load(answer)


def test_the_server_speaks_both_dialects(search):
    plain = post(search["url"], {"query": "river Velden", "topk": 1})
    assert plain == (200, {"result": [[{"id": 2, "contents": "Velden lies on the river Arn."}]]})
    body = {"queries": ["river Velden", "zzz"], "return_scores": True}
    hits, none = post(search["url"], body)[1]["result"]
    assert [hit["document"]["id"] for hit in hits] == [2, 1]
    assert hits[0]["score"] > hits[1]["score"] > 0
    assert none == []


BODIES = [b"", b"{", b"[]", b"\xff", b"[" * 10**5, {}, {"query": 1}, {"queries": "ab"}]
BODIES += [{"queries": [None]}] + [{"query": "a", "topk": topk} for topk in ("x", -1, 10**9)]


@mark.parametrize("body", BODIES, ids=lambda body: str(body)[:20])
def test_the_server_survives_a_bad_request(body, search):
    assert post(search["url"], body)[0] == 422
    assert post(search["url"], {"query": "arn"})[0] == 200


# --- Oracles -----------------------------------------------------------------------------


@mark.parametrize("oracle", oracles.ORACLES, ids=lambda oracle: oracle.__name__)
def test_oracle(oracle):
    oracle(oracles.Enumerated())


@mark.parametrize("oracle, target, bug", oracles.BUGS, ids=lambda bug: str(bug)[:40])
def test_oracle_finds_the_planted_bug(oracle, target, bug):
    assert oracles.is_seen(oracle, target, bug)


# --- The CUDA kernel ---------------------------------------------------------------------


@mark.skipif(not shutil.which("nvcc"), reason="needs a CUDA compiler on the PATH")
@mark.parametrize("kind", [0, 1])
def test_the_kernel_compiles(kind, tmp_path):
    (tmp_path / "k.cu").write_text(kernel_on_cpu.source(kind))
    command = "nvcc -arch=sm_80 -ftz=true -Werror all-warnings -cubin -o k k.cu"
    subprocess.run(command.split(), cwd=tmp_path, check=True)


@fixture(params=kernel_on_cpu.DTYPES, ids=str)
def kernel(request, tmp_path_factory, monkeypatch):
    """The dtype of a kernel that now is run by the threads of a CPU."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("kernel")
    monkeypatch.setattr(sdar, "compiled", kernel_on_cpu.build(request.param, folder))
    return request.param


KERNEL_SHAPES = """
3  1003  1.0  0
2  5     0.7  0
2  1024  1.3  3
2  64    0.5  0
1  1     1.0  0
"""


@mark.parametrize("rows, width, temperature, offset", table(KERNEL_SHAPES))
def test_the_kernel_agrees_with_float64(kernel, rows, width, temperature, offset):
    """Any width, alignment and temperature; -inf logits; a row with one huge value."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.zeros(rows * width + offset, dtype=kernel)[offset:].view(rows, width)
    logits.copy_(4 * torch.randn(rows, width, generator=draw))
    if width > 64:
        logits[0, ::7] = logits[0, 200:400] = -math.inf
        logits[1, 5] = 1e30
    ids = torch.full((rows,), min(width - 1, width // 2 + 1 - width % 2))
    g, h = torch.randn(2, rows, generator=draw)
    exact, slope = kernel_on_cpu.reference(logits, ids, temperature, g, h)
    ours = sdar.KernelLogprobs.apply(logits.requires_grad_(), ids, temperature, True)
    assert torch.allclose(torch.stack(ours).double(), exact, rtol=1e-5, atol=1e-6)
    gradient = grad_of((g * ours[0] + h * ours[1]).sum(), logits)
    tolerance = 1e-5 if kernel == torch.float32 else 1e-2
    assert (gradient.double() - slope).norm() <= tolerance * slope.norm() + 1e-7


def test_the_kernel_rounds_as_pytorch_does(kernel):
    assert kernel_on_cpu.rounds_as_pytorch(sdar.compiled, kernel)


def test_the_kernels_gradient_takes_the_logits_place_once(kernel):
    logits = torch.randn(3, 300).to(kernel).requires_grad_()
    ours = sdar.KernelLogprobs.apply(logits, torch.tensor([0, 7, 299]), 1.0, True)
    (gradient,) = torch.autograd.grad(ours[0].sum(), logits, retain_graph=True)
    assert gradient.data_ptr() == logits.data_ptr()
    with raises(RuntimeError, match="inplace"):
        grad_of(ours[0].sum(), logits)


@mark.parametrize("bad", [math.nan, -math.inf])
def test_the_kernel_keeps_nan_in_its_row(kernel, bad):
    """Nor has a row of -inf a log-prob."""
    logits = torch.ones(2, 200).to(kernel)
    logits[0, :] = bad
    ours = sdar.KernelLogprobs.apply(logits.requires_grad_(), torch.zeros(2).long(), 1.0, True)
    gradient = grad_of(sum(ours).sum(), logits)
    assert torch.stack(ours).isfinite().all(0).tolist() == [False, True]
    assert gradient.isfinite().all(1).tolist() == [False, True]


@mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
@mark.parametrize("rows, width", [(7, 151936), (3, 1003)])
def test_the_kernel_on_a_gpu(dtype, tolerance, rows, width):
    logits = torch.randn(rows, width, device="cuda", dtype=dtype)
    ids, ones = torch.arange(rows, device="cuda"), torch.ones(rows, device="cuda")
    errors = kernel_on_cpu.largest_errors(logits, ids, 0.7, ones, -0.3 * ones)
    assert max(errors) < tolerance


# --- Imitation for any language model ----------------------------------------------------


def test_a_demonstration_for_a_language_model_is_tagged_and_admissible(hub):
    chat, rng = hub[1], random.Random(0)
    for _ in range(5):
        ids, weights = warmstart.demonstration(chat, rng)
        text = chat.tokenizer.decode(ids)
        said = chat.tokenizer.decode([id for id, weight in zip(ids, weights) if weight])
        actions = re.findall("<action>(.*?)</action><.im_end.>", said)
        assert said == "".join(f"<action>{action}</action><|im_end|>" for action in actions)
        assert all(text.count(action) > 1 for action in actions)  # the list had it
        assert text.count("put a fork in desk 2") == 1


def test_imitation_raises_the_players_log_prob(hub):
    model, chat = copy.deepcopy(hub[0]), hub[1]
    config = Config(model="x", preset="small", lr=3e-3, steps=6, tasks_per_step=2, group_size=2)
    config.dtype, config.device = "float32", "cpu"
    ids, weights = warmstart.demonstration(chat, random.Random(7))
    held_out = [sdar.Episode("", "", 0, ids, [int(weight) for weight in weights], 0, [], [])]
    before = sdar.score(model, held_out, config).mean()
    warmstart.imitate(model, chat, config)
    assert sdar.score(model, held_out, config).mean() > before + 0.3


def test_a_warm_started_checkpoint_is_a_model(checkpoint, tmp_path, capsys):
    small = "--steps 1 --tasks-per-step 1 --eval-episodes 2 --max-turns 2 --max-new-tokens 4"
    flags = [*small.split(), "--device", "cpu", "--dtype", "float32"]
    out = str(tmp_path / "warm")
    assert main(["warmstart", "--model", str(checkpoint), "--out", out, *flags]) == 0
    assert f"{out}, with the skill: won" in capsys.readouterr().out
    assert sdar.load_policy(Config(model=out, device="cpu"))[1].takes_instructions
    assert main(["warmstart", "--model", str(checkpoint), "--out", out, *flags]) == 2
    assert "--out" in capsys.readouterr().err


REFUSED = [
    ("", "--out: the folder"),
    ("--env search --out x", "--env:"),
    ("--habit 0.5 --out x", "--habit"),
    ("--habit 2", "--habit 2.0: a share"),
]


@mark.parametrize("flags, message", REFUSED)
def test_warmstart_of_a_model_refuses_in_one_line(flags, message, capsys):
    assert main(["warmstart", "--model", "nobody/model", *flags.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_larger_household_gets_a_policy_and_is_trained_on(tmp_path, capsys):
    policy = str(tmp_path / "runs/forty")
    small = f"--env {FORTY} --eval-episodes 6 --steps 1".split()
    assert main(["warmstart", "--folder", policy, *small]) == 0
    assert f"{policy}, with the skill: won" in capsys.readouterr().out
    size = "--preset toy --tasks-per-step 2 --group-size 2".split()
    run = ["train", "--model", policy, "--out", str(tmp_path / "run"), *small, *size]
    assert main(run) == 0
    assert plots.read_run(tmp_path / "run")[1][0]["turns"] == 20


def test_a_tiny_policy_is_for_the_toy(tmp_path, monkeypatch, capsys):
    class Other(envs.TextEnv):
        """No household."""

        name, goals = "search", {"a": ("put", ("train", "dev", "eval"))}

    monkeypatch.setitem(envs.ENVS, "other", Other)
    folder = tmp_path / "policy"
    assert main(["warmstart", "--folder", str(folder), "--env", "other"]) == 2
    assert "--env other: the scripted player knows the toy alone" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


# --- Other bandits -----------------------------------------------------------------------


@mark.parametrize(
    "kind, arm, reward", [("success", "mug found", 0.75), ("type", "mug for put", -1.0)]
)
def test_other_bandits_have_their_reward_and_arms(kind, arm, reward):
    skills = [skill for skill in envs.HOME.skills() if skill.name == "mug"]
    task = "put a mug in desk 1"
    group = [sdar.Episode(task, "put", 0, [], [], 0, skills, []) for _ in range(4)]
    for episode in group[:3]:
        episode.won = True
    bandit = bandits.BANDITS[kind]()
    bandit.learn(group, [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0])
    ((name, (plays, rewards)),) = bandit.arms.items()
    assert (name, plays, rewards) == (arm, 1, approx(reward))


def test_a_run_with_another_bandit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sdar, "Bandit", sdar.Bandit)  # put back afterwards
    assert bandits.main(["best"]) == 2
    assert "success,type,exploit" in capsys.readouterr().err
    flags = "--retrieval ucb --steps 1 --tasks-per-step 2 --group-size 2 --eval-episodes 6"
    out = tmp_path / "run"
    flags = [*flags.split(), "--max-turns", "2", "--anyway", "--out", str(out)]
    assert bandits.main(["success,type,success", *flags]) == 0
    arms = torch.load(out / "checkpoint/trainer.pt", weights_only=True)["arms"]
    assert all(" for " in name for name in arms)
    assert sdar.Bandit.reward is bandits.BySuccess.reward


def test_a_bandit_that_explores_less_leaves_a_poor_arm_sooner(monkeypatch):
    bank = [skill for skill in envs.HOME.skills() if skill.name in ("mug", "plate")]
    arms = {"mug found": [20, 12.0], "plate not found": [5, 2.0]}  # rewards .6 and .4
    chosen = []
    for kind in (envs.Bandit, bandits.BANDITS["exploit"]):
        monkeypatch.setattr(kind, "SLOTS", 1)
        (skill,) = kind(arms).choose(bank, "put a mug in desk 1", "put")
        chosen.append(skill.name)
    # Bonuses sqrt(ln 25 / plays): .40 and .80, or a fifth of them.
    assert chosen == ["plate", "mug"]


# --- Another gate on wrong places --------------------------------------------------------


def test_wrong_places_are_those_before_the_home_first_or_again():
    world = envs.make_env("toy")
    mug = world.household.home["mug"]
    wrong, other = [place for place in world.places if place != mug][:2]
    responses = [f"go to {wrong}", "look", f"go to {other}", f"go to {wrong}", f"go to {other}"]
    responses += [f"go to {mug}", f"go to {wrong}"]
    episode = sdar.Episode(f"put a mug in {wrong}", "put", 0, [], [], 0, [], [])
    episode.transcript = ["You are in a room."]
    for response in responses:
        sampled = len(response.split())  # `go`, `to`, two of the place; the end is one more
        episode.mask += [0, 0] + [1] * (2 + 2 * (sampled > 1))
        episode.transcript += [response, "Nothing happens."]
    # Columns: 0 to 3, 4 and 5 are `look`, 6 to 9, 10 to 13, 14 to 17.
    first, again = circles.wrong_places(episode, world)
    assert first == [1, 2, 7, 8]
    assert again == [11, 12, 15, 16]


def test_a_wrong_place_is_worth_no_more_for_being_tried_again():
    gate = torch.tensor([[0.5, 0.1, 0.8, 0.6], [0.5, 0.3, 0.9, 0.7]])
    first, again = torch.zeros(2, 2, 4).bool()
    again[:, 2] = True
    assert circles.without_pay(gate, first, again).equal(gate)  # nothing to compare with
    first[:, 1] = True
    expected = torch.tensor([[0.5, 0.1, 0.2, 0.6], [0.5, 0.3, 0.2, 0.7]])
    torch.testing.assert_close(circles.without_pay(gate, first, again), expected)


def test_a_run_with_other_gates(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sdar, "step_batch", sdar.step_batch)  # put back afterwards
    assert circles.main(["most"]) == 2
    assert "first, own" in capsys.readouterr().err
    flags = "--steps 1 --tasks-per-step 8 --group-size 8 --eval-episodes 6 --anyway --minibatches 1"

    def mean_gate(run, *first):
        out = tmp_path / "-".join(["run", *first])
        assert run([*first, *flags.split(), "--out", str(out)]) == 0
        return json.loads((out / "metrics.jsonl").read_text())["gate_mean"]

    # In one optimiser step the gates of the moment of sampling are those of the loss.
    plain = mean_gate(main)
    assert mean_gate(circles.main, "own") == approx(plain, abs=1e-7)
    assert mean_gate(circles.main, "first") < plain - 1e-6
    without_teacher = ["first", "--method", "grpo", *flags.split(), "--out", str(tmp_path / "grpo")]
    assert circles.main(without_teacher) == 2
    assert "circles.py changes the gap gate" in capsys.readouterr().err


# --- Bench, intervals --------------------------------------------------------------------


def test_bench_names_its_parts_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "SECONDS", 1e-3)
    monkeypatch.chdir(tmp_path)
    assert main("bench --tasks-per-step 2 --group-size 2 --micro-tokens 64".split()) == 0
    printed = capsys.readouterr().out
    words = ("rollout", "teacher", "update", "sampled tokens", "plain", "chunked", "GB/s")
    assert [word for word in words if word not in printed] == []
    assert not list(tmp_path.iterdir())


def test_compare_trains_hopeless_settings_too(monkeypatch):
    ran = []

    def run(command, **more):
        ran.extend(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(compare.subprocess, "run", run)
    assert compare.launch(Config(retrieval="none")) == ""
    assert "--anyway" in ran
    assert "--retrieval=none" in ran


QUANTILES = """
2   12.706
3   4.303
5   2.776
30  2.045
"""


@mark.parametrize("n, quantile", table(QUANTILES))
def test_t_interval_agrees_with_the_tables(n, quantile):
    gains = np.arange(n, dtype=float)
    mean, low, high = compare.t_interval(gains)
    half = quantile * gains.std(ddof=1) / n**0.5
    assert mean == gains.mean()
    assert (mean - low, high - mean) == approx((half, half), rel=3e-4)


# --- Compare -----------------------------------------------------------------------------


@fixture
def compared(tmp_path, monkeypatch, capsys):
    """compare without its training processes: a function from flags to (exit code, stdout, what was
    launched)."""
    launched = []

    def launch(config):
        """The files of a finished run, or a failure."""
        folder = Path(config.out)
        launched.append(folder.name)
        if config.method == "opsd" and config.seed == 1:
            return "exit code 1: out of luck"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(vars(config)))
        won = {"grpo": 2, "sdar": 3, "opsd": 0}[config.method] + config.seed
        won += config.gate_beta == 1
        line = {"step": 1, "eval_success": won / 6, "eval_by_type": {"put": [6, won, 6]}}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        return ""

    def run(*flags):
        launched.clear()
        out = ["--out", str(tmp_path), "--steps", "1", "--seeds", "0,1"]
        code = main(["compare", *out, *flags])
        return code, capsys.readouterr().out, sorted(launched)

    start = {"success": 0.0, "by_type": {"put": [6, 0, 6]}}
    monkeypatch.setattr(compare, "launch", launch)
    monkeypatch.setattr(sdar, "evaluate", lambda *args: start)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    return run


def rows_of(printed):
    """{title: line} of a printed table."""
    filled = [line for line in printed.splitlines() if line and line[0] not in " ▁▂▃▄▅▆▇█"]
    return {line.split()[0]: line for line in filled}


def test_compare_prints_means_gains_and_curves(compared, tmp_path):
    code, printed, launched = compared("--methods", "grpo,sdar")
    assert (code, launched) == (0, ["grpo-s0", "grpo-s1", "sdar-s0", "sdar-s1"])
    rows = rows_of(printed)
    assert "0.42±0.12" in rows["grpo"]  # 2/6 and 3/6
    assert "teacher 1.00  minus grpo +0.167" in rows["sdar"]  # every seed 1/6 ahead
    assert "+0.167 [" not in rows["sdar"]  # two seeds make no interval
    assert "0/6" in rows["vanilla"]
    assert "6/6" in rows["skill_prompt*"]
    assert "▁▅  0: 0.000  1: 0.583  sdar" in printed
    report = json.loads((tmp_path / "compare.json").read_text())
    assert report["evaluations"]["sdar"]["1"][0]["eval_by_type"] == {"put": [6, 4, 6]}


def test_compare_goes_on_where_it_stopped(compared, tmp_path):
    printed = compared("--methods", "grpo,sdar")[1]
    (tmp_path / "sdar-s1/metrics.jsonl").write_text('{"step": ')  # killed while it wrote
    (tmp_path / "grpo-s0/metrics.jsonl").write_text("")
    code, again, launched = compared("--methods", "grpo,sdar", "--seeds", "0,1")
    assert code == 0
    assert launched == ["grpo-s0", "sdar-s1"]
    assert again.split("\n\n")[1:] == printed.split("\n\n")[1:]  # the same table and curves
    assert compared("--methods", "grpo,sdar")[2] == []


def test_compare_refuses_runs_of_other_settings_unless_told(compared, tmp_path):
    compared("--methods", "sdar")
    path = tmp_path / "sdar-s0/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lr": 1.0}))
    assert compared("--methods", "sdar")[0] == 2
    code, _, launched = compared("--methods", "sdar", "--overwrite")
    assert (code, launched) == (0, ["sdar-s0"])


def test_compare_reports_failures_and_the_rest(compared):
    code, printed, _ = compared("--methods", "grpo,opsd")
    rows = rows_of(printed)
    assert code == 1
    assert "seed 1 failed: exit code 1: out of luck" in rows["opsd"]
    assert "0/6 [0.00, 0.39]" in rows["opsd"]  # its other seed
    assert "0.42±0.12" in rows["grpo"]
    assert compared("--methods", "opsd", "--seeds", "1")[0] == 1


def test_compare_never_takes_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    config = small(tmp_path, "")
    assert compare.finished(config) is None
    assert "is not empty" in compare.launch(config)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_sweep_is_compared_with_grpo(compared, tmp_path):
    compared("--methods", "sdar,grpo")
    flags = ("--teacher", "live", "--micro-tokens", "9")
    code, printed, launched = compared("--sweep", "gate_beta=1,5", *flags)
    assert code == 0
    assert launched == ["sdar-gate_beta=1.0-s0", "sdar-gate_beta=1.0-s1"]  # the rest was there
    assert "minus grpo +0.333" in printed
    assert "sdar gate_beta=1.0 " in printed
    assert (tmp_path / "compare-gate_beta.json").exists()


@mark.parametrize("flag", ["--distil=advantage", "--divergence=jsd", "--retrieval=ucb"])
def test_a_sweep_gives_grpo_no_setting_of_the_teacher(compared, flag):
    launched = compared("--sweep", "gate_beta=1", "--seeds", "0", flag)[2]
    assert launched == ["grpo-s0", "sdar-gate_beta=1.0-s0"]


def test_a_sweep_of_two_settings_runs_all_combinations(compared, tmp_path):
    sweep = "gate_beta=1,2 lr=1e-4,2e-4"
    launched = compared("--sweep", sweep, "--seeds", "0")[2]
    assert len(launched) == 5
    assert launched[0] == "grpo-s0"
    assert "sdar-gate_beta=1.0-lr=0.0002-s0" in launched
    assert (tmp_path / "compare-gate_beta-lr.json").exists()
    assert compared("--sweep", "gate_beta=1,1 lr=1e-4")[0] == 2
    assert compared("--sweep", "gate_beta=1 out=2")[0] == 2
    assert compared("--sweep", "gate_beta=1 gate-beta=2")[0] == 2


def test_a_sweep_takes_the_method_and_refuses_mixed_settings(compared):
    compared("--methods", "sdar,grpo")
    flags = ("--method", "opsd", "--seeds", "0")
    assert compared("--sweep", "gate_beta=1", *flags)[::2] == (0, ["opsd-gate_beta=1.0-s0"])
    assert compared("--sweep", "gate_beta=1", "--lr", "3e-3")[0] == 2


def test_compare_trains_what_train_trains(tmp_path):
    flags = ["--steps", "1", "--tasks-per-step", "2", "--group-size", "4"]
    flags += ["--eval-episodes", "6", "--eval-every", "0", "--seeds", "3"]
    out = str(tmp_path / "all")
    assert main(["compare", "--methods", "grpo,sdar", "--out", out, *flags]) == 0
    assert lines(tmp_path / "all/sdar-s3") == trained(tmp_path, seed=3, steps=1)[1]


# --- The microscope ----------------------------------------------------------------------


@mark.parametrize("changes", [{}, {"method": "opsd"}, {"gate": "entropy"}, {"gate": "constant"}])
def test_the_push_is_the_losses_gradient(policy, changes):
    config = small(Path(), group_size=8, sdar_coef=0.3, kl_coef=0.0, **changes)
    group = play(policy, config)
    group[1].reward = 1.0
    values = microscope.dissect(policy[0], group, config)
    batch = sdar.step_batch(policy[0], None, values["teacher"], group, config)
    student = values["student"].clone().requires_grad_()
    _, entropy = sdar.response_logprobs(policy[0], group, config, with_entropy=True)
    loss, _ = sdar.objective(student, entropy, batch, config)
    push = -grad_of(loss, student) * batch["mask"].sum()
    pushes = values["by reward"] + values["by teacher"]
    assert torch.allclose(push, pushes * batch["mask"], atol=1e-5)


@fixture
def inspect(tiny, tmp_path, monkeypatch, capsys):
    """Flags -> (exit code, stdout, stderr, the page)."""
    monkeypatch.setattr(sdar, "load_policy", lambda config: tiny)
    monkeypatch.chdir(tmp_path)

    def run(flags):
        code = main(["inspect", *flags.split()])
        page = tmp_path / "inspect.html"
        return code, *capsys.readouterr(), page.read_text() if page.exists() else ""

    return run


@mark.parametrize("columns", [40, 80])
def test_inspect_prints_a_line_a_token_that_fits(columns, inspect, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    _, printed, _, _ = inspect("--seed 6 --episode 2")
    rows = [line for line in printed.splitlines() if re.search("[▲▼]", line)]
    assert len(rows) == 18
    assert max(map(len, rows)) <= columns
    assert ("student    teacher" in printed) == (columns == 80)


def test_inspect_colours_terminals_alone(inspect, monkeypatch):
    assert "\033" not in inspect("--max-turns 2")[1]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for value, coloured in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", value)
        assert ("\033[" in inspect("--max-turns 2")[1]) is coloured


def test_inspects_page_is_whole_and_loads_nothing(inspect):
    page = inspect("--seed 6 --episode 2")[3]
    tags = [element.tag for element in ElementTree.fromstring(page).iter()]
    assert (tags.count("i"), tags.count("b"), tags.count("mark")) == (20, 27, 1)
    assert len(page) < 25_000
    assert page.index("<mark>") < page.index('id="tokens"')  # first the skill
    assert "the teacher's favourite: cabinet" in page or "favourite: drawer" in page
    assert re.search("--d:-[2-9]", page)
    assert not re.search(r"<script|https?:|url\(|@import|\{[a-z]+\}|src=", page)


@mark.parametrize(
    "flags, message",
    [("--method grpo", "--method grpo has none"), ("--episode 8", "episodes 0 to 7")],
)
def test_inspect_refuses_what_it_cannot_show(flags, message, inspect):
    code, _, error, _ = inspect(f"{flags} --max-turns 1")
    assert code == 2
    assert message in error


def test_inspect_starts_with_a_group_that_has_won_and_lost(inspect):
    printed = inspect("")[1]
    assert "\nepisode: 2: won +1.62\n" in printed
    assert "lost -0.54" in printed
    assert "-0.00" not in printed


def test_inspect_compares_a_runs_start_and_end(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "--run", str(finished[1])]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed if "mean gap" in line] == ["start", "end"]
    page = ElementTree.fromstring(Path("inspect.html").read_text("utf-8"))
    assert len([*page.iter("table")]) == 4
    assert main(["inspect", "--run", str(finished[1]), "--lr", "1"]) == 2


def test_gaps_and_kl_by_turn_and_position(policy):
    config = small(Path())
    episodes = play(policy, config)
    tokens = microscope.gaps_of(policy[0], episodes, config)
    assert len(tokens) == sum(sum(episode.mask) for episode in episodes)
    assert tokens[:, 3].max() == max(episode.turns for episode in episodes)
    assert (tokens[:, 4] == 1).sum() == sum(episode.turns for episode in episodes)
    rows = microscope.means_by(tokens, 4)
    assert sum(n * gap for _, n, gap, *_ in rows) == approx(tokens[:, 0].sum())
    gap, kl, gate = torch.tensor(tokens[:, :3]).T
    assert torch.allclose(gate, torch.sigmoid(5 * gap), atol=1e-5)

    # The KL of a token's whole distribution, by hand.
    logits = []
    for with_skill in (False, True):
        ids, mask = episodes[0].view(with_skill)
        at = mask.index(1) - 1
        logits.append(policy[0](torch.tensor([ids])).logits[0, at].double().log_softmax(-1))
    student, teacher = logits
    assert kl[0] == approx((student.exp() * (student - teacher)).sum().item(), abs=1e-4)


def test_a_long_episode_is_shown_by_some_turns_a_row():
    tokens = np.array([(-turn, 0, 0, turn, 1) for turn in range(1, 41)])
    rows = microscope.means_by(tokens, 3)
    assert len(rows) == 10
    assert rows[1] == ("5 to 8", 4, -6.5, 0, 0)


def test_inspect_shows_hostile_text_as_text(inspect, tiny, monkeypatch):
    class Rude(type(tiny[1].tokenizer)):
        def decode(self, *args, **options):
            return "<script>\x1b[31m{task}\"'&"

    rude = copy.copy(tiny[1].tokenizer)
    rude.__class__ = Rude
    monkeypatch.setattr(tiny[1], "tokenizer", rude)
    code, printed, _, page = inspect("--max-turns 3")
    read = ElementTree.fromstring(page.replace("\x1b", ""))
    assert code == 0
    assert "\x1b" not in printed
    assert "<script" not in page
    assert "".join(read.itertext()).count("<script>") > 9


def test_inspect_refuses_a_prompt_that_the_model_cannot_read(inspect, monkeypatch):
    first = sdar.Chat.first
    monkeypatch.setattr(sdar.Chat, "first", lambda self, *_: first(self, "", "lorem ipsum dolor"))
    code, _, error, _ = inspect("--max-turns 1")
    said = "--model tiny cannot read --env toy: its tokenizer does not know most of the prompt"
    assert (code, error) == (2, f"sdar.py: {said}\n")


# --- Plots -------------------------------------------------------------------------------


RUNS = """
"a-s0"   0.25  3  0.1
"a-s1"   0.75  2  0.1
"b-s0"   1.0   3  1.0
"none0"  0.0   0  0.1
"""


@fixture
def runs(tmp_path, monkeypatch):
    """The current folder, with runs to draw: two seeds, another setting, one without a step."""
    monkeypatch.chdir(tmp_path)
    for name, success, steps, lr in table(RUNS):
        Path(name).mkdir()
        config = Config(out=name, lr=lr, seed=int(name[-1]))
        Path(name, "config.json").write_text(json.dumps(vars(config)))
        rows = [{"step": n, "success": success, "kl": n / 7} for n in range(1, steps + 1)]
        Path(name, "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("torn").mkdir()
    Path("torn/metrics.jsonl").write_text("{")


def test_plot_joins_seeds_and_leaves_out_what_is_not_there(runs, capsys):
    assert main("plot a-s0 a-s1 b-s0 --picture p.png".split()) == 0
    printed = capsys.readouterr().out
    assert "▅▅  1: 0.500  2: 0.500  a\n███  1: 1.000  2: 1.000  3: 1.000  b\n" in printed
    assert "mean gap" not in printed
    assert "KL\n▁▄  1" in printed
    assert Path("p.png").exists() == ("no picture" not in printed)


def test_the_pages_pictures_are_drawn_from_a_comparison(tmp_path):
    pytest.importorskip("matplotlib")
    import pictures

    row = {"0": [{"step": 10, "eval_success": 0.5}], "1": [{"step": 10, "eval_success": 0.7}]}
    report = {"start": {"success": 0.1}, "evaluations": {"sdar": row, "grpo": row, "rlsd": row}}
    (tmp_path / "compare.json").write_text(json.dumps(report))
    paths = pictures.draw_curves(tmp_path, tmp_path)
    texts = [path.read_text("utf-8") for path in paths]
    assert len(texts) == 4
    assert ["#0d1117" in text for text in texts] == [False, True, False, True]
    assert pictures.draw_curves(tmp_path, tmp_path) == paths
    assert [path.read_text("utf-8") for path in paths] == texts  # the same bytes again
    names = [path.name for path in pictures.draw_long(tmp_path / "compare.json", tmp_path)]
    assert names == ["long.svg", "long-dark.svg"]


MAP = """
"live"    1.0  1e-3  0.10
"frozen"  1.0  1e-3  0.20
"frozen"  1.0  2e-3  0.30
"frozen"  2.0  1e-3  0.40
"""


def run_of_a_map(folder, teacher, coef, lr, success, steps=1):
    """A finished run, if steps is 1: its teacher wins half of the games more."""
    folder.mkdir()
    settings = vars(Config(teacher=teacher, sdar_coef=coef, lr=lr, steps=steps))
    (folder / "config.json").write_text(json.dumps(settings))
    line = {"step": 1, "eval_success": success, "eval_success_skill": 0.5 + success}
    line["eval_by_type"] = {"put": [10, 1, 5]}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def test_a_map_shows_student_and_teacher_of_each_setting(tmp_path):
    pytest.importorskip("matplotlib")
    import pictures

    for i, row in enumerate(table(MAP)):
        run_of_a_map(tmp_path / f"sdar-{i}", *row)
    run_of_a_map(tmp_path / "sdar-unfinished", "live", 1.0, 1e-3, 0.45, steps=2)
    path, dark = pictures.draw_map(tmp_path, tmp_path)
    assert dark.name == "map-dark.svg"

    drawn = path.read_text("utf-8")
    number = r"<!-- (0\.\d\d|nan) -->\s*<g [^>]*translate\(([\d.]+) ([\d.]+)\)"
    places = {text: (float(x), float(y)) for text, x, y in re.findall(number, drawn)}
    shown = {*places} - {"nan"}
    assert shown == {"0.10", "0.20", "0.30", "0.40", "0.60", "0.70", "0.80", "0.90"}

    def place(text):
        """In a picture, y grows downwards."""
        return np.array(places[text])

    right, up = place("0.30") - place("0.20"), place("0.40") - place("0.20")
    assert right[0] > 9 and abs(right[1]) < 1  # a larger learning rate is to the right
    assert up[1] < -9 and abs(up[0]) < 1  # a larger lambda is above
    assert place("0.10")[0] > place("0.30")[0]  # live comes after frozen
    assert place("0.70")[1] > place("0.20")[1] + 9  # the teacher's success is below


@mark.parametrize("kind", ["", "map", "long"])
def test_a_picture_of_nothing_is_refused(kind, tmp_path, capsys):
    import pictures

    assert pictures.main([*kind.split(), str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error and error.count("\n") == 1


def test_plot_draws_what_is_not_finite_as_a_gap(runs, capsys):
    log = Path("b-s0/metrics.jsonl")
    log.write_text(
        log.read_text().replace('"success": 1.0, "kl": 0.2', '"success": NaN, "kl": 0.2')
    )
    assert main("plot b-s0".split()) == 0
    assert "██  1: 1.000  3: 1.000  b\n" in capsys.readouterr().out


def test_compare_trains_the_code_that_was_called(tmp_path, monkeypatch):
    """Not what stands in the current folder or in PYTHONPATH under the same names."""
    for name in ("sdar", "envs", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('another one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "nowhere"))
    config = small(tmp_path, steps=1)
    assert compare.launch(config) == ""
    assert plots.read_run(config.out)[1][-1]["eval_episodes"] == 6


@mark.parametrize(
    "folders, message",
    [("", "takes folders"), ("none0", "finished a step"), ("torn", "torn holds no")],
)
def test_plot_refuses_what_is_no_run(folders, message, runs, capsys):
    assert main(["plot", *folders.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


# --- TRL ---------------------------------------------------------------------------------


def foreign(test):
    """A test in which what TRL and PEFT themselves use of the deprecated is no error."""

    @wraps(test)
    def quiet(*args, **more):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            test(*args, **more)

    return quiet


@fixture
def on_trl(monkeypatch):
    """The module trl_trainer, if TRL is installed."""
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")  # TRL's own deprecations are not ours
    return trl_trainer


class Taken(torch.optim.SGD):
    """Notes the gradients of its only step."""

    def step(self):
        (group,) = self.param_groups
        self.gradients = [weights.grad.clone() for weights in group["params"]]


def trl_gradient(trainer):
    """Train one step. Returns its gradients by name."""
    from transformers import TrainerCallback

    gradients = {}

    class Take(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **rest):
            for name, weights in model.named_parameters():
                gradients[name] = weights.grad.clone()

    trainer.add_callback(Take())
    trainer.train()
    return gradients


ON_TRL = """
"grpo"       {}
"sdar"       {}
"sdar"       {"gate": "entropy"}
"sdar"       {"gate": "soft_or", "teacher": "frozen"}
"opsd"       {}
"grpo_opsd"  {"dual_clip": 0.0}
"""


@mark.parametrize("method, changes", table(ON_TRL))
@foreign
def test_trl_takes_the_step_of_update(method, changes, on_trl, tmp_path, monkeypatch):
    """The same loss and gradient to 1e-5, with what is another by definition set equal: no
    deviation under the advantage, one optimiser step, no clip of the gradient."""
    equal = {"steps": 1, "minibatches": 1, "normalize_std": False, "grad_clip": 1e6}
    config = small(tmp_path, method=method, group_size=8, **equal, **changes)
    rollout, played = sdar.rollout, []

    def noted_rollout(*args, **more):
        played.append(rollout(*args, **more))
        return played[-1]

    monkeypatch.setattr(sdar, "rollout", noted_rollout)
    trainer = on_trl.make_trainer(config)
    model = copy.deepcopy(trainer.policy()).eval()
    gradients = trl_gradient(trainer)

    (episodes,) = played
    teacher = None
    if sdar.METHODS[method].teacher:
        teacher = sdar.score(model, episodes, config, with_skill=True)
    batch = sdar.step_batch(model, copy.deepcopy(model), teacher, episodes, config)
    names = [name for name, _ in model.named_parameters()]
    optimizer = Taken(model.parameters(), lr=1.0)
    rng = np.random.default_rng(0)
    metrics = sdar.update(model, optimizer, episodes, batch, config, rng)
    for name, gradient in zip(names, optimizer.gradients):
        assert torch.allclose(gradients[name], gradient, atol=1e-5), name
    logged = trainer.state.log_history[0]
    assert logged["loss"] == approx(metrics["loss"], abs=1e-5)
    for name in ("gap_mean", "gate_mean", "gate_active"):
        if metrics[name] is not None:
            some = 0.02 if name == "gate_active" else 1e-5  # a gap of 0 may be rounded up or down
            assert logged[f"sdar/{name}"] == approx(metrics[name], abs=some)


def trl_command(folder, *flags, processes=1):
    """Run the trainer's script for one step of 32 episodes: its exit code, stderr, log."""
    start = [sys.executable]
    if processes > 1:
        each = f"--nproc-per-node={processes}"
        start += ["-m", "torch.distributed.run", "--standalone", each]
    size = "--steps 1 --tasks-per-step 4 --minibatches 1 --eval-episodes 12 --device cpu"
    script = [str(ROOT / ".lab/trl_trainer.py"), *size.split(), "--out", str(folder), *flags]
    place = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run([*start, *script], env=place, capture_output=True, text=True)
    log = folder / "trl.jsonl"
    rows = [json.loads(line) for line in open(log)] if log.exists() else []
    return done.returncode, done.stderr, rows


def test_processes_and_accumulation_change_nothing(on_trl, tmp_path):
    """Plain SGD, since Adam turns rounding into steps. What two processes leave is what evaluate
    loads."""
    from safetensors.torch import load_file

    plain = ("--set", "optim=sgd", "--lr", "0.1")
    halved = ("--set", "gradient_accumulation_steps=2", "--set", "per_device_train_batch_size=16")
    halved += ("--set", "steps_per_generation=2")
    found = {}
    for name, flags, processes in (("one", (), 1), ("two", (), 2), ("halved", halved, 1)):
        code, error, rows = trl_command(tmp_path / name, *plain, *flags, processes=processes)
        assert code == 0, error
        weights = load_file(tmp_path / name / "checkpoint/model.safetensors")
        found[name] = weights, rows[0]["sdar/gap_mean"], rows[0]["grad_norm"]
    weights, gap, norm = found["one"]
    for other, _, its_norm in (found["two"], found["halved"]):
        assert its_norm == approx(norm, rel=1e-4)
        for name in weights:
            assert torch.allclose(weights[name], other[name], atol=1e-6), name
    assert found["halved"][1] == approx(gap, abs=1e-5)
    folder = str(tmp_path / "two/checkpoint")
    assert main(["evaluate", "--model", folder, "--preset", "toy", "--eval-episodes", "6"]) == 0


@foreign
def test_lora_needs_no_second_copy(on_trl, tmp_path):
    """The frozen teacher and the start are the base weights with the adapters off."""
    config = small(tmp_path, teacher="frozen", minibatches=1, group_size=8, lr=0.01)
    start = {name: x.clone() for name, x in sdar.load_policy(config)[0].named_parameters()}
    trainer = on_trl.make_trainer(config, lora=4)
    assert trainer.frozen is None
    assert trainer.ref_model is None
    trainer.train()
    episodes = sdar.rollout(
        *(trainer.policy(), trainer.chat, trainer.envs, [("put a mug in sofa 1", 0, 0)], config),
        stream=(0,),
        temperature=1.0,
    )
    teacher, off = trainer.as_teacher()
    with off:
        frozen = sdar.score(teacher, episodes, config, with_skill=True)
    live = sdar.score(teacher, episodes, config, with_skill=True)
    base = sdar.load_policy(config)[0]
    expected = sdar.score(base, episodes, config, with_skill=True)
    assert torch.allclose(frozen, expected, atol=1e-5)
    assert not torch.allclose(live, expected, atol=1e-5)
    merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    assert dict(merged.named_parameters()).keys() == start.keys()


def test_vllms_sampler_plays_as_ours(on_trl, tiny):
    """Against a stand-in of TRL's client that answers greedily: the same episodes."""
    model, chat = tiny
    config = small(Path(), group_size=8)
    requests = []

    class Client:
        def generate(self, prompts, temperature, max_tokens, generation_kwargs):
            requests.append((temperature, generation_kwargs["stop_token_ids"]))
            sampler = sdar.Sampler(model, temperature)
            sampler.feed_rows(prompts)
            answer = sampler.respond(torch.zeros(len(prompts), max_tokens), chat.stop_ids)
            ids, logprobs = zip(*answer)
            return {"completion_ids": ids, "logprobs": [[[x] for x in row] for row in logprobs]}

    def plays(sampler_class):
        world = [envs.make_env("toy") for _ in range(8)]
        starts = [(task, 3, 0) for task in world[0].tasks("train")[:8]]
        own = (model, chat, world, starts, config)
        return sdar.rollout(*own, stream=(0,), temperature=0.0, sampler_class=sampler_class)

    ours = plays(sdar.Sampler)
    theirs = plays(on_trl.partial(on_trl.VllmSampler, Client(), chat))
    assert [episode.ids for episode in theirs] == [episode.ids for episode in ours]
    assert [episode.mask for episode in theirs] == [episode.mask for episode in ours]
    assert np.concatenate([episode.logprobs for episode in theirs]) == approx(
        np.concatenate([episode.logprobs for episode in ours]), abs=1e-4
    )
    assert requests[0] == (0.0, chat.stop_ids)


TRL_REFUSES = """
--method rlsd => unknown --method on TRL 'rlsd'
--gate centred => unknown --gate on TRL 'centred'
--teacher lagged => unknown --teacher on TRL 'lagged'
--kernel => unknown flag --kernel
--set optim => NAME=VALUE
--set nonsense=1 => GRPOConfig
--set optim=nonsense => GRPOConfig
--tasks-per-step 3 --minibatches 5 => cannot be shared by 1 processes
--lora -1 => --lora -1
--lr many => invalid float value
--out .assets => .assets is not empty
"""


@mark.parametrize("flags, message", [line.split(" => ") for line in TRL_REFUSES.split("\n")[1:-1]])
def test_trl_trainer_refuses_in_one_line(flags, message, on_trl, tmp_path, capsys):
    size = ["--minibatches", "4", "--group-size", "4", "--out", str(tmp_path / "x")]
    assert on_trl.run([*size, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_bench_trl_times_the_same_tokens_on_both(on_trl):
    size = "--steps 3 --tasks-per-step 2 --group-size 2 --max-turns 3".split()
    code, printed, _ = python(".lab/bench.py", "trl", *size)
    assert code == 0
    assert len(re.findall(r"teacher: here [\d.]+, TRL [\d.]+, ratio [\d.]+", printed)) == 6


def test_bench_trl_refuses_what_it_cannot_time(on_trl, capsys):
    assert main(["bench", "trl", "--steps", "2"]) == 2
    assert "--steps: 3 or more" in capsys.readouterr().err


@mark.parametrize("name, message", [("trl", "pip install trl"), ("peft", "untested here")])
def test_trl_trainer_says_what_is_missing_or_untested(name, message, monkeypatch, capsys):
    def version(package):
        if package == "trl":
            raise trl_trainer.PackageNotFoundError
        return "9.9"

    monkeypatch.setattr(trl_trainer, "version", version)
    if name == "trl":
        with raises(sdar.UserError, match=message):
            trl_trainer.check_packages(["trl"])
    else:
        trl_trainer.check_packages(["peft"])
        assert message in capsys.readouterr().err


# --- The course: `python -m pytest -q .lab/test_lab.py -k exercise_gate` grades a function ---

COURSE = ROOT / ".lab" / "course"
exercise = SimpleNamespace(**runpy.run_path(str(COURSE / "exercise.py")))


def grade(name):
    """Run the grader of a function."""
    runpy.run_path(str(COURSE / "graders.py"))[f"grade_{name}"]()


@mark.parametrize("name", exercise.BLANKS, ids="exercise_{}".format)
def test_fill_in(name):
    grade(name)


@mark.parametrize("kind", ["bug", "experiment"], ids="exercise_{}".format)
def test_answer(kind):
    wrong = exercise.verdict(kind, os.environ.get("ANSWER", ""))
    if wrong is None:
        pytest.skip('no answer to judge: ANSWER="6 eos" or ANSWER="beta a"')
    assert not wrong, wrong


@mark.parametrize("name", exercise.BLANKS)
def test_a_blanked_function_says_its_aim_and_fails_its_grader(name, tmp_path, monkeypatch, capsys):
    file = exercise.BLANKS[name]
    (tmp_path / ".lab").mkdir()
    shutil.copy(ROOT / file, tmp_path / file)
    exercise.blank(name, tmp_path)
    written_down = runpy.run_path(str(tmp_path / file))
    emptied = written_down.get(name) or getattr(written_down["Episode"], name)
    assert f"exercise hint {name}" in emptied.__doc__
    assert main(["exercise", "check", name]) == 0
    assert "Right. You now know" in capsys.readouterr().out
    for module in MODULES:
        monkeypatch.setattr(module, name, emptied, raising=False)
    assert main(["exercise", "check", name]) == 1
    assert capsys.readouterr().out == f"Not yet: exercise: write {name} again.\n"


MODULES = (sdar, envs, trl_trainer, sdar.Episode)  # those of functions that can be blanked


def written(name, change):
    """A function with a part of its text replaced, in a copy of its module."""
    module = [module for module in MODULES if hasattr(module, name)][-1]
    old, new = change.replace("\\n", "\n").split(" => ")
    text = textwrap.dedent(exercise.find(name, ROOT)[2])
    assert old in text
    space = {**vars(module)}
    exec(text.replace(old, new, 1), space)
    return space[name]


WRONG_ANSWERS = (DATA / "wrong_answers.txt").read_text().split("\n")[:-1]


@mark.parametrize("name, what, change", [line.split(" | ") for line in WRONG_ANSWERS])
def test_wrong_answers_fail_with_a_meaning(name, what, change, monkeypatch):
    right = written(name, change)
    for module in MODULES:
        monkeypatch.setattr(module, name, right, raising=False)
    with raises(AssertionError, match="..."):
        grade(name)


def test_blank_and_restore_keep_what_a_learner_wrote(tmp_path):
    for file in ("sdar.py", "envs.py"):
        shutil.copy(ROOT / file, tmp_path)
    path, whole = tmp_path / "sdar.py", (ROOT / "sdar.py").read_text()
    exercise.blank("gate", tmp_path)
    path.write_text(path.read_text().replace("raise NotImplementedError(", "return my(answer"))
    assert "sdar.py.mine" in exercise.blank("gate", tmp_path)
    again = path.read_text().replace("raise NotImplementedError(", "return my(second")
    path.write_text("# other work\n" + again)
    exercise.restore("gate", tmp_path)
    assert path.read_text() == "# other work\n" + whole
    kept = (tmp_path / "sdar.py.mine").read_text()
    assert kept.index("return my(answer") < kept.index("return my(second")
    with raises(ValueError, match="not blanked"):
        exercise.restore("gate", tmp_path)


def test_a_wrong_answer_fails_with_its_hint(monkeypatch):
    monkeypatch.setenv("ANSWER", "beta a")
    with raises(AssertionError, match="is not 'a'. .*gate_mean"):
        test_answer("experiment")


def test_answers_and_their_hints(capsys):
    assert main(["exercise", "answer", "beta", "a"]) == 1
    assert "beta is not 'a'. Read gate_mean" in capsys.readouterr().out
    assert main(["exercise", "answer", "beta", "b"]) == 0
    assert main(["exercise", "answer", "gamma", "b"]) == 2


def test_two_logs_are_compared_where_they_first_differ(finished, tmp_path, capsys):
    other = Path(shutil.copytree(finished[1], tmp_path / "run"))
    rows = (other / "metrics.jsonl").read_text().splitlines()
    rows[1] = json.dumps(json.loads(rows[1]) | {"loss": 7.0, "seconds_update": 9.0})
    (other / "metrics.jsonl").write_text("\n".join(rows))
    for folder, said in ((finished[1], "no difference"), (other, "step 2")):
        assert main(["exercise", "compare", str(finished[1]), str(folder)]) == 0
        assert capsys.readouterr().out.startswith(said)


def test_every_puzzle_has_one_answer_that_cannot_be_read_by_accident():
    bugs = "eos observations shift skill detach temperature groups micro".split()
    for puzzle in exercise.puzzles():
        answers = bugs if puzzle.isdigit() else "abc"
        assert [exercise.judge(puzzle, answer)[0] for answer in answers].count(True) == 1
    assert not [name for name in bugs if name in str(exercise.puzzles())]


def first_step(module, folder):
    """Metrics of a tiny run's first step, but for times."""
    small = {"group_size": 2, "tasks_per_step": 4, "max_turns": 5, "eval_episodes": 6}
    exact = {"minibatches": 1, "micro_tokens": 300, "temperature": 2.0}
    module.train(module.Config(out=str(folder), steps=1, **small, **exact))
    (row,) = lines(folder)
    return {name: value for name, value in row.items() if not name.startswith("eval")}


@fixture(scope="module")
def right_step(tmp_path_factory):
    """first_step of sdar.py as it is."""
    return first_step(sdar, tmp_path_factory.mktemp("right") / "run")


@mark.parametrize("number", range(1, 9))
def test_a_planted_bug_shows_in_the_metrics_of_step_1(number, right_step, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sdar", sdar)  # put back afterwards
    buggy = first_step(exercise.planted(str(number)), tmp_path / "run")
    assert buggy != right_step, "sdar.py has changed under it"


def test_exercise_without_a_known_word_names_them(capsys):
    assert main(["exercise", "blank", "nothing"]) == 2
    assert "restore with group_advantages, gate" in capsys.readouterr().err
