"""Tests of the course: what is said of wrong answers and of right ones, a class, planted bugs."""

import re

import bugs
import exercise
import heart
from conftest import call, refused
from pytest import approx, mark

import sdar
from test_sdar import DATA, ROOT, lines, pytestmark, trained  # noqa: F401

FLAGS = """--steps 1 --tasks-per-step 4 --group-size 4 --minibatches 1 --eval-episodes 6
    --seed 2""".split()


def write(folder, name, body):
    """The file of an answer, with the imports that `start` gives."""
    path = folder / f"{name}.py"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{exercise.TEXTS[name]['imports']}\n\n\n{body}\n", "utf-8")
    return path


def test_wrong_answers_fail_with_their_meaning_and_right_ones_pass_in_any_form(tmp_path):
    """A row of the first file: function; what is wrong; changes of its text, old => new; how the
    sentence begins that says what that means. It may stand behind the answer's own line."""
    due = {}
    right = (DATA / "right_answers.txt").read_text("utf-8")
    for name, body in re.findall(r"(?ms)^### (\S+) .*?\n(.*?)(?=^### |\Z)", right):
        due[write(tmp_path / str(len(due)), name, body)] = "$"
    for row in (DATA / "wrong_answers.txt").read_text("utf-8").splitlines():
        name, _, changes, meant = row.replace("\\n", "\n").split(" | ")
        body, parts = exercise.original(name)[0], changes.split(" => ")
        for old, new in zip(parts[::2], parts[1::2]):
            body = body.replace(old, new, 1)
        due[write(tmp_path / str(len(due)), name, body)] = re.escape(meant)
    odd = []
    for path, (_, said, _) in zip(due, exercise.verdicts([*due])):
        if not re.search(rf"(^|\(|: ){due[path]}", said):
            odd.append((path, said))
    assert odd == []


TABLE = r"""(?s)
 *e[e ]+R[e ]+Ada
 *n[. ]+x[. ]+Bo Li_7
.*
Bo Li_7, kl_k3: [^\n]*, line [45]: it has not come back after 10 s; does a loop never end\?"""


def test_answers_of_a_class_are_begun_checked_and_graded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exercise, "SECONDS", 10)
    mine = tmp_path / "Ada" / "answers"
    for name in exercise.TEXTS:
        assert call("exercise", "start", name, "--answers", mine) == 0
        assert exercise.hint(name, "2") not in exercise.hint(name)  # which is a question
    assert "stays as it is" in refused(capsys, "exercise", "start", "view", "--answers", mine)
    assert call("exercise", "check", "view", "--answers", mine) == 1
    write(mine, "gated_terms", f"print(7)\n{exercise.original('gated_terms')[0]}")
    assert call("exercise", "check", "gated_terms", "--answers", mine) == 0
    assert "gated_terms.py printed:\n    7\n\nRight. You now" in capsys.readouterr().out

    write(tmp_path / "Bo Li_7", "gated_terms", "def gated_terms(")
    write(tmp_path / "Bo Li_7", "kl_k3", "while True:\n    print(9)")
    assert "\n-while True:\n" in exercise.solution("kl_k3", tmp_path / "Bo Li_7")
    assert re.search(TABLE, exercise.grade(tmp_path))


def test_a_run_trains_with_all_that_is_written(tmp_path, capsys):
    mine, out = tmp_path / "mine", tmp_path / "run"
    write(mine, "kl_k3", "def kl_k3(a, b):\n    return 0 * a + 7")
    write(mine, "GATES", "GATES = {'gap': lambda gap, h, beta: 0 * gap + 0.25}")
    write(mine, "view", "def view(self, with_skill):\n    raise NotImplementedError")
    command = ["exercise", "run", "--answers", mine, "--", *FLAGS, "--out", out]
    assert call(*command) == 0
    (row,) = lines(out)
    assert (row["kl"], row["gate"]) == (approx(7), 0.25)
    write(mine, "kl_k3", "def kl_k3(a, b):\n    return a - refs")
    assert call(*command, "--overwrite") == 2
    assert "kl_k3.py, line 5 (return a - refs): NameError: " in capsys.readouterr().err


REFUSED = """
check kl_k3 --answers nowhere  | there is no nowhere.kl_k3.py: python .lab/course/exercise.py start
check --answers nowhere        | start kl_k3
check kl_k4                    | unknown exercise 'kl_k4'; known: kl_k3, group_advantages
start                          | missing a required argument: 'name'
run --answers nowhere          | nowhere has no function that is written
grade nowhere                  | nowhere
bug 9                          | bug 9: there are 1 to 8
answer gamma b                 | 'gamma' is none of 1, 2,
answer 6 end                   | 'end' is none of
gradient gate.txt              | gate.txt
x                              | the commands are start, check
"""


@mark.parametrize("row", REFUSED.strip().split("\n"))
def test_what_is_no_command_is_refused_in_one_line(row, capsys):
    command, how = row.split(" | ")
    assert re.search(how, refused(capsys, "exercise", *command.split()))


def test_every_planted_bug_shows_in_step_1(tmp_path):
    right = tmp_path / "right"
    assert call("sdar", *FLAGS, "--out", right) == 0
    assert exercise.compare(right, right) == "no difference in any step"
    for number, bug in enumerate(bugs.BUGS, 1):
        other = tmp_path / bug.__name__
        assert call("exercise", "bug", number, *FLAGS, "--out", other) == 0
        assert exercise.compare(right, other).startswith("step 1")
        assert exercise.answer(str(number), bug.__name__).startswith("Right.")


def test_every_puzzle_has_one_answer_that_cannot_be_read_by_accident():
    known = """a b c kl lr teacher healthy
        eos skill temperature detach reward shift observations groups"""
    for puzzle in exercise.puzzles():
        (right,) = [said for said in known.split() if exercise.judge(puzzle, said)[0]]
        assert right in "abc" or right not in str(exercise.puzzles())


def test_the_pages_own_worlds_can_be_learned_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / ".lab" / "course" / "COURSE.md").read_text("utf-8")
    code = "\n".join(re.findall("```python\n(.*?)```", page, re.DOTALL))
    (tmp_path / "worlds.py").write_text(code)
    for name in ("House", "Moving"):
        last, _ = trained(tmp_path, name, env=f"worlds:{name}", steps=1)
        assert last["eval_success"] < 0.5 < last["eval_success_skill"]  # its skill is right


def test_the_heart_has_the_losses_of_a_run(tmp_path, capsys):
    last = sdar.train(sdar.configure(steps=2, eval_episodes=6, out=str(tmp_path / "run")))
    capsys.readouterr()
    heart.main(steps=2)
    assert float(capsys.readouterr().out.split()[-1]) == approx(last["loss"], abs=1e-6)
