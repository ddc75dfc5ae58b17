"""Are the pages true? python .ci/pages.py [PAGE ...]

Their commands run, those that train with a small size. Links lead somewhere, the index has every
file, tables are those of the data, and what pages say of the code is so."""

import inspect
import os
import re
import shlex
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
LAB = ROOT / ".lab"
sys.path += [str(ROOT), str(LAB)]
import compare

import sdar

PAGES = [ROOT / "README.md", *LAB.rglob("*.md")]
FRONT, INDEX, MODELS = (
    path.read_text("utf-8") for path in (PAGES[0], LAB / "README.md", LAB / "MODELS.md")
)
COMMAND = re.compile(  # with the file that it calls, and the words behind it
    r"(?:\w+=\S+ )?(?:python|torchrun .*?)(?: -m pytest -q)? (\.lab/\S+|\S*sdar\.py)(.*)"
)
TRAINS = re.compile(r" sdar\.py|variants\.py|bug \d --")
SIZE = "--tasks-per-step 2 --group-size 2 --eval-episodes 6 --eval-every 0 --overwrite --steps 1"
RUN = re.compile(
    TRAINS.pattern + r"|microscope|plots\.py"
    r"|exercise\.py (start|hint|solution|log|compare|gradient \S)|oracles"
)
NOT_RUN = re.compile(
    r"\b[A-Z]+\b|\.\.\."  # a form
    r"|Qwen/|runs/(warm|forty)"  # no weights at hand, or what warmstart.py makes in minutes
    r"|--env (?!house|moving)|--kernel"  # needs games, servers, a GPU
    r"|--resume"  # it has its own tests
    r"|exercise\.py run|runs/gates/"  # needs a student's answers
)


def commands(pages):
    """The commands of the pages that call Python; those of sdar.py first: others read its runs."""
    text = "\n".join(page.read_text("utf-8") for page in pages)
    found = re.findall("`([^`]*)`", text)
    found += re.findall("^([a-zA-Z][^`\n]*?)(?:  +#.*)?$", text, re.MULTILINE)
    found = {" ".join(command.split()) for command in found}  # it may go over the end of a line
    return sorted(filter(COMMAND.match, found), key=lambda command: (".lab" in command, command))


@cache
def call(*words):
    """What Python prints with these words; an error if it fails."""
    return subprocess.check_output([sys.executable, *words], text=True)


def check_command(command):
    """It runs, if it needs nothing that is not here. Else its flags are those of its script."""
    script, rest = COMMAND.match(command).groups()
    words = shlex.split(rest.rstrip("& "))
    if RUN.search(command) and not NOT_RUN.search(command):
        if TRAINS.search(command):
            words += SIZE.split()[: -2 if "--steps 0" in command else None]  # that one only plays
        call(ROOT / script, *words)
    elif script == ".lab/compare.py" and not NOT_RUN.search(command):
        with suppress(NotADirectoryError):  # it plans all runs, and stops where it would begin
            compare.main([*words, "--out", "/dev/null/runs"])
    else:
        assert (ROOT / script).exists(), command
        owner = "sdar.py" if "--" in words else script
        owner = ".lab/microscope.py" if "microscope" in words else owner
        for flag in re.findall(r" (--[\w-]+)", rest):
            known = call(ROOT / owner, "--help")
            assert re.search(rf"{flag}\b", known), (command, flag)


def check_links(page):
    """They lead to a file that is there, and to a title in it."""
    for link in re.findall(r"(?:\]\(|src=\"|srcset=\")([^)\"]+)", page.read_text("utf-8")):
        name, _, anchor = link.partition("#")
        there = page.parent / name if name else page
        assert link.startswith("https:") or there.exists(), (page, link)
        if anchor:
            titles = re.sub(r"[^\w\n -]", "", there.read_text("utf-8")).lower().replace(" ", "-")
            assert f"\n-{anchor}\n" in titles, (page, link)


def check_index():
    """Every file has its line."""
    for path in LAB.rglob("*.*[!c]"):  # not .pyc
        assert path.name in INDEX or path.name == "README.md", f"{path} has no line in the index"


def check_settings():
    """Lengths of files, versions, settings and the paper's values are those of the code."""
    assert FRONT.count("\n") <= 150
    for name, said in re.findall(r"^\| `(\w+\.py)` \| ([\d,]+) ", FRONT, re.MULTILINE):
        lines = (ROOT / name).read_text("utf-8").count("\n")
        assert abs(int(said.replace(",", "")) - lines) <= lines / 20, (name, lines)
    versions = (ROOT / "requirements.txt").read_text()
    for name, low, high in re.findall("(torch|transformers)>=(.*),<=(.*)", versions):
        assert f"{name} {low} to {high}" in FRONT.replace("PyTorch", "torch")
    for name in vars(sdar.Config()):
        assert f"`{name}`" in MODELS, name
    said = dict(re.findall(r"(\w+): .* paper: (.*)", inspect.getsource(sdar.Config)))
    assert said == {name: str(value) for name, value in sdar.PRESETS["paper"].items()}


def check_example():
    """The library example runs, and scores the tokens of the response."""
    (code,) = re.findall("```python\n(.*?)```", MODELS, re.DOTALL)
    table = torch.randn(9, 9)
    ids = torch.randint(9, (2, 8))
    names = {
        "model": lambda ids: SimpleNamespace(logits=table[ids]),
        "student_ids": ids,
        "teacher_ids": ids,
        "response": ids[:, 3:],
        "mask": ids[:, 3:],
        "grpo_loss": lambda *of_tokens: 0,
    }
    exec(code, names)
    expected = table.log_softmax(-1)[ids[:, 2:-1], ids[:, 3:]]
    assert torch.allclose(names["student"], expected)


if __name__ == "__main__":
    pages = [Path(name).resolve() for name in sys.argv[1:]] or PAGES
    check_index()
    check_settings()
    check_example()
    for page in pages:
        check_links(page)
    call(LAB / "experiments/results.py", "--check")
    course = (LAB / "course/COURSE.md").read_text("utf-8")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name, code in re.findall("Save this as `(.*?)`.*?```python(.*?)```", course, re.DOTALL):
            Path(name).write_text(code)
        for command in commands(pages):
            check_command(command)
