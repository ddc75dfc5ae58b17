"""Tests of two experiments: other bandits (bandits.py), another gate on wrong places
(circles.py)."""

from types import SimpleNamespace

import bandits
import circles
import torch
from conftest import FEW, call
from pytest import approx, mark

import envs
from test_sdar import lines, pytestmark

TASK = ("put a mug in desk 1", "put")
ROWS = [{"name": name, "text": "", "keywords": [name]} for name in ("mug", "plate")]


@mark.parametrize("kind, arms", [("success", "mug found"), ("type", "mug for put")])
def test_other_bandits_have_their_reward_and_arms(kind, arms):
    """Three of four episodes are won; the gaps are the larger, the smaller the advantages."""
    bank = bandits.BANDITS[kind](ROWS[:1], "ucb")
    more = {"task": TASK[0], "task_type": TASK[1], "skills": bank.skills}
    group = [SimpleNamespace(won=won, **more) for won in (True, True, True, False)]
    bank.learn(group, [[1.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0, 1.0]])
    assert bank.arms == {arms: [1, approx(0.75 if kind == "success" else -1.0)]}


def test_a_bandit_that_explores_less_leaves_a_poor_arm_sooner():
    """Bonuses are sqrt(ln 25 / plays): .40 and .80, or a fifth of them."""
    chosen = []
    for kind in (envs.SkillBank, bandits.Exploiting):
        bank = kind(ROWS, "ucb")
        bank.arms = {"mug found": [20, 12.0], "plate not found": [5, 2.0]}  # rewards .6 and .4
        chosen.append(bank.retrieve(*TASK, 0)[0].name)
    assert chosen == ["plate", "mug"]
    bank.arms = {"mug found": [20, 12.0]}
    assert bank.retrieve(*TASK, 0)[0].name == "plate"  # never tried


def test_a_run_with_another_bandit(tmp_path):
    assert call("bandits", "success", "type", *FEW, "--out", tmp_path / "run") == 0
    arms = torch.load(tmp_path / "run" / "state.pt")["arms"]
    assert {" for " in name for name in arms} == {True}


def test_wrong_places_are_those_before_the_home_first_or_again(tiny):
    """Of a visit's three tokens, `go to`, the place, the end, the place is marked."""
    world, chat = envs.make_env("toy"), tiny[1]
    mug = world.household.home["mug"]
    wrong, other = [place for place in world.places if place != mug][:2]
    visits = {wrong: "first", "": "", other: "first"}
    expected, episode = [], SimpleNamespace(env=world, task=TASK[0], ids=[], mask=[])
    for place, kind in [
        *visits.items(),
        (wrong, "again"),
        (other, "again"),
        (mug, ""),
        (wrong, ""),
    ]:
        said = chat.encode(f"go to {place}" if place else "look") + [chat.end_id]
        seen = chat.encode("You are in the middle of a room")
        episode.ids += seen + said
        episode.mask += [0] * len(seen) + [1] * len(said)
        expected += ["", kind, ""] if place else ["", ""]
    assert circles.wrong_places(episode, chat.tokenizer) == expected


def test_a_wrong_place_is_worth_no_more_for_being_tried_again():
    gate = torch.tensor([0.5, 0.1, 0.8, 0.6, 0.5, 0.3, 0.9, 0.7])
    assert circles.without_pay(gate, ["", "", "again", ""] * 2).equal(gate)  # none to compare with
    found = circles.without_pay(gate, ["", "first", "again", ""] * 2).tolist()
    assert found == approx([0.5, 0.1, 0.2, 0.6, 0.5, 0.3, 0.2, 0.7])


def test_a_run_with_other_gates(tmp_path):
    """In one optimiser step the gates of the moment of sampling are those of the loss."""
    size, gates = "--steps 1 --tasks-per-step 4 --eval-episodes 6 --minibatches 1".split(), []
    for words in (["sdar"], ["circles", "own"], ["circles", "first"]):
        out = tmp_path / words[-1]
        assert call(*words, *size, "--out", out) == 0
        gates.append(lines(out)[0]["gate"])
    assert gates[1] == approx(gates[0], abs=1e-7)
    assert gates[2] < gates[0] - 1e-6
