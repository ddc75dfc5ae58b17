"""Tests of warmstart.py: the scripted player, the tiny policy's tokenizer, imitation."""

import random
import re
from unittest.mock import Mock

import torch
import warmstart
from conftest import call
from pytest import mark

import envs
import sdar
from test_sdar import lines, pytestmark


@mark.parametrize("name", ["toy", "households:Forty", "households:Eighty"])
def test_the_skill_matters_by_construction(name):
    """The scripted player wins 95 % or more of the episodes with the skills, few without."""
    world, rng, won = envs.make_env(name), random.Random(0), [0, 0]
    known, tasks = {skill["name"] for skill in world.skills}, world.tasks("dev")
    for seed in range(600):
        observation, _ = world.reset(tasks[seed // 2 % len(tasks)], seed // 2)
        player, over = warmstart.Player(world, rng), False
        while not over:
            action = player.act(observation, known if seed % 2 else set())
            observation, reward, *ends, _ = world.step(action)
            over = any(ends)
        won[seed % 2] += reward / 300
    assert won[0] <= 0.25 < 0.95 <= won[1]


def test_the_carried_policy_says_what_the_player_says(tiny):
    """In random households; not how it explores for a teacher, and no noise."""
    model, chat = tiny
    built, rng = warmstart.toy_tokenizer(), random.Random(0)
    assert built.get_vocab() == chat.tokenizer.get_vocab()
    rows = [warmstart.demonstration(chat, rng) for _ in range(100)]
    assert -sdar.score(model, rows, sdar.configure()).mean() < 0.6
    ends = [mask for row in rows for id, mask in zip(row.ids, row.mask) if id == chat.end_id]
    assert 0.1 < ends.count(0) / len(ends) < 0.3
    text = chat.tokenizer.decode(sum([row.ids for row in rows], []))
    assert "<unk>" not in text
    assert len({*re.findall(r"mug is kept in (\w+ \d)", text)}) > 6
    habit = warmstart.demonstration(chat, rng, habit=1.0)
    assert "go to cabinet 1 <|end|>" in chat.tokenizer.decode(habit.ids)


def test_a_larger_household_gets_a_policy(tmp_path, capsys):
    out, size = str(tmp_path / "forty"), "--env households:Forty --eval-episodes 2"
    words = f"warmstart --steps 2 --tasks-per-step 1 {size} --out {out}".split()
    assert call(*words) == 0
    assert f"{out}, with the skill: won" in capsys.readouterr().out
    assert call(*words) == 2  # it is not replaced unasked
    model, chat = sdar.load_policy(sdar.configure(model=out, device="cpu"))
    torch.manual_seed(0)
    fresh = warmstart.new_policy(chat.tokenizer)
    for weights, before in zip(model.parameters(), fresh.parameters()):
        assert not torch.equal(weights, before)


# --- A language model --------------------------------------------------------------------

one_checkpoint = mark.parametrize("checkpoint", ["qwen2"], indirect=True)
SIZE = """--plain --device cpu --dtype float32 --save-every 2 --eval-every 3 --max-turns 2
    --tasks-per-step 1 --eval-episodes 2 --max-new-tokens 8 --lr .02 --steps"""


@one_checkpoint
def test_a_language_model_imitates_tagged_actions_of_the_list(hub):
    row = warmstart.demonstration(hub[1], random.Random(0))
    text, said = hub[1].tokenizer.batch_decode(
        [row.ids, [id for id, weight in zip(row.ids, row.mask) if weight]]
    )
    for action in said.split("<|im_end|>")[:-1]:
        (action,) = re.fullmatch("<action>(.*)</action>", action).groups()
        assert re.search(rf"[:,] {action}[,\n]", text)


@one_checkpoint
def test_imitation_resumes_exactly_and_its_model_reads_plainly(
    checkpoint, tmp_path, monkeypatch, capsys
):
    policies = []
    for out in (tmp_path / "whole", tmp_path / "killed"):
        words = ["warmstart", *SIZE.split(), 5, "--model", checkpoint, "--out", out]
        if out.name == "killed":
            with monkeypatch.context() as patch:  # at step 3
                patch.setattr(sdar, "evaluate", Mock(side_effect=KeyboardInterrupt))
                assert call(*words) == 130
            words.remove("--plain")  # a run keeps its view
        assert call(*words, "--resume") == 0
        config = sdar.configure(model=str(out / "checkpoint"), device="cpu")
        policies.append(sdar.load_policy(config))
    printed = capsys.readouterr().out
    assert printed.count("% of the answers are valid") == 4
    assert "step 3, with the skill: won" in printed
    rows = lines(tmp_path / "whole")
    assert lines(tmp_path / "killed") == rows
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    (model, _), (resumed, chat) = policies
    for weights, same in zip(model.parameters(), resumed.parameters()):
        assert torch.equal(weights, same)
    text = chat.tokenizer.decode(warmstart.demonstration(chat, random.Random(0)).ids)
    assert "go to" in text
    assert not re.search("<action>|Turn 1", text)


@one_checkpoint
def test_imitation_ends_when_the_format_is_there(checkpoint, tmp_path, monkeypatch):
    results = []
    for valid, skilled in ((0.9, 1.0), (1.0, 0.8), (1.0, 0.9), (1.0, 1.0)):
        counts = {"success": 0.0, "success_skill": skilled, "episodes": 2}
        results.append({"valid": valid, **counts})
    monkeypatch.setattr(sdar, "evaluate", Mock(side_effect=results))
    assert call("warmstart", *SIZE.split(), 50, "--model", checkpoint, "--out", tmp_path) == 0
    assert len(lines(tmp_path)) == 9
    assert (tmp_path / "checkpoint").is_dir()
