"""Command lines and files drawn at random: python .lab/tests/fuzz.py 500

Most have a fault. Each of those must end in exit code 2 and one line on stderr that names the
thing, within seconds, and leave every file as it was. Settings that are only odd must be refused in
the same way, or run. A kind is a function: from a random.Random and a folder with a model (`model`)
and a finished run (`run`) of its own to a command line, and a word that the line must hold; None
where it may run. Faults that one can list are in .assets/test: bad_input.txt, templates.json, ...
"""

import contextlib
import io
import os
import random
import re
import shutil
import signal
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is no folder is not looked up
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import sdar

DATA = sdar.HERE / ".assets" / "test"
FEW = (
    "--steps 1 --tasks-per-step 2 --group-size 2 --eval-episodes 6 --max-turns 2 --max-new-tokens 4"
)
NO_NUMBER = ["nan", "inf", "-inf", "-1", "-0.5", "1e39", "1e400", "x", "", "1;5", "0x1p3", "9" * 30]
NO_INT = [*NO_NUMBER, "1.5", "1e3", "2.0"]
NO_TEXT = ["\0", "\udcff", "\ud800", "\n", "\x1b[2J", "\x07", "\u2028", "\x85"]

# --- What is drawn -------------------------------------------------------------------------


def a_number(draw, folder):
    """A number that is none, or none that a run could use."""
    chosen = draw.choice([f for f in fields(sdar.Config) if f.type in (int, float)])
    value = draw.choice(NO_NUMBER if chosen.type is float else NO_INT)
    flag = sdar.flag(chosen.name)
    return f"{flag}={value}", flag


def a_choice(draw, folder):
    """A word that is not among the choices, for a letter."""
    name = draw.choice([*sdar.CHOICES])
    word = list(draw.choice([*sdar.CHOICES[name]]))
    word[draw.randrange(len(word))] = draw.choice("qé%")
    flag = sdar.flag(name)
    return f"{flag}={''.join(word)}", flag


def a_flag(draw, folder):
    """A flag with another letter."""
    name = sdar.flag(draw.choice(fields(sdar.Config)).name)
    cut = draw.randrange(3, len(name))
    wrong = name[:cut] + "q" + name[cut + 1 :]
    return f"{wrong}=1", wrong


def a_text(draw, folder):
    """A character that neither a terminal, a page nor a file's name can hold."""
    flag = draw.choice(["--out", "--model", "--env-data", "--env", "--search-url", "--skills"])
    return f"{flag}=a{draw.choice(NO_TEXT)}b", flag


ODD = """--lr=1e-9 --lr=.1 --temperature=9 --temperature=1e-3 --eval-temperature=0 --kl-coef=0
    --gate-beta=0 --gate-beta=1e4 --clip-eps=0 --policy-coef=0 --sdar-coef=1e6 --skilled
    --max-new-tokens=1 --micro-batch=1 --rollout-batch=1 --minibatches=99
    --gradient-checkpointing"""


def a_run(draw, folder):
    """Choices and numbers that nobody would put together. Some make no sense, the others run."""
    line = [FEW, "--out runs/odd --preset toy"]
    for name, choices in sdar.CHOICES.items():
        if draw.random() < 0.5 and name not in ("preset", "device"):
            line.append(f"{sdar.flag(name)} {draw.choice([*choices])}")
    return " ".join(line + draw.sample(ODD.split(), 4)), None


def a_tensor(draw, folder):
    """A checkpoint with a tensor under another name, of another shape or not finite."""
    from safetensors.torch import load_file, save_file

    path = folder / "model/model.safetensors"
    tensors = load_file(path)
    name = draw.choice([*tensors])
    fault = draw.choice(["renamed", "reshaped", "nan"])
    tensor = tensors.pop(name)
    if fault == "renamed":
        name = f"_orig_mod.{name}"
    if fault == "reshaped":
        tensor = tensor[..., :-1].clone()
    if fault == "nan":
        tensor.fill_(float("nan"))
    save_file(tensors | {name: tensor}, path, {"format": "pt"})
    return f"--model model --device cpu {FEW}", "nan nats" if fault == "nan" else "--model"


def a_file(draw, folder):
    """A file of a model, of a run, of questions or skills that is cut short."""
    model, run = f"--model model --device cpu {FEW}", f"--out run --resume {FEW} --steps 2"
    name, line, word = draw.choice(
        [
            ("model/config.json", model, "--model"),
            ("model/tokenizer.json", model, "--model"),
            ("model/model.safetensors", model, "--model"),
            ("run/state.pt", run, "--resume"),
            ("questions.jsonl", "--env search --env-data questions.jsonl", "not a row"),
            ("skills.json", "--skills skills.json", "--skills"),
        ]
    )
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: draw.randrange(len(data) - 10)] + b"{")
    return line, word


KINDS = (a_number, a_choice, a_flag, a_text, a_run, a_tensor, a_file)

# --- The harness ---------------------------------------------------------------------------


def contents(folder):
    """{path: bytes} of the files below a folder, {path: None} of folders."""
    paths = folder.rglob("*")
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def call(line, folder):
    """Call sdar's command line in a folder. Returns (exit code, lines on stderr without bars)."""
    error = io.TextIOWrapper(io.BytesIO(), "utf-8", newline="")  # a bar goes back with \r
    output = io.TextIOWrapper(io.BytesIO(), "utf-8")
    signal.alarm(60)  # something was accepted, and waits for ever
    with contextlib.chdir(folder), contextlib.redirect_stderr(error):
        with contextlib.redirect_stdout(output):
            code = sdar.main(line.split(" "))
    signal.alarm(0)
    error.seek(0)
    said = re.sub(r"\r[^\r\n]*", "", error.read())
    return code, said.strip().splitlines()


def fault_of(kind, number, material):
    """What is wrong with how one input ends; "" if nothing is. material: a folder to copy."""
    draw = random.Random(f"{kind.__name__} {number}")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(material, Path(place, "f")))
        line, word = kind(draw, folder)
        before = contents(folder)
        try:
            code, said = call(line, folder)
        except BaseException as raised:
            return f"{line!r}: {type(raised).__name__}: {raised}"
        after = contents(folder)
    if before != {path: after[path] for path in after if "runs" not in path.parts}:
        return f"{line!r}: files have changed"
    if word is None and code == 0:
        return ""
    fine = code == 2 and len(said) == 1 and (word or "") in said[0]
    return "" if fine else f"{line!r}: exit code {code}, no single line with {word!r}: {said!r}"


def prepare(folder):
    """Put a tiny random model, a finished run, questions and skills into a folder."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(DATA / "qwen3")
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **size, **heads))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    shutil.copy(DATA / "questions.jsonl", folder)
    shutil.copy(DATA / "official_skills/webshop.json", folder / "skills.json")
    code, said = call(f"--out run {FEW}", folder)
    assert code == 0, said


def too_long(number, frame):
    """What an alarm does."""
    raise TimeoutError("no end in 60 s")


def fuzz(count, first=0):
    """Try so many inputs, the kinds in turn. Returns what went wrong, a list of texts."""
    signal.signal(signal.SIGALRM, too_long)
    wrong = []
    with tempfile.TemporaryDirectory() as material:
        prepare(Path(material))
        for number in range(first, first + count):
            kind = KINDS[number % len(KINDS)]
            fault = fault_of(kind, number, Path(material))
            if fault:
                wrong.append(f"{kind.__name__} {number}: {fault}")
    return wrong


if __name__ == "__main__":
    found = fuzz(*map(int, sys.argv[1:] or ["100"]))
    print(*found, f"{len(found)} wrong", sep="\n")
    sys.exit(bool(found))
