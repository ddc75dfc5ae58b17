"""Tests of the course. To grade one function: python -m pytest -q .lab/tests -k exercise_kl_k3"""

import json
import re
import runpy
import shutil
import textwrap

import bugs
import exercise
import graders
import heart
import plots
import trainer
from pytest import approx, fixture, mark, raises

import envs
import sdar
from test_sdar import DATA, ROOT, lines, pytestmark, small, trained  # noqa: F401

PLACES = (sdar, sdar.Episode, envs.SkillBank, trainer)  # of what can be written again
WRONG_ANSWERS = (DATA / "wrong_answers.txt").read_text().split("\n")[:-1]


def grade(name):
    """Run the grader of a function."""
    getattr(graders, f"grade_{name}")()


@mark.parametrize("name", exercise.BLANKS, ids="exercise_{}".format)
def test_fill_in(name):
    grade(name)


def place_of(name):
    """The module, or the class, that has a function."""
    (place,) = [place for place in PLACES if name in vars(place)]
    return place


# --- Functions to write again ------------------------------------------------------------


@mark.parametrize("name", exercise.BLANKS)
def test_a_blanked_function_says_its_aim_and_fails_its_grader(name, tmp_path, monkeypatch, capsys):
    copied = tmp_path / exercise.BLANKS[name]
    copied.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / exercise.BLANKS[name], copied)
    exercise.blank(name, tmp_path)
    text = exercise.find(name, tmp_path)[2]
    assert f"exercise.py hint {name}" in text
    assert max(map(len, text.split("\n"))) <= 100
    assert exercise.main(["check", name]) == 0
    assert "Right. You now know" in capsys.readouterr().out

    place = place_of(name)
    emptied = runpy.run_path(str(copied))
    emptied = vars(emptied[place.__name__]) if isinstance(place, type) else emptied
    monkeypatch.setattr(place, name, emptied[name])
    assert exercise.main(["check", name]) == 1
    assert capsys.readouterr().out == f"Not yet: exercise: write {name} again.\n"


@mark.parametrize("name, what, change", [line.split(" | ") for line in WRONG_ANSWERS])
def test_wrong_answers_fail_with_a_meaning(name, what, change, monkeypatch):
    old, new = change.replace("\\n", "\n").split(" => ")
    text = textwrap.dedent(exercise.find(name, ROOT)[2])
    assert old in text
    place = place_of(name)
    module = envs if place is envs.SkillBank else sdar
    space = {**vars(module), **vars(trainer)} if place is trainer else {**vars(module)}
    exec(text.replace(old, new, 1), space)
    monkeypatch.setattr(place, name, space[name])
    with raises(AssertionError, match="..."):
        grade(name)


@mark.parametrize("name", ["kl_k3", "GATES"])
def test_blank_and_restore_keep_what_a_learner_wrote(name, tmp_path):
    shutil.copy(ROOT / "sdar.py", tmp_path)
    path, whole = tmp_path / "sdar.py", (ROOT / "sdar.py").read_text()
    empty = re.compile("raise NotImplementedError.*|# exercise: write.*")
    exercise.blank(name, tmp_path)
    path.write_text(empty.sub("**my(answer),", path.read_text()))
    assert "sdar.py.mine" in exercise.blank(name, tmp_path)
    path.write_text("# other work\n" + empty.sub("**my(second", path.read_text()))
    exercise.restore(name, tmp_path)
    assert path.read_text() == "# other work\n" + whole
    kept = (tmp_path / "sdar.py.mine").read_text()
    assert kept.index("**my(answer)") < kept.index("**my(second")
    with raises(ValueError, match="not blanked"):
        exercise.restore(name, tmp_path)


# --- Answers, and bugs to find -----------------------------------------------------------


def test_answers_and_their_hints(capsys):
    assert exercise.main(["answer", "beta", "a"]) == 1
    assert "beta is not 'a'. Read gate of both" in capsys.readouterr().out
    assert exercise.main(["answer", "beta", "b"]) == 0
    assert exercise.main(["answer", "gamma", "b"]) == 2


@mark.parametrize("argv", ["blank nothing", "blank", "bug 9", "bug", "answer 6", "compare a", "x"])
def test_what_is_no_command_is_named_with_those_that_are(argv, capsys):
    assert exercise.main(argv.split()) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"unknown {argv!r}" in said and "restore with one of group_advantages, GATES" in said


def test_every_puzzle_has_one_answer_that_cannot_be_read_by_accident():
    names = [bug.__name__ for bug in bugs.BUGS]
    for puzzle in exercise.puzzles():
        answers = names if puzzle.isdigit() else "abc"
        right = [said for said in answers if exercise.judge(puzzle, said)[0]]
        assert len(right) == 1
        if puzzle.isdigit():
            assert right == [names[int(puzzle) - 1]]
    assert not [name for name in names if name in str(exercise.puzzles())]


@fixture
def whole_sdar(monkeypatch):
    """What a bug changes is put back afterwards."""
    for name, value in {**vars(sdar)}.items():
        monkeypatch.setattr(sdar, name, value)


STEP = {"steps": 1, "tasks_per_step": 4, "minibatches": 1, "seed": 2}  # an episode is won


@fixture(scope="module")
def right_step(tmp_path_factory):
    """Metrics of a small run's first step."""
    return trained(tmp_path_factory.mktemp("right"), **STEP)[1][0]


@mark.parametrize("number", range(1, 9))
def test_a_planted_bug_shows_in_the_metrics_of_step_1(number, right_step, tmp_path, whole_sdar):
    exercise.plant(number)
    (buggy,) = trained(tmp_path, **STEP)[1]
    changed = {name for name in right_step if buggy[name] != right_step[name]}
    assert {name for name in changed if not name.startswith("eval")}


def test_a_bug_is_run_with_flags_and_through_the_microscope(tmp_path, whole_sdar, capsys):
    size = "--steps 1 --tasks-per-step 2 --group-size 2 --eval-episodes 6 --rollout-batch 8"
    assert exercise.main(["bug", "2", *size.split(), "--out", str(tmp_path / "run")]) == 0
    assert lines(tmp_path / "run")[0]["gap"] == approx(0, abs=1e-6)
    page = tmp_path / "page.html"
    assert exercise.main(["bug", "2", "microscope", "--seed", "0", "--page", str(page)]) == 0
    number = r" +(-?\d+\.\d\d)"
    rows = re.findall(4 * number, capsys.readouterr().out)
    assert {float(gap) for _, _, gap, _ in rows} == {0.0} and page.exists()
    assert exercise.main(["bug", "2", "--no-flag"]) == 2
    assert "--no-flag" in capsys.readouterr().err


def test_two_logs_are_compared_where_they_first_differ(tmp_path, capsys):
    trained(tmp_path, "one")
    capsys.readouterr()
    other = shutil.copytree(tmp_path / "one", tmp_path / "other")
    rows = (other / "metrics.jsonl").read_text().splitlines()
    rows[1] = json.dumps(json.loads(rows[1]) | {"loss": 7.0, "seconds_update": 9.0})
    (other / "metrics.jsonl").write_text("\n".join(rows))
    for name, said in (("one", "no difference"), ("other", "step 2")):
        assert exercise.main(["compare", str(tmp_path / "one"), str(tmp_path / name)]) == 0
        assert capsys.readouterr().out.startswith(said)
    assert exercise.main(["compare", str(tmp_path), str(other)]) == 2
    assert "holds no run" in capsys.readouterr().err


# --- What the pages show -----------------------------------------------------------------


def test_the_pushes_are_drawn_from_the_losses(tmp_path, monkeypatch, capsys):
    drawn = {}
    monkeypatch.setattr(plots, "picture", lambda panels, path, **dark: drawn.update(panels))
    assert exercise.main(["gradient", str(tmp_path / "gate.svg")]) == 0
    ((_, curves),) = drawn.items()
    at_one = {label: curve[0, 30, 1] for label, curve in curves.items()}
    assert at_one["gap gate, beta 5"] == approx(0.993307, abs=1e-5)
    assert at_one["beta 0, as in GRPO+OPSD"] == 0.5
    assert at_one["reverse KL"] == approx(1)
    assert curves["beta 5, not detached (a bug)"][0, 10, 1] < 0  # pushed down
    assert exercise.main(["gradient", str(tmp_path / "gate.txt")]) == 2


@mark.parametrize("number, env", [(0, "house:House"), (1, "moving:Moving")])
def test_the_pages_own_worlds_can_be_learned_in(number, env, tmp_path, monkeypatch):
    page = (ROOT / ".lab" / "course" / "EXERCISES.md").read_text()
    code = re.findall("```python\n(.*?)```", page, re.DOTALL)[number]
    (tmp_path / f"{env.split(':')[0]}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    last, _ = trained(tmp_path, env=env, steps=1)
    assert last["eval_success"] < 0.5 < last["eval_success_skill"]  # its skill is right


def test_the_heart_has_the_losses_of_a_run(tmp_path, capsys):
    sdar.train(sdar.configure(steps=3, eval_every=0, eval_episodes=6, out=str(tmp_path / "run")))
    capsys.readouterr()
    heart.main(steps=3)
    losses = re.findall("loss (.*)", capsys.readouterr().out)
    expected = [row["loss"] for row in lines(tmp_path / "run")]
    assert [*map(float, losses)] == approx(expected, abs=1e-6)
