"""Train methods, or values of settings, over seeds, and compare them: a table and curves.

    python .lab/compare.py --methods grpo,sdar --seeds 0,1,2,3,4
    python .lab/compare.py --sweep gate_beta=1,5,20 --seeds 0,1
    python .lab/compare.py --sweep "teacher=live,frozen lr=3e-4,6e-4"
    python .lab/compare.py --sweep variant=none,divergence:forward --gate none

Every run is a process of its own, on one thread. Runs that are complete are read and not repeated,
so a comparison that was stopped goes on with the same command. All other flags go to every run.
What the table was made from is kept in compare*.json below --out.
"""

import itertools
import json
import os
import platform
import re
import subprocess
import sys
from collections import namedtuple
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm.contrib.concurrent import thread_map

LAB = Path(__file__).resolve().parent
sys.path[:0] = [str(LAB.parent), str(LAB / "experiments")]
import plots
import variants

import sdar

# A training run: its row of the table, its Config, and its words for experiments/variants.py.
Run = namedtuple("Run", "label config variant")


def make_parser():
    """sdar.py's flags, and those of a comparison."""
    parser = sdar.make_parser("python .lab/compare.py [flags]", description=__doc__)
    methods = ",".join(sdar.METHODS)
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument("--methods", default=methods, help=f"rows of the table [{methods}]")
    rows.add_argument("--sweep", default="", help="NAME=VALUE,... [more]: these and grpo are rows")
    parser.add_argument("--variant", action="append", help="of experiments/variants.py; repeatable")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="of each row [0,1,2,3,4]")
    parser.add_argument("--jobs", type=int, default=0, help="runs at once [0: one a core]")
    return parser


def main(argv):
    """Run all that is not there yet, and print the comparison. Returns 1 if a run failed."""
    given = vars(make_parser().parse_args(argv))
    jobs, sweep = given.pop("jobs"), given["sweep"]
    sdar.require(jobs >= 0, f"--jobs {jobs}: must be at least 1, or 0 for one a core")
    out = Path(given.pop("out", "runs/compare")).expanduser()
    runs = plan(given, out)
    for run in runs:  # what no process could use is refused now
        variants.hooks(run.variant)
        variants.check(run.variant, run.config)
    todo = [run for run in runs if not finished(run.config)]
    out.mkdir(parents=True, exist_ok=True)

    print(f"{len(runs)} runs in {out}, {len(todo)} of them to do")
    first = runs[0].config
    before = sdar.evaluate(*sdar.load_policy(first), sdar.make_envs(first), first)
    start = {"step": 0} | {f"eval_{name}": value for name, value in before.items()}
    torch.cuda.empty_cache()  # for the processes
    at_once = jobs or (1 if first.device == "cuda" else os.cpu_count())
    reasons = dict(thread_map(launch, todo, max_workers=at_once, unit="run"))

    report = make_report(runs, start, reasons)
    path = out / "-".join(["compare", *re.findall(r"(\S+)=", sweep)])
    Path(f"{path}.json").write_text(json.dumps(report) + "\n", "utf-8")
    print_table(report)
    title = "held-out success without the skill at training steps"
    plots.draw({title: learning_curves(report)}, f"{path}.svg")
    return int(any(row["failed"] for row in report["rows"].values()))


# --- The runs ----------------------------------------------------------------------------


def plan(given, out):
    """The Runs that the flags ask for, row after row."""
    methods, sweep, seeds = (given.pop(name) for name in ("methods", "sweep", "seeds"))
    goes_on = not {"seed", "resume"} & {*given}
    sdar.require(goes_on, "compare takes --seeds, and goes on without --resume")
    if "variant" in given:
        given["variant"] = "+".join(given["variant"])

    names = {f.name for f in fields(sdar.Config)} | {"variant"}
    names -= {"seed", "out", "resume", "overwrite", *given}
    choices = {"seed": seeds.split(",")}  # {setting: its values}
    for axis in (sweep or f"method={methods}").split():
        name, _, values = axis.partition("=")
        name = name.replace("-", "_")
        fine = name in names - {*choices}
        sdar.require(fine, f"{sdar.flag(name)} cannot be swept, or is there twice")
        choices[name] = values.split(",")
    for values in choices.values():
        sdar.require(len({*values}) == len(values), f"{','.join(values)}: one is there twice")

    seeds = choices.pop("seed")
    rows = [dict(zip(choices, row)) for row in itertools.product(*choices.values())]
    if sweep:  # what needs a teacher is refused without one: GRPO's row goes without it
        rows.insert(0, {"method": "grpo", "distil": "none", "retrieval": "keyword", "variant": ""})
    runs = [make_run(given, row, seed, out) for row in rows for seed in seeds]
    return [*{run.config.out: run for run in runs}.values()]  # GRPO's may be there twice


def make_run(given, row, seed, out):
    """The Run of a row and a seed. Its label says what in the row is no default of its method."""
    settings = given | row
    words = settings.pop("variant", "").split("+")
    variant = [word for word in words if word not in ("", "none")]
    config = sdar.configure(**settings, seed=seed)
    sdar.require(config.steps, "--steps 0: there is nothing to compare")

    kept = ("env", "model", "preset", "method")
    plain = sdar.configure(**{name: getattr(config, name) for name in kept})
    label = [config.method]
    for name in row:
        value = getattr(config, name, None)  # a variant is none of its fields
        if value != getattr(plain, name, None):
            label.append(f"{name}={value}")
    label = " ".join(label + variant)
    config.out = f"{out / re.sub('[^A-Za-z0-9_.=+-]', '-', label)}-s{config.seed}"
    return Run(label, config, variant)


def launch(run):
    """Train from the first step, in a process of its own. Returns the run's folder, and what went
    wrong."""
    command = [sys.executable, variants.__file__, *run.variant, "--", "--overwrite"]
    for name, value in vars(run.config).items():
        if value is True:
            command.append(sdar.flag(name))
        elif value is not False:
            command.append(f"{sdar.flag(name)}={value}")
    place = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=place, capture_output=True, text=True, errors="replace")
    reason = " ".join(done.stderr.split()[-20:])
    return run.config.out, f"exit code {done.returncode}: {reason}"


def finished(config):
    """The evaluations of a run that is complete; else an empty list. UserError if it was made with
    other settings."""
    try:
        old, lines = plots.read_run(config.out)
    except sdar.UserError:  # it has not begun, or was killed while it wrote: it is done again
        return []
    names = {*vars(config)} - {*sdar.MAY_DIFFER} | {"steps", "eval_every"}
    same = all(old.get(name) == getattr(config, name) for name in names)
    message = f"{config.out} holds a run of other settings: another --out, or --overwrite"
    sdar.require(same or config.overwrite, message)
    if not same or len(lines) < config.steps:
        return []
    return [line for line in lines if "eval_success" in line]


# --- The report --------------------------------------------------------------------------


def make_report(runs, start, reasons):
    """What compare.json keeps: the machine, and for each row its settings, its evaluations by seed
    (lines of the log), and why runs failed.

    start: the start policy's evaluation as such a line; reasons: {folder of a run: how it ended}.
    """
    rows = {}
    for run in runs:
        settings = vars(run.config) | {"variant": run.variant}
        seed, out = str(settings.pop("seed")), settings.pop("out")  # JSON's keys are strings
        row = rows.setdefault(run.label, {"settings": settings, "seeds": {}, "failed": {}})
        lines = finished(run.config)
        if lines:
            row["seeds"][seed] = lines
        else:
            row["failed"][seed] = reasons[out]

    packages = {name: version(name) for name in ("torch", "transformers", "numpy")}
    name = processor(runs[0].config.device)
    return {"processor": name, "versions": packages, "start": start, "rows": rows}


def processor(device):
    """The name of what computes: results depend on it, by rounding."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")  # of Linux, where Python has no name
    found = cpuinfo.exists() and re.search("model name.*: (.*)", cpuinfo.read_text())
    return found[1] if found else platform.processor()


def learning_curves(report):
    """{label: (runs, points, 2)}: steps and held-out success of a row's runs, from before training
    on."""
    curves = {}
    for label, row in report["rows"].items():
        for lines in row["seeds"].values():
            points = [(at["step"], at["eval_success"]) for at in [report["start"], *lines]]
            curves.setdefault(label, []).append(points)
    return {label: np.array(runs) for label, runs in curves.items()}


def t_interval(gains):
    """95 % interval of the mean, Student's t: (low, high).

    With t = sqrt(df) tan(x) the density of t is proportional to cos(x)^(df - 1)."""
    df = len(gains) - 1
    x = np.linspace(0, np.pi / 2, 10**6)
    mass = (np.cos(x) ** (df - 1)).cumsum()
    quantile = df**0.5 * np.tan(np.interp(0.95 * mass[-1], mass, x))
    half = quantile * np.std(gains, ddof=1) / len(gains) ** 0.5
    return np.mean(gains) - half, np.mean(gains) + half


def print_table(report):
    """Print a row a method: success by task type and of all, and what there is to remark."""
    start, rows = report["start"], report["rows"]
    kinds = sorted(start["eval_by_type"])
    ends = {}  # {label: {seed: the last evaluation}}
    for label, row in rows.items():
        ends[label] = {seed: lines[-1] for seed, lines in row["seeds"].items()}

    heads = ["", *kinds, "all", "(vanilla: before training; teacher: with the skill in the prompt)"]
    table = [heads, table_row("vanilla", {"": start}, kinds)]
    for label, row in rows.items():
        base = ends.get("grpo", {}) if label != "grpo" else {}
        cells = table_row(label, ends[label], kinds, base)
        for seed, reason in row["failed"].items():
            cells[-1] += f"  seed {seed} failed: {reason}"
        table.append(cells)
    widths = [max(map(len, column)) + 2 for column in zip(*table)]
    print()
    for cells in table:
        print("".join(f"{cell:<{width}}" for cell, width in zip(cells, widths)).rstrip())


def table_row(label, row, kinds, base=()):
    """Cells: success by task type and of all, mean and standard deviation over seeds, or n/N and
    its Wilson interval for one seed; the teacher's; the gain over grpo, seed by seed, with its
    interval. row, base: {seed: the last evaluation}."""
    if not row:
        return [label, *[""] * (len(kinds) + 2)]
    counts = [[end["eval_by_type"][kind] for kind in kinds] for end in row.values()]
    counts = np.append(counts, np.sum(counts, 1, keepdims=True), 1)  # (runs, types and all, 3)
    alone, skilled = np.moveaxis(counts[..., 1:] / counts[..., :1], 2, 0)
    cells = [f"{mean:.2f}" for mean in alone.mean(0)]
    if len(row) > 1:
        cells = [f"{cell}±{sd:.2f}" for cell, sd in zip(cells, alone.std(0, ddof=1))]
    else:
        n, won, _ = counts[0, -1]
        low, high = sdar.wilson(won, n)
        cells[-1] += f"  {won}/{n} [{low:.2f}, {high:.2f}]"

    remark = f"teacher {skilled[:, -1].mean():.2f}"
    gains = [row[seed]["eval_success"] - base[seed]["eval_success"] for seed in row if seed in base]
    if gains:
        remark += f"  minus grpo {np.mean(gains):+.3f}"
    if len(gains) > 2:  # of two runs it would be wider than what is possible
        remark += " [{:+.2f}, {:+.2f}]".format(*t_interval(gains))
    return [label, *cells, remark]


if __name__ == "__main__":
    sys.exit(sdar.run(lambda: main(sys.argv[1:])))
