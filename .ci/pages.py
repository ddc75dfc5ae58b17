"""Are the pages true? python .ci/pages.py runs their commands, in short, and their examples."""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / ".lab"), str(ROOT / ".lab" / "experiments")]
import compare
import results

import sdar

INDEX = ROOT / ".lab" / "README.md"
PATHS = [ROOT / "README.md", *(ROOT / ".lab").rglob("*.md")]
FRONT = PATHS[0].read_text("utf-8")
MODELS = INDEX.with_name("MODELS.md").read_text("utf-8")
COMMAND = re.compile(r"(\w+=\S+ )?(python|torchrun .*?) (\.lab/\S+\.py|sdar\.py|-m pytest)\b")
SIZE = "--tasks-per-step 2 --group-size 2 --eval-episodes 6 --eval-every 0 --overwrite --steps"
TRAINS = ("sdar.py", "variants.py", "exercise.py bug")
RUN = (*TRAINS, "microscope.py", "plots.py", "exercise.py hint", "exercise.py compare", "gradient")
NOT_RUN = re.compile(  # of these, and of other scripts, which have their own tests, the flags
    r"[A-Z]{3}|\.\.\."  # a form
    r"|Qwen/|runs/(warm|forty)"  # no weights at hand, or what warmstart.py makes in minutes
    r"|--env (?!house|moving)|--kernel"  # needs games, servers, a GPU
    r"|--resume"  # it has its own tests
    r"|exercise\.py run"  # needs a student's answers, as runs/gates does
    r"|runs/gates/"
    r"|bug 6 microscope"  # its episode is one of a group of eight
)


def commands():
    """The commands of the pages that call Python; those of sdar.py first: others read its runs."""
    text = "\n".join(path.read_text("utf-8") for path in PATHS)
    blocks = "\n".join(re.findall("```bash\n(.*?)```", text, re.DOTALL))
    found = set(re.findall(r"^(\w.*?)(?:  +#.*)?$", blocks, re.MULTILINE))
    for span in re.findall("`([^`]*)`", text):
        found.add(" ".join(span.split()))  # it may go over the end of a line
    return sorted(filter(COMMAND.match, found), key=lambda command: (".lab" in command, command))


@lru_cache(maxsize=None)
def call(*words):
    """What Python prints with these words, in the current folder; an error if it fails."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 0, (words, done.stdout[-999:], done.stderr[-999:])
    return done.stdout


def check_command(command):
    """Its script and flags are there. It runs with a small size, if it is one of RUN."""
    script = COMMAND.match(command)[3]
    words = shlex.split(command.split(script)[1].rstrip("& "))
    if script == "-m pytest":
        call("-m", "pytest", "--collect-only", f"--rootdir={ROOT}", *map(here, words))
        return
    assert ROOT.joinpath(script).exists(), command
    for flag in re.findall(r" (--[\w-]+)", command):
        owner = "sdar.py" if {"bug", "run"} & {*words} else script
        owner = ".lab/microscope.py" if "microscope" in words else owner
        known = call(ROOT / owner, "--help")
        assert re.search(rf"{flag}\b", known), (command, flag)

    if script == ".lab/compare.py" and "M" not in words:
        given = vars(compare.make_parser().parse_args(words))
        given = {name: given[name] for name in given if name not in ("jobs", "out")}
        for run in compare.plan(given, Path()):
            compare.variants.check(run.variant, run.config)
    if not any(map(command.count, RUN)) or NOT_RUN.search(command):
        return
    print(f"--- {command}", flush=True)
    if "gradient" in words:
        words.append("gate.svg")
    if any(map(command.count, TRAINS)):
        words += [*SIZE.split(), "0" if "--steps 0" in command else "1"]
    call(ROOT / script, *words)


def here(word):
    """A word of a command; a path as one of this repository."""
    return str(ROOT / word) if ROOT.joinpath(word).exists() else word


def check_example():
    """The library example computes the loss of the sampled tokens."""
    (code,) = re.findall("```python\n(.*?)```", MODELS, re.DOTALL)
    table = torch.randn(9, 9, requires_grad=True)
    ids, response = torch.randint(9, (2, 8)), torch.randint(9, (2, 5))
    names = {
        "model": lambda ids: SimpleNamespace(logits=table[ids]),
        "response": response,
        "mask": torch.tensor([[1, 1, 1, 0, 1], [1, 1, 0, 0, 0]]),
        "student_ids": torch.cat([ids[:, :3], response], 1),
        "teacher_ids": torch.cat([ids, response], 1),
        "grpo_loss": lambda logprobs, ids, mask: 0.0,
    }
    exec(code, names)
    logprobs = torch.log_softmax(table[names["student_ids"][:, 2:-1]], -1)
    expected = logprobs.gather(-1, response[..., None])[..., 0]
    assert torch.allclose(names["student"], expected)
    gap = (names["teacher"] - expected)[names["mask"] > 0]
    assert torch.allclose(names["loss"], 0.01 * (torch.sigmoid(5 * gap) * gap).mean())


def check_settings():
    """Whoever has outgrown this file finds every setting's name in other trainers."""
    text = MODELS.split("## The official code's settings")[1].split("\n## ")[0]
    missing = [f.name for f in sdar.fields(sdar.Config) if f"`{f.name}`" not in text]
    assert not missing, missing


def check_versions():
    """Every promised range has two ends, and the README promises the same."""
    promised = (ROOT / "requirements.txt").read_text()
    for line in promised.splitlines():
        assert re.fullmatch(r"[a-z]+>=\d+\.\d+\.\d+,<=\d+\.\d+\.\d+", line), line
    for name, title in (("torch", "PyTorch"), ("transformers", "transformers")):
        low, high = re.search(rf"^{name}>=(.*),<=(.*)$", promised, re.MULTILINE).groups()
        assert f" {title} {low} to {high}" in FRONT


def check_form():
    """The first page stays short; links lead somewhere; the index has every file."""
    lines = FRONT.splitlines()
    assert len(lines) <= 175, len(lines)
    long = [line for line in lines if len(line) > 100 and not line.startswith("|")]
    assert not long, long
    for path in PATHS:
        for link in re.findall(r"(?:\]\(|src=\"|srcset=\")([^)#\"]+)", path.read_text("utf-8")):
            there = link.startswith("https:") or path.parent.joinpath(link).exists()
            assert there, (path, link)
    for path in {*INDEX.parent.rglob("*.*")} - {INDEX, *INDEX.parent.rglob("*.pyc")}:
        assert path.name in INDEX.read_text("utf-8"), f"{path} has no line in {INDEX}"


def check_front():
    """The first page is not packed: short paragraphs, few numbers in a line. Its map has the files'
    lengths."""
    prose = re.sub("```.*?```", "", FRONT, flags=re.DOTALL)
    for paragraph in re.split(r"\n\s*\n", prose):
        lines = paragraph.strip().splitlines()
        listed = paragraph.lstrip("\n").startswith(("|", "#", "<", " ", "-", "1."))
        assert listed or len(lines) <= 4, paragraph
        for line in lines:
            few = len(re.findall(r"(?<![\w.])\d+", line)) <= 4
            assert few or line.startswith("|") or re.search("PyTorch|^commit ", line), line
    for name, said in re.findall(r"^\| `(\w+\.py)` \| ([\d,]+) ", FRONT, re.MULTILINE):
        lines = len(ROOT.joinpath(name).read_text("utf-8").splitlines())
        assert abs(int(said.replace(",", "")) - lines) <= lines / 20, (name, lines)


def check_comments():
    """The comments of Config, which are its help, name all choices and the paper's values."""
    source = Path(sdar.__file__).read_text("utf-8")
    comments = dict(re.findall(r"^    (\w+): \w+ = .*?  # (.*)$", source, re.MULTILINE))
    said = {}
    for name, comment in comments.items():
        if "paper: " in comment:
            said[name] = comment.split("paper: ")[1]
    assert said == {name: str(value) for name, value in sdar.PRESETS["paper"].items()}
    for name, choices in sdar.CHOICES.items():
        missing = [choice for choice in choices if choice not in comments[name]]
        assert name == "gate" or not missing, (name, missing)  # experiments have more gates


def check_norms():
    """Why the toy's lambda is 1: at the start the gated term's gradient is about as long as GRPO's,
    most of it is the noise of the mean gate, and the signed one's is another thing."""
    config = sdar.configure()
    envs = sdar.make_envs(config)
    model, chat = sdar.load_policy(config)
    starts = sdar.draw_starts(envs[0], config, 1, np.random.default_rng([2, config.seed, 1]))
    episodes = sdar.rollout(model, chat, envs, starts, config, config.temperature)
    batch = sdar.step_batch(model, model, model, episodes, config, 1)
    student, _ = sdar.response_logprobs(model, episodes, config)
    gap = batch["teacher"] - student
    gate = sdar.sdar_loss(student, batch["teacher"])["gate"]

    def norm(loss):
        slopes = torch.autograd.grad(loss.mean(), list(model.parameters()), retain_graph=True)
        return torch.cat([slope.flatten() for slope in slopes]).norm().item()

    terms = sdar.policy_loss(student, batch["old"], batch["advantages"])
    grpo = norm(terms["policy_loss"])
    gated = norm(gate * gap)
    constant = norm(gate.mean() * gap)
    signed = norm(gap.detach() * gap)
    print(f"--- norms: {grpo:.3f}, gap {gated:.3f}, constant {constant:.3f}, signed {signed:.3f}")
    assert 0.5 < gated / grpo < 2
    assert constant / gated > 0.5
    assert signed / gated > 5


if __name__ == "__main__":
    check_versions()
    check_form()
    check_front()
    check_comments()
    check_example()
    check_settings()
    check_norms()
    assert results.main(["--check"]) == 0  # the numbers of the pages are those of the data
    assert len(commands()) > 40
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        course = INDEX.with_name("course").joinpath("COURSE.md").read_text("utf-8")
        house, moving = re.findall("```python\n(.*?)```", course, re.DOTALL)
        Path("house.py").write_text(house)
        Path("moving.py").write_text(moving)
        for command in commands():
            check_command(command)
