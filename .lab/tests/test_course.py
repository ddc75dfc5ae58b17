"""Tests of the course: wrong answers, right ones, what is no answer, a class; planted bugs."""

import json
import re
import shutil

import bugs
import exercise
import graders
import heart
import plots
from pytest import approx, fixture, mark

import sdar
from test_sdar import DATA, ROOT, lines, pytestmark, small, trained  # noqa: F401

WRONG = [row.split(" | ") for row in (DATA / "wrong_answers.txt").read_text("utf-8").splitlines()]
RIGHT = re.split(r"(?m)^### (\S+) \| .*\n", (DATA / "right_answers.txt").read_text("utf-8"))[1:]
ORIGINALS = {name: exercise.original(name)[0] for name in exercise.TEXTS}


def write(folder, name, body):
    """The file of an answer, with the imports that `start` writes."""
    path = folder / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{exercise.TEXTS[name]['imports']}\n\n\n{body}\n", "utf-8")
    return path


def original(name, *change):
    """The text of a function with changes: old => new, once each."""
    text = ORIGINALS[name]
    parts = " | ".join(change).replace("\\n", "\n").split(" => ")
    for old, new in zip(parts[::2], parts[1::2]):
        assert old in text, (name, old)
        text = text.replace(old, new, 1)
    return text


# --- Graders -----------------------------------------------------------------------------


def test_wrong_answers_fail_with_their_meaning(tmp_path):
    """Rows of the file: function, what is wrong, changes, how the sentence begins that says what
    that means; behind the answer's own line, where it raised something."""
    paths = []
    for number, (name, _, *change, _) in enumerate(WRONG):
        paths.append(write(tmp_path / str(number), name, original(name, *change)))
    odd = []
    for row, (mark_, said, _) in zip(WRONG, exercise.verdicts(paths)):
        if mark_ != "n" or not re.search(rf"(^|\(){re.escape(row[-1])}", said):
            odd.append((row[:2], mark_, said))
    assert not odd


def test_right_answers_pass_in_any_form(tmp_path):
    paths = []
    for number, (name, body) in enumerate(zip(RIGHT[::2], RIGHT[1::2])):
        paths.append(write(tmp_path / str(number), name, body))
    found = exercise.verdicts(paths)
    assert [row for row in zip(paths, found) if row[1] != ["R", "", ""]] == []


@mark.parametrize("name", sorted(graders.CHECKS.keys() - {"gated_terms"}))
def test_sdar_has_the_numbers_of_the_graders(name):
    graders.check_numbers(name)


HARM = {  # what stands in kl_k3.py: the mark, the sentence behind the file's name
    "raise SystemExit": ("n", ", line 4 (raise SystemExit): SystemExit: "),
    "import sys\nsys.path.clear()\ninput()": ("n", ", line 6 (input()): EOFError: "),
    "def kl_k4(a, b):\n    pass": ("x", " defines no kl_k3"),
    "def kl_k3(a, b)\n    pass": (
        "x",
        ", line 4 (def kl_k3(a, b)): Python cannot read it, expected",
    ),
    "def kl_k3(a):\n    pass": ("x", ": kl_k3 must be a function of (logprobs, ref): TypeError"),
    "kl_k3 = 3": ("x", ": kl_k3 must be a function of (logprobs, ref): TypeError"),
    "def kl_k3(a, b):\n    return refs - a": ("n", ", line 5 (return refs - a): NameError: name"),
    "import os\nprint(9)\nos._exit(3)": ("n", ": it ends Python (exit code 3)"),
    "def kl_k3(a, b):\n    raise NotImplementedError": ("e", " is still empty"),
    "def kl_k3(a, b):\n    while True:\n        a = a": (
        "n",
        ", line [56]: it has not come back after",
    ),
}


def test_whatever_an_answer_does_the_next_is_judged(tmp_path, monkeypatch):
    monkeypatch.setattr(exercise, "SECONDS", 4)
    paths = [write(tmp_path / str(i), "kl_k3", body) for i, body in enumerate(HARM)]
    for path, (mark_, said, _), (due, how) in zip(paths, exercise.verdicts(paths), HARM.values()):
        assert mark_ == due
        assert re.match(re.escape(str(path)) + re.escape(how).replace(r"\[56\]", "[56]"), said), (
            said
        )


# --- The command -------------------------------------------------------------------------


def called(command, capsys):
    """(exit code, what it printed, what it said on stderr)."""
    code = exercise.main(command.split())
    return code, *capsys.readouterr()


def test_an_answer_is_begun_once_and_says_what_it_is_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in exercise.TEXTS:
        assert called(f"start {name}", capsys)[0] == 0
        text = (tmp_path / "answers" / f"{name}.py").read_text("utf-8")
        assert f"check {name}" in text and max(map(len, text.split("\n"))) <= 100
    text = (tmp_path / "answers" / "response_logprobs.py").read_text("utf-8")
    assert text.endswith(
        "def response_logprobs(model, episodes, config, with_skill=False):\n"
        '    raise NotImplementedError("write response_logprobs")\n'
    )
    path = write(tmp_path / "answers", "gated_terms", "print(7)\n" + original("gated_terms"))
    code, _, said = called("start gated_terms", capsys)
    assert code == 2 and "stays as it is" in said and "print(7)" in path.read_text()
    code, said, _ = called("check", capsys)
    assert (code, said.count("is still empty\n")) == (1, 8)
    assert re.search(r"answers.gated_terms.py printed:\n    7\n\nRight. You now", said)
    monkeypatch.setattr(exercise, "verdicts", lambda paths: [["R", "", ""]] * len(paths))
    assert called("check gated_terms", capsys)[0] == 0
    path.write_text(path.read_text().replace("teacher - old", "old - teacher"))
    said = called("solution gated_terms", capsys)[1]
    assert original("gated_terms") in said
    assert re.search(r"^-.*teacher - old.*\n\+.*old - teacher", said, re.MULTILINE)
    path.write_text("def gated_terms(\n")
    assert "was never closed" in called("solution gated_terms", capsys)[1]


def test_a_hint_is_a_question_and_then_the_formula(capsys):
    for name in exercise.TEXTS:
        question, formula = (called(f"hint {name} {i}", capsys)[1] for i in (1, 2))
        assert question == called(f"hint {name}", capsys)[1]
        assert "?" in question and formula not in question


REFUSED = """
check kl_k3 --answers nowhere | there is no nowhere.kl_k3.py: python .lab/course/exercise.py start
check --answers nowhere       | nowhere has no answers
check kl_k4                   | unknown exercise 'kl_k4'; known: kl_k3, group_advantages
start                         | start: missing a required argument: 'name'; known: start, check
hint kl_k3 3                  | hint kl_k3 3: 1 is a question, 2 the formula
blank kl_k3                   | sdar.py is never edited; now it is: start NAME
restore kl_k3                 | sdar.py is never edited; nothing is to be restored
run --answers nowhere         | nowhere has no function that is written
grade nowhere                 | nowhere: FileNotFoundError
bug 9                         | bug 9: there are 1 to 8
bug 2 --no-flag               | unrecognized arguments: --no-flag
bug 2 compare                 | unrecognized arguments: compare
compare nowhere nowhere       | nowhere holds no run that can be read
answer gamma b                | 'gamma' is none of 1, 2,
answer 6                      | answer: missing a required argument: 'said'
gradient gate.txt             | gate.txt
x                             | unknown 'x'; known: start, check
"""


@mark.parametrize("row", REFUSED.strip().split("\n"))
def test_what_is_no_command_is_refused_in_one_line(row, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command, how = row.split("|")
    code, _, said = called(command, capsys)
    assert (code, said.count("\n")) == (2, 1)
    assert re.search(re.escape(how.strip()).replace(r"nowhere\.kl", "nowhere.kl"), said)
    assert not any(tmp_path.iterdir())


def test_a_class_becomes_a_table(tmp_path, capsys):
    write(tmp_path / "Ada", "gated_terms", original("gated_terms"))
    write(tmp_path / "Ada" / "answers", "kl_k3", "raise NotImplementedError")
    write(tmp_path / "Bo Li_7", "gated_terms", "def k(")
    write(tmp_path / "Bo Li_7", "kl_k3", "import os\nos.abort()")
    shutil.copy(ROOT / ".lab" / "course" / "heart.py", tmp_path / "Bo Li_7")
    code, said, _ = called(f"grade {tmp_path}", capsys)
    assert code == 0
    rows = said.split("\n")
    assert rows[1].split()[::8] == ["kl_k3", "gated_ter"]
    assert rows[2].split() == ["Ada", *"e.......R"]
    assert rows[3].split() == ["Bo", "Li_7", *"n.......x"]
    assert re.search(r"Bo Li_7, kl_k3: .*line 5: it ends Python", said)
    assert "Bo Li_7: heart.py is no answer" in said


RUN = "--steps 1 --tasks-per-step 2 --group-size 2 --eval-episodes 6 --rollout-batch 8 --overwrite"


def test_a_run_trains_with_all_that_is_written(tmp_path, capsys):
    mine, out = tmp_path / "mine", tmp_path / "run"
    write(mine, "kl_k3", "def kl_k3(a, b):\n    return 0 * a + 7")
    write(mine, "GATES", "GATES = {'gap': lambda gap, h, beta: 0 * gap + 0.25}")
    write(mine, "view", "def view(self, with_skill):\n    raise NotImplementedError")
    command = f"run --answers {mine} -- {RUN} --out {out}"
    before = {**sdar.GATES}
    code, said, _ = called(command, capsys)
    assert code == 0 and "mine: kl_k3, GATES; all else is ours" in said
    (row,) = lines(out)
    assert (row["kl"], row["gate"]) == (approx(7), 0.25)
    assert sdar.GATES == before and sdar.kl_k3.__module__ == "sdar"

    write(mine, "kl_k3", "def kl_k3(a, b):\n    return a - refs")
    code, _, said = called(command, capsys)
    assert code == 2
    assert re.search(r"kl_k3.py, line 5 \(return a - refs\): NameError: .*\n$", said)


# --- Bugs to find, and experiments -------------------------------------------------------


def test_answers_and_their_hints(capsys):
    code, said, _ = called("answer beta a", capsys)
    assert code == 1 and "beta is not 'a'. Read gate of both" in said
    code, said = called("answer beta b", capsys)[:2]
    assert code == 0 and re.fullmatch("Right. Why: .* solution beta\n", said)
    for number, wrong in enumerate(bugs.BUGS, 1):
        code, said, _ = called(f"answer {number} {wrong.__name__}", capsys)
        assert code == 0 and f"def {wrong.__name__}()" in said


def test_every_puzzle_has_one_answer_that_cannot_be_read_by_accident():
    names = [bug.__name__ for bug in bugs.BUGS]
    for puzzle in exercise.puzzles():
        answers = [*names, "kl", "lr", "teacher", "healthy", *"abc"]
        assert len([said for said in answers if exercise.judge(puzzle, said)[0]]) == 1
    assert not [name for name in names if name in str(exercise.puzzles())]


STEP = {"steps": 1, "tasks_per_step": 4, "minibatches": 1, "seed": 2}  # an episode is won


@fixture(scope="module")
def right_step(tmp_path_factory):
    """Metrics of a small run's first step."""
    return trained(tmp_path_factory.mktemp("right"), **STEP)[1][0]


@mark.parametrize("number", range(1, 9))
def test_a_planted_bug_shows_in_the_metrics_of_step_1(number, right_step, tmp_path):
    wrong = bugs.BUGS[number - 1]()
    with graders.in_place(wrong.__name__, wrong):
        (buggy,) = trained(tmp_path, **STEP)[1]
    changed = {name for name in right_step if buggy[name] != right_step[name]}
    assert {name for name in changed if not name.startswith("eval")}


def test_a_bug_is_run_with_flags_and_through_the_microscope(tmp_path, capsys):
    size = "--steps 1 --tasks-per-step 2 --group-size 2 --eval-episodes 6 --rollout-batch 8"
    assert exercise.main(["bug", "2", *size.split(), "--out", str(tmp_path / "run")]) == 0
    assert lines(tmp_path / "run")[0]["gap"] == approx(0, abs=1e-6)
    page = tmp_path / "page.html"
    assert exercise.main(["bug", "2", "microscope", "--seed", "0", "--page", str(page)]) == 0
    number = r" +(-?\d+\.\d\d)"
    rows = re.findall(4 * number, capsys.readouterr().out)
    assert {float(gap) for _, _, gap, _ in rows} == {0.0} and page.exists()


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


@mark.parametrize("number, env", [(0, "house:House"), (1, "moving:Moving")])
def test_the_pages_own_worlds_can_be_learned_in(number, env, tmp_path, monkeypatch):
    page = (ROOT / ".lab" / "course" / "COURSE.md").read_text()
    code = re.findall("```python\n(.*?)```", page, re.DOTALL)[number]
    (tmp_path / f"{env.split(':')[0]}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    last, _ = trained(tmp_path, env=env, steps=1)
    assert last["eval_success"] < 0.5 < last["eval_success_skill"]  # its skill is right


def test_the_heart_has_the_losses_of_a_run(tmp_path, capsys):
    sdar.train(sdar.configure(steps=2, eval_every=0, eval_episodes=6, out=str(tmp_path / "run")))
    capsys.readouterr()
    heart.main(steps=2)
    losses = re.findall("loss (.*)", capsys.readouterr().out)
    expected = [row["loss"] for row in lines(tmp_path / "run")]
    assert [*map(float, losses)] == approx(expected, abs=1e-6)
