"""Tests of bench, compare, plots and pictures."""

import json
import sys
from pathlib import Path

import bench
import compare
import numpy as np
import pictures
import plots
import pytest
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
    monkeypatch.setattr(bench, "SECONDS", 1e-3)
    monkeypatch.setattr(bench, "ROWS", 64)
    monkeypatch.chdir(tmp_path)
    assert call(bench, "--tasks-per-step=2", "--group-size=2") == 0
    printed = capsys.readouterr().out
    words = ("rollout", "teacher", "score", "update", "sampled tokens", "plain", "chunked")
    assert [word for word in words if word not in printed] == []
    assert not list(tmp_path.iterdir())


QUANTILES = """
2   12.706
3   4.303
5   2.776
30  2.045
"""


@mark.parametrize("n, quantile", table(QUANTILES))
def test_t_interval_agrees_with_the_tables(n, quantile):
    gains = np.arange(n, dtype=float)
    low, high = compare.t_interval(gains)
    half = quantile * gains.std(ddof=1) / n**0.5
    assert (gains.mean() - low, high - gains.mean()) == approx((half, half), rel=3e-4)


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
            return config.out, "exit code 1: out of luck"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(vars(config)))
        won = {"grpo": 2, "sdar": 3, "opsd": 0}[config.method] + config.seed
        won += config.gate_beta == 1
        line = {"step": 1, "eval_success": won / 6, "eval_by_type": {"put": [6, won, 6]}}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        return config.out, "exit code 0"

    def run(*flags):
        launched.clear()
        out = ["--out", str(tmp_path), "--steps", "1", "--seeds", "0,1"]
        code = call(compare, *out, *flags)
        return code, capsys.readouterr().out, sorted(launched)

    start = {"success": 0.0, "by_type": {"put": [6, 0, 6]}}
    monkeypatch.setattr(compare, "launch", launch)
    monkeypatch.setattr(sdar, "load_policy", lambda config: (None, None))
    monkeypatch.setattr(sdar, "evaluate", lambda *args: start)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    return run


def rows_of(printed):
    """{title: line} of a printed table."""
    filled = [line for line in printed.splitlines() if line and line[0] not in " ▁▂▃▄▅▆▇█"]
    return {line.split()[0]: line for line in filled}


def test_compare_prints_means_gains_and_curves(compared):
    code, printed, launched = compared("--methods", "grpo,sdar")
    assert (code, launched) == (0, ["grpo-s0", "grpo-s1", "sdar-s0", "sdar-s1"])
    rows = rows_of(printed)
    assert "0.42±0.12" in rows["grpo"]  # 2/6 and 3/6
    assert "teacher 1.00  minus grpo +0.167" in rows["sdar"]  # every seed 1/6 ahead
    assert "+0.167 [" not in rows["sdar"]  # two seeds make no interval
    assert "0/6 [0.00, 0.39]" in rows["vanilla"]
    assert "teacher 1.00" in rows["vanilla"]
    assert "▁▅  0: 0.000  1: 0.583  sdar" in printed


def test_compare_keeps_what_a_table_was_made_from(compared, tmp_path):
    compared("--methods", "sdar", "--lr", "3e-3", "--variant", "std:off")
    text = (tmp_path / "compare.json").read_text()
    report = json.loads(text)
    row = report["rows"]["sdar std:off"]
    assert (row["settings"]["lr"], row["settings"]["variant"]) == (3e-3, ["std:off"])
    line = {"step": 1, "eval_success": 4 / 6, "eval_by_type": {"put": [6, 4, 6]}}
    assert row["seeds"]["1"] == [line]
    assert report["processor"] and report["versions"]["torch"] in torch.__version__
    assert str(tmp_path) not in text


def test_three_seeds_make_an_interval(compared):
    printed = compared("--methods", "grpo,sdar", "--seeds", "0,1,2")[1]
    assert "minus grpo +0.167 [+0.17, +0.17]" in rows_of(printed)["sdar"]


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
    assert "seed 1 failed: exit code 1: out of luck" in rows["opsd"]
    assert "0/6 [0.00, 0.39]" in rows["opsd"]  # its other seed
    assert "0.42±0.12" in rows["grpo"]
    assert compared("--methods", "opsd", "--seeds", "1")[0] == 1
    assert compared("--methods", "sdar", "--steps", "2")[0] == 1  # after one step they ended


def test_a_sweep_is_compared_with_grpo(compared, tmp_path):
    compared("--methods", "sdar,grpo")
    flags = ("--teacher", "live", "--rollout-batch", "9")
    code, printed, launched = compared("--sweep", "gate_beta=1,5", *flags)
    assert code == 0
    assert launched == ["sdar-gate_beta=1.0-s0", "sdar-gate_beta=1.0-s1"]  # the rest was there
    assert "minus grpo +0.333" in printed
    assert "sdar gate_beta=1.0 " in printed
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
"pictures|nothing.json"                          "nothing.json cannot be drawn"
"pictures|a-s0/config.json|--map"                "a-s0/config.json cannot be drawn"
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


def test_compare_never_takes_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    config = small(tmp_path, "")
    assert compare.finished(config) == []
    assert "is not empty" in compare.launch(compare.Run("sdar", config, []))[1]
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
    assert call(plots, *"a-s0 a-s1 b-s0 --picture p.png".split()) == 0
    printed = capsys.readouterr().out
    assert "▅▅  1: 0.500  2: 0.500  a\n███  1: 1.000  2: 1.000  3: 1.000  b\n" in printed
    assert "mean gap" not in printed
    assert "KL\n▁▄  1" in printed
    assert Path("p.png").exists() == ("no picture" not in printed)


def test_plot_keeps_other_settings_apart(runs, capsys):
    Path("b-s0").rename("a-s2")
    assert call(plots, "a-s0", "a-s1", "a-s2") == 0
    printed = capsys.readouterr().out
    assert "▅▅  1: 0.500  2: 0.500  a-s0\n███  1: 1.000  2: 1.000  3: 1.000  a-s2\n" in printed


def test_plot_draws_what_is_not_finite_as_a_gap(runs, capsys):
    log = Path("b-s0/metrics.jsonl")
    rows = log.read_text().replace('"success": 1.0, "kl": 0.2', '"success": NaN, "kl": 0.2')
    log.write_text(rows)
    assert call(plots, "b-s0") == 0
    assert "██  1: 1.000  3: 1.000  b\n" in capsys.readouterr().out


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


# --- Pictures ----------------------------------------------------------------------------


def write_report(path, rows):
    """A file as compare writes it, of rows (label, settings, a run's success): the teacher wins
    half of the games more."""
    start, *lines = [
        {
            "step": 10,
            "eval_success": success,
            "eval_success_skill": 0.5 + success,
            "eval_by_type": {"put": [10, 1, 5]},
        }
        for success in (0.1, *(success for _, _, success in rows))
    ]
    report = {"start": start | {"step": 0}, "rows": {}}
    for (label, settings, _), line in zip(rows, lines):
        report["rows"][label] = {"settings": settings, "seeds": {"0": [line]}, "failed": {}}
    path.write_text(json.dumps(report))
    return str(path)


def test_the_pages_pictures_are_drawn_from_a_comparison(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [("sdar", {}, 0.5), ("grpo", {}, 0.4), ("rlsd", {}, 0.3)]
    flags = [write_report(tmp_path / "compare.json", rows), "--place", str(tmp_path)]

    def drawn(name, *more):
        assert call(pictures, *flags, "--name", name, *more) == 0
        return [(tmp_path / f"{name}{dark}.svg").read_text("utf-8") for dark in ("", "-dark")]

    both = drawn("compare")
    assert ["#0d1117" in text for text in both] == [False, True]
    assert drawn("again") == both  # the same bytes
    assert ["rlsd" in text for text in both + drawn("two", "--rows", "sdar,grpo")] == [1, 1, 0, 0]


MAP = """
"live"    1.0  1e-3  0.10
"frozen"  1.0  1e-3  0.20
"frozen"  1.0  2e-3  0.30
"frozen"  2.0  1e-3  0.40
"""


def test_a_map_shows_student_and_teacher_of_each_setting(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    panels, draw = {}, pictures.draw_cells

    def noted(axes, title, *more):
        draw(axes, title, *more)
        texts = {text.get_position(): text.get_text() for text in axes.texts}
        panels[title] = [texts.get((x, y)) for y in (0, 1) for x in (0, 1)]
        assert axes.get_ylim()[0] < axes.get_ylim()[1]  # a larger lambda is above

    monkeypatch.setattr(pictures, "draw_cells", noted)
    reports = []
    for teacher, coef, lr, success in table(MAP):
        settings = {"teacher": teacher, "sdar_coef": coef, "lr": lr, "variant": []}
        label = f"sdar {teacher} {coef} {lr}"
        rows = [(label, {**settings, "distil": "gate"}, success)]
        rows.append(("grpo", {**settings, "distil": "none"}, 0.45))
        reports.append(write_report(tmp_path / f"{label}.json", rows))
    assert call(pictures, *reports, "--map", "--place", str(tmp_path)) == 0
    assert panels == {
        "frozen, alone": ["0.20", "0.30", "0.40", "nan"],  # learning rates, then a lambda above
        "live, alone": ["0.10", "nan", "nan", "nan"],
        "frozen, with the skill": ["0.70", "0.80", "0.90", "nan"],
        "live, with the skill": ["0.60", "nan", "nan", "nan"],
    }
