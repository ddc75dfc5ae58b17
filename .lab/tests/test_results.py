"""Tests of experiments/results.py: data, tables in pages, pictures."""

import json

import compare
import pytest
import results
from pytest import fixture, mark

import sdar
import test_sdar
from test_sdar import table

pytestmark = test_sdar.pytestmark


def call(*words):
    """The exit code of the script."""
    return sdar.run(lambda: results.main([*words]))


def row_of(label, wins, made="commit 1, a processor"):
    """A row as compare keeps it: of the seeds 0, 1, ... that win so many of 10 games at the end, 1
    before, and all with the skill."""
    runs = {}
    for seed, won in enumerate(wins):
        runs[str(seed)] = {"0": [[10, 1, 10]], "20": [[10, won, 10]]}
    settings = {"steps": 20, "lr": 1e-3, "variant": []}
    return {"label": label, "made": made, "settings": settings, "types": ["put"], "runs": runs}


ROWS = [row_of("grpo", [2, 3, 4]), row_of("sdar", [6, 8, 7]), row_of("opsd", [0, 0, 0])]
PAGE = """# A page

<!-- table: short: 0 steps, 20 steps, put -->
<!-- end -->

Text.

<!-- table: gains: when -->
<!-- end -->
"""
WHEN = [
    ["teacher live", "short", "sdar", "grpo", "20"],
    ["before", "short", "sdar", "grpo", "0"],
    ["not measured yet", "short", "sdar teacher=frozen", "grpo", "20"],
    ["long ago", [-0.2, -0.3, -0.1], 5, "commit 0"],
    ["longer ago", [0.2, -0.1, 0.5], 5, "commit 0"],
]


@fixture
def page(tmp_path, monkeypatch):
    """A page with two tables, whose data are ROWS and WHEN."""
    page = tmp_path / "PAGE.md"
    page.write_text(PAGE)
    (tmp_path / "short.json").write_text(compare.as_json(ROWS))
    (tmp_path / "when.json").write_text(json.dumps(WHEN))
    monkeypatch.setattr(results, "DATA", tmp_path)
    monkeypatch.setattr(results, "PAGES", [page])
    return page


def test_tables_are_written_into_their_page_and_nothing_else_changes(page):
    assert call("--check") == 1  # nothing is there yet
    assert call("--write") == 0
    assert call("--check") == 0
    text = page.read_text()
    assert results.MARK.sub(r"\1\2", text) == PAGE
    lines = [" ".join(line.split()) for line in text.splitlines() if line[:1] == "|"]
    assert lines == [
        "| | runs | 0 steps | 20 steps | put | minus grpo, 95 % |",
        lines[1],
        "| grpo | 3 | 0.10 ± 0.00 | 0.30 ± 0.10 | 0.30 ± 0.10 | |",
        "| sdar | 3 | 0.10 ± 0.00 | 0.70 ± 0.10 | 0.70 ± 0.10 | +0.40 [+0.15, +0.65] |",
        "| opsd | 3 | 0.10 ± 0.00 | 0.00 ± 0.00 | 0.00 ± 0.00 | -0.30 [-0.55, -0.05] |",
        "| | gain, 95 % | so it is | runs | made by |",
        lines[6],
        "| teacher live | +0.40 [+0.15, +0.65] | ahead | 3 | commit 1 |",
        "| before | +0.00 [+0.00, +0.00] | not resolved | 3 | commit 1 |",
        "| long ago | -0.20 [-0.30, -0.10] | behind | 5 | commit 0 |",
        "| longer ago | +0.20 [-0.10, +0.50] | not resolved | 5 | commit 0 |",
    ]
    assert "\ncommit 1, a processor\n" in text


def test_a_wrong_number_on_a_page_is_found(page, capsys):
    call("--write")
    text = page.read_text()
    page.write_text(text.replace("0.70 ± 0.10", "0.80 ± 0.10", 1))
    assert call("--check") == 1
    assert f"{page}: its data say something else" in capsys.readouterr().err
    page.write_text(text.replace("Text", "0.8"))  # outside of the marks nothing is known
    assert call("--check") == 0


def test_two_processors_are_joined_and_never_compared_with_each_other(page, tmp_path, capsys):
    """More seeds of one row become one row; what another processor made is another table."""
    more = row_of("sdar", [0, 0, 0, 9])
    more["runs"] = {"3": more["runs"]["3"]}
    others = [row_of("grpo", [9, 9, 9], "commit 1, b"), row_of("sdar", [9, 8, 7], "commit 1, b")]
    files = [str(tmp_path / name) for name in ("short.json", "more.json", "other.json")]
    for path, rows in zip(files[1:], ([more], others)):
        (tmp_path / path).write_text(compare.as_json(rows))
    assert call("--join", "short", *files) == 0
    rows = results.read_rows(tmp_path / "short.json")
    assert [(row["label"], len(row["runs"])) for row in rows] == [
        ("grpo", 3),
        ("sdar", 4),
        ("opsd", 3),
        ("grpo", 3),
        ("sdar", 3),
    ]
    assert call() == 0  # prints the tables
    assert page.read_text() == PAGE
    printed = capsys.readouterr().out
    assert "| sdar | 4    | 0.10 ± 0.00 | 0.75 ± 0.13 | 0.75 ± 0.13 | +0.40" in printed
    assert "| sdar | 3    | 0.10 ± 0.00 | 0.80 ± 0.10 | 0.80 ± 0.10 | -0.10" in printed
    assert printed.index("commit 1, a processor") < printed.index("commit 1, b")


def test_what_a_probe_saw_is_a_table(page, tmp_path):
    runs = {}
    for seed, home in enumerate((0.2, 0.4)):
        for name in ("sdar", "grpo"):
            known = {"diagonal": home, "blind": 0.1}
            steps = [{"step": step, "alone": known, "skill": {}} for step in (0, 60)]
            runs[f"{name}-s{seed}"] = {"looks": steps, "made": "commit 1"}
    (tmp_path / "probe.json").write_text(json.dumps(runs))
    page.write_text("<!-- table: probe: grpo, sdar -->\n<!-- end -->\n")
    assert call("--write") == 0
    lines = [" ".join(line.split()) for line in page.read_text().splitlines() if line[:1] == "|"]
    assert [lines[0], *lines[2:]] == [
        "| steps; 2 seeds | 0 | 60 |",
        "| grpo, home | 0.30 | 0.30 |",
        "| grpo, blind | 0.10 | 0.10 |",
        "| sdar, home | 0.30 | 0.30 |",
        "| sdar, blind | 0.10 | 0.10 |",
    ]


NO_ROWS = """
"nothing.json"   "nothing.json"
"PAGE.md"        "PAGE.md holds no rows of compare.py"
"""


@mark.parametrize("name, message", table(NO_ROWS))
def test_files_that_hold_no_rows_are_refused(name, message, page, tmp_path, capsys):
    before = (tmp_path / "short.json").read_text()
    assert call("--join", "short", str(tmp_path / name)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert (tmp_path / "short.json").read_text() == before


MARKS = """
"short: 25 steps"   "the table 'short: 25 steps' cannot be made"
"short: nothing"    "the table 'short: nothing' cannot be made"
"other: 20 steps"   "other.json"
"probe: sdar"       "the table 'probe: sdar' cannot be made"
"""


@mark.parametrize("words, message", table(MARKS))
def test_a_mark_that_asks_for_what_is_not_there_is_refused(words, message, page, capsys):
    page.write_text(f"<!-- table: {words} -->\n<!-- end -->\n")
    assert call("--write") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_pictures_are_drawn_light_and_dark_the_same_each_time(page, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(results, "ASSETS", tmp_path)
    (tmp_path / "long.json").write_text(compare.as_json(ROWS[:2]))
    assert call("--draw") == 0
    drawn = {path.name: path.read_text("utf-8") for path in tmp_path.glob("*.svg")}
    pictures = ("compare.svg", "compare-dark.svg", "long.svg", "long-dark.svg")
    assert ["#0d1117" in drawn[name] for name in pictures] == [False, True] * 2
    assert ["opsd" in drawn[name] for name in pictures] == [True, True, False, False]
    call("--draw")
    assert {path.name: path.read_text("utf-8") for path in tmp_path.glob("*.svg")} == drawn
