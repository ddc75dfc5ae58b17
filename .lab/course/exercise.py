"""The course: functions to write again, planted bugs to find, experiments to predict.

    python .lab/course/exercise.py blank kl_k3      # empties a function, and says what it is for
    python .lab/course/exercise.py hint kl_k3       # its formula
    python .lab/course/exercise.py check kl_k3      # one sentence: what is wrong, what that means
    python .lab/course/exercise.py restore kl_k3    # brings it back; yours is kept in sdar.py.mine
    python .lab/course/exercise.py bug 6 --steps 3 --out runs/bug6      # sdar.py with bug 6
    python .lab/course/exercise.py bug 6 microscope                     # an instrument with it
    python .lab/course/exercise.py compare runs/right runs/bug6         # where two logs differ
    python .lab/course/exercise.py answer 6 eos     # a bug's name, an experiment's letter: beta a
    python .lab/course/exercise.py gradient         # .assets/gate.svg, and the same as text

All exercises: .lab/course/EXERCISES.md. Bugs are planted in memory only. The file bugs.py beside
this one has them in plain words: do not read it unless you want to be told.
"""

import base64
import hashlib
import importlib.util
import json
import re
import sys
import textwrap
import zlib
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = map(str, (ROOT, HERE.parent, HERE.parent / "trl", HERE))
# sdar.py is imported where it is needed, and not here: a learner's version may be broken, and is to
# be restored all the same.

BLANKS = {  # {what to write again: its file}
    "group_advantages": "sdar.py",
    "GATES": "sdar.py",
    "sdar_loss": "sdar.py",
    "kl_k3": "sdar.py",
    "retrieve": "envs.py",
    "gated_terms": ".lab/trl/trainer.py",
    "policy_loss": "sdar.py",
    "view": "sdar.py",
    "response_logprobs": "sdar.py",
}
EMPTY = "exercise: write {} again"
PICTURE = ROOT / ".assets" / "gate.svg"


def texts(name):
    """What the course says of a function: {"aim", "hint", "learned"}."""
    return json.loads((HERE / "texts.json").read_text("utf-8"))[name]


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
    """Whether an answer is right, in words. ValueError for what is no puzzle."""
    if puzzle not in puzzles():
        raise ValueError(f"{puzzle!r} is none of {', '.join(puzzles())}")
    right, hint = judge(puzzle, said)
    return "Right." if right else f"Not yet: {puzzle} is not {said!r}. {hint}"


def check(name):
    """What the grader says of a function, in words: the first number that is wrong and what that
    means, or what its writer now knows."""
    graders = importlib.import_module("graders")
    try:
        getattr(graders, f"grade_{name}")()
    except AssertionError as error:
        return f"Not yet. {error}"
    except NotImplementedError as error:
        return f"Not yet: {error}."
    return f"Right. {texts(name)['learned']}"


def plant(number):
    """Put a bug into sdar, in memory. Returns sdar."""
    import bugs

    import sdar

    wrong = bugs.BUGS[int(number) - 1]()
    setattr(sdar, wrong.__name__, wrong)
    return sdar


def bug(number, *flags):
    """Train with a planted bug, or call an instrument with it. Returns the exit code."""
    sdar = plant(number)
    if flags[:1] == ("microscope",):
        microscope = importlib.import_module("microscope")
        return sdar.run(partial(microscope.main, list(flags[1:])))
    return sdar.main(list(flags))


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


def blank(name, folder=ROOT):
    """Replace the body of a function by its aim and a NotImplementedError. Returns what to tell the
    learner.

    The original is kept in the folder .blanked, for restore. A learner's own version, if one stands
    there, goes to the end of sdar.py.mine."""
    original = Path(folder, ".blanked", f"{name}.py")
    path, before, text, after = find(name, folder)
    kept = ""
    if original.exists():
        kept = keep(text, name, folder)
    else:
        original.parent.mkdir(exist_ok=True)
        write_whole(original, text)
    write_whole(path, before + emptied(original.read_text("utf-8"), name) + after)
    back = f"Back: python .lab/course/exercise.py restore {name}"
    return f"{path.name}: {name} is empty; what stands there says what it is for.{kept} {back}"


def emptied(text, name):
    """The text of a function without its body, or of a table without its rows."""
    aim, empty = texts(name)["aim"], EMPTY.format(name)
    if "def" not in text.split("\n")[0]:
        comment = textwrap.indent(f"{aim}\n\n{empty}", "    # ", lambda line: True)
        return f"{name} = {{\n{comment}\n}}\n"
    margin = text[: text.index("def")]  # of a method
    signature = text[: text.index(f'{margin}    """')]
    body = f'    """{aim}\n    """\n    raise NotImplementedError("{empty}")\n'
    return signature + textwrap.indent(body, margin)


def restore(name, folder=ROOT):
    """Put the original of a blanked function back; what stands there goes to the end of
    sdar.py.mine. Returns what to tell the learner."""
    original = Path(folder, ".blanked", f"{name}.py")
    path, before, text, after = find(name, folder)
    if not original.exists():
        raise ValueError(f"{path.name}: {name} is not blanked")
    kept = keep(text, name, folder)
    write_whole(path, before + original.read_text("utf-8") + after)
    original.unlink()
    return f"{path.name}: {name} is as it was.{kept}"


def find(name, folder):
    """(file, text before, text of a function or a table, text after). By its lines, not by its
    syntax: that may be broken."""
    path = Path(folder, BLANKS[name])
    source = path.read_text("utf-8")
    first = rf"(?: *def {name}\(|{name} = ).*\n"
    parts = re.split(rf"(?m)(^{first}(?:[ \t)}}].*\n|\n(?=\n*[ \t)}}]))*)", source)
    if len(parts) != 3:
        raise ValueError(f"{path.name} has no {name}, or several")
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


def hint(name):
    """The formula of a function, in words."""
    return texts(name)["hint"]


def main(argv):
    """Run one of the commands. Returns the exit code: 1 for an answer that is not right yet."""
    command, *rest = argv or ["help"]
    of_function = {"blank": blank, "hint": hint, "check": check, "restore": restore}
    of_two = {"compare": compare, "answer": answer}
    try:
        if command in ("help", "--help", "-h"):
            said = f"{__doc__}\nfunctions: {', '.join(BLANKS)}; bugs: 1 to 8"
        elif command in of_function and len(rest) == 1 and rest[0] in BLANKS:
            said = of_function[command](*rest)
        elif command in of_two and len(rest) == 2:
            said = of_two[command](*rest)
        elif command == "gradient" and len(rest) < 2:
            said = gradient(*rest)
        elif command == "bug" and rest and rest[0] in puzzles() and rest[0].isdigit():
            return bug(*rest)
        else:
            known = f"{', '.join(of_function)} with one of {', '.join(BLANKS)}"
            known += "; bug 1 to 8; compare RUN RUN; answer; gradient"
            raise ValueError(f"unknown {' '.join(argv)!r}; known: {known}")
    except (ValueError, OSError) as error:
        print(f"exercise.py: {error}", file=sys.stderr)
        return 2
    print(said)
    return int(said.startswith("Not yet"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
