"""What test_sdar.py has no room for: promises of sdar.py and envs.py that seldom break."""

import math
from functools import wraps

import numpy as np
import torch
from pytest import approx, mark, raises

import sdar
from envs import UserError, make_env
from test_sdar import play


def test_a_rollout_has_a_bar_that_moves(tiny, monkeypatch, capsys):
    at_once = {"delay": 0, "mininterval": 0}
    monkeypatch.setattr(sdar, "tqdm", lambda real=sdar.tqdm, **more: real(**more | at_once))
    play(tiny, sdar.configure(group_size=2), episodes=2, max_turns=3)
    shown = capsys.readouterr().err.split("\r")
    assert {"playing: 2it", "playing: 4it"} <= {text.split(" [")[0] for text in shown}


def test_only_new_ids_are_read(tiny, monkeypatch):
    """Each id of a conversation goes through the model once, but for the last response's end."""
    read = []
    forward = tiny[0].forward

    @wraps(forward)
    def noting(input_ids, attention_mask, **more):
        read.append(attention_mask[:, -input_ids.shape[1] :].sum().item())
        return forward(input_ids=input_ids, attention_mask=attention_mask, **more)

    monkeypatch.setattr(tiny[0], "forward", noting)
    (episode,) = play(tiny, sdar.configure(group_size=2), episodes=1)
    assert sum(read) == episode.read == len(episode.ids) - 1


def test_temperature_zero_is_greedy(tiny):
    logits = torch.tensor([[0.0, 3.0, 2.9], [5.0, 1.0, 4.9]])
    for uniform in (0.0, 0.5, 0.999999):
        ids, logprobs = sdar.Sampler(tiny[0], 0).draw(logits, np.full(2, uniform, "float32"))
        assert ids == [1, 0]
        assert logprobs == approx([0, 0], abs=1e-6)


def test_token_logprobs_use_the_kernel_that_they_are_given():
    def kernel(logits, ids, temperature):
        return logits[:, 0] * 0 + 7, logits[:, 0] * 0 + temperature

    values = sdar.token_logprobs(
        torch.ones(2, 3), torch.ones(5, 3), torch.tensor([0, 1]), 0.5, kernel
    )
    assert [x.tolist() for x in values] == [[7, 7], [0.5, 0.5]]


def test_no_logits_wait_for_the_backward_pass(monkeypatch):
    monkeypatch.setattr(sdar, "LOGITS_AT_ONCE", 100)  # two rows of fifty
    hidden, head, sizes = torch.randn(7, 6, requires_grad=True), torch.randn(50, 6), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: sizes.append(x.numel()) or x, lambda x: x
    ):
        sdar.token_logprobs(hidden, head, torch.arange(7))
    assert not {7 * 50, 2 * 50} & {*sizes}


def test_weights_that_are_not_finite_are_one_line(policy):
    policy[0].lm_head.weight.data[0, 0] = math.nan
    with raises(UserError, match="not ids scored.*--lr was too large"):
        config = sdar.configure(group_size=2)
        sdar.step_batch(policy[0], policy[0], policy[0], play(policy, config, 2), config, 1)


def test_the_toys_seed_decides_what_else_is_about():
    world = make_env("toy")
    task = world.tasks("train")[0]
    seen = []
    for seed in (0, 0, 1, 2, 3):
        world.reset(task, seed)
        seen.append(str(world.contents))
    assert seen[0] == seen[1]
    assert len({*seen}) > 2


@mark.parametrize("with_skill", [False, True])
def test_a_student_that_reads_the_skill_has_no_teacher(with_skill, tiny):
    """The skill is then a part of the conversation, in front of the task, for both readers."""
    (episode,) = play(tiny, sdar.configure(group_size=2), 1, with_skill=with_skill, max_turns=2)
    text = tiny[1].tokenizer.decode(episode.ids[episode.skill_at :])
    assert text.startswith("You are in the middle") == (not with_skill)
    assert ("kept in" in text) == with_skill
    assert (episode.view(True) == episode.view(False)) == with_skill == (not episode.skill_ids)
