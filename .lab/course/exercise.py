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
    python .lab/course/exercise.py gradient         # a token's push over its gap; .assets/gate.svg
    python .lab/course/exercise.py log ill 1        # a stored log as a table; alarm 1 to 10, too
    python .lab/course/exercise.py alarm            # grades answers/alarm.py on ten stored logs
    python .lab/course/exercise.py late             # when is it too late to be told? Any flags

With --answers FOLDER start, check and run take another folder than answers/. Nothing
edits sdar.py: answers and bugs are put in their places in memory. The file bugs.py has the bugs in
plain words: do not read it unless you want to be told.
"""

import argparse
import ast
import codecs
import difflib
import inspect
import json
import re
import subprocess
import sys
import tempfile
import textwrap
from contextlib import ExitStack, suppress
from functools import partial
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
EMPTY = "raise NotImplementedError"
SECONDS = 120  # for one answer, which takes five where the machine is idle

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
    require(name in TEXTS, f"unknown exercise {name!r}; known: {', '.join(TEXTS)}")
    return TEXTS[name]


def original(name):
    """(text, syntax tree) of a function, or of a table, as it stands in its file."""
    source = (ROOT / about(name)["file"]).read_text("utf-8")
    for node in ast.walk(ast.parse(source)):
        targets = [ast.unparse(target) for target in getattr(node, "targets", [])]
        if name in (getattr(node, "name", ""), *targets):
            return textwrap.dedent(ast.get_source_segment(source, node, padded=True)), node


def start(name, answers="answers"):
    """Write the file of an answer: aim, imports, signature. What is there stays."""
    text, _ = original(name)
    path = Path(answers, f"{name}.py")
    require(not path.exists(), f"{path} is there, and stays as it is; rename it to start anew")
    path.parent.mkdir(parents=True, exist_ok=True)
    begin = text.split('"""')[0] + f'{EMPTY}("write {name}")'
    says = {"begin": begin, "name": name} | TEXTS[name]
    path.write_text(ANSWER.format(purpose="\n".join(says["aim"]), **says), "utf-8")
    return f"{path} says what to write. Then: python .lab/course/exercise.py check {name}"


def hint(name, level="1"):
    """A question that leads to a function; at level 2 its formula."""
    if level == "2":
        return about(name)["formula"]
    return f"{about(name)['question']}\nThe formula: python .lab/course/exercise.py hint {name} 2"


def check(*names, answers="answers"):
    """What the graders say of some answers, or of all."""
    names = names or [name for name in TEXTS if Path(answers, f"{name}.py").exists()] or ["kl_k3"]
    paths = [Path(answers, f"{name}.py") for name in names]
    for name, path in zip(names, paths):
        begin = f"python .lab/course/exercise.py start {name}"
        require(about(name) and path.exists(), f"there is no {path}: {begin} writes it")
    rows = []
    for name, path, (mark, said, printed) in zip(names, paths, verdicts(paths)):
        require(mark != "x" or len(paths) > 1, said)
        if printed:
            rows.append(f"{path} printed:\n{textwrap.indent(printed, '    ')}")
        said = f"Not yet: {said}"
        if mark == "R":
            learned = about(name)["learned"]
            said = f"Right. {learned} Ours: python .lab/course/exercise.py solution {name}"
        rows.append(said)
    return "\n".join(rows)


def verdicts(paths):
    """[mark, sentence, what was printed] of each answer. graders.py judges them in a process of its
    own. Where an answer ends that, another one goes on behind it."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        while len(found) < len(paths):
            log = Path(folder, f"from {len(found)}")
            done = subprocess.run(
                [sys.executable, HERE / "graders.py", log, str(SECONDS), *paths[len(found) :]],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
            )
            found += map(json.loads, log.read_text("utf-8").splitlines())
            if len(found) < len(paths) and done.returncode != graders.AGAIN:
                found.append(["n", how_it_ended(paths[len(found)], done), ""])
    return found


def how_it_ended(path, done):
    """The sentence of an answer that has ended its process, with its line, if there is one."""
    where = re.search(rf'{path.name}"(, line \d+)|$', done.stderr)[1] or ""
    said = f"it ends Python (exit code {done.returncode})"
    if "Timeout" in done.stderr:
        said = (
            f"it has not come back after {SECONDS} s; does a loop never end? Is the machine busy?"
        )
    return f"{path}{where}: {said}"


def solution(name, answers="answers"):
    """The original of a function, and how it differs from the answer; or what the course says of an
    experiment, by its name."""
    pages = [page.read_text("utf-8") for page in HERE.glob("solutions/*.md")]
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", "\n".join(pages), re.M | re.S))
    if name in sections:
        return sections[name].strip()
    known = ", ".join([*TEXTS, *sections])
    require(name in TEXTS, f"unknown exercise {name!r}; known: {known}")
    ours, path = original(name)[0], Path(answers, f"{name}.py")
    if not path.exists():
        return ours
    pair = [text.splitlines() for text in (path.read_text("utf-8", "replace"), ours)]
    return "\n".join([ours, "", *difflib.unified_diff(*pair, "yours", "ours", lineterm="")])


def run(*flags, answers="answers"):
    """Train with all of a student's functions, or call an instrument with them. Returns the exit
    code."""
    paths, used = [*Path(answers).glob("*.py")], []
    with ExitStack() as stack:
        try:
            for path in paths:
                if path.stem in TEXTS and EMPTY not in path.read_text("utf-8", "replace"):
                    stack.enter_context(graders.in_place(path.stem, graders.load(path)))
                    used.append(path.stem)
            require(used, f"{answers} has no function that is written: start kl_k3")
            print(f"yours, of {answers}: {', '.join(used)}; all else is ours")
            return launch(flags)
        except Exception as error:
            said = graders.sentence(error, *paths)
            require(str(Path(answers)) not in said, said)  # it was raised in one of theirs
            raise


def grade(folder):
    """A table of a class, a row a student, and below it what is wrong with each answer."""
    rows = ["R right, n not yet, e still empty, x cannot be used, . not handed in"]
    rows.append("  ".join([*TEXTS, "student"]))
    why = [""]
    for student in tqdm(sorted(filter(Path.is_dir, Path(folder).iterdir())), "grading"):
        paths = [path for path in student.rglob("*.py") if path.stem in TEXTS]
        marks = dict.fromkeys(TEXTS, ".")
        for path, (mark, said, _) in zip(paths, verdicts(paths)):
            marks[path.stem] = mark
            if mark != "R":
                why.append(f"{student.name}, {path.stem}: {said}")
        cells = [mark.center(len(name)) for name, mark in marks.items()]
        rows.append("  ".join([*cells, student.name]))
    return "\n".join(rows + why)


# --- Bugs to find, experiments to predict ------------------------------------------------


def puzzles():
    """{"1": [answer, hint], ..., "beta": ...} of bugs and experiments, in rot13: nobody reads them
    by accident."""
    return json.loads((HERE / "puzzles.json").read_text())


def judge(puzzle, said):
    """(is it right, a hint) for an answer: a bug by its name, an experiment's conclusion by its
    letter."""
    right, hint = [codecs.decode(text, "rot13") for text in puzzles()[puzzle]]
    return said == right, hint


def answer(puzzle, said):
    """Whether an answer is right, in words; and of a bug, what somebody wrote."""
    lettered = ", ".join(puzzles())
    require(puzzle in puzzles(), f"{puzzle!r} is none of {lettered}; others have a solution alone")
    names = [*"abc"]
    if not puzzle.isalpha():  # a bug, or a log
        names = sorted(bug.__name__ for bug in bugs.BUGS)
    if puzzle.startswith("log"):
        names += ["kl", "lr", "teacher", "healthy"]
    # A typo is no answer, and is no way to the hint.
    said = said.lower()
    require(said in names, f"answer {puzzle}: {said!r} is none of {', '.join(names)}")
    right, hint = judge(puzzle, said)
    if not right:
        return f"Not yet: {puzzle} is not {said!r}. {hint}"
    if puzzle.isdigit():
        return f"Right.\n\n{inspect.getsource(getattr(bugs, said))}"
    return f"Right. Why: python .lab/course/exercise.py solution {puzzle}"


def bug(number, *flags):
    """Train with a planted bug, or call an instrument with it. Returns the exit code."""
    known = dict(zip("12345678", bugs.BUGS))
    require(number in known, f"bug {number}: there are 1 to 8")
    wrong = known[number]()
    with graders.in_place(wrong.__name__, wrong):
        return launch(flags)


def launch(flags):
    """Train with flags, or call microscope or gradient with them. Returns the exit code."""
    words = [flag for flag in flags if flag != "--"]
    if words[:1] == ["microscope"]:
        return microscope.main(words[1:])
    if words[:1] == ["gradient"]:
        return gradient(*words[1:] or ["gradient.svg"])
    return sdar.main(words)


def compare(right, other):
    """The columns in which the logs of two runs differ, at the first step where they do."""
    logs = [plots.read_run(folder)[1] for folder in (right, other)]
    for one, two in zip(*logs):
        rows = [f"step {one['step']}: first, second"]
        for name in sorted(one.keys() & two.keys() - {"eval_by_type"}):
            if one[name] != two[name] and "second" not in name:
                rows.append(f"{name:<18}{one[name]:10.4f}{two[name]:10.4f}")
        if len(rows) > 1:
            return "\n".join(rows)
    return "no difference in any step"


def gradient(path=ROOT / ".assets" / "gate.svg"):
    """What the gradient of log pi is multiplied by on a token, over its gap: a table, and with
    matplotlib a picture, light and dark. It is taken from the losses by autograd."""
    losses = {
        "gap gate, beta 5": sdar.sdar_loss,
        "gap gate, beta 1": partial(sdar.sdar_loss, beta=1.0),
        "beta 0, as in GRPO+OPSD": partial(sdar.sdar_loss, beta=0.0),
        "reverse KL": lambda student, teacher: {"sdar_loss": (teacher - student) ** 2 / 2},
        "beta 5, not detached (a bug)": bugs.detach(),
    }
    plots.check_file("gradient", path, plots.PICTURES)
    title = "push on log pi of a sampled token, over its gap in nats (+: up)"
    rows = [title, "gap".ljust(30) + "  -2.0  -1.5  -1.0  -0.5   0.0   0.5   1.0   1.5   2.0"]
    gap, curves = torch.arange(-20, 21) / 10, {}
    for label, loss in losses.items():
        student = torch.zeros(41, requires_grad=True)
        loss(student, gap)["sdar_loss"].sum().backward()
        push = -student.grad
        rows.append(label.ljust(30) + "".join(f"{value:6.2f}" for value in push[::5]))
        curves[label] = torch.stack([gap, push], 1)[None].numpy()
    with suppress(ImportError):  # no matplotlib, no picture
        for ending in ("", "-dark"):
            name = Path(path).with_stem(Path(path).stem + ending)
            plots.picture({title: curves}, name, dark=bool(ending))
    return "\n".join(rows)


# --- The command -------------------------------------------------------------------------

COMMANDS = (start, check, hint, solution, run, grade, bug, compare, answer, gradient)
COMMANDS += (lessons.log, lessons.alarm, lessons.late)
COMMANDS = {command.__name__: command for command in COMMANDS}


def call(words):
    """Run one of the commands, and print the text that it returns. Returns the exit code: 1 for an
    answer that is not right yet."""
    parser = sdar.Parser(add_help=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--answers")
    options, (name, *words) = parser.parse_known_args(words)
    with naming(f"{name}; the commands are {', '.join(COMMANDS)}", UserError):
        inspect.signature(COMMANDS[name]).bind(*words, **vars(options))
    said = COMMANDS[name](*words, **vars(options))
    if isinstance(said, str):
        print(said)
        return "\nNot yet" in f"\n{said}"
    return said


def main(argv):
    """Call a command, or tell of them. Returns the exit code."""
    if argv in ([], ["-h"], ["--help"]):
        return print(__doc__)
    return sdar.run(partial(call, argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
