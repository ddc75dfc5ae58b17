"""Does a model fit the card? GB of a run, by arithmetic.

    python .lab/memory.py --preset small
    python .lab/memory.py --preset paper --tokens 10000    # of the longest episode

Takes the flags of sdar.py, for bfloat16 with gradient checkpointing, as `small` and `paper` have
it. CUDA itself, and holes between tensors, need a GB and more on top.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sdar

MODELS = """
Qwen2.5-0.5B   0.494  24   896   128
Qwen3-0.6B     0.596  28  1024  1024
Qwen2.5-1.5B   1.544  28  1536   256
Qwen3-1.7B     1.721  28  2048  1024
Qwen2.5-3B     3.086  36  2048   256
"""  # as published: billions of parameters, layers, width of a layer, and of its keys


def sizes(config, tokens, weights, layers, width, keys):
    """GB of the state, a training pass, learning, the KV cache, playing. weights: billions."""
    state = 16 * weights  # float32: the weights, AdamW's two numbers for each, the start policy
    cast = 2 * weights  # a pass, and a rollout, compute with bfloat16 copies

    # What goes into each layer is kept, in float32; of a chunk of logits there are six copies.
    inputs = 4 * config.micro_batch * tokens * layers * width / 1e9
    a_pass = inputs + 6 * 4 * sdar.LOGITS_AT_ONCE / 1e9 + cast
    gradient = step = copied = 4 * weights  # AdamW's own step; a rollout's copy before it is cast
    learning = state + gradient + max(a_pass, step)

    cache = 2 * 2 * config.rollout_batch * tokens * layers * keys / 1e9  # keys, values: two bytes
    playing = state + max(cast + cache, copied)
    return state, a_pass, learning, cache, playing


def main(argv=None):
    """Print a line a model."""
    parser = sdar.make_parser("python .lab/memory.py [flags]", description=__doc__)
    parser.add_argument("--tokens", type=int, default=2000, help="of the longest episode [2000]")
    given = vars(parser.parse_args(argv))
    tokens = given.pop("tokens")
    config = sdar.configure(**{"model": ""} | given)
    print(f"{'':<12}   state  a pass learning  cache playing")
    for line in MODELS.strip().splitlines():
        name, *numbers = line.split()
        row = sizes(config, tokens, *map(float, numbers))
        print(f"{name:<12}" + "".join(f"{size:8.1f}" for size in row))


if __name__ == "__main__":
    sys.exit(sdar.run(main))
