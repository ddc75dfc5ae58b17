"""Draw the curves of runs, as text and as a picture.

    python .lab/plots.py runs/toy-sdar-s0 runs/toy-grpo-s0
    python .lab/plots.py runs/compare/sdar-s* --picture curves.png

Runs whose folders differ in the seed alone (...-s0, ...-s1) are one curve: their mean, as far as
all of them have come, with a band of one standard deviation. A method has the same colour in every
picture.
"""

import argparse
import itertools
import json
import math
import os
import re
import sys
import textwrap
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sdar

PICTURES = (".svg", ".png", ".pdf")
FREE = {"seed", *sdar.MAY_DIFFER} - {"steps", "eval_every"}  # between runs of one curve
TITLES = {  # {key of a line of metrics.jsonl: title of its panel}
    "success": "success in training",
    "eval_success": "held-out success without the skill",
    "kl": "KL",
    "eval_success_skill": "held-out success with the skill (the teacher)",
    "gap": "mean gap, nats",
    "gate_active": "share of active gates",
    "entropy": "entropy, nats",
    "gate": "mean gate",
    "loss": "loss",
    "grad_norm": "norm of the gradient",
    "response_tokens": "sampled tokens an episode",
}


def main(argv):
    """Draw the curves of runs, given by their folders."""
    parser = sdar.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--picture", default="plot.svg", help=".svg, .png or .pdf [plot.svg]")
    given = parser.parse_args(argv)
    check_file("--picture", given.picture, PICTURES)

    runs = alike(given.runs)
    panels = {}
    for name, title in TITLES.items():
        for label, logs in runs.items():
            curve = points_of(name, logs)
            if curve.size:
                panels.setdefault(title, {})[label] = curve
    sdar.require(panels, f"{' '.join(given.runs)}: no run there has finished a step")
    draw(panels, given.picture)


def check_file(flag, path, kinds):
    """UserError if what a flag names could not be written when the work is done."""
    folder = Path(path).absolute().parent
    ends = " or ".join(kinds)
    fine = Path(path).suffix in kinds and os.access(folder, os.W_OK)
    sdar.require(fine, f"{flag} {path}: its name must end in {ends}, and its folder be there")


def read_run(folder):
    """(settings, lines of metrics) of a run's folder. UserError if there is no such run in it."""
    with sdar.naming(f"{folder} holds no run that can be read", sdar.UserError):
        settings = json.loads(Path(folder, "config.json").read_text("utf-8"))
        log = Path(folder, "metrics.jsonl").read_text("utf-8")
        return settings, [json.loads(line) for line in log.splitlines()]


def alike(folders):
    """{label: logs of the runs that differ in nothing but the seed}; a log is a list of lines. The
    label is the folder without the seed, or with it where that name has other settings."""
    runs = {}
    known = {}
    for folder in folders:
        settings, lines = read_run(folder)
        settings = [settings[name] for name in settings if name not in FREE]
        label = re.sub(r"-s\d+/*$", "", folder)
        if known.setdefault(label, settings) != settings:
            label = folder
        if lines:
            runs.setdefault(label, []).append(lines)
    return runs


def points_of(name, logs):
    """(runs, points, 2) of steps and values, as far as all the runs have come."""
    curves = []
    for lines in logs:
        curves.append([(line["step"], line[name]) for line in lines if name in line])
    shortest = min(map(len, curves))
    return np.array([curve[:shortest] for curve in curves])


def draw(panels, path):
    """Means over runs of {title: {label: (runs, points, x and y)}}, as text and, with bands of one
    standard deviation, as a picture."""
    for title, curves in panels.items():
        print("\n" + title)
        print_curves(title, curves)
    try:
        picture(panels, path)
        print(f"\n{path}")
    except ImportError:
        print("no picture was drawn: it takes matplotlib (pip install matplotlib)")


def with_seeds(curves):
    """The labels of curves, with the number of runs that each is the mean of."""
    labels = []
    for label, curve in curves.items():
        labels.append(f"{label} ({len(curve)} seeds)" if len(curve) > 1 else label)
    return labels


def is_share(title):
    """True if the values of a panel go from 0 to 1."""
    return "success" in title or "share" in title


def print_curves(title, curves):
    """A line of text a curve: bars, the first and the last mean, the label. The bars stand at the
    same steps in all lines; where a curve has none, there is a blank."""
    means = [curve.mean(0) for curve in curves.values()]
    steps, values = np.concatenate(means).T
    low, high = (0, 1) if is_share(title) else (values.min(), values.max() + 1e-9)
    steps = np.unique(steps)
    steps = steps[:: math.ceil(len(steps) / 14)]
    for label, mean in zip(with_seeds(curves), means):
        levels = {step: int(8 * (value - low) / (high - low)) for step, value in mean}
        bars = "".join("▁▂▃▄▅▆▇██ "[levels.get(step, -1)] for step in steps)
        print("{}  {:.4g}: {:z.3f}  {:.4g}: {:z.3f}  {}".format(bars, *mean[0], *mean[-1], label))


# --- The picture -------------------------------------------------------------------------

# The same curves give the same bytes: no random names, no date. A label is never a formula.
LIGHT = {"font.size": 12, "svg.hashsalt": "sdar", "text.parse_math": False}
PAPER = dict.fromkeys(("figure.facecolor", "axes.facecolor"), "#0d1117")
INKS = "text.color axes.labelcolor axes.edgecolor xtick.color ytick.color legend.labelcolor"
DARK = LIGHT | PAPER | dict.fromkeys(INKS.split(), "#e6edf3")
COLOURS = {  # of a method, in every picture; each is seen on white and on dark
    "sdar": ["#2f81f7"],
    "grpo": ["#d9730d"],
    "opsd": ["#2a9d5c"],
    "grpo_opsd": ["#9a6dd7"],
    "skill_grpo": ["#a5714a"],
    "skill_sd": ["#d6498f"],
    "rlsd": ["#1a9aa8"],
    "": ["#808a94", "#c9503d", "#6d8a1d", "#6a72dd", "#b08800"],  # of what names no method
}


def looks_of(labels):
    """{label: how its line is drawn}: a method in its colour, a row of it ("sdar teacher=frozen")
    with dashes of its own, then paler."""
    free = {}
    looks = {}
    for name, colours in COLOURS.items():
        rows = itertools.product((1, 0.6, 0.4), ("-", "--", ":", "-."), colours)
        free[name] = itertools.cycle(rows)
    for label in sorted(labels, key=len):  # the method itself is the shortest of its labels
        named = re.findall(rf"\b({'|'.join(COLOURS)})\b", label)  # also finds nothing, ""
        alpha, dashes, colour = next(free[max(named, key=len, default="")])
        looks[label] = {"alpha": alpha, "linestyle": dashes, "color": colour}
    return looks


def picture(panels, path, dark=False):
    """Write the picture of draw. The legend is below the panels, where it hides nothing.
    ImportError without matplotlib."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    looks = looks_of(dict.fromkeys(itertools.chain(*panels.values())))
    wide = min(3, len(panels))
    high = math.ceil(len(panels) / 3)
    size = (max(5.2, 4 * wide), 3.2 * high + 0.25 * len(looks) + 0.4)
    lines = {}
    with rc_context(DARK if dark else LIGHT):
        figure = Figure(figsize=size, layout="constrained")
        for place, (title, curves) in enumerate(panels.items(), 1):
            axes = figure.add_subplot(high, wide, place)
            draw_panel(axes, title, curves, looks)
            lines |= zip(with_seeds(curves), axes.lines)
        place = {"loc": "outside lower center", "fontsize": "small", "frameon": False}
        legend = figure.legend(lines.values(), lines, **place)
        if "seeds)" in str(lines):
            legend.set_title("mean over seeds, band: ± 1 sd")
        figure.savefig(path, metadata={"Date": None})


def draw_panel(axes, title, curves, looks):
    """One panel: a curve a label, with its axes named. Of many curves only sdar and grpo have a
    band, in their colour."""
    for label, curve in curves.items():
        x, mean = curve.mean(0).T
        axes.plot(x, mean, linewidth=2, **looks[label])
        if len(curve) > 1 and (len(looks) < 4 or label in ("sdar", "grpo")):
            sd = curve[..., 1].std(0, ddof=1)
            colour = looks[label]["color"]
            axes.fill_between(x, mean - sd, mean + sd, color=colour, alpha=0.2, linewidth=0)
    axes.set_title(textwrap.fill(title, 46), fontsize="medium")
    axes.set_xlabel("training step" if x.min() >= 0 else "gap, nats")
    if is_share(title):
        axes.set_ylim(-0.02, 1.02)


if __name__ == "__main__":
    sys.exit(sdar.run(partial(main, sys.argv[1:])))
