"""This update and TRL's, side by side: python .lab/bench.py trl [flags]

The same policy, environment, tasks, random numbers and sampled tokens; one thread; in alternation.
TRL plays as its own loop of turns does: generate() reads the whole conversation anew every turn.
Printed are seconds of CPU time a step, which other programs disturb less than the clock's.
"""

import contextlib
import io
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from transformers import LogitsProcessor

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import trl_trainer

import sdar

ALTERNATIONS = 3
FIXED = {"lr": 1e-9, "save_every": 10**6}  # weights that hardly move sample the same tokens
NOT_HERE = trl_trainer.NOT_HERE | {"out", "lr", "teacher"}


class Draws(LogitsProcessor):
    """Leaves one id a row: the one that sdar.Sampler draws from the same uniform numbers."""

    def __init__(self, uniforms, temperature):
        self.columns = iter(uniforms.split(1, dim=1))
        self.temperature = temperature
        self.logprobs = []

    def __call__(self, input_ids, scores):
        state = SimpleNamespace(logits=scores.float(), temperature=self.temperature)
        chosen, logprobs = sdar.Sampler.draw(state, next(self.columns))
        self.logprobs.append(logprobs)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)


class GenerateSampler(trl_trainer.VllmSampler):
    """The same by the library's generate(), without a cache between turns. Adds what it samples to
    a list."""

    def __init__(self, sampled, model, temperature):
        self.sampled, self.model, self.temperature = sampled, model, temperature
        self.conversations = None

    def respond(self, uniforms, stop_ids, stop_text=None):
        """Sample a response to each conversation: [(ids, log-probs)], lists."""
        sdar.require(not stop_text, "bench trl: the tiny policy's world alone")
        rows = self.conversations
        draws = Draws(uniforms, self.temperature)
        whole = self.model.generate(
            input_ids=sdar.padded(rows, side="left"),
            attention_mask=sdar.padded([[1] * len(row) for row in rows], side="left"),
            max_new_tokens=uniforms.shape[1],
            do_sample=False,
            logits_processor=[draws],
            eos_token_id=list(stop_ids),
            pad_token_id=stop_ids[0],
        )
        responses = whole[:, max(map(len, rows)) :].tolist()
        logprobs = torch.stack(draws.logprobs, 1).tolist()
        found = []
        for row, ids in enumerate(responses):
            ends = [place for place, chosen in enumerate(ids) if chosen in stop_ids]
            length = ends[0] + 1 if ends else len(ids)
            found.append((ids[:length], logprobs[row][:length]))
            self.sampled += ids[:length]
            rows[row] += ids[: length - 1]  # the last one comes with what follows it
        return found


class TimedTrainer(trl_trainer.SDARTrainer):
    """Notes what it plays, and the CPU time at which each step begins."""

    def __init__(self, *args):
        self.steps, self.clock, self.sampled = [], [], []
        super().__init__(*args)

    def begin_step(self, starts, stream):
        """Called once a step, before its episodes are played."""
        self.sampled.clear()
        self.steps.append((starts, stream))
        self.clock.append(time.process_time())

    def sampler_class(self):
        """What TRL's own loop does."""
        return partial(GenerateSampler, self.sampled)


def of_trl(config):
    """(CPU seconds a step, the steps that were played, ids that the last one sampled) on TRL."""
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = trl_trainer.make_trainer(config, kind=TimedTrainer)
        trainer.train()
    return seconds_a_step(trainer.clock), trainer.steps, sorted(trainer.sampled)


def of_ours(config, steps):
    """(CPU seconds a step, ids that the last one sampled) of the same steps here."""
    envs = sdar.make_envs(config)
    model, chat = sdar.load_policy(config)
    start = sdar.copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.01)
    clock = []
    for step, (starts, stream) in enumerate(steps, 1):
        clock.append(time.process_time())
        episodes = sdar.rollout(model, chat, envs, starts, config, stream, config.temperature)
        teacher = None
        if sdar.METHODS[config.method].teacher:
            teacher = sdar.score(model, episodes, config, with_skill=True)
        batch = sdar.step_batch(model, start, teacher, episodes, config, step)
        sdar.update(model, optimizer, episodes, batch, config, np.random.default_rng(step))
    sampled = []
    for episode in episodes:
        sampled += [id for id, chosen in zip(episode.ids, episode.mask) if chosen]
    return seconds_a_step(clock), sorted(sampled)


def seconds_a_step(clock):
    """From the beginnings of steps. The first one warms up, the last one has no end."""
    return (clock[-1] - clock[1]) / (len(clock) - 2)


def main(argv):
    """Print both times and their ratio, without and with the teacher."""
    typed = sdar.parse_flags("bench trl", __doc__, argv, (), NOT_HERE)
    steps = typed.pop("steps", 6)
    sdar.require(steps > 2, "--steps: 3 or more, since the first and the last are not timed")
    trl_trainer.check_packages(["trl"])
    sdar.os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    torch.set_num_threads(1)
    print(f"CPU seconds a step, of {steps} steps; one thread")
    for method, title in (("grpo", "without a teacher"), ("sdar", "with the teacher")):
        with tempfile.TemporaryDirectory() as folder:
            config = partial(sdar.Config, **FIXED, **typed, steps=steps, method=method)
            ratios = []
            for number in range(ALTERNATIONS):
                theirs, played, sampled = of_trl(config(out=f"{folder}/{number}"))
                ours, same = of_ours(config(out=folder), played)
                sdar.require(sampled == same, "other tokens were sampled on TRL than here")
                ratios.append(ours / theirs)
                print(f"{title}: here {ours:.2f}, TRL {theirs:.2f}, ratio {ratios[-1]:.2f}")
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{title}: ratio {np.median(ratios):.2f} ({spread}); {len(same):,} tokens sampled")
