"""sdar.py with faults: an environment that fails, NaN in a mini-batch of step 2, and where DIES is set a process that is killed."""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import sdar

def faulty_step(run, step, training_step=sdar.training_step, update=sdar.update):
    sdar.RANK == 1 and "DIES" in os.environ and os.kill(os.getpid(), 9)
    for env in run.envs[1:6]:  # 5 of 12: nearly all of the first process's, but less than half
        env.step = lambda action: sdar.require(False, "no answer", sdar.EnvUnavailable)
    nan = lambda batch: {**batch, "advantages": batch["advantages"].index_fill(0, sdar.torch.tensor([3]), float("nan"))}
    sdar.update = lambda *args: update(*args[:3], nan(args[3]) if step == 2 else args[3], *args[4:])
    return training_step(run, step)

sdar.training_step = faulty_step
sys.exit(sdar.main())
