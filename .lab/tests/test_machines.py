"""Other people's machines, as far as they can be played here: a notebook's kernel, what Windows
shows, its line ends, a graphics card without float64, no home."""

import io
import re
import subprocess
import sys

import torch
from conftest import FEW, LAB, ROOT
from pytest import importorskip, mark

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


def test_the_pages_cells_train_plot_and_look_in_a_real_kernel(tmp_path):
    """The first is interrupted, and run again."""
    nbclient = importorskip("nbclient", reason="pip install nbclient ipykernel")
    new = importorskip("nbformat.v4")
    for name in ("sdar.py", "envs.py", ".lab", ".assets"):
        (tmp_path / name).symlink_to(ROOT / name)
    cells = [new.new_code_cell(cell) for cell in (INTERRUPT + TRAIN, TRAIN, *CELLS[1:])]
    cells[0].metadata["tags"] = ["raises-exception"]
    notebook = new.new_notebook(cells=cells)
    nbclient.execute(notebook, str(tmp_path), timeout=300)
    shown = ["KeyboardInterrupt", "alone: won", "success", "gap"]
    for text, cell in zip(shown, notebook.cells):
        assert text in str(cell.outputs)
    assert [line["step"] for line in lines(tmp_path / "runs/notebook")] == [1, 2, 3, 4, 5, 6]


# --- Windows and macOS -------------------------------------------------------------------


def test_what_a_console_cannot_show_ends_no_run(own, monkeypatch):
    """Half a character, a NUL, control tokens, a folder that has a name, on a console that raises
    on all but 250 characters."""
    console = io.TextIOWrapper(io.BytesIO(), "cp1252", "strict")
    monkeypatch.setattr(sys, "stdout", console)
    assert sdar.main(["--env", "num:Num", "--out", "r\u00fcn \u2192 \u6f22", *FEW]) == 0
    console.seek(0)
    assert "\\u2192 \\u6f22" in console.read()


def test_a_checkout_with_windows_line_ends_trains_the_same(tmp_path):
    """On a machine without a home."""
    for file in ("sdar.py", "envs.py", ".assets/environments.json", ".assets/tiny-policy/*"):
        for path in ROOT.glob(file):
            copy = tmp_path / "checkout" / path.relative_to(ROOT)
            raw = path.read_bytes()
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(raw if b"\0" in raw else raw.replace(b"\n", b"\r\n"))
    command = [sys.executable, "checkout/sdar.py", *FEW, "--rollout-batch=8", "--out=a"]
    subprocess.run(command, cwd=tmp_path, env={"HOME": "/dev/null"}, check=True)
    assert lines(tmp_path / "a") == trained(tmp_path, steps=1, group_size=2, max_turns=2)[1]


class NoFloat64(torch.overrides.TorchFunctionMode):
    """As on Apple's graphics cards, which have none."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        assert getattr(result, "dtype", None) != torch.float64
        return result


@mark.parametrize("method", ["sdar", "rlsd", "skill_sd"])
def test_nothing_on_the_device_is_float64(method, tmp_path, monkeypatch):
    """But for the advantages, which are made on the CPU."""
    monkeypatch.setattr(sdar, "group_advantages", torch.ones_like)
    with NoFloat64():
        trained(tmp_path, steps=1, method=method)
