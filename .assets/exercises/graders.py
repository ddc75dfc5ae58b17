"""The graders of the fill-in exercises: hand numbers, and what it means when one is missed. test_sdar.py runs them."""
import torch

import envs
import sdar

tensor = lambda *rows: torch.tensor(rows, dtype=torch.float64)
near = lambda x, y: torch.allclose(torch.as_tensor(x).double(), torch.as_tensor(y).double(), atol=1e-5)

def grade_group_advantages():
    score, advantages = tensor([1, 0, 0, 0, 1, 1])[0], sdar.group_advantages
    assert near(advantages(score[:4], torch.tensor([7] * 4))[0], 1.5), (
        "1.5 is (1 - 1/4) / 0.5: the deviation has n - 1 under it (1.73: n)")
    mixed = advantages(torch.tensor([1., 5., 0., 5.]), torch.tensor([3, 9, 3, 9]))
    assert near(mixed[[1, 3]], [0, 0]), (
        "all of group 9 scored alike, so nothing is to be learned: 0, not nan (eps), not the batch's mean")
    assert near(mixed[[0, 2]], [.707106, -.707106]), (
        "a group's rows need not stand together, and another group's scores are not its business")
    assert near(advantages(torch.tensor([.5]), torch.tensor([0])), .5), "a group of one: mean 0, deviation 1"
    assert near(advantages(score[:2], torch.tensor([0, 0]), normalize_std=False), [.5, -.5]), (
        "normalize_std=False leaves the mean off alone")
    weighted = advantages(score[:2], torch.tensor([0, 0]), weights=torch.tensor([3, 1]))
    assert near(weighted, advantages(tensor([1, 1, 1, 0])[0], torch.zeros(4))[[0, 3]]), "a weight of 3 counts a row three times"

def grade_gate():
    gap, h, mask = tensor([.5, -.2, 0.0, 9.0]).requires_grad_(), tensor([.1, .7, 0.0, 9.0]), tensor([1, 1, 1, 0])
    g = sdar.gate("gap", gap, h, 5.0, mask)
    assert not g.requires_grad, (
        "the gate must be detached: else tokens with a clearly negative gap are pushed down, without a bound")
    assert near(g[0, :3], [.924142, .268941, .5]), (
        "sigmoid(beta gap): 1/2 without a gap, more where the teacher finds the token likelier")
    assert near(sdar.gate("gap", gap, h, 0.0, mask), [[.5] * 4]), "beta 0 is a gate of 1/2 whatever the gap"
    for kind, expected, message in (
            ("entropy", [.622459, .970688, .5], "sigmoid(beta h): it must not know the gap"),
            ("soft_or", [.939913, .960834, .5], "1 - (1 - h)(1 - gap) goes into the sigmoid"),
            ("none", [1, 1, 1], "1 everywhere"), ("reverse_kl", [.5, -.2, 0], "the gap itself, signed"),
            ("constant", [.564361] * 3, "the mean of the gap gate over the mask: what stands behind it must not count"),
            ("centred", [.359781, -.29542, -.064361], "the gap gate less its mean over the mask")):
        value = sdar.gate(kind, gap, h.clone().requires_grad_(), 5.0, mask)
        assert value.shape == gap.shape, f"{kind}: a gate for every token, so of the gap's shape"
        assert not value.requires_grad, f"{kind}: no gate has a gradient, through the entropy neither"
        assert near(value[0, :3], expected), f"{kind}: {message}"
    shuffled = sdar.gate("shuffled", gap, h, 5.0, mask, torch.Generator().manual_seed(0))
    assert near(shuffled[mask > 0].sort().values, g[mask > 0].sort().values), (
        "shuffled: the same values, on other tokens, within the mask")

def grade_sdar_loss():
    nan = float("nan")
    student, teacher, mask = tensor([-1, -.5, -2, nan]).requires_grad_(), tensor([-.5, -.7, -2, nan]).requires_grad_(), tensor([1, 1, 1, 0])
    loss, stats = sdar.sdar_loss(student, teacher, mask)
    push = -torch.autograd.grad(loss, student, retain_graph=True)[0]
    assert push.isfinite().all() and not push[0, 3], (
        "what stands under a mask of 0, nan included, may reach nothing: multiplying does not stop nan")
    assert (push[0, :3] > 0).all(), "every sampled token is pushed up; down means a turned sign or a gate that is not detached"
    assert near(push[0, :3] * 3, [.924142, .268941, .5]), (
        "the push is g / tokens of the mask: a mean over tokens, not rows or columns")
    assert torch.autograd.grad(loss, teacher, allow_unused=True)[0] is None, (
        "the teacher must be detached, or it learns to please the student")
    assert near(loss.item(), (.924142 * .5 - .268941 * .2) / 3), "the value: mean of g (teacher - student)"
    assert near(list(stats.values()), [.564361, 1 / 3, .1]), (
        "gate_mean, gate_active (a gate of 1/2 is not), gap_mean: means over the mask")

def grade_kl_k3():
    p, q = tensor([.5, .3, .2]), tensor([.2, .3, .5])
    policy = p.log().requires_grad_()
    k3 = sdar.kl_k3(policy, q.log())
    assert k3.requires_grad, "it is a term of the loss: the policy must not be detached"
    assert (k3 >= 0).all() and near(k3[0, 1], 0), (
        "k3 is 0 where the two agree and never negative; the plain difference is neither")
    assert near((p * k3).sum(), (p * (p / q).log()).sum()), (
        "its mean under the policy is KL(policy || reference): d = reference - policy")
    assert near(torch.autograd.grad(k3.sum(), policy)[0], 1 - q / p), "reference is a constant, the policy is not"
    far = tensor([-900.0]).requires_grad_()
    value = sdar.kl_k3(far, tensor([0.0]))
    assert value == 10 and torch.autograd.grad(value.sum(), far)[0].isfinite().all(), (
        "the value is clamped to 10, and exp must not overflow before: its gradient would be nan")

def grade_retrieve():
    bank = [envs.Skill("mug", "m", ("put", "heat"), ("mug",)), envs.Skill("hat", "h", (), ("hat",)), envs.Skill("all", "a"),
            envs.Skill("cup", "c", ("cool",), ("cup",)), envs.Skill("lamp", "l", ("look",))]
    names = lambda strategy, seed=0: [skill.name for skill in envs.retrieve(bank, "put that mug in drawer 1", "put", strategy, seed)]
    assert names("keyword") == ["mug", "all"], (
        "task type and a whole word must fit ('hat' is in 'that'); no condition fits always")
    assert names("none") == [] and names("full") == ["mug", "hat", "all", "cup", "lamp"], (
        "none is empty, full is the bank in its order")
    assert len(names("random")) == len(names("wrong")) == 2, "as many as keyword finds"
    assert {*names("wrong")} == {"cup", "lamp"}, "wrong: of other task types only; a skill without types is never wrong"
    assert names("random") == names("random"), "one seed, one choice: the episodes of a group read the same skills"
    assert len({str(names("random", seed)) for seed in range(9)}) > 1, "another seed, another choice"
