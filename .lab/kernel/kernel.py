"""The CUDA kernel of --kernel: log-prob and entropy of a row of logits in one read.

A row of Qwen's logits holds 151,936 numbers; PyTorch reads and writes it several times for
log-softmax, entropy and their gradient. The kernel reads it once forward and once backward: what
limits it is reading. Its source, logprobs.cu, explains how. With on_cpu.py the tests run it without
a GPU.
"""

from functools import lru_cache
from pathlib import Path

import torch
from tqdm import tqdm

SOURCE = Path(__file__).resolve().parent / "logprobs.cu"
DEFINES = {  # a compiler's options for logits of a dtype
    torch.float32: ["-DTYPE=0", "-DBits=unsigned int"],
    torch.bfloat16: ["-DTYPE=1", "-DBits=unsigned short"],
}


@lru_cache
def compiled(name, dtype):
    """A function of logprobs.cu for logits of a dtype, compiled by NVRTC at its first use.

    PyTorch has no public compiler of CUDA source that needs no toolkit. _compile_kernel is private
    and used here alone; row_logprobs falls back where it is gone or changed."""
    from torch.utils import cpp_extension

    options = ["--ftz=true", *DEFINES[dtype]]
    if not cpp_extension.CUDA_HOME:  # it asks for a toolkit's folder, and needs nothing of it
        cpp_extension.CUDA_HOME = "/nowhere"
    source = SOURCE.read_text("utf-8")
    return torch.cuda._compile_kernel(source, name, nvcc_options=options)  # noqa: SLF001


def launch(name, logits, *arguments):
    """Run a function of logprobs.cu with one block of 512 threads a row."""
    compiled(name, logits.dtype)((len(logits), 1, 1), (512, 1, 1), [logits, *arguments])


class RowLogprobs(torch.autograd.Function):
    """Log-probs and entropies (N,) of ids (N,) in logits (N, V), in float32.

    No other tensor of N x V is made: the backward pass writes the gradient over the logits. That is
    allowed because nobody else reads them, and a second backward pass is made an error. With p the
    softmax of a row at temperature 1 / scale, the gradient of logit i is

        scale (g [i = id] - p_i (g + h (log p_i + entropy)))

    where g and h are the gradients that come in for log-prob and entropy."""

    @staticmethod
    def forward(ctx, logits, ids, temperature):
        logits = logits.contiguous()
        out = torch.empty(len(ids), 4, device=logits.device)  # log-prob, entropy, max, log of sum
        ctx.scale = 1 / temperature
        ctx.save_for_backward(logits, ids, out)
        launch("forward", logits, ids, out, logits.shape[1], ctx.scale)
        return out[:, 0].clone(), out[:, 1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        logits, ids, out = ctx.saved_tensors
        torch.autograd.graph.increment_version(logits)  # a second backward pass is an error
        gradients = [gradient.contiguous() for gradient in gradients]  # of log-probs, entropy
        launch("backward", logits, ids, out, *gradients, logits.shape[1], ctx.scale)
        return logits, None, None


def row_logprobs(dtype):
    """The function (logits (N, V), ids (N,), temperature) -> log-probs (N,), entropies (N,), for
    logits of a dtype, "float32" or "bfloat16"; None, and a line, where it cannot be compiled."""
    try:
        for name in ("forward", "backward"):
            compiled(name, getattr(torch, dtype))
    except Exception as error:  # whatever a private function raises when it has changed
        tqdm.write(f"--kernel: not compiled, PyTorch's functions do the work: {error!r:.200}")
        return None
    return RowLogprobs.apply
