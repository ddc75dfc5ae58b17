"""A step's tasks, played again: with the skill where a group has failed, or by another sampler.

    python .lab/experiments/variants.py practice:keep -- --method grpo
    python .lab/experiments/variants.py practice:out -- --method grpo
    python .lab/experiments/variants.py sampling:0.7/0.8

Practice instead of imitation (arXiv 2609.29051, in kind) has no teacher: the reward alone teaches.
A group of which less than a quarter has won plays again, and now the student reads the skill. These
guided episodes are trained on, too.

    keep    The skill stays in their prompt, and they are a group of their own. If all of them win,
            as with a good skill, the group is flat, and teaches nothing.
    out     The skill is taken out of their prompt before they are scored, and the guided and the
            plain tries of a task have one baseline. What was done with the skill becomes likelier
            without it. Nobody sampled it so: the ratio begins with 1 all the same.

In the log's `success` and `flat_groups` the guided episodes count, too.
"""

import sys
from functools import lru_cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import sdar


def by_token(values, episodes):
    """A number for each episode as one for each of its tokens, (N,)."""
    lengths = torch.tensor([len(episode.logprobs) for episode in episodes])
    return torch.as_tensor(values).repeat_interleave(lengths)


@lru_cache(1)
def chat_of(model):
    """The Chat of a model."""
    return sdar.load_policy(sdar.configure(model=model, device="cpu"))[1]


def play(model, episodes, rows, config, step, temperature, **reader):
    """Play some rows of a step again, in the same environments, from the same starts."""
    worlds = [*{id(episode.env): episode.env for episode in episodes}.values()]
    rng = np.random.default_rng([2, config.seed, step])  # as train() draws them
    drawn, starts = sdar.draw_starts(worlds[0], config, step, rng), []
    for row in rows:
        task, seed, (_, *numbers) = drawn[row]
        starts.append((task, seed, (5 if reader else 3, *numbers)))  # the guided draw anew
    return sdar.rollout(model, chat_of(config.model), worlds, starts, config, temperature, **reader)


def step_batch(kinds, model, start, teacher, episodes, config, step, *rest):
    """sdar.step_batch of a step's episodes, which the variant `sampling` replaces, and to which
    `practice` adds. kinds: {variant: how}."""
    again, rows = [], np.arange(len(episodes))
    if "sampling" in kinds:
        temperature, top_p = map(float, kinds["sampling"].split("/"))
        with patch.object(sdar, "Sampler", nucleus(top_p, config)):
            episodes[:] = play(model, episodes, rows, config, step, temperature)
    if "practice" in kinds:
        won = np.array([episode.won for episode in episodes]).reshape(-1, config.group_size)
        rows = rows[np.repeat(won.mean(1) < 1 / 4, config.group_size)]
        again = play(model, episodes, rows, config, step, config.temperature, with_skill=True)
        episodes += again
    batch = sdar.step_batch(model, start, teacher, episodes, config, step, *rest)
    if again and kinds["practice"] == "out":
        take_out(model, start, episodes, rows, batch, config)
    return batch


def take_out(model, start, episodes, rows, batch, config):
    """Take the skill out of the guided episodes, which stand last, and change step_batch's values.
    rows: those of the plain tries of their tasks."""
    again = episodes[-len(rows) :]
    for row, told in zip(rows, again):
        more = told.mask.index(1) - episodes[row].mask.index(1)  # ids of the prompt
        skill = slice(told.skill_at, told.skill_at + more)
        del told.ids[skill], told.mask[skill]
    for name, policy in (("old", model), ("ref", start)):
        if name in batch:
            scored = sdar.score(policy, again, config)
            batch[name][-len(scored) :] = scored

    rewards = [episode.reward - config.invalid_penalty * episode.invalid for episode in episodes]
    rewards, groups = torch.tensor(rewards), np.arange(len(episodes)) // config.group_size
    groups[-len(rows) :] = groups[rows]  # the tries of a task are one
    advantages = torch.zeros(len(episodes))
    for group in {*groups}:
        tries = torch.tensor(groups == group)
        advantages[tries] = sdar.group_advantages(rewards[tries][None])
    batch["advantages"] = by_token(advantages, episodes).to(batch["old"])


def nucleus(top_p, config):
    """A kind of Sampler that draws from the likeliest tokens alone: the fewest that have together a
    probability of top_p."""

    class Nucleus(sdar.Sampler):
        def draw(self, logits, uniform):
            shares, order = torch.softmax(logits / self.temperature, -1).sort(descending=True)
            left_out = shares.cumsum(-1) - shares >= top_p  # those before it are enough
            kept = logits.masked_fill(left_out.gather(1, order.argsort(-1)), -torch.inf)
            chosen, _ = super().draw(kept, uniform)

            # The check of drift asks for ids and places, not for this mismatch, which is what the
            # experiment is about: so it gets the log-probs of the policy that is scored.
            logprobs = torch.log_softmax(logits / config.temperature, -1)
            at = torch.tensor(chosen, device=logits.device)[:, None]
            return chosen, logprobs.gather(1, at)[:, 0].tolist()

    return Nucleus
