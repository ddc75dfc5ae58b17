"""Tests of experiments/results.py: data, tables in pages, pictures."""

import shutil
from pathlib import Path

import results
from conftest import DATA, call, refused
from pytest import fixture, importorskip, mark

from test_sdar import pytestmark, table  # noqa: F401

PAGE = """# A page

<!-- table: short: 0 steps, 20 with the skill, 20 steps -->
<!-- end -->

Text.

<!-- table: gains: when -->
<!-- end -->
<!-- table: probe: sdar -->
<!-- end -->
<!-- table: probe: sdar-s1 -->
<!-- end -->
<!-- table: learning_b: opsd -->
<!-- end -->
<!-- table: skill_b: opsd -->
<!-- end -->
"""
FILLED = """
| | runs | 0 steps | 20 with the skill | 20 steps | minus grpo, 95 % |
| grpo | 3 | 0.10 ± 0.00 | 1.00 ± 0.00 | 0.30 ± 0.10 | |
| sdar | 3 | 0.10 ± 0.00 | 1.00 ± 0.00 | 0.70 ± 0.10 | +0.40 [+0.15, +0.65] |
| opsd | 1 | 0.10 [0.02, 0.40] | 1.00 [0.72, 1.00] | 0.00 [0.00, 0.28] | |
| | runs | 0 steps | 20 with the skill | 20 steps | minus grpo, 95 % |
| sdar | 3 | 0.10 ± 0.00 | 1.00 ± 0.00 | 0.30 ± 0.10 | |
| | gain, 95 % | verdict | runs | made by |
| live | +0.40 [+0.15, +0.65] | ahead | 3 | commit 1 |
| before | +0.00 [+0.00, +0.00] | not resolved | 3 | commit 1 |
| long ago | -0.20 [-0.30, -0.10] | behind | 5 | commit 0 |
| not sure | +0.20 [-0.10, +0.50] | not resolved | 5 | commit 0 |
| steps; seeds: 3 | 0 |
| sdar, home | 0.20 |
| sdar, blind | 0.10 |
| steps; seeds: 1 | 0 |
| sdar-s1, home | 0.40 |
| sdar-s1, blind | 0.10 |
| steps; seeds: 1 | 5 |
| opsd, gap | -0.20 |
| steps; seeds: 1 | 5 |
| opsd, home | 0.60 |
| opsd, blind | 0.20 |
"""


@fixture
def page(tmp_path, monkeypatch):
    """A page, and beside it its data: of 10 games each run won 1 at first, all with the skill."""
    monkeypatch.chdir(shutil.copytree(DATA / "results", tmp_path, dirs_exist_ok=True))
    monkeypatch.setattr(results, "DATA", tmp_path)
    page = Path("PAGE.md")
    page.write_text(PAGE)
    monkeypatch.setattr(results, "PAGES", [page])
    assert call("results", "--join", "short", "rows.json", "more.json") == 0
    return page


def test_tables_are_written_and_what_is_wrong_in_one_is_found(page, capsys):
    """More seeds of a row are joined; runs of two processors are never compared."""
    assert "PAGE.md: its data say something else" in refused(capsys, "results", "--check")
    assert call("results", "--write") == 0
    assert call("results", "--check") == 0
    text = page.read_text()
    assert results.MARK.sub(r"\1\2", text) == PAGE  # outside of the marks nothing has changed
    rows = [" ".join(line.split()) for line in text.splitlines() if line[:3] not in ("", "| -")]
    assert "\n".join(row for row in rows if row[:1] == "|") == FILLED.strip()
    assert {"commit 1, a", "commit 1, b"} < {*rows}
    assert "commit 1, a\n\n|" in text


MARKS = """
"short: 25 steps"   "the table 'short: 25 steps' cannot be made"
"short: nothing"    "the table 'short: nothing' cannot be made"
"other: 20 steps"   "other.json"
"probe: rlsd"       "the table 'probe: rlsd' cannot be made"
"probe_b: opsd, rlsd"  "they differ in commit, seeds or steps"
"""


@mark.parametrize("words, message", table(MARKS))
def test_a_mark_that_asks_for_what_is_not_there_is_refused(words, message, page, capsys):
    page.write_text(f"<!-- table: {words} -->\n<!-- end -->\n")
    assert message in refused(capsys, "results", "--write")


def test_the_pictures_are_drawn_from_the_data(tmp_path, monkeypatch):
    importorskip("matplotlib")
    monkeypatch.setattr(results, "ASSETS", tmp_path)
    assert call("results", "--draw") == 0
    found = {path.stem: path.read_text("utf-8") for path in tmp_path.glob("*.svg")}
    assert {*found} == {"compare", "compare-dark", "long", "long-dark", "probe"}
    assert "rlsd (20 seeds" in found["compare"] and "tomato" in found["probe"]
    assert found["long"] != found["long-dark"]
