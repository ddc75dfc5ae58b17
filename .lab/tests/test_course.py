"""Tests of the course: what is said of wrong answers and of right ones, a class, planted bugs."""

import re
from io import StringIO

import bugs
import exercise
import heart
from conftest import call, refused
from pytest import approx

import sdar
from test_sdar import DATA, lines, pytestmark  # noqa: F401

FLAGS = """--steps 1 --tasks-per-step 4 --group-size 4 --minibatches 1 --eval-episodes 6
    --seed 2""".split()


def write(folder, name, body):
    """The file of an answer, with the imports that `start` gives."""
    folder.mkdir(exist_ok=True)
    text = f"{exercise.TEXTS[name]['imports']}\n\n\n{body}\n"
    (folder / f"{name}.py").write_text(text, "utf-8")


def test_wrong_answers_fail_with_their_meaning_and_right_ones_pass(tmp_path, monkeypatch, capsys):
    """A row of the first file: function; what is wrong; changes of its text, old => new; how the
    sentence begins that says what that means. It may stand behind the answer's own line."""
    due = []
    right = (DATA / "right_answers.txt").read_text("utf-8")
    for name, body in re.findall(r"(?ms)^### (\S+) .*?\n(.*?)(?=^### |\Z)", right):
        due.append((name, body, "Right."))
    for row in (DATA / "wrong_answers.txt").read_text("utf-8").splitlines():
        name, _, changes, meant = row.replace("\\n", "\n").split(" | ")
        body = exercise.original(name)
        parts = changes.split(" => ")
        for old, new in zip(parts[::2], parts[1::2]):
            body = body.replace(old, new, 1)
        due.append((name, body, meant))
    monkeypatch.setattr("sys.stdin", StringIO())
    for name, body, meant in due:
        write(tmp_path, name, body)
        call("exercise", "check", name, "--answers", tmp_path)
        said = "".join(capsys.readouterr())
        assert re.search(rf"(^|\(|: ){re.escape(meant)}", said), (body, said)


TABLE = r"""(?s)
 +R[e ]+Ada
 +n[. ]+x[. ]+Bo Li_7
.*
Bo Li_7, kl_k3: it ends Python \(exit code 0\)
Bo Li_7, view: [^\n]*view.py: Python cannot read it"""


def test_answers_of_a_class_are_begun_checked_and_graded(tmp_path, monkeypatch, capsys):
    mine = tmp_path / "Ada"
    other = tmp_path / "Bo Li_7"
    for name in exercise.TEXTS:
        assert call("exercise", "start", name, "--answers", mine) == 0
    assert "File exists" in refused(capsys, "exercise", "start", "view", "--answers", mine)
    assert call("exercise", "check", "--answers", mine) == 1
    write(mine, "kl_k3", f"print(7)\n{exercise.original('kl_k3')}")
    assert call("exercise", "check", "kl_k3", "--answers", mine) == 0
    assert "\n7\nRight. You now" in capsys.readouterr().out

    write(other, "view", "def view(")
    write(other, "kl_k3", "import os\n\nos._exit(0)")
    monkeypatch.setattr(exercise, "SECONDS", 999)  # the machine may be busy
    assert re.search(TABLE, exercise.grade(tmp_path))
    monkeypatch.setattr(exercise, "SECONDS", 1)
    assert "not back after 1 s" in str(exercise.judged(mine / "kl_k3.py"))


def test_a_run_trains_with_all_that_is_written(tmp_path, capsys):
    mine = tmp_path / "mine"
    out = tmp_path / "run"
    call("exercise", "start", "view", "--answers", mine)
    assert "still empty" in refused(capsys, "exercise", "run", "--answers", mine)
    write(mine, "kl_k3", "def kl_k3(a, b):\n    return 0 * a + 7")
    write(mine, "GATES", "GATES = {'gap': lambda gap, h, beta: 0 * gap + 0.25}")
    command = ["exercise", "run", "--answers", mine, "--", *FLAGS, "--out", out]
    assert call(*command) == 0
    (row,) = lines(out)
    assert (row["kl"], row["gate"]) == (approx(7), 0.25)
    write(mine, "kl_k3", "def kl_k3(a, b):\n    return a - refs")
    assert call(*command, "--overwrite") == 2
    assert "kl_k3.py, line 5 (return a - refs): NameError: " in capsys.readouterr().err


def test_every_planted_bug_shows_in_step_1(tmp_path):
    right = tmp_path / "right"
    assert call("sdar", *FLAGS, "--out", right) == 0
    assert exercise.compare(right, right) == "no difference in any step"
    for number, bug in enumerate(bugs.BUGS, 1):
        other = tmp_path / bug.__name__
        assert call("exercise", "bug", number, *FLAGS, "--out", other) == 0
        assert exercise.compare(right, other).startswith("step 1")
        assert exercise.answer(str(number), bug.__name__).startswith("Right.")
    assert exercise.answer("log2", "healthy").startswith("Right.")


def test_the_heart_has_the_losses_of_a_run(tmp_path, capsys):
    last = sdar.train(sdar.configure(steps=2, eval_episodes=6, out=tmp_path / "run"))
    capsys.readouterr()
    heart.main(steps=2)
    assert float(capsys.readouterr().out.split()[-1]) == approx(last["loss"], abs=1e-6)
