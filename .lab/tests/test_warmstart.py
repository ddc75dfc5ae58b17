"""Tests of warmstart.py: the scripted player, the tiny policy's tokenizer and recipe, imitation."""

import copy
import hashlib
import json
import random
import re

import torch
import warmstart
from conftest import call, refused
from pytest import fixture, mark
from torch.nn.utils import parameters_to_vector as vector

import envs
import sdar
from sdar import configure
from test_sdar import lines, pytestmark, table

FORTY, EIGHTY = "large_household:Forty", "large_household:Eighty"
WORLDS = """
"toy"                     20  "train"
"toy"                     20  "dev"
"toy"                     20  "eval"
"large_household:Forty"   40  "eval"
"large_household:Eighty"  80  "dev"
"""


@mark.parametrize("name, places, split", table(WORLDS))
def test_the_skill_matters_by_construction(name, places, split):
    """Of the scripted player: with the skills 95 % or more of the episodes are won."""
    world, rng, won = envs.make_env(name), random.Random(0), {True: 0, False: 0}
    assert len(world.storages) == len({*world.storages}) == places
    skills, tasks = {skill["name"] for skill in world.skills}, world.tasks(split)
    for seed in range(600):
        observation, _ = world.reset(tasks[seed // 2 % len(tasks)], seed // 2)
        player, over, skilled = warmstart.Player(world, rng), False, seed % 2 == 0
        while not over:
            action = player.act(observation, skills if skilled else set())
            observation, reward, terminated, truncated, _ = world.step(action)
            over = terminated or truncated
        won[skilled] += reward
    assert won[False] / 300 <= 0.25 < 0.95 <= won[True] / 300


@mark.parametrize("name", ["toy", FORTY, EIGHTY])
def test_the_tokenizer_knows_the_world_and_keeps_actions(name):
    """Decoding an encoded action gives it back, and no observation or skill holds an unknown
    word."""
    world, rng = envs.make_env(name), random.Random(0)
    chat = sdar.Chat(warmstart.toy_tokenizer(world))
    texts = ["Skill: " + " ".join(skill["text"] for skill in world.skills) + "\n"]
    for seed, task in enumerate(rng.sample([*world.goals], 200)):
        observation, info = world.reset(task, seed)
        for action in info["admissible"]:
            assert chat.tokenizer.decode(chat.encode(action)) == action
        texts += [observation, world.step(warmstart.Player(world, rng).act(observation, set()))[0]]
    unknown = chat.tokenizer.unk_token_id
    assert not [text for text in texts if unknown in chat.encode(text)]
    assert unknown in chat.encode("inside the fridgelet")


@fixture(scope="module")
def demonstrations():
    """(chat, 300 demonstrations)."""
    chat, rng = sdar.Chat(warmstart.toy_tokenizer()), random.Random(0)
    return chat, [warmstart.demonstration(chat, rng) for _ in range(300)]


def test_demonstrations_teach_actions_in_many_households(demonstrations):
    """Not the prompt; nor exploring for the teacher, nor random actions."""
    chat, rows = demonstrations
    for row in rows:
        assert len(row.ids) == len(row.mask)
        assert set(row.mask) <= {0, 1, 0.2}
        assert not any(row.mask[: row.ids.index(chat.encode("Your task is to")[0])])
    ends = [mask for row in rows for id, mask in zip(row.ids, row.mask) if id == chat.end_id]
    assert 0.1 < ends.count(0) / len(ends) < 0.3
    text = " ".join(chat.tokenizer.decode(row.ids) for row in rows)
    for name in envs.CLASSES:
        assert len({*re.findall(rf"\b{name} is kept in (\w+ \d)", text)}) > 6, name


def test_demonstrations_in_a_larger_household_use_its_places_and_turns():
    world, rng = envs.make_env(EIGHTY), random.Random(0)
    chat = sdar.Chat(warmstart.toy_tokenizer(world))
    rows = [warmstart.demonstration(chat, rng, world=world) for _ in range(100)]
    text = " ".join(chat.tokenizer.decode(row.ids) for row in rows)
    assert len({*re.findall(r"(?:cabinet|drawer) \d+", text)}) > 60
    turns = [row.ids.count(chat.end_id) for row in rows]
    assert max(turns) == 42  # a demonstration has two turns more than an episode


@mark.parametrize("habit, low, high", [(0.0, 0, 14), (1.0, 21, 60)])
def test_a_player_with_a_habit_looks_into_the_first_cupboard_first(habit, low, high, tiny):
    rng, first = random.Random(1), []
    for _ in range(60):
        text = tiny[1].tokenizer.decode(warmstart.demonstration(tiny[1], rng, habit).ids)
        first.append(re.search(r"<.assistant.> ?(.*?) ?<.end", text)[1])
    assert low <= first.count("go to cabinet 1") <= high


def test_the_warm_start_is_deterministic(monkeypatch):
    monkeypatch.setattr(warmstart, "BATCH", 8)

    def weights(**other):
        chat = sdar.Chat(warmstart.toy_tokenizer())
        return vector(warmstart.warmstart(chat, steps=2, **other).parameters())

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


# --- Imitation for any language model, and the command ------------------------------------

one_checkpoint = mark.parametrize("checkpoint", ["qwen2"], indirect=True)


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


@one_checkpoint
def test_imitation_raises_the_players_log_prob(hub):
    model, chat = copy.deepcopy(hub[0]), hub[1]
    size = {"lr": 2e-2, "steps": 4, "tasks_per_step": 1, "group_size": 2}
    config = configure(model="x", preset="small", dtype="float32", device="cpu", **size)
    held_out = [warmstart.demonstration(chat, random.Random(7))]
    before = sdar.score(model, held_out, config).mean()
    warmstart.imitate(model, chat, config)
    assert sdar.score(model, held_out, config).mean() > before + 0.3


@one_checkpoint
def test_a_warm_started_checkpoint_is_a_model(checkpoint, tmp_path, capsys):
    size = "--steps 1 --tasks-per-step 1 --eval-episodes 2 --max-turns 2 --max-new-tokens 4"
    out = str(tmp_path / "warm")
    words = ["warmstart", *size.split(), "--device", "cpu", "--model", checkpoint, "--out", out]
    assert call(*words) == 0
    assert f"{out}, with the skill: won" in capsys.readouterr().out
    assert not sdar.load_policy(configure(model=out, device="cpu"))[1].plain
    assert "--overwrite the policy" in refused(capsys, *words)


def test_a_larger_household_gets_a_policy_and_is_trained_on(tmp_path, capsys):
    policy = str(tmp_path / "runs/forty")
    size = f"--env {FORTY} --eval-episodes 6 --steps 1".split()
    for overwrite in ([], ["--overwrite"]):
        assert call("warmstart", "--out", policy, *size, *overwrite) == 0
        assert f"{policy}, with the skill: won" in capsys.readouterr().out
    assert {"recipe", "model.safetensors"} == {*json.load(open(policy + "/sums.json"))}
    size += "--preset toy --tasks-per-step 2 --group-size 2".split()
    assert call("sdar", "--model", policy, "--out", tmp_path / "run", *size) == 0
    assert lines(tmp_path / "run")[0]["turns"] == 20
