"""Draw the curves of runs, as text and as a picture.

    python .lab/plots.py runs/toy-sdar-s0 runs/toy-grpo-s0
    python .lab/plots.py runs/compare/sdar-s* --picture curves.png

Runs whose folders differ in the seed alone (...-s0, ...-s1) are one curve: their mean, as far as
all of them have come, with a band of one standard deviation. A method has the same colour in every
picture.
"""

import glob
import json
import math
import os
import re
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sdar

PICTURES = (".svg", ".png", ".pdf")
FREE = {"seed", *sdar.MAY_DIFFER} - {"steps", "eval_every"}  # between runs of one curve
PANELS = (  # keys of metrics.jsonl
    "success eval_success kl eval_success_skill gap gate_active entropy gate loss grad_norm "
    "response_tokens"
).split()


def main(argv=None):
    """Draw the curves of runs, given by their folders."""
    parser = sdar.Parser(usage=__doc__)
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--picture", default="plot.svg", help=".svg, .png or .pdf [plot.svg]")
    given = parser.parse_args(argv)
    check_file("--picture", given.picture, PICTURES)

    panels = {}
    runs = sum([sorted(glob.glob(name)) or [name] for name in given.runs], [])  # as a shell does
    for label, logs in alike(runs).items():
        for name in PANELS:
            curve = points_of(name, logs)
            if curve.size:
                panels.setdefault(name, {})[label] = curve
    for title, curves in panels.items():
        print("\n" + title)
        print_curves(curves)
    try:
        picture(panels, given.picture)
        print(f"\n{given.picture}")
    except ImportError:
        print("no picture was drawn: it takes matplotlib (pip install matplotlib)")


def check_file(flag, path, kinds):
    """UserError if what a flag names could not be written when the work is done."""
    folder = Path(path).absolute().parent
    ends = " or ".join(kinds)
    fine = Path(path).suffix in kinds and os.access(folder, os.W_OK)
    sdar.require(fine, f"{flag} {path}: its name must end in {ends}, and its folder be there")


def read_run(folder):
    """(settings, lines of metrics) of a run's folder. UserError if there is no such run in it."""
    with sdar.naming(f"{folder} holds no run that can be read"):
        settings = json.loads(Path(folder, "config.json").read_text("utf-8"))
        log = Path(folder, "metrics.jsonl").read_text("utf-8")
        return settings, [json.loads(line) for line in log.splitlines()]


def alike(folders):
    """{label: logs of the runs that differ in the seed, or the machine, alone}; a log is a list of
    lines. The label is the folder without the seed, or with it where that name has other
    settings."""
    runs = {}
    known = {}
    for folder in folders:
        settings, lines = read_run(folder)
        settings = [settings[name] for name in settings if name not in FREE]
        label = re.sub(r"-s\d+[/\\]*$", "", folder)
        if known.setdefault(label, settings) != settings:
            label = folder
        runs.setdefault(label, []).append(lines)
    return runs


def points_of(name, logs):
    """(runs, points, 2) of steps and values, of the steps that all the runs have."""
    curves = [{line["step"]: line[name] for line in lines if name in line} for lines in logs]
    steps = [step for step in curves[0] if all(step in curve for curve in curves)]
    return np.array([[(step, curve[step]) for step in steps] for curve in curves])


def print_curves(curves):
    """A line of text a curve: bars, the first and the last mean, the label. The bars stand on 0, or
    on the lowest value below it, and at the same steps in all lines."""
    means = [curve.mean(0) for curve in curves.values()]
    steps, values = np.concatenate(means).T
    low = min(0, *values)
    high = max(1e-9, *values)
    steps = np.unique(steps)
    steps = steps[:: math.ceil(len(steps) / 14)]
    for (label, curve), mean in zip(curves.items(), means):
        heights = (np.interp(steps, *mean.T, low, low) - low) / (high - low)
        bars = "".join(" ▁▂▃▄▅▆▇█"[round(8 * height)] for height in heights)
        ends = "{:.4g}: {:z.3f}  {:.4g}: {:z.3f}".format(*mean[0], *mean[-1])
        print(f"{bars}  {ends}  {with_seeds(label, curve)}")


def with_seeds(label, curve):
    """A label, with the number of runs that its curve is the mean of."""
    return f"{label} ({len(curve)} seeds, ± sd)" if len(curve) > 1 else label


# --- The picture -------------------------------------------------------------------------

# The same curves give the same bytes: no random names, no date. A label is never a formula.
STYLE = {"font.size": 12, "svg.hashsalt": "sdar", "text.parse_math": False}
COLOURS = {  # of a method, in every picture; each is seen on white and on dark
    "sdar": "#2f81f7",
    "grpo": "#d9730d",
    "opsd": "#2a9d5c",
    "grpo_opsd": "#9a6dd7",
    "skill_grpo": "#a5714a",
    "skill_sd": "#d6498f",
    "rlsd": "#1a9aa8",
}


def looks_of(labels):
    """{label: how its line is drawn}: a method in its colour, a row of it ("sdar teacher=frozen")
    with wider dashes; what names no method in matplotlib's colours."""
    looks = {}
    drawn = Counter()
    for label in sorted(labels, key=len):  # the method itself is the shortest of its labels
        colour = f"C{len(looks)}"
        for word in re.findall(r"\w+", label):
            colour = COLOURS.get(word, colour)
        looks[label] = {"color": colour, "linestyle": (0, (6, 2 * drawn[colour]))}
        drawn[colour] += 1
    return looks


def picture(panels, path, dark=False):
    """Draw {title: {label: (runs, points, x and y)}}: means over runs, with bands of one standard
    deviation, and below them the legend, where it hides nothing. ImportError without
    matplotlib."""
    from matplotlib import style
    from matplotlib.figure import Figure

    labels = {}
    for curves in panels.values():
        labels |= curves
    looks = looks_of(labels)
    wide = min(3, len(panels))
    high = math.ceil(len(panels) / 3)
    lines = {}
    with style.context(["dark_background", STYLE] if dark else STYLE):
        size = (max(5.2, 4 * wide), 3.2 * high + 0.25 * len(looks) + 0.4)
        figure = Figure(size, layout="constrained")
        for place, (title, curves) in enumerate(panels.items(), 1):
            axes = figure.add_subplot(high, wide, place)
            axes.set_title(textwrap.fill(title, 46), fontsize="medium")
            for label, curve in curves.items():
                lines[with_seeds(label, curve)] = draw_curve(axes, curve, looks[label])
        figure.legend(lines.values(), lines, loc="outside lower center", fontsize="small")
        figure.savefig(path, metadata={"Date": None})


def draw_curve(axes, curve, look):
    """Draw the mean of runs, and with several the band around it. Returns the line."""
    x, mean = curve.mean(0).T
    (line,) = axes.plot(x, mean, marker="." * (len(x) == 1), **look)  # one point has no line
    if len(curve) > 1:
        sd = curve[..., 1].std(0, ddof=1)
        axes.fill_between(x, mean - sd, mean + sd, color=look["color"], alpha=0.1, linewidth=0)
    return line


if __name__ == "__main__":
    sys.exit(sdar.run(main))
