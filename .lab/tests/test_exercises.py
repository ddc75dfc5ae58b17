"""Tests of the exercises that are no function to write again, of their logs, and of the probe."""

import json
from pathlib import Path
from unittest.mock import patch

import bugs
import exercise
import lessons
import probe
import torch
from conftest import call, refused
from pytest import approx, mark

import sdar
import test_sdar
from test_sdar import lines, pytestmark, table, trained  # noqa: F401

# --- Bugs and alarms ---------------------------------------------------------------------


def test_a_bug_names_the_test_that_catches_it():
    for bug in bugs.BUGS:
        assert hasattr(test_sdar, bug.__doc__.split()[-1])


ALARMS = """
"line.get('eval_success_skill', 1) < 0.8 and 'gap' in line"  "Right: no false alarm"
"line.get('eval_success_skill', 1) < 0.8"  "Log 6: a false alarm after step 45"
"line['eval_success_skill'] < 0.8"         "fails on log 1: KeyError: 'eval_success_skill'"
"line.get('eval_success_skill', 1) < 0.2"  "no alarm up to step"
":"                                        "must have a function alarm"
"""


@mark.parametrize("rule, said", table(ALARMS))
def test_an_alarm_is_neither_late_nor_false(rule, said, tmp_path, capsys):
    file = tmp_path / "alarm.py"
    file.write_text(f"def alarm(lines):\n    return any({rule} for line in lines)\n")
    call("exercise", "alarm", file)
    assert said in str(capsys.readouterr())


# --- When is it too late? ----------------------------------------------------------------


def test_what_was_said_is_said_again(tiny):
    config = sdar.configure(rollout_batch=2)
    envs = sdar.make_envs(config)
    starts = [(*start, (1, 0, 0)) for start in envs[0].panel("eval", 2)]
    before = sdar.rollout(*tiny, envs, starts, config, temperature=9)
    with patch.object(sdar, "Sampler", lessons.repeating(dict(zip(envs, before)), 10)):
        again = sdar.rollout(*tiny, envs, starts, config, temperature=0)
    assert [episode.ids for episode in again] == [episode.ids for episode in before]


def test_who_is_told_at_once_wins_and_later_ever_less():
    rows = lessons.late("--eval-episodes", "12").splitlines()[1:]
    won = [float(row.split()[1]) for row in rows]
    assert 1 >= won[0] > 0.8 > won[4] > won[9] == 0


# --- The probe ---------------------------------------------------------------------------


def test_who_reads_the_skill_goes_home_first(tiny):
    config = sdar.configure(rollout_batch=1)
    (world,) = sdar.make_envs(config)
    found = probe.matrix(*tiny, world, config, with_skill=True)
    assert found.argmax(1).tolist() == probe.homes(world)
    assert (0.9 < found.max(1).values).all() and (found.sum(1) <= 1.001).all()


def test_the_diagonal_and_what_a_blind_policy_has_of_it():
    found = torch.tensor([[0.5, 0.1, 0.0], [0.3, 0.7, 0.0]])
    assert probe.means(found, [0, 1]) == approx((0.6, 0.4))


def test_a_probed_run_is_the_run_without_a_probe(tmp_path, monkeypatch):
    """And what was seen, and was logged since the look before, is added to a file."""
    monkeypatch.chdir(tmp_path)
    Path("a.json").write_text('{"old": {}}')
    size = "--out run --tasks-per-step 2 --G 4 --eval-episodes 6 --rollout-batch 8 --lr 3e-3"
    looks = "--json a.json --resume --steps"  # the second's first look comes after its training
    for flags in ("--steps 1", f"{looks} 1,0", f"{looks} 2,1,0"):
        assert call("probe", *f"{flags} {size}".split()) == 0
    line = lines("run")[1]  # at a look a run is evaluated, too: the first line has more
    assert line == trained(tmp_path, "plain", lr=3e-3)[1][1]
    runs = json.loads(Path("a.json").read_text())
    first, _, last = runs["run"]["looks"]
    assert 0.1 > first["alone"]["home"] != last["alone"]["home"] and "old" in runs
    assert last["learning"]["gap"] == line["gap"]
