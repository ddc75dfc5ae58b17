"""Input that nothing may accept, drawn at random from kinds of faults: python .lab/fuzz.py 500

Each must end in exit code 2 and one line on stderr that names the thing, within seconds, and leave
every file as it was. A kind is a function: from a random.Random and a folder with a model (`model`)
and a finished run (`run`) of its own to a command line, and a word that the line must hold.
"""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import envs
import sdar

DATA = sdar.HERE / ".assets" / "test"
FEW = "--steps 2 --tasks-per-step 2 --group-size 2 --eval-episodes 6 --max-turns 2".split()
NO_NUMBER = ["nan", "inf", "-inf", "-1", "-0.5", "1e39", "1e400", "x", "", "1;5", "0x1p3", "9" * 30]
NO_INT = [*NO_NUMBER, "1.5", "1e3", "2.0"]
NO_TEXT = ["\0", "\udcff", "\ud800", "\n", "\x1b[2J", "\x07", "\u2028", "\x85"]


# --- The command line ---------------------------------------------------------------------


def a_number(draw, folder):
    """A number that is none, or none that a run could use."""
    numbers = [f for f in sdar.fields(sdar.Config) if f.type in (int, float)]
    chosen = draw.choice(numbers)
    value = draw.choice(NO_NUMBER if chosen.type is float else NO_INT)
    command = draw.choice(["train", "train", "evaluate", "inspect", "bench"])
    return [command, f"{sdar.flag(chosen.name)}={value}"], sdar.flag(chosen.name)


def a_sweep(draw, folder):
    """The same for compare."""
    (_, flag), name = a_number(draw, folder)
    return ["compare", "--sweep", f"{flag[2:]}", "--out", str(folder / "c")], name


def a_choice(draw, folder):
    """A word that is not among the choices: one with a letter changed, or anything."""
    name = draw.choice([*sdar.CHOICES])
    word = list(draw.choice([*sdar.CHOICES[name]]))
    word[draw.randrange(len(word))] = draw.choice("qxzé% ")
    return [f"{sdar.flag(name)}={''.join(word)}"], sdar.flag(name)


def a_flag(draw, folder):
    """A flag with a letter too few."""
    name = sdar.flag(draw.choice(sdar.fields(sdar.Config)).name)
    cut = draw.randrange(3, len(name))
    return [name[:cut] + "q" + name[cut + 1 :] + "=1"], "did you mean"


def a_text(draw, folder):
    """A character that neither a terminal, a page nor a file's name can hold."""
    flag = draw.choice(["--out", "--model", "--env-data", "--env", "--search-url"])
    return [f"{flag}=a{draw.choice(NO_TEXT)}b"], flag


def a_place(draw, folder):
    """A path that leads to what is no file, or to no folder."""
    os.mkfifo(folder / "fifo")
    (folder / "file").write_text("{}")
    place = str(folder / draw.choice(["fifo", "file/x", "file"]))
    commands = {
        f"--out {place}": "--out",
        f"--out {place} --resume": "--out",
        f"compare --out {place}": "--out",
        f"--env search --env-data {folder}/fifo": "fifo",
        f"--env search --env-data {folder}": "no such file",
        f"--env alfworld --env-data {place}": "LFWorld",
        f"--env webshop --env-data {place}": "WEBSHOP_ROOT",
        f"--model {place}": "--model",
        f"plot {place}": "no run",
        f"plot {folder}/run --picture {place}/p.svg": "--picture",
        f"plot {folder}/run --picture {folder}": "--picture",
        f"inspect --page {place}/p.html": "--page",
        f"warmstart --folder {place}": "--folder",
    }
    command = draw.choice([*commands])
    return command.split(), commands[command]


def a_clash(draw, folder):
    """Arguments of which one would be ignored."""
    commands = {
        "--resume --overwrite": "not both",
        "compare --methods sdar --sweep lr=1e-3": "not both",
        "compare --seeds 0,1,1": "twice",
        "compare --seeds 00,0": "twice",
        "compare --methods grpo,sdar,grpo": "twice",
        "compare --sweep lr=1e-3,.001": "twice",
        "compare --seed 1": "--seeds",
        "compare --method grpo": "--methods",
        "compare --sweep lr": "--lr",
        "compare --sweep =1": "unknown flag",
        "compare --jobs -1": "--jobs",
        "inspect --episode 99": "--episode",
        "inspect --method rlsd": "rlsd",
        "--env toy --search-url http://x": "url",
        "--env toy --env-data x": "data",
        "--method grpo --retrieval ucb": "ucb",
        "--kernel --device cpu": "--kernel",
        "plot": "plot takes",
        "exercise restore": "",
        "train evaluate": "evaluate",
        "evaluate x": "x",
        "evaluate --out x": "--out",
        "inspect --resume": "--resume",
        "bench --steps 3": "--steps",
        "plot --lr 3": "--lr",
    }
    command = draw.choice([*commands])
    return command.split(), commands[command]


def a_play(draw, folder):
    """envs.py with something that it does not have."""
    commands = {
        "envs play toy --split foo": "foo",
        "envs play toy --task foo": "foo",
        "envs play toy --data foo": "data",
        "envs play tyo": "toy",
        "envs play nowhere:Class": "nowhere",
        "envs play json:dumps": "json:dumps",
        f"envs play search --data {folder}": "no such file",
        f"envs play alfworld --data {folder}": "LFWorld",
        f"envs serve {folder}": "no such file",
        f"envs serve {DATA}/corpus.jsonl --port 99999": "port",
        f"envs serve {DATA}/corpus.jsonl --port -1": "port",
    }
    command = draw.choice([*commands])
    return command.split(), commands[command]


# --- Files ---------------------------------------------------------------------------------


def a_tensor(draw, folder):
    """A checkpoint with a tensor missing, left over, of another shape or not finite."""
    from safetensors.torch import load_file, save_file

    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    name = draw.choice([*tensors])
    tensor = tensors.pop(name)
    fault = draw.choice(["missing", "renamed", "reshaped", "nan", "inf", "layer"])
    if fault == "renamed":
        tensors[f"_orig_mod.{name}"] = tensor
    if fault == "reshaped":
        tensors[name] = tensor[..., :-1].clone()
    if fault in ("nan", "inf"):
        tensor.view(-1)[draw.randrange(tensor.numel())] = float(fault)
        tensors[name] = tensor
    if fault == "layer":
        tensors = {key: value for key, value in tensors.items() if ".layers.0." not in key}
    save_file(tensors, path, {"format": "pt"})
    return [*f"--model {folder}/model --device cpu".split(), *FEW], "tensor"


def a_model_file(draw, folder):
    """A checkpoint with a file cut short, absent, or that says something else."""
    model = folder / "model"
    name = draw.choice(["config.json", "tokenizer.json", "model.safetensors"])
    path, fault = (
        model / name,
        draw.choice(["cut", "absent", "empty", "template", "adapter", "ids"]),
    )
    if fault == "cut":
        data = path.read_bytes()
        path.write_bytes(data[: draw.randrange(len(data) - 10)])
    if fault == "absent":
        path.unlink()
    if fault == "empty":
        path.write_bytes(b"")
    if fault == "template":
        a_template(draw, model / "chat_template.jinja")
    if fault == "adapter":
        (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    if fault == "ids":
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.add_tokens([f"<more{n}>" for n in range(2000)])
        tokenizer.save_pretrained(model)
    return [*f"--model {model} --device cpu".split(), *FEW], "--model"


def a_template(draw, path):
    """A chat template that moves, repeats or drops a message, or frames one turn otherwise."""
    text = path.read_text()
    start = "<|im_start|>"
    loop = (
        "{%% for m in messages %%}%s{%% endfor %%}{%% if add_generation_prompt %%}%s{%% endif %%}"
    )
    turn = start + "{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    answer = start + "assistant\n"
    faults = [
        loop % (turn + "{{ messages[0].content }}", answer),
        loop % (turn + turn, answer),
        loop % ("{% if not loop.last %}" + turn + "{% endif %}", answer),
        loop % ("{% if m.role != 'user' %}" + turn + "{% endif %}", answer),
        loop.replace("messages", "messages | reverse") % (turn, answer),
        loop.replace("messages", "messages[-2:]") % (turn, answer),
        loop % (turn.replace("m.role", "loop.index"), answer),
        loop % (turn, "something else"),
        loop % ("{{ m.content }}\n", ""),
        "{{ nothing.at.all }}",
        "{% for",
        "",
    ]
    path.write_text(draw.choice(faults))
    assert path.read_text() != text


def a_log(draw, folder):
    """A log whose lines are not steps 1, 2, ... of numbers."""
    path = folder / "run" / "metrics.jsonl"
    rows = path.read_text().splitlines()
    number = draw.randrange(len(rows))
    row = json.loads(rows[number])
    key = draw.choice([name for name in row if name != "eval_by_type"])
    changed = {**row, key: draw.choice(["1", [1], {}, True, 10**400])}
    counts = draw.choice(
        [[3], [1, 2, 3], None, {"put": 3}, {"put": [1, "x", 0]}, {"put": [0, 0, 0]}]
    )
    faults = [
        [*rows[:number], "null", *rows[number + 1 :]],
        [*rows[:number], rows[number][:-3], *rows[number + 1 :]],
        [*rows[: number + 1], *rows[number:]],
        [*rows[:number], json.dumps(changed), *rows[number + 1 :]],
        [*rows[:number], "[1]", *rows[number + 1 :]],
        [*rows[:number], "", *rows[number:]],
        [*rows[:-1], json.dumps({**row, "step": 2, "eval_success": 0.5, "eval_by_type": counts})],
        rows[1:],
    ]
    path.write_text("\n".join(draw.choice(faults)) + "\n")
    return ["plot", str(folder / "run"), "--picture", str(folder / "p.svg")], "run"


def a_state(draw, folder):
    """A checkpoint of a run whose state is not what this version writes, or whose log is not."""
    run = folder / "run"
    path = run / "checkpoint" / "trainer.pt"
    state = torch.load(path, weights_only=True)
    fault = draw.choice(["absent", "type", "cut", "empty", "shape", "log", "settings"])
    key = draw.choice(["step", "before", "optimizer", "arms", "config"])
    if fault == "absent":
        del state[key]
    if fault == "type":
        state[key] = draw.choice([None, 3.5, "x", [1]])
    if fault == "shape":
        moments = draw.choice([*state["optimizer"]["state"].values()])
        moments[draw.choice(["exp_avg", "exp_avg_sq"])] = torch.zeros(3)
    if fault == "settings":
        state["config"]["lr"] = 0.5
    if fault == "log":
        log = run / "metrics.jsonl"
        line = log.read_text().splitlines()[0]
        log.write_text(
            draw.choice(["", line + "\n", f"{line}\n{line}\n", f"null\n{line}\n", "{\n{\n"])
        )
    torch.save(state, path)
    if fault == "cut":
        path.write_bytes(path.read_bytes()[: draw.randrange(1, path.stat().st_size)])
    if fault == "empty":
        path.write_bytes(b"")
    sums = json.dumps(sdar.hashes(path.parent))
    (path.parent / "sums.json").write_text(sums)
    shutil.rmtree(run / "checkpoint.old", ignore_errors=True)
    settings = json.loads((run / "config.json").read_text())
    flags = [f"{sdar.flag(n)}={v}" for n, v in settings.items() if type(v) not in (bool, str)]
    return ["--resume", "--out", str(run), *flags, "--steps", "3"], "--resume"


def a_row(draw, folder):
    """A line of questions, or of a corpus, that is none."""
    name, fields = draw.choice(
        [("questions", ("id", "question", "golden_answers")), ("corpus", ("id", "contents"))]
    )
    rows = (DATA / f"{name}.jsonl").read_text().splitlines()
    number = draw.randrange(1, len(rows))
    row = json.loads(rows[number])
    key = draw.choice(fields)
    absent = {name: value for name, value in row.items() if name != key}
    faults = [
        absent,
        {**row, key: draw.choice([None, True, 1.5, {}, "", [], [1]])},
        {**row, "id": json.loads(rows[0])["id"]},
        [row],
        "text",
        None,
    ]
    if name == "questions":
        splits = ["test", ["train"], {"train": 1}, 3]
        faults += [{**row, "split": split} for split in splits]
        faults += [{**row, "data_source": 3}, {**row, "golden_answers": ["x", 3]}]
    text = draw.choice([json.dumps(draw.choice(faults)), rows[number][:-2], "{", "\x00"])
    rows[number] = text
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(rows))
    if name == "corpus":
        return ["envs", "serve", str(path), "--port", "0"], f"line {number + 1}"
    return ["--env", "search", "--env-data", str(path)], f"line {number + 1}"


KINDS = (
    *(a_number, a_sweep, a_choice, a_flag, a_text, a_place, a_clash, a_play),
    *(a_tensor, a_model_file, a_log, a_state, a_row),
)


# --- The harness ---------------------------------------------------------------------------


def contents(folder):
    """{path: bytes} of the files below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files} | dict.fromkeys(folder.rglob("*"))


def attempt(kind, number, material):
    """What is wrong with how one input ends; "" if nothing is. material: a folder to copy."""
    draw = random.Random(f"{kind.__name__} {number}")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(material, Path(place, "f")))
        argv, word = kind(draw, folder)
        before = contents(folder)
        error, begun = io.TextIOWrapper(io.BytesIO(), "utf-8"), time.monotonic()
        main = sdar.main
        if argv[0] == "envs":
            main, argv = envs.main, argv[1:]
        signal.alarm(60)  # something was accepted, and waits for ever
        try:
            with contextlib.chdir(folder), contextlib.redirect_stderr(error):
                with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")):
                    code = main(argv)
        except SystemExit as end:
            code = end.code
        except BaseException as raised:
            return f"{argv}: {type(raised).__name__}: {raised}"
        finally:
            signal.alarm(0)
        error.seek(0)
        said = error.read()
        if code != 2:
            return f"{argv}: exit code {code}"
        if len(said.splitlines()) != 1 or word not in said:
            return f"{argv}: no single line with {word!r}: {said!r}"
        if contents(folder) != before:
            return f"{argv}: files have changed"
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
    sdar.main(["--out", str(folder / "run"), *FEW])


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
