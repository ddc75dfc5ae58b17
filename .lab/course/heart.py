"""SDAR alone, on one screen: sdar.py's training without baselines, checks, log and resume.

    python .lab/course/heart.py

The losses are those of `python sdar.py`. Playing, and reading what was played, are its sections 2
to 4 (and Chat, 9); the formulas are the paper's.
"""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np
import torch

import sdar
from sdar import response_logprobs, rollout, score

BETA, LAMBDA, EPSILON, KL = 5.0, 1.0, 0.2, 0.01


def main(steps=8):
    """Train the tiny policy, and print the mean loss of each step."""
    config = sdar.configure()
    envs = sdar.make_envs(config)
    model, chat = sdar.load_policy(config)
    start = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4)

    for step in range(1, steps + 1):
        # Play: eight tries of each of eight tasks. The student reads no skill.
        rng = np.random.default_rng([2, config.seed, step])
        starts = sdar.draw_starts(envs[0], config, step, rng)
        episodes = rollout(model, chat, envs, starts, config, temperature=1.0)

        # Score: log-probs of what was sampled, by three readers.
        old = score(model, episodes, config)
        ref = score(start, episodes, config)
        teacher = score(model, episodes, config, with_skill=True)

        # Credit: how much better an episode is than its group. All its tokens get that.
        rewards = [episode.reward - 0.01 * episode.invalid for episode in episodes]
        rewards = torch.tensor(rewards, dtype=torch.float64).view(8, 8)
        better = rewards - rewards.mean(1, keepdim=True)
        A = better / (rewards.std(1, keepdim=True) + 1e-6)
        lengths = [len(episode.logprobs) for episode in episodes]
        A = A.float().flatten().repeat_interleave(torch.tensor(lengths))

        # Learn: four optimiser steps on this one batch.
        batch = torch.stack([A, old, ref, teacher]).split(lengths, 1)
        total = 0.0
        for rows in np.array_split(rng.permutation(64), 4):
            A, old, ref, teacher = torch.cat([batch[row] for row in rows], 1)  # (N,) each
            logprobs, _ = response_logprobs(model, [episodes[row] for row in rows], config)
            ratio = (logprobs - old).exp()
            clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
            policy = torch.maximum(-A * ratio, -A * clipped)
            d = ref - logprobs
            kl = d.exp() - d - 1

            gap = teacher - logprobs
            gate = torch.sigmoid(BETA * gap).detach()
            loss = policy + KL * kl + LAMBDA * gate * gap
            loss.mean().backward()
            total += loss.sum().item()

            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        won = sum(episode.won for episode in episodes)
        print(f"step {step}: won {won} of 64, loss {total / sum(lengths):+.7f}")


if __name__ == "__main__":
    sys.exit(sdar.run(main))
