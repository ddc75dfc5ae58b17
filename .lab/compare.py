"""Train methods, or values of a setting, over seeds, and compare them: a table and curves.

    python sdar.py compare --methods grpo,sdar --seeds 0,1,2,3,4
    python sdar.py compare --sweep gate_beta=1,5,20 --seeds 0,1
    python sdar.py compare --sweep "teacher=live,frozen lr=3e-4,6e-4"

Every run is a process of its own, on one thread. Runs that are complete are read and not repeated,
so a comparison that was stopped goes on with the same command. All other flags go to every run.
"""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm.contrib.concurrent import thread_map

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plots

import sdar

OWN = (
    ("--methods", {"help": f"rows of the table [{','.join(sdar.METHODS)}]"}),
    ("--seeds", {"help": "each method runs with each of them [0,1,2,3,4]"}),
    ("--sweep", {"help": "NAME=VALUE,... [more of them]: rows are all combinations, and grpo"}),
    ("--jobs", {"type": int, "help": "runs at once [one a core]"}),
)


def main(argv):
    """Run all that is not there yet, and print the comparison. Returns 1 if a run failed."""
    given = sdar.parse_flags("compare", __doc__, argv, OWN)
    seeds, sweep = given.pop("seeds", "0,1,2,3,4"), given.pop("sweep", "")
    sdar.require(not (sweep and "methods" in given), "--methods or --sweep? not both")
    methods = given.pop("methods", ",".join(sdar.METHODS))
    jobs = given.pop("jobs", 0)
    sdar.require(jobs >= 0, f"--jobs {jobs}: must be at least 1, or 0 for one a core")
    config = sdar.Config(**given)
    out = Path(given.get("out") or "runs/compare")
    runs = plan(given, methods, seeds, sweep, out)
    may_be_full = {"out": str(out), "resume": True, "overwrite": False}
    sdar.check_out(sdar.replace(config, **may_be_full))
    lock = sdar.only_writer(out)

    todo = [run for row in runs.values() for run in row.values() if finished(run) is None]
    print(f"{sum(map(len, runs.values()))} runs in {out}, {len(todo)} of them to do")
    envs = sdar.make_envs(config)
    start = sdar.evaluate(*sdar.load_policy(config), envs, config)
    torch.cuda.empty_cache()  # for the processes
    at_once = jobs or (1 if config.device == "cuda" else os.cpu_count())
    failures = thread_map(launch, todo, max_workers=at_once, unit="run")
    reasons = {run.out: reason for run, reason in zip(todo, failures)}

    done = {label: evaluations(row) for label, row in runs.items()}
    out.mkdir(parents=True, exist_ok=True)
    report = out / "-".join(["compare", *(axis.split("=")[0] for axis in sweep.split())])
    text = json.dumps({"start": start, "evaluations": done})
    sdar.write_whole(report.with_suffix(".json"), text + "\n")
    print_comparison(runs, done, start, reasons)
    curves = {label: learning_curves(row, start) for label, row in done.items() if row}
    title = "held-out success without the skill at training steps"
    plots.draw({title: curves}, report.with_suffix(".svg"))
    lock.close()
    return int(any(len(row) > len(done[label]) for label, row in runs.items()))


def typed(name, text):
    """A value as the command line reads it: typed("gate_beta", "5") is 5.0."""
    given = sdar.parse_flags("compare", "", [f"{sdar.flag(name)}={text}"])
    (value,) = given.values()
    return value


def plan(given, methods, seeds, sweep, out):
    """What is run: {label: {seed: Config}}. given: the flags that every run gets."""
    choices = {}  # {setting: its values}
    for axis in (sweep or f"method={methods}").split():
        name, _, values = axis.partition("=")
        name = name.replace("-", "_")
        sdar.require(name not in choices, f"--sweep: {name} is there twice")
        choices[name] = [typed(name, value) for value in values.split(",")]
    clash = {"seed", "resume"} & {*choices, *given} or "out" in choices
    if not sweep and "method" in given:
        clash = True
    sdar.require(
        not clash,
        "compare takes --seeds, --methods (--method with --sweep) and one --out, and goes on "
        "without --resume",
    )
    numbers = [typed("seed", seed) for seed in seeds.split(",")]
    for values in (numbers, *choices.values()):
        sdar.require(len({*values}) == len(values), f"compare: one of {values} is there twice")
    rows = [dict(zip(choices, row)) for row in itertools.product(*choices.values())]
    if sweep:
        # What needs a teacher is refused without one: GRPO's row goes without it.
        grpo = {"method": "grpo", "distil": "loss", "divergence": "sampled"}
        if given.get("retrieval") == "ucb":
            grpo["retrieval"] = "keyword"
        rows.insert(0, grpo)

    runs = {}
    for row in rows:
        label = label_of({**given, **row}, row)
        folder = out / label.replace(" ", "-")
        runs[label] = {}
        for seed in numbers:
            own = {"seed": seed, "out": f"{folder}-s{seed}"}
            runs[label][seed] = sdar.Config(**{**given, **row, **own})
    return runs


def label_of(settings, row):
    """The name of a row: its method, and what in the row is no default of that method."""
    kept = ("env", "model", "preset", "method")
    plain = sdar.Config(**{name: settings[name] for name in kept if name in settings})
    label = plain.method
    for name, value in row.items():
        if value != getattr(plain, name):
            label += f" {name}={value}"
    return label


def finished(config):
    """The evaluations of a run, if it is complete, else None. UserError if it was made with other
    settings."""
    if not Path(config.out, "config.json").exists():  # it was stopped before its first checkpoint
        return None
    try:
        old, lines = plots.read_run(config.out)
    except sdar.UserError as error:
        sdar.say(f"{error}; this run is done again")
        return None
    read = {*vars(config)} - {*sdar.MAY_DIFFER} | {"steps", "eval_every"}
    same = all(old.get(name) == getattr(config, name) for name in read)
    message = (
        f"{config.out} holds a run with other settings: choose another --out, or --overwrite it"
    )
    sdar.require(same or config.overwrite, message)
    if not same or len(lines) != config.steps or "eval_success" not in lines[-1]:
        return None
    return [line for line in lines if "eval_success" in line]


def evaluations(row):
    """{seed: evaluations} of the runs of a row that are complete."""
    found = {seed: finished(run) for seed, run in row.items()}
    return {seed: lines for seed, lines in found.items() if lines}


def launch(config):
    """Train from the first step, in a process of its own. Returns "" or what went wrong."""
    command = [sys.executable, str(sdar.HERE / "sdar.py"), "train"]
    settings = {**vars(config), "overwrite": True}  # what is left of a run that did not finish
    settings["anyway"] = True  # a hopeless setting is a row of the table, too
    for name, value in settings.items():
        flag = sdar.flag(name)
        if type(value) is bool:
            command.append(flag if value else flag.replace("--", "--no-"))
        else:
            command.append(f"{flag}={value}")
    place = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=place, capture_output=True, text=True, errors="replace")
    if done.returncode:
        return f"exit code {done.returncode}: {' '.join(done.stderr.split()[-20:])}"
    return ""


def learning_curves(row, start):
    """(runs, points, 2): steps and held-out success of a row's runs, from before training on."""
    curves = []
    for lines in row.values():
        points = [(0, start["success"])]
        points += [(line["step"], line["eval_success"]) for line in lines]
        curves.append(points)
    return np.array(curves)


def t_interval(gains):
    """[mean, low, high]: 95 % interval of Student's t.

    With t = sqrt(df) tan(x) the density of t is proportional to cos(x)^(df - 1)."""
    df = len(gains) - 1
    x = np.linspace(-np.pi / 2, np.pi / 2, 10**6 + 1)
    mass = (np.cos(x) ** (df - 1)).cumsum()
    quantile = math.sqrt(df) * math.tan(np.interp(0.975, mass / mass[-1], x))
    half = quantile * np.std(gains, ddof=1) / math.sqrt(len(gains))
    mean = np.mean(gains)
    return [mean, mean - half, mean + half]


def print_comparison(runs, done, start, reasons):
    """The table: a row a method, success by task type, mean and standard deviation over seeds, the
    teacher's success (the last weights, with the skill in the prompt), the gain over grpo seed by
    seed with its interval, and why runs failed."""
    kinds = sorted(start["by_type"])
    wide = max(11, *(len(kind) + 2 for kind in kinds))
    width = max(len("skill_prompt*"), *(len(label) + 1 for label in runs)) + 2
    heads = "".join(f"{kind:<{wide}}" for kind in [*kinds, "all"])
    print(
        "\n" + " " * width + heads + "(vanilla: before training; *: with the skill in the prompt)"
    )
    print_row("vanilla", [start["by_type"]], 1, width, wide)
    print_row("skill_prompt*", [start["by_type"]], 2, width, wide)

    success = {}
    for label, row in done.items():
        success[label] = {seed: lines[-1]["eval_success"] for seed, lines in row.items()}
    for label, row in runs.items():
        remarks = []
        base = success.get("grpo", {}) if label != "grpo" else {}
        gains = [won - base[seed] for seed, won in success[label].items() if seed in base]
        if gains:
            remarks.append(f"minus grpo {np.mean(gains):+.3f}")
        if len(gains) > 2:  # of two runs it would be wider than what is possible
            _, low, high = t_interval(gains)
            remarks[-1] += f" [{low:+.2f}, {high:+.2f}]"
        for seed, run in row.items():
            if seed not in success[label]:
                remarks.append(f"seed {seed} failed: {reasons[run.out]}")

        by_type = [lines[-1]["eval_by_type"] for lines in done[label].values()]
        if by_type:
            shares = [share(table, table, 2) for table in by_type]
            remarks.insert(0, f"teacher {np.mean(shares):.2f}")
        print_row(label, by_type, 1, width, wide, "  ".join(remarks))
        if sdar.METHODS[label.split()[0]].skilled:
            print_row(f"{label}*", by_type, 2, width, wide)


def print_row(title, tables, column, width, wide, remark=""):
    """A line of the table. tables: by_type of each run; column: 1 without, 2 with the skill. A
    single run's success is followed by n/N and its Wilson interval."""
    cells = ""
    if tables:
        kinds = sorted(tables[0])
        for chosen in [*([kind] for kind in kinds), kinds]:
            shares = [share(table, chosen, column) for table in tables]
            cell = f"{np.mean(shares):.2f}"
            if len(shares) > 1:
                cell += f"±{np.std(shares, ddof=1):.2f}"
            cells += f"{cell:<{wide}}"
    if len(tables) == 1:
        n = sum(counts[0] for counts in tables[0].values())
        won = sum(counts[column] for counts in tables[0].values())
        low, high = sdar.wilson(won, n)
        cells += f"{won}/{n} [{low:.2f}, {high:.2f}]  "
    print(f"{title:<{width}}{cells}{remark}".rstrip())


def share(table, kinds, column):
    """Success on some task types of a by_type table."""
    won = sum(table[kind][column] for kind in kinds)
    return won / sum(table[kind][0] for kind in kinds)


if __name__ == "__main__":
    sys.exit(sdar.main(["compare", *sys.argv[1:]]))
