"""This file holds the answers of exercise 5. Whoever wants to find the bugs does not read on.

A bug is a function that returns what somebody wrote instead of sdar.py's function or class of the
same name. None of them raises an error, and the check of drift lets all of them through. Beside
each stands the test of test_sdar.py that fails with it.

The three stored logs: 1 is the bug `groups` (--G 2 --tasks-per-step 8 --seed 3), 2 is healthy
(--method grpo --seed 1), 3 is --kl-coef 3 (--seed 2).
"""

import torch

import sdar


def eos():
    """The end of a response is not trained.

    Caught by
    python -m pytest -q test_sdar.py -k test_the_mask_covers_exactly_what_was_sampled_and_its_end
    """
    right = sdar.answer

    def answer(sampler, chat, episodes, config):
        texts = right(sampler, chat, episodes, config)
        for episode in episodes:
            # The tokenizer pads with its end of turn, and padding is not to be trained.
            if episode.ids[-1] in chat.end_ids:
                episode.mask[-1] = 0
                episode.logprobs.pop()
        return texts

    return answer


def skill():
    """The teacher reads no skill.

    Caught by
    python -m pytest -q test_sdar.py -k test_sampled_is_scored_is_a_plain_forward_pass
    """
    right = sdar.response_logprobs

    def response_logprobs(model, episodes, config, with_skill=False):
        return right(model, episodes, config)  # a flag was not handed on

    return response_logprobs


def temperature():
    """Sampled at one temperature, scored at another.

    Caught by
    python -m pytest -q test_sdar.py -k test_draws_follow_the_log_probs_that_they_report
    """

    class Sampler(sdar.Sampler):
        def draw(self, logits, uniform):
            # Fewer silly actions. The log-probs are the policy's, as they should be.
            chosen, _ = super().draw(2 * logits, uniform)
            logprobs = torch.log_softmax(logits / self.temperature, -1)
            return chosen, logprobs[torch.arange(len(chosen)), chosen].tolist()

    return Sampler


def detach():
    """The gate is not detached.

    Caught by
    python -m pytest -q test_sdar.py -k test_the_gradient_goes_through_the_student_alone
    """

    def sdar_loss(logprobs, teacher_logprobs, entropy=None, kind="gap", beta=5.0):
        gap = teacher_logprobs.detach() - logprobs
        gate = sdar.GATES[kind](gap, entropy, beta)
        return {"sdar_loss": gate * gap, "gate": gate, "gate_active": gate > 0.5}

    return sdar_loss


def reward():
    """An episode gets the reward of another.

    Caught by
    python -m pytest -q test_sdar.py -k test_an_episode_has_the_reward_of_its_own_environment
    """
    right = sdar.rollout

    def rollout(*args, **options):
        episodes = right(*args, **options)
        ended = sorted(episodes, key=lambda episode: episode.turns)
        rewards = [episode.reward for episode in ended]  # a list that grew as episodes ended
        for episode, earned in zip(episodes, rewards):
            episode.reward = earned
        return episodes

    return rollout


def shift():
    """The teacher's log-probs stand one token late.

    Caught by
    python -m pytest -q test_sdar.py -k test_sampled_is_scored_is_a_plain_forward_pass
    """
    right = sdar.response_logprobs

    def response_logprobs(model, episodes, config, with_skill=False):
        logprobs, entropy = right(model, episodes, config, with_skill)
        if with_skill:  # as a server returns them: none for the first token
            logprobs = torch.cat([logprobs.new_zeros(1), logprobs[:-1]])
        return logprobs, entropy

    return response_logprobs


def observations():
    """The environment's words are trained.

    Caught by
    python -m pytest -q test_sdar.py -k test_the_mask_covers_exactly_what_was_sampled_and_its_end
    """
    right = sdar.rollout

    def rollout(model, chat, envs, starts, config, *args, **options):
        episodes = right(model, chat, envs, starts, config, *args, **options)
        for episode in episodes:
            # Whatever follows the prompt is trained. The sampler has no log-probs of all that.
            first = episode.mask.index(1)
            episode.mask[first:] = [1] * len(episode.mask[first:])
            episode.logprobs = sdar.score(model, [episode], config).tolist()
        return episodes

    return rollout


def groups():
    """The groups are mixed.

    Caught by
    python -m pytest -q test_sdar.py -k test_an_update_is_the_papers_formula
    """
    right = sdar.group_advantages

    def group_advantages(rewards, eps=1e-6):
        # As if the tasks took turns: task 1, task 2, ..., task 1, task 2, ...
        by_task = rewards.reshape(rewards.shape[::-1]).T
        return right(by_task, eps).T.reshape(rewards.shape)

    return group_advantages


BUGS = (eos, skill, temperature, detach, reward, shift, observations, groups)  # 1 to 8
