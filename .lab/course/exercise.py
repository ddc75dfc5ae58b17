"""The course: functions to write again, planted bugs to find, experiments to predict.

    python .lab/course/exercise.py start kl_k3      # writes answers/kl_k3.py: signature and aim
    python .lab/course/exercise.py check kl_k3      # one sentence: what is wrong, what that means
    python .lab/course/exercise.py check            # all that is in answers/
    python .lab/course/exercise.py hint kl_k3       # a question; hint kl_k3 2: the formula
    python .lab/course/exercise.py solution kl_k3   # ours, and how yours differs
    python .lab/course/exercise.py run -- --steps 20 --out runs/mine    # trains with all of yours
    python .lab/course/exercise.py run -- microscope                    # looks with all of yours
    python .lab/course/exercise.py run -- gradient                      # draws your sdar_loss
    python .lab/course/exercise.py grade CLASS      # CLASS/STUDENT/*.py: a table, for a teacher
    python .lab/course/exercise.py bug 6 --steps 3 --out runs/bug6      # sdar.py with bug 6
    python .lab/course/exercise.py bug 6 microscope                     # an instrument with it
    python .lab/course/exercise.py compare runs/right runs/bug6         # where two logs differ
    python .lab/course/exercise.py answer 6 eos     # a bug's name, an experiment's letter: beta a
    python .lab/course/exercise.py gradient         # .assets/gate.svg, and the same as text

With --answers FOLDER start, check, solution and run take another folder than answers/. Nothing
edits sdar.py: answers and bugs are put in their places in memory. The file bugs.py has the bugs in
plain words: do not read it unless you want to be told.
"""

import ast
import base64
import difflib
import hashlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = map(str, (ROOT, HERE.parent, HERE.parent / "trl", HERE))

from envs import UserError, naming, require

# sdar.py is imported where it is needed, and not here: that takes seconds.

# {what to write again: {file, aim, imports, question, formula, learned}}; a table's has begin, too
TEXTS = json.loads((HERE / "texts.json").read_text("utf-8"))
AGAIN = 77  # exit code of graders.py: go on in a fresh process
PICTURE = ROOT / ".assets" / "gate.svg"
COMMAND = "python .lab/course/exercise.py"
EMPTY = "raise NotImplementedError"
SECONDS = 60  # for one answer, which takes one or two where the machine is idle

# --- Functions to write again: answers/NAME.py -------------------------------------------


def original(name):
    """(text, syntax tree) of a function, or of a table, as it stands in its file."""
    require(name in TEXTS, f"unknown exercise {name!r}; known: {', '.join(TEXTS)}")
    return cut(ROOT / TEXTS[name]["file"], name)


def cut(path, name):
    """(text, syntax tree) of what a file defines under a name. UserError if it cannot be read."""
    with naming(path, UserError):
        source = path.read_text("utf-8-sig")  # Windows' editors put a mark in front
        for node in ast.walk(ast.parse(source)):
            targets = [ast.unparse(target) for target in getattr(node, "targets", [])]
            if name in (getattr(node, "name", ""), *targets):
                lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
                return textwrap.dedent("\n".join(lines)), node
        raise UserError(f"it has no {name}")


def start(name, answers):
    """Write the file of an answer: aim, imports, signature. What is there stays."""
    text, says = original(name)[0], TEXTS[name]
    path = Path(answers, f"{name}.py")
    require(not path.exists(), f"{path} is there, and stays as it is; rename it to start anew")
    body = says.get("begin")  # of a table
    if body is None:
        body = text[: text.index('"""')] + f'raise NotImplementedError("write {name}")'
    commands = f"    {COMMAND} check {name}\n    {COMMAND} hint {name}"
    head = [
        f'"""{name}, of {says["file"]}, to write again.\n',
        *says["aim"],
        f'\n{commands}\n"""\n',
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*head, says["imports"], f"\n\n{body}\n"]), "utf-8")
    return f"{path} says what {name} is for. Write it there, then: {COMMAND} check {name}"


def hint(name, level="1"):
    """A question that leads to a function; at level 2 its formula."""
    original(name)
    require(level in ("1", "2"), f"hint {name} {level}: 1 is a question, 2 the formula")
    if level == "2":
        return TEXTS[name]["formula"]
    return f"{TEXTS[name]['question']}\nThe formula: {COMMAND} hint {name} 2"


def check(*names, answers):
    """Print what the graders say of some answers, or of all. Returns the exit code."""
    paths = [Path(answers, f"{name}.py") for name in names or TEXTS]
    if not names:
        paths = [path for path in paths if path.exists()]
        require(paths, f"{answers} has no answers; {COMMAND} start kl_k3 writes the first")
    for path in paths:
        original(path.stem)
        require(path.exists(), f"there is no {path}: {COMMAND} start {path.stem} writes it")
    found = verdicts(paths)
    for path, (mark, said, printed) in zip(paths, found):
        require(mark != "x" or len(paths) > 1, said)
        if printed:
            print(f"{path} printed:\n{textwrap.indent(printed, '    ')}")
        if mark == "R":
            said = f"{TEXTS[path.stem]['learned']} Ours: {COMMAND} solution {path.stem}"
        print(f"{'Right.' if mark == 'R' else 'Not yet:'} {said}")
    return int(any(mark != "R" for mark, *_ in found))


def verdicts(paths):
    """[mark, sentence, what was printed] of each answer. graders.py judges them in a process of its
    own. Where an answer ends that, another one goes on behind it."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUTF8": "1"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    found = []
    with tempfile.TemporaryDirectory() as folder:
        while len(found) < len(paths):
            left = paths[len(found) :]
            log = Path(folder, f"{len(left)} left")
            command = [sys.executable, HERE / "graders.py", log, str(SECONDS), *left]
            pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "text": True}
            pipes |= {"stderr": subprocess.PIPE, "encoding": "utf-8", "errors": "replace"}
            done = subprocess.run(command, env=environment, **pipes)
            why = done.stderr.strip().split("\n")[-1]
            require(log.exists(), f"the graders do not start: {why}")
            found += map(json.loads, log.read_text("utf-8").splitlines())
            if len(found) < len(paths) and done.returncode != AGAIN:
                found.append(["n", how_it_ended(paths[len(found)], done), ""])
    return found


def how_it_ended(path, done):
    """The sentence of an answer that has ended its process, with its line, if there is one."""
    where = re.search(rf'File ".*{path.name}", line (\d+)', done.stderr)
    where = f", line {where[1]}" if where else ""
    if "Timeout" in done.stderr:
        return f"{path}{where}: it has not come back after {SECONDS} s; does a loop never end?"
    return f"{path}{where}: it ends Python (exit code {done.returncode})"


def solution(name, answers):
    """The original of a function and its difference to the answer; or what the course says of an
    experiment, by its name."""
    for page in sorted(HERE.glob("solutions/*.md")):
        for section in page.read_text("utf-8").split("\n## ")[1:]:
            if section.startswith(f"{name}\n"):
                return section.rstrip()
    text, ours = original(name)
    path = Path(answers, f"{name}.py")
    if not path.exists():
        return text
    try:
        pair = plain(ours), plain(cut(path, name)[1])
        rows = [*difflib.unified_diff(*pair, "ours", str(path), lineterm="")] or ["no difference"]
    except UserError as error:
        rows = [str(error)]
    return "\n".join([text, "", "Yours beside it, both without comments:", *rows])


def plain(node):
    """The lines of a syntax tree, without comments and doc string."""
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
        node.body = node.body[1:]
    return ast.unparse(node).split("\n")


def run(*flags, answers):
    """Train with all of a student's functions, or call an instrument with them. Returns the exit
    code."""
    import graders

    used, paths = [], [Path(answers, f"{name}.py") for name in TEXTS if name != "gated_terms"]
    with ExitStack() as stack:
        try:
            for path in filter(Path.exists, paths):
                written = graders.load(path)
                if written and EMPTY not in path.read_text("utf-8", "replace"):
                    stack.enter_context(graders.in_place(path.stem, written))
                    used.append(path.stem)
            require(used, f"{answers} has no function that is written: {COMMAND} start kl_k3")
            print(f"yours, of {answers}: {', '.join(used)}; all else is ours")
            return launch(flags)
        except Exception as error:
            said = graders.sentence(error, *paths)
            if isinstance(error, UserError) or str(Path(answers)) not in said:
                raise
            raise UserError(said) from error


def grade(folder):
    """Print a table of a class, a row a student, and below it what is wrong with each answer."""
    handed = {}
    with naming(folder, UserError):
        for student in sorted(Path(folder).iterdir()):
            files = [*student.glob("*.py"), *student.glob("answers/*.py")]
            if student.is_dir():
                handed[student.name] = files
        found = {path.stem for files in handed.values() for path in files}
        require(TEXTS.keys() & found, "it has no STUDENT/kl_k3.py or STUDENT/answers/kl_k3.py")
    known = [[p for p in sorted(files) if p.stem in TEXTS] for files in handed.values()]
    width = max(map(len, handed)) + 1
    print("R right, n not yet, e still empty, x cannot be used, . not handed in")
    print(" " * width + "".join(f"{name:>10.9}" for name in TEXTS))
    said = []
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for student, paths, found in zip(handed, known, pool.map(verdicts, known)):
            marks = {path.stem: mark for path, (mark, *_) in zip(paths, found)}
            row = "".join(f"{marks.get(name, '.'):>10}" for name in TEXTS)
            print(f"{student:{width}}{row}", flush=True)
            for path, (mark, sentence, _) in zip(paths, found):
                if mark != "R":
                    said.append(f"{student}, {path.stem}: {sentence}")
            for path in set(handed[student]) - {*paths}:
                if path.stem != "alarm":  # of exercise 9, which has a command of its own
                    said.append(f"{student}: {path.name} is no answer of this table")
    return "\n".join(["", *said])


# --- Bugs to find, experiments to predict ------------------------------------------------


def puzzles():
    """{"1": {"answer": hash, "hint": packed}, ..., "beta": ...}: bugs and experiments."""
    return json.loads((HERE / "puzzles.json").read_text())


def judge(puzzle, said):
    """(is it right, a hint) for an answer: a bug by its name, an experiment's conclusion by its
    letter."""
    entry = puzzles()[puzzle]
    text = f"sdar {puzzle} {said.strip().lower()}"
    right = hashlib.sha256(text.encode()).hexdigest() == entry["answer"]
    return right, zlib.decompress(base64.b85decode(entry["hint"])).decode()


def answer(puzzle, said):
    """Whether an answer is right, in words; and of a bug, what somebody wrote."""
    require(puzzle in puzzles(), f"{puzzle!r} is none of {', '.join(puzzles())}")
    right, hint = judge(puzzle, said)
    if not right:
        return f"Not yet: {puzzle} is not {said!r}. {hint}"
    if not puzzle.isdigit():
        return f"Right. Why: {COMMAND} solution {'logs' if puzzle.startswith('log') else puzzle}"
    return f"Right.\n\n{importlib.import_module('bugs').explain(said.strip().lower())}"


def bug(number, *flags):
    """Train with a planted bug, or call an instrument with it. Returns the exit code."""
    import bugs
    import graders

    require(number.isdigit() and number in puzzles(), f"bug {number}: there are 1 to 8")
    wrong = bugs.BUGS[int(number) - 1]()
    with graders.in_place(wrong.__name__, wrong):
        return launch(flags)


def launch(flags):
    """Train with flags, or call microscope or gradient with them. Returns the exit code."""
    import sdar

    flags = [flag for flag in flags if flag != "--"]
    if flags[:1] == ["microscope"]:
        microscope = importlib.import_module("microscope")
        return sdar.run(partial(microscope.main, flags[1:]))
    if flags[:1] == ["gradient"]:
        return print(gradient(*flags[1:] or ["gradient.svg"]))
    return sdar.main(flags)


def compare(right, other):
    """The columns in which the logs of two runs differ, at the first step where they do."""
    import plots

    logs = [plots.read_run(folder)[1] for folder in (right, other)]
    for one, two in zip(*logs):
        rows = []
        for name in sorted(one.keys() & two.keys()):
            timed = "second" in name or name == "eval_by_type"
            if not timed and one[name] != two[name]:
                rows.append(f"{name:<18}{one[name]:>10.4f}{two[name]:>10.4f}")
        if rows:
            return "\n".join([f"step {one['step']:<13}{'first':>10}{'second':>10}", *rows])
    return "no difference in any step"


def gradient(path=PICTURE):
    """Draw what the gradient of log pi is multiplied by on a token, over its gap: taken from the
    losses by autograd."""
    import bugs
    import plots
    import torch

    import sdar

    gap = torch.arange(-20, 21) / 10
    losses = {
        "gap gate, beta 5": sdar.sdar_loss,
        "gap gate, beta 1": partial(sdar.sdar_loss, beta=1.0),
        "beta 0, as in GRPO+OPSD": partial(sdar.sdar_loss, beta=0.0),
        "reverse KL": lambda student, teacher: {"sdar_loss": (teacher - student) ** 2 / 2},
        "beta 5, not detached (a bug)": bugs.detach(),
    }
    curves = {}
    for label, loss in losses.items():
        student = torch.zeros(41, requires_grad=True)
        (slope,) = torch.autograd.grad(loss(student, gap)["sdar_loss"].sum(), student)
        curves[label] = torch.stack([gap, -slope], -1)[None].numpy()
    plots.check_file("gradient", path, (".svg", ".png", ".pdf"))
    title = "push on log pi of a sampled token, over its gap in nats (+: up)"
    plots.draw({title: curves}, path)
    if importlib.util.find_spec("matplotlib"):
        dark = Path(path).with_stem(f"{Path(path).stem}-dark")
        plots.picture({title: curves}, dark, dark=True)
    return "what is drawn are gradients of the losses, by autograd"


# --- The command -------------------------------------------------------------------------

COMMANDS = (start, check, hint, solution, run, grade, bug, compare, answer, gradient)
COMMANDS = {command.__name__: command for command in COMMANDS}
GONE = "answers have files of their own, and sdar.py is never edited"
GONE = {"blank": f"{GONE}; now it is: start NAME", "restore": f"{GONE}; nothing is to be restored"}


def call(command, *words):
    """What a command returns: a text, or an exit code. UserError for what is none."""
    require(command not in GONE, GONE.get(command))
    commands, words, options = COMMANDS, [*words], {}
    if command not in COMMANDS:
        commands = COMMANDS | importlib.import_module("lessons").COMMANDS
    known = f"known: {', '.join(commands)}; {COMMAND} tells more"
    require(command in commands, f"unknown {command!r}; {known}")
    takes = inspect.signature(commands[command])
    if "answers" in takes.parameters:
        options["answers"] = "answers"
        if "--answers" in words:
            at = words.index("--answers")
            options["answers"] = "".join(words[at + 1 : at + 2])
            del words[at : at + 2]
    try:
        takes.bind(*words, **options)
    except TypeError as error:
        raise UserError(f"{command}: {error}; {known}") from error
    return commands[command](*words, **options)


def main(argv):
    """Run one of the commands. Returns the exit code: 1 for an answer that is not right yet."""
    more = ast.get_docstring(ast.parse((HERE / "lessons.py").read_text("utf-8")))
    said = f"{__doc__}\n{more}\n\nfunctions: {', '.join(TEXTS)}"
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has none
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if argv not in ([], ["help"], ["-h"], ["--help"]):
            said = call(*argv)
        if not isinstance(said, str):
            return said or 0
        print(said)
        return int(said.startswith("Not yet"))
    except (UserError, OSError) as error:
        print(f"exercise.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
