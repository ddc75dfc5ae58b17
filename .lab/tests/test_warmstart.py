"""Tests of warmstart.py: the scripted player, the tiny policy's tokenizer and recipe, imitation."""

import copy
import hashlib
import json
import random
import re

import numpy as np
import torch
import warmstart
from pytest import fixture, mark

import envs
import sdar
from sdar import configure, main
from test_sdar import lines, pytestmark  # noqa: F401

FORTY, EIGHTY = "large_household:Forty", "large_household:Eighty"


def scripted_reward(world, task, seed, known, rng):
    """What the scripted player gets in one episode."""
    observation, _ = world.reset(task, seed)
    player, reward, over = warmstart.Player(world, rng), 0.0, False
    while not over:
        observation, reward, *ends, _ = world.step(player.act(observation, known))
        over = any(ends)
    return reward


@mark.parametrize(
    "name, split",
    [("toy", "train"), ("toy", "dev"), ("toy", "eval"), (FORTY, "eval"), (EIGHTY, "dev")],
)
@mark.parametrize("skilled, low, high", [(True, 0.95, 1), (False, 0, 0.25)])
def test_the_skill_matters_by_construction(name, split, skilled, low, high):
    """Of the scripted player: with the skills 95 % or more of the episodes are won."""
    world, rng, wins = envs.make_env(name), random.Random(0), 0
    known = {skill["name"] for skill in world.skills} if skilled else set()
    tasks = world.tasks(split)
    for seed in range(300):
        wins += scripted_reward(world, tasks[seed % len(tasks)], seed, known, rng)
    assert low <= wins / 300 <= high


def test_a_player_remembers_where_it_has_been_and_what_did_not_work():
    world = envs.make_env("toy")
    observation, _ = world.reset("heat a mug and put it in sofa 1", 0)
    player, actions = warmstart.Player(world, random.Random(1)), []
    world.hand, world.contents[world.household.home["mug"]] = "mug 1", []
    world.where = "microwave 3"  # the one that works is another
    for _ in range(6):
        actions.append(player.act(observation, set()))
        observation = world.step(actions[-1])[0]
    assert [action for action in actions if action.startswith("go to microwave 3")] == []
    assert actions.count("heat mug 1") == len({*player.broken}) + 1
    assert f"go to {world.household.appliance['heat']}" in actions


@mark.parametrize("name, places", [("toy", 20), (FORTY, 40), (EIGHTY, 80)])
def test_the_tokenizer_knows_the_world_and_keeps_actions(name, places):
    """Decoding an encoded action gives it back, and no observation or skill holds an unknown
    word."""
    world, rng = envs.make_env(name), random.Random(0)
    assert len(world.storages) == len({*world.storages}) == places
    chat = sdar.Chat(warmstart.toy_tokenizer(world))
    texts = ["Skill: " + " ".join(skill["text"] for skill in world.skills) + "\n"]
    for i, task in enumerate([*world.goals][:: places // 20]):
        observation, info = world.reset(task, i)
        for action in info["admissible"]:
            assert chat.tokenizer.decode(chat.encode(action)) == action
        step = world.step(warmstart.Player(world, rng).act(observation, set()))
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
    text = " ".join(chat.tokenizer.decode(row.ids) for row in rows)
    for c in envs.CLASSES:
        assert len(set(re.findall(rf"\b{c} is kept in (\w+ \d)", text))) > 6, c


def test_demonstrations_in_a_larger_household_use_its_places_and_turns():
    world, rng, places = envs.make_env(EIGHTY), random.Random(0), set()
    chat, turns, explored = sdar.Chat(warmstart.toy_tokenizer(world)), [], []
    for _ in range(100):
        row = warmstart.demonstration(chat, rng, world=world)
        places |= {*re.findall(r"(?:cabinet|drawer) \d+", chat.tokenizer.decode(row.ids))}
        ends = [weight for id, weight in zip(row.ids, row.mask) if id == chat.end_id]
        turns.append(len(ends))
        explored.append(ends.count(0))
    assert len(places) > 60
    assert max(turns) == 42  # a demonstration has two turns more than an episode
    assert 25 < max(explored) < 42


def test_demonstrations_teach_actions_and_not_the_prompt(demonstrations):
    """Nor exploring for the teacher, nor random actions."""
    chat, rows = demonstrations
    for row in rows:
        assert len(row.ids) == len(row.mask)
        assert set(row.mask) <= {0, 1, 0.2}
        assert not any(row.mask[: row.ids.index(chat.encode("Your task is to")[0])])
    mixed = [1 in row.mask and 0 in row.mask[20:] for row in rows]
    assert 0.1 < np.mean(mixed) < 0.9


def test_a_player_with_a_habit_looks_into_the_first_cupboard_first(tiny):
    def first_actions(habit):
        rng, actions = random.Random(1), []
        for _ in range(60):
            text = tiny[1].tokenizer.decode(warmstart.demonstration(tiny[1], rng, habit).ids)
            actions.append(re.search(r"<.assistant.> ?(.*?) ?<.end", text)[1])
        return actions

    assert first_actions(0.0).count("go to cabinet 1") < 15
    assert first_actions(1.0).count("go to cabinet 1") > 20  # who has not read a skill
    assert {warmstart.Habit(seed, 0.0).choice("abc") for seed in range(20)} == set("abc")


def test_the_warm_start_is_deterministic():
    def weights(**other):
        model = warmstart.warmstart(sdar.Chat(warmstart.toy_tokenizer()), steps=2, **other)
        return torch.nn.utils.parameters_to_vector(model.parameters())

    first = weights()
    assert torch.equal(first, weights())
    assert not torch.equal(first, weights(habit=1.0))
    assert not torch.equal(first, weights(world=envs.make_env("toy", max_turns=2)))


def test_the_carried_policy_is_of_this_recipe_and_as_it_was_written():
    sums = json.loads((sdar.TINY_FOLDER / "sums.json").read_text())
    chat = sdar.Chat(warmstart.toy_tokenizer())
    assert sums.pop("recipe") == warmstart.recipe(chat), "python .lab/warmstart.py"
    assert "model.safetensors" in sums
    for name, was in sums.items():
        assert was == hashlib.sha256((sdar.TINY_FOLDER / name).read_bytes()).hexdigest()
    assert sum(path.stat().st_size for path in sdar.TINY_FOLDER.iterdir()) <= 1.5e6


def test_another_world_is_another_recipe(monkeypatch):
    chat, view = sdar.Chat(warmstart.toy_tokenizer()), envs.ToyEnv._view  # noqa: SLF001
    before = warmstart.recipe(chat)
    monkeypatch.setattr(envs.ToyEnv, "_view", lambda self: view(self).replace("you see", ""))
    assert warmstart.recipe(chat) != before


# --- Imitation for any language model ----------------------------------------------------


def test_a_demonstration_for_a_language_model_is_tagged_and_admissible(hub):
    chat, rng = hub[1], random.Random(0)
    for _ in range(5):
        row = warmstart.demonstration(chat, rng)
        text = chat.tokenizer.decode(row.ids)
        said = chat.tokenizer.decode([id for id, weight in zip(row.ids, row.mask) if weight])
        actions = re.findall("<action>(.*?)</action><.im_end.>", said)
        assert said == "".join(f"<action>{action}</action><|im_end|>" for action in actions)
        listed = [re.search(rf"[:,] {re.escape(action)}[,\n]", text) for action in actions]
        assert all(listed)  # as the list has it
        assert text.count("put a fork in desk 2") == 1  # the example
        assert text.count(envs.ToyEnv.instructions) == 1


def test_imitation_raises_the_players_log_prob(hub):
    model, chat = copy.deepcopy(hub[0]), hub[1]
    size = {"lr": 2e-2, "steps": 4, "tasks_per_step": 1, "group_size": 2}
    config = configure(model="x", preset="small", dtype="float32", device="cpu", **size)
    held_out = [warmstart.demonstration(chat, random.Random(7))]
    before = sdar.score(model, held_out, config).mean()
    warmstart.imitate(model, chat, config)
    assert sdar.score(model, held_out, config).mean() > before + 0.3


# --- The command -------------------------------------------------------------------------


def test_a_warm_started_checkpoint_is_a_model(checkpoint, tmp_path, capsys):
    small = "--steps 1 --tasks-per-step 1 --eval-episodes 2 --max-turns 2 --max-new-tokens 4"
    flags = [*small.split(), "--device", "cpu", "--dtype", "float32"]
    out = str(tmp_path / "warm")
    flags += ["--model", str(checkpoint), "--out", out]
    assert warmstart.main(flags) == 0
    assert f"{out}, with the skill: won" in capsys.readouterr().out
    assert not sdar.load_policy(configure(model=out, device="cpu"))[1].plain
    assert warmstart.main(flags) == 2
    assert "--out" in capsys.readouterr().err


REFUSED = [
    ("--model nobody/model", "--out: the folder"),
    ("--model nobody/model --env search --out OUT", "--env search"),
    ("--model nobody/model --habit 0.5 --out OUT", "--habit"),
    ("--habit 2", "--habit 2.0: from 0 to 1"),
    ("--out FULL", "FULL is not empty"),
    ("--out FULL --overwrite", "FULL is not empty"),
    ("--env guess:Other --out OUT", "--env guess:Other: the scripted player knows the toy alone"),
]
OTHER = """
import envs

class Other(envs.TextEnv):
    name, instructions, skills = "other", "Play.", [{"name": "a", "text": "b"}]
    goals = {"a": ("put", ("train", "dev", "eval"))}
"""


@mark.parametrize("flags, message", REFUSED)
def test_warmstart_refuses_in_one_line(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "guess.py").write_text(OTHER)
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL/thesis.txt").write_text("of somebody")
    assert warmstart.main(flags.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert [path.name for path in (tmp_path / "FULL").iterdir()] == ["thesis.txt"]


def test_a_larger_household_gets_a_policy_and_is_trained_on(tmp_path, capsys):
    policy = str(tmp_path / "runs/forty")
    small = f"--env {FORTY} --eval-episodes 6 --steps 1".split()
    for overwrite in ([], ["--overwrite"]):
        assert warmstart.main(["--out", policy, *small, *overwrite]) == 0
        assert f"{policy}, with the skill: won" in capsys.readouterr().out
    assert {"recipe", "model.safetensors"} == {*json.load(open(policy + "/sums.json"))}
    size = "--preset toy --tasks-per-step 2 --group-size 2".split()
    assert main(["--model", policy, "--out", str(tmp_path / "run"), *small, *size]) == 0
    assert lines(tmp_path / "run")[0]["turns"] == 20
