"""Every claim of oracles.py holds, and a planted bug breaks it."""

import oracles
from pytest import mark


@mark.parametrize("oracle", oracles.BUGS, ids=lambda oracle: oracle.__name__)
def test_a_claim_holds_and_a_planted_bug_breaks_it(oracle):
    oracle(oracles.World())
    assert oracles.sees_its_bug(oracle)
