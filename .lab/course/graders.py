"""The graders of the fill-in exercises: hand numbers, and what it means when one is missed.
test_lab.py runs them."""

from contextlib import contextmanager
from types import SimpleNamespace

import torch

import envs
import sdar


def tensor(*values):
    """(1, T) in float64."""
    return torch.tensor([values], dtype=torch.float64)


def check_near(got, expected, meaning):
    """AssertionError with the meaning of the number unless the two agree to 1e-5."""
    got = torch.as_tensor(got).double()
    expected = torch.as_tensor(expected).double()
    assert torch.allclose(got, expected, atol=1e-5), meaning


@contextmanager
def meaning(message):
    """Whatever the learner's function raises in here becomes an AssertionError with a meaning."""
    try:
        yield
    except NotImplementedError:
        raise
    except Exception as error:
        raise AssertionError(f"{message} ({type(error).__name__}: {error})") from error


def grade_group_advantages():
    advantages = sdar.group_advantages
    scores = torch.tensor([1.0, 0, 0, 0])
    one_group = torch.tensor([7] * 4)
    check_near(
        advantages(scores, one_group)[0],
        1.5,
        "1.5 is (1 - 1/4) / 0.5: the deviation has n - 1 under it (1.73: n)",
    )
    groups = torch.tensor([3, 9, 3, 9])
    mixed = advantages(torch.tensor([1.0, 5.0, 0.0, 5.0]), groups)
    check_near(
        mixed[[1, 3]],
        [0, 0],
        "all of group 9 scored alike, so nothing is to be learned: 0, not nan (eps), not the "
        "batch's mean",
    )
    check_near(
        mixed[[0, 2]],
        [0.707106, -0.707106],
        "a group's rows need not stand together, and another group's scores are not its business",
    )
    alone = advantages(torch.tensor([0.5]), torch.tensor([0]))
    check_near(alone, [0.5], "a group of one: mean 0, deviation 1")

    pair = torch.tensor([1.0, 0.0])
    group = torch.tensor([0, 0])
    centred = advantages(pair, group, normalize_std=False)
    check_near(centred, [0.5, -0.5], "normalize_std=False leaves the mean off alone")
    weighted = advantages(pair, group, weights=torch.tensor([3, 1]))
    written_out = advantages(torch.tensor([1.0, 1, 1, 0]), torch.zeros(4))
    check_near(weighted, written_out[[0, 3]], "a weight of 3 counts a row three times")


# Two rows, of three tokens and of one; what stands behind the mask must not count.
GAP = [[0.5, -0.2, 0.0, 9.0], [0.3, 9.0, 9.0, 9.0]]
ENTROPY = [[0.1, 0.7, 0.0, 9.0], [0.4, 9.0, 9.0, 9.0]]
MASK = [[1, 1, 1, 0], [1, 0, 0, 0]]
GATES = {  # {gate: (its values on the four tokens, what it is)}
    "entropy": (
        [0.622459, 0.970688, 0.5, 0.880797],
        "sigmoid(beta h): it must not know the gap",
    ),
    "soft_or": (
        [0.939913, 0.960834, 0.5, 0.947846],
        "1 - (1 - h)(1 - gap) goes into the sigmoid, all of it times beta",
    ),
    "none": ([1, 1, 1, 1], "1 everywhere"),
    "reverse_kl": ([0.5, -0.2, 0, 0.3], "the gap itself, signed"),
    "constant": (
        [0.627665] * 4,
        "the mean of the gap gate over all tokens of the mask, not of each row's mean, and not of "
        "what stands behind the mask",
    ),
    "centred": (
        [0.296477, -0.358724, -0.127665, 0.189909],
        "the gap gate less its mean over all tokens of the mask",
    ),
}


def grade_gate():
    gap, entropy, mask = (torch.tensor(rows).double() for rows in (GAP, ENTROPY, MASK))
    gap.requires_grad_()
    seen = mask > 0
    g = sdar.gate("gap", gap, entropy, 5.0, mask)
    assert not g.requires_grad, (
        "the gate must be detached: else tokens with a clearly negative gap are pushed down, "
        "without a bound"
    )
    check_near(
        g[seen],
        [0.924142, 0.268941, 0.5, 0.817574],
        "sigmoid(beta gap): 1/2 without a gap, more where the teacher finds the token likelier",
    )
    beta_0 = sdar.gate("gap", gap, entropy, 0.0, mask)
    check_near(beta_0, torch.full((2, 4), 0.5), "beta 0 is a gate of 1/2 whatever the gap")

    for kind, (expected, meaning) in GATES.items():
        value = sdar.gate(kind, gap, entropy.clone().requires_grad_(), 5.0, mask)
        assert value.shape == gap.shape, f"{kind}: a gate for every token, so of the gap's shape"
        message = f"{kind}: no gate has a gradient, through the entropy neither"
        assert not value.requires_grad, message
        check_near(value[seen], expected, f"{kind}: {meaning}")

    def shuffled(seed):
        draw = torch.Generator().manual_seed(seed)
        return sdar.gate("shuffled", gap, entropy, 5.0, mask, draw)[seen]

    orders = [shuffled(seed) for seed in range(9)]
    for order in orders:
        check_near(
            order.sort().values,
            g[seen].sort().values,
            "shuffled: the same values, on other tokens, within the mask",
        )
    message = "shuffled: the tokens must change places, across the rows, too"
    assert any(order[3] != g[seen][3] for order in orders), message
    message = "shuffled: one generator, one order; else no run could be repeated"
    again = [shuffled(seed) for seed in range(9)]
    assert torch.equal(torch.stack(orders), torch.stack(again)), message


def grade_sdar_loss():
    nan = float("nan")
    student = tensor(-1, -0.5, -2, nan).requires_grad_()
    teacher = tensor(-0.5, -0.7, -2, nan).requires_grad_()
    loss, stats = sdar.sdar_loss(student, teacher, tensor(1, 1, 1, 0))
    with meaning("the student must not be detached: through it alone the loss teaches"):
        (slope,) = torch.autograd.grad(loss, student, retain_graph=True)
    push = -slope[0]
    nothing_leaks = push.isfinite().all() and not push[3]
    assert nothing_leaks, (
        "what stands under a mask of 0, nan included, may reach nothing: multiplying does not stop "
        "nan"
    )
    assert (push[:3] > 0).all(), (
        "every sampled token is pushed up; down means a turned sign or a gate that is not detached"
    )
    check_near(
        push[:3] * 3,
        [0.924142, 0.268941, 0.5],
        "the push is g / tokens of the mask: a mean over tokens, not rows or columns",
    )
    (through_teacher,) = torch.autograd.grad(loss, teacher, allow_unused=True)
    message = "the teacher must be detached, or it learns to please the student"
    assert through_teacher is None, message
    value = (0.924142 * 0.5 - 0.268941 * 0.2) / 3
    check_near(loss.item(), value, "the value: mean of g (teacher - student)")
    check_near(
        [stats["gate_mean"], stats["gate_active"], stats["gap_mean"]],
        [0.564361, 1 / 3, 0.1],
        "gate_mean, gate_active (a gate of 1/2 is not), gap_mean: means over the mask",
    )

    gap, entropy, mask = (torch.tensor(rows).double() for rows in (GAP, ENTROPY, MASK))
    four = gap[mask > 0]

    def loss_of(kind, beta=5.0):
        with meaning(f"kind {kind!r}: the gate needs kind, gap, entropy, beta and mask"):
            return sdar.sdar_loss(torch.zeros_like(gap), gap, mask, kind, beta, entropy)[0]

    gated = torch.sigmoid(5 * four) * four
    message = "a mean over the four tokens of two rows, not the mean of the rows' means"
    check_near(loss_of("gap"), gated.mean(), message)
    gated = torch.sigmoid(2 * four) * four
    check_near(loss_of("gap", 2.0), gated.mean(), "beta must reach the gate")
    check_near(loss_of("none"), four.mean(), "kind must reach the gate: none is a gate of 1")
    gated = torch.sigmoid(5 * entropy[mask > 0]) * four
    check_near(loss_of("entropy"), gated.mean(), "the entropy must reach the gate")
    gated = 0.627665 * four
    message = "the mask must reach the gate: a constant gate is a mean over the mask"
    check_near(loss_of("constant"), gated.mean(), message)
    message = "a gate may be given by its values, which are then taken as they are"
    check_near(loss_of(entropy), (entropy * gap)[mask > 0].mean(), message)


def grade_kl_k3():
    p = tensor(0.5, 0.3, 0.2)
    q = tensor(0.2, 0.3, 0.5)
    policy = p.log().requires_grad_()
    k3 = sdar.kl_k3(policy, q.log())
    assert k3.shape == policy.shape, "a value for every token, not their mean or sum"
    assert k3.requires_grad, "it is a term of the loss: the policy must not be detached"
    message = "k3 is 0 where the two agree and never negative; the plain difference is neither"
    assert (k3 >= 0).all(), message
    check_near(k3[0, 1], 0, message)
    check_near(
        (p * k3).sum(),
        (p * (p / q).log()).sum(),
        "its mean under the policy is KL(policy || reference): d = reference - policy",
    )
    (slope,) = torch.autograd.grad(k3.sum(), policy)
    check_near(slope, 1 - q / p, "reference is a constant, the policy is not")

    value = sdar.kl_k3(tensor(-2.4), tensor(0.0))
    message = "e^2.4 - 2.4 - 1: only what is further apart is clamped"
    check_near(value, [[7.623176]], message)
    check_near(sdar.kl_k3(tensor(0.0), tensor(-9.0)), [[8.000123]], message)
    far = tensor(-900.0).requires_grad_()
    value = sdar.kl_k3(far, tensor(0.0))
    message = (
        "the value is clamped to 10, and exp must not overflow before: its gradient would be nan"
    )
    check_near(value.sum(), 10, message)
    (slope,) = torch.autograd.grad(value.sum(), far)
    assert slope.isfinite().all(), message


def grade_retrieve():
    bank = [
        envs.Skill("mug", "m", ("put", "heat"), ("mug",)),
        envs.Skill("hat", "h", (), ("hat",)),
        envs.Skill("all", "a"),
        envs.Skill("cup", "c", ("cool",), ("cup",)),
        envs.Skill("lamp", "l", ("look",)),
    ]

    def names(strategy, seed=0, bank=bank, **options):
        task = "put that mug in drawer 1"
        with meaning(f"{strategy}: no more than the bank has"):
            skills = envs.retrieve(bank, task, "put", strategy, seed, **options)
        return [skill.name for skill in skills]

    assert names("keyword") == ["mug", "all"], (
        "task type and a whole word must fit ('hat' is in 'that'); no condition fits always"
    )
    assert names("none") == [], "none is empty"
    assert names("full") == ["mug", "hat", "all", "cup", "lamp"], "full is the bank in its order"
    assert len(names("random")) == 2, "random: as many as keyword finds"
    assert set(names("wrong")) == {"cup", "lamp"}, (
        "wrong: of other task types only, as many as keyword finds; a skill without types is never "
        "wrong"
    )
    message = "one seed, one choice: the episodes of a group read the same skills"
    for seed in range(9):  # once could be luck
        assert names("random", seed) == names("random", seed), message
    choices = {str(names("random", seed)) for seed in range(9)}
    assert len(choices) > 1, "another seed, another choice"

    for seed in range(9):
        for strategy in ("random", "wrong"):
            message = f"{strategy}: a skill is there once"
            assert len({*names(strategy, seed)}) == 2, message
    drawn = {name for seed in range(30) for name in names("random", seed)}
    assert len(drawn) == 5, "random: of the whole bank, not of what fits"
    misfits = bank[1:2] + bank[3:]
    assert len(names("random", bank=misfits)) == 1, "random: at least one, even where nothing fits"
    assert names("wrong", bank=bank[:3]) == [], "wrong: none, if the bank has none of another type"

    bandit = envs.Bandit({"all found": [5, -5.0], "mug found": [5, 5.0], "hat not found": [5, 5.0]})
    bandit.SLOTS = 2
    known = names("ucb", bank=bank[:3], bandit=bandit)
    message = "ucb: the skills that the bandit chooses, here the two that were worth something"
    assert {*known} == {"mug", "hat"}, message
    orders = {str(names("ucb", seed)) for seed in range(9)}
    assert len(orders) > 1, "ucb: ties are broken differently with each seed: shuffle the bank"


def grade_gated_term():
    import trl_trainer

    student = torch.tensor([[-9.0, -1.0, -0.5, -2.0, -8.0], [-9.0, -0.7, -1.5, -8.0, -8.0]])
    student = student.double().requires_grad_()
    entropy = torch.full((2, 5), 0.3).double()
    outputs = [
        SimpleNamespace(log_probs=student[:1], entropy=entropy[:1]),
        SimpleNamespace(log_probs=student[1:], entropy=entropy[1:]),
    ]
    inputs = {
        "prompt_ids": torch.tensor([[0, 7], [3, 4]]),
        "prompt_mask": torch.tensor([[0, 1], [1, 1]]),
        "completion_ids": torch.tensor([[5, 6, 8, 9], [5, 6, 0, 0]]),
        "completion_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]]),
    }
    teacher = torch.tensor([-0.5, 0.0, -2.2, -7.0])
    scored = {(7, 5, 6, 8, 9): teacher, (3, 4, 5, 6): None}
    config = SimpleNamespace(gate="gap", gate_beta=5.0)
    trainer = SimpleNamespace(run=config, scored=scored, tokens_a_step=lambda inputs: 8.0)
    with meaning("the ids of an episode are those where its masks are 1, prompt and completion"):
        term, stats = trl_trainer.gated_term(trainer, outputs, inputs)
    with meaning("the term must keep the gradient of the log-probs"):
        (slope,) = torch.autograd.grad(term, student)
    g = torch.sigmoid(5 * torch.tensor([0.5, -0.2, 1.0, 0.0, 0.0])).double()
    message = "only the last C columns are of the completion; tokens of a tool, padding: 0"
    check_near(slope[:, 0], [0, 0], message)
    check_near(slope[0, 2], 0, message)
    check_near(slope[1, 3:], [0, 0], message)
    check_near(
        -slope[0, [1, 3, 4]] * 8,
        g[:3],
        "the push is g / tokens of the whole optimiser step: the micro-batch's mean, times its "
        "tokens, by tokens_a_step",
    )
    check_near(-slope[1, 1:3] * 8, g[3:], "without a skill the gap is 0, and the gate 1/2")
    check_near(stats["tokens"], 5, "five tokens were sampled")
    mean = (g * torch.tensor([0.5, -0.2, 1.0, 0, 0])).sum() / 5
    check_near(stats["loss"], mean, "stats['loss'] is the mean over this micro-batch")
    trainer.run = SimpleNamespace(gate="entropy", gate_beta=2.0)
    term, _ = trl_trainer.gated_term(trainer, outputs, inputs)
    (slope,) = torch.autograd.grad(term, student)
    message = "gate, beta and entropy must reach sdar_loss"
    check_near(-slope[0, 1] * 8, torch.sigmoid(torch.tensor(0.6)), message)


# Tokens of policy_loss: (log of the ratio, advantage, loss, slope by the log-prob, what it is).
CLIPPED = [
    (0.1, 1, -1.105171, -1.105171, "the ratio is e to the difference of log-probs, new less old"),
    (0.5, 1, -1.2, 0, "A > 0 and far above 1: clipped, nothing more is earned"),
    (-0.5, 1, -0.606531, -0.606531, "A > 0 but far below 1: not clipped, or it never comes back"),
    (-0.5, -1, 0.8, 0, "A < 0 and far below 1: clipped"),
    (0.5, -1, 1.648721, 1.648721, "A < 0 but far above 1: not clipped"),
    (
        1.5,
        -1,
        3,
        0,
        "A < 0 and a ratio of 4.5: the loss stops at -A dual_clip, and so does the slope",
    ),
    (1.5, 2, -2.4, 0, "dual_clip is for negative advantages"),
]


def grade_policy_loss():
    for log_ratio, advantage, expected, expected_slope, message in CLIPPED:
        new, old = tensor(log_ratio - 1).requires_grad_(), tensor(-1.0).requires_grad_()
        loss, _ = sdar.policy_loss(new, old, tensor(advantage), torch.ones(1, 1))
        check_near(loss, expected, message)
        with meaning("the loss must keep the gradient of the new log-probs"):
            slopes = torch.autograd.grad(loss, [new, old], allow_unused=True)
        check_near(slopes[0], [[expected_slope]], message)
        assert not slopes[1], "the old log-probs are numbers: no gradient goes there"

    new = torch.cat([tensor(-0.5, -1, -1, torch.nan), tensor(0.5, 9, 9, 9)]).requires_grad_()
    old = torch.cat([tensor(-1, -1, -1.5, 9), tensor(-1, 9, 9, 9)])
    mask, advantages = torch.tensor(MASK), torch.tensor([[1.0], [-1]]).double()
    loss, stats = sdar.policy_loss(new, old, advantages, mask)
    message = (
        "one mean over all tokens of the mask, not of the rows' means; NaN behind it is nothing"
    )
    check_near(loss, (-1.2 - 1 - 1.2 + 3) / 4, message)
    (slope,) = torch.autograd.grad(loss, new)
    assert slope.isfinite().all(), "NaN behind the mask must not reach the gradient: visible()"
    check_near(stats["ratio_mean"], (2 * 1.648721 + 1 + 4.481689) / 4, message)
    check_near(
        stats["clip_fraction"], 0.5, "clip_fraction: the share of tokens that the clip changed"
    )
    loss, _ = sdar.policy_loss(new, old, advantages, mask, clip_eps=0.5, dual_clip=None)
    message = "clip_eps is an argument, and dual_clip=None switches it off"
    check_near(loss, (-1.5 - 1 - 1.5 + 4.481689) / 4, message)
    low, _ = sdar.policy_loss(
        tensor(-2.0), tensor(-1.0), tensor(-1), torch.ones(1, 1), clip_eps=0.5
    )
    check_near(low, 0.5, "the lower bound is 1 - clip_eps")
    high, _ = sdar.policy_loss(tensor(0.5), tensor(-1.0), tensor(-1), torch.ones(1, 1), dual_clip=2)
    check_near(high, 2, "dual_clip is an argument")


def an_episode(ids, mask, skill_at=1, skill_ids=()):
    return sdar.Episode("put a mug", "put", 0, list(ids), list(mask), skill_at, [], list(skill_ids))


def grade_view():
    episode = an_episode([1, 2, 3, 4, 5], [0, 0, 1, 0, 1], skill_at=1, skill_ids=[8, 9])
    for _ in range(2):
        with meaning("view returns two lists"):
            (ids, mask), student = episode.view(True), episode.view(False)
        message = "the student never sees the skill, and the episode stays as it is"
        assert tuple(student) == ([1, 2, 3, 4, 5], [0, 0, 1, 0, 1]), message
        message = "the teacher reads the skill from place skill_at on, between the halves"
        assert ids == [1, 8, 9, 2, 3, 4, 5], message
        message = "the skill was not sampled: 0 on it, and the ones move with their ids"
        assert mask == [0, 0, 0, 0, 1, 0, 1], message
    alone = an_episode([1, 2, 3], [0, 0, 1])
    assert tuple(alone.view(True)) == ([1, 2, 3], [0, 0, 1]), "no skill fits: both read the same"


class Counting:
    """A model of four words that finds likely what it has read often: the state at a position is
    how often each id has come up, that position's included, and the head is the identity."""

    device = torch.device("cpu")
    head = torch.eye(4, requires_grad=True)

    def base_model(self, input_ids, attention_mask, use_cache=False):
        seen = torch.nn.functional.one_hot(input_ids, 4) * attention_mask[..., None]
        return SimpleNamespace(last_hidden_state=seen.cumsum(1).float())

    def get_output_embeddings(self):
        return SimpleNamespace(weight=self.head)


def counted(chosen, *counts, temperature=1.0):
    """Counting's log-prob of an id after so many of each."""
    return torch.log_softmax(torch.tensor(counts) / temperature, -1)[chosen]


def grade_predicting_states():
    episodes = [
        an_episode([0, 1, 1, 2, 3, 1], [0, 0, 1, 1, 0, 1], skill_ids=[3, 3]),
        an_episode([2, 2, 3], [0, 0, 1]),
    ]
    config = SimpleNamespace(temperature=2.0, dtype="float32", kernel=False)

    def both(**flags):
        with meaning("ids, states and mask must be cut and chosen alike"):
            logprobs, entropy = sdar.response_logprobs(Counting(), episodes, config, **flags)
        assert logprobs.shape == (2, 3), "as many columns as the longest episode has sampled ids"
        return logprobs, entropy

    student, entropy = both()
    assert entropy is None, "entropies are given when they are asked for"
    first = counted(1, 1.0, 1, 0, 0, temperature=2)
    check_near(
        student[0, 0],
        first,
        "the first sampled id is predicted by the state before it, which has read two ids; the "
        "logits are divided by config.temperature",
    )
    more = [counted(2, 1.0, 2, 0, 0, temperature=2), counted(1, 1.0, 2, 1, 1, temperature=2)]
    check_near(student[0, 1:], more, "an observation has no column, but what follows has read it")
    check_near(student[1, 0], counted(3, 0.0, 0, 2, 0, temperature=2), "each episode by itself")
    check_near(student[1, 1:], [0, 0], "0 behind an episode's last sampled id")

    teacher, _ = both(with_skill=True)
    expected = counted(1, 1.0, 1, 0, 2, temperature=2)
    check_near(teacher[0, 0], expected, "with_skill: the same id, whose reader has seen the skill")
    check_near(teacher[1], student[1], "no skill: teacher and student are one reader")

    logprobs, entropy = both(with_entropy=True)
    p = torch.softmax(torch.tensor([1.0, 1, 0, 0]) / 2, -1)
    assert entropy is not None, "with_entropy: entropies, too"
    check_near(entropy[0, 0], -(p * p.log()).sum(), "the entropy of all four words, not of one")
    with meaning("the log-probs must keep their gradient"):
        (slope,) = torch.autograd.grad(logprobs.sum(), Counting.head)
    assert slope.abs().sum() > 0, "the log-probs must keep their gradient"
