"""Draw the curves of runs, as text and as a picture.

    python .lab/plots.py runs/toy-sdar-s0 runs/toy-grpo-s0
    python .lab/plots.py runs/compare/sdar-s* --picture curves.png

Runs that differ in nothing but the seed are one curve: their mean at the steps that all of them
have, with a band of one standard deviation. A method has the same colour in every picture.
"""

import argparse
import json
import os
import re
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sdar

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
    check_file("--picture", given.picture, (".svg", ".png", ".pdf"))

    groups, panels = alike(given.runs), {}
    for name, title in TITLES.items():
        for label, logs in groups.items():
            curve = points_of(name, logs)
            if curve.size:
                panels.setdefault(title, {})[label] = curve
    sdar.require(panels, f"{', '.join(given.runs)}: no run there has finished a step")
    draw(panels, given.picture)


def check_file(flag, path, kinds):
    """UserError if what a flag names could not be written when the work is done."""
    path = Path(path)
    sdar.require(path.suffix in kinds, f"{flag} {path}: its name must end in {' or '.join(kinds)}")
    folder = path.absolute().parent
    writable = os.access(folder, os.W_OK) and not path.is_dir()
    sdar.require(writable, f"{flag} {path}: no file can be written there")


def read_run(folder):
    """(settings, lines of metrics) of a run's folder. UserError if there is no such run in it, and
    for a line that is no step: step 1, 2, ... of numbers, and of counts by task type."""
    with sdar.naming(f"{folder} holds no run that can be read", sdar.UserError):
        settings = dict(json.loads(Path(folder, "config.json").read_text("utf-8")))
        log = Path(folder, "metrics.jsonl").read_text("utf-8")
        rows = [json.loads(text) for text in log.splitlines()]
        for number, row in enumerate(rows, 1):
            check_line(number, **row)
    return settings, rows


def check_line(number, step, eval_by_type=(), **numbers):
    """UserError for a line of the log that is not what sdar.py writes in this place."""
    sdar.require(step == number, f"line {number} is of step {step}")
    for name, value in numbers.items():
        sdar.require(type(value) in (int, float), f"line {number}: {name} is {value!r:.50}")
    for episodes, *won in dict(eval_by_type).values():
        fine = len(won) == 2 and 0 <= min(won) <= max(won) <= episodes > 0
        sdar.require(fine, f"line {number}: eval_by_type is no table of counts")
    whole = eval_by_type or "eval_success" not in numbers
    sdar.require(whole, f"line {number} has no eval_by_type")


def alike(folders):
    """{label: logs of the runs that differ in nothing but the seed}; a log is a list of lines. The
    label is the folder's name without the seed; its whole path, where another has that name."""
    free = {*sdar.MAY_DIFFER, "seed"}
    groups = {}  # {(path without the seed, settings): {folder: log}}
    for folder in map(str, map(Path, folders)):
        settings, lines = read_run(folder)
        fixed = {name: value for name, value in settings.items() if name not in free}
        if lines:
            groups.setdefault((re.sub(r"-s\d+$", "", folder), str(fixed)), {})[folder] = lines

    names, labelled = [Path(path).name for path, _ in groups], {}
    for name, logs in zip(names, groups.values()):
        label = name if names.count(name) == 1 else [*logs][0]
        labelled[label] = [*logs.values()]
    return labelled


def points_of(name, logs):
    """(runs, points, 2) of steps and values, at the steps that all the runs have."""
    curves = []
    for lines in logs:
        filled = [line for line in lines if np.isfinite(line.get(name, np.nan))]
        curves.append({line["step"]: line[name] for line in filled})
    steps = sorted(set.intersection(*map(set, curves)))
    return np.array([[(step, curve[step]) for step in steps] for curve in curves])


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


def is_share(title):
    """True if the values of a panel go from 0 to 1."""
    return "success" in title or "share" in title


def is_function(title):
    """True if a panel has functions of the gap, and no runs."""
    return "over its gap" in title


def with_seeds(title, curves):
    """The labels of a panel, with the number of seeds that each is the mean of."""
    if is_function(title):
        return [*curves]
    names = []
    for label, curve in curves.items():
        seeds = f"{len(curve)} seeds" if len(curve) > 1 else "one seed"
        names.append(f"{label} ({seeds})")
    return names


def print_curves(title, curves):
    """A line of text a curve: bars, the mean at up to four steps, the label. The steps are the same
    in all lines: where a curve has none, its bar is a blank and its number a dash."""
    means = [dict(curve.mean(0).tolist()) for curve in curves.values()]
    steps = np.unique([x for mean in means for x in mean])
    values = [y for mean in means for y in mean.values()]
    low, high = (0, 1) if is_share(title) else (min(values), max(values) + 1e-9)
    for label, mean in zip(with_seeds(title, curves), means):
        line = ""
        for x in spread(steps, 14):
            height = (mean.get(x, low) - low) / (high - low)
            level = min(7, int(8 * height))
            line += "▁▂▃▄▅▆▇█"[level] if x in mean else " "
        for x in spread(steps, 4):
            number = f"{mean[x]:z.3f}" if x in mean else "-"
            line += f"  {x:.4g}: {number:>5}"
        print(f"{line}  {label}")


def spread(steps, most):
    """At most so many of the steps, from the first to the last."""
    places = np.linspace(0, len(steps) - 1, min(most, len(steps)))
    return steps[places.astype(int)]


# --- The picture -------------------------------------------------------------------------

DARK = {  # matplotlib's settings for a picture on a dark page
    "figure.facecolor": "#0d1117",
    "axes.facecolor": "#0d1117",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), "#e6edf3"),
    **dict.fromkeys(("xtick.color", "ytick.color", "legend.labelcolor"), "#e6edf3"),
}
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
DASHES = ("solid", "dashed", "dotted", "dashdot")


@contextmanager
def figure(path, dark, size):
    """A matplotlib figure, size (width, height) in inches, that is written to `path` at the end.
    ImportError without matplotlib."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # The same curves give the same bytes: no date, no random names. A label is never a formula.
    plain = {"font.size": 12, "svg.hashsalt": "sdar", "text.parse_math": False}
    with rc_context(plain | (DARK if dark else {})):
        drawn = Figure(figsize=size, layout="constrained")
        yield drawn
        drawn.savefig(path, metadata={"Date": None} if Path(path).suffix == ".svg" else {})


def picture(panels, path, dark=False):
    """Write the picture of draw. The legend is below the panels, where it hides nothing."""
    looks = looks_of([label for curves in panels.values() for label in curves])
    wide = min(len(panels), 3)
    high = -(-len(panels) // 3)
    width = max(5.2, 4 * wide)
    columns = 1 if max(map(len, looks)) > 12 else 2  # of the legend
    size = (width, 3.2 * high + 0.25 * len(looks) / columns + 0.4)
    lines = {}
    caption = "" if is_function([*panels][0]) else "mean over seeds, band: ± 1 sd"
    with figure(path, dark, size) as drawn:
        places = drawn.subplots(high, wide, squeeze=False).flat
        for (title, curves), axes in zip(panels.items(), places):
            draw_panel(axes, title, curves, looks)
            lines |= zip(with_seeds(title, curves), axes.lines)
        for axes in places:  # of a last row that is not full
            axes.remove()
        labels = [textwrap.fill(label, int(10 * width / columns) - 4) for label in lines]
        key = {"ncols": columns, "title": caption, "fontsize": "small", "frameon": False}
        drawn.legend(lines.values(), labels, loc="outside lower center", **key)


def looks_of(labels):
    """{label: how its line is drawn}: a method in its colour, a row of it ("sdar teacher=frozen")
    with dashes of its own, then paler."""
    looks, used = {}, set()
    for label in dict.fromkeys(labels):
        named = re.findall(rf"\b({'|'.join(COLOURS)})\b", label)  # also finds nothing, ""
        name = max(named, key=len, default="")
        row = int(not label.endswith(name))  # 0: the method itself
        while (name, row) in used:
            row += 1
        used.add((name, row))
        lap, place = divmod(row, len(COLOURS[name]))
        paler, dash = divmod(lap, len(DASHES))
        look = {"color": COLOURS[name][place], "linestyle": DASHES[dash]}
        looks[label] = look | {"alpha": 0.6**paler}
    return looks


def draw_panel(axes, title, curves, looks=None):
    """One panel: a curve a label, with its axes named. Of many curves sdar and grpo are strong, and
    have a band in their colour."""
    looks = looks or looks_of(curves)
    for label, curve in curves.items():
        x, mean = curve.mean(0).T
        sd = curve[..., 1].std(0, ddof=min(1, len(curve) - 1))
        strong = len(looks) < 4 or label in ("sdar", "grpo")
        axes.plot(x, mean, label=label, linewidth=2.4 if strong else 1.2, **looks[label])
        if strong:
            colour = looks[label]["color"]
            axes.fill_between(x, mean - sd, mean + sd, color=colour, alpha=0.2, linewidth=0)
    axes.set_title(textwrap.fill(title, 46), fontsize="medium")
    axes.set_xlabel("gap, nats" if is_function(title) else "training step")
    if is_share(title):
        axes.set_ylim(-0.02, 1.02)


if __name__ == "__main__":
    sys.exit(sdar.run(lambda: main(sys.argv[1:])))
