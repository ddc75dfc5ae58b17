"""The CUDA kernel's own source, run by the threads of a CPU: python .lab/kernel/on_cpu.py

For whoever has no GPU and wants to see, or change, what logprobs.cu computes. g++ compiles it with
stand-ins for CUDA's words (cuda_on_cpu.cpp), and the numbers are compared with float64. It says
nothing about speed.
"""

import ctypes
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]
import kernel

import sdar

DTYPES = (torch.float32, torch.bfloat16)
COMPILER = "g++ -std=c++20 -O1 -fno-strict-aliasing -w -shared -fPIC -pthread -I. -o k.so"


def source(dtype):
    """The kernel's source for logits of a dtype."""
    kind = DTYPES.index(dtype)
    bits = "unsigned short" if kind else "unsigned int"
    return f"#define TYPE {kind}\n#define Bits {bits}\n" + kernel.SOURCE.read_text("utf-8")


def build(dtype, folder):
    """The kernel's functions for logits of a dtype: a stand-in for kernel.compiled. UserError
    without g++."""
    sdar.require(shutil.which("g++"), "the kernel's source is compiled by g++: there is none")
    (folder / "kernel.cu").write_text(source(dtype), "utf-8")
    subprocess.run([*COMPILER.split(), HERE / "cuda_on_cpu.cpp"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "k.so"))

    def convert(x):
        if isinstance(x, torch.Tensor):
            return ctypes.c_void_p(x.data_ptr())
        return ctypes.c_double(x) if isinstance(x, float) else ctypes.c_int(x)

    def compiled(name, dtype):
        def launch(grid, block, arguments):
            getattr(library, f"run_{name}")(*map(convert, [grid[0], *arguments]))

        return launch

    return compiled


def reference(logits, ids, temperature, g, h):
    """In float64: log-probs of ids (N,) over entropies (N,); the gradient of their sums, weighted
    by g and h, in the logits."""
    logits = logits.detach().double().requires_grad_()
    exact = torch.distributions.Categorical(logits=logits / temperature)
    both = torch.stack([exact.log_prob(ids), exact.entropy()])
    (slope,) = torch.autograd.grad((g * both[0] + h * both[1]).sum(), logits)
    return both.detach(), slope


def largest_errors(logits, ids, temperature, g, h):
    """Of the kernel, against float64: (of log-probs and entropies in nats, of the gradient relative
    to its norm)."""
    exact, slope = reference(logits, ids, temperature, g, h)
    logprobs, entropy = kernel.RowLogprobs.apply(logits.requires_grad_(), ids, temperature)
    error = (torch.stack([logprobs, entropy]).double() - exact).abs().max()
    (gradient,) = torch.autograd.grad((g * logprobs + h * entropy).sum(), logits)
    return error.item(), ((gradient.double() - slope).norm() / slope.norm()).item()


def main():
    """Print the largest errors of both dtypes."""
    draw = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as folder:
            kernel.compiled = build(dtype, Path(folder))
            logits = 3 * torch.randn(8, 1003, generator=draw)
            ids = torch.randint(1003, (8,), generator=draw)
            g, h = torch.randn(2, 8, generator=draw)
            values, slope = largest_errors(logits.to(dtype), ids, 0.7, g, h)
            print(f"{dtype}: log-probs and entropies {values:.1e} nats, gradient {slope:.1e}")


if __name__ == "__main__":
    sys.exit(sdar.run(main))
