"""Tests of the exercises that are no function to write again, of their logs, and of the probe."""

import json
from itertools import compress
from unittest.mock import patch

import bugs
import exercise
import lessons
import probe
import torch
from conftest import LAB, call, refused
from pytest import approx, mark

import sdar
import test_sdar
from envs import HOME, UserError
from test_sdar import lines, plain, pytestmark, table, trained  # noqa: F401

# --- Stored logs -------------------------------------------------------------------------


def test_bugs_are_explained_by_a_test_that_is_there():
    for bug in bugs.BUGS:
        said = bugs.explain(bug.__name__)
        assert f"def {bug.__name__}()" in said
        assert hasattr(test_sdar, said.split()[-1])


ILL = """
1  "groups"   3  0.01
2  "healthy"  0  0.01
3  "kl"       0  3.0
"""


@mark.parametrize("number, illness, strange, coefficient", table(ILL))
def test_an_ill_log_contradicts_itself(number, illness, strange, coefficient):
    """Groups that are not flat have advantages; what the loss is made of has its weight."""
    log = lessons.stored("ill")[number - 1]
    assert exercise.judge(f"log{number}", illness)[0]
    found = [row for row in log if row["flat_groups"] < 1 and row["policy_loss"] == 0]
    assert len(found) == strange
    last = log[-1]
    rest = last["loss"] - last["policy_loss"] - last.get("sdar_loss", 0)
    assert rest / last["kl"] == approx(coefficient, rel=0.1)


def test_a_log_is_shown_as_a_table():
    rows = [row.split() for row in lessons.log("ill", "1").splitlines()]
    assert (rows[0][:2], rows[24][0], len(rows)) == (["step", "success"], "24", 25)


# --- The teacher that dies ---------------------------------------------------------------

ALARMS = """
"line.get('eval_success_skill', 1) < 0.8 and 'gap' in line"  "Right: no false alarm"
"line.get('eval_success_skill', 1) < 0.8"   "Log 6: a false alarm after step 45"
"line['eval_success_skill'] < 0.8"          "fails on log 1: KeyError: 'eval_success_skill'"
"line.get('eval_success_skill', 1) < 0.9"   "Log 3: a false alarm after step 45"
"line.get('eval_success_skill', 1) < 0.2"   "no alarm up to step"
"line['gap'] > 9"                           "no alarm up to step"
"line['entropy'] < 0.05"                    "a false alarm after step"
"lines[-1].get('eval_success', 1) < 0.5"    "a false alarm after step"
":"                                         "must have a function alarm"
"""


@mark.parametrize("rule, said", table(ALARMS))
def test_an_alarm_is_neither_late_nor_false(rule, said, tmp_path):
    file = tmp_path / "alarm.py"
    file.write_text(
        "def alarm(lines):\n    for line in lines:\n"
        f"        if {rule}:\n            return line['step']\n"
    )
    try:
        found = lessons.alarm(file)
    except UserError as error:
        found = str(error)
    assert said in found


def test_three_to_seven_of_ten_students_are_lost():
    logs = [[line for line in log if "eval_success" in line] for log in lessons.stored("alarm")]
    lost = [log[-1]["eval_success"] < 0.5 for log in logs]
    assert len(lost) == 10
    assert 3 <= sum(lost) <= 7


# --- When is it too late? ----------------------------------------------------------------


def test_what_was_said_is_said_again_to_who_reads_the_skill(tiny):
    config, chat = sdar.configure(rollout_batch=2), tiny[1]
    envs = sdar.make_envs(config)
    starts = [(*start, (1, 0, 0)) for start in envs[0].panel("eval", 2)]
    said = [chat.encode(words) + [chat.end_id] for words in ("look", "go to drawer 4")]
    with patch.object(sdar, "Sampler", lessons.repeating(dict(zip(envs, said)))):
        told = sdar.rollout(*tiny, envs, starts, config, 0.4, with_skill=True)
    for episode, ids in zip(told, said):
        assert lessons.first_turns(episode, 1) == ids
        assert lessons.first_turns(episode, 2)[len(ids) :] not in ([], ids)
        assert "kept in" in chat.tokenizer.decode(episode.ids)


def test_who_is_told_at_once_wins_and_later_ever_less():
    rows = lessons.late("--eval-episodes", "12").splitlines()
    won = [float(row.split()[1]) for row in rows[1:]]
    assert won[0] >= 0.9
    assert won[0] > won[4] >= won[9] == 0


def test_a_vague_bank_says_the_truth_and_something_else():
    for row, right in zip(sdar.load_skills(LAB / "course" / "vague.json"), HOME.skills()):
        first, second = row["text"].split(". ")
        assert f"{first}." == right["text"] != second


# --- The probe ---------------------------------------------------------------------------

REFUSED = """
"--steps a"                        "--steps a: must be numbers"
"--picture a.txt"                  "its name must end in .svg"
"--json /"                         "its name must end in .json"
"--steps 3,-1"                     "--steps 3,-1: must be numbers"
"--variant gate:most --steps 1"    "is no variant"
"--env search --env-data nowhere"  "nowhere"
"""


@mark.parametrize("with_skill", [False, True])
def test_the_matrix_is_the_chance_of_a_first_answer(with_skill, tiny):
    (model, chat), config = tiny, sdar.configure(rollout_batch=1, temperature=1.5)
    (world,) = sdar.make_envs(config)
    found = probe.matrix(model, chat, world, config, with_skill)
    assert found.sum(1).max() <= 1
    assert (probe.means(found, probe.homes(world))[0] > 0.5) is with_skill
    task = next(task for task in world.goals if task.startswith("put a mug"))
    episode = sdar.start_episode(chat, world, (task, 0, 0), world.reset(task), with_skill)
    answer = [*chat.encode("go to cabinet 3"), chat.end_id]
    ids, mask = episode.ids + answer, [0] * len(episode.ids) + [1] * len(answer)
    expected = plain(model, ids, mask, 1.5)[0].sum().exp().item()
    assert found[5, world.storages.index("cabinet 3")].item() == approx(expected, rel=1e-3)


def test_the_diagonal_and_what_a_blind_policy_has_of_it():
    found = torch.tensor([[0.5, 0.1, 0.0], [0.3, 0.7, 0.0]])
    assert probe.means(found, [0, 1]) == approx((0.6, 0.4))
    blind = torch.tensor([[0.4, 0.4, 0.0]] * 2)
    assert probe.means(blind, [0, 1]) == approx((0.4, 0.4))


def test_a_probed_run_is_the_run_without_a_probe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    size = "--tasks-per-step 2 --G 4 --eval-episodes 6 --rollout-batch 8 --lr 3e-3 --json a.json"
    assert call("probe", *f"--steps 2,0 --out run {size}".split()) == 0
    assert lines("run") == trained(tmp_path, "plain", lr=3e-3)[1]
    assert call("probe", *f"--model run/checkpoint --preset toy --out end {size}".split()) == 0
    run, end = json.loads((tmp_path / "a.json").read_text()).values()
    looks = {look["step"]: look["alone"] for look in run["looks"]}
    assert [*looks] == [0, 2]
    assert end["looks"][0]["alone"] == looks[2] != looks[0]
    assert "[1]" in capsys.readouterr().out


@mark.parametrize("argv, message", table(REFUSED))
def test_the_probe_refuses_in_one_line(argv, message, capsys):
    assert message in refused(capsys, "probe", *argv.split())
