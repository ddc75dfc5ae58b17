"""What the gradients are in expectation, exactly: a world so small that it can be enumerated.

    python .lab/tests/oracles.py     # checks every claim, and that a planted bug breaks it

Three tokens, sequences of three: 27 of them. Every expectation is a sum over all, in float64, so
there is no sampling error, and two gradients that should be equal agree to the twelfth digit. Each
`oracle_...` is a sentence about the method and its proof by enumeration. BUGS has for each a
mistake that an implementation could make, and that its oracle must notice.
"""

import sys
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import sdar


class World:
    """The 27 sequences, the 13 prefixes that a token can follow, a reward for each sequence, and
    the logits of a student and of a fixed teacher after each prefix."""

    def __init__(self, scale=1.0):
        """scale: how far the teacher's logits are from the student's."""
        draw = torch.Generator().manual_seed(0)
        sequences = list(product(range(3), repeat=3))
        prefixes = [prefix for n in range(3) for prefix in product(range(3), repeat=n)]
        rows = [[prefixes.index(sequence[:t]) for t in range(3)] for sequence in sequences]
        self.ids, self.rows = torch.tensor(sequences), torch.tensor(rows)  # (27, 3) each
        self.logits, nudge = torch.randn(2, 13, 3, generator=draw, dtype=torch.float64)
        self.teacher = torch.log_softmax(self.logits + scale * nudge, -1)  # (13, 3)
        self.rewards = torch.randn(27, generator=draw, dtype=torch.float64)
        self.logits.requires_grad_()
        self.student = torch.log_softmax(self.logits, -1)  # (13, 3)
        self.probability = self.of_tokens(self.student).sum(1).exp()  # (27,)

    def of_tokens(self, table):
        """(13, 3) log-probs after each prefix -> (27, 3) of the tokens of each sequence."""
        return table[self.rows, self.ids]

    def slope(self, value):
        """Gradient of a number in the student's logits."""
        return torch.autograd.grad(value, self.logits, retain_graph=True)[0]

    def expected(self, loss, batch=1, sampled_by=None):
        """What the update does on average. The mean over tokens of loss(student, teacher (batch,
        3), numbers of the sequences) has a gradient. This is its mean over all batches, and its
        variance, summed over the logits. sampled_by: probabilities (27,), if not the student's."""
        student, teacher = self.of_tokens(self.student), self.of_tokens(self.teacher)
        p = (self.probability if sampled_by is None else sampled_by).detach()
        first, second = 0.0, 0.0
        for chosen in map(list, product(range(27), repeat=batch)):
            slope = self.slope(loss(student[chosen], teacher[chosen], chosen).mean())
            first = first + p[chosen].prod() * slope
            second = second + p[chosen].prod() * slope**2
        return first, (second - first**2).sum().item()

    def expected_at_prefixes(self, value):
        """Gradient of the mean of value (13,) over the prefixes that the student meets. How often
        it meets them is held fixed."""
        return self.slope(self.probability.detach() @ value[self.rows].mean(1))


def gated(kind="gap", beta=5.0):
    """The gated loss as a function of (student, teacher, numbers)."""
    return lambda s, t, _: sdar.sdar_loss(s, t, torch.ones_like(s), kind, beta)["sdar_loss"]


def gated_by(gate):
    """The gated loss with another gate, a function of (gap, entropy, beta)."""

    def loss(*args):
        with patch.dict(sdar.GATES, {"mine": gate}):
            return gated("mine")(*args)

    return loss


def kl(p, q):
    """KL(p || q) of each row of log-probs."""
    return (p.exp() * (p - q)).sum(-1)


def entropy_of(p):
    """Of each row of log-probs, in nats."""
    return -(p.exp() * p).sum(-1)


def same(a, b, tolerance=1e-12):
    apart = (a - b).abs().max()
    assert apart <= tolerance, f"{apart:.2g} apart"


# --- The gate ------------------------------------------------------------------------------


def oracle_constant_gate(world):
    """A gate that is the same on all tokens has expected gradient zero: GRPO+OPSD distils
    nothing."""
    same(world.expected(gated("none"))[0], 0)
    same(world.expected(gated(beta=0.0))[0], 0)
    assert world.expected(gated())[0].abs().max() > 1e-3


def oracle_constant_gate_off_policy(world):
    """In the later mini-batches of a step the weights are no longer those that sampled: there a
    constant gate of 1/2 is half the gradient of KL(sampling policy || policy), a pull back to the
    start of the step. It is a trust region, no teacher."""
    old = World(scale=0.5)
    q = world.of_tokens(old.teacher).sum(1).exp()  # some other policy's
    exact = world.slope(kl(q.log(), world.probability.log()))
    same(world.expected(gated(beta=0.0), sampled_by=q)[0], exact / 2 / 3)


def oracle_constant_gate_drift(_):
    """A constant gate has mean zero and yet no peace: its noise moves the entropy. Of V equally
    likely tokens it falls by step size^2 / batch * (V - 1) / (8 V^2) in a step; where one token has
    nearly all of the probability it rises, by less."""
    expected = torch.tensor((3 - 1) / (8 * 3**2))
    for batch in (1, 2, 3):
        same(entropy_fall([1 / 3, 1 / 3, 1 / 3], batch) * batch, expected, 1e-3)
        assert -expected < entropy_fall([0.9, 0.05, 0.05], batch) * batch < 0


def entropy_fall(probabilities, batch, step=0.01):
    """Over step^2, in one step with a constant gate of 1/2: the expectation over all batches."""
    logits = torch.tensor(probabilities, dtype=torch.float64).log().requires_grad_()
    start, fall = torch.log_softmax(logits, -1), 0.0
    for sampled in map(list, product(range(3), repeat=batch)):
        student = start[sampled]
        loss = gated(beta=0.0)(student, student.detach(), None).mean()
        (slope,) = torch.autograd.grad(loss, logits, retain_graph=True)
        moved = torch.log_softmax(logits - step * slope, -1)
        fall += student.sum().exp() * (entropy_of(start) - entropy_of(moved))
    return fall.detach() / step**2


def oracle_entropy_gate(world):
    """The student's entropy is the same whatever token was sampled: its gate, too, has expected
    gradient zero."""
    entropy = entropy_of(world.student.detach())[world.rows]

    def loss(s, t, i):
        return sdar.sdar_loss(s, t, entropy[i], "entropy")["sdar_loss"]

    same(world.expected(loss)[0], 0)


def oracle_gap_gate(world):
    """The gap gate is REINFORCE with the reward sigmoid(beta gap) on each token, and no credit for
    later tokens."""
    reward = torch.sigmoid(5 * (world.teacher - world.student)).detach()
    exact = world.expected_at_prefixes(-(world.student.exp() * reward).sum(1))
    same(world.expected(gated())[0], exact)


def oracle_small_gaps(_):
    """For small gaps that is beta/4 of the reverse KL's gradient."""
    world = World(scale=1e-4)
    exact = world.expected_at_prefixes(kl(world.student, world.teacher))
    size = exact.abs().max()
    same(world.expected(gated())[0] / (5 / 4 * size), exact / size, 1e-3)


def oracle_tanh(world):
    """On policy the half in sigmoid(x) = 1/2 + tanh(x/2)/2 is a constant gate, and drops out: the
    expected gradient is -1/2 E[tanh(beta gap / 2) grad log pi]. MemFold and Continuous Context
    Management state it, each in an appendix C; this is the check."""

    def loss(s, t, _):
        return -torch.tanh(5 / 2 * (t - s)).detach() / 2 * s

    same(world.expected(gated())[0], world.expected(loss)[0])


def oracle_distance(world):
    """From beta/4 of the reverse KL's gradient it is at most beta^3/48 E[|gap|^3 |grad log pi|]
    away (the same appendices), since tanh(x/2)/2 is x/4 up to x^3/48."""
    exact = world.expected_at_prefixes(kl(world.student, world.teacher))
    gap = world.of_tokens(world.teacher - world.student)
    # d log softmax(z)_i / dz is e_i - p
    slopes = torch.eye(3, dtype=torch.float64)[world.ids] - world.student.exp()[world.rows]
    sizes = gap.abs() ** 3 * slopes.norm(dim=-1)
    for beta in (0.5, 1.0, 5.0):
        apart = world.expected(gated(beta=beta))[0] - beta / 4 * exact
        bound = beta**3 / 48 * (world.probability @ sizes.mean(1))
        assert apart.norm() <= bound, f"beta {beta}: {apart.norm():.3g} apart, bound {bound:.3g}"


def oracle_reverse_kl(world):
    """With the gap itself as the gate it is the reverse KL's gradient; so is Skill-SD's, on
    policy."""

    def skill_sd(s, t, _):
        return sdar.skill_sd_loss(s, t, s.detach())["sdar_loss"]

    exact = world.expected_at_prefixes(kl(world.student, world.teacher))
    same(world.expected(gated_by(lambda gap, entropy, beta: gap))[0], exact)
    same(world.expected(skill_sd)[0], exact)


def oracle_centred(world):
    """Less any fixed number the gate keeps its expected gradient, at under half the variance. The
    mean of the batch's own gates is not quite fixed: it costs 1/M of a batch of M sequences, as
    GRPO's own mean does, so nothing in a real one."""
    plain, variance = world.expected(gated())
    gate = sdar.GATES["gap"]
    gates = gate(world.of_tokens(world.teacher - world.student), None, 5.0)
    mean = (world.probability @ gates.mean(1)).detach()
    fixed, less = world.expected(gated_by(lambda *args: gate(*args) - mean))
    same(fixed, plain)
    assert less < variance / 2, (less, variance)

    centred = gated_by(lambda *args: gate(*args) - gate(*args).mean())
    one, two = world.expected(centred, 1)[0], world.expected(centred, 2)[0]
    same(two - plain, (one - plain) / 2)


# --- GRPO ----------------------------------------------------------------------------------


def oracle_grpo(world):
    """GRPO's own estimator in groups of G = 2. Without the standard deviation: (G - 1)/G of the
    policy gradient, since the mean holds the episode itself. With it: the gradient of the chance to
    beat another episode."""

    def grpo(scale):
        def loss(s, t, i):
            rewards = world.rewards[i][None]
            advantages = sdar.group_advantages(rewards) * scale(rewards)
            advantages = advantages.view(2, 1).expand_as(s).double()
            return sdar.policy_loss(s, s.detach(), advantages)["policy_loss"]

        return world.expected(loss, batch=2)[0]

    exact = world.slope(world.probability @ world.rewards)
    same(grpo(lambda rewards: rewards.std(1)), -exact / 2 / 3, 1e-5)  # float32; eps 1e-6
    beats = (world.rewards[:, None] - world.rewards).sign()
    exact = world.slope(world.probability @ (beats @ world.probability).detach())
    same(grpo(lambda rewards: 1.0), -exact / 2**0.5 / 3, 1e-4)


# --- Mistakes, and who sees them -----------------------------------------------------------

GAP, ENTROPY = sdar.GATES["gap"], sdar.GATES["entropy"]
ADVANTAGES = sdar.group_advantages


def gate_not_detached(s, t, entropy=None, kind="gap", beta=5.0):
    return {"sdar_loss": sdar.GATES[kind](t - s, entropy, beta) * (t - s)}


def loss_turned(s, t, entropy=None, kind="gap", beta=5.0):
    return {"sdar_loss": sdar.GATES[kind](t - s, entropy, beta).detach() * (s - t)}


BUGS = {  # the oracle that must see it: what of sdar.py, and what stands in its place
    oracle_constant_gate: ("none", GAP),
    oracle_constant_gate_off_policy: ("gap", lambda *args: 2 * GAP(*args)),
    oracle_constant_gate_drift: ("gap", lambda *args: 2 * GAP(*args)),
    oracle_entropy_gate: ("entropy", lambda gap, entropy, beta: ENTROPY(gap, entropy + gap, beta)),
    oracle_gap_gate: ("sdar_loss", gate_not_detached),
    oracle_small_gaps: ("gap", lambda gap, entropy, beta: GAP(gap, entropy, 2 * beta)),
    oracle_tanh: ("gap", lambda gap, entropy, beta: GAP(gap.clamp(-0.5, 0.5), entropy, beta)),
    oracle_distance: ("gap", lambda gap, entropy, beta: GAP(-gap, entropy, beta)),
    oracle_reverse_kl: ("sdar_loss", loss_turned),
    oracle_centred: ("sdar_loss", gate_not_detached),
    oracle_grpo: ("group_advantages", lambda rewards: ADVANTAGES(rewards) * 2**0.5),  # std with G
}


def sees_its_bug(oracle):
    """True if the oracle fails once its bug stands in the place of a gate or function."""
    target, bug = BUGS[oracle]
    place = sdar.GATES if target in sdar.GATES else vars(sdar)
    try:
        with patch.dict(place, {target: bug}):
            oracle(World())
    except AssertionError:
        return True
    return False


if __name__ == "__main__":
    for check in BUGS:
        check(World())
        print(f"holds: {' '.join(check.__doc__.split())}")
        print(f"{'sees' if sees_its_bug(check) else 'DOES NOT SEE'}: a wrong {BUGS[check][0]}\n")
