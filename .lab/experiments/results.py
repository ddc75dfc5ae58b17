"""The tables and pictures of the pages, from results/*.json: rows that compare.py has written.

    python .lab/experiments/results.py                 # print every table
    python .lab/experiments/results.py --write         # put them into the pages
    python .lab/experiments/results.py --check         # exit code 1 if a page says something else
    python .lab/experiments/results.py --draw          # the pictures, light and dark (matplotlib)
    python .lab/experiments/results.py --join long runs/long/compare*.json    # make long.json

A table stands in its page between two marks. The first one names a file of results/ and columns, as
in compare.success:

    <!-- table: short: 20 steps, 60 steps, 60 with the skill -->
    <!-- end -->

Other forms are "gains: when", of results/when.json, and "probe"; see these functions.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np

LAB = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(LAB), str(LAB.parent)]
import compare
import plots

import sdar

ASSETS = LAB.parent / ".assets"
DATA = LAB / "experiments/results"
PAGES = [LAB.parent / "README.md", *sorted(LAB.rglob("*.md"))]
MARK = re.compile(r"(?<=<!-- table: )(.*)( -->\n)((?:.*\n)*?)(?=<!-- end -->)")


def main(argv):
    """Print, write, check, draw or join. Returns 1 if a page that is checked is out of date."""
    parser = sdar.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--write", "--check", "--draw"):
        parser.add_argument(name, action="store_true")
    parser.add_argument("--join", nargs="+", metavar=("NAME", "FILE"))
    given = parser.parse_args(argv)
    if given.draw:
        return draw()
    if given.join:
        name, *files = given.join
        rows = compare.join(sum(map(read, files), []))
        DATA.joinpath(f"{name}.json").write_text(compare.as_json(rows), "utf-8")

    code = 0
    for path in PAGES:
        text = path.read_text("utf-8")
        filled = MARK.sub(lambda mark: f"{mark[1]}{mark[2]}\n{make_table(mark[1])}\n", text)
        if given.write:
            path.write_text(filled, "utf-8")
        elif not given.check:
            print(*[f"{path.name}: {mark[0]}" for mark in MARK.finditer(filled)], sep="")
        elif filled != text:
            print(f"{path}: its data say something else, --write it anew", file=sys.stderr)
            code = 1
    return code


def read(name):
    """What a file of results/ holds, or one at another place. UserError if it is no JSON."""
    path = DATA / name
    with sdar.naming(f"{path} holds no results", sdar.UserError):
        return json.loads(path.read_text("utf-8"))


def make_table(mark):
    """The text of a table, as a mark asks for it, and below it what made the rows."""
    file, _, words = mark.partition(": ")
    with sdar.naming(f"the table {mark!r} cannot be made", sdar.UserError):
        if file == "gains":
            return gains(words)
        if file == "probe":
            return probe(words.split(", "))
        return compare.tables(read(f"{file}.json"), words.split(", "))


def gains(name):
    """A table: what one row wins more than another, a line for each entry of a file. That has rows'
    file, two labels and a column; or, of an older commit, the gain, number of runs and commit."""
    cells = [["", "gain, 95 %", "so it is", "runs", "made by"]]
    for title, *entry in read(f"{name}.json"):
        for gain, runs, made in measured(*entry) if len(entry) > 3 else [entry]:
            verdict = "ahead" if gain[1] > 0 else "behind" if gain[2] < 0 else "not resolved"
            cells.append([title, compare.GAIN.format(*gain), verdict, str(runs), made])
    return compare.markdown(cells)


def measured(file, label, base, column):
    """(gain with its interval, number of runs, commit) of a label over another, for each origin."""
    rows = read(f"{file}.json")
    for row in rows:
        gains = compare.gains_over(base, row, rows, column)
        if row["label"] == label and len(gains) > 2:
            yield compare.t_interval(gains), len(gains), row["made"].split(",")[0]


def probe(names):
    """A table: what .lab/probe.py saw of some runs, step by step. Means over seeds."""
    runs, cells = read("probe.json"), []
    for name in names:
        seeds = [runs[run]["looks"] for run in runs if run.startswith(f"{name}-s")]
        steps = [str(look["step"]) for look in seeds[0]]
        for what, title in (("diagonal", "home"), ("blind", "blind")):
            seen = np.mean([[look["alone"][what] for look in looks] for looks in seeds], 0)
            cells.append([f"{name}, {title}", *map("{:.2f}".format, seen)])
    head = [f"steps; {len(seeds)} seeds", *steps]
    made = {run["made"] for run in runs.values()}
    return compare.markdown([head, *cells]) + "\n".join(["", *made, ""])


def draw():
    """The pictures, each light and dark."""
    for name, file in (("compare", "short"), ("long", "long")):
        curves = compare.learning_curves(read(f"{file}.json"))
        for dark in (False, True) if curves else ():
            path = ASSETS / f"{name}{'-dark' * dark}.svg"
            plots.picture({"held-out success without the skill": curves}, path, dark)


if __name__ == "__main__":
    sys.exit(sdar.run(lambda: main(sys.argv[1:])))
