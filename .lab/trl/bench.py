"""A training step here and on TRL, side by side: python .lab/trl/bench.py [flags]

The same policy, tasks and sampled tokens, by the same rollout. What differs is scoring, the update
and what is around it. Printed are seconds of CPU time a step, which other programs disturb less
than the clock's. Call it several times: the ratio moves.
"""

import contextlib
import io
import sys
import tempfile
import time

import trainer

import sdar

# Weights that move would sample other tokens.
FIXED = {"steps": 6, "lr": 1e-9, "eval_every": 0, "eval_episodes": 1}


def seconds_a_step(config, on_trl):
    """CPU seconds of a step, on average, and the ids of all episodes. The first step warms up."""
    clock, ids = [], []

    def step_batch(model, start_policy, teacher, episodes, *more):
        clock.append(time.process_time())
        ids.append([episode.ids for episode in episodes])
        return sdar.step_batch(model, start_policy, teacher, episodes, *more)

    with contextlib.redirect_stdout(io.StringIO()):
        if on_trl:
            arguments = trainer.make_arguments(config, ["disable_tqdm=true"])
            trainer.SDARTrainer(config, arguments, step_batch=step_batch).train()
        else:
            sdar.train(config, step_batch)
    return (clock[-1] - clock[1]) / (len(clock) - 2), ids


def main(argv=None):
    """Compare without and with a teacher."""
    parser = sdar.make_parser("python .lab/trl/bench.py [flags]", description=__doc__)
    given = vars(parser.parse_args(argv)) | FIXED
    for method in ("grpo", "sdar"):
        with tempfile.TemporaryDirectory() as out:
            config = sdar.configure(**given | {"method": method, "out": out})
            ours, sampled = seconds_a_step(config, on_trl=False)
            theirs, again = seconds_a_step(config, on_trl=True)
        sdar.require(sampled == again, "other tokens were sampled on TRL than here")
        seconds = f"CPU seconds of a step {ours:.2f}, on TRL {theirs:.2f}"
        print(f"{method}: {seconds}, ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    sys.exit(sdar.run(main))
