"""Command lines and files drawn at random: python .lab/tests/fuzz.py 500

Most have a fault. Each of those must end in exit code 2 and one line on stderr that names the
thing, within seconds, and leave every file as it was. Settings that are only odd must be refused in
the same way, or run. A kind is a function: from a random.Random and a folder with a model (`model`)
and a finished run (`run`) of its own to a command line, and a word that the line must hold; None
where it may run.
"""

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path

import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is no folder is not looked up
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import sdar

DATA = sdar.HERE / ".assets" / "test"
FEW = (
    "--steps 1 --tasks-per-step 2 --group-size 2 --eval-episodes 6 --max-turns 2 --max-new-tokens 4"
)
FEW = FEW.split()
NO_NUMBER = ["nan", "inf", "-inf", "-1", "-0.5", "1e39", "1e400", "x", "", "1;5", "0x1p3", "9" * 30]
NO_INT = [*NO_NUMBER, "1.5", "1e3", "2.0"]
NO_TEXT = ["\0", "\udcff", "\ud800", "\n", "\x1b[2J", "\x07", "\u2028", "\x85"]


# --- The command line ---------------------------------------------------------------------


def a_number(draw, folder):
    """A number that is none, or none that a run could use."""
    chosen = draw.choice([f for f in fields(sdar.Config) if f.type in (int, float)])
    value = draw.choice(NO_NUMBER if chosen.type is float else NO_INT)
    return [f"{sdar.flag(chosen.name)}={value}"], sdar.flag(chosen.name)


def a_choice(draw, folder):
    """A word that is not among the choices, for a letter."""
    name = draw.choice([*sdar.CHOICES])
    word = list(draw.choice([*sdar.CHOICES[name]]))
    word[draw.randrange(len(word))] = draw.choice("qxzé% ")
    return [f"{sdar.flag(name)}={''.join(word)}"], sdar.flag(name)


def a_flag(draw, folder):
    """A flag with another letter."""
    name = sdar.flag(draw.choice(fields(sdar.Config)).name)
    cut = draw.randrange(3, len(name))
    wrong = name[:cut] + "q" + name[cut + 1 :]
    return [f"{wrong}=1"], wrong


def a_text(draw, folder):
    """A character that neither a terminal, a page nor a file's name can hold."""
    flag = draw.choice(["--out", "--model", "--env-data", "--env", "--search-url", "--skills"])
    return [f"{flag}=a{draw.choice(NO_TEXT)}b"], flag


def a_place(draw, folder):
    """A path that leads to what is no file, or to no folder; a name that is nobody's."""
    (folder / "file").write_text("{}")
    place = str(folder / draw.choice(["file/x", "file", "nowhere"]))
    lines = {
        f"--out {folder}/file": "file",
        f"--out {folder}/file/x": "file",
        f"--out {folder}/model": "not empty",
        f"--out {folder}/run": "not empty",
        f"--out {folder}/model --resume": "not empty",
        f"--out {folder}/model --overwrite": "not empty",
        f"--model {place}": "--model",
        f"--skills {place}": "--skills",
        f"--skills {folder}": "--skills",
        f"--env alfworld --env-data {place}": "ALFWorld",
        f"--env webshop --env-data {place}": "WebShop",
        f"--env search --env-data {place}": place,
        f"--env search --env-data {folder}": str(folder),
        f"--env {draw.choice(['tyo', 'nowhere:Class', 'json:dumps', ':', 'x:'])}": "--env",
    }
    line = draw.choice([*lines])
    return line.split(), lines[line]


def a_clash(draw, folder):
    """Settings of which one would be ignored, or make no sense with another."""
    lines = {
        "--resume --overwrite": "not both",
        "--env toy --search-url http://x": "url",
        "--env toy --env-data x": "data",
        "--method grpo --retrieval ucb": "ucb",
        "--method sdar --skilled": "--skilled",
        "--method grpo --policy-coef 0": "--policy-coef",
        "--kernel --device cpu": "--kernel",
        "--group-size 1": "--group-size",
        "--max-turns 500": "--max-turns",
        "--lr 2": "--lr",
        "train": "train",
        "--steps": "--steps",
        "--skilled=1": "--skilled",
    }
    line = draw.choice([*lines])
    return line.split(), lines[line]


def a_run(draw, folder):
    """Choices and numbers that nobody would put together. Some make no sense, the others run."""
    line = [*FEW, "--out", str(folder / "runs" / "odd"), "--preset", "toy"]
    for name, choices in sdar.CHOICES.items():
        if draw.random() < 0.5 and name not in ("preset", "device"):
            line += [sdar.flag(name), draw.choice([*choices])]
    numbers = ["--lr=1e-9", "--lr=.1", "--temperature=9", "--temperature=1e-3", "--kl-coef=0"]
    numbers += ["--eval-temperature=0", "--gate-beta=0", "--gate-beta=1e4", "--clip-eps=0"]
    numbers += ["--max-new-tokens=1", "--micro-batch=1", "--rollout-batch=1", "--minibatches=99"]
    numbers += ["--skilled", "--gradient-checkpointing", "--policy-coef=0", "--sdar-coef=1e6"]
    return [*line, *draw.sample(numbers, 4)], None


# --- Files ---------------------------------------------------------------------------------


def a_tensor(draw, folder):
    """A checkpoint with a tensor missing, left over, of another shape or not finite."""
    from safetensors.torch import load_file, save_file

    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    name = draw.choice([*tensors])
    tensor = tensors.pop(name)
    fault = draw.choice(["missing", "renamed", "reshaped", "nan"])
    if fault == "renamed":
        tensors[f"_orig_mod.{name}"] = tensor
    if fault == "reshaped":
        tensors[name] = tensor[..., :-1].clone()
    if fault == "nan":
        tensors[name] = tensor.fill_(float("nan"))
    save_file(tensors, path, {"format": "pt"})
    line = [*f"--model {folder}/model --device cpu".split(), *FEW]
    return line, "nan nats" if fault == "nan" else "--model"


def a_model_file(draw, folder):
    """A checkpoint with a file cut short, absent or empty; with an adapter, with too many ids."""
    model = folder / "model"
    path = model / draw.choice(["config.json", "tokenizer.json", "model.safetensors"])
    fault = draw.choice(["cut", "absent", "empty", "adapter", "ids"])
    if fault == "cut":
        data = path.read_bytes()
        path.write_bytes(data[: draw.randrange(len(data) - 10)])
    if fault == "absent":
        path.unlink()
    if fault == "empty":
        path.write_bytes(b"")
    if fault == "adapter":
        (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    if fault == "ids":
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.add_tokens([f"<more{n}>" for n in range(2000)])
        tokenizer.save_pretrained(model)
    return [*f"--model {model} --device cpu".split(), *FEW], "--model"


def a_template(draw, folder):
    """A chat template that moves, repeats or drops a message, or frames one turn otherwise."""
    path = folder / "model" / "chat_template.jinja"
    loop = "{% for m in messages %}TURN{% endfor %}{% if add_generation_prompt %}ASK{% endif %}"
    turn = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    ask = "<|im_start|>assistant\n"
    good = loop.replace("TURN", turn).replace("ASK", ask)
    faults = [
        good.replace(turn, turn + "{{ messages[0].content }}"),
        good.replace(turn, turn + turn),
        good.replace(turn, "{% if not loop.last %}" + turn + "{% endif %}"),
        good.replace(turn, "{% if m.role != 'user' %}" + turn + "{% endif %}"),
        good.replace("in messages", "in messages | reverse"),
        good.replace("in messages", "in messages[-2:]"),
        good.replace("m.role", "loop.index"),
        good.replace(ask, "something else"),
        good.replace(turn, "{{ m.content }}\n").replace(ask, ""),
        "{{ nothing.at.all }}",
        "{% for",
        "",
    ]
    path.write_text(draw.choice(faults))
    return [*f"--model {folder}/model --device cpu".split(), *FEW], "--model"


def a_state(draw, folder):
    """A run whose state is cut, is not what this version writes, or is of other settings."""
    path = folder / "run" / "state.pt"
    state = torch.load(path)
    fault = draw.choice(["absent", "cut", "text", "shape", "settings"])
    if fault == "absent":
        del state[draw.choice([*state])]
    if fault == "shape":
        name = draw.choice([*state["model"]])
        state["model"][name] = torch.zeros(3)
    if fault == "settings":
        state["config"][draw.choice(["lr", "seed", "gate", "group_size"])] = 17
    torch.save(state, path)
    if fault == "cut":
        path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])
    if fault == "text":
        path.write_text("{}")
    return [*FEW, "--resume", "--out", str(folder / "run"), "--steps", "2"], "--resume"


def a_question(draw, folder):
    """A line of questions that is none."""
    rows = (DATA / "questions.jsonl").read_text().splitlines()
    number = draw.randrange(1, len(rows))
    row = json.loads(rows[number])
    key = draw.choice(["id", "question", "golden_answers"])
    faults = [
        {name: value for name, value in row.items() if name != key},
        {**row, draw.choice(["question", "golden_answers"]): draw.choice([None, 1.5, {}, "", [1]])},
        {**row, "id": json.loads(rows[0])["id"]},
        {**row, "golden_answers": ["x", 3]},
        [row],
        None,
    ]
    text = json.dumps(draw.choice(faults))
    rows[number] = draw.choice([text, text, rows[number][:-2], "{", "\x00"])
    path = folder / "questions.jsonl"
    path.write_text("\n".join(rows))
    return ["--env", "search", "--env-data", str(path)], f"line {number + 1}"


def a_bank(draw, folder):
    """A skill bank that is none."""
    good = {"name": "mug", "text": "The mug is in the desk.", "keywords": ["mug"]}
    key = draw.choice([*good])
    faults = [
        [],
        {},
        good,
        [good, {**good, key: draw.choice([None, 3, [3], {"a": 1}])}],
        [good, {**good, "keywords": "mug"}],
        [good, {"name": "cup"}],
        [good, {**good, "colour": "red"}],
        [good, "text"],
    ]
    text = json.dumps(draw.choice(faults))
    path = folder / "skills.json"
    path.write_text(draw.choice([text, text, text, text[:-1], ""]))
    return ["--skills", str(path)], "--skills"


KINDS = (
    *(a_number, a_choice, a_flag, a_text, a_place, a_clash, a_run),
    *(a_tensor, a_model_file, a_template, a_state, a_question, a_bank),
)


# --- The harness ---------------------------------------------------------------------------


def contents(folder):
    """{path: bytes} of the files below a folder, {path: None} of folders."""
    paths = folder.rglob("*")
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def call(argv, folder):
    """Call sdar's command line in a folder. Returns (exit code, lines on stderr without bars)."""
    error = io.TextIOWrapper(io.BytesIO(), "utf-8", newline="")  # a bar goes back with \r
    output = io.TextIOWrapper(io.BytesIO(), "utf-8")
    signal.alarm(60)  # something was accepted, and waits for ever
    with contextlib.chdir(folder), contextlib.redirect_stderr(error):
        with contextlib.redirect_stdout(output):
            code = sdar.main(argv)
    signal.alarm(0)
    error.seek(0)
    said = re.sub(r"\r[^\r\n]*", "", error.read())
    return code, said.strip().splitlines()


def attempt(kind, number, material):
    """What is wrong with how one input ends; "" if nothing is. material: a folder to copy."""
    draw = random.Random(f"{kind.__name__} {number}")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(material, Path(place, "f")))
        argv, word = kind(draw, folder)
        before, begun = contents(folder), time.monotonic()
        try:
            code, said = call(argv, folder)
        except BaseException as raised:
            return f"{argv}: {type(raised).__name__}: {raised}"
        after = contents(folder)
        for path in set(after) - set(before):  # of a run that had begun
            if "runs" in path.parts:
                del after[path]
        if after != before:
            return f"{argv}: files have changed"
        if word is None and code == 0:
            return ""
        if code != 2:
            return f"{argv}: exit code {code}"
        if len(said) != 1 or (word or "") not in said[0]:
            return f"{argv}: no single line with {word!r}: {said!r}"
        if time.monotonic() - begun > 20:
            return f"{argv}: it took too long"
    return ""


def prepare(folder):
    """Put a tiny random model and a finished run into a folder."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(DATA / "qwen3")
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **size, **heads))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    code, said = call(["--out", str(folder / "run"), *FEW], folder)
    assert code == 0, said


def too_long(number, frame):
    """What an alarm does."""
    raise TimeoutError("no end in 60 s")


def fuzz(count, first=0):
    """Try so many inputs, the kinds in turn. Returns what went wrong, a list of texts."""
    signal.signal(signal.SIGALRM, too_long)
    with tempfile.TemporaryDirectory() as material:
        prepare(Path(material))
        wrong = []
        for number in range(first, first + count):
            kind = KINDS[number % len(KINDS)]
            fault = attempt(kind, number, Path(material))
            if fault:
                wrong.append(f"{kind.__name__} {number}: {fault}")
        return wrong


if __name__ == "__main__":
    found = fuzz(*map(int, sys.argv[1:] or ["100"]))
    print(*found, f"{len(found)} wrong", sep="\n")
    sys.exit(bool(found))
