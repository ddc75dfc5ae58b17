"""Does a model fit the card? GB of a run, counted on tensors without data: in seconds, on any CPU.

    python .lab/memory.py --preset small
    python .lab/memory.py --preset paper --tokens 10000    # of the longest episode

Takes the flags of sdar.py. CUDA itself, and holes between tensors, need a GB more.
"""

import sys
import weakref
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sdar

NUMBERS = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
SHAPES = {  # as published; all have a vocabulary of 151,936, and the embedding as their head
    "Qwen2.5-0.5B": ("qwen2", 896, 4864, 24, 14, 2),
    "Qwen3-0.6B": ("qwen3", 1024, 3072, 28, 16, 8),
    "Qwen2.5-1.5B": ("qwen2", 1536, 8960, 28, 12, 2),
    "Qwen3-1.7B": ("qwen3", 2048, 6144, 28, 16, 8),
    "Qwen2.5-3B": ("qwen2", 2048, 11008, 36, 16, 2),
}


class Tracker(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and the most that ever were."""

    live = peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else self
            if not hasattr(storage, "live"):  # it is new
                storage.live = True
                self.count(storage.nbytes())
                weakref.finalize(storage, self.count, -storage.nbytes())
        return result

    def count(self, size):
        """Add some bytes to those that are alive."""
        self.live += size
        self.peak = max(self.peak, self.live)


def main(argv):
    """Print a line a model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    parser = sdar.make_parser("python .lab/memory.py [flags]", description=__doc__)
    parser.add_argument("--tokens", type=int, default=2000, help="of the longest episode [2000]")
    given = vars(parser.parse_args(argv))
    tokens, config = given.pop("tokens"), sdar.configure(**{"model": ""} | given)
    print(f"{'':<16}   state   pass learning   cache playing")
    for name, (kind, *numbers) in SHAPES.items():
        more = dict(zip(NUMBERS.split(), numbers), vocab_size=151936, tie_word_embeddings=True)
        with FakeTensorMode():
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **more))
            a_pass = training_pass(model, config, tokens)
        weights = sum(weight.nbytes for weight in model.parameters())
        state = 4 * weights  # and AdamW's two, and the start policy; a gradient while it learns
        learning = state + weights + max(a_pass, weights)  # AdamW's step takes room, too

        half = config.dtype == "bfloat16"  # then weights are copied for a pass
        keys = sum(len(rows) for part, rows in model.named_parameters() if "k_proj.weight" in part)
        cache = config.rollout_batch * tokens * 2 * keys * (2 if half else 4)
        sizes = state, a_pass, learning, cache, state + cache + half * weights // 2
        print(f"{name:<16}" + "".join(f"{size / 1e9:8.1f}" for size in sizes), flush=True)


def training_pass(model, config, tokens):
    """The most bytes that a training pass needs beside weights and gradients."""
    if config.gradient_checkpointing:
        renamed = getattr(model, "activation_checkpointing_enable", None)  # as in sdar.py
        (renamed or model.gradient_checkpointing_enable)({"use_reentrant": False})
        model.train()
    ids = torch.zeros(config.micro_batch, tokens, dtype=torch.long)
    sampled = ids.flatten()[::6]
    with Tracker() as tracker:
        for weight in model.parameters():
            weight.grad = torch.empty_like(weight)
        gradients = tracker.live
        with sdar.forward_dtype(model, config):
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            head = model.get_output_embeddings().weight
            logprobs, _ = sdar.token_logprobs(states.flatten(0, 1)[sampled], head, sampled)
        logprobs.sum().backward()
    return tracker.peak - gradients


if __name__ == "__main__":
    sys.exit(sdar.run(lambda: main(sys.argv[1:])))
