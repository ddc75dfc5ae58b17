"""The tables and pictures of the pages, from results/*.json: rows that compare.py has written.

    python .lab/experiments/results.py --check         # is each table of a page that of the data?
    python .lab/experiments/results.py --write         # put the tables into the pages
    python .lab/experiments/results.py --draw          # the pictures, light and dark (matplotlib)
    python .lab/experiments/results.py --join long runs/long/*/rows.json      # make long.json

A table stands in its page between two marks. The first one names a file of results/ and columns, as
in compare.success:

    <!-- table: short: 20 steps, 60 steps, 60 with the skill -->
    <!-- end -->

Other forms are "gains: when", of results/when.json, and "probe: ...", "skill: ..." and "learning:
...", of results/probe.json (with _real or _twenty, of that file): see gains() and probed().
"""

import json
import re
import sys
from pathlib import Path

import numpy as np

LAB = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(LAB), str(LAB.parent)]
import compare
import plots
import probe

import sdar
from envs import make_env, naming, require

ASSETS = LAB.parent / ".assets"
DATA = LAB / "experiments/results"
PAGES = [LAB.parent / "README.md", *sorted(LAB.rglob("*.md"))]
LOOKS = {"probe": "alone", "skill": "skill", "learning": "learning"}  # {word of a mark: its part}
MARK = re.compile(r"(?<=<!-- table: )(.*)( -->\n)((?:.*\n)*?)(?=<!-- end -->)")


def main(argv=None):
    """Check, unless something else is asked for."""
    parser = sdar.Parser(usage=__doc__)
    for name in ("--write", "--check", "--draw"):
        parser.add_argument(name, action="store_true")
    parser.add_argument("--join", nargs="+", metavar=("NAME", "FILE"))
    given = parser.parse_args(argv)
    if given.draw:
        return draw()
    if given.join:
        return join(*given.join)

    for path in PAGES:
        text = path.read_text("utf-8")
        filled = MARK.sub(lambda mark: f"{mark[1]}{mark[2]}\n{make_table(mark[1])}\n", text)
        if given.write:
            path.write_text(filled, "utf-8")
        else:
            require(filled == text, f"{path}: its data say something else, --write it anew")


def join(name, *files):
    """Make a file of results/ from others."""
    with naming("these files do not go together"):
        rows = compare.join(sum(map(read, map(Path, files)), []))
        labels = {(row["label"], row["made"]) for row in rows}
        require(len(labels) == len(rows) > 0, "no rows, or two of one label that differ")
    Path(DATA, f"{name}.json").write_text(compare.as_json(rows), "utf-8")


def read(path):
    """What a file of results holds. UserError if it is no JSON."""
    with naming(f"{path} holds no results"):
        return json.loads(path.read_text("utf-8"))


def make_table(mark):
    """The text of a table, as a mark asks for it, and below it what made the rows."""
    file, _, words = mark.partition(": ")
    with naming(f"the table {mark!r} cannot be made"):
        if file == "gains":
            return gains(words)
        columns = words.split(", ")
        kind = file.split("_")[0]
        if kind in LOOKS:
            return probed(file.replace(kind, "probe"), LOOKS[kind], columns)
        rows = read(DATA / f"{file}.json")
        for column in columns:
            require(any(compare.success(row, column) for row in rows), f"no run has {column}")
        return compare.tables(rows, columns)


def gains(name):
    """A table: what one row wins more than another, a line for each entry of a file. That has rows'
    file, two labels and a column; or, of an older commit, the gain, number of runs and commit."""
    cells = [["", "gain, 95 %", "verdict", "runs", "made by"]]
    for title, *entry in read(DATA / f"{name}.json"):
        for gain, runs, made in measured(*entry) if len(entry) > 3 else [entry]:
            verdict = "ahead" if gain[1] > 0 else "behind" if gain[2] < 0 else "not resolved"
            cells.append([title, compare.GAIN.format(*gain), verdict, str(runs), made])
    return compare.markdown(cells)


def measured(file, label, base, column):
    """(gain with its interval, number of runs, commit) of a label over another, for each origin."""
    rows = read(DATA / f"{file}.json")
    for row in rows:
        gains = compare.gains_over(base, row, rows, column)
        if row["label"] == label and len(gains) > 2:
            yield compare.t_interval(gains), len(gains), row["made"].split(",")[0]


def probed(file, part, names):
    """A table: what .lab/probe.py saw of some runs, step by step, alone or with the skill, or what
    a run has logged since the look before. Means over seeds, or of one seed, by its name."""
    runs, cells, heads = read(DATA / f"{file}.json"), [], []
    for name in names:
        seeds = [runs[run] for run in runs if name in (run, re.sub(r"-s\d+$", "", run))]
        looks = [[look for look in run["looks"] if part in look] for run in seeds]
        for run, seen in zip(seeds, looks):
            steps = [str(look["step"]) for look in seen]
            heads.append([run["made"], f"steps; seeds: {len(seeds)}", *steps])
        require(heads.count(heads[0]) == len(heads), "they differ in commit, seeds or steps")
        for what in (what for what in looks[0][0][part] if what != "percent"):
            values = np.mean([[look[part][what] for look in seen] for seen in looks], 0)
            cells.append([f"{name}, {what}", *map("{:.2f}".format, values)])
    made, *head = heads[0]
    return f"{compare.markdown([head, *cells])}\n{made}\n"


# --- The pictures ------------------------------------------------------------------------


def draw():
    """The pictures: curves, light and dark, and what was probed, which is read on both."""
    for name, file in (("compare", "short"), ("long", "long")):
        curves = learning_curves(read(DATA / f"{file}.json"))
        panels = {"held-out success without the skill, by step": curves}
        plots.picture(panels, ASSETS / f"{name}.svg")
        plots.picture(panels, ASSETS / f"{name}-dark.svg", dark=True)
    draw_matrices("sdar-live-s0", ASSETS / "probe.svg")


def learning_curves(rows):
    """{label: (runs, points, 2)}: steps and held-out success of a row's runs, from before training
    on."""
    curves = {}
    for row in rows:
        for looks in row["runs"].values():
            curve = [(int(step), compare.won(looks, step)) for step in looks]
            curves.setdefault(row["label"], []).append(curve)
    return {label: np.array(runs) for label, runs in curves.items()}


def draw_matrices(run, path):
    """What a probed run's student would answer first, at the steps whose whole matrix is kept: a
    row is a class, a column a place, the homes on the left."""
    from matplotlib.figure import Figure

    env = make_env("toy")
    looks = read(DATA / "probe.json")[run]["looks"]
    looks = [look["alone"] | look for look in looks if "percent" in look["alone"]]
    figure = Figure((2.4 * len(looks), 2), layout="constrained")
    for place, look in enumerate(looks, 1):
        axes = figure.add_subplot(1, len(looks), place, xticks=[], yticks=[])
        axes.set_title("step {step}: {home:.2f}".format(**look))
        percent = np.array(look["percent"])[:, probe.order(env)]
        axes.imshow(percent, cmap="Oranges", vmin=0, vmax=100)
    names = [*env.household.home]
    figure.axes[0].set_yticks(range(len(names)), names, fontsize=7)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(sdar.run(main))
