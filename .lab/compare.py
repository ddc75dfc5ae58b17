"""Train methods, or values of settings, over seeds, and compare them in a table.

    python .lab/compare.py --methods "grpo,sdar" --seeds "0,1,2,3,4"
    python .lab/compare.py --sweep "gate_beta=1,5,20" --seeds "0,1"
    python .lab/compare.py --sweep "teacher=live,frozen lr=3e-4,6e-4"
    python .lab/compare.py --sweep "variant=none,divergence:forward" --gate none

Every run is a process of its own, on one thread. Runs that are complete are read and not repeated,
so a comparison that was stopped goes on with the same command. After a change of code they are
old, also with --overwrite: take another --out. All other flags go to every run, but a sweep's grpo
row has no teacher. What the table was made from is kept in rows.json in the folder of each run:
experiments/results.py joins such files, makes the tables of pages from them, and draws them.
"""

import itertools
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections import namedtuple
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

LAB = Path(__file__).resolve().parent
sys.path[:0] = [str(LAB.parent), str(LAB / "experiments")]
import plots
import variants

import sdar

FIXED = [name for name in vars(sdar.Config()) if name not in plots.FREE]  # of a row

APART = (  # rows of these are not compared
    "steps preset env env_data model skills max_turns max_new_tokens eval_split eval_episodes "
    "eval_temperature"
)
GAIN = "{:+.2f} [{:+.2f}, {:+.2f}]"  # with its 95 % interval

# A training run: its row of the table, its Config, and its words for experiments/variants.py.
Run = namedtuple("Run", "label config variant")


def main(argv):
    """Run all that is not there yet, and print the comparison; after Ctrl-C of what is there.
    Returns True if a run is missing."""
    parser = sdar.make_parser("python .lab/compare.py [flags]", description=__doc__)
    methods = ",".join(sdar.METHODS)
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument("--methods", default=methods, help=f"rows of the table [{methods}]")
    rows.add_argument("--sweep", default="", help="NAME=VALUE,... [more]: these and grpo are rows")
    parser.add_argument("--variant", help="of experiments/variants.py; of several with + between")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="of each row [0,1,2,3,4]")
    parser.add_argument(
        "--jobs", type=int, default=0, help="runs at once [0: one a core, one on a card]"
    )

    given = vars(parser.parse_args(argv))
    jobs = given.pop("jobs")
    out = Path(given.pop("out", "runs/compare")).expanduser()
    runs = plan(given, out)
    todo = [run for run in runs if not finished(run)]
    out.mkdir(parents=True, exist_ok=True)
    config = runs[0].config
    before = sdar.evaluate(*sdar.load_policy(config), sdar.make_envs(config), config)
    torch.cuda.empty_cache()  # its memory is for the processes
    sdar.say_success("before training", before)

    print(f"{len(runs)} runs in {out}, {len(todo)} of them to do")
    at_once = max(0, jobs) or (os.cpu_count() if config.device == "cpu" else 1)
    command = re.sub(r" --(out|jobs)[= ]\S+", "", shlex.join(["compare.py", *argv]))
    train = partial(launch, before=before["by_type"], command=command)
    with suppress(KeyboardInterrupt):  # the processes get it, too
        thread_map(train, todo, max_workers=at_once, unit="run")

    rows = join(sum(map(finished, runs), []))
    last = f"{config.steps} steps"
    print("\n" + tables(rows, [last, f"{last} with the skill"]))
    print(f"Curves: python .lab/plots.py {out}/*-s*")
    return not all(map(finished, todo))


# --- The runs ----------------------------------------------------------------------------


def plan(given, out):
    """The Runs that the flags ask for, row after row."""
    methods, sweep, seeds = (given.pop(name) for name in ("methods", "sweep", "seeds"))
    axes = f"{sweep or f'method={methods}'} seed={seeds}"
    choices = {}
    free = {"variant", "seed", *FIXED} - {*given} - {*APART.split()}
    for name, values in re.findall(r"([^\s=]+)=?(\S*)", axes):
        name = name.replace("-", "_")
        sdar.require(name in free, f"{sdar.flag(name)} cannot be swept, or is there twice")
        free.remove(name)
        choices[name] = values.split(",")

    seeds = choices.pop("seed")
    rows = [dict(zip(choices, row)) for row in itertools.product(*choices.values())]
    if sweep:  # what needs a teacher is refused without one: GRPO's row goes without it
        rows.insert(0, {"method": "grpo", "distil": "none", "retrieval": "keyword", "variant": ""})
    runs = [make_run(given, row, seed, out) for row in rows for seed in seeds]
    return [*{run.config.out: run for run in runs}.values()]  # GRPO's may be there twice


def make_run(given, row, seed, out):
    """The Run of a row and a seed. Its label says what in the row is no default of its method."""
    settings = given | row | {"seed": seed, "resume": False}
    words = settings.pop("variant", "").split("+")
    variant = [word for word in words if word not in ("", "none")]
    config = sdar.configure(**settings)
    sdar.require(config.steps, "--steps 0: there is nothing to compare")
    variants.check(variant, config)

    plain = sdar.configure(preset=config.preset, method=config.method)
    label = [config.method]
    for name in row:
        value = getattr(config, name, None)  # a variant is none of its fields
        if value != getattr(plain, name, None):
            label.append(f"{name}={value}")
    label = " ".join(label + variant)
    name = re.sub("[^A-Za-z0-9_.=+-]", "-", label)
    config.out = f"{out / name}-s{config.seed}"
    return Run(label, config, variant)


def launch(run, before, command):
    """Train from the first step, in a process of its own. If that goes well, the run's folder gets
    a file rows.json, with the row of this one run.

    before: the start policy's counts, {type: counts}."""
    file = Path(run.config.out, "rows.json")
    file.unlink(missing_ok=True)
    words = [sys.executable, variants.__file__, *run.variant, "--"]
    for name, value in vars(run.config).items():
        typed = f"{sdar.flag(name)}={value}"
        if isinstance(value, bool):  # what a preset has turned on may be off here
            typed = sdar.flag(name if value else f"no_{name}")
        words.append(typed)
    words.append("--overwrite")
    place = os.environ | {"OMP_NUM_THREADS": "1"}
    made = origin(run.config.device)
    done = subprocess.run(words, env=place, capture_output=True, text=True, errors="replace")
    if done.returncode:
        tqdm.write(f"{run.config.out} failed: {' '.join(done.stderr.split()[-20:])}")
    else:
        file.write_text(as_json([make_row(run, before, command, made)]), "utf-8")


def origin(device):
    """What results depend on beside the settings: the code, and by rounding processor and
    libraries. A line of text."""
    git = "git describe --always --dirty"
    git = subprocess.run(git, shell=True, cwd=LAB, capture_output=True, text=True)
    commit = git.stdout.strip() or "unknown"  # no git, or no repository
    packages = [f"{name} {version(name)}" for name in ("torch", "transformers", "numpy")]
    return ", ".join([f"commit {commit}", processor(device), *packages])


def processor(device):
    """The name of what computes."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")  # of Linux, where Python has no name
    found = cpuinfo.exists() and re.search("model name.*: (.*)", cpuinfo.read_text())
    return found[1] if found else f"{platform.processor()} {device}"


# --- Results as data: a list of rows, each with all that it was made with ----------------


def settings_of(run):
    """What the runs of a row have in common."""
    settings = {name: getattr(run.config, name) for name in FIXED}
    return settings | {"variant": run.variant}


def make_row(run, before, command, made):
    """The row of a run. An evaluation is a list of counts, for each task type [games, won alone,
    won with the skill]; that before training is step 0, but for rows that may read other skills."""
    looks = {} if run.variant or run.config.retrieval != "keyword" else {0: [*before.values()]}
    for line in plots.read_run(run.config.out)[1]:
        if "eval_by_type" in line:
            looks[line["step"]] = [line["eval_by_type"][kind] for kind in before]
    return {
        "label": run.label,
        "made": made,
        "command": command,
        "settings": settings_of(run),
        "types": [*before],
        "runs": {run.config.seed: looks},
    }


def finished(run):
    """The rows of a run: one if it is complete, else none. UserError if it was made with other
    settings."""
    file = Path(run.config.out, "rows.json")
    rows = json.loads(file.read_text("utf-8") or "[]") if file.exists() else []
    same = all(row["settings"] == settings_of(run) for row in rows)
    message = f"{run.config.out} holds a run of other settings: another --out, or --overwrite"
    sdar.require(same or run.config.overwrite, message)
    return rows if same else []


def join(rows):
    """The rows, those of one label, origin and settings as one."""
    joined = {}
    for row in rows:
        key = str([row["label"], row["made"], row["settings"]])
        into = joined.setdefault(key, row | {"runs": {}})
        into["runs"].update(row["runs"])
    return [*joined.values()]


def as_json(rows):
    """Rows as the text of a file, a line each."""
    return json.dumps(rows, separators=(",", ":")).replace('{"label"', '\n{"label"') + "\n"


def won(looks, column):
    """The share of games that a run has won. A column begins with the number of a step: "60 steps",
    "60 with the skill"."""
    games, *wins = np.sum(looks[column.split()[0]], 0)
    return wins["skill" in column] / games


def success(row, column):
    """{seed: the share of games that its run has won}, of runs that came so far."""
    step = column.split()[0]
    return {seed: won(looks, column) for seed, looks in row["runs"].items() if step in looks}


# --- The table ---------------------------------------------------------------------------


def tables(rows, columns):
    """Markdown, a table for the rows of each origin: success, mean ± standard deviation over seeds,
    or of one run with Wilson's interval, and what a row has over grpo, seed by seed, if there are
    three: of two the interval would be wider than what is possible."""
    texts = []
    for made in dict.fromkeys(row["made"] for row in rows):
        cells = [["", "runs", *columns, "minus grpo, 95 %"]]
        for row in (row for row in rows if row["made"] == made):
            gains = gains_over("grpo", row, rows, str(row["settings"]["steps"]))
            gain = GAIN.format(*t_interval(gains)) if len(gains) > 2 else ""
            shares = [cell(row, column) for column in columns]
            cells.append([row["label"], str(len(row["runs"])), *shares, gain])
        texts.append(f"{markdown(cells)}\n{made}\n")
    return "\n".join(texts)


def cell(row, column):
    """Success of a row's runs as a text."""
    shares = [*success(row, column).values()]
    if not shares:
        return ""
    if len(shares) > 1:
        return f"{np.mean(shares):.2f} ± {np.std(shares, ddof=1):.2f}"
    games = row["settings"]["eval_episodes"]
    bracket = sdar.wilson(shares[0] * games, games)
    return "{:.2f} [{:.2f}, {:.2f}]".format(*shares, *bracket)


def markdown(cells):
    """A table, its head first."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    return "".join(f"| {' | '.join(map(str.ljust, row, widths))} |\n" for row in cells)


def gains_over(label, row, rows, column):
    """What a row's runs win more than those of another row of the same origin, seed by seed."""
    ours = success(row, column)
    for other in rows:
        if other["label"] == label != row["label"] and other["made"] == row["made"]:
            theirs = success(other, column)
            return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return []


# Student's t for 1, 2, ..., 30 degrees of freedom: 95 % lie between -t and t.
T = """
    12.706 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262 2.228
    2.201 2.179 2.160 2.145 2.131 2.120 2.110 2.101 2.093 2.086
    2.080 2.074 2.069 2.064 2.060 2.056 2.052 2.048 2.045 2.042
""".split()


def t_interval(gains):
    """The mean, and low and high end of its 95 % interval, Student's t."""
    n = len(gains)
    t = float(T[min(n, 31) - 2])  # with still more seeds a little too wide
    half = t * np.std(gains, ddof=1) / n**0.5
    mean = np.mean(gains)
    return mean, mean - half, mean + half


if __name__ == "__main__":
    sys.exit(sdar.run(main, sys.argv[1:]))
