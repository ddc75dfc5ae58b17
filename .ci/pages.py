"""Are the pages true? python .ci/pages.py runs their commands, in short, and their examples."""

import re
import shlex
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / ".lab")]
import compare

import sdar

PATHS = [ROOT / "README.md", *sorted((ROOT / ".lab").rglob("*.md"))]
PAGES = {path.stem: path.read_text("utf-8") for path in PATHS}
NOT_RUN = {  # a part of a command: why it is not run here
    "pytest": "run by .ci/run",
    "git clone": "needs a network",
    "pip install": "it is .ci/run",
    "venv": "it is .ci/run",
    "alfworld-download": "needs a network",
    "exercise blank": "tested on copies",
    "exercise restore": "tested on copies",
    "exercise answer": "it has its own test",
    "WebShop/": "needs a checkout of it",
    "pyserini": "needs Java",
    "spacy": "needs a network",
    "convert_product": "needs a checkout of WebShop",
    "sdar.py compare": "minutes; its flags are parsed, the rest has its own test",
    "--resume": "it has its own tests",
    "--help": "it has its own test",
    "export": "for the shell",
    "RUN": "a form",
    "NAME": "a form",
    "FOLDER": "a form",
    "...": "a form",
    "bench": "it has its own test",
    ".lab/": "they have their own tests",
    "Qwen/": "no weights at hand: random small ones go through the same code",
    "warmstart": "minutes: its own test",
    "large_household": "minutes: it has its own test",
    "runs/warm": "what warmstart made",
    "guess:Guess": "it has its own test",
    "envs.py": "they have their own tests",
    "echo": "questions and a corpus, as in the tests of search",
}
SIZE = "--tasks-per-step 2 --group-size 2 --eval-episodes 6 --eval-every 0 --max-turns 3"


def commands():
    """All commands of the pages, the first one first."""
    text = "\n".join(PAGES.values())
    blocks = "\n".join(re.findall("```bash\n(.*?)```", text, re.DOTALL))
    found = set(re.findall(r"^(\w.*?)(?:  +#.*)?$", blocks, re.MULTILINE))
    # A command between backticks may go over the end of a line.
    found |= {" ".join(span.split()) for span in re.findall(r"`(python [^`]*)`", text)}
    return sorted(found, key=lambda text: (text != "python sdar.py", text))


def run(command):
    """Run a command with a small size, or parse it where it would take too long."""
    words = shlex.split(command)[2:]
    if "sdar.py compare" in command and "M" not in words:
        sdar.parse_flags("compare", "", words[1:], compare.OWN)
    if any(form in command for form in NOT_RUN):
        return
    if words == [] or "--steps" in words:
        words += [*SIZE.split(), "--steps", "1"]
    elif "evaluate" in words:
        words += SIZE.replace("--eval-every 0", "").split()
    elif "gradient" in words:
        words.append("gate.svg")
    print(f"--- {command}")
    assert sdar.main(words) == 0, command


def check_example():
    """The library example computes the loss of the sampled tokens."""
    (code,) = re.findall("```python\n(.*?)```", PAGES["MODELS"], re.DOTALL)
    table = torch.randn(9, 9, requires_grad=True)
    ids, response = torch.randint(9, (2, 8)), torch.randint(9, (2, 5))
    names = {
        "model": lambda ids: SimpleNamespace(logits=table[ids]),
        "response": response,
        "mask": torch.ones(2, 5),
        "student_ids": torch.cat([ids[:, :3], response], 1),
        "teacher_ids": torch.cat([ids, response], 1),
        "grpo_loss": lambda logprobs, ids, mask: (logprobs * mask).sum(),
    }
    exec(code, names)
    names["loss"].backward()
    logprobs = torch.log_softmax(table[names["student_ids"][:, 2:-1]], -1)
    expected = logprobs.gather(-1, response[..., None])[..., 0]
    assert torch.allclose(names["student"], expected)
    assert table.grad.abs().sum() > 0
    assert not names["teacher"].requires_grad


def check_settings():
    """Whoever has outgrown this file finds every setting's name in other trainers."""
    text = PAGES["MODELS"].split("## The official code's settings")[1].split("\n## ")[0]
    missing = [f.name for f in sdar.fields(sdar.Config) if f"`{f.name}`" not in text]
    assert not missing, missing


def check_versions():
    """Every promised range has two ends, and the README promises the same."""
    promised = (ROOT / "requirements.txt").read_text()
    for line in promised.splitlines():
        assert re.fullmatch(r"[a-z]+>=\d+\.\d+\.\d+,<=\d+\.\d+\.\d+", line), line
    for name, title in (("torch", "PyTorch"), ("transformers", "transformers")):
        low, high = re.search(rf"^{name}>=(.*),<=(.*)$", promised, re.MULTILINE).groups()
        assert f" {title} {low} to {high}" in PAGES["README"]


def check_front_page():
    """It stays short; every link of every page leads somewhere."""
    lines = PAGES["README"].splitlines()
    assert len(lines) <= 150, len(lines)
    assert max(map(len, lines)) <= 100, max(lines, key=len)
    for path in PATHS:
        links = re.findall(r"\]\(([^)#]+)[)#]", path.read_text("utf-8"))
        links += re.findall(r'src(?:set)?="([^"]+)"', path.read_text("utf-8"))
        for link in links:
            assert link.startswith("https:") or (path.parent / link).exists(), (path, link)


def check_comments():
    """The comments of Config, which are its help, name all choices and the paper's values."""
    source = Path(sdar.__file__).read_text()
    comments = dict(re.findall(r"^    (\w+): \w+ = .*?  # (.*)$", source, re.MULTILINE))
    said = {}
    for name, comment in comments.items():
        if "paper: " in comment:
            said[name] = comment.split("paper: ")[1]
    assert said == {name: str(value) for name, value in sdar.PRESETS["paper"].items()}
    for name, choices in sdar.CHOICES.items():
        missing = [choice for choice in choices if choice not in comments[name]]
        assert not missing, (name, missing)


def check_norms(folder):
    """Why the toy's lambda is 1: at the start the gated term's gradient is about as long as GRPO's,
    most of it is the noise of the mean gate, and the signed one's is another thing."""
    config = sdar.Config(out=str(folder))
    envs = sdar.make_envs(config)
    model, chat = sdar.load_policy(config)
    rng, stream = sdar.np.random.default_rng([2, config.seed, 1]), (3, config.seed, 1)
    starts = sdar.draw_starts(envs[0], config, rng)
    episodes = sdar.rollout(model, chat, envs, starts, config, stream, config.temperature)
    teacher = sdar.score(model, episodes, config, with_skill=True)
    batch = sdar.step_batch(model, None, teacher, episodes, config)
    student, _ = sdar.response_logprobs(model, episodes, config)

    def norm(loss):
        slopes = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        return torch.cat([slope.flatten() for slope in slopes]).norm().item()

    mask, old = batch["mask"], batch["old"]
    grpo = norm(sdar.policy_loss(student, old, batch["advantages"], mask)[0])
    gates = ("gap", "constant", "reverse_kl")
    losses = [sdar.sdar_loss(student, batch["teacher"], mask, kind)[0] for kind in gates]
    gap, constant, signed = map(norm, losses)
    print(
        f"--- norms: grpo {grpo:.3f}, gap {gap:.3f}, constant {constant:.3f}, signed {signed:.3f}"
    )
    assert 0.5 < gap / grpo < 2
    assert constant / gap > 0.5
    assert signed / gap > 5


if __name__ == "__main__":
    check_versions()
    check_front_page()
    check_comments()
    assert len(commands()) > 40
    check_example()
    check_settings()
    with tempfile.TemporaryDirectory() as folder:
        sdar.os.chdir(folder)
        check_norms(Path(folder, "norms"))
        house, moving = re.findall("```python\n(.*?)```", PAGES["EXERCISES"], re.DOTALL)
        Path("house.py").write_text(house)
        Path("moving.py").write_text(moving)
        for command in commands():
            run(command)
