"""Where the time and the memory of a training step go: python .lab/bench.py [flags of sdar.py]

    python .lab/bench.py
    python .lab/bench.py --model Qwen/Qwen3-0.6B --device cuda --gradient-checkpointing --kernel

First a step's parts, then token_logprobs on each of its paths: in chunks, in one piece, and by the
kernel (--kernel). Nothing is written. Timings are medians of runs on this machine, now: compare
those of one call, not of two. The same steps beside TRL's are in .lab/trl/bench.py.
"""

import copy
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sdar

SECONDS = 0.5  # of each timing, at least
ROWS = 16384  # sampled tokens whose log-probs are timed


def main(argv):
    """Time steps, then the log-probs."""
    parser = sdar.make_parser("python .lab/bench.py [flags]", description=__doc__)
    config = sdar.configure(**vars(parser.parse_args(argv)))
    envs = sdar.make_envs(config)
    model, chat = sdar.load_policy(config)
    start = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    steps = []
    for number in (1, 2, 3):
        steps.append(time_step(model, start, optimizer, chat, envs, config, number))

    tokens, *seconds = np.mean(steps[1:], 0)  # the first one warms up
    total, teacher = sum(seconds), seconds[1]
    print(f"a step: {tokens:,.0f} sampled tokens, {total:.2f} s")
    for part, spent in zip(("rollout", "teacher", "score", "update"), seconds):
        share, speed = spent / total, tokens / spent
        print(f"{part:<9}{spent:8.2f} s {share:5.0%} {speed:10,.0f} tokens/s")
    print(f"the teacher adds {teacher / (total - teacher):.0%} to the rest")
    if config.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e9
        print(f"peak memory {peak:.2f} GB")
    time_logprobs(model.get_output_embeddings().weight.detach(), config)


def time_step(model, start, optimizer, chat, envs, config, number):
    """Of a training step: [sampled tokens, seconds of rollout, teacher, other scoring, update]."""
    rng = np.random.default_rng([2, config.seed, number])
    starts = sdar.draw_starts(envs[0], config, number, rng)
    clock = [time.perf_counter()]
    episodes = sdar.rollout(model, chat, envs, starts, config, config.temperature, config.skilled)
    clock.append(time.perf_counter())
    taught = sdar.score(model, episodes, config, with_skill=True)
    taught.sum().item()  # waits for a GPU
    clock.append(time.perf_counter())

    def score(model, episodes, config, with_skill=False):
        return taught if with_skill else sdar.score(model, episodes, config)

    batch = sdar.step_batch(model, start, model, episodes, config, number, score)
    clock.append(time.perf_counter())
    sdar.update(model, optimizer, episodes, batch, config, rng)
    clock.append(time.perf_counter())
    return [len(taught), *np.diff(clock)]


def median_ms(work):
    """Milliseconds of a function without arguments, on one thread; on a GPU with its wait."""
    from torch.utils.benchmark import Timer  # here, since it may talk of CUDA

    timer = Timer("work()", globals={"work": work})
    return 1e3 * timer.blocked_autorange(min_run_time=SECONDS).median


def in_one_piece(hidden, head, ids):
    """What token_logprobs computes, without its chunks."""
    logprobs = torch.log_softmax((hidden @ head.T).float(), -1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, ids[:, None])[:, 0], entropy


def time_logprobs(head, config):
    """token_logprobs of random states with the model's own head, on each of its paths."""
    head = head.to(getattr(torch, config.dtype)).requires_grad_()
    vocabulary, width = head.shape
    rows = ROWS if head.is_cuda else min(ROWS, 2**28 // vocabulary)
    hidden = torch.randn(rows, width, device=head.device, dtype=head.dtype, requires_grad=True)
    ids = torch.randint(vocabulary, (rows,), device=head.device)

    product = median_ms(lambda: hidden @ head.T)
    print(f"\n{rows:,} x {vocabulary:,} logits, {config.dtype}")
    print(f"the product, which no path can beat: {product:.1f} ms")
    time_path("chunked", sdar.token_logprobs, hidden, head, ids)
    time_path("plain", in_one_piece, hidden, head, ids)
    if config.kernel:
        by_kernel = partial(sdar.token_logprobs, kernel=sdar.load_kernel(config.dtype))
        time_path("kernel", by_kernel, hidden, head, ids)


def time_path(name, path, hidden, head, ids):
    """Print time forward, and with backward; GPU memory; the largest error in nats."""

    def forward():
        return path(hidden, head, ids)[0]

    def both():
        return torch.autograd.grad(forward().sum(), (hidden, head))

    before = torch.cuda.memory_allocated()
    if head.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    alone, with_backward = median_ms(forward), median_ms(both)
    peak = (torch.cuda.max_memory_allocated() - before) / 1e9
    logits = (hidden[:64] @ head.T).double()
    exact = torch.log_softmax(logits, -1).gather(1, ids[:64, None])[:, 0]
    error = (forward()[:64] - exact).abs().max()
    print(f"{name:<8} forward {alone:.1f} ms, with backward {with_backward:.1f} ms")
    print(f"{'':<8} GPU memory {peak:.2f} GB, largest error {error:.1e}")


if __name__ == "__main__":
    sys.exit(sdar.run(lambda: main(sys.argv[1:])))
