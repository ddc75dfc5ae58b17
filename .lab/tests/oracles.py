"""What the gradients are in expectation, exactly: a world so small that it can be enumerated.

    python .lab/tests/oracles.py     # checks every claim

One place of a conversation, and five tokens that may come next. An expectation is a sum over the
five, in float64, so there is no sampling error. A conversation is a sum of such places: a teacher's
word on a token gives no credit for what comes later. Each `oracle_...` is a sentence about the
method and its proof by enumeration. test_sdar.py has the values of the same functions by hand.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import sdar

DRAW = torch.Generator().manual_seed(0)
LOGITS, NUDGE = torch.randn(2, 5, generator=DRAW, dtype=torch.float64)
TEACHER = torch.log_softmax(LOGITS + NUDGE, -1)
STUDENT = torch.log_softmax(LOGITS.requires_grad_(), -1)
P = STUDENT.exp()


def slope(value):
    """Gradient of a number in the student's logits."""
    return torch.autograd.grad(value, LOGITS, retain_graph=True)[0]


def expected(losses):
    """What the update does on average: the mean gradient of the losses (5,) of the tokens."""
    return slope(P.detach() @ losses)


def gated(**options):
    """L_SDAR of each token, (5,)."""
    return sdar.sdar_loss(STUDENT, TEACHER, **options)["sdar_loss"]


def oracle_constant_gate():
    """A gate that is the same whatever token is sampled has expected gradient zero: GRPO+OPSD
    distils nothing, and a gate of the student's entropy nothing, either."""
    for options in ({"kind": "none"}, {"beta": 0.0}, {"kind": "entropy", "entropy": -P @ STUDENT}):
        assert expected(gated(**options)).abs().max() < 1e-12
    assert expected(gated()).abs().max() > 1e-3


def oracle_gap_gate():
    """The gap gate is REINFORCE with the reward sigmoid(beta gap) on each token, of which only the
    part tanh(beta gap / 2) / 2 counts: the rest, 1/2, is a constant gate. So a token's logit rises
    where its gate is above the mean gate, and falls elsewhere."""
    x = 5 * (TEACHER - STUDENT).detach()
    for reward in (torch.sigmoid(x), torch.tanh(x / 2) / 2):
        assert torch.allclose(expected(gated()), slope(-P @ reward))
        assert torch.allclose(expected(gated()), -P * (reward - P @ reward))


def oracle_reverse_kl():
    """Skill-SD's is the reverse KL's gradient, on policy and whatever the gaps."""
    losses = sdar.skill_sd_loss(STUDENT, TEACHER, STUDENT.detach())["sdar_loss"]
    exact = slope(P @ (STUDENT - TEACHER))
    assert torch.allclose(expected(losses), exact)


def oracle_k3():
    """What k3 descends is the other KL: on policy, KL(reference || policy)'s gradient."""
    exact = slope(TEACHER.exp() @ (TEACHER - STUDENT))
    assert torch.allclose(expected(sdar.kl_k3(STUDENT, TEACHER)), exact)


if __name__ == "__main__":
    for oracle in (oracle_constant_gate, oracle_gap_gate, oracle_reverse_kl, oracle_k3):
        oracle()
        print(f"holds: {' '.join(oracle.__doc__.split())}")
