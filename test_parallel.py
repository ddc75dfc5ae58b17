"""Several processes come to the same as one, and end together. `python -m pytest -q test_parallel.py`
As a program this file is sdar.py with faults: an environment that fails, NaN in a mini-batch of step 2, a process that dies.
FLAGS: 3 groups for 2 processes, and mini-batches and a part of the panel of 1 episode, which leave one of them without work."""
import json
import os
import subprocess
import sys
import time

import sdar

FLAGS = "--steps 3 --tasks-per-step 3 --group-size 4 --minibatches 8 --eval-episodes 65 --gate shuffled --retrieval ucb".split()
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2".split()

def start(launcher, folder, **environment):
    return subprocess.run([sys.executable, *launcher, __file__, *FLAGS, "--out", folder], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})

def test_two_processes_come_to_the_same_as_one(tmp_path):
    results = []
    for folder, launcher in ((tmp_path / "one", []), (tmp_path / "two", TORCHRUN)):
        done, numbers = start(launcher, folder), []
        assert done.returncode == 0 and done.stdout.count("before training") == done.stdout.count("after*") == 1, done.stderr
        for line in map(json.loads, open(folder / "metrics.jsonl")):
            assert line["dropped"] == 1 and (line["grad_norm"] > 0) == (line["step"] != 2)
            numbers += [line[name] for name in line if type(line[name]) in (int, float) and "second" not in name]
        model = sdar.load_policy(sdar.Config(model=str(folder / "checkpoint"), device="cpu"))[0]
        results.append(numbers + sdar.torch.nn.utils.parameters_to_vector(model.parameters()).tolist())
    assert sdar.np.allclose(*results, rtol=0, atol=1e-5, equal_nan=True)

def test_a_process_that_dies_ends_the_others(tmp_path):
    done = start(TORCHRUN, tmp_path, DIES="1")
    seconds = time.time() - (tmp_path / "metrics.jsonl").stat().st_mtime  # it was written just before the first step
    assert done.returncode == 1 and seconds < 60 and "Signal 9 (SIGKILL)" in done.stderr, done.stderr

def faulty_step(run, step, training_step=sdar.training_step, update=sdar.update):
    sdar.RANK == 1 and "DIES" in os.environ and os.kill(os.getpid(), 9)
    run.envs[5].step = lambda action: sdar.require(False, "no answer", sdar.EnvUnavailable)
    nan = lambda batch: {**batch, "advantages": batch["advantages"].index_fill(0, sdar.torch.tensor([7]), float("nan"))}
    sdar.update = lambda *args: update(*args[:3], nan(args[3]) if step == 2 else args[3], *args[4:])
    return training_step(run, step)

if __name__ == "__main__":
    sdar.training_step = faulty_step
    sys.exit(sdar.main())
