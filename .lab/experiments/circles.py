"""SDAR in a household, with another gate on wrong places that were tried before.

    export PYTHONPATH=.lab
    python .lab/circles.py first --env large_household:Forty --model runs/forty [flags of train]

The teacher assents to a place that the student has tried already, though it is wrong, and its gate
opens (FINDINGS, section 25). With "first" such a token gets the mean gate of the step's wrong
places that are tried for the first time; with "own" its own gate, a control. All gates are those of
the moment of sampling, as --gate shuffled's are.
"""

import itertools
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import envs
import sdar

KINDS = ("first", "own")
VISIT = re.compile(r"go to (.+)")
step_batch = sdar.step_batch


def wrong_places(episode, world):
    """Its tokens that name a wrong place to search: two lists of columns, those of places tried for
    the first time and those of places tried again. The search ends at the object's home."""
    home = world.household.home[world.goals[episode.task][2]]
    runs = itertools.groupby(sampled for sampled in episode.mask)
    lengths = [len([*run]) for sampled, run in runs if sampled]
    tried, first, again = set(), [], []
    column = 0
    for response, length in zip(episode.transcript[1::2], lengths):
        visit = VISIT.fullmatch(response.strip())
        if visit and visit[1] == home:
            break
        if visit:
            inside = range(column + 1, column + length - 1)  # between `go to` and the end
            (again if visit[1] in tried else first).extend(inside)
            tried.add(visit[1])
        column += length
    return first, again


def without_pay(gate, first, again):
    """The gates (B, T) when a wrong place is worth no more for being tried again. first, again
    (B, T): True at wrong places."""
    return gate.masked_fill(again, gate[first].mean()) if first.any() else gate


def main(argv):
    """Train with a gate of this kind."""
    kind, *flags = argv or [""]
    if kind not in KINDS:
        print(f"{kind!r}: choose from {', '.join(KINDS)}", file=sys.stderr)
        return 2

    def with_other_gates(model, start, teacher_logprobs, episodes, config, step=1, bandit=None):
        """sdar.step_batch's tensors, and the gates."""
        batch = step_batch(model, start, teacher_logprobs, episodes, config, step, bandit)
        world = sdar.make_env(config.env)
        fine = isinstance(world, envs.ToyEnv)
        sdar.require(fine, f"--env {config.env}: circles.py knows the places of the toy alone")
        gated = sdar.METHODS[config.method].teacher == "gate"
        fine = gated and (config.gate, config.distil) == ("gap", "loss")
        sdar.require(fine, "circles.py changes the gap gate in the loss: sdar or opsd, --gate gap")

        gate = sdar.gate("gap", batch["gap"], beta=config.gate_beta)
        marks = gate.new_zeros(2, *gate.shape).bool()
        for row, episode in enumerate(episodes):
            for mark, columns in zip(marks, wrong_places(episode, world)):
                mark[row, columns] = True
        batch["gate"] = without_pay(gate, *marks) if kind == "first" else gate
        return batch

    sdar.step_batch = with_other_gates
    return sdar.main(["train", *flags])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
