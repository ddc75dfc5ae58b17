"""Other people's machines, as far as they can be played here: Windows' streams, line ends, paths
and open files, processes that are not forked, a graphics card without float64."""

import io
import json
import os
import shutil
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path, PosixPath
from unittest.mock import Mock

import alfworld_games
import memory
import microscope
import player
import plots
import torch
from conftest import ROOT
from pytest import approx, importorskip, mark, raises
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import envs
import sdar
from test_sdar import DATA, lines, small, trained

FEW = "--steps 1 --tasks-per-step 2 --group-size 2 --eval-episodes 2 --eval-every 0".split()


def test_every_character_is_printed_somehow(tmp_path, monkeypatch):
    """On a console that has 250 characters, and raises on any other."""
    written = io.BytesIO()
    console = io.TextIOWrapper(written, "cp1252", "strict", write_through=True)
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setattr(sys, "argv", ["sdar.py"])
    with raises(SystemExit, match="0"):
        sdar.main(["--help"])
    run = tmp_path / "ein Lauf \u2192 \u6f22"
    assert sdar.main([*FEW, "--out", str(run)]) == 0
    commands = {
        plots: [str(run), "--picture", f"{run}.svg"],
        microscope: [*FEW, "--page", f"{run}.html"],
        player: ["toy", "--skill"],
    }
    monkeypatch.setattr("builtins.input", Mock(side_effect=["look", EOFError]))
    for command, argv in commands.items():
        assert not sdar.run(lambda command=command, argv=argv: command.main(argv))
    assert all(
        text in written.getvalue() for text in (b"--help", b"\\u6f22", b"\\u2588", b"stopped")
    )


def with_line_ends(file, copy):
    copy.parent.mkdir(parents=True, exist_ok=True)
    raw = file.read_bytes()
    text = b"\0" not in raw  # as git tells
    copy.write_bytes(raw.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n") if text else raw)


def test_a_checkout_with_windows_line_ends_trains_the_same(tmp_path):
    folder = tmp_path / "checkout"
    files = [ROOT / "sdar.py", ROOT / "envs.py", ROOT / ".assets" / "environments.json"]
    for file in [*files, *ROOT.glob(".assets/tiny-policy/*")]:
        with_line_ends(file, folder / file.relative_to(ROOT))
    command = [sys.executable, "sdar.py", *FEW, "--out", "run", "--max-turns", "4"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    size = {"steps": 1, "group_size": 2, "eval_episodes": 2, "rollout_batch": 64, "max_turns": 4}
    assert lines(folder / "run") == trained(tmp_path, **size)[1]


def test_files_with_windows_line_ends_and_mark_say_the_same(tmp_path):
    skills, questions = tmp_path / "skills.json", DATA / "questions.jsonl"
    skills.write_text(json.dumps([{"name": "a", "text": "One.\nTwo."}], indent=1), "utf-8")
    for read, file in ((envs.load_skills, skills), (envs.SearchEnv.questions, questions)):
        copy = tmp_path / "windows"
        with_line_ends(file, copy)
        copy.write_bytes("\ufeff".encode() + copy.read_bytes())
        assert read(copy) == read(file)


def test_a_log_with_windows_line_ends_is_drawn_and_resumed(tmp_path):
    last = trained(tmp_path, "whole")[1][-1]
    trained(tmp_path, steps=1)
    for name in ("metrics.jsonl", "config.json"):
        with_line_ends(tmp_path / "run" / name, tmp_path / "run" / name)
    assert plots.read_run(tmp_path / "run")[1][0]["step"] == 1
    assert trained(tmp_path, resume=True)[1][-1] == last


class Backslashed(PosixPath):
    """A path that writes itself as Windows does."""

    def __str__(self):
        return super().__str__().replace("/", "\\")


@mark.parametrize("name", ["Qwen/Qwen3-0.6B", "./start", "runs/warm/checkpoint"])
def test_a_models_name_stays_as_it_was_typed(name, monkeypatch):
    import transformers

    asked = Mock(side_effect=OSError("no such model"))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", asked)
    monkeypatch.setattr(sdar, "Path", Backslashed)
    with raises(sdar.UserError, match=f"--model {name} cannot be used.*no such model"):
        sdar.load_policy(sdar.configure(model=name, device="cpu"))
    asked.assert_called_once_with(name)


def test_a_state_that_another_program_holds_open_is_one_line(tmp_path, monkeypatch, capsys):
    """Windows replaces no open file. The state from before stays, and is gone on with."""
    last = trained(tmp_path, "whole")[1][-1]
    trained(tmp_path, steps=1)
    config = small(tmp_path, resume=True)
    with monkeypatch.context() as held:
        held.setattr("os.replace", Mock(side_effect=PermissionError(13, "Access is denied")))
        assert sdar.run(lambda: sdar.train(config)) == 2
    assert "Access is denied" in capsys.readouterr().err.strip().split("\n")[-1]
    sdar.train(config)
    assert lines(config.out)[-1] == last


def test_a_folder_that_may_not_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.mkdir", Mock(side_effect=PermissionError(13, "Read-only", "runs")))
    assert sdar.main([*FEW, "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.endswith("[Errno 13] Read-only: 'runs'\n")


def test_a_machine_without_a_home_folder(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", Mock(side_effect=KeyError))
    assert sdar.configure(model="~/m").model == "~/m"


def games_of(processes, folder, monkeypatch):
    """What ALFWorld says to a few actions, in processes that are begun in this way."""
    monkeypatch.setattr(envs, "get_context", lambda *way: get_context(processes))
    envs.game_process.cache_clear()
    env = envs.AlfworldEnv(data=str(folder))
    task = env.tasks("train")[0]
    return [env.reset(task), env.step("look"), env.step("inventory")]


def test_games_need_no_fork(tmp_path, monkeypatch):
    """macOS spawns its processes, and Windows has no other way."""
    importorskip("alfworld")
    alfworld_games.write_games(tmp_path)
    forked, spawned = [games_of(way, tmp_path, monkeypatch) for way in ("fork", "spawn")]
    assert forked == spawned
    envs.game_process.cache_clear()


class NoFloat64(TorchDispatchMode):
    """As on Apple's graphics cards, which have none."""

    resting = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        kinds = {tensor.dtype for tensor in tree_leaves(result) if hasattr(tensor, "dtype")}
        assert self.resting or torch.float64 not in kinds, function
        return result


@mark.parametrize("method", ["sdar", "rlsd", "skill_sd"])
def test_nothing_on_the_device_is_float64(method, tmp_path, monkeypatch):
    card, right = NoFloat64(), sdar.group_advantages

    def on_cpu(rewards):
        assert rewards.device.type == "cpu"  # it was made there
        card.resting = True
        advantages = right(rewards)
        card.resting = False
        return advantages

    monkeypatch.setattr(sdar, "group_advantages", on_cpu)
    with card:
        trained(tmp_path, steps=1, method=method)


def test_bytes_are_counted_while_they_live():
    with memory.Tracker() as tracker:
        kept = torch.zeros(1000)
        part = kept[1:].view(-1)
        torch.zeros(500)
    assert (tracker.live, tracker.peak) == (4000, 6000), part.shape


def test_checkpointing_makes_a_pass_smaller_and_more_tokens_a_larger_one(monkeypatch, capsys):
    monkeypatch.setattr(memory, "SHAPES", {"small": ("qwen2", 1024, 4096, 8, 8, 2)})
    sizes = []
    for flags in ("--no-gradient-checkpointing", "--tokens 4000", "--tokens 2000"):
        memory.main(["--preset", "small", *flags.split()])
        sizes.append([float(size) for size in capsys.readouterr().out.split()[-5:]])
    state, _, _, cache, _ = sizes[0]
    layer = 2 * 1024**2 + 2 * 1024 * 256 + 3 * 1024 * 4096  # q and o, k and v, the MLP
    assert state == approx(16 * (151936 * 1024 + 8 * layer) / 1e9, abs=0.06)  # 4 numbers of each
    assert cache == approx(64 * 2000 * 8 * 2 * 2 * 128 * 2 / 1e9, abs=0.06)  # k and v, bfloat16
    assert sizes[0][1] > sizes[1][1] > sizes[2][1]  # with it twice the tokens take less


def test_dropout_stays_off_where_layers_are_checkpointed(checkpoint, tmp_path):
    """The library checkpoints in training mode alone. With dropout no first ratio would be 1."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    settings = json.loads(Path(folder, "config.json").read_text()) | {"attention_dropout": 0.5}
    Path(folder, "config.json").write_text(json.dumps(settings))
    more = {"model": str(folder), "preset": "toy", "gradient_checkpointing": True}
    final, _ = trained(tmp_path, steps=1, minibatches=1, max_turns=2, **more)
    assert final["ratio"] == approx(1, abs=1e-6)


@mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
def test_the_tiny_policy_takes_one_core():
    """A second thread is no faster, and waits where the core does something else."""
    code = (
        "import torch, sdar; before = torch.get_num_threads(); sdar.load_policy(sdar.configure())"
    )
    code += "; print(before > 1, torch.get_num_threads())"
    place = {name: value for name, value in os.environ.items() if "OMP" not in name}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=place, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "True 1", done.stderr
