"""Every claim of oracles.py holds."""

import oracles
from pytest import mark


@mark.parametrize("oracle", oracles.ORACLES, ids=lambda oracle: oracle.__name__)
def test_a_claim_holds(oracle):
    oracle()
