"""Toy households of other sizes.

    export PYTHONPATH=.lab/experiments
    python .lab/warmstart.py --env households:Forty --steps 2000 --out runs/forty
    python .lab/compare.py --env households:Forty --model runs/forty --preset toy

The tiny policy has no words for the places of the large ones, so each needs a policy of its own.
Without a skill the scripted player wins .14 and .18 of 2,000 held-out episodes in them, .29 in the
small one, and .07 in the default household.
"""

import random

from envs import SURFACES, Household, ToyEnv


class Forty(ToyEnv):
    """40 places that hold things, four of them open; 20 turns."""

    default_turns = 20
    size = 40

    def __init__(self, max_turns=0):
        numbers = range(1, (self.size - len(SURFACES)) // 2 + 1)
        closable = tuple(f"{kind} {n}" for kind in ("cabinet", "drawer") for n in numbers)
        household = Household.random(random.Random(2605), closable)  # drawn as the default's
        super().__init__(max_turns, household)


class Eighty(Forty):
    """80 places, 40 turns."""

    default_turns = 40
    size = 80


class Eight(Forty):
    """Eight places, ten turns: for a language model, which then sometimes samples the right one."""

    default_turns = 10
    size = 8
