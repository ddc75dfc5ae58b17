"""Every claim of oracles.py holds, and every planted bug is seen."""

import oracles
from pytest import mark


@mark.parametrize("oracle", oracles.ORACLES, ids=lambda oracle: oracle.__name__)
def test_a_claim_holds(oracle):
    oracle(oracles.Enumerated())


@mark.parametrize("oracle, target, bug", oracles.BUGS, ids=lambda part: str(part)[:40])
def test_a_planted_bug_is_seen(oracle, target, bug):
    assert oracles.is_seen(oracle, target, bug)


def test_every_claim_has_its_bug():
    assert {oracle for oracle, _, _ in oracles.BUGS} == {*oracles.ORACLES}
