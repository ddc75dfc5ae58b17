"""Tests of experiments/results.py: data, tables in pages, pictures."""

import json

import pytest
import results
from conftest import call, refused
from pytest import fixture, mark

from test_sdar import pytestmark, table  # noqa: F401


def row_of(label, wins, made="commit 1, a"):
    """A row as compare keeps it: of the seeds that win so many of 10 games at the end, 1 before,
    and all with the skill."""
    runs = {seed: {"0": [[10, 1, 10]], "20": [[10, won, 10]]} for seed, won in wins.items()}
    settings = {"steps": 20, "lr": 1e-3, "variant": []}
    return {"label": label, "made": made, "settings": settings, "types": ["put"], "runs": runs}


GRPO = {"0": 2, "1": 3, "2": 4}
ROWS = [row_of("grpo", GRPO), row_of("sdar", {"0": 6}), row_of("opsd", {"0": 0})]
MORE = [row_of("sdar", {"2": 7, "1": 8}), row_of("sdar", GRPO, "commit 1, b")]
DATA = """
{"when": [
["live", "short", "sdar", "grpo", "20"],
["before", "short", "sdar", "grpo", "0"],
["not measured yet", "short", "rlsd", "grpo", "20"],
["long ago", [-0.2, -0.3, -0.1], 5, "commit 0"]
],
"probe": {
"sdar-s0": {"made": "commit 1", "looks": [{"step": 0, "alone": {"diagonal": 0.2, "blind": 0.1}}]},
"sdar-s1": {"made": "commit 1", "looks": [{"step": 0, "alone": {"diagonal": 0.4, "blind": 0.1}}]}
}}
"""
PAGE = """# A page

<!-- table: short: 0 steps, 20 with the skill, 20 steps -->
<!-- end -->

Text.

<!-- table: gains: when -->
<!-- end -->
<!-- table: probe: sdar -->
<!-- end -->
"""
FILLED = """
| | runs | 0 steps | 20 with the skill | 20 steps | minus grpo, 95 % |
| grpo | 3 | 0.10 ± 0.00 | 1.00 ± 0.00 | 0.30 ± 0.10 | |
| sdar | 3 | 0.10 ± 0.00 | 1.00 ± 0.00 | 0.70 ± 0.10 | +0.40 [+0.15, +0.65] |
| opsd | 1 | 0.10 [0.02, 0.40] | 1.00 [0.72, 1.00] | 0.00 [0.00, 0.28] | |
| | runs | 0 steps | 20 with the skill | 20 steps | minus grpo, 95 % |
| sdar | 3 | 0.10 ± 0.00 | 1.00 ± 0.00 | 0.30 ± 0.10 | |
| | gain, 95 % | so it is | runs | made by |
| live | +0.40 [+0.15, +0.65] | ahead | 3 | commit 1 |
| before | +0.00 [+0.00, +0.00] | not resolved | 3 | commit 1 |
| long ago | -0.20 [-0.30, -0.10] | behind | 5 | commit 0 |
| steps; 2 seeds | 0 |
| sdar, home | 0.30 |
| sdar, blind | 0.10 |
"""


@fixture
def page(tmp_path, monkeypatch):
    """A page with three tables; its data lie beside it."""
    for name, value in {"rows": ROWS, "more": MORE, **json.loads(DATA)}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    page = tmp_path / "PAGE.md"
    page.write_text(PAGE)
    for name, value in (("DATA", tmp_path), ("PAGES", [page]), ("ASSETS", tmp_path)):
        monkeypatch.setattr(results, name, value)
    join = ["--join", "short", tmp_path / "rows.json", tmp_path / "more.json"]
    assert call("results", *join, "--check") == 1  # nothing stands in the tables yet
    return page


def test_tables_are_written_and_what_is_wrong_in_one_is_found(page, capsys):
    """More seeds of a row are joined; runs of two processors are never compared."""
    assert call("results", "--write") == 0
    assert call("results", "--check") == 0
    text = page.read_text()
    assert results.MARK.sub(r"\1\2", text) == PAGE  # outside of the marks nothing has changed
    rows = [" ".join(line.split()) for line in text.splitlines() if line[:3] not in ("", "| -")]
    assert "\n".join(row for row in rows if row[:1] == "|") == FILLED.strip()
    assert {"commit 1, a", "commit 1, b"} < {*rows}
    page.write_text(text.replace("0.70 ± 0.10", "0.80 ± 0.10"))
    assert call("results", "--check") == 1
    assert f"{page}: its data say something else" in capsys.readouterr().err


MARKS = """
"short: 25 steps"   "the table 'short: 25 steps' cannot be made"
"short: nothing"    "the table 'short: nothing' cannot be made"
"other: 20 steps"   "other.json"
"probe: rlsd"       "the table 'probe: rlsd' cannot be made"
"""


@mark.parametrize("words, message", table(MARKS))
def test_a_mark_that_asks_for_what_is_not_there_is_refused(words, message, page, capsys):
    page.write_text(f"<!-- table: {words} -->\n<!-- end -->\n")
    assert message in refused(capsys, "results", "--write")
    assert "PAGE.md" in refused(capsys, "results", "--join", "short", page)


def test_pictures_are_drawn_light_and_dark(page, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "long.json").write_text("[]")  # it has no runs yet: no picture
    assert call("results", "--draw") == 0
    dark, light = [path.read_text("utf-8") for path in sorted(tmp_path.glob("*.svg"))]
    assert "opsd" in light and "opsd" in dark
    assert "#0d1117" in dark and "#0d1117" not in light
