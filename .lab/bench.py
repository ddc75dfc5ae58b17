"""Where the time and the memory of a training step go: python sdar.py bench [flags]

With `trl` as its first word: the same steps on TRL beside them (.lab/trl_bench.py).

First a step's parts, then token_logprobs on each of its paths: in chunks, in one piece, and by the
kernel (--kernel). Nothing is written. Timings are medians of runs on this machine, now: compare
those of one call, not of two.
"""

import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sdar

SECONDS = 0.5  # of each timing, at least
NO_CHUNKS = 2**62  # logits at once


def main(argv):
    """Time a step, then the log-probs; or the step beside TRL's."""
    if argv[:1] == ["trl"]:
        import trl_bench

        return trl_bench.main(argv[1:])

    config = sdar.Config(**sdar.parse_flags("bench", __doc__, argv, (), sdar.OF_TRAINING))
    envs = sdar.make_envs(config)
    model, chat = sdar.load_policy(config)
    time_steps(model, chat, envs, config)
    time_logprobs(model.get_output_embeddings().weight.detach(), config)


def time_steps(model, chat, envs, config):
    """Two steps after one that warms up: seconds and tokens of their parts, and peak memory."""
    start = sdar.copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    clocks, tokens = [], []
    for step in (1, 2, 3):
        rng = np.random.default_rng([2, config.seed, step])
        starts = sdar.draw_starts(envs[0], config, rng)
        stream = (3, config.seed, step)
        clock = [time.perf_counter()]
        episodes = sdar.rollout(model, chat, envs, starts, config, stream, config.temperature)
        clock.append(time.perf_counter())
        teacher = sdar.score(model, episodes, config, with_skill=True)
        clock.append(time.perf_counter())
        batch = sdar.step_batch(model, start, teacher, episodes, config, step, sdar.Bandit())
        sdar.update(model, optimizer, episodes, batch, config, rng)
        clock.append(time.perf_counter())
        clocks.append(clock)
        tokens.append(batch["mask"].sum().item())

    seconds = np.diff(clocks[1:]).mean(0)
    tokens = np.mean(tokens[1:])
    peak = torch.cuda.max_memory_allocated()
    if not peak:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    share = seconds[1] / (seconds[0] + seconds[2])
    print(f"a step: {len(episodes)} episodes, {tokens:,.0f} sampled tokens")
    print(f"peak memory {gb(peak)}; the teacher adds {share:.0%} of the time")
    for part, spent in zip(("rollout", "teacher", "update"), seconds):
        share = spent / seconds.sum()
        rate = f"{tokens / spent:10,.0f} tokens/s"
        print(f"{part:<9}{spent:8.2f} s {share:5.0%} {rate}")


def ms(seconds):
    """Seconds as a text in milliseconds."""
    return f"{seconds * 1e3:.1f} ms"


def gb(size):
    """Bytes as a text in gigabytes."""
    return f"{size / 1e9:.2f} GB"


def median_seconds(work):
    """Of a function without arguments, on one thread; on a GPU with its wait."""
    from torch.utils.benchmark import Timer  # here, since it may talk of CUDA

    timer = Timer("work()", globals={"work": work})
    return timer.blocked_autorange(min_run_time=SECONDS).median


def time_logprobs(head, config):
    """token_logprobs of random states with the model's own head, against float64."""
    head = head.to(getattr(torch, config.dtype)).requires_grad_()
    rows = config.micro_tokens
    if not head.is_cuda:
        rows = max(1, min(rows, 2**28 // len(head)))
    hidden = torch.randn(rows, head.shape[1], device=head.device).to(head.dtype)
    hidden.requires_grad_()
    ids = torch.randint(len(head), (rows,), device=head.device)
    exact = torch.log_softmax((hidden[:64] @ head.T).double(), -1)
    exact = exact.gather(1, ids[:64, None])[:, 0]

    # What no path can beat: the product itself, and one read of the logits.
    product = median_seconds(lambda: hidden @ head.T)
    a, b = torch.zeros(2, 2**27, device=head.device)
    copy_speed = 2 * a.nbytes / median_seconds(lambda: a.copy_(b))
    print(f"\n{rows:,} x {len(head):,} logits, {config.dtype}")
    print(f"the product takes {ms(product)}; a copy runs at {gb(copy_speed)}/s")

    paths = {"chunked": (None, sdar.LOGITS_AT_ONCE), "plain": (None, NO_CHUNKS)}
    if config.kernel:
        paths["kernel"] = (sdar.load_kernel(config.dtype), sdar.LOGITS_AT_ONCE)
    for name, (kernel, at_once) in paths.items():
        options = {"kernel": kernel, "logits_at_once": at_once}
        forward = time_path(name, hidden, head, ids, exact, options)

        # Of the logits, a second: what is left of the time after the product.
        size = len(ids) * len(head) * head.itemsize
        speed = size / max(forward - product, 1e-9)
        share = speed / copy_speed
        print(f"{'':<8} reads {gb(speed)}/s, {share:.0%} of a copy")


def time_path(name, hidden, head, ids, exact, options):
    """Print forward, forward and backward, GPU memory, largest error in nats. Returns forward's
    seconds."""

    def logprobs():
        return sdar.token_logprobs(hidden, head, ids, **options)[0]

    def both():
        return torch.autograd.grad(logprobs().sum(), (hidden, head))

    if head.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward = median_seconds(logprobs)
    whole = median_seconds(both)
    peak = torch.cuda.max_memory_allocated() - before
    error = (logprobs()[:64] - exact).abs().max()
    print(f"{name:<8} forward {ms(forward)}, with backward {ms(whole)}")
    print(f"{'':<8} GPU memory {gb(peak)}, largest error {error:.1e}")
    return forward


if __name__ == "__main__":
    sys.exit(sdar.main(["bench", *sys.argv[1:]]))
