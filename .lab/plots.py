"""Draw the curves of runs, as text and as a picture.

    python .lab/plots.py runs/toy-sdar-s0 runs/toy-grpo-s0
    python .lab/plots.py runs/compare/sdar-s* --picture curves.png

Runs that differ in nothing but the seed are one curve, with a band of one standard deviation.
"""

import argparse
import json
import os
import re
import sys
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
            if len(curve[0]):
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
    """{label: logs of the runs that differ in nothing but the seed}; a log is a list of lines."""
    free = {*sdar.MAY_DIFFER, "seed"}
    groups = {}  # {(name, settings): {folder: log}}
    for folder in folders:
        settings, lines = read_run(folder)
        fixed = {name: value for name, value in settings.items() if name not in free}
        name = re.sub(r"-s\d+$", "", folder)
        groups.setdefault((name, str(fixed)), {})[folder] = lines

    names, labelled = [name for name, _ in groups], {}
    for (name, _), logs in groups.items():
        label = name if names.count(name) == 1 else [*logs][0]  # one name, several settings
        labelled[label] = [*logs.values()]
    return labelled


def points_of(name, logs):
    """(runs, points, 2) of steps and values, as long as the run with the fewest."""
    curves = []
    for lines in logs:
        filled = [line for line in lines if np.isfinite(line.get(name, np.nan))]
        curves.append([(line["step"], line[name]) for line in filled])
    points = min(map(len, curves))
    return np.array([curve[:points] for curve in curves])


def draw(panels, path):
    """Means over runs of {title: {label: (runs, points, x and y)}}, as text and, with bands of one
    standard deviation, as a picture."""
    for title, curves in panels.items():
        print("\n" + title)
        print_curves(curves, is_share(title))
    try:
        picture(panels, path)
        print(f"\n{path}")
    except ImportError:
        print("no picture was drawn: it takes matplotlib (pip install matplotlib)")


def is_share(title):
    """True if the values of a panel go from 0 to 1."""
    return "success" in title or "share" in title


def print_curves(curves, share):
    """A line of text a curve: bars, then the mean at up to seven points."""
    low, high = 0, 1
    if not share:
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


# --- The picture -------------------------------------------------------------------------

DARK = {  # matplotlib's settings for a picture on a dark page
    "figure.facecolor": "#0d1117",
    "axes.facecolor": "#0d1117",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), "#e6edf3"),
    **dict.fromkeys(("xtick.color", "ytick.color", "legend.labelcolor"), "#e6edf3"),
}


@contextmanager
def figure(path, dark, size):
    """A matplotlib figure, size (width, height) in inches, that is written to `path` at the end.
    ImportError without matplotlib."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # The same curves give the same bytes: no date, no random names.
    with rc_context({"font.size": 12, "svg.hashsalt": "sdar", **(DARK if dark else {})}):
        drawn = Figure(figsize=size, layout="constrained")
        yield drawn
        drawn.savefig(path, metadata={"Date": None} if Path(path).suffix == ".svg" else {})


def picture(panels, path, dark=False):
    """Write the picture of draw; of many curves sdar and grpo are strong."""
    wide = min(len(panels), 3)
    high = -(-len(panels) // 3)
    with figure(path, dark, (max(6.4, 4 * wide), max(4, 3 * high))) as drawn:
        places = drawn.subplots(high, wide, squeeze=False).flat
        for (title, curves), axes in zip(panels.items(), places):
            draw_panel(axes, title, curves)
        for axes in places:  # of a last row that is not full
            axes.remove()


def draw_panel(axes, title, curves):
    """One panel: a curve a label, with its axes named."""
    for label, curve in curves.items():
        x, mean = curve.mean(0).T
        sd = curve[..., 1].std(0, ddof=min(1, len(curve) - 1))
        strong = len(curves) < 4 or label.split("/")[-1] in ("sdar", "grpo")
        axes.plot(x, mean, label=label, linewidth=2.4 if strong else 1.0)
        if strong:
            axes.fill_between(x, mean - sd, mean + sd, alpha=0.2, linewidth=0)
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("gap, nats" if "over its gap" in title else "training step")
    if is_share(title):
        axes.set_ylim(-0.02, 1.02)
    axes.legend(fontsize="small")


if __name__ == "__main__":
    sys.exit(sdar.run(lambda: main(sys.argv[1:])))
