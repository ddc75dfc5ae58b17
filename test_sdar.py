"""Tests of sdar.py and envs.py, in their order: numbers by hand, oracles, the whole pipeline on
small models, and planted faults that must be refused.

    python -m pytest -q test_sdar.py

What takes longer (many kills, real engines, TRL, the instruments) is in .lab/tests.
"""

import ast
import copy
import doctest
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial, wraps
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from pytest import approx, fixture, mark, raises
from torch.nn.utils import parameters_to_vector as vector

import envs
import sdar
from envs import EnvUnavailable, UserError, make_env
from sdar import METHODS, configure, main

ROOT = Path(__file__).resolve().parent
DATA = ROOT / ".assets/test"
TURNS = 6  # of an episode in small runs: too few for some tasks
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
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    return shutil.copytree(DATA / request.param, folder, dirs_exist_ok=True)


@fixture(scope="session")
def hub(checkpoint):
    """The same, loaded: (model, chat)."""
    return sdar.load_policy(configure(model=str(checkpoint), device="cpu"))


def small(tmp_path, name="run", **changes):
    """A config for a run of seconds, in tmp_path/name."""
    size = {"steps": 2, "tasks_per_step": 2, "group_size": 4, "eval_episodes": 6, "eval_every": 0}
    size |= {"out": str(tmp_path / name), "rollout_batch": 8, "max_turns": TURNS}
    return configure(**size | changes)


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


def play(policy, config, episodes=8, stream=0, with_skill=False, at_once=None, max_turns=10):
    """Roll out the first tasks of the toy, `group_size` episodes each. Their limits of turns
    differ, to make a ragged batch."""
    at_once = at_once or episodes
    worlds = [make_env("toy", max_turns=max(1, max_turns - i % 3)) for i in range(at_once)]
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


def noted(monkeypatch, owner, name, keep):
    """The list to which each call of owner.name now adds keep(*its arguments)."""
    notes, real = [], getattr(owner, name)

    @wraps(real)
    def note(*args, **more):
        notes.append(keep(*args))
        return real(*args, **more)

    monkeypatch.setattr(owner, name, note)
    return notes


# --- 1. Configuration --------------------------------------------------------------------


SETTINGS = """
{}                                          {"preset": "toy", "device": "cpu", "lr": 6e-4}
{}                                          {"invalid_penalty": 0.01, "rlsd_decay": 40}
{}                                          {"eval_split": "eval", "tasks_per_step": 8}
{}                                          {"steps": 60, "eval_every": 10, "eval_episodes": 300}
{}                                          {"save_every": 10, "micro_batch": 32}
{}                                          {"rollout_batch": 64, "minibatches": 4, "group_size": 8}
{"method": "grpo"}                          {"lr": 1e-3}
{"method": "opsd"}                          {"lr": 3e-4, "policy_coef": 0}
{"method": "opsd", "lr": 0.5}               {"lr": 0.5}
{"method": "grpo_opsd"}                     {"gate_beta": 0}
{"method": "skill_sd"}                      {"sdar_coef": 0.1}
{"method": "skill_sd", "preset": "paper"}   {"sdar_coef": 0.001}
{"method": "skill_sd", "policy_coef": 0}    {"distil": "skill_sd"}
{"model": "other"}                          {"preset": "paper", "device": "cuda"}
{"preset": "paper"}                         {"steps": 150, "tasks_per_step": 16, "group_size": 8}
{"preset": "paper"}                         {"lr": 1e-6, "kl_coef": 0.01, "clip_eps": 0.2}
{"preset": "paper"}                         {"sdar_coef": 0.01, "gate_beta": 5, "gate": "gap"}
{"preset": "paper"}                         {"max_new_tokens": 512, "grad_clip": 1}
{"preset": "paper"}                         {"rlsd_decay": 100, "minibatches": 4, "eval_every": 5}
{"preset": "paper"}                         {"eval_temperature": 0.4, "eval_episodes": 128}
{"preset": "paper"}                         {"dtype": "bfloat16", "gradient_checkpointing": True}
{"preset": "paper"}                         {"micro_batch": 2, "rollout_batch": 16}
{"preset": "small"}                         {"lr": 3e-5, "kl_coef": 0, "teacher": "frozen"}
{"preset": "small"}                         {"dtype": "bfloat16", "gradient_checkpointing": True}
{"preset": "small"}                         {"micro_batch": 4, "group_size": 4, "sdar_coef": 1}
{"preset": "small"}                         {"max_new_tokens": 64, "eval_episodes": 60}
"""


@mark.parametrize("given, expected", table(SETTINGS))
def test_what_is_given_wins_over_the_method_the_preset_and_the_default(
    given, expected, monkeypatch
):
    """The preset `paper` has the published values, but for minibatches and memory."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert vars(configure(**given)).items() >= expected.items()


def test_settings_become_values_of_pythons_own(tmp_path):
    config = configure(out=tmp_path, seed=np.int64(3), lr=np.float32(0.5), steps="1", model="~/m")
    assert config == configure(out=str(tmp_path), seed=3, lr=0.5, steps=1, model=config.model)
    assert config.model == os.path.expanduser("~/m")
    assert {type(config.lr), type(config.seed), type(config.steps)} == {float, int}


# --- 2 and 3. Conversation and rollout ---------------------------------------------------


@fixture(scope="session", params=["tiny", "hub"])
def played(request, tiny, hub):
    """Episodes of unequal lengths: (policy, episodes, (environment, text) pairs that were
    parsed)."""
    policy = {"tiny": tiny, "hub": hub}[request.param]
    with pytest.MonkeyPatch.context() as patch:
        texts = noted(patch, envs.TextEnv, "parse", lambda *args: args)
        config = configure(group_size=2, temperature=0.8)
        episodes = play(policy, config, episodes=4, max_turns=6)
    assert len({len(episode.ids) for episode in episodes}) > 1
    return policy, episodes, texts


def test_the_mask_covers_exactly_what_was_sampled_and_its_end(played):
    (_, chat), episodes, parsed = played
    for episode in episodes:
        runs = itertools.groupby(zip(episode.mask, episode.ids), lambda pair: pair[0])
        answers = [[id for _, id in run] for sampled, run in runs if sampled]
        texts = [text for env, text in parsed if env is episode.env]
        assert chat.tokenizer.batch_decode(answers, skip_special_tokens=True) == texts
        for answer in answers:
            assert answer[-1] in chat.end_ids or len(answer) == 8
            assert not chat.end_ids & {*answer[:-1]}
        pairs = zip(itertools.pairwise(episode.mask), itertools.pairwise(episode.ids))
        assert {pair.count(chat.end_id) for at, pair in pairs if at == (1, 0)} <= {1}


def plain(model, ids, mask, temperature=1.0):
    """Log-probs and entropies of the sampled ids: an unpadded pass, the library's distribution."""
    at = np.flatnonzero(mask)
    logits = model(torch.tensor([ids])).logits[0, at - 1] / temperature
    exact = torch.distributions.Categorical(logits=logits)
    return exact.log_prob(torch.tensor(ids)[at]), exact.entropy()


def test_sampled_is_scored_is_a_plain_forward_pass(played):
    """The sampler's cached, padded log-probs; those of the update; one unpadded pass."""
    (model, _), episodes, _ = played
    config, exact = configure(temperature=0.8), []
    for episode in episodes:
        student, teacher = (plain(model, *episode.view(skilled), 0.8) for skilled in (False, True))
        exact.append((*student, *teacher))
        assert exact[-1][0].tolist() == approx(episode.logprobs, abs=1e-4)
    ours = sdar.response_logprobs(model, episodes, config)
    ours += sdar.response_logprobs(model, episodes, config, with_skill=True)
    for values, expected in zip(ours, zip(*exact)):
        assert torch.allclose(values, torch.cat(expected), atol=1e-4)
    assert (ours[0] - ours[2]).abs().max() > 1e-3


def test_the_teacher_reads_the_students_ids_and_the_skill_at_one_place(played):
    (_, chat), episodes, _ = played
    for episode in episodes:
        bank = episode.env.bank.skills
        right = [skill for skill in bank if skill.matches(episode.task, episode.task_type)]
        skill = chat.encode("Skill: " + " ".join(skill.text for skill in right) + "\n")
        ids, mask = episode.view(True)
        place = slice(episode.skill_at, episode.skill_at + len(skill))
        assert (ids[place], mask[place]) == (skill, [0] * len(skill))
        del ids[place], mask[place]
        assert (ids, mask) == (episode.ids, episode.mask) == episode.view(False)
        read = chat.tokenizer.decode(ids)
        assert "kept in" in chat.tokenizer.decode(skill)
        assert "kept in" not in read
        assert (f"Turn {episode.turns} of" in read) != chat.plain
        assert chat.tokenizer.decode(ids[episode.skill_at :]).startswith("You are in the middle")


def test_a_group_shares_its_start_and_draws_depend_on_their_numbers_alone(tiny):
    """And not on their neighbours."""

    def ids(**how):
        config = configure(group_size=4, retrieval="random")
        return [episode.view(True)[0] for episode in play(tiny, config, **how)]

    many = ids()
    starts = [str(row[:8]) for row in many]  # a first prompt has eight ids at least
    assert len({*starts[:4]}) == len({*starts[4:]}) == 1 < len({*starts})
    assert len({*map(str, many)}) == 8
    assert ids(at_once=3) == many
    assert ids(episodes=3) == many[:3]
    assert ids(stream=6) != many


def test_an_episode_has_the_reward_of_its_own_environment(tiny):
    played = play(tiny, configure(group_size=2), with_skill=True, max_turns=9)
    assert {(episode.reward, episode.env._won()) for episode in played} == {(0, False), (1, True)}


def test_draws_follow_the_log_probs_that_they_report(tiny):
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(1000, 3)
    uniform = torch.arange(1000) / 1000
    draw = sdar.Sampler(tiny[0], 0.7).draw
    ids, logprobs = draw(logits, uniform.numpy())
    expected = torch.softmax(logits[0] / 0.7, -1)
    assert np.bincount(ids) / 1000 == approx(expected.numpy(), abs=2e-3)
    assert logprobs == approx(expected.log()[ids].tolist())
    assert sdar.Sampler(tiny[0], 0).draw(-logits[:1], [0.9])[0] == [0]
    edge, ruined, short = [-math.inf, 0.0, 1.0], [math.nan] * 3, [0.0, 2.0, -math.inf]
    assert draw(torch.tensor([edge, ruined, short]), [0.0, 0.0, 1 - 2**-24])[0] == [1, 2, 1]


def test_a_response_ends_at_its_closing_tag_however_it_is_cut(hub, monkeypatch):
    encode = hub[1].encode
    letters = sum(map(encode, "<ACTION>look</Action>"), [])
    script = [encode("<action>look</action>"), letters]
    script += [*encode("look</action "), hub[1].end_id], [7, 0]  # the other end
    columns = zip(*[row + [5] * 60 for row in script])
    monkeypatch.setattr(sdar.Sampler, "draw", lambda *_: (next(columns), [0.0] * 4))
    config = configure(group_size=4, max_new_tokens=60)
    for row, episode in zip(script, play(hub, config, 4, max_turns=1)):
        assert [*itertools.compress(episode.ids, episode.mask)] == row
    episode.ids, episode.begin = encode("</action>go"), len(encode("</action>"))
    assert not sdar.has_answered(hub[1], episode)  # the tag is the prompt's


def test_a_plain_policys_answer_cut_by_the_limit_is_invalid(tiny):
    for episode in play(tiny, configure(max_new_tokens=2)):
        assert episode.invalid == episode.turns


def test_an_episode_that_fills_the_context_ends_there(policy, monkeypatch):
    """The teacher's sequence, whose skill is long here, must fit, too."""

    def lengths():
        episodes = play(policy, configure(group_size=4, retrieval="full"))
        return [len(episode.view(True)[0]) for episode in episodes]

    room = max(lengths()) - 1
    monkeypatch.setattr(policy[0].config, "max_position_embeddings", room)
    assert room / 2 < max(lengths()) <= room
    monkeypatch.setattr(policy[0].config, "max_position_embeddings", 50)
    with raises(UserError, match="a first prompt of 48 ids"):
        lengths()


def test_a_rollout_plays_from_a_bfloat16_copy(tiny, monkeypatch):
    """The frequencies of the positions stay float32, and so do the weights that learn, and what is
    drawn from. Scoring computes in bfloat16, too."""
    config = configure(dtype="bfloat16")
    draws = noted(monkeypatch, sdar.Sampler, "draw", lambda *args: args[:2])
    play(tiny, config, max_turns=2)
    sampler, logits = draws[0]
    assert {weight.dtype for weight in sampler.model.parameters()} == {torch.bfloat16}
    for values in (tiny[0].parameters(), sampler.model.buffers(), [logits]):
        assert {value.dtype for value in values} == {torch.float32}
    assert not logits.requires_grad
    with sdar.forward_dtype(tiny[0], config):
        assert torch.is_autocast_enabled("cpu")


# --- 4. Log-probs of the sampled ids -----------------------------------------------------


@mark.parametrize("at_once", [10**6, 100])  # the second goes in chunks of two rows
def test_token_logprobs_agree_with_float64(at_once, monkeypatch):
    monkeypatch.setattr(sdar, "LOGITS_AT_ONCE", at_once)
    torch.manual_seed(0)
    hidden, head, ids = torch.randn(7, 6), torch.randn(50, 6), torch.arange(7)
    weights = [hidden.requires_grad_(), head.requires_grad_()]
    exact = torch.distributions.Categorical(logits=hidden.double() @ head.double().T / 0.7)
    ours = sdar.token_logprobs(hidden, head, ids, 0.7)
    for values, expected in zip(ours, (exact.log_prob(ids), exact.entropy())):
        assert torch.allclose(values.double(), expected, atol=1e-5)
        slopes = torch.autograd.grad(values.sum(), weights, retain_graph=True)
        others = torch.autograd.grad(expected.sum(), weights, retain_graph=True)
        assert all(map(partial(torch.allclose, atol=1e-4), slopes, others))
    assert sdar.token_logprobs(hidden.half(), head.half(), ids)[1].dtype == torch.float32


# --- 5. Objectives: hand numbers of the paper's formulas ---------------------------------

VECTORS = json.loads((DATA / "vectors.json").read_text())


@mark.parametrize("name, case", [(name, case) for name in VECTORS for case in VECTORS[name]])
def test_functions_have_their_hand_numbers(name, case):
    """Values and the gradient of the first one's sum in the first argument; none in a teacher."""
    arguments = [torch.tensor(values).float().requires_grad_() for values in case["arguments"]]
    found = getattr(sdar, name)(*arguments, **case.get("options", {}))
    found = found if isinstance(found, dict) else {name: found}
    assert found.keys() == case["returns"].keys()
    for key, expected in case["returns"].items():
        assert found[key].tolist() == approx(np.array(expected), rel=2e-6, abs=2e-6)
    if "gradient" in case:
        found[next(iter(found))].sum().backward()
        assert arguments[0].grad.tolist() == approx(case["gradient"], rel=2e-6, abs=2e-6)
        assert "sd" not in name or arguments[1].grad is None


@mark.parametrize("kind", sdar.GATES)
def test_the_gradient_goes_through_the_student_alone(kind):
    """Not through the gate, of whatever it is made, and not through the teacher."""
    student = torch.linspace(-3, 0, 5).requires_grad_()
    terms = sdar.sdar_loss(student, student * 2, student * 0.3, kind, 2.0)
    terms["sdar_loss"].sum().backward()
    assert torch.allclose(student.grad, -terms["gate"])


def test_docstring_examples_are_true():
    failed, tried = doctest.testmod(sdar)
    assert failed == 0 < tried


# --- 6. Update ---------------------------------------------------------------------------


def one_update(policy, objective=sdar.objective, step=1, **changes):
    """An update by SGD, by default in one mini-batch: (change of the weights, that is -gradient;
    metrics; episodes; batch; start policy). A frozen teacher has other weights."""
    config = configure(**{"group_size": 4, "minibatches": 1, "grad_clip": 1e6, **changes})
    model, start_policy = copy.deepcopy(policy[0]), copy.deepcopy(policy[0])
    start_policy.model.norm.weight.data *= 1.1
    teacher = start_policy if config.teacher == "frozen" else model
    episodes = play(policy, config)
    episodes[0].reward = episodes[5].reward = 1.0
    episodes[2].invalid += 3
    batch = sdar.step_batch(model, start_policy, teacher, episodes, config, step)
    sgd, rng = torch.optim.SGD(model.parameters(), lr=1.0), np.random.default_rng(0)
    metrics = sdar.update(model, sgd, episodes, batch, config, rng, objective)
    assert {weight.grad for weight in model.parameters()} == {None}  # zero_grad
    change = vector(model.parameters()) - vector(policy[0].parameters())
    return change.detach(), metrics, episodes, batch, start_policy


def test_an_update_is_the_papers_formula(tiny):
    """All of it again: rewards to advantages, readers to a gate, one mean over all tokens."""
    changes = {"temperature": 0.8, "kl_coef": 0.3, "sdar_coef": 0.5, "invalid_penalty": 0.25}
    change, metrics, episodes, batch, start_policy = one_update(tiny, **changes)
    model, losses = copy.deepcopy(tiny[0]), []
    rewards = [episode.reward - 0.25 * episode.invalid for episode in episodes]
    for row, episode in enumerate(episodes):
        group = rewards[row // 4 * 4 :][:4]
        advantage = (rewards[row] - mean(group)) / (stdev(group) + 1e-6)
        student, _ = plain(model, *episode.view(False), 0.8)
        teacher = plain(model, *episode.view(True), 0.8)[0].detach()
        reference = plain(start_policy, *episode.view(False), 0.8)[0].detach()
        gate = torch.sigmoid(5 * (teacher - student.detach()))
        d = reference - student
        ratio = (student - student.detach()).exp()
        grpo = -advantage * ratio + 0.3 * (d.exp() - d - 1)
        losses.append(grpo + 0.5 * gate * (teacher - student))
    loss = torch.cat(losses).mean()
    loss.backward()
    gradient = vector(weight.grad for weight in model.parameters())
    assert metrics["loss"] == approx(loss.item(), abs=1e-5)
    assert metrics["grad_norm"] == approx(gradient.norm().item(), rel=1e-3)
    gap = batch["teacher"] - batch["old"]
    assert metrics["gap"] == approx(gap.mean().item(), rel=1e-4)
    assert torch.allclose(change, -gradient, atol=1e-4 * gradient.abs().max())


@mark.parametrize("method", METHODS)
def test_the_loss_is_the_sum_of_its_terms(method, tiny):
    terms = one_update(tiny, method=method, kl_coef=0.3, sdar_coef=0.5)[1]
    total = (method != "opsd") * terms["policy_loss"] + 0.3 * terms["kl"]
    assert terms["loss"] == approx(total + 0.5 * terms.get("sdar_loss", 0), rel=1e-4, abs=1e-7)
    assert terms.get("sdar_loss", 1)
    assert (terms["ratio"], terms["clipped"]) == approx((1, 0), abs=1e-5)  # on policy


def test_every_mini_batch_is_a_step_over_other_episodes(tiny, monkeypatch):
    """The later ones are off policy."""
    seen, moved = [], []
    sizes = noted(monkeypatch, sdar, "response_logprobs", lambda _, micro, *more: len(micro))

    def noting(model, micro, tokens, config):
        terms = sdar.objective(model, micro, tokens, config)
        now = tokens["old"] + terms["ratio"].log()
        loss = sdar.skill_sd_loss(now, tokens["teacher"], tokens["old"])["sdar_loss"]
        assert torch.allclose(terms["sdar_loss"], loss, rtol=1e-3, atol=1e-5)
        seen.extend(str(episode.ids) for episode in micro)
        moved.append((terms["ratio"] - 1).abs().max().item())
        terms["half"] = torch.tensor(0.5)  # a term of an experiment's own, one for all tokens
        return terms

    how = {"minibatches": 3, "micro_batch": 1, "method": "skill_sd", "clip_eps": 5}
    _, metrics, episodes, *_ = one_update(tiny, noting, **how)
    assert (metrics["clipped"], metrics["half"]) == approx((0, 0.5))
    assert seen == [str(episodes[row].ids) for row in np.random.default_rng(0).permutation(8)]
    assert max(moved[:3]) < 1e-4 < min(moved[3:])
    assert {*sizes} == {1}


def test_the_gradient_is_clipped_or_refused(tiny):
    change, metrics, *_ = one_update(tiny, grad_clip=1e-3)
    assert metrics["grad_norm"] > 1e-2
    assert change.norm().item() == approx(1e-3, rel=1e-3)
    with raises(UserError, match="gradient is not finite.*--lr"):
        one_update(tiny, lambda *args: {"loss": sdar.objective(*args)["loss"] * math.nan})


@mark.parametrize("teacher", ["live", "frozen"])
def test_without_a_skill_the_gap_is_0_and_the_gate_a_half(teacher, tiny, monkeypatch):
    """Whichever the teacher; episodes with a skill keep their gaps."""
    first = make_env("toy").tasks("train")[0]
    monkeypatch.setattr(envs.Skill, "matches", lambda skill, task, kind: task == first)
    _, _, episodes, batch, _ = one_update(tiny, teacher=teacher)
    gate = sdar.sdar_loss(batch["old"], batch["teacher"])["gate"]
    taught = sum(len(episode.logprobs) for episode in episodes[:4])
    assert {*gate[taught:].tolist()} == {0.5} != {*gate[:taught].tolist()}


def test_rlsds_teacher_sizes_the_advantage_less_and_less(tiny):
    plain_advantages = one_update(tiny, method="grpo")[3]["advantages"]
    for step, mix in ((4, 0.3), (10, 0), (30, 0)):
        batch = one_update(tiny, method="rlsd", rlsd_decay=10, step=step)[3]
        expected = sdar.rlsd_advantages(plain_advantages, batch["teacher"] - batch["old"], mix)
        assert torch.allclose(batch["advantages"], expected, atol=1e-5)


def test_the_bandit_learns_from_each_episodes_mean_gap(tiny, monkeypatch):
    learned = noted(
        monkeypatch, envs.SkillBank, "learn", lambda *args: [args[2][0][0], args[3][0][0]]
    )
    _, _, episodes, batch, _ = one_update(tiny, retrieval="ucb")
    of_first = (batch["teacher"] - batch["old"])[: len(episodes[0].logprobs)]
    expected = [batch["advantages"][0].item(), of_first.mean().item()]
    assert learned == [approx(expected, abs=1e-6)]


@mark.parametrize("fault", ["shifted mask", "other temperature", "padding"])
def test_ids_sampled_that_are_not_ids_scored_stop_the_step(fault, policy):
    """The last: a layer that sums along the row, padding and all; no setting shows that."""
    config, model, layer = configure(group_size=4), policy[0], policy[0].model.layers[0]
    if fault == "padding":
        layer.mlp.register_forward_hook(lambda _, args, output: output + args[0].cumsum(1))
    episodes = play(policy, config)
    if fault == "shifted mask":
        config.dtype = "bfloat16"  # even its looser limit
        episodes[0].mask = episodes[0].mask[1:] + [0]
    if fault == "other temperature":
        config.temperature = 0.9
    with raises(UserError, match="ids sampled are not ids scored.*--lr"):
        sdar.step_batch(model, model, model, episodes, config, 1)


# --- 7. Evaluation and the training loop -------------------------------------------------


@fixture(scope="session")
def finished(tmp_path_factory):
    """A run of two steps, saved after each, to read or copy: (what train() returned, its folder,
    lines of the same run with three steps)."""
    folder = tmp_path_factory.mktemp("finished")
    final = sdar.train(small(folder, save_every=1, overwrite=True))
    return final, folder / "run", trained(tmp_path_factory.mktemp("whole"), steps=3)[1]


def test_the_carried_policy_reads_the_skill_and_is_poor_without(tiny):
    config = configure(eval_episodes=60)
    result = sdar.evaluate(*tiny, sdar.make_envs(config), config)
    assert result["success"] < 0.2 < 0.95 < result["success_skill"]
    counts = np.array([result["by_type"][kind] for kind in envs.TASK_TEXT])
    assert counts[:, 0].tolist() == [10] * 6
    assert (counts.sum(0) / 60).tolist() == [1, result["success"], result["success_skill"]]


def test_every_step_and_seed_draws_anew_and_the_panel_never(tmp_path, monkeypatch):
    """A step plays each of its tasks group_size times from one state."""
    played, world = noted(monkeypatch, sdar, "rollout", lambda *args: args[3]), make_env("toy")
    readers = noted(monkeypatch, sdar.Sampler, "__init__", lambda *args: args[1:3])
    for seed in (0, 1):
        trained(tmp_path, str(seed), tasks_per_step=3, seed=seed, eval_split="dev")
    steps = [starts for starts in played if starts[0][0] in world.tasks("train")]
    panels = [starts for starts in played if starts[0][0] in world.tasks("dev")]
    assert panels == panels[:1] * 8 != []
    assert len({numbers for *_, numbers in panels[0]}) == 6
    models, heats = zip(*readers)
    assert heats[1:3] == (0.4, 1)
    assert len({*models}) == 2  # of each run the one that learns
    assert len({numbers for starts in steps for *_, numbers in starts}) == 4 * 12
    groups = [[place[:2] for place in starts] for starts in steps]
    assert len({*map(str, groups)}) == 4
    for group in groups:
        assert group == group[:1] * 4 + group[4:5] * 4 + group[8:9] * 4
        assert len({*group}) == 3


def test_the_first_steps_are_those_of_the_version_before(tmp_path):
    """Commit 9754f85's: eight steps agreed to 1e-6 on one machine. Three here, to 1e-4: another
    processor rounds otherwise, and may draw another token one day."""
    sdar.train(configure(steps=3, eval_episodes=6, eval_every=0, out=tmp_path))
    for old, new in zip(map(json.loads, open(DATA / "first_steps.jsonl")), lines(tmp_path)):
        assert {name: new[name] for name in old} == approx(old, abs=1e-4)


ALWAYS = """step success reward turns invalid_rate response_tokens flat_groups loss policy_loss
    ratio clipped kl entropy grad_norm"""
TERMS = """
"sdar"        "sdar_loss gate gate_active gap"
"opsd"        "sdar_loss gate gate_active gap"
"grpo_opsd"   "sdar_loss gate gate_active gap"
"skill_sd"    "sdar_loss gap"
"rlsd"        "gap"
"grpo"        ""
"skill_grpo"  ""
"""


def test_methods_reach_the_run(tmp_path):
    """A key of the log is a term; a method that has no such term has no such key."""
    losses = set()
    for method, terms in table(TERMS):
        (row,) = trained(tmp_path, method, method=method, steps=1, max_turns=10)[1]
        measured = {key: value for key, value in row.items() if "eval" not in key}
        assert measured.keys() == {*ALWAYS.split(), *terms.split()}
        assert all(map(math.isfinite, measured.values()))
        assert (row["success"] > 0.5) == (method == "skill_grpo")  # it reads the skill
        assert row["eval_success"] < 0.5
        losses.add(row["loss"])
    assert len(losses) == 7


LOGGED = """flat_groups reward invalid_rate seconds_rollout seconds_score seconds_update
    tokens_per_second""".split()


def test_a_group_is_flat_where_all_advantages_are_0(tmp_path):
    """Two lost episodes, one with an invalid answer: the penalty tells them apart."""
    same = {"won": 0, "reward": 0.0, "turns": 1, "logprobs": [0.0]}
    group = [SimpleNamespace(invalid=number, **same) for number in (0, 1)]
    for penalty, flat in ((0.0, 1), (0.01, 0)):
        config = small(tmp_path, "", group_size=2, invalid_penalty=penalty)
        line = sdar.log_step(config, 1, group, {}, {}, [0, 1, 3, 7])
        assert [line[name] for name in LOGGED] == [flat, 0, 0.5, 1, 2, 4, 2 / 7]


CHOICES = """
"gate"       ["gap", "entropy", "soft_or", "none"]    "gate"
"retrieval"  ["keyword", "full", "random", "ucb"]     "gap"
"teacher"    ["live", "frozen"]                       "gap"
"dtype"      ["float32", "bfloat16"]                  "gap"
"""


@mark.parametrize("name, values, key", table(CHOICES))
def test_choices_reach_the_run(name, values, key, tmp_path):
    flags = {"lr": 3e-3, "eval_episodes": 2}
    last = {trained(tmp_path, value, **{name: value}, **flags)[0][key] for value in values}
    assert len(last) == len(values)


def test_zero_steps_only_evaluate(tmp_path, capsys, monkeypatch):
    """And need no task to train on."""
    tasks = {"eval": make_env("toy").tasks("eval")}
    monkeypatch.setattr(envs.ToyEnv, "tasks", tasks.__getitem__)
    result = sdar.train(small(tmp_path, steps=0, max_turns=10))
    assert (result["episodes"], result["success_skill"]) == (6, 1)
    assert [*tmp_path.iterdir()] == []
    assert "before, with the skill: won 100.0% of 6 [61%, 100%]" in capsys.readouterr().out


def test_a_language_model_trains_in_bfloat16_and_is_warned_of(checkpoint, tmp_path, capsys):
    """The same code; in bfloat16 on float32 weights, and not in the first thread."""
    flags = {"preset": "small", "device": "cpu", "max_turns": 1, "lr": 1e-3, "max_new_tokens": 5}
    config = small(tmp_path, model=str(checkpoint), retrieval="random", **flags)
    with ThreadPoolExecutor(1) as pool:
        row = pool.submit(sdar.train, config).result()
    assert row["turns"] == row["invalid_rate"] == 1
    assert 0 < abs(row["gap"] * row["loss"]) < math.inf
    first, *printed = capsys.readouterr().out.splitlines()
    assert re.search(r"[\d,]+ parameters.* cpu", first)
    assert sum("Warning" in line for line in printed) == 3
    state = torch.load(tmp_path / "run" / "state.pt")
    assert {weight.dtype for weight in state["model"].values()} == {torch.float32}
    assert not torch.backends.cuda.cudnn_sdp_enabled()


BEFORE = """
"sdar"        0.9  0.1  1.0  []
"sdar"        0.9  0.0  1.0  []
"sdar"        0.4  0.1  1.0  ["warmstart"]
"sdar"        0.9  0.3  0.2  ["not help"]
"grpo"        0.9  0.3  0.2  []
"grpo"        0.9  0.0  1.0  ["end alike"]
"grpo"        0.9  1.0  1.0  ["end alike"]
"skill_grpo"  0.9  0.0  1.0  []
"opsd"        0.1  0.0  0.0  ["warmstart", "not help", "end alike"]
"""


@mark.parametrize("method, valid, alone, skilled, warned", table(BEFORE))
def test_the_first_evaluation_names_the_cost_and_what_cannot_learn(
    method, valid, alone, skilled, warned, capsys
):
    before = {"valid": valid, "success": alone, "success_skill": skilled, "episodes": 20}
    sdar.say_before(configure(method=method, steps=90), before, seconds=80.0)
    printed = capsys.readouterr().out
    assert re.search(rf"{valid:.0%} of.* 2 s an episode.* 3.2 hours to play 90", printed)
    warnings = [line for line in printed.splitlines() if "Warning" in line]
    assert len(warnings) == len(warned)
    assert all(text in line for text, line in zip(warned, warnings))


# --- 8. Loading --------------------------------------------------------------------------

BAD_INPUT = (DATA / "bad_input.txt").read_text().splitlines()


def refused(capsys, *flags):
    """The one line with which a command line is refused, with nothing half-written."""
    files = [*Path().glob("[!m]*/**"), *Path().glob("*")]
    capsys.readouterr()  # saving a model may have shown a bar
    assert main([*flags]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert files == [*Path().glob("[!m]*/**"), *Path().glob("*")]
    return error


@mark.parametrize("flags, message", [line.split(" => ") for line in BAD_INPUT])
def test_bad_input_is_one_line_and_exit_code_2(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(shutil.copytree(DATA / "folders", tmp_path, dirs_exist_ok=True))
    for device in (torch.cuda, torch.mps):
        monkeypatch.setattr(device, "is_available", lambda: False)
    monkeypatch.setattr(sdar, "evaluate", None)  # said before anything is played
    assert message in refused(capsys, *flags.split())


@fixture
def model(checkpoint, tiny, tmp_path, monkeypatch):
    """A folder that a test may change, below the current one. The tiny policy turned bars off."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(checkpoint, "model"))


UNUSABLE = json.loads((DATA / "unusable_models.json").read_text())


@mark.parametrize("file, change, message", UNUSABLE)
def test_a_folder_that_is_no_model_of_this_kind_is_refused(file, change, message, model, capsys):
    if isinstance(change, dict):
        change = json.dumps(json.loads((model / file).read_text()) | change)
    (model / file).write_text(change)
    assert message in refused(capsys, "--model=model", "--device=cpu")


def test_a_model_that_is_not_whole_is_refused(model, capsys):
    from safetensors.torch import load_file, save_file

    weights = copy.deepcopy(load_file(model / "model.safetensors"))  # Windows: else in use
    del weights["model.norm.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert "lack the tensor model.norm" in refused(capsys, "--model=model", "--device=cpu")


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(model, hub, capsys):
    tokenizer = copy.deepcopy(hub[1].tokenizer)
    tokenizer.add_tokens([*map(chr, range(9000, 9001))])
    tokenizer.save_pretrained(model)
    assert "its tokenizer has " in refused(capsys, "--model=model", "--device=cpu")


BANKS = """
'[]'                                               "it is empty"
'[{"name": "a"}]'                                  "missing 1 required"
'[{"name": "a", "text": 3}]'                       "the skill 'a'"
'[{"name": "a", "text": "b", "keywords": "mug"}]'  "the skill 'a'"
'[{"name": "a", "text": "b", "keywords": [3]}]'    "the skill 'a'"
'[{"name": "a", "text": "b", "task_types": "x"}]'  "the skill 'a'"
'[{"name": "a", "text": "b", "task_types": [3]}]'  "the skill 'a'"
'[{"name": "a", "text": "b", "when": "mug"}]'      "when"
'[3]'                                              "must be a mapping"
'{'                                                "Expecting"
"""


@mark.parametrize("text, message", table(BANKS))
def test_a_skill_file_is_one_shared_bank_or_refused(text, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("good.json").write_text('[{"name": "a", "text": "b", "keywords": ["mug"]}]', "utf-8-sig")
    one, two = sdar.make_envs(configure(skills="good.json", rollout_batch=2))
    assert one.bank is two.bank
    assert one.bank.skills == [envs.Skill("a", "b", keywords=["mug"])]
    Path("bank.json").write_text(text)
    assert re.search(f"--skills bank.json.*{message}", refused(capsys, "--skills", "bank.json"))


def test_a_teacher_needs_skills(monkeypatch):
    monkeypatch.setattr(envs.Household, "skills", lambda household: [])
    assert sdar.make_envs(configure(method="grpo"))
    for method in ("sdar", "skill_grpo"):
        with raises(UserError, match="--skills FILE"):
            sdar.make_envs(configure(method=method))


IMPORTS = """import sys, time
start = time.process_time()
import envs
assert time.process_time() - start < 0.3
assert not {'numpy', 'torch', 'textworld', 'argparse', 'web_agent_site'} & {*sys.modules}
import os, sdar
assert 'transformers' not in sys.modules
assert os.environ["OMP_WAIT_POLICY"] == "passive"
text = open("sdar.py", encoding="utf-8").read()
assert text.index("OMP_WAIT_POLICY") < text.index("import torch")

# The script's exit code, and a kernel that cannot be compiled, where stdout is no console.
import io, runpy
sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
assert sdar.load_kernel("") is None
sdar.torch.set_num_threads(2)
sdar.load_policy(sdar.configure())  # the tiny policy takes one core
assert sdar.torch.get_num_threads() == 1
sys.argv, code = ["sdar.py", "--lr=2"], 0
try:
    runpy.run_path("sdar.py", run_name="__main__")
except SystemExit as end:
    code = end.code
assert code == 2 and sys.stderr.getvalue().startswith("sdar.py: --lr")"""


def test_imports_are_quick_and_do_nothing():
    place = {name: value for name, value in os.environ.items() if "OMP" not in name}
    command = [sys.executable, "-Bc", IMPORTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, env=place)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# --- 9. Chat -----------------------------------------------------------------------------

TEMPLATES = json.loads((DATA / "templates.json").read_text())


def with_template(chat, template):
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.eos_token = "<|endoftext|>"  # and not the end of a turn
    return sdar.Chat(tokenizer)


@mark.parametrize("template", ["", *TEMPLATES["accepted"]])
def test_glued_ids_are_the_rendered_conversation(template, hub):
    """But for the empty thought in front of every answer: Qwen3's template drops those of before,
    of which the policy has read each."""
    chat = with_template(hub[1], template)
    world = SimpleNamespace(instructions=" Rules.\n", examples=[("A cup.", "look")])
    first, at = chat.first(world, sdar.as_read(chat, "\n A mug.", {"hint": " \n"}))
    ids = first + chat.encode("go") + [chat.end_id] + chat.next("Nothing.", chat.end_id)
    rendered = chat.tokenizer.apply_chat_template(
        TEMPLATES["conversation"], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    thought, decode = "<think>\n\n</think>\n\n", chat.tokenizer.decode
    assert decode(ids).endswith(rendered.split("Nothing.")[1])
    rendered = rendered.replace(thought, "")
    assert decode(ids).replace(thought, "") == rendered
    assert decode(first[:at]).replace(thought, "") == rendered.split("A mug.")[0]
    assert chat.next("Nothing.", last_id=0) == [chat.end_id, *chat.next("Nothing.", chat.end_id)]
    assert {0, 2} <= chat.end_ids & hub[1].end_ids  # of the checkpoint, which has two


def test_a_plain_chat_reads_a_line_of_instructions_and_no_examples(hub, tmp_path):
    """Its folder remembers that it has learned to."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(hub[0].name_or_path, plain=True).save_pretrained(tmp_path)
    chat = sdar.Chat(AutoTokenizer.from_pretrained(tmp_path))
    world = SimpleNamespace(instructions="Rules.\n<action>", examples=[("A cup.", "look")])
    first, _ = chat.first(world, sdar.as_read(chat, "A mug.", {"hint": "Turn 1."}))
    messages = [{"role": "system", "content": "Rules."}, {"role": "user", "content": "A mug."}]
    options = {"add_generation_prompt": True, "enable_thinking": False}
    assert first == chat.tokenizer.apply_chat_template(messages, return_dict=False, **options)


@mark.parametrize("template, message", TEMPLATES["refused"])
def test_templates_that_do_not_frame_messages_one_by_one_are_refused(template, message, hub):
    tokenizer = copy.deepcopy(hub[1].tokenizer)
    tokenizer.chat_template = template
    with raises(Exception, match=message):  # its own, where the template raises one
        sdar.Chat(tokenizer)


def hostile_text(rng, words):
    """Control tokens, whole, cut, in capitals, in full-width letters, between odd characters."""
    text = ""
    for _ in range(rng.randrange(12)):
        word, cut = rng.choice(words), rng.randrange(9)
        wide = "".join(chr(ord(c) + 0xFEE0) for c in word)
        odd = "\0\u202e\u200b\ud800\u0338" + chr(rng.randrange(0x110000))
        text += rng.choice([word, word[:cut], word[cut:], word.upper(), wide, "<" * cut, odd])
    return text


def test_no_text_becomes_a_control_token(tiny, hub):
    rng, normal = random.Random(0), partial(unicodedata.normalize, "NFC")
    for _, chat in (tiny, hub):
        added = chat.tokenizer.get_added_vocab()
        for _ in range(600):
            text = hostile_text(rng, [*added, "<|im_end|>", "<think>", "system"])
            ids = chat.encode(text)
            assert not {*added.values()} & {*ids} - {chat.tokenizer.unk_token_id}
            kept = text.encode(errors="replace").decode().replace("\0", "")
            assert chat.plain or normal(chat.tokenizer.decode(ids)) == normal(kept)


def test_an_added_token_of_blanks_is_no_control_token(hub):
    """Gemma's tokenizers have runs of line breaks."""
    tokenizer = copy.deepcopy(hub[1].tokenizer)
    tokenizer.add_tokens("\n\n")
    (_,) = sdar.Chat(tokenizer).encode("\n\n")


# --- 10. The run's folder ----------------------------------------------------------------


def test_a_run_writes_its_folder_and_nothing_else(finished):
    """Its checkpoint is a model folder like any other."""
    final, folder, _ = finished
    paths = [path.name for place in (folder.parent, folder) for path in place.iterdir()]
    assert sorted(paths) == ["checkpoint", "config.json", "metrics.jsonl", "run", "state.pt"]
    given = json.loads((folder / "config.json").read_text())
    assert configure(**given) == small(folder.parent, save_every=1, overwrite=True)
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[1]) == final
    config = configure(**given | {"model": str(folder / "checkpoint")})
    result = sdar.evaluate(*sdar.load_policy(config), sdar.make_envs(config), config)
    assert result["by_type"] == final["eval_by_type"]


def dying_after(last):
    """Hooks of train(): the environment is gone after a step."""

    def step_batch(*args):
        envs.require(args[5] <= last, "the engine is gone", EnvUnavailable)
        return sdar.step_batch(*args)

    return {"step_batch": step_batch}


def test_a_run_that_dies_resumes_exactly(tmp_path):
    """In step 4, where the state is of step 2: the same bits in the end."""
    flags = {"steps": 4, "save_every": 2, "eval_every": 3, "eval_episodes": 2}
    flags |= {"retrieval": "ucb", "temperature": 2, "method": "rlsd", "teacher": "frozen"}
    whole = trained(tmp_path, "whole", **flags)[1]
    with raises(EnvUnavailable):
        trained(tmp_path, hooks=dying_after(3), **flags)
    assert lines(tmp_path / "run") == whole[:3]
    assert ["eval_success" in row for row in whole] == [False, False, True, True]
    assert trained(tmp_path, resume=True, **flags)[1] == whole
    one, two = (torch.load(path) for path in tmp_path.glob("*/state.pt"))
    assert (one["arms"], str(one["optimizer"])) == (two["arms"], str(two["optimizer"]))
    assert one["arms"]
    assert len({path.read_bytes() for path in tmp_path.glob("*/checkpoint/model.saf*")}) == 1


OTHER = """
"lr"      0.5         "--lr was .* now it is"
"method"  "grpo"      "--method was .* now it is"
"seed"    1           "--seed was .* now it is"
"dtype"   "bfloat16"  "--dtype was .* now it is"
"eval_episodes"  7    "--eval-episodes was .* now it is"
"steps"   2           "its 2 steps are done"
"""


def test_resume_refuses_other_settings(finished, tmp_path):
    shutil.copytree(finished[1], tmp_path / "run")
    for name, value, message in table(OTHER):
        with raises(UserError, match=message):
            trained(tmp_path, resume=True, **{"steps": 3, name: value})
    row = trained(  # on another machine, which is looked at more often
        tmp_path,
        resume=True,
        steps=3,
        eval_every=1,
        micro_batch=1,
        rollout_batch=3,
        gradient_checkpointing=True,
    )[1][2]
    for key in [key for key in row if "eval" not in key]:
        assert row[key] == approx(finished[2][2][key], rel=1e-3, abs=1e-5)


def test_resume_compares_what_an_experiment_adds_to_the_settings(tmp_path):
    trained(tmp_path, steps=1)
    config = small(tmp_path, resume=True)
    config.variant = "std:off"
    with raises(UserError, match="--variant was None, now it is 'std:off'"):
        sdar.train(config)


def test_a_path_may_be_written_otherwise_at_resume(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bank.json").write_text(json.dumps(envs.HOME.skills()))
    trained(tmp_path, skills="bank.json", steps=1)
    trained(tmp_path, skills=tmp_path / "bank.json", steps=2, resume=True)
    Path("bank.json").rename("run/bank.json")
    with raises(UserError, match="--skills was .*bank.json', now it is 'run"):
        trained(tmp_path, skills="run/bank.json", steps=3, resume=True)


def test_a_run_is_replaced_only_when_that_is_said(finished, tmp_path):
    """From its first step on the old one cannot be resumed."""
    shutil.copytree(finished[1], tmp_path / "run")
    with raises(UserError, match="--resume or --overwrite"):
        trained(tmp_path)
    with raises(UserError, match="overwrite --model"):
        trained(
            tmp_path,
            "run/../run",
            overwrite=True,
            model=tmp_path / "run/checkpoint/../checkpoint",
            preset="toy",
        )
    with raises(EnvUnavailable):
        trained(tmp_path, hooks=dying_after(1), overwrite=True, seed=1)
    assert not Path(tmp_path, "run/config.json").exists()
    expected = trained(tmp_path, "plain", seed=1)[1]
    assert trained(tmp_path, resume=True, seed=1)[1] == expected


def test_a_failing_save_leaves_the_old_state(finished, tmp_path, monkeypatch):
    save = torch.save

    def full(state, path):
        save(state, path)
        if state["step"] == 2:
            Path(path).write_bytes(b"half of it")
            raise RuntimeError("unexpected pos 704")  # in PyTorch's words

    with monkeypatch.context() as patch, raises(UserError, match="--out"):
        patch.setattr(torch, "save", full)
        trained(tmp_path, save_every=1)
    assert trained(tmp_path, steps=3, resume=True)[1] == finished[2]


WILSON = """
8   10  0.4902  0.9433
0   10  0.0     0.2775
0   60  0.0     0.0602
60  60  0.9398  1.0
"""


@mark.parametrize("wins, n, low, high", table(WILSON))
def test_wilson_agrees_with_tables(wins, n, low, high):
    assert sdar.wilson(wins, n) == approx((low, high), abs=1e-4)


# --- 11. Command line --------------------------------------------------------------------


def test_help_lists_every_flag_and_instrument(capsys):
    with raises(SystemExit, match="0"):
        main(["--help"])
    printed = capsys.readouterr().out
    for f in fields(sdar.Config):
        assert re.search(rf"{sdar.flag(f.name)}\b[^[]* \[{f.default}\]", printed), f.name
    instruments = re.findall(r"python (\.lab/[\w/]+\.py)", printed)
    assert all((ROOT / name).exists() for name in instruments or ["none"])


@mark.parametrize(
    "said", ["CUDA out of memory.", "CUBLAS_STATUS_ALLOC_FAILED", "Invalid buffer size", ""]
)
def test_memory_that_runs_out_is_one_line_with_the_flags_that_help(said, capsys):
    full = Mock(side_effect=RuntimeError(said))
    assert sdar.run(full if said else lambda: torch.empty(2**60)) == 2  # "": a CPU's own words
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search("--gradient-check.*--micro-b.*--rollout-b.*--max-new-tokens.*--model", line)


def test_other_faults_keep_their_traceback():
    with raises(RuntimeError, match="a fault of ours"):
        sdar.run(Mock(side_effect=RuntimeError("a fault of ours")))


@mark.parametrize("error, code", [(KeyboardInterrupt, 130), (OSError, 2), (UserError, 2)])
def test_what_stops_a_run_is_one_line(error, code, capsys):
    assert sdar.run(Mock(side_effect=error("disk\nfull"))) == code
    (said,) = capsys.readouterr().err.splitlines()
    assert ("--resume" if code == 130 else "disk full") in said


# --- envs.py: what all share --------------------------------------------------------------


class Counter(envs.TextEnv):
    """A world without rules: its state is what a test puts there."""

    name = "counter"
    instructions = "Count."
    goals = {f"{kind}{i}": (kind, ("train", "eval")) for kind in "ba" for i in range(3)}
    state = {}

    def _reset(self, task, seed):
        self.task = f"Count to {task}."
        return "one " * 2000, self.state

    def _step(self, action):
        return "two " * 2000, self.state


def test_slow_calls_go_in_threads_and_come_in_order():
    barrier = threading.Barrier(9, timeout=9)
    world = Mock(step=lambda i: (barrier.wait(), i)[1])
    found = envs.TextEnv.step_all(envs.AlfworldEnv, [world] * 9, range(9))
    assert found == [*range(9)]


ENDS = """
{"won": True}                 (1.0, True, False)
{"won": True, "over": False}  (1.0, True, False)
{"over": True}                (0.0, True, False)
{"valid": False}              (0.0, False, True)
"""


@mark.parametrize("state, outcome", table(ENDS))
def test_the_reward_comes_once_and_limits_are_kept(state, outcome):
    world = Counter(max_turns=2)
    observation, info = world.reset("a1")
    assert (info["task"], info["task_type"]) == ("Count to a1.", "a")
    assert len(observation) == len(world.step("x")[0]) == world.longest < 8000
    world.state = state
    _, *found, info = world.step("x")
    assert tuple(found) == outcome
    assert (info["won"], info["valid"]) == (state.get("won", False), state.get("valid", True))


def test_a_language_model_is_told_what_is_new():
    world, told = Counter(max_turns=9), []
    for actions in ("go look", "look fly go", "look go", "fly"):
        world.state = {"admissible": actions.split(), "tail": "."}
        info = world.step("x")[4] if told else world.reset("a1")[1]
        told.append(info["hint"].rpartition("\nTurn")[0])
    fly = ".\nNew admissible actions: fly"
    assert told == [".\nAdmissible actions: go, look", fly, ".", fly]
    assert "\nAdmissible" in world.reset("a1")[1]["hint"]
    assert info["hint"].endswith(f"\nTurn 4 of 9. {world.reminder}")


PANEL = """
"a0"  1000000
"b0"  1000000
"a1"  1000001
"b1"  1000001
"a2"  1000002
"b2"  1000002
"a0"  1000003
"""


def test_the_panel_is_fixed_and_has_the_types_in_turn():
    assert Counter().panel("eval", 7) == table(PANEL)


RESPONSES = r"""
"toy"     "go to desk 1"                              ("", False)
"tiny"    "go to desk 1"                              ("go to desk 1", True)
"tiny"    "<action></action>"                         ("", False)
"tiny"    ""                                          ("", False)
"tiny"    "I will look\naround"                       ("", False)
"tiny"    "<think>I should look for the cd"           ("", False)
"tiny"    "click[< prev]"                             ("click[< prev]", True)
"tiny"    "look\n"                                    ("look", True)
"tiny"    "look</action"                              ("", False)
"toy"     "a\nb</think>\n<action>open\ncup 1</action><action>look</action>"  ("open cup 1", True)
"toy"     "<Action> look </ACTION>"                   ("look", True)
"toy"     "a <action>go to desk 1"                    ("", False)
"alfworld"  "<action>go <ACTION>look</action> a</action>"  ("look", True)
"webshop"   "<action>buy</action><action>x</action>"  ("buy", True)
"search"  "<think>x</think><search> a\nb </search><answer>c</answer>"  ("<search>a b</search>", 1)
"search"  "a"                                         ("", False)
"search"  "<ANSWER>c</ANSWER><search>a</search>"      ("<answer>c</answer>", True)
"search"  "<search> </search>"                        ("", False)
"search"  "<search>a</answer>"                        ("", False)
"""


@mark.parametrize("name, response, parsed", table(RESPONSES))
def test_parse_reads_the_first_complete_tags(name, response, parsed):
    kind = envs.ENVS.get(name, envs.ToyEnv)
    env = kind.__new__(kind)
    env.plain = name == "tiny"
    assert env.parse(response) == parsed
    assert parsed[1] <= (env.plain or any(map(response.lower().count, env.closing_tags)))


# --- Skills -------------------------------------------------------------------------------


def test_a_skill_is_for_whole_words_and_its_task_types():
    skill = envs.Skill("a", "text", ("heat", "cool"), ("mug", "egg"))
    assert skill.matches("heat a Mug and put it", "heat")
    assert not skill.matches("heat a mug", "put")
    assert not skill.matches("heat mugs and a smug", "heat")
    assert envs.Skill("a", "text").matches("anything", "heat")
    assert envs.Skill("a", "text", keywords=["c++"]).matches("write c++ now", "put")
    with raises(UserError, match="a skill has a name and a text: .*'name'"):
        envs.SkillBank([{"text": "Look around first."}])


def test_retrieval_by_each_strategy():
    everything, task = {row["name"] for row in envs.HOME.skills()}, "heat a mug in desk 1"
    for strategy, size in zip(envs.SkillBank.STRATEGIES, (2, len(everything), 2, 3)):
        bank, found = envs.SkillBank(envs.HOME.skills(), strategy), set()
        for seed in range(50):
            names = [skill.name for skill in bank.retrieve(task, "heat", seed)]
            assert len({*names}) == len(names) == size
            found |= {*names}
        assert found == ({"mug", "heat"} if strategy == "keyword" else everything)
        assert envs.SkillBank([], strategy).retrieve(task, "heat", 0) == []


def test_the_bandit_by_hand():
    """Mean reward + sqrt(ln(all plays) / plays); a group in which nothing varies says nothing."""
    bank, task = envs.SkillBank(envs.HOME.skills(), "ucb"), ("put a mug in desk 1", "put")
    skills = {skill.name: skill for skill in bank.skills}
    cup, mug = skills["cup"], skills["mug"]
    episodes = []
    for skills in ([mug, cup], [mug], [mug], [cup]):
        episodes += [SimpleNamespace(task=task[0], task_type="put", skills=skills)] * 2
    advantages = torch.tensor([[1.0, -1], [2, -2], [0, 0], [1, -1]]).tolist()
    bank.learn(episodes, advantages, [[0.3, 0.1], [0.1, 0.3], [0.1, 0.2], [0.5, 0.5]])
    assert bank.arms == {"mug found": [2, 0.0], "cup not found": [1, 1.0]}
    assert bank.index(mug, *task) == approx(math.sqrt(math.log(3) / 2))
    assert bank.index(cup, *task) == approx(1 + math.sqrt(math.log(3)))
    assert bank.index(cup, "put a cup in desk 1", "put") == math.inf  # another arm
    bank.arms = {bank.arm(skill, *task): [9, 0.0] for skill in bank.skills}
    bank.arms["cup not found"] = [9, 5.0]
    assert bank.retrieve(*task, seed=1)[0] == cup


# --- The toy household -------------------------------------------------------------------

GAMES = (DATA / "toy_games.txt").read_text().splitlines()


@mark.parametrize("game", GAMES, ids=lambda game: game.split(":")[0])
def test_the_toy_by_hand(game):
    """task: actions. Nothing happens where one is marked ! (not here, closed or broken) or ?
    (malformed)."""
    task, *actions = re.split("[:,] ", game.replace(r"\n", "\n"))
    tools = {"clean": "sinkbasin 1", "heat": "microwave 2", "cool": "fridge 1"}
    home = dict.fromkeys(envs.CLASSES, "cabinet 1")
    world = make_env("toy", household=envs.Household(home, tools, "shelf 1"), max_turns=20)
    listed = world.reset(task)[1]["admissible"]
    for i, action in enumerate(actions, 1):
        observation, *outcome, info = world.step(action.strip("!?"))
        assert (observation == "Nothing happens.") == (action[0] in "!?")
        assert info["valid"] is (action[0] != "?")
        assert action[0] in "!?" or any(entry.startswith(action) for entry in listed)
        assert outcome == [float(i == len(actions)), i == len(actions), False]
        listed = info["admissible"]


def test_the_toys_splits_are_disjoint_and_cover_all_task_types():
    world, found = make_env("toy"), set()
    for split in ("train", "dev", "eval"):
        tasks = world.tasks(split)
        assert not found & {*tasks}
        found |= {*tasks}
        kinds = [world.goals[task][0] for task in tasks]
        assert {*kinds} == {*envs.TASK_TEXT}
        counts = {kinds.count(kind) for kind in kinds}
        assert (len(counts) == 1) == (split == "train")  # there every type equally often
    assert len(found) == 10 * (5 * 19 + 1)
    assert not envs.is_a("mug 12", "mug 1")
    assert world.tasks("eval")[0] == "put a mug in cabinet 6"


# --- The paper's environments: all but exact match is in .lab/tests ----------------------


ANSWERS = r"""
"The Eiffel Tower!"  "eiffel tower"   True
"a\t an man"         "Man"            True
"U.S.A"              "usa"            True
"the"                "The"            True
"the"                "a"              False
"!"                  "?"              False
"The."               "the"            True
"An!"                "a"              False
"theory"             "ory"            False
"Mr: [X] {y}_z?"     "mr x yz"        True
"caf\u00e9 \u2014"   "caf\u00e9"      False
"""


@mark.parametrize("answer, golden, won", table(ANSWERS))
def test_exact_match_is_the_official_one(answer, golden, won):
    assert (envs.normalized(answer) == envs.normalized(golden)) is won


# --- Environments by name, and those of one's own ----------------------------------------

NUMPY = '''
import numpy as np
from envs import TextEnv


class Num(TextEnv):
    """What Gymnasium and pandas hand back; and texts that no terminal can show."""

    name = "num"
    instructions = "Add. \\ud800 <action>a number</action>"
    default_turns = 2
    skills = [{"name": "a", "text": "half \\ud800 a\\0b <|end|>"}]
    goals = {np.str_(i): (np.int64(i % 2), ("train", "dev", "eval")) for i in range(4)}

    def _reset(self, task, seed):
        self.task = np.str_(f"\\udfff \\0 \\x1b[2J <|end|><|user|> {task}+1?")
        return self.task, {"admissible": np.array(["1", "2"])}

    def _step(self, action):
        right = (np.array([action]) == "2")[0]
        state = {"won": right, "over": np.True_, "valid": np.False_}
        return np.str_("No."), state | {"admissible": np.array(["2", "3"])}


class Lines(Num):
    def _reset(self, task, seed):
        return ["a list", "of lines"], {}
'''


@fixture
def own(tmp_path, monkeypatch):
    """The current folder, with the example of envs.py's first page in it, and others."""
    example = envs.__doc__.split("    # guess.py\n")[1].split("\nThen `python")[0]
    (tmp_path / "guess.py").write_text(textwrap.dedent(example))
    (tmp_path / "num.py").write_text(NUMPY)
    (tmp_path / "broken.py").write_text("import sys\nsys.exit()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("guess", None)
    sys.modules.pop("num", None)


def test_the_example_of_an_own_environment_is_played(own):
    world = make_env("guess:Guess")
    assert world.reset("kiwi")[0] == "What is the colour of the kiwi in my garden?"
    assert world.step("green")[1]
    (skill,) = envs.SkillBank(world.skills).retrieve(world.task, "colour", 0)
    assert skill.text == "The kiwi is green."
    with raises(EnvUnavailable, match="num failed at '1': TypeError"):
        make_env("num:Lines").reset("1")


@mark.parametrize("name, turns", [("guess:Guess", 3), ("num:Num", 1)])
def test_environments_of_ones_own_are_trained_on_and_resumed(name, turns, own, hub, capsys):
    size = f"--env {name} --tasks-per-step 5 --G 2 --eval-episodes 4 --rollout-batch 4"
    assert main([*size.split(), "--steps=1"]) == 0
    assert main([*size.split(), "--steps=2", "--resume"]) == 0
    out = re.findall(r"microscope.py --run (runs/\w+-sdar-s0)\n", capsys.readouterr().out)[1]
    ends = [[row["turns"], row["invalid_rate"], row["success"]] for row in lines(out)]
    assert ends == [[turns, name == "num:Num", 0]] * 2
    worlds = sdar.make_envs(configure(env=name, rollout_batch=1))  # by a language model, too
    starts = [(worlds[0].tasks("train")[0], 0, (0,))]
    (episode,) = sdar.rollout(*hub, worlds, starts, configure(), 1.0)
    assert episode.turns == episode.invalid == turns


def test_a_module_that_fails_is_named(own):
    with raises(UserError, match="broken:Bare cannot be imported.*SystemExit"):
        make_env("broken:Bare")
    with raises(UserError, match="guess.py'> has no class Guest"):
        make_env("guess:Guest")


def test_an_environment_without_its_texts_says_where_they_are(monkeypatch):
    monkeypatch.setattr(envs, "TEXTS", {})
    with raises(UserError, match="environments.json"):
        make_env("search")
