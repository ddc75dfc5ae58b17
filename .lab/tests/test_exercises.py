"""Tests of the exercises that are no function to write again, of their logs, and of the probe."""

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
from envs import HOME
from test_sdar import lines, pytestmark, table, trained  # noqa: F401

# --- Bugs and stored logs ----------------------------------------------------------------


def test_a_bug_names_the_test_that_catches_it():
    for bug in bugs.BUGS:
        assert hasattr(test_sdar, bug.__doc__.split()[-1])


def test_a_name_of_another_kind_is_refused_without_a_hint(capsys):
    assert refused(capsys, "exercise", "answer", "beta", "eos").endswith("none of a, b, c")


ILL = """
"1"  "groups"   3  0.01
"2"  "healthy"  0  0.01
"3"  "kl"       0  3.0
"""


@mark.parametrize("number, illness, strange, coefficient", table(ILL))
def test_an_ill_log_contradicts_itself(number, illness, strange, coefficient):
    """Groups that are not flat have advantages; what the loss is made of has its weight."""
    assert exercise.answer(f"log{number}", illness).startswith("Right. Why:")
    rows = lessons.stored("ill")[number]
    odd = [row["flat_groups"] < 1 and row["policy_loss"] == 0 for row in rows]
    assert sum(odd) == strange
    last = rows[-1]
    assert lessons.log("ill", number).split()[-1] == str(last["eval_success_skill"])
    rest = last["loss"] - last["policy_loss"] - last.get("sdar_loss", 0)
    assert rest / last["kl"] == approx(coefficient, rel=0.1)


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
    end = tiny[1].end_id
    said = [[9, end], [8, 7, end]]
    with patch.object(sdar, "Sampler", lessons.repeating(dict(zip(envs, said)))):
        told = sdar.rollout(*tiny, envs, starts, config, 0.4)
    assert [lessons.first_turns(episode, 1) for episode in told] == said


def test_who_is_told_at_once_wins_and_later_ever_less():
    rows = lessons.late("--eval-episodes", "12").splitlines()[1:]
    won = [float(row.split()[1]) for row in rows]
    assert 1 >= won[0] > 0.8 > won[4] > won[9] == 0


def test_a_vague_bank_says_the_truth_and_something_else():
    for row, right in zip(sdar.load_skills(LAB / "course" / "vague.json"), HOME.skills()):
        assert row["text"].startswith(f"{right['text']} ")


# --- The probe ---------------------------------------------------------------------------


def test_the_matrix_is_the_chance_of_a_first_answer(tiny):
    (model, chat), config = tiny, sdar.configure(rollout_batch=1, temperature=1.5)
    (world,) = sdar.make_envs(config)
    found = probe.matrix(model, chat, world, config, True)
    task = next(task for task in world.goals if task.startswith("put a mug"))
    episode = sdar.start_episode(chat, world, (task, 0, 0), world.reset(task), True)
    episode.add([*chat.encode("go to cabinet 3"), chat.end_id], sampled=1)
    logprobs, _ = sdar.response_logprobs(model, [episode], config)
    place = world.storages.index("cabinet 3")
    assert found[5, place].item() == approx(logprobs.sum().exp().item(), rel=1e-3)


def test_the_diagonal_and_what_a_blind_policy_has_of_it():
    found = torch.tensor([[0.5, 0.1, 0.0], [0.3, 0.7, 0.0]])
    assert probe.means(found, [0, 1]) == approx((0.6, 0.4))


def test_a_probed_run_is_the_run_without_a_probe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    size = "--out run --tasks-per-step 2 --G 4 --eval-episodes 6 --rollout-batch 8 --lr 3e-3"
    assert call("probe", "--steps", "2,0", *size.split()) == 0
    assert lines("run") == trained(tmp_path, "plain", lr=3e-3)[1]
    assert "--steps a: must be numbers" in refused(capsys, "probe", "--steps", "a")
