"""The graders of the fill-in exercises: hand numbers, and what it means when one is missed.
.lab/tests/test_course.py runs them."""

from contextlib import contextmanager
from types import SimpleNamespace

import torch

import envs
import sdar


def tensor(*values):
    """Numbers, or rows of them, in float64."""
    return torch.tensor(values, dtype=torch.float64)


def check_near(got, expected, meaning):
    """AssertionError with the meaning of the numbers unless the two agree to 1e-5, and in shape."""
    got, expected = torch.as_tensor(got), torch.as_tensor(expected)
    assert got.shape == expected.shape, meaning
    assert torch.allclose(got.double(), expected.double(), atol=1e-5), meaning


@contextmanager
def meaning(message):
    """Whatever the learner's function raises in here becomes an AssertionError with a meaning."""
    try:
        yield
    except NotImplementedError:
        raise
    except Exception as error:
        raise AssertionError(f"{message} ({type(error).__name__}: {error})") from error


def slope_of(values, *inputs):
    """Gradients of the sum of `values`; None where it has none."""
    with meaning("the values must keep the gradient of the student's log-probs"):
        return torch.autograd.grad(values.sum(), inputs, allow_unused=True)


def check_shape(values, like):
    """AssertionError for a mean or a sum."""
    message = "a value for every token (N,): the mean is taken in update, once"
    assert values.shape == like.shape, message


def grade_group_advantages():
    rewards = torch.tensor([[1.0, 0, 0, 0]])
    advantages = sdar.group_advantages(rewards)
    assert advantages.shape == (1, 4), "an advantage for every reward, in the same rows"
    meant = "1.5 is (1 - 1/4) / 0.5: the deviation has G - 1 under it (1.73: G)"
    check_near(advantages[0], [1.5, -0.5, -0.5, -0.5], meant)

    advantages = sdar.group_advantages(torch.tensor([[1.0, 0.0], [5.0, 5.0]]))
    meant = "a row whose rewards are equal teaches nothing: 0, not nan (eps), nor the batch's mean"
    check_near(advantages[1], [0, 0], meant)
    meant = "a row is a group, and another group's rewards are not its business"
    check_near(advantages[0], [0.707106, -0.707106], meant)

    equal = sdar.group_advantages(torch.full((1, 7), 0.99))
    meant = "rounding, divided by eps, became an advantage of equal rewards: compute in float64"
    assert (equal.abs() < 1e-9).all(), meant
    far = sdar.group_advantages(rewards, eps=0.5)
    check_near(far[0, 0], 0.75, "eps is an argument, and is added to the deviation")


GAP = tensor(0.5, -0.2, 0.0, 0.3)
ENTROPY = tensor(0.1, 0.7, 0.0, 0.4)
GATES = {  # {gate: (its values on these four tokens with beta 5, what it is)}
    "gap": (
        [0.924142, 0.268941, 0.5, 0.817574],
        "sigmoid(beta gap): 1/2 without a gap, more where the teacher finds the token likelier",
    ),
    "entropy": (
        [0.622459, 0.970688, 0.5, 0.880797],
        "sigmoid(beta h): it must not know the gap",
    ),
    "soft_or": (
        [0.939913, 0.960834, 0.5, 0.947846],
        "1 - (1 - h)(1 - gap) goes into the sigmoid, all of it times beta",
    ),
    "none": ([1, 1, 1, 1], "1 everywhere"),
}


def grade_GATES():
    if not sdar.GATES:
        raise NotImplementedError("exercise: write GATES again")
    assert {*GATES} <= {*sdar.GATES}, f"the table has {', '.join(GATES)}"
    for kind, (expected, meant) in GATES.items():
        value = sdar.GATES[kind](GAP, ENTROPY, 5.0)
        assert value.shape == GAP.shape, f"{kind}: a gate for every token, so of the gap's shape"
        check_near(value, expected, f"{kind}: {meant}")
        if kind != "none":
            meant = f"{kind}: beta 0 is a gate of 1/2, whatever the token"
            check_near(sdar.GATES[kind](GAP, ENTROPY, 0.0), [0.5] * 4, meant)


def grade_sdar_loss():
    student = tensor(-1, -0.5, -2).requires_grad_()
    teacher = tensor(-0.5, -0.7, -2).requires_grad_()
    terms = sdar.sdar_loss(student, teacher)
    check_shape(terms["sdar_loss"], student)
    push, to_teacher = slope_of(-terms["sdar_loss"], student, teacher)
    assert push is not None, "the student must not be detached: through it alone the loss teaches"
    assert (push > 0).all(), (
        "every sampled token is pushed up; down means a turned sign, or a gate that is not detached"
    )
    gates = [0.924142, 0.268941, 0.5]
    check_near(push, gates, "the push on a token is its gate")
    assert to_teacher is None, "the teacher must be detached, or it learns to please the student"
    meant = "the value: g (teacher - student)"
    check_near(terms["sdar_loss"], [gates[0] * 0.5, gates[1] * -0.2, 0], meant)
    check_near(terms["gate"], gates, "gate: what the gap was multiplied by")
    assert not terms["gate"].requires_grad, "the gate must be detached"
    check_near(terms["gate_active"], [1, 0, 0], "gate_active: above 1/2, and a gate of 1/2 is not")

    def loss_of(kind, beta=5.0):
        with meaning(f"kind {kind!r}: its gate takes gap, entropy and beta"):
            return sdar.sdar_loss(tensor(0, 0, 0, 0), GAP, ENTROPY, kind, beta)["sdar_loss"]

    check_near(loss_of("gap", 2.0), torch.sigmoid(2 * GAP) * GAP, "beta must reach the gate")
    check_near(loss_of("none"), GAP, "kind must reach the gate: none is a gate of 1")
    gated = torch.sigmoid(5 * ENTROPY) * GAP
    check_near(loss_of("entropy"), gated, "the entropy must reach the gate")


def grade_kl_k3():
    p, q = tensor(0.5, 0.3, 0.2), tensor(0.2, 0.3, 0.5)
    policy = p.log().requires_grad_()
    k3 = sdar.kl_k3(policy, q.log())
    check_shape(k3, policy)
    meant = "k3 is 0 where the two agree and never negative; the plain difference is neither"
    assert (k3 >= 0).all(), meant
    check_near(k3[1], 0, meant)
    meant = "its mean under the policy is KL(policy || reference): d = reference - policy"
    check_near((p * k3).sum(), (p * (p / q).log()).sum(), meant)
    (slope,) = slope_of(k3, policy)
    check_near(slope, 1 - q / p, "reference is a constant, the policy is not")

    meant = "e^2.4 - 2.4 - 1: only what is further apart is clamped"
    check_near(sdar.kl_k3(tensor(-2.4), tensor(0.0)), [7.623176], meant)
    check_near(sdar.kl_k3(tensor(0.0), tensor(-9.0)), [8.000123], meant)
    far = tensor(-900.0).requires_grad_()
    value = sdar.kl_k3(far, tensor(0.0))
    meant = (
        "the value is clamped to 10, and exp must not overflow before: its gradient would be nan"
    )
    check_near(value, [10], meant)
    (slope,) = slope_of(value, far)
    assert slope.isfinite().all(), meant


def grade_retrieve():
    rows = [
        dict(name="mug", text="m", task_types=["put", "heat"], keywords=["mug"]),
        dict(name="hat", text="h", keywords=["hat"]),
        dict(name="all", text="a"),
        dict(name="cup", text="c", task_types=["cool"], keywords=["cup"]),
        dict(name="lamp", text="l", task_types=["look"]),
    ]

    def names(strategy, seed=0, rows=rows, arms=()):
        bank = envs.SkillBank(rows, strategy)
        bank.arms = dict(arms)
        with meaning(f"{strategy}: no more than the bank has"):
            skills = bank.retrieve("put that mug in drawer 1", "put", seed)
        return [skill.name for skill in skills]

    assert names("keyword") == ["mug", "all"], (
        "task type and a whole word must fit ('hat' is in 'that'); no condition fits always"
    )
    assert names("full") == ["mug", "hat", "all", "cup", "lamp"], "full is the bank in its order"

    meant = "one seed, one choice: the episodes of a group read the same skills"
    choices = [names("random", seed) for seed in range(30)]
    assert choices == [names("random", seed) for seed in range(30)], meant
    assert len({*map(str, choices)}) > 1, "another seed, another choice"
    meant = "random: as many as keyword finds, each once"
    assert all(len({*choice}) == len(choice) == 2 for choice in choices), meant
    assert len({*sum(choices, [])}) == 5, "random: of the whole bank, not of what fits"
    alone = names("random", rows=rows[1:2] + rows[3:])
    assert len(alone) == 1, "random: at least one, even where nothing fits"

    arms = {"mug found": [5, 5.0], "all found": [5, -5.0], "hat not found": [5, 5.0]}
    known = names("ucb", rows=[*rows[:3], rows[4]], arms=arms)
    meant = "ucb: the three of largest index: one never tried, then those that were worth something"
    assert known[0] == "lamp" and {*known} == {"lamp", "mug", "hat"}, meant
    orders = {str(names("ucb", seed)) for seed in range(9)}
    assert len(orders) > 1, "ucb: ties are broken differently with each seed: shuffle the bank"


def grade_gated_terms():
    import trainer

    student = torch.tensor([[-9.0, -1.0, -0.5, -2.0, -8.0], [-9.0, -0.7, -1.5, -8.0, -8.0]])
    student = student.double().requires_grad_()
    entropy = torch.tensor([[9.0, 0.3, 0.3, 0.3, 0.3], [9.0, 0.3, 0.3, 0.3, 0.3]])
    output = SimpleNamespace(log_probs=student, entropy=entropy)
    inputs = {
        "completion_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]]),
        "sampling_per_token_logps": tensor([-0.5, 0.0, -2.2, -7.0], [-0.7, -1.5, 0.0, 0.0]),
    }
    gap = tensor(0.5, -0.2, 1.0, 0.0, 0.0)

    def terms_of(**settings):
        with meaning("log-probs, entropies and the teacher's are chosen alike, by both masks"):
            return trainer.gated_terms(output, inputs, SimpleNamespace(**settings))

    terms = terms_of(gate="gap", gate_beta=5.0)
    meant = "five tokens were sampled: those of the completion that no tool wrote"
    check_near(terms["tokens"], [1] * 5, meant)
    (slope,) = slope_of(terms["sdar_loss"], student)
    g = torch.sigmoid(5 * gap)
    expected = torch.zeros(2, 5).double()
    expected[0, [1, 3, 4]], expected[1, 1:3] = g[:3], g[3:]
    meant = "the push is g on the sampled tokens; only the last C columns are the completion's"
    check_near(-slope, expected, meant)
    check_near(terms["gap"], gap, "gap: the teacher's log-prob less the student's")
    terms = terms_of(gate="entropy", gate_beta=2.0)
    meant = "gate, beta and entropy must reach sdar_loss"
    check_near(terms["gate"], torch.sigmoid(tensor(0.6)).expand(5), meant)

    inputs["old_per_token_logps"] = tensor([-1.5, 9, -2, -8], [-0.7, -1.5, 9, 9])
    meant = "gap: to the student that sampled, where the batch has it, not to one that moves"
    check_near(terms_of(gate="gap", gate_beta=5.0)["gap"], [1.0, *gap[1:]], meant)


# Tokens of policy_loss: (log of the ratio, advantage, loss, slope by the log-prob, what it is).
CLIPPED = [
    (0.1, 1, -1.105171, -1.105171, "the ratio is e to the difference of log-probs, new less old"),
    (0.5, 1, -1.2, 0, "A > 0 and far above 1: clipped, nothing more is earned"),
    (-0.5, 1, -0.606531, -0.606531, "A > 0 but far below 1: not clipped, or it never comes back"),
    (-0.5, -1, 0.8, 0, "A < 0 and far below 1: clipped"),
    (0.5, -1, 1.648721, 1.648721, "A < 0 but far above 1: not clipped"),
]


def grade_policy_loss():
    for log_ratio, advantage, expected, expected_slope, meant in CLIPPED:
        new = tensor(log_ratio - 1).requires_grad_()
        terms = sdar.policy_loss(new, tensor(-1.0), tensor(advantage))
        check_shape(terms["policy_loss"], new)
        check_near(terms["policy_loss"], [expected], meant)
        (slope,) = slope_of(terms["policy_loss"], new)
        check_near(slope, [expected_slope], meant)

    log_ratios, advantages = tensor(0.5, 0.0, 0.5, -0.5), tensor(1, 1, -1, -1)
    terms = sdar.policy_loss(log_ratios, tensor(0, 0, 0, 0), advantages)
    check_near(terms["ratio"], log_ratios.exp(), "ratio: the new probability by the old one")
    meant = "clipped: where the clip changed the loss, which at a ratio of 1 it does not"
    check_near(terms["clipped"], [1, 0, 0, 1], meant)
    terms = sdar.policy_loss(log_ratios, tensor(0, 0, 0, 0), advantages, clip_eps=0.5)
    meant = "clip_eps is an argument: the bounds are 1 - clip_eps and 1 + clip_eps"
    check_near(terms["policy_loss"], [-1.5, -1, 1.648721, 0.606531], meant)
    terms = sdar.policy_loss(tensor(-2.0), tensor(-1.0), tensor(-1), clip_eps=0.5)
    check_near(terms["policy_loss"], [0.5], meant)


def an_episode(ids, mask, skill_at=1, skill_ids=()):
    nothing = dict(env=None, task="", task_type="", random=None, skills=[])
    place = dict(skill_at=skill_at, skill_ids=list(skill_ids))
    return sdar.Episode(ids=list(ids), mask=list(mask), **place, **nothing)


def grade_view():
    episode = an_episode([1, 2, 3, 4, 5], [0, 0, 1, 0, 1], skill_at=1, skill_ids=[8, 9])
    for _ in range(2):
        with meaning("view returns two lists"):
            (ids, mask), student = episode.view(True), episode.view(False)
        meant = "the student never sees the skill, and the episode stays as it is"
        assert tuple(student) == ([1, 2, 3, 4, 5], [0, 0, 1, 0, 1]), meant
        meant = "the teacher reads the skill from place skill_at on, between the halves"
        assert ids == [1, 8, 9, 2, 3, 4, 5], meant
        meant = "the skill was not sampled: 0 on it, and the ones move with their ids"
        assert mask == [0, 0, 0, 0, 1, 0, 1], meant
    alone = an_episode([1, 2, 3], [0, 0, 1])
    assert tuple(alone.view(True)) == ([1, 2, 3], [0, 0, 1]), "no skill fits: both read the same"


class Counting:
    """A model of four words that finds likely what it has read often: the state at a position is
    how often each id has come up, that position's included, and the head is the identity."""

    device = torch.device("cpu")
    head = torch.eye(4, requires_grad=True)

    def base_model(self, input_ids, attention_mask=None, use_cache=False):
        seen = torch.nn.functional.one_hot(input_ids, 4).cumsum(1)
        return SimpleNamespace(last_hidden_state=seen.float())

    def get_output_embeddings(self):
        return SimpleNamespace(weight=self.head)


def counted(chosen, *counts):
    """Counting's log-prob of an id after so many of each, at temperature 2."""
    return torch.log_softmax(torch.tensor(counts) / 2.0, -1)[chosen]


def grade_response_logprobs():
    episodes = [
        an_episode([0, 1, 1, 2, 3, 1], [0, 0, 1, 1, 0, 1], skill_ids=[3, 3]),
        an_episode([2, 2, 3], [0, 0, 1]),
    ]
    config = SimpleNamespace(temperature=2.0, dtype="float32", kernel=False)

    def read(with_skill):
        with meaning("ids, states and mask must be cut and chosen alike"):
            values = sdar.response_logprobs(Counting(), episodes, config, with_skill)
        assert [len(part) for part in values] == [4, 4], "two values for each of four sampled ids"
        return values

    student, entropy = read(with_skill=False)
    meant = (
        "the first sampled id is predicted by the state before it, which has read two ids; the "
        "logits are divided by config.temperature"
    )
    check_near(student[0], counted(1, 1, 1, 0, 0), meant)
    more = [counted(2, 1, 2, 0, 0), counted(1, 1, 2, 1, 1)]
    meant = "an observation has no value, but what follows has read it"
    check_near(student[1:3], more, meant)
    check_near(student[3], counted(3, 0, 0, 2, 0), "each episode by itself, in its order")
    p = torch.softmax(tensor(1, 1, 0, 0) / 2, -1)
    meant = "the entropy of all four words, not of one"
    check_near(entropy[0], -(p * p.log()).sum(), meant)

    teacher, _ = read(with_skill=True)
    meant = "with_skill: the same id, whose reader has seen the skill"
    check_near(teacher[0], counted(1, 1, 1, 0, 2), meant)
    check_near(teacher[3], student[3], "no skill: teacher and student are one reader")
    (slope,) = slope_of(student, Counting.head)
    assert slope is not None and slope.abs().sum() > 0, "the log-probs must keep their gradient"
