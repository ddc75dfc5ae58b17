"""The CUDA kernel's own source, run by the threads of a CPU, and compared with float64:

    python -m pytest -q -rs .lab/tests/test_kernel.py

For whoever has no GPU and wants to change what logprobs.cu computes. g++ compiles it with stand-ins
for CUDA's words (cuda_on_cpu.cpp). It says nothing about speed.
"""

import ctypes
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import kernel
import torch

HERE = Path(__file__).resolve().parent
COMPILER = "g++ -std=c++20 -O1 -fno-strict-aliasing -w -shared -fPIC -pthread -o"


@lru_cache
def library(dtype):
    """The source for logits of a dtype, compiled and loaded."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps it
        path = f"{folder}/kernel.so"
        files = [path, HERE / "cuda_on_cpu.cpp", *kernel.DEFINES[dtype]]
        subprocess.run([*COMPILER.split(), *files], check=True)
        return ctypes.CDLL(path)


def launch(name, logits, *arguments):
    """A stand-in for kernel.launch."""
    *tensors, width, scale = logits, *arguments
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    function = library(logits.dtype)[f"run_{name}"]
    function(len(logits), *pointers, width, ctypes.c_double(scale))


def largest_errors(logits, temperature):
    """Of the kernel, for some ids and weights, against float64: (of log-probs and entropies, of
    their gradient), each relative to the size of what it should be."""
    n, width = logits.shape
    ids = torch.arange(1, n + 1) * 7 % width
    weights = torch.linspace(-1, 2, 2 * n).view(2, n)
    wide = logits.double().requires_grad_()
    exact = torch.distributions.Categorical(logits=wide / temperature)
    expected = torch.stack([exact.log_prob(ids), exact.entropy()])
    (slope,) = torch.autograd.grad(expected, wide, weights.double())

    found = torch.stack(kernel.RowLogprobs.apply(logits.requires_grad_(), ids, temperature))
    error = (found - expected).abs() / (1 + expected.abs())
    (gradient,) = torch.autograd.grad(found, logits, weights)
    apart = (gradient - slope).norm() / slope.norm()
    return error.max().item(), apart.item()
