"""The course: functions to write again, planted bugs to find, experiments to predict.

    python .lab/course/exercise.py start kl_k3      # writes answers/kl_k3.py: signature and aim
    python .lab/course/exercise.py check kl_k3      # one sentence: what is wrong, what that means
    python .lab/course/exercise.py check            # all that is in answers/
    python .lab/course/exercise.py hint kl_k3       # a question; hint kl_k3 2: the formula
    python .lab/course/exercise.py solution kl_k3   # ours; of an experiment: why
    python .lab/course/exercise.py run -- --steps 20 --out runs/mine    # trains with all of yours
    python .lab/course/exercise.py run -- microscope                    # looks with all of yours
    python .lab/course/exercise.py run -- gradient                      # draws your sdar_loss
    python .lab/course/exercise.py grade CLASS      # CLASS/STUDENT/*.py: a table, for a teacher
    python .lab/course/exercise.py bug 6 --steps 3 --out runs/bug6      # sdar.py with bug 6
    python .lab/course/exercise.py bug 6 microscope                     # an instrument with it
    python .lab/course/exercise.py compare runs/right runs/bug6         # where two logs differ
    python .lab/course/exercise.py answer 6 eos     # a bug's name, an experiment's letter: beta a
    python .lab/course/exercise.py gradient         # a token's push over its gap, in gate.svg
    python .lab/course/exercise.py log ill 1        # a stored log as a table; alarm 1 to 10, too
    python .lab/course/exercise.py alarm            # grades answers/alarm.py on ten stored logs
    python .lab/course/exercise.py late             # when is it too late to be told? Any flags

With --answers FOLDER start, check and run take another folder than answers/. Nothing
edits sdar.py: answers and bugs are put in their places in memory. The file bugs.py has the bugs in
plain words: do not read it unless you want to be told.
"""

import argparse
import codecs
import inspect
import json
import re
import subprocess
import sys
import textwrap
from contextlib import ExitStack, suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = map(str, (ROOT, HERE.parent, HERE))

import bugs
import graders
import lessons
import microscope
import plots
import torch
from tqdm import tqdm

import sdar
from envs import UserError, naming, require

# {what to write again: {file, aim, imports, question, formula, learned}}; a table's has begin, too
TEXTS = json.loads((HERE / "texts.json").read_text("utf-8"))
EMPTY = 'raise NotImplementedError("write'  # the last line of an answer that `start` has made
SECONDS = 120  # for one answer of a class, a right one takes seven

# --- Functions to write again: answers/NAME.py -------------------------------------------

ANSWER = '''"""{name}, of {file}, to write again.

{purpose}

    python .lab/course/exercise.py check {name}
    python .lab/course/exercise.py hint {name}
"""

{imports}


{begin}
'''


def about(name):
    """What texts.json says of a function, or of a table."""
    with naming(f"functions to write are {', '.join(TEXTS)}; experiments: COURSE.md"):
        return TEXTS[name]


def original(name):
    """The text of a function, or of a table, as it stands in its file."""
    source = (ROOT / about(name)["file"]).read_text("utf-8")
    # Up to a line that begins no further right than the first one, but for a closing bracket.
    block = rf"^( *)(def )?{name}( = |\().*?(?=\n+\1?[^\s)}}])"
    return textwrap.dedent(re.search(block, source, re.M | re.S)[0])


def start(name, *, answers="answers"):
    """Write the file of an answer: aim, imports, signature. What is there stays."""
    text = original(name).split('"""')[0]
    says = {"begin": f'{text}{EMPTY} {name}")'} | TEXTS[name]
    path = Path(answers, f"{name}.py")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x", encoding="utf-8") as file:
        file.write(ANSWER.format(name=name, purpose="\n".join(says["aim"]), **says))
    return f"{path} says what to write. Then: python .lab/course/exercise.py check {name}"


def hint(name, level="1"):
    """A question that leads to a function; at level 2 its formula."""
    return about(name)["formula" if level == "2" else "question"]


def check(name="", *, answers="answers"):
    """Judge an answer: returns what is wrong, and what that means. Without a name it prints that
    of all of them, and returns the exit code."""
    if not name:  # each by itself: one that cannot be used stops no other
        each = [["check", path.stem, "--answers", answers] for path in handed_in(answers)]
        return max(sdar.run(call, words) for words in each)
    path = Path(answers, f"{name}.py")
    right = f"Right. {about(name)['learned']}"
    wrong = f"{path}: it is still empty, or still ends with its line `raise`"
    if is_written(path):
        wrong = graders.verdict(path)
    return f"Not yet: {wrong}" if wrong else right


def handed_in(folder):
    """The files of answers in a folder."""
    paths = [path for path in sorted(Path(folder).glob("*.py")) if path.stem in TEXTS]
    require(paths, f"{folder} has no answer: python .lab/course/exercise.py start kl_k3")
    return paths


def is_written(path):
    """False for an answer's file as it was begun."""
    return not re.search(f"(?m)^ *{re.escape(EMPTY)}", path.read_text("utf-8", "replace"))


def solution(name):
    """The original of a function; or what the course says of an experiment, by its name."""
    pages = "\n".join(page.read_text("utf-8") for page in HERE.glob("solutions/*.md"))
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", pages, re.M | re.S))
    return sections[name].strip() if name in sections else original(name)


def run(*flags, answers="answers"):
    """Train with all of a student's functions, or call an instrument with them. Returns the exit
    code."""
    paths = [path for path in handed_in(answers) if is_written(path)]
    require(paths, f"{answers}: all are still empty, or end with their line `raise`")
    print("yours:", *paths)
    with ExitStack() as stack:
        try:
            for path in paths:
                stack.enter_context(graders.in_place(path.stem, graders.load(path)))
            return launch(flags)
        except Exception as error:
            raise UserError(graders.sentence(error, *paths)) from error


def grade(folder):
    """A table of a class, a row a student, and below it what is said of each answer."""
    rows = [
        "R right, n not yet, e still empty, x cannot be used, . not handed in",
        "  ".join([*TEXTS, "student"]),
    ]
    why = [""]
    for student in tqdm(sorted(filter(Path.is_dir, Path(folder).iterdir())), "grading"):
        marks = dict.fromkeys(TEXTS, ".")
        for path in sorted(student.rglob("*.py")):
            if path.stem in TEXTS:
                marks[path.stem], said = judged(path)
                if said:
                    why.append(f"{student.name}, {path.stem}: {said}")
        cells = [mark.center(len(name)) for name, mark in marks.items()]
        rows.append("  ".join([*cells, student.name]))
    return "\n".join(rows + why)


def judged(path):
    """(mark, what is wrong) of an answer, by a process of its own: an answer may end that."""
    if not is_written(path):
        return "e", ""
    try:
        done = subprocess.run(
            [sys.executable, "-u", __file__, "check", path.stem, "--answers", path.parent],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=SECONDS,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return "n", f"not back after {SECONDS} s; does a loop never end? Is the machine busy?"
    if done.returncode == 0 and "Right. " in done.stdout:
        return "R", ""
    said = [f"it ends Python (exit code {done.returncode})", *done.stdout.splitlines()]
    return "x" if done.returncode == 2 else "n", said[-1]


# --- Bugs to find, experiments to predict ------------------------------------------------


def answer(puzzle, said):
    """Whether a bug's name, or the letter of an experiment's conclusion, is right; and of a bug,
    what somebody wrote."""
    puzzles = json.loads((HERE / "puzzles.json").read_text())
    with naming(f"answer {', '.join(puzzles)}; the others have only a solution"):
        # In rot13: nobody reads them by accident.
        right, hint = [codecs.decode(text, "rot13") for text in puzzles[puzzle]]
    names = [*"abc"]
    if not puzzle.isalpha():  # a bug, or a log
        names = sorted(bug.__name__ for bug in bugs.BUGS) + ["kl", "lr", "teacher", "healthy"]
    # A typo is no answer, and is no way to the hint.
    require(said in names, f"answer {puzzle}: {said!r} is none of {', '.join(names)}")
    if said != right:
        return f"Not yet: {puzzle} is not {said!r}. {hint}"
    if puzzle.isdigit():
        return f"Right.\n\n{inspect.getsource(getattr(bugs, said))}"
    return f"Right. Why: python .lab/course/exercise.py solution {puzzle}"


def bug(number, *flags):
    """Train with a planted bug, or call an instrument with it. Returns the exit code."""
    with naming("there are bug 1 to bug 8"):
        wrong = dict(zip("12345678", bugs.BUGS))[number]()
    with graders.in_place(wrong.__name__, wrong):
        return launch(flags)


def launch(flags):
    """Train with flags, or call microscope or gradient with them. Returns the exit code."""
    match [flag for flag in flags if flag != "--"]:
        case ["microscope", *rest]:
            return microscope.main(rest)
        case ["gradient", *rest]:
            return gradient(*rest)
        case words:
            return sdar.main(words)


def compare(right, other):
    """The columns in which the logs of two runs differ, at the first step where they do."""
    for one, two in zip(plots.read_run(right)[1], plots.read_run(other)[1]):
        rows = [f"step {one['step']}: first, second"]
        for name in sorted(one.keys() & two.keys() - {"eval_by_type"}):
            if one[name] != two[name] and "second" not in name:
                rows.append(f"{name:<18}{one[name]:10.4f}{two[name]:10.4f}")
        if len(rows) > 1:
            return "\n".join(rows)
    return "no difference in any step"


def gradient(path="gate.svg"):
    """What the gradient of log pi is multiplied by on a token, over its gap: a table, and with
    matplotlib a picture, light and dark. It is taken from the losses by autograd."""

    def gated(beta):
        return lambda student, teacher: sdar.sdar_loss(student, teacher, None, "gap", beta)

    losses = {
        "gap gate, beta 5": sdar.sdar_loss,
        "gap gate, beta 1": gated(1.0),
        "beta 0, as in GRPO+OPSD": gated(0.0),
        "reverse KL": lambda student, teacher: {"sdar_loss": (teacher - student) ** 2 / 2},
        "beta 5, not detached (a bug)": bugs.detach(),
    }
    plots.check_file("gradient", path, plots.PICTURES)
    title = "push on log pi of a sampled token, over its gap in nats (+: up)"
    rows = [title, f"{'gap':30}  -2.0  -1.5  -1.0  -0.5   0.0   0.5   1.0   1.5   2.0"]
    gap = torch.arange(-20, 21) / 10
    curves = {}
    for label, loss in losses.items():
        student = torch.zeros(41, requires_grad=True)
        loss(student, gap)["sdar_loss"].sum().backward()
        push = -student.grad
        rows.append(f"{label:30}" + "".join(f"{value:6.2f}" for value in push[::5]))
        curves[label] = torch.stack([gap, push], 1)[None].numpy()
    with suppress(ImportError):  # no matplotlib, no picture
        plots.picture({title: curves}, path)
        plots.picture({title: curves}, re.sub(r"(\.\w+)$", r"-dark\1", path), dark=True)
    return "\n".join(rows)


# --- The command -------------------------------------------------------------------------

COMMANDS = start, check, hint, solution, run, grade, bug, compare, answer, gradient
COMMANDS += lessons.log, lessons.alarm, lessons.late
COMMANDS = {command.__name__: command for command in COMMANDS}


def call(words):
    """Run one of the commands, and print the text that it returns. Returns the exit code: 1 for an
    answer that is not right yet."""
    parser = sdar.Parser(add_help=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--answers")
    options, words = parser.parse_known_args(words)
    with naming(f"the commands are {', '.join(COMMANDS)}"):
        name, *words = words
        inspect.signature(COMMANDS[name]).bind(*words, **vars(options))
    said = COMMANDS[name](*words, **vars(options))
    if isinstance(said, str):
        print(said)
        return said.startswith("Not yet")
    return said


def main(argv):
    """Call a command, or tell of them. Returns the exit code."""
    if argv in ([], ["-h"], ["--help"]):
        return print(__doc__)
    return sdar.run(call, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
