"""Tests of the experiments: variants.py, practice.py."""

import copy
import json
import math

import numpy as np
import practice
import torch
import variants
from pytest import approx, mark

import envs
import sdar
from sdar import configure, main
from test_sdar import play, pytestmark, small, table, trained  # noqa: F401

TASK = "put a mug in desk 1"


def run(tmp_path, *words, **changes):
    """A small run with variants: (what train() returned, the lines of its metrics.jsonl)."""
    return trained(tmp_path, "-".join(["run", *words]), variants.hooks(words), **changes)


def one_batch(policy, words, **changes):
    """Before an update: (hooks of the variants, episodes, step_batch's values, config)."""
    config = configure(**{"group_size": 4, "minibatches": 1, **changes})
    start = copy.deepcopy(policy[0])
    start.model.norm.weight.data *= 1.1
    episodes = play(policy, config)
    episodes[0].reward = episodes[5].reward = 1.0
    hooks = variants.hooks(words)
    batch = hooks["step_batch"](policy[0], start, policy[0], episodes, config, 1)
    return hooks, episodes, batch, config


def one_update(policy, *words, **changes):
    """An update by SGD: (change of the weights, that is -gradient; metrics)."""
    hooks, episodes, batch, config = one_batch(policy, words, **changes)
    model, rng = copy.deepcopy(policy[0]), np.random.default_rng(0)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    metrics = sdar.update(model, sgd, episodes, batch, config, rng, hooks["objective"])
    weights = [torch.nn.utils.parameters_to_vector(m.parameters()) for m in (model, policy[0])]
    return weights[0] - weights[1], metrics


# --- Gates -------------------------------------------------------------------------------


def test_without_words_the_hooks_change_nothing(policy):
    (plain, metrics), (own, its_metrics) = one_update(policy), one_update(policy, "gate:own")
    config, episodes = configure(group_size=4, minibatches=1), play(policy, configure(group_size=4))
    episodes[0].reward = episodes[5].reward = 1.0
    expected = sdar.step_batch(policy[0], policy[0], policy[0], episodes, config, 1)
    batch = one_batch(policy, [])[2]
    for name in ("old", "advantages", "teacher"):
        assert torch.equal(batch[name], expected[name])
    assert torch.allclose(plain, own, atol=1e-6)  # in one optimiser step they are the loss's gates
    assert metrics == approx(its_metrics, abs=1e-6)


@mark.parametrize("kind", ["constant", "shuffled", "centred"])
def test_controls_change_the_gradient_and_keep_or_take_off_the_mean(policy, kind):
    gap, plain = one_update(policy)
    control, metrics = one_update(policy, f"gate:{kind}")
    assert not torch.allclose(control, gap, atol=1e-5)
    factor = 0 if kind == "centred" else 1
    assert metrics["gate"] == approx(factor * plain["gate"], abs=1e-6)
    assert metrics["loss"] == approx(
        metrics["policy_loss"] + 0.01 * metrics["kl"] + metrics["sdar_loss"], abs=1e-6
    )


@mark.parametrize("words", [["gate:shuffled"], ["gate:constant", "divergence:jsd"]])
def test_gradient_and_metrics_do_not_depend_on_the_micro_batch(policy, words):
    one, metrics = one_update(policy, *words)
    many, metrics_many = one_update(policy, *words, micro_batch=3)
    assert torch.allclose(one, many, atol=1e-6)
    assert one.abs().max() > 1e-4
    assert metrics == approx(metrics_many, rel=1e-4, abs=1e-6)


def test_controls_take_the_steps_first_gaps_once(policy):
    hooks, episodes, batch, config = one_batch(policy, ["gate:shuffled"])
    first = torch.sigmoid(5 * (batch["teacher"] - batch["old"]))
    assert not torch.equal(batch["gate"], first)
    assert torch.equal(batch["gate"].sort()[0], first.sort()[0])
    with torch.no_grad():
        policy[0].lm_head.weight *= 0.5  # the student moves
    terms = hooks["objective"](policy[0], episodes, batch, config)
    assert torch.equal(terms["gate"], batch["gate"])


def test_reverse_kl_is_a_gate_of_the_gap_itself(policy):
    _, metrics = one_update(policy, gate="reverse_kl")
    assert metrics["gate"] == approx(metrics["gap"], abs=1e-5)


# --- Divergences -------------------------------------------------------------------------

# Two distributions over two tokens: (1/2, 1/2) and (1/4, 3/4), and what is between them.
DIVERGENCES = """
"reverse"  "0.5*log(2)+0.5*log(2/3)"
"forward"  "0.25*log(1/2)+0.75*log(3/2)"
"jsd"      "(0.5*log(4/3)+0.5*log(4/5)+0.25*log(2/3)+0.75*log(6/5))/2"
"""


@mark.parametrize("kind, formula", table(DIVERGENCES))
def test_divergence_by_hand(kind, formula):
    student, teacher = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    value = variants.between(student, teacher, kind)
    assert value.item() == approx(eval(formula, {"log": math.log}))
    assert variants.between(student, student, kind).item() == approx(0)


@mark.parametrize("kind", ["reverse", "forward", "jsd"])
def test_full_divergence_is_that_of_the_two_readers(kind, policy):
    config = configure(group_size=2, temperature=0.7)
    episodes = play(policy, config, episodes=4)
    episodes[0].skill_ids = []  # it is taught nothing
    teacher = copy.deepcopy(policy[0])
    teacher.model.norm.weight.data *= 1.1
    found = variants.full_divergence(policy[0], teacher, episodes, config, kind)
    parts = found.split([len(episode.logprobs) for episode in episodes])
    for part, episode in zip(parts, episodes):
        readers = []
        for model, (ids, mask) in ((policy[0], episode.view(False)), (teacher, episode.view(True))):
            logits = model(torch.tensor([ids])).logits[0, :-1] / 0.7
            readers.append(torch.log_softmax(logits, -1)[torch.tensor(mask[1:]) > 0])
        expected = variants.between(*readers, kind) * bool(episode.skill_ids)
        assert part.tolist() == approx(expected.tolist(), abs=1e-5)
    found.sum().backward()
    assert [weight.grad for weight in teacher.parameters() if weight.grad is not None] == []
    assert policy[0].lm_head.weight.grad.abs().sum() > 0


def test_a_divergence_of_all_tokens_is_trained_on(tmp_path):
    only = {"gate": "none", "method": "opsd", "kl_coef": 0.0}
    final, _ = run(tmp_path, "divergence:forward", **only)
    assert final["sdar_loss"] == approx(final["loss"])
    assert final["sdar_loss"] > 0


def test_a_divergence_teaches_nobody_without_a_skill(tmp_path, monkeypatch):
    monkeypatch.setattr(envs.Skill, "matches", lambda *args: False)  # nothing is found
    final, _ = run(tmp_path, "divergence:reverse", lr=3e-3)
    assert final["sdar_loss"] == 0


def test_a_divergence_is_from_the_teacher_of_the_steps_start(policy):
    hooks, episodes, batch, config = one_batch(policy, ["divergence:reverse"])
    frozen = copy.deepcopy(policy[0])
    with torch.no_grad():
        policy[0].lm_head.weight *= 0.5
    terms = hooks["objective"](policy[0], episodes, batch, config)
    values = variants.full_divergence(policy[0], frozen, episodes, config, "reverse")
    assert torch.allclose(terms["sdar_loss"], terms["gate"] * values, atol=1e-6)


# --- Advantages --------------------------------------------------------------------------


@mark.parametrize("kind, more", [("gap", [-0.125, 0.125]), ("reverse_kl", [0, math.log(3) / 5])])
def test_distilled_advantages_by_hand(kind, more):
    zero = torch.zeros(2)
    gaps = torch.tensor([0.0, math.log(3) / 5])  # gates 1/2 and 3/4
    batch = {"advantages": zero + 2, "old": zero, "teacher": gaps}
    config = configure(sdar_coef=4)
    found = variants.advantage(kind, batch, [], config, 1)["advantages"]
    assert found.tolist() == approx([2 + 4 * one for one in more])


@mark.parametrize("method", ["sdar", "opsd"])
def test_on_policy_an_advantage_has_the_gradient_of_the_centred_gate(method, policy):
    """At ratio 1, before the clip does anything. Of rewards OPSD takes no notice."""
    shared = {"method": method, "sdar_coef": 0.5, "kl_coef": 0.0, "grad_clip": 1e6}
    found = [one_update(policy, word, **shared)[0] for word in ("gate:centred", "advantage:gap")]
    assert torch.allclose(*found, atol=1e-6)
    assert found[0].abs().max() > 1e-4


@mark.parametrize("method", ["grpo", "rlsd"])
def test_without_the_deviation_an_advantage_is_the_reward_less_the_mean(method, policy):
    _, episodes, batch, _ = one_batch(policy, ["std:off"], method=method)
    plain = one_batch(policy, [], method=method)[2]["advantages"]
    rewards = [one.reward - 0.01 * one.invalid for one in episodes]
    rewards = torch.tensor(rewards).view(-1, 4)
    centred = variants.by_token((rewards - rewards.mean(1, keepdim=True)).flatten(), episodes)
    scaled = variants.by_token(rewards.std(1).repeat_interleave(4), episodes) * plain
    if method == "grpo":
        assert torch.allclose(batch["advantages"], centred, atol=1e-5)
    assert torch.allclose(batch["advantages"], scaled, atol=1e-5)
    assert batch["advantages"].abs().max() > 0.5


# --- Teachers ----------------------------------------------------------------------------

FOLLOWS = """
"ema,4"     3  0.25
"ema"       3  0.1
"lagged,2"  2  0
"lagged,2"  3  1
"lagged"    3  0
"""


@mark.parametrize("kind, step, moved", table(FOLLOWS))
def test_a_copied_teacher_follows_when_it_should(kind, step, moved, policy):
    teacher, model = copy.deepcopy(policy[0]), policy[0]
    before = [weight.clone() for weight in teacher.parameters()]
    with torch.no_grad():
        for weight in model.parameters():
            weight += 1
    variants.follow(teacher, model, kind, step)
    for weight, was in zip(teacher.parameters(), before):
        assert torch.allclose(weight, was + moved, atol=1e-6)


def test_teachers_differ_after_the_first_update(tmp_path):
    """Live is the step's own weights; lagged and frozen are still the start's, ema is between."""
    size, gaps = {"steps": 3, "lr": 3e-3}, []
    for words in ([], ["teacher:lagged,2"], ["teacher:ema,2"]):
        gaps.append([row["gap"] for row in run(tmp_path, *words, **size)[1]])
    frozen = [row["gap"] for row in trained(tmp_path, "frozen", teacher="frozen", **size)[1]]
    live, lagged, ema = gaps
    assert live[0] == lagged[0] == frozen[0] == ema[0]
    assert live[1] != lagged[1] == frozen[1]
    assert ema[1] not in (live[1], frozen[1])
    assert lagged[2] != frozen[2]


def test_a_divergence_is_from_a_copied_teacher(policy, monkeypatch):
    seen = []
    full = variants.full_divergence
    monkeypatch.setattr(
        variants, "full_divergence", lambda *args: seen.append(args[1]) or full(*args)
    )
    hooks, episodes, batch, config = one_batch(policy, ["teacher:lagged", "divergence:jsd"])
    with torch.no_grad():
        policy[0].lm_head.weight *= 0.5
    batch = hooks["step_batch"](policy[0], policy[0], policy[0], play(policy, config), config, 2)
    hooks["objective"](policy[0], play(policy, config), batch, config)
    assert torch.equal(seen[0].lm_head.weight, 2 * policy[0].lm_head.weight)


@mark.parametrize("word, low, high", [("skills:0", 0, 0), ("skills:.5", 0.2, 0.8)])
def test_skills_are_right_in_a_share_of_groups_that_read_alike(word, low, high):
    world, right = envs.make_env("toy"), []
    banks = [variants.hooks([word])["skill_bank"](world.skills) for _ in range(2)]
    for seed, task in enumerate(world.tasks("train")[:200]):
        kind = world.goals[task][0]
        found, again = (bank.retrieve(task, kind, seed) for bank in banks)
        assert found == again
        correct = envs.SkillBank(world.skills).retrieve(task, kind, seed)
        right.append(found == correct)
        assert len(found) == len(correct)
        assert right[-1] or not any(skill.matches(task, kind) for skill in found)
    assert low <= np.mean(right) <= high


def test_wrong_skills_are_a_share_of_zero():
    rows = envs.make_env("toy").skills
    always, never = (variants.hooks([word])["skill_bank"](rows) for word in WRONG)
    assert always.retrieve(TASK, "put", 3) == never.retrieve(TASK, "put", 3)
    assert variants.hooks([])["skill_bank"](rows).retrieve(TASK, "put", 3) == [
        envs.Skill(**rows[5])
    ]


WRONG = ("retrieval:wrong", "skills:0")

# --- Played again ------------------------------------------------------------------------


def practised(policy, kind):
    """(the step's episodes and the guided ones, step_batch's values, config, the start policy)."""
    config = configure(method="grpo", group_size=4, tasks_per_step=3, rollout_batch=5)
    worlds, start = sdar.make_envs(config), copy.deepcopy(policy[0])
    start.model.norm.weight.data *= 1.1
    rng = np.random.default_rng([2, config.seed, 1])
    starts = sdar.draw_starts(worlds[0], config, 1, rng)
    episodes = sdar.rollout(*policy, worlds, starts, config, 1.0)
    for row in (0, 8, 9):  # in the first group a quarter has won, in the last a half
        episodes[row].won, episodes[row].reward = True, 1.0
    hooks = variants.hooks([f"practice:{kind}"])
    batch = hooks["step_batch"](policy[0], start, policy[0], episodes, config, 1)
    return episodes, batch, config, start


@mark.parametrize("kind", ["keep", "out"])
def test_a_group_that_has_failed_plays_again_with_the_skill(kind, policy):
    episodes, batch, config, start = practised(policy, kind)
    assert len(episodes) == 16
    won = [sum(episode.won for episode in group) for group in sdar.in_parts(episodes, 4)]
    assert won[:3] == [1, 0, 2]
    assert won[3] >= 2
    numbers = [episode.random.bit_generator.seed_seq.entropy for episode in episodes]
    assert [first for first, *_ in numbers] == [3] * 12 + [5] * 4  # they draw anew
    read = [policy[1].tokenizer.decode(episode.ids) for episode in episodes]
    told = ["is kept in" in text for text in read]
    assert told == [False] * 12 + [kind == "keep"] * 4
    assert [episode.task for episode in episodes[12:]] == [episodes[4].task] * 4
    assert len({str(episode.ids) for episode in episodes[4:8] + episodes[12:]}) > 4
    for name, model in (("old", policy[0]), ("ref", start)):
        assert torch.allclose(batch[name], sdar.score(model, episodes, config), atol=1e-5)


def test_guided_and_plain_tries_have_one_baseline_where_the_skill_is_taken_out(policy):
    for kind in ("keep", "out"):
        episodes, batch, _, _ = practised(policy, kind)
        lengths = [len(episode.logprobs) for episode in episodes]
        found = torch.stack([of_one[0] for of_one in batch["advantages"].split(lengths)])
        rewards = torch.tensor([one.reward - 0.01 * one.invalid for one in episodes])
        expected = sdar.group_advantages(rewards.view(-1, 4)).flatten()
        if kind == "out":
            rows = [*range(4, 8), *range(12, 16)]
            expected[rows] = sdar.group_advantages(rewards[rows][None])[0]
        assert found.tolist() == approx(expected.tolist(), abs=1e-5)


def test_another_sampler_keeps_the_likeliest_and_reports_the_scored_policy(policy, tmp_path):
    plain = sdar.Sampler
    config = configure(group_size=4)
    unchanged = run(tmp_path)[1]
    assert run(tmp_path, "sampling:1/1")[1] == unchanged
    assert run(tmp_path, "sampling:0.7/1")[1] != unchanged
    assert sdar.Sampler is plain
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(1000, 3)  # shares .04, .19, .77 at .7
    uniform = (torch.arange(1000) / 1000).numpy()
    for top_p, shares in ((0.5, (0, 0, 1)), (0.9, (0, 0.193, 0.807)), (1.0, (0.044, 0.185, 0.771))):
        sampler = practice.nucleus(top_p, config)(policy[0], 0.7)
        ids, logprobs = sampler.draw(logits, uniform)
        assert np.bincount(ids, minlength=3) / 1000 == approx(np.array(shares), abs=2e-3)
        assert logprobs == approx(torch.log_softmax(logits[0], -1)[ids].tolist())


# --- All together ------------------------------------------------------------------------


def test_variants_combine_in_any_order(tmp_path, policy):
    words = ["divergence:forward", "gate:shuffled", "std:off", "teacher:ema,2", "skills:0.5"]
    one = run(tmp_path, *words)[1]
    assert one == run(tmp_path, *reversed(words))[1]
    for left_out in words[3:]:
        assert run(tmp_path, *[word for word in words if word != left_out])[1] != one
    three = one_update(policy, *words[:3])[0]
    for left_out in words[:3]:
        two = one_update(policy, *[word for word in words[:3] if word != left_out])[0]
        assert not torch.allclose(two, three, atol=1e-5)


REFUSED = """
gate:most => 'gate:most' is no variant
gate => 'gate' is no variant
teacher:ema,0 => 'teacher:ema,0' is no variant
skills:2 => 'skills:2' is no variant
gate:own gate:centred => each variant once
gate:own -- --method grpo => --method grpo: it has no gate
divergence:jsd -- --method rlsd => --method rlsd: it has no gate
gate:own -- --gate entropy => --gate entropy: gate brings its own
gate:own advantage:gap => advantage: not with gate or divergence
sampling:0/1 => 'sampling:0/1' is no variant
practice:out => practice has no teacher: --method grpo
teacher:ema -- --teacher frozen => --teacher: the variant is another
teacher:ema -- --resume => --resume: its copy was not kept, --overwrite
-- --gates none => unrecognized arguments: --gates
"""


@mark.parametrize("line", REFUSED.strip().splitlines())
def test_what_makes_no_sense_is_refused_in_one_line(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv, message = line.split(" => ")
    assert variants.main(argv.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not [*tmp_path.iterdir()]


def test_the_command_trains_with_its_words(tmp_path):
    flags = "--steps 1 --tasks-per-step 2 --group-size 4 --eval-episodes 6 --rollout-batch 8"
    out = tmp_path / "command"
    argv = ["teacher:lagged", "gate:constant", "--", "--out", str(out), *flags.split()]
    assert variants.main(argv) == 0
    expected, _ = run(tmp_path, "gate:constant", steps=1)
    assert json.loads((out / "metrics.jsonl").read_text())["loss"] == approx(expected["loss"])
