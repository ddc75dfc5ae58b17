"""The cells of .lab/README.md in a real Jupyter kernel: its streams, its thread, its signals."""

import re
import shutil
import sys
import time
from pathlib import Path

from conftest import LAB, ROOT
from pytest import fixture, importorskip, mark

from test_sdar import lines

CELLS = re.findall("```python\n(.*?)```", (LAB / "README.md").read_text("utf-8"), re.DOTALL)
SIZE = "tasks_per_step=2, group_size=2, eval_episodes=6, save_every=2, eval_every=0, "
TRAIN = CELLS[0].replace("steps=40", f"{SIZE}steps=6")
LOG = Path("runs/notebook/metrics.jsonl")


@fixture
def kernel(tmp_path, monkeypatch):
    """A client of a kernel that runs in a copy of the repository; (its manager, the client)."""
    importorskip("ipykernel")
    from jupyter_client.manager import start_new_kernel

    for name in ("sdar.py", "envs.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in (".lab", ".assets"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    manager, client = start_new_kernel(kernel_name="python3")
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def run(client, cell):
    """What a cell prints and shows; an error if it fails."""
    said = []

    def hear(message):
        content = message["content"]
        said.append(content.get("text") or content.get("data", {}).get("text/plain", ""))

    reply = client.execute_interactive(cell, timeout=300, output_hook=hear)
    assert reply["content"]["status"] == "ok", reply["content"]
    return "".join(said)


def test_the_cells_train_plot_and_look(kernel):
    assert len(CELLS) == 3
    printed = run(kernel[1], TRAIN)
    assert re.search(r"before, alone: won [\d.]+ of 6", printed)
    assert re.search(r"\(\d\.\d+, \d\.\d+\)$", printed)
    assert "held-out success with the skill" in run(kernel[1], CELLS[1])
    assert "gap" in run(kernel[1], CELLS[2])
    assert Path("inspect.html").exists()


@mark.skipif(sys.platform == "win32", reason="interrupts go another way there")
def test_an_interrupted_cell_goes_on_exactly(kernel):
    """The kernel lives on, and the same cell makes the run that was never interrupted."""
    manager, client = kernel
    client.execute(TRAIN)
    deadline = time.time() + 120
    while not LOG.exists() or len(LOG.read_text().splitlines()) < 3:
        assert time.time() < deadline
        time.sleep(0.01)
    manager.interrupt_kernel()
    while client.get_shell_msg(timeout=60)["content"].get("ename") != "KeyboardInterrupt":
        assert time.time() < deadline
    assert len(lines(LOG.parent)) < 6

    run(client, TRAIN)
    stopped = lines(LOG.parent)
    run(client, TRAIN.replace("runs/notebook", "runs/whole"))
    assert stopped == lines("runs/whole")
