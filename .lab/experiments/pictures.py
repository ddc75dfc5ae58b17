"""The table and the pictures, light and dark, of what compare.py has written. Needs matplotlib.

    python .lab/experiments/pictures.py runs/compare/compare.json
    python .lab/experiments/pictures.py runs/compare/compare.json --rows sdar,grpo --name learning
    python .lab/experiments/pictures.py runs/long/compare-method-teacher.json --name long
    python .lab/experiments/pictures.py runs/map/compare-*.json --map --name map

Of several files all rows are taken.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

LAB = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(LAB), str(LAB.parent)]
import compare
import plots

import sdar

TITLE = "held-out success without the skill"


def main(argv):
    """Print the table of a comparison, and draw it."""
    parser = sdar.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", help="compare*.json: one, or more to join")
    parser.add_argument("--rows", help="those to draw, a comma between them [all]")
    parser.add_argument("--map", action="store_true", help="over lambda and learning rate")
    parser.add_argument("--name", default="compare", help="of the pictures [compare]")
    parser.add_argument("--place", default=LAB.parent / ".assets", help="folder [.assets]")
    given = parser.parse_args(argv)

    with sdar.naming(f"{' '.join(given.reports)} cannot be drawn", sdar.UserError):
        report, *others = [json.loads(Path(path).read_text("utf-8")) for path in given.reports]
        for other in others:
            report["rows"] |= other["rows"]
        if given.rows:
            report["rows"] = {label: report["rows"][label] for label in given.rows.split(",")}
        compare.print_table(report)
        curves = compare.learning_curves(report)
        for dark in (False, True):
            path = Path(given.place, f"{given.name}{'-dark' if dark else ''}.svg")
            if given.map:
                draw_map(report, path, dark)
            else:
                plots.picture({TITLE: curves}, path, dark)
            print(path)


def draw_map(report, path, dark):
    """Success of the last weights alone, and below it with the skill (a live teacher's; the others
    have weights of their own): a panel a teacher, a row a lambda, a column a learning rate."""
    found = {}  # {(teacher, lambda, learning rate): (alone, with the skill)}
    for row in report["rows"].values():
        settings = row["settings"]
        teacher = " ".join(settings["variant"]) or settings["teacher"]
        lasts = [lines[-1] for lines in row["seeds"].values()]
        ends = [(last["eval_success"], last["eval_success_skill"]) for last in lasts]
        if ends and settings["distil"] != "none":
            found[teacher, settings["sdar_coef"], settings["lr"]] = np.mean(ends, 0)
    sdar.require(found, "no row has a teacher")
    teachers, lambdas, rates = (sorted({*values}) for values in zip(*found))
    shares = np.full((2, len(teachers), len(lambdas), len(rates)), np.nan)
    for (teacher, coef, rate), ends in found.items():
        shares[:, teachers.index(teacher), lambdas.index(coef), rates.index(rate)] = ends

    with plots.figure(path, dark, (2.6 * len(teachers) + 1, 5.6)) as figure:
        places = figure.subplots(2, len(teachers), squeeze=False)
        for (reader, column), axes in np.ndenumerate(places):
            title = f"{teachers[column]}, {('alone', 'with the skill')[reader]}"
            draw_cells(axes, title, shares[reader, column], lambdas, rates)


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


if __name__ == "__main__":
    sys.exit(sdar.run(lambda: main(sys.argv[1:])))
