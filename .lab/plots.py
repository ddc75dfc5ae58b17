"""Curves of runs, as text and as a picture: python sdar.py plot RUN ... [--picture FILE]

Runs that differ in nothing but the seed are one curve, with a band of one standard deviation.
"""

import json
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sdar

OWN = (
    ("runs", {"nargs": "*", "help": "folders of runs"}),
    ("--picture", {"help": "file of the picture, .svg, .png or .pdf [plot.svg]"}),
)
TITLES = {  # {key of a line of metrics.jsonl: title of its panel}
    "success": "success in training",
    "eval_success": "held-out success without the skill",
    "kl": "KL",
    "eval_success_skill": "held-out success with the skill (the teacher)",
    "gap_mean": "mean gap, nats",
    "gate_active": "share of active gates",
    "entropy": "entropy, nats",
    "gate_mean": "mean gate",
    "loss": "loss",
    "grad_norm": "norm of the gradient",
    "response_tokens": "sampled tokens an episode",
}


def read_run(folder):
    """(settings, lines of metrics) of a run's folder. UserError if there is no such run in it, and
    for a line that is no step: step 1, 2, ... of numbers, or of nothing where they were not finite,
    and of counts by task type."""
    log = Path(folder, "metrics.jsonl")
    with sdar.naming(f"{folder} holds no run that can be read", sdar.UserError):
        settings = json.loads(Path(folder, "config.json").read_text("utf-8"))
        sdar.require(type(settings) is dict, "config.json holds no settings")
        texts = log.read_text("utf-8").removesuffix("\n")

    rows = []
    for number, text in enumerate(texts.split("\n") if texts else [], 1):
        with sdar.naming(f"{log}, line {number} is no step of a run", sdar.UserError):
            row = json.loads(text)
            sdar.require(row["step"] == number, f"its step is {row['step']}")
            for name, value in row.items():
                check_value(name, value)
            sdar.require("eval_success" not in row or row["eval_by_type"], "no eval_by_type")
            rows.append(row)
    return settings, rows


def check_value(name, value):
    """UserError for a value of a line that is not of its kind."""
    if name == "eval_by_type":
        for episodes, *won in value.values():
            fine = len(won) == 2 and 0 <= min(won) <= max(won) <= episodes > 0
            sdar.require(fine, f"{name} is no table of counts")
    elif value is not None:
        fine = type(value) is float or (type(value) is int and abs(value) < 2**53)
        sdar.require(fine, f"{name} is {value!r:.50}")


def main(argv):
    """Draw the curves of runs, given by their folders."""
    no_setting = [field.name for field in sdar.fields(sdar.Config)]
    typed = sdar.parse_flags("plot", __doc__, argv, OWN, no_setting)
    picture = typed.get("picture", "plot.svg")
    check_file("--picture", picture, (".svg", ".png", ".pdf"))
    groups = alike(typed.pop("runs", []))
    panels = {}
    for name, title in TITLES.items():
        for label, logs in groups.items():
            curve = points_of(name, logs)
            if curve is not None:
                panels.setdefault(title, {})[label] = curve
    example = "python sdar.py plot runs/toy-sdar-s0"
    sdar.require(panels, f"plot takes folders of runs that have finished a step: {example}")
    draw(panels, picture)


def check_file(flag, path, kinds):
    """UserError if what a flag names could not be written when the work is done."""
    path = Path(path)
    sdar.require(path.suffix in kinds, f"{flag} {path}: its name must end in {' or '.join(kinds)}")
    folder = path.absolute().parent
    writable = folder.is_dir() and os.access(folder, os.W_OK) and not path.is_dir()
    sdar.require(writable, f"{flag} {path}: no file can be written there")


def alike(folders):
    """{label: logs of the runs that differ in nothing but the seed}; a log is a list of lines."""
    free = {*sdar.MAY_DIFFER, "seed"}
    groups, labels = {}, {}
    for folder in folders:
        settings, lines = read_run(folder)
        fixed = {name: value for name, value in settings.items() if name not in free}
        label = re.sub(r"-s\d+$", "", folder)
        key = (label, str(fixed))
        if label in labels.values() and key not in labels:  # same name, other settings
            label = folder
        labels.setdefault(key, label)
        groups.setdefault(labels[key], []).append(lines)
    return groups


def points_of(name, logs):
    """(runs, points, 2) of steps and values, as long as the shortest run; None without points."""
    curves = []
    for lines in logs:
        filled = [line for line in lines if line.get(name) is not None and np.isfinite(line[name])]
        curves.append([(line["step"], line[name]) for line in filled])
    points = min(map(len, curves))
    if not points:
        return None
    return np.array([curve[:points] for curve in curves])


def draw(panels, path):
    """Means over runs of {title: {label: (runs, points, x and y)}}, as text and, with bands of one
    standard deviation, as a picture."""
    for title, curves in panels.items():
        print("\n" + title)
        print_curves(curves, "success" in title or "share" in title)
    try:
        picture(panels, path)
    except ImportError:
        print("no picture was drawn: it takes matplotlib (pip install matplotlib)")
    else:
        print(f"\n{path}")


DARK = {  # matplotlib's settings for a picture on a dark page
    "figure.facecolor": "#0d1117",
    "axes.facecolor": "#0d1117",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), "#e6edf3"),
    **dict.fromkeys(("xtick.color", "ytick.color", "legend.labelcolor"), "#e6edf3"),
}


def picture(panels, path, dark=False, bands=True):
    """Write the picture of draw; of many curves sdar and grpo are strong. ImportError without
    matplotlib."""
    wide = min(len(panels), 3)
    high = -(-len(panels) // 3)
    with figure(path, dark, (max(6.4, 4 * wide), max(4, 3 * high))) as drawn:
        places = drawn.subplots(high, wide, squeeze=False).flat
        for (title, curves), axes in zip(panels.items(), places):
            draw_panel(axes, title, curves, bands)
        for axes in places:  # of a last row that is not full
            axes.remove()


@contextmanager
def figure(path, dark, size):
    """A matplotlib figure, size (width, height) in inches, that is written to `path` at the end."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    fresh = Path(path).with_name(f"new-{Path(path).name}")  # what is there is kept until then
    with rc_context({"font.size": 12, "svg.hashsalt": "sdar", **(DARK if dark else {})}):
        drawn = Figure(figsize=size, layout="constrained")
        yield drawn
        date = {"Date": None} if Path(path).suffix == ".svg" else {}
        drawn.savefig(fresh, metadata=date)
    fresh.replace(path)


def draw_panel(axes, title, curves, bands):
    """One panel: a curve a label, with its axes named."""
    for label, curve in curves.items():
        x, mean = curve.mean(0).T
        sd = curve[..., 1].std(0, ddof=min(1, len(curve) - 1))
        strong = len(curves) < 4 or label.split("/")[-1] in ("sdar", "grpo")
        axes.plot(x, mean, label=label, linewidth=2.4 if strong else 1.0)
        if strong and bands:
            axes.fill_between(x, mean - sd, mean + sd, alpha=0.2, linewidth=0)
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("gap, nats" if "over its gap" in title else "training step")
    if "success" in title or "share" in title:
        axes.set_ylim(-0.02, 1.02)
    axes.legend(fontsize="small")


def print_curves(curves, is_share):
    """A line of text a curve: bars, then the mean at up to seven points."""
    low, high = 0, 1
    if not is_share:
        means = [y for curve in curves.values() for y in curve.mean(0)[:, 1]]
        low, high = min(means), max(means) + 1e-9
    for label, curve in curves.items():
        points = curve.shape[1]
        chosen = np.linspace(0, points - 1, min(points, 7)).astype(int)
        bars, numbers = "", ""
        for x, y in curve.mean(0)[chosen]:
            bars += "▁▂▃▄▅▆▇█"[min(7, int(8 * (y - low) / (high - low)))]
            numbers += f"  {x:.4g}: {y:z.3f}"
        print(f"{bars}{numbers}  {label}")


if __name__ == "__main__":
    sys.exit(sdar.main(["plot", *sys.argv[1:]]))
