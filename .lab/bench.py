"""Where the time of a training step goes: python .lab/bench.py [flags of sdar.py]

    python .lab/bench.py
    python .lab/bench.py --model Qwen/Qwen3-0.6B --preset small --kernel

It runs two steps in a temporary folder (16 bytes a weight; TMPDIR says where). Times are of
the second step, on this machine, now: they say little beside those of another day. The same beside
TRL's: .lab/trl/bench.py.
"""

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sdar


def main(argv=None):
    """Train for two steps, of which the first one warms up, and print the parts of the second."""
    parser = sdar.make_parser("python .lab/bench.py [flags]", description=__doc__)
    given = vars(parser.parse_args(argv))
    seconds = {"teacher": 0.0}

    def timed(model, episodes, config, with_skill=False):
        begun = time.perf_counter()
        logprobs = sdar.score(model, episodes, config, with_skill)
        logprobs.sum().item()  # a card is waited for
        if with_skill:
            seconds["teacher"] = time.perf_counter() - begun
        return logprobs

    with TemporaryDirectory() as folder:
        size = {"steps": 2, "eval_every": 0, "eval_episodes": 2, "out": f"{folder}/run"}
        line = sdar.train(sdar.configure(**given | size), score=timed)
    for part in ("rollout", "score", "update"):
        seconds[part] = line[f"seconds_{part}"]
    seconds["score"] -= seconds["teacher"]
    total = sum(seconds.values())
    print(f"a step: {total:.2f} s, {line['tokens_per_second']:,.0f} sampled tokens a second")
    for part, spent in seconds.items():
        print(f"{part:<9}{spent:8.2f} s {spent / total:5.0%}")
    if torch.cuda.is_initialized():  # else the run was not on it
        print(f"peak memory of the card {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")


if __name__ == "__main__":
    sys.exit(sdar.run(main))
