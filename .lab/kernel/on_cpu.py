"""The CUDA kernel's own source, run by the threads of a CPU: python .lab/kernel_on_cpu.py

For whoever has no GPU and wants to see, or change, what .assets/logprobs.cu computes. g++ compiles
it with stand-ins for CUDA's words (.assets/test/cuda_on_cpu.cpp), and the numbers are compared with
float64. It says nothing about speed.
"""

import ctypes
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sdar

DTYPES = (torch.float32, torch.bfloat16)
COMPILER = "g++ -std=c++20 -O1 -fno-strict-aliasing -w -shared -fPIC -pthread -I. -o k.so"


def source(kind):
    """The kernel's source for one type of logits: 0 float32, 1 bfloat16."""
    bits = "unsigned short" if kind else "unsigned int"
    return f"#define TYPE {kind}\n#define Bits {bits}\n" + sdar.KERNEL_SOURCE.read_text()


def build(dtype, folder):
    """The kernel's functions for logits of a dtype: a stand-in for sdar.compiled. UserError without
    g++."""
    sdar.require(shutil.which("g++"), "the kernel's source is compiled by g++: there is none")
    (folder / "kernel.cu").write_text(source(DTYPES.index(dtype)))
    stand_ins = sdar.HERE / ".assets" / "test" / "cuda_on_cpu.cpp"
    subprocess.run([*COMPILER.split(), stand_ins], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "k.so"))

    def convert(x):
        if isinstance(x, torch.Tensor):
            return ctypes.c_void_p(x.data_ptr())
        return ctypes.c_double(x) if isinstance(x, float) else ctypes.c_int(x)

    def compiled(name, dtype):
        def launch(grid, block, arguments):
            return getattr(library, f"run_{name}")(*map(convert, [grid[0], *arguments]))

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
    to its norm). The gradient takes the logits' place."""
    exact, slope = reference(logits, ids, temperature, g, h)
    ours = sdar.KernelLogprobs.apply(logits.requires_grad_(), ids, temperature, True)
    error = (torch.stack(ours).double() - exact).abs().max()
    value = (g * ours[0] + h * ours[1]).sum()
    (gradient,) = torch.autograd.grad(value, logits, retain_graph=True)
    sdar.require(gradient.data_ptr() == logits.data_ptr(), "the gradient must take logits' place")
    return error.item(), ((gradient.double() - slope).norm() / slope.norm()).item()


def rounds_as_pytorch(compiled, dtype):
    """True if the kernel stores float32 numbers of any bits as PyTorch does: rounded to the
    nearest, ties to even, and a card's NaN, whose bits are all ones, still NaN."""
    draw = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (10**5,), generator=draw).int()
    bits[:2] = torch.tensor([0x7FFFFFFF, 0x3F808000])  # NaN, and a tie
    x = bits.view(torch.float32)
    stored = torch.empty(len(x), dtype=dtype)
    compiled("encode", dtype)((len(x),), None, [x, stored])
    return torch.equal(stored.nan_to_num(0.5), x.to(dtype).nan_to_num(0.5))


def main():
    """Print the largest errors of both dtypes."""
    draw = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as folder:
            sdar.compiled = build(dtype, Path(folder))
            logits = 3 * torch.randn(8, 1003, generator=draw)
            ids = torch.randint(1003, (8,), generator=draw)
            g, h = torch.randn(2, 8, generator=draw)
            values, slope = largest_errors(logits.to(dtype), ids, 0.7, g, h)
            print(f"{dtype}: log-probs and entropies {values:.1e} nats, gradient {slope:.1e}")


if __name__ == "__main__":
    main()
