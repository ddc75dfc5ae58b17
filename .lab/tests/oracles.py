"""What the gradients are in expectation, exactly: a world so small that it can be enumerated.

    python .lab/tests/oracles.py     # checks every claim, and that every planted bug is seen

Three tokens, sequences of three: 27 of them. Every expectation is a sum over all, in float64, so
there is no sampling error, and two gradients that should be equal agree to the twelfth digit. Each
`oracle_...` is a sentence about the method and its proof by enumeration. BUGS are mistakes that an
implementation could make; each names the oracle that must notice it.
"""

import itertools
import sys
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import sdar


def grad_of(loss, x):
    """The gradient of a loss in one tensor."""
    return torch.autograd.grad(loss, x)[0]


class Enumerated:
    """Every sequence of length 3 over 3 tokens, with a student softmax policy and a fixed teacher,
    in float64. An estimator's expectations are sums over the 27 sequences (or all 729 pairs of
    them): no sampling error."""

    def __init__(self, scale=1.0):
        draw = torch.Generator().manual_seed(0)
        prefixes = [p for n in range(3) for p in itertools.product(range(3), repeat=n)]
        shape = (2, len(prefixes), 3)
        self.logits, nudge = torch.randn(shape, generator=draw, dtype=torch.float64)
        self.teacher = torch.log_softmax(self.logits + scale * nudge, -1)
        self.rewards = torch.randn(27, generator=draw, dtype=torch.float64)
        sequences = list(itertools.product(range(3), repeat=3))
        self.ids = torch.tensor(sequences)
        self.rows = torch.tensor([[prefixes.index(s[:t]) for t in range(3)] for s in sequences])

    def expected_gradient(self, loss, batch=1, sampled_by=None):
        """Of the sampled-token estimator as train() uses it, the mean over tokens of loss(student,
        teacher (batch, 3), indices of sequences): its gradient's mean, by the student's
        probabilities or by logits `sampled_by`, and its variance, summed over the logits."""
        logits = self.logits.clone().requires_grad_()
        student = torch.log_softmax(logits, -1)[self.rows, self.ids]  # (27, 3)
        teacher = self.teacher[self.rows, self.ids]
        p = self.probability(sampled_by)
        first, second = 0.0, 0.0
        for chosen in map(list, itertools.product(range(27), repeat=batch)):
            value = loss(student[chosen], teacher[chosen], chosen).mean()
            (slope,) = torch.autograd.grad(value, logits, retain_graph=True)
            weight = p[chosen].prod()
            first = first + weight * slope
            second = second + weight * slope**2
        return first, (second - first**2).sum().item()

    def probability(self, logits=None):
        """(27,) of the sequences."""
        logits = self.logits if logits is None else logits
        return torch.log_softmax(logits, -1)[self.rows, self.ids].sum(1).exp()

    def gradient(self, value):
        """Gradient of value(probability of each sequence (27,), the student's log-probs after each
        prefix (13, 3))."""
        logits = self.logits.clone().requires_grad_()
        return grad_of(value(self.probability(logits), torch.log_softmax(logits, -1)), logits)

    def prefix_gradient(self, value):
        """Gradient of the sum over prefixes of p(prefix) value(student, teacher (13, 3)) / 3, with
        p(prefix) held fixed."""

        def mean(p, student):
            return (p.detach() * value(student, self.teacher)[self.rows].mean(1)).sum()

        return self.gradient(mean)


def gated(kind, beta=5.0):
    """The gated loss as a function of (student, teacher, indices)."""
    return lambda s, t, _: sdar.sdar_loss(s, t, torch.ones_like(s), kind, beta)["sdar_loss"]


def weighted(gate):
    """The gated loss with a gate of one's own, a function of (gap, entropy, beta)."""

    def loss(s, t, i):
        with patch.dict(sdar.GATES, {"gap": gate}):
            return gated("gap")(s, t, i)

    return loss


def kl(student, teacher):
    """KL(student || teacher) at each prefix: the reverse KL."""
    return (student.exp() * (student - teacher)).sum(1)


def same(a, b, tolerance=1e-12):
    apart = (a - b).abs().max()
    assert apart <= tolerance, f"{apart:.2g} apart"


# --- The gate ------------------------------------------------------------------------------


def oracle_constant_gate(world):
    """A gate that is the same on all tokens has expected gradient zero: GRPO+OPSD distils
    nothing."""
    for kind, beta in (("none", 5.0), ("gap", 0.0)):
        same(world.expected_gradient(gated(kind, beta))[0], torch.zeros(13, 3))
    assert world.expected_gradient(gated("gap"))[0].abs().max() > 1e-3


def oracle_constant_gate_off_policy(world):
    """In the later mini-batches of a step the weights are no longer those that sampled: there a
    constant gate of 1/2 is half the gradient of KL(sampling policy || policy), a pull back to the
    start of the step. It is a trust region, no teacher."""
    draw = torch.Generator().manual_seed(5)
    old = world.logits + torch.randn(13, 3, generator=draw, dtype=torch.float64) / 2
    q = world.probability(old)
    exact = world.gradient(lambda p, _: (q * (q.log() - p.log())).sum())
    expected, _ = world.expected_gradient(gated("gap", 0.0), sampled_by=old)
    same(expected, exact / 2 / 3)


def oracle_constant_gate_drift(_):
    """A constant gate has mean zero and yet no peace: its noise moves the entropy. Of V equally
    likely tokens it falls by step size^2 / batch * (V - 1) / (8 V^2) in a step; where one token has
    nearly all of the probability it rises, by less."""
    step, even, sure = 0.01, [1 / 3, 1 / 3, 1 / 3], [0.9, 0.05, 0.05]
    for batch in (1, 2, 3):
        expected = torch.tensor((3 - 1) / (8 * 3**2))
        same(entropy_fall(even, batch, step) / (step**2 / batch), expected, 1e-3)
        assert -expected < entropy_fall(sure, batch, step) / (step**2 / batch) < 0


def entropy_fall(probabilities, batch, step):
    """Of one place in one step with a constant gate of 1/2: the expectation over all batches."""
    start = torch.tensor(probabilities, dtype=torch.float64)
    fall = 0.0
    for sampled in itertools.product(range(len(start)), repeat=batch):
        logits = start.log().requires_grad_()
        student = torch.log_softmax(logits, -1)[list(sampled)]
        slope = grad_of(gated("gap", 0.0)(student, student.detach(), None).mean(), logits)
        moved = torch.softmax(logits.detach() - step * slope, -1)
        fall += start[list(sampled)].prod() * (entropy_of(start) - entropy_of(moved))
    return fall


def entropy_of(p):
    """In nats."""
    return -(p * p.log()).sum(-1)


def oracle_entropy_gate(world):
    """The student's entropy is the same whatever token was sampled: its gate, too, has expected
    gradient zero."""
    entropy = entropy_of(torch.softmax(world.logits, -1))[world.rows]

    def loss(s, t, i):
        return sdar.sdar_loss(s, t, entropy[i], "entropy")["sdar_loss"]

    same(world.expected_gradient(loss)[0], torch.zeros(13, 3))


def oracle_gap_gate(world):
    """The gap gate is REINFORCE with the reward sigmoid(beta gap) on each token, and no credit for
    later tokens."""

    def reward(s, t):
        return -(s.exp() * torch.sigmoid(5 * (t - s)).detach()).sum(1)

    same(world.expected_gradient(gated("gap"))[0], world.prefix_gradient(reward))


def oracle_small_gaps(_):
    """For small gaps that is beta/4 of the reverse KL's gradient."""
    world = Enumerated(scale=1e-4)
    exact = world.prefix_gradient(kl)
    size = exact.abs().max()
    expected, _ = world.expected_gradient(gated("gap"))
    same(expected / (5 / 4 * size), exact / size, 1e-3)


def oracle_tanh(world):
    """On policy the half in sigmoid(x) = 1/2 + tanh(x/2)/2 is a constant gate, and drops out: the
    expected gradient is -1/2 E[tanh(beta gap / 2) grad log pi]. MemFold and Continuous Context
    Management state it, each in an appendix C; this is the check."""

    def loss(s, t, _):
        return -torch.tanh(5 / 2 * (t - s)).detach() / 2 * s

    same(world.expected_gradient(gated("gap"))[0], world.expected_gradient(loss)[0])


def oracle_distance(world):
    """From beta/4 of the reverse KL's gradient it is at most beta^3/48 E[|gap|^3 |grad log pi|]
    away (the same appendices), since tanh(x/2)/2 is x/4 up to x^3/48."""
    for beta in (0.5, 1.0, 5.0):
        gated_gradient = world.expected_gradient(gated("gap", beta))[0]
        apart = gated_gradient - beta / 4 * world.prefix_gradient(kl)
        student = torch.log_softmax(world.logits, -1)
        gap = (world.teacher - student)[world.rows, world.ids]  # (27, 3)
        # d log softmax(z)_i / dz is e_i - p
        slopes = torch.eye(3, dtype=torch.float64)[world.ids] - student.exp()[world.rows]
        sizes = gap.abs() ** 3 * slopes.norm(dim=-1)
        bound = beta**3 / 48 * (world.probability() * sizes.mean(1)).sum()
        assert apart.norm() <= bound, f"beta {beta}: {apart.norm():.3g} apart, bound {bound:.3g}"


def oracle_reverse_kl(world):
    """With the gap itself as the gate it is the reverse KL's gradient; so is Skill-SD's, on
    policy."""
    exact = world.prefix_gradient(kl)
    gap_itself = weighted(lambda gap, entropy, beta: gap)
    same(world.expected_gradient(gap_itself)[0], exact)

    def skill_sd(s, t, _):
        return sdar.skill_sd_loss(s, t, s.detach())["sdar_loss"]

    same(world.expected_gradient(skill_sd)[0], exact)


def oracle_centred(world):
    """Less any fixed number the gate keeps its expected gradient, at under half the variance. The
    mean of the batch's own gates is not quite fixed: it costs 1/M of a batch of M sequences, as
    GRPO's own mean does, so nothing in a real one."""
    plain, variance = world.expected_gradient(gated("gap"))
    gate = sdar.GATES["gap"]
    gap = world.teacher - torch.log_softmax(world.logits, -1)
    gates = gate(gap, None, 5.0)[world.rows, world.ids]
    mean = (world.probability() * gates.mean(1)).sum()
    fixed, less = world.expected_gradient(weighted(lambda *args: gate(*args) - mean))
    same(fixed, plain)
    assert less < variance / 2, (less, variance)

    centred = weighted(lambda *args: gate(*args) - gate(*args).mean())
    one, _ = world.expected_gradient(centred, 1)
    two, _ = world.expected_gradient(centred, 2)
    same(two - plain, (one - plain) / 2)


# --- GRPO ----------------------------------------------------------------------------------


def oracle_policy_loss(world):
    """With the reward itself as advantage PPO's loss is, on policy, the policy gradient (a token's
    share of it)."""

    def loss(s, t, i):
        advantages = world.rewards[i, None].expand_as(s)
        return sdar.policy_loss(s, s.detach(), advantages)["policy_loss"]

    exact = world.gradient(lambda p, _: (p * world.rewards).sum())
    same(world.expected_gradient(loss)[0], -exact / 3)


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

        return world.expected_gradient(loss, batch=2)[0]

    exact = world.gradient(lambda p, _: (p * world.rewards).sum())
    without_std = grpo(lambda rewards: rewards.std(1) + 1e-6)
    same(without_std, -exact / 2 / 3, 1e-7)  # advantages are float32
    beats = (world.rewards[:, None] - world.rewards).sign()
    ahead = (beats * world.probability()).sum(1)
    exact = world.gradient(lambda p, _: (p * ahead).sum())
    same(grpo(lambda rewards: 1.0), -exact / 2**0.5 / 3, 1e-4)  # eps 1e-6 in the denominator


def oracle_k3(world):
    """On policy the mean of k3 is KL(policy || reference). Its gradient is another divergence's,
    that of KL(reference || policy): where the policy never goes it feels no pull."""
    student = torch.log_softmax(world.logits, -1)
    of_tokens = sdar.kl_k3(student, world.teacher)  # (13, 3)
    same((student.exp() * of_tokens).sum(1), kl(student, world.teacher))
    expected, _ = world.expected_gradient(lambda s, t, _: sdar.kl_k3(s, t))
    same(expected, world.prefix_gradient(lambda s, t: kl(t, s)))


# --- Every token's own slope ---------------------------------------------------------------


def oracle_slopes(world):
    """A token's gradient is what finite differences of its loss say, off policy and where PPO
    clips, too. The gated loss is the exception, on purpose: its gate is held, so the slope is minus
    the gate."""
    draw = torch.Generator().manual_seed(1)
    student = torch.log_softmax(world.logits, -1).flatten().requires_grad_()
    teacher = world.teacher.flatten()
    nudge, advantages = torch.randn(2, 39, generator=draw, dtype=torch.float64)
    old = student.detach() + nudge / 4
    losses = [
        lambda x: sdar.policy_loss(x, old, advantages)["policy_loss"],
        lambda x: sdar.kl_k3(x, teacher),
        lambda x: sdar.skill_sd_loss(x, teacher, old)["sdar_loss"],
        lambda x: sdar.rlsd_advantages(advantages, x - old),
    ]
    step = 1e-6
    for loss in losses:
        differences = (loss(student + step) - loss(student - step)) / (2 * step)
        same(grad_of(loss(student).sum(), student), differences.detach(), 1e-8)
    entropy = advantages.abs()
    for kind in sdar.GATES:
        terms = sdar.sdar_loss(student, teacher, entropy, kind)
        same(grad_of(terms["sdar_loss"].sum(), student), -terms["gate"])


def oracle_rlsd(world):
    """RLSD's teacher never turns an advantage and moves it by a tenth at most. Where it prefers
    what was sampled it adds to a reward and takes off a blame; where it says nothing, nothing."""
    gap = (world.teacher - torch.log_softmax(world.logits, -1))[world.rows, world.ids]
    advantages = world.rewards[:, None].expand_as(gap)
    share = sdar.rlsd_advantages(advantages, gap) / advantages
    assert 0.9 - 1e-12 <= share.min() < 0.95 and 1.05 < share.max() <= 1.1 + 1e-12
    assert torch.equal((share - 1).sign(), (gap * advantages).sign())
    assert torch.equal(sdar.rlsd_advantages(advantages, 0 * gap), advantages)


# --- Mistakes, and who sees them -----------------------------------------------------------

GAP, ENTROPY = sdar.GATES["gap"], sdar.GATES["entropy"]
K3, ADVANTAGES = sdar.kl_k3, sdar.group_advantages


def gate_of_the_gap(gap, entropy, beta):
    return GAP(gap, entropy, 5.0)


def gate_turned(gap, entropy, beta):
    return GAP(-gap, entropy, beta)


def gate_doubled(gap, entropy, beta):
    return 2 * GAP(gap, entropy, beta)


def gate_of_a_clamped_gap(gap, entropy, beta):
    return GAP(gap.clamp(-0.5, 0.5), entropy, beta)


def beta_doubled(gap, entropy, beta):
    return GAP(gap, entropy, 2 * beta)


def gap_in_the_entropy(gap, entropy, beta):
    return ENTROPY(gap, entropy + gap, beta)


def gate_not_detached(s, t, entropy=None, kind="gap", beta=5.0):
    gate = GAP(t - s, entropy, beta)
    return {"sdar_loss": gate * (t - s), "gate": gate}


def loss_turned(s, t, entropy=None, kind="gap", beta=5.0):
    gate = sdar.GATES[kind](t - s, entropy, beta).detach()
    return {"sdar_loss": gate * (s - t), "gate": gate}


def skill_sd_ratio_detached(s, t, old):
    return {"sdar_loss": (t - s).exp() - 1 + s - t}


def ratio_without_gradient(s, old, advantages, clip_eps=0.2):
    return {"policy_loss": -advantages * (s.detach() - old).exp() + 0 * s}


def k3_turned(s, ref):
    return K3(ref, s)


def std_with_n(rewards):
    return ADVANTAGES(rewards) * 2**0.5


def rlsd_without_sign(advantages, gap, mix=0.5, clip_eps=0.2):
    return advantages * (1 - mix + mix * gap.exp().clamp(1 - clip_eps, 1 + clip_eps))


BUGS = [  # (the oracle that must see it, the gate or function of sdar.py, what stands in its place)
    (oracle_constant_gate, "none", gate_of_the_gap),
    (oracle_constant_gate_off_policy, "gap", gate_doubled),
    (oracle_constant_gate_drift, "gap", gate_doubled),
    (oracle_entropy_gate, "entropy", gap_in_the_entropy),
    (oracle_gap_gate, "gap", gate_turned),
    (oracle_gap_gate, "sdar_loss", gate_not_detached),
    (oracle_gap_gate, "sdar_loss", loss_turned),
    (oracle_small_gaps, "gap", beta_doubled),
    (oracle_tanh, "gap", gate_of_a_clamped_gap),
    (oracle_distance, "gap", beta_doubled),
    (oracle_reverse_kl, "sdar_loss", loss_turned),
    (oracle_reverse_kl, "skill_sd_loss", skill_sd_ratio_detached),
    (oracle_centred, "sdar_loss", gate_not_detached),
    (oracle_policy_loss, "policy_loss", ratio_without_gradient),
    (oracle_grpo, "group_advantages", std_with_n),
    (oracle_k3, "kl_k3", k3_turned),
    (oracle_slopes, "sdar_loss", gate_not_detached),
    (oracle_slopes, "policy_loss", ratio_without_gradient),
    (oracle_rlsd, "rlsd_advantages", rlsd_without_sign),
]

ORACLES = [value for name, value in sorted(globals().items()) if name.startswith("oracle_")]


def is_seen(oracle, target, bug):
    """True if the oracle fails once `bug` stands in the place of a gate or function `target`."""
    place = sdar.GATES if target in sdar.GATES else vars(sdar)
    try:
        with patch.dict(place, {target: bug}):
            oracle(Enumerated())
    except AssertionError:
        return True
    return False


def main():
    """Print each claim, checked, and each bug, seen."""
    for oracle in ORACLES:
        oracle(Enumerated())
        print(f"holds: {' '.join(oracle.__doc__.split())}")
    for oracle, target, bug in BUGS:
        seen = "seen" if is_seen(oracle, target, bug) else "NOT SEEN"
        print(f"{seen}: {bug.__name__}, by {oracle.__name__}")


if __name__ == "__main__":
    main()
