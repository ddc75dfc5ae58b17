"""Tests of bench, compare, plots and player."""

import json
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import Mock

import compare
import plots
import variants
from conftest import call
from pytest import fixture, mark

import sdar
from test_sdar import lines, noted, table, trained


def test_bench_names_the_parts_of_a_step(capsys):
    assert call("bench", "--tasks-per-step=2", "--group-size=2") == 0
    printed = capsys.readouterr().out
    parts = re.findall(r"^(\w+) +[\d.]*[1-9][\d.]* s +\d+%", printed, re.MULTILINE)
    assert sorted(parts) == ["rollout", "score", "teacher", "update"]


def test_player_lists_the_actions_and_says_how_to_leave(monkeypatch, capsys):
    keys = ["go to cabinet 3", "open cabinet 3", "Take mug 1", "", "go to sofa 1"]
    monkeypatch.setattr("builtins.input", Mock(side_effect=[*keys, "put mug 1 in sofa 1"]))
    assert call("player", "toy", "--task", "put a mug in sofa 1") == 0
    printed = capsys.readouterr().out
    assert "Ctrl-D leaves" in printed
    assert printed.count("go to desk 1") == 2  # at first, and after the empty line
    assert "\nYou put mug 1 in/on sofa 1." in printed
    assert printed.endswith("\nafter 5 of 10 turns:\nwon\n")


# --- Compare -----------------------------------------------------------------------------

ROWS = ["grpo", "sdar", "sdar divergence:forward"]
SIZE = (
    "--seeds 3 --steps 1 --tasks-per-step 2 --G 4 --rollout-batch 8 --eval-episodes 6 --max-turns 2"
)


def compared(out, *flags):
    """(exit code, labels of the table's rows) of a small comparison."""
    said = StringIO()
    with redirect_stdout(said):
        code = call("compare", "--out", out, *SIZE.split(), *flags)
    return code, re.findall(r"\| (\w.*?) +\| 1 +\|", said.getvalue())


@fixture(scope="module")
def sweep(tmp_path_factory):
    """(folder, flags) of three runs."""
    out = tmp_path_factory.mktemp("all")
    flags = ["--sweep", "variant=none,divergence:forward"]
    assert compared(out, *flags) == (0, ROWS)
    return out, flags


def test_compare_trains_what_train_trains_and_keeps_the_counts(sweep, tmp_path):
    hooks = variants.hooks(["divergence:forward"])
    _, log = trained(tmp_path, hooks=hooks, seed=3, steps=1, max_turns=2, eval_every=10)
    run = sweep[0] / "sdar-divergence-forward-s3"
    assert lines(run) == log != lines(sweep[0] / "sdar-s3")
    (row,) = json.loads((run / "rows.json").read_text())
    assert row["runs"]["3"] == {"1": [*log[0]["eval_by_type"].values()]}
    assert re.match("commit .*, .*, torch .*, transformers .*, numpy", row["made"])


def test_compare_goes_on_with_what_is_not_there(sweep, monkeypatch):
    out, flags = sweep
    launched = noted(monkeypatch, compare, "launch", lambda run: run.label)
    (out / "sdar-s3/rows.json").unlink()  # killed before it was whole
    assert compared(out, *flags) == (0, ROWS)
    assert launched == ["sdar"]
    assert call("compare", "--out", out, *SIZE.split(), *flags, "--lr", "1e-3") == 2


LAUNCHED = """
"gate_beta=1|--retrieval=ucb"            "grpo-s3 sdar-gate_beta=1.0-s3"
"gate_beta=1,5 lr=1e-2"                  "grpo-s3 sdar-gate_beta=1.0-lr=0.01-s3 sdar-lr=0.01-s3"
"lr=6e-4,1e-3|--method=grpo"             "grpo-lr=0.0006-s3 grpo-s3"
"variant=none,std:off,gate:own+std:off"  "grpo-s3 sdar-gate-own-std-off-s3 sdar-s3 sdar-std-off-s3"
"""


@mark.parametrize("sweep, names", table(LAUNCHED))
def test_a_sweep_runs_all_combinations_and_grpo_once(sweep, names, tmp_path, monkeypatch):
    launch = Mock()
    monkeypatch.setattr(compare, "launch", launch)
    assert compared(tmp_path, "--sweep", *sweep.split("|")) == (1, [])
    launched = [Path(call.args[0].config.out).name for call in launch.mock_calls]
    assert sorted(launched) == names.split()


# --- Plots -------------------------------------------------------------------------------


def test_plot_joins_seeds_and_keeps_other_settings_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first = trained(Path(), "a-s0")[0]["loss"]
    second = trained(Path(), "a-s1", seed=1)[0]["loss"]
    other = trained(Path(), "a-s2", lr=1e-3)[0]["loss"]
    assert call("plots", "a-s0", "a-s[12]", "--picture", "p.png") == 0
    printed = capsys.readouterr().out
    joined, apart = printed.split("\nloss\n")[1].splitlines()[:2]
    assert joined.endswith(f"2: {(first + second) / 2:.3f}  a (2 seeds, ± sd)")
    assert apart.endswith(f"2: {other:.3f}  a-s2")
    assert Path("p.png").exists() == ("no picture" not in printed)
