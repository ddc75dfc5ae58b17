"""The exercises of the README: blanks to fill in, planted bugs to find, the picture of the gate's gradient.

    python .assets/exercises/exercise.py blank gate      # empties the body of a function; git checkout brings it back
    python .assets/exercises/exercise.py bug 3 --steps 20 --out runs/bug3    # sdar.py with planted bug 3, in memory only
    python .assets/exercises/exercise.py gradient        # .assets/gate.svg, and the same as text

Do not read puzzles.json's long strings unless you want to be told: they are the bugs, packed so that no eye falls on them.
"""
import ast
import base64
import hashlib
import importlib.util
import json
import sys
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BLANKS = {"group_advantages": "sdar.py", "gate": "sdar.py", "sdar_loss": "sdar.py", "kl_k3": "sdar.py", "retrieve": "envs.py"}

def puzzles():
    """{"1": {"answer": hash, "code": what plants it, packed, "hint": packed}, ..., "beta": {"answer", "hint"}, ...}"""
    return json.loads((HERE / "puzzles.json").read_text())

def unpack(text):
    return zlib.decompress(base64.b85decode(text)).decode()

def judge(puzzle, answer):
    """(is it right, a hint) for an answer to a puzzle: a number's bug by its name, an experiment's conclusion by its letter."""
    entry, said = puzzles()[puzzle], hashlib.sha256(f"sdar {puzzle} {answer.strip().lower()}".encode()).hexdigest()
    return said == entry["answer"], unpack(entry["hint"])

def blank(name, folder=ROOT):
    """Replace the body of a function, its docstring kept, by a NotImplementedError."""
    path = Path(folder, BLANKS[name])
    lines = path.read_text().splitlines(keepends=True)
    function = next(n for n in ast.parse("".join(lines)).body if isinstance(n, ast.FunctionDef) and n.name == name)
    first = function.body[0].end_lineno  # of the docstring
    lines[first:function.end_lineno] = [f'    raise NotImplementedError("exercise: write {name} again")\n']
    path.write_text("".join(lines))
    return f"{path.name}: the body of {name} is gone; its docstring says what it did. Back: git checkout {path.name}"

def planted(number):
    """sdar.py as a new module with a planted bug, which no file shows."""
    sys.path.insert(0, str(ROOT))
    spec = importlib.util.spec_from_file_location("sdar", ROOT / "sdar.py")
    sdar = sys.modules["sdar"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sdar)
    exec(unpack(puzzles()[number]["code"]), vars(sdar))
    return sdar

def gradient(path=HERE.parent / "gate.svg"):
    """What the gradient of log pi is multiplied by on a token, over its gap: taken from the losses by autograd."""
    import torch
    sys.path.insert(0, str(ROOT))
    import sdar
    gap, ones = torch.arange(-20, 21)[None] / 10, torch.ones(1, 41)
    undetached = lambda student: (torch.sigmoid(5 * (gap - student)) * (gap - student)).mean()
    kind = lambda name, beta: lambda student: sdar.sdar_loss(student, gap, ones, name, beta)[0]
    losses = {"gap gate, beta 5": kind("gap", 5), "gap gate, beta 1": kind("gap", 1), "beta 0, as in GRPO+OPSD": kind("gap", 0),
              "reverse KL": kind("reverse_kl", 1), "beta 5, not detached (a bug)": undetached}
    curves = {}
    for label, loss in losses.items():
        student = torch.zeros(1, 41, requires_grad=True)
        curves[label] = torch.stack([gap, -41 * torch.autograd.grad(loss(student), student)[0]], -1).numpy()
    sdar.draw({"push on log pi of a sampled token, over its gap in nats (+: up)": curves}, path)

def main(command="help", *rest):
    if command == "blank" and rest[:1] and rest[0] in BLANKS:
        return print(blank(rest[0]))
    if command == "bug" and rest[:1] and rest[0].isdigit() and rest[0] in puzzles():
        return planted(rest[0]).main(rest[1:])
    if command == "gradient":
        return gradient(*rest)
    print(f"{__doc__}\nblanks: {', '.join(BLANKS)}; bugs: 1 to 8", file=sys.stderr)
    return 2

if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
