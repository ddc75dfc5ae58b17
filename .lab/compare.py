"""Train methods, or values of settings, over seeds, and compare them: a table and curves.

    python .lab/compare.py --methods grpo,sdar --seeds 0,1,2,3,4
    python .lab/compare.py --sweep gate_beta=1,5,20 --seeds 0,1
    python .lab/compare.py --sweep "teacher=live,frozen lr=3e-4,6e-4"
    python .lab/compare.py --sweep variant=none,divergence:forward --gate none

Every run is a process of its own, on one thread. Runs that are complete are read and not repeated,
so a comparison that was stopped goes on with the same command. All other flags go to every run.
What the table was made from is kept in compare*.json below --out: experiments/results.py joins such
files, prints them as tables of a page, and draws them.
"""

import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import namedtuple
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

FREE = {"seed", *sdar.MAY_DIFFER} - {"steps", "eval_every"}  # between runs of a row

# A training run: its row of the table, its Config, and its words for experiments/variants.py.
Run = namedtuple("Run", "label config variant")


def make_parser():
    """sdar.py's flags, and those of a comparison."""
    parser = sdar.make_parser("python .lab/compare.py [flags]", description=__doc__)
    methods = ",".join(sdar.METHODS)
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument("--methods", default=methods, help=f"rows of the table [{methods}]")
    rows.add_argument("--sweep", default="", help="NAME=VALUE,... [more]: these and grpo are rows")
    parser.add_argument("--variant", help="of experiments/variants.py; of several with + between")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="of each row [0,1,2,3,4]")
    parser.add_argument("--jobs", type=int, default=0, help="runs at once [0: one a core]")
    return parser


def main(argv):
    """Run all that is not there yet, and print the comparison. Returns 1 if a run failed, 130 after
    Ctrl-C."""
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

    config = runs[0].config
    torch.set_num_threads(1)  # as in the processes
    policy, envs = sdar.load_policy(config), sdar.make_envs(config)
    clock = time.perf_counter()
    before = sdar.evaluate(*policy, envs, config)
    sdar.say_success("before training", before)
    del policy  # its memory is for the processes
    torch.cuda.empty_cache()
    at_once = jobs or (os.cpu_count() if config.device == "cpu" else 1)
    looks = 2 + config.steps // (config.eval_every or config.steps)
    played = config.steps * config.tasks_per_step * config.group_size / before["episodes"]
    seconds = (looks + played) * (time.perf_counter() - clock)  # as long to learn as to play
    minutes = seconds * math.ceil(len(todo) / at_once) / 60
    print(f"{len(runs)} runs in {out}, {len(todo)} of them to do: some {minutes:.0f} minutes")
    reasons, code = [], 0
    try:
        reasons = thread_map(launch, todo, max_workers=at_once, unit="run")
    except KeyboardInterrupt:  # the processes get it, too
        print("compare.py: stopped; the same command goes on with what is left", file=sys.stderr)
        code = 130

    command = re.sub(r" --(out|jobs)[= ]\S+", "", shlex.join(["compare.py", *argv]))
    rows = make_rows(runs, before["by_type"], command)
    path = out / "-".join(["compare", *re.findall(r"(\S+)=", sweep)])
    Path(f"{path}.json").write_text(as_json(rows), "utf-8")
    steps = f"{config.steps} steps"
    print("\n" + tables(rows, [*before["by_type"], steps, f"{steps} with the skill"]))
    for run, reason in zip(todo, reasons):
        if not finished(run.config):
            print(f"{run.config.out} failed: {reason}")
            code = 1
    if rows:
        title = "held-out success without the skill at training steps"
        plots.draw({title: learning_curves(rows)}, f"{path}.svg")
    return code


# --- The runs ----------------------------------------------------------------------------


def plan(given, out):
    """The Runs that the flags ask for, row after row."""
    methods, sweep, seeds = (given.pop(name) for name in ("methods", "sweep", "seeds"))
    goes_on = not {"seed", "resume"} & {*given}
    sdar.require(goes_on, "compare takes --seeds, and goes on without --resume")
    names = {"variant", *vars(sdar.Config())} - {"out", "resume", "overwrite", *given}
    choices = {}  # {setting: its values}
    for axis in (sweep or f"method={methods}").split() + [f"seed={seeds}"]:
        name, _, values = axis.partition("=")
        name = name.replace("-", "_")
        fine = name in names - {*choices}
        sdar.require(fine, f"{sdar.flag(name)} cannot be swept, or is there twice")
        choices[name] = values.split(",")
        once = len({*choices[name]}) == len(choices[name])
        sdar.require(once, f"{values}: one is there twice")

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
    """Train from the first step, in a process of its own. Returns how that ended. A file `made`
    beside those of the run says what made it."""
    command = [sys.executable, variants.__file__, *run.variant, "--"]
    for name, value in vars(run.config).items():
        typed = f"{sdar.flag(name)}={value}"
        if isinstance(value, bool):  # what a preset has turned on may be off here
            typed = sdar.flag(name) if value else sdar.flag(f"no_{name}")
        command.append(typed)
    command.append("--overwrite")
    place, made = os.environ | {"OMP_NUM_THREADS": "1"}, origin(run.config.device)
    done = subprocess.run(command, env=place, capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        Path(run.config.out, "made").write_text(made, "utf-8")
    reason = " ".join(done.stderr.split()[-20:])
    return f"exit code {done.returncode}: {reason}"


def origin(device):
    """What results depend on beside the settings: the code, and by rounding processor and
    libraries. A line of text."""
    git = ["git", "-C", str(LAB), "describe", "--always", "--dirty"]
    commit = "unknown"  # no git, or no repository
    if shutil.which("git"):
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or commit
    packages = [f"{name} {version(name)}" for name in ("torch", "transformers", "numpy")]
    return ", ".join([f"commit {commit}", processor(device), *packages])


def processor(device):
    """The name of what computes."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")  # of Linux, where Python has no name
    found = cpuinfo.exists() and re.search("model name.*: (.*)", cpuinfo.read_text())
    return found[1] if found else platform.processor()


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


# --- Results as data: a list of rows, each with all that it was made with ----------------


def make_rows(runs, before, command):
    """The rows of the runs that are finished, as compare.json keeps them. An evaluation is a list
    of counts, for each task type [games, won alone, won with the skill].

    before: the start policy's, {type: counts}. It stands in every run as step 0."""
    rows = []
    for run in runs:
        looks = {"0": [*before.values()]}  # JSON's keys are strings
        for line in finished(run.config):
            looks[str(line["step"])] = [line["eval_by_type"][kind] for kind in before]
        settings = vars(run.config) | {"variant": run.variant}
        for name in FREE:
            del settings[name]
        made = Path(run.config.out, "made")
        row = {"label": run.label, "made": "unknown", "command": command, "settings": settings}
        if made.exists():
            row["made"] = made.read_text("utf-8")
        if len(looks) > 1:
            rows.append(row | {"types": [*before], "runs": {str(run.config.seed): looks}})
    return join(rows)


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


def success(row, column):
    """The share of games that each run of a row has won, (runs,), and their number. A column is a
    task type, at the end, or has the number of a step: "60 steps", "60 with the skill"."""
    named = "" if column in row["types"] else column
    step = re.search(r"\d+", named or str(row["settings"]["steps"]))[0]
    counts = np.array([looks[step] for looks in row["runs"].values()])  # (runs, types, 3)
    if column in row["types"]:
        counts = counts[:, [row["types"].index(column)]]
    games, *won = counts.sum(1).T
    return won["skill" in column] / games, games[0]


def learning_curves(rows):
    """{label: (runs, points, 2)}: steps and held-out success of a row's runs, from before training
    on."""
    curves = {}
    for row in rows:
        (steps, *_) = row["runs"].values()
        points = [[(int(step), share) for share in success(row, step)[0]] for step in steps]
        curves.setdefault(row["label"], []).extend(np.swapaxes(points, 0, 1))
    return {label: np.array(runs) for label, runs in curves.items()}


# --- The table ---------------------------------------------------------------------------


def tables(rows, columns):
    """Markdown, a table for the rows of each origin: success, mean ± standard deviation over seeds,
    or of one run with Wilson's interval, and what a row has over grpo, seed by seed."""
    text = ""
    for made in dict.fromkeys(row["made"] for row in rows):
        cells = [["", "runs", *columns, "minus grpo, 95 %"]]
        for row in rows:
            if row["made"] == made:
                texts = [cell(*success(row, column)) for column in columns]
                gain = interval(gains_over("grpo", row, rows))
                cells.append([row["label"], str(len(row["runs"])), *texts, gain])
        text += f"{markdown(cells)}\n{made}\n"
    return text


def cell(shares, games):
    """Successes of runs as a text."""
    if len(shares) > 1:
        return f"{shares.mean():.2f} ± {shares.std(ddof=1):.2f}"
    return "{:.2f} [{:.2f}, {:.2f}]".format(*shares, *sdar.wilson(shares[0] * games, games))


def markdown(cells):
    """A table, its head first."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    return "".join(f"| {' | '.join(map(str.ljust, row, widths))} |\n" for row in cells)


def gains_over(label, row, rows, column=""):
    """What a row's runs win more than those of another row of the same origin, seed by seed."""
    for other in rows:
        if (other["label"], other["made"]) == (label, row["made"]) and other is not row:
            theirs = dict(zip(other["runs"], success(other, column)[0]))
            ours = dict(zip(row["runs"], success(row, column)[0]))
            return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return []


def interval(gains):
    """Their mean with t_interval, if there are more than two: of two it would be wider than what is
    possible."""
    if len(gains) > 2:
        return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*t_interval(gains))
    return f"{np.mean(gains):+.2f}" if gains else ""


def t_interval(gains):
    """The mean, and low and high end of its 95 % interval, Student's t.

    With t = sqrt(df) tan(x) the density of t is proportional to cos(x)^(df - 1)."""
    df = len(gains) - 1
    x = np.linspace(0, np.pi / 2, 10**6)
    mass = (np.cos(x) ** (df - 1)).cumsum()
    quantile = df**0.5 * np.tan(np.interp(0.95 * mass[-1], mass, x))
    half = quantile * np.std(gains, ddof=1) / len(gains) ** 0.5
    mean = np.mean(gains)
    return mean, mean - half, mean + half


if __name__ == "__main__":
    sys.exit(sdar.run(lambda: main(sys.argv[1:])))
