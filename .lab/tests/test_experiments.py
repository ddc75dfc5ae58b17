"""Tests of experiments/variants.py."""

import copy

import numpy as np
import torch
import variants
from pytest import mark

import envs
import sdar
from sdar import configure
from test_sdar import play, pytestmark, table, trained  # noqa: F401

# By hand: A and g are advantages and gates of the step without a variant, where each group has one
# winner; the losses are those of a student that has moved.
VALUES = """
"gate:own"              "close(gate, g) and close(sdar_loss, g * (teacher - logprobs))"
"gate:constant"         "close(gate, g.mean()) and close(sdar_loss, gate * (teacher - logprobs))"
"gate:centred"          "close(gate, g - g.mean())"
"gate:shuffled"         "not close(gate, g) and close(gate.sort()[0], g.sort()[0])"
"std:off"               "advantages.unique().tolist() == [-0.5, -0.25, 0.5, 0.75]"
"advantage:gap"         "close(advantages, 3 * A + 2 * (g - g.mean()))"
"advantage:reverse_kl"  "close(advantages, 3 * A + 2 * (teacher - old))"
"advantage:gap"         "close(loss, policy_loss + 0.01 * kl)"
"divergence:reverse"    "close(loss, 3 * policy_loss + 0.01 * kl + 2 * gate * divergence)"
"divergence:reverse"    "close(sdar_loss, gate * divergence)"
"divergence:forward"    "sdar_loss.sum().backward() or model.lm_head.weight.grad.norm() > 0"
"""


@mark.parametrize("word, check", table(VALUES))
def test_what_a_variant_changes_in_a_step_by_hand(word, check, policy):
    config = configure(group_size=4, policy_coef=3, sdar_coef=2, invalid_penalty=0)
    episodes = play(policy, config)
    for row in (0, 5, 6):
        episodes[row].reward = 1.0
    model = policy[0]
    start = copy.deepcopy(model)
    plain = sdar.step_batch(model, model, model, episodes, config, 1)
    hooks = variants.hooks([word])
    batch = hooks["step_batch"](model, model, model, episodes, config, 1)
    model.lm_head.weight.data *= 0.5
    names = batch | hooks["objective"](model, episodes, batch, config)
    names["model"] = model
    names["A"] = plain["advantages"]
    names["g"] = torch.sigmoid(5 * (plain["teacher"] - plain["old"]))
    names["logprobs"], _ = sdar.response_logprobs(model, episodes, config)
    names["divergence"] = variants.full_divergence(model, start, episodes, config, "reverse")
    names["close"] = lambda a, b: torch.allclose(a, b, atol=1e-5)
    assert eval(check, names)


DIVERGENCES = """
"reverse"  "kl(student, teacher)"
"forward"  "kl(teacher, student)"
"jsd"      "(kl(student, middle) + kl(teacher, middle)) / 2"
"""


@mark.parametrize("kind, formula", table(DIVERGENCES))
def test_a_divergence_is_that_of_the_two_readers(kind, formula, policy):
    """For a row that is padded, beside an unpadded pass."""
    config = configure(group_size=2, temperature=0.7)
    episodes = play(policy, config, episodes=4)
    model = policy[0]
    other = copy.deepcopy(model)
    other.model.norm.weight.data *= 1.1
    found = variants.full_divergence(model, other, episodes, config, kind)

    def shares(reader, with_skill):
        ids, mask = episodes[-1].view(with_skill)
        logits = reader(torch.tensor([ids])).logits[0, :-1].double()
        sampled = torch.tensor(mask[1:]) > 0
        return (logits[sampled] / 0.7).softmax(-1)

    student = shares(model, False)
    teacher = shares(other, True)
    names = {"student": student, "teacher": teacher, "middle": (student + teacher) / 2}
    names["kl"] = lambda p, q: (p * (p / q).log()).sum(-1)
    expected = eval(formula, names).float()
    assert torch.allclose(found[-len(expected) :], expected, atol=1e-4)


FOLLOWS = """
"ema"     3   0.1
"ema"     1   1
"lagged"  1   1
"lagged"  2   0
"lagged"  10  0
"lagged"  11  1
"""


@mark.parametrize("kind, step, moved", table(FOLLOWS))
def test_a_copied_teacher_follows_when_it_should(kind, step, moved, policy):
    model = policy[0]
    teacher = copy.deepcopy(model)
    before = teacher.lm_head.weight.clone()
    model.lm_head.weight.data += 1
    found = variants.follow(teacher, model, kind, step)
    assert torch.allclose(found.lm_head.weight, before + moved, atol=1e-6)


def test_a_term_of_ones_own_replaces_no_number_of_the_run(tmp_path):
    hooks = {"objective": lambda *args: sdar.objective(*args) | {"success": args[2]["old"]}}
    assert trained(tmp_path, hooks=hooks, steps=1, max_turns=1)[0]["success"] == 0


def test_a_run_has_its_teacher_and_skills_in_any_order(tmp_path):
    words = ["divergence:forward", "gate:shuffled", "std:off", "teacher:ema", "skills:0.5"]

    def run(*words):
        name = "-".join(["run", *words])
        hooks = variants.hooks(words)
        _, lines = trained(tmp_path, name, hooks, lr=3e-3, tasks_per_step=3)
        return lines

    everything = run(*words)
    assert run(*reversed(words)) == everything
    assert run(*words[:4]) != everything
    assert run(*words[:3], words[4]) != everything


SHARES = """
"skills:.5"        0.3  0.7
"skills:0"         0    0
"retrieval:wrong"  0    0
"""


@mark.parametrize("word, low, high", table(SHARES))
def test_skills_are_right_in_a_share_of_the_groups(word, low, high):
    """The same at each call, as for the episodes of a group; the others fit no part of the task."""
    world = envs.make_env("toy")
    bank = variants.hooks([word])["skill_bank"](world.skills)
    right = []
    for seed, task in enumerate(world.tasks("train")[:200]):
        kind = world.goals[task][0]
        found = bank.retrieve(task, kind, seed)
        assert found and found == bank.retrieve(task, kind, seed)
        (fits,) = {skill.matches(task, kind) for skill in found}
        right.append(fits)
    assert low <= np.mean(right) <= high


# --- Played again ------------------------------------------------------------------------

# A: the advantages of the tries. Where the skill is taken out, the guided tries share the baseline
# of the plain ones, and exceed them.
AGAIN = """
"practice:keep"      "told == 12 * [0] + 4 * [1] and abs(sum(A[4:8])) + abs(sum(A[12:])) < 1e-4"
"practice:out"       "told == 16 * [0] and sum(A[12:]) > 0.1 and abs(sum(A[4:8] + A[12:])) < 1e-4"
"sampling:9/0.01"    "len({*map(str, ids)}) == 3"
"sampling:0.0001/1"  "len({*map(str, ids)}) == 3"
"sampling:1/1"       "ids == before"
"""


@mark.parametrize("word, check", table(AGAIN))
def test_a_step_is_played_again(word, check, policy):
    """Of three groups a quarter has won, nobody, and a half: the second practises with the skill.
    A sampler of one token, or almost, plays one episode a group."""
    config = configure(method="grpo", group_size=4, tasks_per_step=3, rollout_batch=5)
    model, chat = policy
    worlds = sdar.make_envs(config)
    rng = np.random.default_rng([2, config.seed, 1])
    starts = sdar.draw_starts(worlds[0], config, 1, rng)
    episodes = sdar.rollout(model, chat, worlds, starts, config, 1.0)
    for row in (0, 8, 9):
        episodes[row].won = True
        episodes[row].reward = 1.0
    names = {"before": [episode.ids for episode in episodes]}
    prompts = [episode.ids[: episode.mask.index(1)] for episode in episodes]
    step_batch = variants.hooks([word])["step_batch"]
    batch = step_batch(model, model, model, episodes, config, 1)

    assert torch.allclose(batch["old"], sdar.score(model, episodes, config), atol=1e-5)
    names["ids"] = [episode.ids for episode in episodes]
    names["told"] = [episode.ids[: episode.mask.index(1)] not in prompts for episode in episodes]
    ends = np.cumsum([len(episode.logprobs) for episode in episodes]) - 1
    names["A"] = batch["advantages"][ends].tolist()
    assert eval(check, names)
