"""Toy households with more places to search, for longer episodes.

    export PYTHONPATH=.lab
    python sdar.py warmstart --env large_household:Forty --steps 2000 --folder runs/forty
    python sdar.py compare --env large_household:Forty --model runs/forty --preset toy

The tiny policy has no words for their places, so each needs a policy of its own. Of the scripted
player's episodes without a skill .21 and .18 are won; in the default household, in ten turns, .08.
"""

import random

from envs import SURFACES, Household, ToyEnv


def household(size):
    """A household of `size` places that hold things, four of them open; drawn as the default's."""
    each = (size - len(SURFACES)) // 2
    closable = [f"{kind} {n}" for kind in ("cabinet", "drawer") for n in range(1, each + 1)]
    return Household.random(random.Random(2605), tuple(closable))


class Forty(ToyEnv):
    """40 places, 20 turns."""

    default_turns = 20

    def __init__(self, **options):
        super().__init__(household(40), **options)


class Eighty(ToyEnv):
    """80 places, 40 turns."""

    default_turns = 40

    def __init__(self, **options):
        super().__init__(household(80), **options)
