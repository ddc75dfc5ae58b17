"""A training step here and on TRL, side by side: python .lab/trl/bench.py [flags]

The same policy, tasks and sampled tokens, by the same rollout, in alternation. What differs is
scoring, the update and what is around it. Printed are seconds of CPU time a step, which other
programs disturb less than the clock's.
"""

import contextlib
import io
import sys
import tempfile
import time

import trainer

import sdar

ALTERNATIONS = 3
FIXED = {"lr": 1e-9, "eval_every": 0, "eval_episodes": 1}  # weights that move sample other tokens


def seconds_a_step(config, on_trl):
    """CPU seconds of a step, on average, and the ids of all episodes. The first step warms up."""
    clock, ids = [], []

    def note(episodes):
        clock.append(time.process_time())
        ids.append([episode.ids for episode in episodes])

    def step_batch(*args):
        note(args[3])
        return sdar.step_batch(*args)

    class Timed(trainer.SDARTrainer):
        def rollout(self, *played):
            episodes = sdar.rollout(*played)
            note(episodes)
            return episodes

    if on_trl:
        Timed(config, trainer.make_arguments(config, ["disable_tqdm=true"])).train()
    else:
        sdar.train(config, step_batch)
    return (clock[-1] - clock[1]) / (len(clock) - 2), ids


def main(argv):
    """Compare without and with a teacher."""
    parser = sdar.make_parser("python .lab/trl/bench.py [flags]", description=__doc__)
    given = {"steps": 6, **vars(parser.parse_args(argv))}
    for method in ("grpo", "sdar"):
        for _ in range(ALTERNATIONS):
            with tempfile.TemporaryDirectory() as out:
                config = sdar.configure(**given | FIXED | {"method": method, "out": out})
                sdar.require(config.steps > 2, "--steps: at least 3, the first warms up")
                with contextlib.redirect_stdout(io.StringIO()):
                    ours, sampled = seconds_a_step(config, on_trl=False)
                    theirs, again = seconds_a_step(config, on_trl=True)
            sdar.require(sampled == again, "other tokens were sampled on TRL than here")
            seconds = f"CPU seconds of a step {ours:.2f}, on TRL {theirs:.2f}"
            print(f"{method}: {seconds}, ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    sys.exit(sdar.run(lambda: main(sys.argv[1:])))
