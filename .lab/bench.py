"""Where the time of a training step goes: python .lab/bench.py [flags of sdar.py]

    python .lab/bench.py
    python .lab/bench.py --model Qwen/Qwen3-0.6B --device cuda --gradient-checkpointing --kernel

Nothing is written. Times are means of two steps on this machine, now: they say little beside those
of another day. On a card its memory is printed, too. The same steps beside TRL's are in
.lab/trl/bench.py.
"""

import copy
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sdar


def main(argv):
    """Time three steps, of which the first one warms up, and print the parts of a step."""
    parser = sdar.make_parser("python .lab/bench.py [flags]", description=__doc__)
    config = sdar.configure(**vars(parser.parse_args(argv)))
    envs = sdar.make_envs(config)
    model, chat = sdar.load_policy(config)
    start = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    steps = []
    for number in (1, 2, 3):
        steps.append(time_step(model, start, optimizer, chat, envs, config, number))

    tokens, *seconds = np.mean(steps[1:], 0)
    total, teacher = sum(seconds), seconds[1]
    print(f"a step: {tokens:,.0f} sampled tokens, {total:.2f} s")
    for part, spent in zip(("rollout", "teacher", "score", "update"), seconds):
        print(f"{part:<9}{spent:8.2f} s {spent / total:5.0%} {tokens / spent:10,.0f} tokens/s")
    print(f"the teacher adds {teacher / (total - teacher):.0%} to the rest")
    if config.device == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")


def time_step(model, start, optimizer, chat, envs, config, number):
    """Of a training step: [sampled tokens, seconds of rollout, teacher, other scoring, update]."""
    rng = np.random.default_rng([2, config.seed, number])
    starts = sdar.draw_starts(envs[0], config, number, rng)
    clock = [time.perf_counter()]
    episodes = sdar.rollout(model, chat, envs, starts, config, config.temperature, config.skilled)
    clock.append(time.perf_counter())
    taught = sdar.score(model, episodes, config, with_skill=True)
    taught.sum().item()  # a card is waited for
    clock.append(time.perf_counter())
    alone = replace(config, distil="none", retrieval="keyword")  # the rest is scored without it
    batch = sdar.step_batch(model, start, model, episodes, alone, number)
    clock.append(time.perf_counter())
    sdar.update(model, optimizer, episodes, batch | {"teacher": taught}, config, rng)
    clock.append(time.perf_counter())
    return [len(taught), *np.diff(clock)]


if __name__ == "__main__":
    sys.exit(sdar.run(lambda: main(sys.argv[1:])))
