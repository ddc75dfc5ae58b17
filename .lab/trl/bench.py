"""A training step here and on TRL, side by side: python .lab/trl/bench.py [flags]

The same policy, tasks and sampled tokens; one thread; in alternation. TRL plays as its own loop of
turns does: generate() reads the whole conversation anew every turn. Printed are seconds of CPU time
a step, which other programs disturb less than the clock's.
"""

import contextlib
import copy
import io
import sys
import tempfile
import time
from collections import defaultdict

import numpy as np
import torch
import trainer
from transformers import LogitsProcessor

import sdar

ALTERNATIONS = 3
FIXED = {"lr": 1e-9, "teacher": "live"}  # weights that hardly move sample the same tokens


class Forced(LogitsProcessor):
    """Leaves one id a row, those of the columns of `answers`, one after the other."""

    def __init__(self, answers):
        self.columns = iter(answers.split(1, dim=1))

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).scatter(1, next(self.columns), 0.0)


def replay(model, episodes):
    """Sample the responses of these episodes again, by the library's generate()."""
    turns = defaultdict(list)  # of each turn, (prompt, answer) of the episodes that have it
    for episode in episodes:
        edges = np.flatnonzero(np.diff([0, *episode.mask, 0]))
        for turn, (begin, end) in enumerate(edges.reshape(-1, 2)):
            turns[turn].append((episode.ids[:begin], episode.ids[begin:end]))
    for turn in turns.values():
        prompts, answers = zip(*turn)
        answers = sdar.padded(answers, model.device)
        model.generate(
            input_ids=sdar.padded(prompts, model.device, "left"),
            attention_mask=sdar.padded([[1] * len(ids) for ids in prompts], model.device, "left"),
            max_new_tokens=answers.shape[1],
            do_sample=True,
            top_k=0,
            logits_processor=[Forced(answers)],
            eos_token_id=None,
            pad_token_id=0,
        )


class TimedTrainer(trainer.SDARTrainer):
    """Notes what it plays, and the CPU time at which each step begins."""

    def __init__(self, config):
        self.steps, self.clock, self.paused = [], [], 0.0
        super().__init__(config, trainer.make_arguments(config, ["disable_tqdm=true"]))

    def rollout(self, model, chat, envs, starts, *more):
        """sdar.rollout, of which the clock knows nothing, and what TRL does for the same."""
        begin = time.process_time()
        episodes = sdar.rollout(model, chat, envs, starts, *more)
        self.steps.append((starts, episodes))
        self.paused += time.process_time() - begin
        self.clock.append(time.process_time() - self.paused)
        replay(model, episodes)
        return episodes

    def score(self, model, episodes, config, with_skill=False):
        """The teacher alone: TRL itself scores the student."""
        if with_skill:
            return super().score(model, episodes, config, with_skill)
        return torch.tensor(sum([episode.logprobs for episode in episodes], []))


def on_ours(config, steps):
    """The same steps here: the CPU time at which each begins."""
    envs = sdar.make_envs(config)
    model, chat = sdar.load_policy(config)
    start = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.01)
    clock = []
    for step, (starts, played) in enumerate(steps):
        clock.append(time.process_time())
        episodes = sdar.rollout(model, chat, envs, starts, config, config.temperature)
        batch = sdar.step_batch(model, start, model, episodes, config, step)
        sdar.update(model, optimizer, episodes, batch, config, np.random.default_rng(step))
        same = [episode.ids for episode in episodes] == [episode.ids for episode in played]
        sdar.require(same, "other tokens were sampled on TRL than here")
    return clock


def seconds_a_step(clock):
    """From the beginnings of steps. The first one warms up, the last one has no end."""
    return (clock[-1] - clock[1]) / (len(clock) - 2)


def compare(config):
    """CPU seconds of a step: (here, on TRL)."""
    with contextlib.redirect_stdout(io.StringIO()):
        timed = TimedTrainer(config)
        timed.train()
    return seconds_a_step(on_ours(config, timed.steps)), seconds_a_step(timed.clock)


def main(argv):
    """Compare without and with the teacher."""
    parser = sdar.make_parser("python .lab/trl/bench.py [flags]", description=__doc__)
    given = {"steps": 6, **vars(parser.parse_args(argv))}
    torch.set_num_threads(1)
    for method, title in (("grpo", "without a teacher"), ("sdar", "with the teacher")):
        ratios = []
        for _ in range(ALTERNATIONS):
            with tempfile.TemporaryDirectory() as out:
                config = sdar.configure(**given | FIXED | {"method": method, "out": out})
                sdar.require(config.steps > 2, "--steps: at least 3, the first warms up")
                ours, theirs = compare(config)
            ratios.append(ours / theirs)
            print(f"{title}: here {ours:.2f}, TRL {theirs:.2f}, ratio {ratios[-1]:.2f}")
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{title}, CPU time of a step: ratio {np.median(ratios):.2f} ({spread})")


if __name__ == "__main__":
    sys.exit(sdar.run(lambda: main(sys.argv[1:])))
