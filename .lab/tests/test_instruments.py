"""Tests of bench, compare, plots, player and probe, and what instruments refuse."""

import json
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import Mock

import compare
import numpy as np
import plots
import variants
from conftest import call, refused
from pytest import fixture, mark

import sdar
from test_sdar import lines, table, trained


def test_bench_names_the_parts_of_a_step(capsys):
    assert call("bench", "--tasks-per-step=2", "--group-size=2") == 0
    printed = capsys.readouterr().out
    parts = re.findall(r"^(\w+) +\d+\.\d\d s +\d+%", printed, re.MULTILINE)
    assert sorted(parts) == ["rollout", "score", "teacher", "update"]
    assert not re.search("GPU|CUDA|memory", printed)  # nobody asked for a card


def test_player_lists_the_actions_and_says_how_to_leave(monkeypatch, capsys):
    keys = ["go to cabinet 3", "open cabinet 3", "take mug 1", "", "go to sofa 1"]
    monkeypatch.setattr("builtins.input", Mock(side_effect=[*keys, "put mug 1 in sofa 1"]))
    assert call("player", "toy", "--task", "put a mug in sofa 1") == 0
    printed = capsys.readouterr().out
    assert "Ctrl-D leaves" in printed.split("You are in the middle of a room")[0]
    assert printed.count("go to desk 1") == 2  # at first, and after the empty line
    assert "\n(taken as: put mug 1 in/on sofa 1)\nYou put" in printed
    assert printed.endswith("\nafter 5 of 10 turns:\nwon\n")


def test_a_probe_looks_at_what_was_trained_and_keeps_what_it_saw(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = "--tasks-per-step 2 --G 4 --eval-episodes 6 --rollout-batch 8 --lr 3e-3"
    assert call("probe", *f"--steps 0,2 --json a.json --out run {size}".split()) == 0
    (run,) = json.loads(Path("a.json").read_text()).values()
    first, last = [look["alone"] for look in run["looks"]]
    assert first != last


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
    out, flags = tmp_path_factory.mktemp("all"), ["--sweep", "variant=none,divergence:forward"]
    assert compared(out, *flags) == (0, ROWS)
    return out, flags


def test_compare_trains_what_train_trains_and_keeps_the_counts(sweep, tmp_path):
    size = {"seed": 3, "steps": 1, "max_turns": 2, "eval_every": 10}
    plain = trained(tmp_path, **size)[1]
    changed = trained(tmp_path, "changed", variants.hooks(["divergence:forward"]), **size)[1]
    assert lines(sweep[0] / "sdar-s3") == plain
    assert lines(sweep[0] / "sdar-divergence-forward-s3") == changed != plain
    _, row, other = json.loads((sweep[0] / "compare-variant.json").read_text())
    assert row["runs"]["3"]["1"] == [*plain[0]["eval_by_type"].values()]
    assert row["made"] == other["made"] == compare.origin("cpu")


def test_compare_goes_on_with_what_is_not_there(sweep, monkeypatch):
    out, flags = sweep
    launch, launched = compare.launch, []
    monkeypatch.setattr(compare, "launch", lambda run: launched.append(run.label) or launch(run))
    (out / "sdar-s3/metrics.jsonl").write_text('{"step": ')  # killed while it wrote
    assert compared(out, *flags) == (0, ROWS)
    assert launched == ["sdar"]
    assert compared(out, *flags, "--lr", "1e-3") == (2, [])  # runs of other settings


LAUNCHED = """
"gate_beta=1|--retrieval=ucb"            "grpo-s3 sdar-gate_beta=1.0-s3"
"gate_beta=1,5 lr=1e-2"                  "grpo-s3 sdar-gate_beta=1.0-lr=0.01-s3 sdar-lr=0.01-s3"
"lr=6e-4,1e-3|--method=grpo"             "grpo-lr=0.0006-s3 grpo-s3"
"variant=none,std:off,gate:own+std:off"  "grpo-s3 sdar-gate-own-std-off-s3 sdar-s3 sdar-std-off-s3"
"""


@mark.parametrize("sweep, names", table(LAUNCHED))
def test_a_sweep_runs_all_combinations_and_grpo_once(sweep, names, tmp_path, monkeypatch):
    launched = []
    monkeypatch.setattr(compare, "launch", lambda run: launched.append(Path(run.config.out).name))
    assert compared(tmp_path, "--sweep", *sweep.split("|")) == (1, [])
    assert sorted(launched) == names.split()


# --- Plots -------------------------------------------------------------------------------


def test_plot_joins_seeds_and_keeps_other_settings_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    changes = {"a-s0": {}, "a-s1": {"seed": 1}, "a-s2": {"lr": 1e-3}}
    first, second, other = [trained(Path(), run, **changes[run])[0]["loss"] for run in changes]
    assert call("plots", *changes, "--picture", "p.png") == 0
    printed = capsys.readouterr().out
    joined, apart = printed.split("\nloss\n")[1].splitlines()[:2]
    assert joined.endswith(f"2: {(first + second) / 2:.3f}  a (2 seeds)")
    assert apart.endswith(f"2: {other:.3f}  a-s2")
    assert Path("p.png").exists() == ("no picture" not in printed)


def test_a_method_has_one_colour_each_row_its_line_and_a_band_the_lines_colour():
    labels = ["a", "b", "sdar teacher=frozen", *(f"sdar lr={n}" for n in "12345"), *sdar.METHODS]
    looks, axes = plots.looks_of(labels), Mock()
    assert len({str(look) for look in looks.values()}) == len(labels)
    assert looks["sdar lr=3"]["color"] == looks["sdar"]["color"]
    assert plots.looks_of(["toy-sdar"])["toy-sdar"] == looks["sdar"]  # in any company
    plots.draw_panel(axes, "success", dict.fromkeys(looks, np.zeros((2, 3, 2))), looks)
    bands = [band.kwargs["color"] for band in axes.fill_between.call_args_list]
    assert bands == [looks[name]["color"] for name in ("sdar", "grpo")]
