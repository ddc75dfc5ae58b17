"""Learning curves for the pages, light and dark: python .lab/pictures.py runs/compare

Reads compare.json in that folder, writes learning*.svg (grpo and sdar) and compare*.svg (all
methods) into .assets. Needs matplotlib.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import compare
import plots

ASSETS = Path(__file__).resolve().parent.parent / ".assets"
TITLE = "held-out success without the skill"


def main(folder="runs/compare", place=ASSETS):
    """Draw the four pictures. Returns their paths."""
    report = json.loads(Path(folder, "compare.json").read_text("utf-8"))
    curves = {}
    for label, row in report["evaluations"].items():
        curves[label] = compare.learning_curves(row, report["start"])
    two = {label: curves[label] for label in ("sdar", "grpo")}
    written = []
    for name, shown in (("learning", two), ("compare", curves)):
        for dark in (False, True):
            path = Path(place, f"{name}{'-dark' if dark else ''}.svg")
            plots.picture({TITLE: shown}, path, dark)
            written.append(path)
    return written


if __name__ == "__main__":
    print(*main(*sys.argv[1:]), sep="\n")
