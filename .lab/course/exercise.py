"""The course: functions to write again, planted bugs to find, experiments to predict.

    python sdar.py exercise blank gate        # empties a function, and says what it is for
    python sdar.py exercise hint gate         # its formula
    python sdar.py exercise check gate        # is it right? One sentence says what a symptom means
    python sdar.py exercise restore gate      # brings it back; yours is kept in sdar.py.mine
    python sdar.py exercise bug 3 --steps 20 --out runs/bug3    # sdar.py with planted bug 3
    python sdar.py exercise compare runs/right runs/bug3        # where two logs differ
    python sdar.py exercise answer 3 eos      # a bug's name, or an experiment's letter: beta a
    python sdar.py exercise gradient          # .assets/gate.svg, and the same as text

All exercises: .lab/course/EXERCISES.md. A planted bug is in memory only, no file shows it. Do not
unpack the long strings of puzzles.json unless you want to be told.
"""

import base64
import hashlib
import importlib.util
import json
import re
import sys
import textwrap
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BLANKS = {  # {function to write again: its file}
    "group_advantages": "sdar.py",
    "gate": "sdar.py",
    "sdar_loss": "sdar.py",
    "kl_k3": "sdar.py",
    "retrieve": "envs.py",
    "gated_term": ".lab/trl_trainer.py",
    "policy_loss": "sdar.py",
    "view": "sdar.py",
    "predicting_states": "sdar.py",
}
EMPTY = 'NotImplementedError("exercise: write {} again")'
PICTURE = ROOT / ".assets" / "gate.svg"


def texts(name):
    """What the course says of a function: {"aim", "hint", "learned"}."""
    return json.loads((HERE / "texts.json").read_text("utf-8"))[name]


def puzzles():
    """{"1": {"answer": hash, "code": what plants it, "hint"}, ..., "beta": {"answer", "hint"}},
    code and hint packed."""
    return json.loads((HERE / "puzzles.json").read_text())


def unpack(text):
    """The text of a packed string."""
    return zlib.decompress(base64.b85decode(text)).decode()


def judge(puzzle, answer):
    """(is it right, a hint) for an answer: a bug by its name, an experiment's conclusion by its
    letter."""
    entry = puzzles()[puzzle]
    said = f"sdar {puzzle} {answer.strip().lower()}"
    right = hashlib.sha256(said.encode()).hexdigest() == entry["answer"]
    return right, unpack(entry["hint"])


def verdict(kind, said):
    """What is wrong with an answer, in words; "" if it is right; None if there is nothing of this
    kind, "bug" or "experiment", to judge. said: a puzzle and the answer, as in "6 eos"."""
    puzzle, _, answer = said.partition(" ")
    known = puzzles()
    if not puzzle or (puzzle in known and puzzle.isdigit() != (kind == "bug")):
        return None
    if puzzle not in known:
        return f"{puzzle!r} is none of {', '.join(known)}"
    right, hint = judge(puzzle, answer)
    return "" if right else f"{puzzle} is not {answer!r}. {hint}"


def answer(puzzle, said):
    """Whether an answer is right, in words. ValueError for what is no puzzle."""
    if puzzle not in puzzles():
        raise ValueError(f"{puzzle!r} is none of {', '.join(puzzles())}")
    right, hint = judge(puzzle, said)
    return "Right." if right else f"{puzzle} is not {said!r}. {hint}"


def check(name):
    """What the grader says of a function, in words: the first number that is wrong and what that
    means, or what its writer now knows."""
    sys.path[:0] = [str(ROOT), str(HERE)]
    import graders

    try:
        getattr(graders, f"grade_{name}")()
    except AssertionError as error:
        return f"Not yet. {error}"
    except NotImplementedError as error:
        return f"Not yet: {error}."
    return f"Right. {texts(name)['learned']}"


def compare(right, other):
    """Print the columns in which the logs of two runs differ, at the first step where they do."""
    sys.path[:0] = [str(ROOT), str(HERE.parent)]
    import plots

    logs = [plots.read_run(folder)[1] for folder in (right, other)]
    for one, two in zip(*logs):
        rows = []
        for name in one.keys() & two.keys():
            a, b = one[name], two[name]
            timed = "second" in name or name == "eval_by_type"
            if not timed and a != b:
                cells = ["null" if value is None else f"{value:.4f}" for value in (a, b)]
                rows.append(f"{name:<18}{cells[0]:>10}{cells[1]:>10}")
        if rows:
            print(f"step {one['step']:<13}{'first':>10}{'second':>10}", *sorted(rows), sep="\n")
            return
    print("no difference in any step")


def blank(name, folder=ROOT):
    """Replace the body of a function by its aim and a NotImplementedError. Returns what to tell the
    learner.

    The original is kept in the folder .blanked, for restore. A learner's own version, if one stands
    there, goes to the end of sdar.py.mine."""
    original = Path(folder, ".blanked", f"{name}.py")
    path, before, text, after = find(name, folder)
    told = ""
    if original.exists():
        told = keep(text, name, folder)
    else:
        original.parent.mkdir(exist_ok=True)
        write_whole(original, text)
    text = original.read_text("utf-8")
    margin = text[: text.index("def")]  # of a method
    signature = text[: text.index(f'{margin}    """')]
    body = f'    """{texts(name)["aim"]}\n    """\n    raise {EMPTY.format(name)}\n'
    write_whole(path, before + signature + textwrap.indent(body, margin) + after)
    told = f"{path.name}: {name} is empty; its docstring says what it is for.{told}"
    return f"{told} Back: python sdar.py exercise restore {name}"


def restore(name, folder=ROOT):
    """Put the original of a blanked function back; what stands there goes to the end of
    sdar.py.mine. Returns what to tell the learner."""
    original = Path(folder, ".blanked", f"{name}.py")
    path, before, text, after = find(name, folder)
    if not original.exists():
        raise ValueError(f"{path.name}: {name} is not blanked")
    told = keep(text, name, folder)
    write_whole(path, before + original.read_text("utf-8") + after)
    original.unlink()
    return f"{path.name}: {name} is as it was.{told}"


def find(name, folder):
    """(file, text before, text of a function, text after). By its lines, not by its syntax: that
    may be broken."""
    path = Path(folder, BLANKS[name])
    source = path.read_text("utf-8")
    parts = re.split(rf"(?m)(^ *def {name}\((?:.*\n)(?:[ \t)].*\n|\n(?=\n*[ \t)]))*)", source)
    if len(parts) != 3:
        raise ValueError(f"{path.name} has no function {name}, or several")
    return path, *parts


def keep(text, name, folder):
    """Append a learner's version of a function to sdar.py.mine. Returns where, for the learner; ""
    if there is none to keep."""
    original = Path(folder, ".blanked", f"{name}.py").read_text("utf-8")
    if text == original or EMPTY.format(name) in text:
        return ""
    mine = Path(folder, f"{BLANKS[name]}.mine")
    before = mine.read_text("utf-8") if mine.exists() else ""
    write_whole(mine, f"{before}# --- {name}\n{text}\n")
    return f" What you wrote is kept in {mine.name}."


def write_whole(path, text):
    """Write a file beside and rename it: half of sdar.py would be the end of it."""
    fresh = Path(f"{path}.new")
    fresh.write_text(text, "utf-8")
    fresh.replace(path)


def planted(number):
    """sdar.py as a new module with a planted bug."""
    sys.path.insert(0, str(ROOT))
    spec = importlib.util.spec_from_file_location("sdar", ROOT / "sdar.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["sdar"] = module
    spec.loader.exec_module(module)
    exec(unpack(puzzles()[number]["code"]), vars(module))
    return module


def gradient(path=PICTURE):
    """Draw what the gradient of log pi is multiplied by on a token, over its gap: taken from the
    losses by autograd."""
    sys.path[:0] = [str(ROOT), str(HERE.parent)]
    import plots
    import torch

    import sdar

    gap = torch.arange(-20, 21)[None] / 10
    mask = torch.ones(1, 41)

    def loss_of(kind, beta):
        return lambda student: sdar.sdar_loss(student, gap, mask, kind, beta)[0]

    def undetached(student):
        return (torch.sigmoid(5 * (gap - student)) * (gap - student)).mean()

    losses = {
        "gap gate, beta 5": loss_of("gap", 5),
        "gap gate, beta 1": loss_of("gap", 1),
        "beta 0, as in GRPO+OPSD": loss_of("gap", 0),
        "reverse KL": loss_of("reverse_kl", 1),
        "beta 5, not detached (a bug)": undetached,
    }
    curves = {}
    for label, loss in losses.items():
        student = torch.zeros(1, 41, requires_grad=True)
        (slope,) = torch.autograd.grad(loss(student), student)
        curves[label] = torch.stack([gap, -41 * slope], -1).numpy()
    plots.check_file("gradient", path, (".svg", ".png", ".pdf"))
    title = "push on log pi of a sampled token, over its gap in nats (+: up)"
    plots.draw({title: curves}, path)
    if importlib.util.find_spec("matplotlib"):
        dark = Path(path).with_stem(f"{Path(path).stem}-dark")
        plots.picture({title: curves}, dark, dark=True)


def main(argv):
    """Run one of the commands. Returns an exit code, or None for 0."""
    command, *rest = argv or ["help"]
    what = rest[0] if rest else ""
    of_function = {"blank": blank, "restore": restore, "check": check}
    try:
        if command in of_function and rest == [what] and what in BLANKS:
            said = of_function[command](what)
            print(said)
            return int(said.startswith("Not yet"))
        if command == "hint" and rest == [what] and what in BLANKS:
            print(texts(what)["hint"])
        elif command == "bug" and what.isdigit() and what in puzzles():
            return planted(what).main(rest[1:])
        elif command == "compare" and len(rest) == 2:
            compare(*rest)
        elif command == "answer" and len(rest) == 2:
            said = answer(*rest)
            print(said)
            return int(said != "Right.")
        elif command == "gradient" and len(rest) < 2:
            gradient(*rest)
        elif command in ("help", "--help", "-h"):
            print(f"{__doc__}\nfunctions: {', '.join(BLANKS)}; bugs: 1 to 8")
        else:
            known = "blank, hint, check, restore with " + ", ".join(BLANKS)
            raise ValueError(f"unknown {' '.join(argv)!r}; known: {known}; bug, compare, answer")
    except (ValueError, OSError) as error:
        print(f"sdar.py exercise: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
