"""Pictures for the pages, light and dark, into .assets. Needs matplotlib.

    python .lab/pictures.py runs/compare    # learning*.svg (grpo and sdar), compare*.svg (all)
    python .lab/pictures.py long runs/long/compare-method-teacher.json  # long*.svg
    python .lab/pictures.py map runs/map    # map*.svg: lambda, learning rate and teacher

They read what `compare` has written.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import compare
import numpy as np
import plots

import sdar

ASSETS = Path(__file__).resolve().parent.parent / ".assets"
TITLE = "held-out success without the skill"


def main(argv):
    """Draw what the command line names. Returns 2 if it is not there."""
    draw, folders = draw_curves, argv
    if argv and argv[0] in OTHERS:
        draw, folders = OTHERS[argv[0]], argv[1:]
    try:
        print(*draw(*folders[:1]), sep="\n")
    except (sdar.UserError, OSError, ModuleNotFoundError) as error:
        print(f"pictures.py: {error}", file=sys.stderr)
        return 2


def read_curves(report):
    """{label: its runs' learning curves} of a file that compare has written."""
    report = json.loads(Path(report).read_text("utf-8"))
    curves = {}
    for label, row in report["evaluations"].items():
        curves[label] = compare.learning_curves(row, report["start"])
    return curves


def draw_panel(name, curves, place):
    """One panel, light and dark. Returns the paths of the pictures."""
    written = []
    for dark in (False, True):
        path = Path(place, f"{name}{'-dark' if dark else ''}.svg")
        plots.picture({TITLE: curves}, path, dark)
        written.append(path)
    return written


def draw_curves(folder="runs/compare", place=ASSETS):
    """Success over steps, of grpo and sdar, and of all methods."""
    curves = read_curves(Path(folder, "compare.json"))
    two = {label: curves[label] for label in ("sdar", "grpo")}
    return draw_panel("learning", two, place) + draw_panel("compare", curves, place)


def draw_long(report="runs/long/compare-method-teacher.json", place=ASSETS):
    """Success over more steps, of all that was compared."""
    return draw_panel("long", read_curves(report), place)


def draw_map(folder="runs/map", place=ASSETS):
    """Success of the last weights alone, and below it with the skill (a live teacher's; the others
    have weights of their own): a panel a teacher, a row a lambda, a column a learning rate. Returns
    the paths of the pictures."""
    rows = {}  # {(teacher, lambda, learning rate): (student, teacher)}
    for path in Path(folder).glob("sdar*/config.json"):
        config, log = plots.read_run(path.parent)
        if len(log) < config["steps"]:  # it is not finished
            continue
        key = config["teacher"], config["sdar_coef"], config["lr"]
        ends = log[-1]["eval_success"], log[-1]["eval_success_skill"]
        rows.setdefault(key, []).append(ends)
    sdar.require(rows, f"{folder} holds no runs of a map: compare --sweep makes them")
    teachers, lambdas, rates = (sorted({key[i] for key in rows}) for i in range(3))
    written = []
    for dark in (False, True):
        path = Path(place, f"map{'-dark' if dark else ''}.svg")
        with plots.figure(path, dark, (2.6 * len(teachers) + 1, 5.6)) as figure:
            places = figure.subplots(2, len(teachers), squeeze=False)
            for (reader, column), axes in np.ndenumerate(places):
                cells = np.full((len(lambdas), len(rates)), np.nan)
                for (teacher, coef, rate), ends in rows.items():
                    if teacher == teachers[column]:
                        at = lambdas.index(coef), rates.index(rate)
                        cells[at] = np.mean(ends, 0)[reader]
                title = f"{teachers[column]}, {('alone', 'with the skill')[reader]}"
                draw_cells(axes, title, cells, lambdas, rates)
        written.append(path)
    return written


def draw_cells(axes, title, cells, lambdas, rates):
    """A panel of the map: cells (lambdas, learning rates), from 0 to 1, coloured and written."""
    axes.imshow(cells, vmin=0, vmax=1, cmap="viridis", origin="lower")
    for (y, x), value in np.ndenumerate(cells):
        ink = "black" if value > 0.6 else "white"
        axes.text(x, y, f"{value:.2f}", color=ink, ha="center", va="center")
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.set_yticks(range(len(lambdas)), [f"{coef:g}" for coef in lambdas])
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("lambda")


OTHERS = {"map": draw_map, "long": draw_long}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
