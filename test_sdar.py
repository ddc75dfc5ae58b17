"""The proof of sdar.py and envs.py, in their order: hand numbers, oracles, the whole pipeline on
small models, and silent bugs that are planted to see that a test finds them.

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
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial, wraps
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pytest import approx, fixture, mark, raises

from torch.nn.utils import parameters_to_vector as vector
from tqdm import tqdm

import envs
import sdar
from envs import EnvUnavailable, UserError, make_env
from sdar import METHODS, configure, main

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


def test_what_is_given_wins_over_the_method_the_preset_and_the_default():
    assert configure().lr == configure(preset="toy").lr == 6e-4
    assert configure(method="opsd").lr == 3e-4
    assert configure(method="opsd", lr=0.5).lr == 0.5
    assert configure(method="skill_sd", preset="paper").sdar_coef == 0.001
    assert configure(model="other").preset == "paper"


PUBLISHED = """steps=150 tasks_per_step=16 group_size=8 lr=1e-6 sdar_coef=0.01 gate_beta=5 clip_eps=0.2
    kl_coef=0.01 max_new_tokens=512 grad_clip=1 eval_episodes=128 eval_every=5 eval_temperature=0.4
    teacher=live gate=gap retrieval=keyword rlsd_decay=100"""


def test_the_papers_preset_is_the_published_run():
    published = dict(setting.split("=") for setting in PUBLISHED.split())
    assert configure(preset="paper") == configure(preset="paper", **published)


def test_settings_become_values_of_pythons_own(tmp_path):
    config = configure(out=tmp_path, seed=np.int64(3), lr=np.float32(0.5), steps="1", model="~/m")
    assert (config.out, config.seed, config.lr, config.steps) == (str(tmp_path), 3, 0.5, 1)
    assert config.model == os.path.expanduser("~/m")
    assert all(type(getattr(config, f.name)) is f.type for f in fields(config))


# --- 2. Conversation ---------------------------------------------------------------------

TEMPLATES = json.loads((DATA / "templates.json").read_text())


def with_template(chat, template):
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.chat_template = template or tokenizer.chat_template
    return sdar.Chat(tokenizer)


@mark.parametrize("template", ["", *TEMPLATES["accepted"]])
def test_glued_ids_are_the_rendered_conversation(template, hub):
    """But for the empty thought in front of every answer: Qwen3's template drops those of before,
    of which the policy has read each."""
    chat = with_template(hub[1], template)
    world = SimpleNamespace(instructions=" Rules.\n", examples=[("A cup.", "look")])
    first, at = chat.first(world, "A mug.")
    ids = first + chat.encode("go") + [chat.end_id] + chat.next("Nothing.", chat.end_id)
    messages = []
    for pair in "system Rules.,user A cup.,assistant look,user A mug.,assistant go".split(","):
        messages.append(dict(zip(("role", "content"), pair.split(" ", 1))))
    messages.append({"role": "user", "content": "Nothing."})
    rendered = chat.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    thought, decode = "<think>\n\n</think>\n\n", chat.tokenizer.decode
    assert decode(ids).endswith(rendered.split("Nothing.")[1])
    rendered = rendered.replace(thought, "")
    assert decode(ids).replace(thought, "") == rendered
    assert decode(first[:at]).replace(thought, "") == rendered.split("A mug.")[0]
    assert chat.next("Nothing.", last_id=5) == [chat.end_id, *chat.next("Nothing.", chat.end_id)]
    assert {0, 2} <= hub[1].end_ids  # of the checkpoint, which has two


@mark.parametrize("template, message", TEMPLATES["refused"])
def test_templates_that_do_not_frame_messages_one_by_one_are_refused(template, message, hub):
    tokenizer = copy.deepcopy(hub[1].tokenizer)
    tokenizer.chat_template = template
    with raises(Exception, match=message):  # its own, where the template raises one
        sdar.Chat(tokenizer)


def test_a_prompt_has_no_blanks_at_its_ends(tiny, hub):
    """Templates that trim a message would drop them."""
    info = {"hint": "\nTurn 1. \n"}
    assert sdar.as_read(hub[1], "\n A mug.", info) == "A mug.\nTurn 1."
    assert sdar.as_read(tiny[1], "A mug.", info) == "A mug."  # it reads no hint


def hostile_text(rng, words):
    """Control tokens, whole, cut, in capitals, in full-width letters, between odd characters."""
    text = ""
    for _ in range(rng.randrange(12)):
        word, cut = rng.choice(words), rng.randrange(9)
        wide = "".join(chr(ord(c) + 0xFEE0) for c in word)
        odd = rng.choice(" \t\r\0\u202e\u200b\ud800\u0338") + chr(rng.randrange(0x110000))
        text += rng.choice([word, word[:cut], word[cut:], word.upper(), wide, "<" * cut, odd])
    return text


def test_no_text_becomes_a_control_token(tiny, hub):
    rng = random.Random(0)
    for _, chat in (tiny, hub):
        added = {i: text for text, i in chat.tokenizer.get_added_vocab().items() if text != "<unk>"}
        words = [*added.values(), "<|end|>", "<|im_end|>", "<think>", "system"]
        for _ in range(600):
            text = hostile_text(rng, words)
            ids = chat.encode(text)
            assert not added.keys() & {*ids}, text
            clean = text.encode(errors="replace").decode().replace("\0", "")
            assert chat.plain or chat.tokenizer.decode(ids) == clean, "nothing of it may be lost"


# --- 3. Rollout --------------------------------------------------------------------------


@fixture(scope="session", params=["tiny", "hub"])
def played(request, tiny, hub):
    """Episodes of unequal lengths: (policy, episodes, (environment, text) pairs that were parsed,
    how many ids each call of the model read)."""
    model, chat = {"tiny": tiny, "hub": hub}[request.param]
    read = []

    def count(module, args, given):
        width = given["input_ids"].shape[1]
        read.append(given["attention_mask"][:, -width:].sum().item())

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    with pytest.MonkeyPatch.context() as patch:
        texts = noted(patch, envs.TextEnv, "parse", lambda *args: args)
        config = configure(group_size=2, temperature=0.8)
        episodes = play((model, chat), config, episodes=4, max_turns=6)
    hook.remove()
    assert len({len(episode.ids) for episode in episodes}) > 1, "the batch must be ragged"
    return (model, chat), episodes, texts, read


def test_the_mask_covers_exactly_what_was_sampled_and_its_end(played):
    (_, chat), episodes, parsed, _ = played
    for episode in episodes:
        runs = itertools.groupby(zip(episode.mask, episode.ids), lambda pair: pair[0])
        answers = [[id for _, id in run] for sampled, run in runs if sampled]
        texts = [text for env, text in parsed if env is episode.env]
        assert chat.tokenizer.batch_decode(answers, skip_special_tokens=True) == texts
        assert len(texts) == episode.turns
        assert sum(map(len, answers)) == len(episode.logprobs)
        for answer in answers:
            assert answer[-1] in chat.end_ids or len(answer) == 8
            assert not chat.end_ids & {*answer[:-1]}


def test_only_new_ids_are_read(played):
    _, episodes, _, read = played
    assert sum(read) == sum(episode.read for episode in episodes)
    assert {len(episode.ids) - episode.read for episode in episodes} <= {0, 1}


def plain(model, ids, mask, temperature=1.0):
    """Log-probs and entropies of the sampled ids: an unpadded pass, the library's distribution."""
    at = np.flatnonzero(mask)
    logits = model(torch.tensor([ids])).logits[0, at - 1] / temperature
    exact = torch.distributions.Categorical(logits=logits)
    return exact.log_prob(torch.tensor(ids)[at]), exact.entropy()


def test_sampled_is_scored_is_a_plain_forward_pass(played):
    """The sampler's cached, padded log-probs; those of the update; one unpadded pass."""
    (model, _), episodes, *_ = played
    config, expected = configure(temperature=0.8), []
    for episode in episodes:
        at, skill = episode.skill_at, episode.skill_ids
        skilled = episode.ids[:at] + skill + episode.ids[at:]
        exact = plain(model, episode.ids, episode.mask, 0.8)
        expected.append((*exact, plain(model, skilled, [0] * len(skill) + episode.mask, 0.8)[0]))
        assert exact[0].tolist() == approx(episode.logprobs, abs=1e-4)
    ours = (
        *sdar.response_logprobs(model, episodes, config),
        sdar.score(model, episodes, config, True),
    )
    for values, exact in zip(ours, zip(*expected)):
        assert torch.allclose(values, torch.cat(exact), atol=1e-4)
    assert (ours[0] - ours[2]).abs().max() > 1e-3


def test_the_teacher_reads_the_students_ids_and_the_skill_at_one_place(played):
    (_, chat), episodes, *_ = played
    decode = chat.tokenizer.decode
    for episode in episodes:
        bank = episode.env.bank.skills
        right = [skill for skill in bank if skill.matches(episode.task, episode.task_type)]
        assert episode.skills == right
        skill = "Skill: " + " ".join(skill.text for skill in right) + "\n"
        assert episode.skill_ids == chat.encode(skill)
        ids, mask = episode.view(True)
        place = slice(episode.skill_at, episode.skill_at + len(episode.skill_ids))
        assert (ids[place], sum(mask[place])) == (episode.skill_ids, 0)
        del ids[place], mask[place]
        assert (ids, mask) == (episode.ids, episode.mask) == episode.view(False)
        assert "kept in" in decode(episode.skill_ids)
        assert "kept in" not in decode(ids)
        assert decode(ids[episode.skill_at :]).startswith("You are in the middle of a room")


def test_with_skill_the_student_reads_it_and_nobody_is_taught(tiny):
    episode = play(tiny, configure(group_size=2), 2, with_skill=True)[0]
    assert "kept in" in tiny[1].tokenizer.decode(episode.ids[episode.skill_at :])
    assert episode.skill_ids == []


def test_a_group_shares_its_start_and_not_its_draws(tiny):
    many = play(tiny, configure(group_size=4))
    starts = [str(episode.ids[: episode.mask.index(1)]) for episode in many]
    assert starts == starts[:1] * 4 + starts[4:5] * 4
    assert starts[0] != starts[4]
    assert len({str(episode.ids) for episode in many}) == 8


def test_draws_depend_on_their_numbers_and_not_on_their_neighbours(tiny):
    def ids(episodes, stream=5, **more):
        played = play(tiny, configure(group_size=4), episodes, stream, **more)
        return [episode.ids for episode in played]

    many = ids(8)
    assert ids(8) == ids(8, at_once=3) == many
    assert ids(3) == many[:3]
    assert ids(8, stream=6) != many


def test_temperature_zero_is_greedy(tiny):
    config = configure(group_size=4)
    config.temperature = 0.0
    assert len({str(episode.ids[:40]) for episode in play(tiny, config, 4)}) == 1


def test_a_response_that_is_cut_gets_its_end_from_the_frame(tiny):
    for i, episode in enumerate(play(tiny, configure(group_size=4, max_new_tokens=1))):
        assert episode.turns == episode.invalid == sum(episode.mask) == 10 - i % 3
        assert tiny[1].tokenizer.decode(episode.ids).count("<|end|>") == 9 - i % 3


def test_a_response_ends_at_its_closing_tag_however_it_is_cut(hub, monkeypatch):
    encode = hub[1].encode
    letters = sum(map(encode, "<action>look</action>"), [])
    script = [encode("<action>look</action>"), letters, [*encode("look</action "), hub[1].end_id]]
    columns = zip(*[row + [5] * 60 for row in script])
    monkeypatch.setattr(sdar.Sampler, "draw", lambda *_: (next(columns), [0.0] * 3))
    config = configure(group_size=3, max_new_tokens=60)
    for row, episode in zip(script, play(hub, config, 3, max_turns=1)):
        assert [*itertools.compress(episode.ids, episode.mask)] == row
    assert len(script[0]) < len(letters)


def test_an_episode_that_fills_the_context_ends_there(policy, monkeypatch):
    """The teacher's sequence, whose skill is long here, must fit, too."""

    def lengths():
        episodes = play(policy, configure(group_size=4, retrieval="full"))
        return [len(episode.view(True)[0]) for episode in episodes]

    room = max(lengths()) - 5
    monkeypatch.setattr(policy[0].config, "max_position_embeddings", room)
    assert room / 2 < max(lengths()) <= room


def test_slow_calls_go_in_threads_and_come_in_order():
    barrier = threading.Barrier(9, timeout=9)
    calls = [lambda i=i: (barrier.wait(), i)[1] for i in range(9)]
    assert envs.call_all(calls, in_threads=True) == [*range(9)]


def test_a_long_rollout_has_a_bar_that_moves(tiny, capsys, monkeypatch):
    def at_once(*args, **given):
        return tqdm(*args, **given | {"delay": 0, "mininterval": 0})

    play(tiny, configure(group_size=2), 2)
    assert capsys.readouterr().err == ""  # not yet two seconds
    monkeypatch.setattr(sdar, "tqdm", at_once)
    play(tiny, configure(group_size=2), 2)
    assert {"0/2", "1/2"} <= {*re.findall(r"\d/2", capsys.readouterr().err)}


# --- 4. Log-probs of the sampled ids -----------------------------------------------------


@mark.parametrize("at_once", [10**6, 100])  # the second goes in chunks of two rows
def test_token_logprobs_agree_with_float64(at_once, monkeypatch):
    monkeypatch.setattr(sdar, "LOGITS_AT_ONCE", at_once)
    torch.manual_seed(0)
    hidden, head, ids = torch.randn(7, 6), torch.randn(50, 6), torch.arange(7)
    weights, saved = [hidden.requires_grad_(), head.requires_grad_()], []

    def keep(x):
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        ours = sdar.token_logprobs(hidden, head, ids, 0.7)
    assert not {7 * 50, 2 * 50} & {*saved}, "logits wait for the backward pass"
    exact = torch.distributions.Categorical(logits=hidden.double() @ head.double().T / 0.7)
    for values, expected in zip(ours, (exact.log_prob(ids), exact.entropy())):
        assert torch.allclose(values.double(), expected, atol=1e-5)
        pair = [
            torch.autograd.grad(x.sum(), weights, retain_graph=True) for x in (values, expected)
        ]
        for slope, other in zip(*pair):
            assert torch.allclose(slope, other, atol=1e-4)


def test_token_logprobs_use_the_kernel_that_they_are_given():
    arguments = torch.ones(2, 3), torch.ones(5, 3), torch.ones(2).long()
    values, _ = sdar.token_logprobs(*arguments, 7.0, lambda *given: (given[0][:, 0] * 7, given[1]))
    assert values.tolist() == [21, 21]


# --- 5. Objectives: hand numbers of the paper's formulas ---------------------------------

VECTORS = json.loads((DATA / "vectors.json").read_text())


@mark.parametrize("name, case", [(name, case) for name in VECTORS for case in VECTORS[name]])
def test_functions_have_their_hand_numbers(name, case):
    """Values and the gradient of the first one's sum in the first argument."""
    first, *rest = [torch.tensor(values).float() for values in case["arguments"]]
    found = getattr(sdar, name)(first.requires_grad_(), *rest, **case.get("options", {}))
    found = found if isinstance(found, dict) else {name: found}
    assert found.keys() == case["returns"].keys()
    for key, expected in case["returns"].items():
        assert found[key].tolist() == approx(np.array(expected), rel=2e-6, abs=2e-6)
    if "gradient" in case:
        [*found.values()][0].sum().backward()
        assert first.grad.tolist() == approx(case["gradient"], rel=2e-6, abs=2e-6)


@mark.parametrize("reward", [0.0, 1.0, 0.97, -0.03, 1 / 3, 1e6])
def test_equal_rewards_are_no_advantage(reward):
    for size in (2, 7, 8, 64):
        assert sdar.group_advantages(torch.full((3, size), reward)).abs().max() < 1e-9


@mark.parametrize("kind", sdar.GATES)
def test_the_gradient_goes_through_the_student_alone(kind):
    """Not through the gate, of whatever it is made, and not through the teacher."""
    student = torch.linspace(-3, 0, 5).requires_grad_()
    terms = sdar.sdar_loss(student, student * 2, student * 0.3, kind, 2.0)
    terms["sdar_loss"].sum().backward()
    assert torch.allclose(student.grad, -terms["gate"])


def test_docstring_examples_are_true():
    failed, tried = doctest.testmod(sdar, extraglobs={"torch": torch})
    assert failed == 0 < tried


# --- 6. Update ---------------------------------------------------------------------------


def one_update(policy, objective=sdar.objective, step=1, **changes):
    """An update by SGD, by default in one mini-batch: (change of the weights, that is -gradient;
    metrics; episodes; batch; start policy). A frozen teacher is another one."""
    config = configure(**{"group_size": 4, "minibatches": 1, "grad_clip": 1e6, **changes})
    model, start = copy.deepcopy(policy[0]), copy.deepcopy(policy[0])
    start.model.norm.weight.data *= 1.1
    teacher = start if config.teacher == "frozen" else model
    episodes = play(policy, config)
    episodes[0].reward = episodes[5].reward = 1.0
    episodes[2].invalid += 3
    batch = sdar.step_batch(model, start, teacher, episodes, config, step)
    sgd, rng = torch.optim.SGD(model.parameters(), lr=1.0), np.random.default_rng(0)
    metrics = sdar.update(model, sgd, episodes, batch, config, rng, objective)
    change = vector(model.parameters()) - vector(policy[0].parameters())
    return change.detach(), metrics, episodes, batch, start


def test_an_update_is_the_papers_formula(tiny):
    """All of it again: rewards to advantages, readers to a gate, one mean over all tokens."""
    changes = {"temperature": 0.8, "kl_coef": 0.3, "sdar_coef": 0.5, "invalid_penalty": 0.25}
    change, metrics, episodes, _, start = one_update(tiny, **changes)
    model, losses = copy.deepcopy(tiny[0]), []
    for row, episode in enumerate(episodes):
        group = episodes[row // 4 * 4 :][:4]
        rewards = [other.reward - 0.25 * other.invalid for other in group]
        advantage = (rewards[row % 4] - mean(rewards)) / (stdev(rewards) + 1e-6)
        student, _ = plain(model, *episode.view(False), 0.8)
        teacher = plain(model, *episode.view(True), 0.8)[0].detach()
        reference = plain(start, *episode.view(False), 0.8)[0].detach()
        gate = torch.sigmoid(5 * (teacher - student.detach()))
        d = reference - student
        grpo = -advantage * (student - student.detach()).exp() + 0.3 * (d.exp() - d - 1)
        losses.append(grpo + 0.5 * gate * (teacher - student))
    loss = torch.cat(losses).mean()
    loss.backward()
    gradient = vector(weight.grad for weight in model.parameters())
    assert metrics["loss"] == approx(loss.item(), abs=1e-5)
    assert torch.allclose(change, -gradient, atol=1e-4 * gradient.abs().max())
    assert metrics["grad_norm"] == approx(gradient.norm().item(), rel=1e-3)


@mark.parametrize("method", METHODS)
def test_the_loss_is_the_sum_of_its_terms(method, tiny):
    _, terms, _, batch, _ = one_update(tiny, method=method, kl_coef=0.3, sdar_coef=0.5)
    total = (method != "opsd") * terms["policy_loss"] + 0.3 * terms["kl"]
    assert terms["loss"] == approx(total + 0.5 * terms.get("sdar_loss", 0), rel=1e-4, abs=1e-7)
    assert (terms["ratio"], terms["clipped"]) == approx((1, 0), abs=1e-5), "on policy"
    if method == "skill_sd":
        exact = sdar.skill_sd_loss(batch["old"], batch["teacher"], batch["old"])["sdar_loss"]
        assert terms["sdar_loss"] == approx(exact.mean().item(), rel=1e-4)


REACH = """
"clip_eps"         [0.2, 5]         "clipped"
"gate_beta"        [5, 2]           "gate"
"gate"             ["gap", "none"]  "gate"
"kl_coef"          [0.01, 0.5]      "loss"
"sdar_coef"        [1, 0.5]         "loss"
"policy_coef"      [1, 0.5]         "loss"
"invalid_penalty"  [0.01, 0.5]      "policy_loss"
"temperature"      [1, 0.7]         "entropy"
"""


@mark.parametrize("name, values, key", table(REACH))
def test_settings_reach_the_update(name, values, key, tiny):
    found = [one_update(tiny, minibatches=2, **{name: value})[1][key] for value in values]
    assert found[0] != found[1]


def test_gradient_and_metrics_do_not_depend_on_the_micro_batch(tiny):
    one, metrics, *_ = one_update(tiny)
    many, others, *_ = one_update(tiny, micro_batch=3)
    assert torch.allclose(one, many, atol=1e-6)
    assert one.abs().max() > 1e-4
    assert metrics == approx(others, rel=1e-4, abs=1e-6)


def test_every_mini_batch_is_a_step_over_other_episodes(tiny):
    """The later ones are off policy."""
    seen, moved = [], []

    def noting(model, micro, tokens, config):
        terms = sdar.objective(model, micro, tokens, config)
        seen.append([str(episode.ids) for episode in micro])
        moved.append((terms["ratio"] - 1).abs().max().item())
        return terms

    episodes = one_update(tiny, noting, minibatches=3)[2]
    order = np.random.default_rng(0).permutation(8)
    assert sum(seen, []) == [str(episodes[row].ids) for row in order]
    assert [len(part) for part in seen] == [3, 3, 2]
    assert moved[0] < 1e-4 < 1e-3 < min(moved[1:])


def test_the_gradient_is_clipped_or_refused(tiny):
    change, metrics, *_ = one_update(tiny, grad_clip=1e-3)
    assert metrics["grad_norm"] > 1e-2
    assert change.norm().item() == approx(1e-3, rel=1e-3)
    with raises(UserError, match="gradient is not finite.*--lr"):
        one_update(tiny, lambda *args: {"loss": sdar.objective(*args)["loss"] * math.nan})


@mark.parametrize("teacher", ["live", "frozen"])
def test_without_a_skill_the_gap_is_0_and_the_gate_a_half(teacher, tiny, monkeypatch):
    """Whoever the teacher is; and not beside, where there is one."""
    first = make_env("toy").tasks("train")[0]
    monkeypatch.setattr(envs.Skill, "matches", lambda skill, task, kind: task == first)
    _, _, episodes, batch, _ = one_update(tiny, teacher=teacher)
    terms = sdar.sdar_loss(batch["old"], batch["teacher"])
    taught = sum(len(episode.logprobs) for episode in episodes[:4])
    assert {*terms["gate"][taught:].tolist()} == {0.5}
    assert not terms["sdar_loss"][taught:].any()
    assert terms["sdar_loss"][:taught].abs().min() > 0


def test_rlsds_teacher_sizes_the_advantage_less_and_less(tiny):
    for step, mix in ((4, 0.3), (10, 0), (30, 0)):
        changes = {"method": "rlsd", "rlsd_decay": 10, "step": step}
        batch = one_update(tiny, **changes)[3]
        plain_advantages = one_update(tiny, method="grpo")[3]["advantages"]
        gap = batch["teacher"] - batch["old"]
        expected = sdar.rlsd_advantages(plain_advantages, gap, mix)
        assert torch.allclose(batch["advantages"], expected, atol=1e-5)


@mark.parametrize("fault", ["mask is shifted", "other temperature", "weights overflow", "padding"])
def test_ids_sampled_that_are_not_ids_scored_stop_the_step(fault, policy):
    """The last: a layer that carries a sum along, padding included; no config tells."""
    config, model, layer = configure(group_size=4), policy[0], policy[0].model.layers[0]
    if fault == "padding":
        layer.mlp.register_forward_hook(lambda _, args, output: output + args[0].cumsum(1))
    episodes = play(policy, config)
    for episode in episodes:
        if fault == "mask is shifted":
            episode.mask = episode.mask[1:] + [0]
    if fault == "other temperature":
        config.temperature = 0.9
    if fault == "weights overflow":
        model.lm_head.weight.data[0, 0] = math.inf
    with raises(UserError, match="ids sampled are not ids scored.*--lr"):
        sdar.step_batch(model, model, model, episodes, config, 1)


@mark.parametrize("checkpointing", [False, True])
def test_checkpointing_computes_a_layer_twice(checkpointing):
    """In the mode in which the library checkpoints; and leaves the other one behind."""
    policy, modes = sdar.load_policy(configure(gradient_checkpointing=checkpointing)), []
    mlp = policy[0].model.layers[0].mlp
    mlp.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    one_update(policy, gradient_checkpointing=checkpointing, method="grpo", kl_coef=0)
    assert modes.count(True) == 2 * checkpointing
