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
        observation, info = world.reset(tasks[seed // 2 % len(tasks)], seed // 2)
        player = warmstart.Player(world, rng)
        while world.turns < world.max_turns and not info["won"]:
            action = player.act(observation, known if seed % 2 else set())
            observation, *_, info = world.step(action)
        won[seed % 2] += info["won"] / 300
    assert won[0] <= 0.25 < 0.95 <= won[1]


def test_the_carried_policy_says_what_the_player_says(tiny):
    """In random households; not how it explores for a teacher, and no noise."""
    model, chat = tiny
    assert warmstart.toy_tokenizer().get_vocab() == chat.tokenizer.get_vocab()
    rng = random.Random(0)
    rows = [warmstart.demonstration(chat, rng) for _ in range(100)]
    assert -sdar.score(model, rows, sdar.configure()).mean() < 0.6
    ends = [mask for row in rows for id, mask in zip(row.ids, row.mask) if id == chat.end_id]
    assert 0.1 < ends.count(0) / len(ends) < 0.3
    text = chat.tokenizer.decode(sum([row.ids for row in rows], []))
    assert "<unk>" not in text
    homes = re.findall(r"mug is kept in (\w+ \d)", text)
    assert len({*homes}) > 6


def test_a_larger_household_gets_a_policy_that_knows_its_words(tmp_path):
    """And all of whose weights have moved."""
    size = "--env households:Forty --steps 2 --tasks-per-step 1 --eval-episodes 2 --out"
    assert call("warmstart", *size.split(), tmp_path) == 0
    config = sdar.configure(model=tmp_path, device="cpu")
    model, chat = sdar.load_policy(config)
    torch.manual_seed(0)
    fresh = warmstart.new_policy(chat.tokenizer)
    for weights, before in zip(model.parameters(), fresh.parameters()):
        assert not torch.equal(weights, before)
    world = envs.make_env("households:Forty")
    row = warmstart.demonstration(chat, random.Random(0), world)
    assert "<unk>" not in chat.tokenizer.decode(row.ids)
    assert row.env.places == world.places


# --- A language model --------------------------------------------------------------------

one_checkpoint = mark.parametrize("checkpoint", ["qwen2"], indirect=True)
SIZE = """warmstart --device cpu --dtype float32 --save-every 2 --eval-every 3 --max-turns 2
    --tasks-per-step 1 --eval-episodes 2 --max-new-tokens 8 --lr .02 --resume --steps"""


@one_checkpoint
def test_a_language_model_imitates_tagged_actions_of_the_list(hub):
    _, chat = hub
    row = warmstart.demonstration(chat, random.Random(0))
    said = [id for id, weight in zip(row.ids, row.mask) if weight]
    text, said = chat.tokenizer.batch_decode([row.ids, said])
    for action in said.split("<|im_end|>")[:-1]:
        (action,) = re.fullmatch("<action>(.*)</action>", action).groups()
        assert re.search(rf"[:,] {action}[,\n]", text)


@one_checkpoint
def test_imitation_resumes_exactly_and_its_model_reads_plainly(
    checkpoint, tmp_path, monkeypatch, capsys
):
    killed = tmp_path / "killed"
    whole = tmp_path / "whole"
    words = [*SIZE.split(), 5, "--model", checkpoint, "--out"]
    with monkeypatch.context() as patch:  # at step 3
        patch.setattr(sdar, "evaluate", Mock(side_effect=KeyboardInterrupt))
        assert call(*words, killed, "--plain") == 130
    assert call(*words, killed) == 2  # another view is another run
    assert call(*words, killed, "--plain") == 0
    assert call(*words, whole, "--plain") == 0
    assert capsys.readouterr().out.count("% of the answers are valid") == 4
    rows = lines(whole)
    assert lines(killed) == rows
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    weights = [path.read_bytes() for path in tmp_path.glob("*/checkpoint/*.safetensors")]
    assert weights[0] == weights[1]
    config = sdar.configure(model=killed / "checkpoint", device="cpu")
    _, chat = sdar.load_policy(config)
    assert chat.plain


@one_checkpoint
def test_imitation_ends_when_the_format_is_there(checkpoint, tmp_path, monkeypatch):
    results = []
    for valid, skilled in ((0.9, 1.0), (1.0, 0.8), (1.0, 0.9)):
        results.append(dict(valid=valid, success_skill=skilled, success=0.0, episodes=2))
    monkeypatch.setattr(sdar, "evaluate", Mock(side_effect=results))
    assert call(*SIZE.split(), 50, "--model", checkpoint, "--out", tmp_path) == 0
    assert len(lines(tmp_path)) == 9
    assert (tmp_path / "checkpoint").is_dir()
