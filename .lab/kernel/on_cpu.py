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
COMPILER = "g++ -std=c++20 -O1 -fno-strict-aliasing -w -shared -fPIC -pthread -o"


def build(dtype, folder):
    """The kernel's functions for logits of a dtype: a stand-in for kernel.compiled. UserError
    without g++."""
    sdar.require(shutil.which("g++"), "the kernel's source is compiled by g++: there is none")
    path = Path(folder, "kernel.so")
    files = [path, HERE / "cuda_on_cpu.cpp"]
    subprocess.run([*COMPILER.split(), *files, *kernel.defines(dtype)], check=True)
    library = ctypes.CDLL(str(path))

    def convert(x):
        if isinstance(x, torch.Tensor):
            return ctypes.c_void_p(x.data_ptr())
        return ctypes.c_double(x) if isinstance(x, float) else ctypes.c_int(x)

    def compiled(name, dtype):
        def launch(grid, block, arguments):
            getattr(library, f"run_{name}")(*map(convert, [grid[0], *arguments]))

        return launch

    return compiled


def largest_errors(logits, temperature):
    """Of the kernel, for some ids and weights, against float64: (of log-probs and entropies, of
    their gradient), each relative to the size of what it should be."""
    n, width = logits.shape
    ids = torch.arange(1, n + 1, device=logits.device) * 7 % width
    g, h = torch.linspace(-1, 2, 2 * n, device=logits.device).view(2, n)
    wide = logits.detach().double().requires_grad_()
    exact = torch.distributions.Categorical(logits=wide / temperature)
    expected = torch.stack([exact.log_prob(ids), exact.entropy()])
    (slope,) = torch.autograd.grad((g * expected[0] + h * expected[1]).sum(), wide)

    logprobs, entropy = kernel.RowLogprobs.apply(logits.requires_grad_(), ids, temperature)
    error = (torch.stack([logprobs, entropy]).double() - expected).abs() / (1 + expected.abs())
    (gradient,) = torch.autograd.grad((g * logprobs + h * entropy).sum(), logits)
    apart = (gradient.double() - slope).norm() / slope.norm().clamp(min=0.01)
    return error.max().item(), apart.item()


def main():
    """Print the largest errors of both dtypes."""
    torch.manual_seed(0)
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as folder:
            kernel.compiled = build(dtype, folder)
            values, slope = largest_errors(3 * torch.randn(8, 1003).to(dtype), 0.7)
            print(f"{dtype}: log-probs and entropies {values:.1e}, gradient {slope:.1e}")


if __name__ == "__main__":
    sys.exit(sdar.run(main))
