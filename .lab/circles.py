"""SDAR in a household, with another gate on wrong places that were tried before.

    export PYTHONPATH=.lab
    python .lab/circles.py first --env large_household:Forty --model runs/forty [flags of train]

The teacher assents to a place that the student has tried already, though it is wrong, and its gate
opens (FINDINGS, section 25). The first word says what such a token gets:

    paid        its own gate: nothing changes, a control
    unpaid      0
    first       the mean gate of the step's wrong places that are tried for the first time
    elsewhere   its own gate; as many other tokens, drawn at random, get 0: a control

All gates are those of the moment of sampling, as --gate shuffled's are.
"""

import itertools
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sdar

KINDS = ("paid", "unpaid", "first", "elsewhere")
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


def regate(kind, gate, mask, first, again, generator):
    """The gates (B, T) that tokens get. first, again (B, T): True at the wrong places."""
    if kind == "unpaid":
        return gate.masked_fill(again, 0)
    if kind == "first" and first.any():
        return gate.masked_fill(again, gate[first].mean())
    if kind == "elsewhere":
        rows, columns = torch.where((mask > 0) & ~again)
        chosen = torch.randperm(len(rows), generator=generator)[: again.sum()]
        gate = gate.clone()
        gate[rows[chosen], columns[chosen]] = 0
    return gate


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
        marks = torch.zeros(2, *batch["mask"].shape, dtype=torch.bool)
        for row, episode in enumerate(episodes):
            for mark, columns in zip(marks, wrong_places(episode, world)):
                mark[row, columns] = True
        gate = sdar.gate("gap", batch["gap"], beta=config.gate_beta)
        generator = torch.Generator().manual_seed(config.seed + 1000 * step)
        batch["gate"] = regate(kind, gate, batch["mask"], *marks, generator)
        return batch

    sdar.step_batch = with_other_gates
    return sdar.main(["train", *flags])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
