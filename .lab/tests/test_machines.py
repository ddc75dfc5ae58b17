"""Other people's machines, as far as they can be played here: a notebook's kernel, what Windows
shows, its line ends and names, a graphics card without float64, no home."""

import io
import re
import subprocess
import sys
from unittest.mock import Mock

import torch
from conftest import FEW, LAB, ROOT
from pytest import importorskip, mark, raises
from transformers import AutoTokenizer

import sdar
from test_sdar import lines, own, trained

# --- Notebooks ---------------------------------------------------------------------------

CELLS = re.findall("```python\n(.*?)```", (LAB / "README.md").read_text("utf-8"), re.DOTALL)
SMALL = "tasks_per_step=2, group_size=2, eval_episodes=6, save_every=2, eval_every=0, steps=6"
TRAIN = CELLS[0].replace("steps=40", SMALL)
INTERRUPT = """
import os, signal, threading, time
from pathlib import Path

LOG = Path("runs/notebook/metrics.jsonl")

def interrupt():
    while not LOG.exists() or len(LOG.read_text().splitlines()) < 3:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt).start()
"""


@mark.skipif(sys.platform == "win32", reason="interrupts go another way there")
def test_the_pages_cells_train_plot_and_look_in_a_real_kernel(tmp_path):
    """The first is interrupted. Run again it becomes the run that was never interrupted."""
    nbclient = importorskip("nbclient", reason="pip install nbclient ipykernel")
    new = importorskip("nbformat.v4")
    for name in ("sdar.py", "envs.py", ".lab", ".assets"):
        (tmp_path / name).symlink_to(ROOT / name)
    whole = TRAIN.replace("runs/notebook", "runs/whole")
    cells = map(new.new_code_cell, [INTERRUPT, TRAIN, TRAIN, *CELLS[1:], whole])
    notebook = new.new_notebook(cells=[*cells])
    notebook.cells[1].metadata["tags"] = ["raises-exception"]
    nbclient.execute(notebook, str(tmp_path), timeout=300)
    said = [str(cell.outputs) for cell in notebook.cells]
    shown = ["", "KeyboardInterrupt", "alone: won", "held-out success", "gap", ""]
    assert all(text in outputs for text, outputs in zip(shown, said))
    assert lines(tmp_path / "runs/notebook") == lines(tmp_path / "runs/whole")


# --- Windows and macOS -------------------------------------------------------------------


def test_what_a_console_cannot_show_ends_no_run(own, monkeypatch):
    """Half a character, a NUL, control tokens, a folder that has a name, on a console that raises
    on all but 250 characters. The second time the run is there already."""
    for code in (0, 2):
        console = io.TextIOWrapper(io.BytesIO(), "cp1252", "strict")
        monkeypatch.setattr(sys, "stdout", console)
        assert sdar.main(["--env", "num:Num", "--out", "r\u00fcn \u2192 \u6f22", *FEW]) == code
        console.seek(0)
        assert ("\\u2192 \\u6f22" in console.read()) == (code == 0)


def test_a_checkout_with_windows_line_ends_trains_the_same_and_stays_as_it_is(tmp_path):
    """On a machine without a home."""
    checkout = tmp_path / "checkout"
    files = [ROOT / "sdar.py", ROOT / "envs.py", ROOT / ".assets/environments.json"]
    for file in [*files, *ROOT.glob(".assets/tiny-policy/*")]:
        copy, raw = checkout / file.relative_to(ROOT), file.read_bytes()
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(raw if b"\0" in raw else raw.replace(b"\n", b"\r\n"))
    before = sorted(checkout.rglob("*"))
    command = [sys.executable, "-B", "checkout/sdar.py", *FEW, "--rollout-batch=8", "--out=a"]
    subprocess.run(command, cwd=tmp_path, env={"HOME": "/dev/null"}, check=True)
    assert sorted(checkout.rglob("*")) == before
    assert lines(tmp_path / "a") == trained(tmp_path, steps=1, group_size=2, max_turns=2)[1]


def test_a_models_name_stays_as_it_was_typed(monkeypatch):
    """As a path a name of the hub would have another separator on Windows."""
    asked = Mock(side_effect=OSError("no such model"))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", asked)
    with raises(sdar.UserError, match="--model ./a/b cannot be used: OSError: no such model"):
        sdar.load_policy(sdar.configure(model="./a/b", device="cpu"))
    asked.assert_called_once_with("./a/b")


class NoFloat64(torch.overrides.TorchFunctionMode):
    """As on Apple's graphics cards, which have none."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        assert getattr(result, "dtype", None) != torch.float64, function
        return result


@mark.parametrize("method", ["sdar", "rlsd", "skill_sd"])
def test_nothing_on_the_device_is_float64(method, tmp_path, monkeypatch):
    """But for the advantages, which are made on the CPU."""
    monkeypatch.setattr(sdar, "group_advantages", torch.ones_like)
    with NoFloat64():
        trained(tmp_path, steps=1, method=method)


def test_the_tiny_policy_takes_one_core():
    """A second thread is no faster, and waits where the core does something else."""
    torch.set_num_threads(2)
    sdar.load_policy(sdar.configure())
    assert torch.get_num_threads() == 1
