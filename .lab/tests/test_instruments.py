"""Tests of bench, compare, plots and results."""

import json
import re
import sys
from pathlib import Path
from unittest.mock import Mock

import bench
import compare
import numpy as np
import player
import plots
import results
import torch
import variants
from pytest import approx, fixture, mark

import sdar
import test_sdar
from sdar import configure
from test_sdar import lines, small, table, trained

pytestmark = test_sdar.pytestmark


def call(instrument, *words):
    """The exit code of an instrument."""
    return sdar.run(lambda: instrument.main([*words]))


# --- Bench, intervals --------------------------------------------------------------------


def test_bench_names_its_parts_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(bench, "--tasks-per-step=2", "--group-size=2") == 0
    printed = "".join(capsys.readouterr())
    words = ("rollout", "teacher", "score", "update", "sampled tokens")
    assert [word for word in words if word not in printed] == []
    assert not re.search("GPU|CUDA|memory", printed)  # nobody asked for a card
    assert not list(tmp_path.iterdir())


def test_player_lists_the_actions_and_says_what_it_took(monkeypatch, capsys):
    keys = ["go to cabinet 3", "open cabinet 3", "take mug 1", "", "go to sofa 1"]
    typed = iter([*keys, "put mug 1 in sofa 1"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    monkeypatch.setenv("COLUMNS", "80")
    assert call(player, "toy", "--task", "put a mug in sofa 1") == 0
    printed = capsys.readouterr().out
    assert "\n(taken as: put mug 1 in/on sofa 1)\nYou put" in printed
    assert printed.count("go to desk 1") == 2  # at first, and after the empty line
    assert printed.endswith("\nafter 5 of 10 turns:\nwon\n")
    assert max(map(len, printed.splitlines())) <= 80


QUANTILES = """
2   12.706
3   4.303
5   2.776
30  2.045
"""


@mark.parametrize("n, quantile", table(QUANTILES))
def test_t_interval_agrees_with_the_tables(n, quantile):
    gains = np.arange(n, dtype=float)
    mean, low, high = compare.t_interval(gains)
    half = quantile * gains.std(ddof=1) / n**0.5
    assert (mean, mean - low, high - mean) == approx((gains.mean(), half, half), rel=3e-4)


# --- Compare -----------------------------------------------------------------------------


@fixture
def compared(tmp_path, monkeypatch, capsys):
    """compare without its training processes: a function from flags to (exit code, stdout, what was
    launched)."""
    launched = []

    def launch(run):
        """The files of a finished run, or a failure."""
        config, folder = run.config, Path(run.config.out)
        launched.append(folder.name)
        if config.method == "opsd" and config.seed == 1:
            return "exit code 1: out of luck"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(vars(config)))
        won = {"grpo": 2, "sdar": 3, "opsd": 0}[config.method] + config.seed
        won += config.gate_beta == 1
        line = {"step": 1, "eval_success": won / 6, "eval_by_type": {"put": [6, won, 6]}}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        return "exit code 0"

    def run(*flags):
        launched.clear()
        out = ["--out", str(tmp_path), "--steps", "1", "--seeds", "0,1"]
        code = call(compare, *out, *flags)
        return code, capsys.readouterr().out, sorted(launched)

    start = {"success": 0.0, "success_skill": 1.0, "episodes": 6, "by_type": {"put": [6, 0, 6]}}
    monkeypatch.setattr(compare, "launch", launch)
    monkeypatch.setattr(sdar, "load_policy", lambda config: (None, None))
    monkeypatch.setattr(sdar, "evaluate", lambda *args: start)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    return run


def rows_of(printed):
    """{label: its cells} of a printed table."""
    cells = [line[2:-2].split(" | ") for line in printed.splitlines() if line[:1] == "|"]
    return {label.strip(): [cell.strip() for cell in more] for label, *more in cells}


def test_compare_prints_means_gains_and_curves(compared):
    code, printed, launched = compared("--methods", "grpo,sdar")
    assert (code, launched) == (0, ["grpo-s0", "grpo-s1", "sdar-s0", "sdar-s1"])
    rows = rows_of(printed)
    head = ["runs", "put", "1 steps", "1 steps with the skill", "minus grpo, 95 %"]
    assert rows[""] == head
    share, skilled = "0.42 ± 0.12", "1.00 ± 0.00"  # 2/6 and 3/6
    assert rows["grpo"] == ["2", share, share, skilled, ""]
    assert rows["sdar"][-1] == "+0.17"  # every seed 1/6 ahead; two seeds make no interval
    assert "before training, alone: won 0.000 of 6 [0.00, 0.39]" in printed
    assert "before training, with the skill: won 1.000 of 6" in printed
    assert "4 of them to do: some 0 minutes" in printed
    assert "▁▅  0: 0.000  1: 0.583  sdar" in printed


def test_compare_keeps_what_a_table_was_made_from(compared, tmp_path):
    compared("--methods", "sdar", "--lr", "3e-3", "--variant", "std:off")
    text = (tmp_path / "compare.json").read_text()
    (row,) = json.loads(text)
    assert row["label"] == "sdar std:off"
    assert (row["settings"]["lr"], row["settings"]["variant"]) == (3e-3, ["std:off"])
    assert row["types"] == ["put"]
    assert row["runs"]["1"] == {"0": [[6, 0, 6]], "1": [[6, 4, 6]]}
    said = "compare.py --steps 1 --seeds 0,1 --methods sdar --lr 3e-3 --variant std:off"
    assert row["command"] == said
    assert str(tmp_path) not in text


def test_three_seeds_make_an_interval(compared):
    printed = compared("--methods", "grpo,sdar", "--seeds", "0,1,2")[1]
    assert rows_of(printed)["sdar"][-1] == "+0.17 [+0.17, +0.17]"


def test_compare_that_is_stopped_shows_what_is_there_and_goes_on(compared, monkeypatch, capsys):
    launch, folders = compare.launch, []

    def stop(run):
        if folders:
            raise KeyboardInterrupt
        folders.append(run.config.out)
        return launch(run)

    monkeypatch.setattr(compare, "launch", stop)
    code, printed, _ = compared("--methods", "grpo,sdar", "--jobs", "1")
    assert code == 130
    assert rows_of(printed)["grpo"][1] == "0.33 [0.10, 0.70]"  # its first seed, of 6 games
    monkeypatch.setattr(compare, "launch", launch)
    assert compared("--methods", "grpo,sdar")[2] == ["grpo-s1", "sdar-s0", "sdar-s1"]


def test_compare_goes_on_where_it_stopped(compared, tmp_path):
    printed = compared("--methods", "grpo,sdar")[1]
    (tmp_path / "sdar-s1/metrics.jsonl").write_text('{"step": ')  # killed while it wrote
    (tmp_path / "grpo-s0/metrics.jsonl").write_text("")
    code, again, launched = compared("--methods", "grpo,sdar", "--seeds", "0,1")
    assert code == 0
    assert launched == ["grpo-s0", "sdar-s1"]
    assert again.split("\n\n")[1:] == printed.split("\n\n")[1:]  # the same table and curves
    assert compared("--methods", "grpo,sdar")[2] == []


def test_compare_refuses_runs_of_other_settings_unless_told(compared, tmp_path):
    compared("--methods", "sdar")
    path = tmp_path / "sdar-s0/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lr": 1.0}))
    assert compared("--methods", "sdar")[0] == 2
    code, _, launched = compared("--methods", "sdar", "--overwrite")
    assert (code, launched) == (0, ["sdar-s0"])


def test_compare_reports_failures_and_the_rest(compared):
    code, printed, _ = compared("--methods", "grpo,opsd")
    rows = rows_of(printed)
    assert code == 1
    assert "opsd-s1 failed: exit code 1: out of luck" in printed
    assert rows["opsd"][1] == "0.00 [0.00, 0.39]"  # its other seed
    assert rows["grpo"][1] == "0.42 ± 0.12"
    assert compared("--methods", "opsd", "--seeds", "1")[0] == 1
    assert compared("--methods", "sdar", "--steps", "2")[0] == 1  # after one step they ended


def test_a_sweep_is_compared_with_grpo(compared, tmp_path):
    compared("--methods", "sdar,grpo")
    flags = ("--teacher", "live", "--rollout-batch", "9")
    code, printed, launched = compared("--sweep", "gate_beta=1,5", *flags)
    assert code == 0
    assert launched == ["sdar-gate_beta=1.0-s0", "sdar-gate_beta=1.0-s1"]  # the rest was there
    assert rows_of(printed)["sdar gate_beta=1.0"][-1] == "+0.33"
    assert (tmp_path / "compare-gate_beta.json").exists()


LAUNCHED = """
"gate_beta=1|--distil=gate"             "grpo-s0 sdar-gate_beta=1.0-s0"
"gate_beta=1|--retrieval=ucb"           "grpo-s0 sdar-gate_beta=1.0-s0"
"gate_beta=1|--variant=divergence:jsd"  "grpo-s0 sdar-gate_beta=1.0-divergence-jsd-s0"
"gate_beta=1,5 lr=1e-2"                 "grpo-s0 sdar-gate_beta=1.0-lr=0.01-s0 sdar-lr=0.01-s0"
"gate_beta=1|--method=opsd"             "grpo-s0 opsd-gate_beta=1.0-s0"
"lr=6e-4,1e-3|--method=grpo"            "grpo-lr=0.0006-s0 grpo-s0"
"variant=none,std:off,gate:own+std:off"  "grpo-s0 sdar-gate-own-std-off-s0 sdar-s0 sdar-std-off-s0"
"""


@mark.parametrize("sweep, names", table(LAUNCHED))
def test_a_sweep_runs_all_combinations_and_grpo(sweep, names, compared):
    """GRPO once, and with no setting of the teacher."""
    code, _, launched = compared("--seeds", "0", "--sweep", *sweep.split("|"))
    assert (code, launched) == (0, names.split())


REFUSED = """
"compare|--sweep|gate_beta=1,1 lr=1e-4"          "1,1: one is there twice"
"compare|--sweep|gate_beta=1 out=2"              "--out cannot be swept"
"compare|--sweep|gate_beta=1 gate-beta=2"        "--gate-beta cannot be swept, or is there twice"
"compare|--sweep|beta=1"                         "--beta cannot be swept"
"compare|--sweep|lr=1e-4|--lr|1e-3"              "--lr cannot be swept"
"compare|--sweep|lr=1e-4|--methods|sdar"         "not allowed with argument"
"compare|--methods|sdar|--method|sdar"           "--method cannot be swept"
"compare|--methods|sdar,nobody"                  "--method 'nobody': known are"
"compare|--seeds|0,x"                            "--seed 'x'"
"compare|--seed|3"                               "compare takes --seeds"
"compare|--resume"                               "goes on without --resume"
"compare|--steps|0"                              "--steps 0: there is nothing to compare"
"compare|--jobs|-1"                              "--jobs -1: must be at least 1"
"compare|--methods|sdar|--variant|nothing:here"  "nothing:here"
"compare|--methods|grpo|--variant|gate:centred"  "grpo"
"plots"                                          "required: runs"
"plots|none0"                                    "none0: no run there has finished a step"
"plots|nowhere"                                  "nowhere holds no run"
"plots|a-s0|--picture|no/p.png"                  "no file can be written there"
"plots|a-s0|--picture|p.txt"                     "its name must end in .svg"
"""


@mark.parametrize("words, message", table(REFUSED))
def test_bad_input_is_refused_in_one_line(words, message, runs, capsys):
    instrument, *flags = words.split("|")
    assert call(globals()[instrument], *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not Path("runs").exists()


def test_compare_trains_what_train_trains(tmp_path, monkeypatch):
    """With a variant, too; and the code that was called, not what stands in the current folder
    under the same names."""
    for name in ("sdar", "envs", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('another one')")
    monkeypatch.chdir(tmp_path)
    flags = ["--steps", "1", "--tasks-per-step", "2", "--group-size", "4", "--rollout-batch", "8"]
    flags += ["--eval-episodes", "6", "--eval-every", "0", "--seeds", "3"]
    assert call(compare, "--sweep", "variant=none,divergence:forward", "--out", "all", *flags) == 0
    plain = trained(tmp_path, seed=3, steps=1)[1]
    hooks = variants.hooks(["divergence:forward"])
    changed = trained(tmp_path, "changed", hooks, seed=3, steps=1)[1]
    assert lines("all/sdar-s3") == plain
    assert lines("all/sdar-divergence-forward-s3") == changed != plain

    (row, other) = json.loads(Path("all/compare-variant.json").read_text())[1:]
    assert row["runs"]["3"]["1"] == [*plain[-1]["eval_by_type"].values()]
    made = (row["made"], other["made"])
    assert made == (compare.origin("cpu"),) * 2
    assert compare.processor("cpu") in made[0] and torch.__version__.split("+")[0] in made[0]

    monkeypatch.setattr(results, "DATA", tmp_path)
    monkeypatch.setattr(results, "PAGES", [tmp_path / "PAGE.md"])
    Path("PAGE.md").write_text("<!-- table: tiny: 0 steps, 1 steps -->\n<!-- end -->\n")
    assert call(results, "--join", "tiny", "all/compare-variant.json", "--write") == 0
    assert call(results, "--check") == 0
    cells = rows_of(Path("PAGE.md").read_text())["sdar divergence:forward"]
    assert cells[2].startswith(f"{changed[-1]['eval_success']:.2f} [")


def test_compare_never_takes_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    config = small(tmp_path, "")
    assert compare.finished(config) == []
    assert "is not empty" in compare.launch(compare.Run("sdar", config, []))
    assert (tmp_path / "notes.txt").read_text() == "mine"


# --- Plots -------------------------------------------------------------------------------


RUNS = """
"a-s0"   0.25  3  0.1
"a-s1"   0.75  2  0.1
"b-s0"   1.0   3  1.0
"none0"  0.0   0  0.1
"""


@fixture
def runs(tmp_path, monkeypatch):
    """The current folder, with runs to draw: two seeds, another setting, one without a step."""
    monkeypatch.chdir(tmp_path)
    for name, success, steps, lr in table(RUNS):
        Path(name).mkdir()
        config = configure(out=name, lr=lr, seed=int(name[-1]))
        Path(name, "config.json").write_text(json.dumps(vars(config)))
        rows = [{"step": n, "success": success, "kl": n / 7} for n in range(1, steps + 1)]
        Path(name, "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_plot_joins_seeds_and_leaves_out_what_is_not_there(runs, capsys):
    Path("none0").rename("a-s2")  # it has only begun
    assert call(plots, *"a-s0 a-s1 a-s2 b-s0 --picture p.png".split()) == 0
    printed = capsys.readouterr().out
    assert "▅▅   1: 0.500  2: 0.500  3:     -  a (2 seeds)\n" in printed
    assert "███  1: 1.000  2: 1.000  3: 1.000  b (one seed)\n" in printed
    assert "mean gap" not in printed
    assert "KL\n▁▄   1: 0.143  2: 0.286  3:     -  a (2 seeds)\n▁▄█  1" in printed
    assert Path("p.png").exists() == ("no picture" not in printed)


def test_a_method_has_one_colour_and_each_row_its_line():
    labels = [
        "grpo",
        "sdar teacher=frozen",
        "toy-sdar",
        "a",
        "b",
        *(f"sdar lr={n}" for n in "12345"),
    ]
    looks = plots.looks_of(labels)
    known = {**plots.looks_of(sdar.METHODS), **plots.looks_of(["house"])}
    for label, name in zip(labels, ["grpo", "sdar", "sdar", "house", None, *["sdar"] * 5]):
        assert name is None or looks[label]["color"] == known[name]["color"]
    assert looks["toy-sdar"] == known["sdar"]  # in any company
    for some in (looks, known):
        assert len({str(look) for look in some.values()}) == len(some)


def test_a_band_has_its_lines_colour():
    axes = Mock()
    curves = {name: np.zeros((2, 3, 2)) for name in ("skill_sd", "sdar", "opsd", "grpo")}
    plots.draw_panel(axes, "success", curves)
    bands = [call.kwargs["color"] for call in axes.fill_between.call_args_list]
    assert bands == [plots.COLOURS[name][0] for name in ("sdar", "grpo")]


def test_plot_keeps_other_settings_apart(runs, capsys):
    Path("b-s0").rename("a-s2")
    assert call(plots, "a-s0", "a-s1", "a-s2") == 0
    printed = capsys.readouterr().out
    assert "▅▅   1: 0.500  2: 0.500  3:     -  a-s0 (2 seeds)\n" in printed
    assert "███  1: 1.000  2: 1.000  3: 1.000  a-s2 (one seed)\n" in printed


def test_plot_draws_what_is_not_finite_as_a_gap(runs, capsys):
    log = Path("b-s0/metrics.jsonl")
    rows = log.read_text().replace('"success": 1.0, "kl": 0.2', '"success": NaN, "kl": 0.2')
    log.write_text(rows)
    assert call(plots, "b-s0") == 0
    assert "██  1: 1.000  3: 1.000  b (one seed)\n" in capsys.readouterr().out


TORN = """
'{'                                                                        "holds no run"
'[]'                                                                       "holds no run"
'{"step": 2, "success": 1.0}'                                              "line 1 is of step 2"
'{"step": 1, "success": "1"}'                                              "success is '1'"
'{"step": 1, "eval_success": 1.0}'                                         "no eval_by_type"
'{"step": 1, "eval_success": 1.0, "eval_by_type": {"put": [1, 2, 1]}}'     "no table of counts"
"""


@mark.parametrize("line, message", table(TORN))
def test_plot_refuses_lines_that_are_no_step(line, message, runs, capsys):
    Path("a-s0/metrics.jsonl").write_text(line + "\n")
    assert call(plots, "a-s0") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
