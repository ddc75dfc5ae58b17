"""The CUDA kernel, run by the threads of a CPU, and on a GPU where there is one."""

import math
import shutil
import subprocess
import sys

import kernel
import on_cpu
import pytest
import torch
from pytest import fixture, mark

import sdar
from test_sdar import table


@mark.skipif(not shutil.which("nvcc"), reason="needs a CUDA compiler on the PATH")
@mark.parametrize("dtype", on_cpu.DTYPES, ids=str)
def test_the_source_compiles(dtype, tmp_path):
    command = "nvcc -arch=sm_80 -ftz=true -Werror all-warnings -cubin -o k".split()
    command += [*kernel.defines(dtype), kernel.SOURCE]
    subprocess.run(command, cwd=tmp_path, check=True)


@fixture(scope="module", params=on_cpu.DTYPES, ids=str)
def dtype(request, tmp_path_factory):
    """The dtype of a kernel that is now run by the threads of a CPU."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("kernel")
        patch.setattr(kernel, "compiled", on_cpu.build(request.param, folder))
        yield request.param


SHAPES = """
3  1003  1.0  0
2  5     0.7  0
2  1024  1.3  3
2  64    0.5  0
1  1     1.0  0
"""


@mark.parametrize("rows, width, temperature, offset", table(SHAPES))
def test_it_agrees_with_float64(dtype, rows, width, temperature, offset):
    """Any width, alignment and temperature; -inf logits; a row with one huge value. In bfloat16
    the gradient is rounded to the nearest: cut off it would be 3e-3 away."""
    torch.manual_seed(0)
    logits = torch.zeros(rows * width + offset, dtype=dtype)[offset:].view(rows, width)
    logits.copy_(4 * torch.randn(rows, width))
    if width > 64:
        logits[0, 1::7] = logits[0, 200:400] = -math.inf
        logits[1, 5] = 1e30
    values, slope = on_cpu.largest_errors(logits, temperature)
    assert values < 1e-5
    assert slope < (1e-5 if dtype == torch.float32 else 2e-3)


def test_the_gradient_takes_the_logits_place_once(dtype):
    logits = torch.randn(3, 300).to(dtype).requires_grad_()
    logprobs, _ = kernel.RowLogprobs.apply(logits, torch.tensor([0, 7, 299]), 1.0)
    (gradient,) = torch.autograd.grad(logprobs.sum(), logits, retain_graph=True)
    assert gradient.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="inplace"):
        torch.autograd.grad(logprobs.sum(), logits)


def test_token_logprobs_learn_through_it(dtype, monkeypatch):
    """In chunks that the backward pass computes again: values and gradients are PyTorch's."""
    monkeypatch.setattr(sdar, "LOGITS_AT_ONCE", 2 * 50)  # two rows a chunk
    torch.manual_seed(0)
    hidden = torch.randn(5, 8).to(dtype).requires_grad_()
    weight = torch.randn(50, 8).to(dtype).requires_grad_()
    ids, found = torch.tensor([0, 49, 7, 7, 20]), []
    for function in (kernel.RowLogprobs.apply, None):
        logprobs, entropy = sdar.token_logprobs(hidden, weight, ids, 0.7, function)
        slopes = torch.autograd.grad((logprobs - entropy / 2).sum(), (hidden, weight))
        found.append([logprobs, entropy, *slopes])
    for ours, plain in zip(*found):
        tolerance = 1e-5 if ours.dtype == torch.float32 else 1e-2
        assert (ours - plain).norm() <= tolerance * plain.norm()


def test_without_a_compiler_pytorch_does_the_work(monkeypatch, capsys):
    monkeypatch.setattr(kernel, "compiled", None)  # as if the private function were gone
    monkeypatch.setattr(sys, "path", [*sys.path])
    sdar.load_kernel.cache_clear()
    assert sdar.load_kernel("float32") is None
    sdar.load_kernel.cache_clear()
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("--kernel: not compiled, PyTorch's functions do the work: ")


def test_the_script_prints_small_errors(dtype, monkeypatch, capsys):
    monkeypatch.setattr(on_cpu, "DTYPES", [dtype])
    monkeypatch.setattr(on_cpu, "build", lambda *_: kernel.compiled)  # it is there already
    on_cpu.main()
    assert float(capsys.readouterr().out.split()[-1]) < 1e-2


@mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 1e-2)])
@mark.parametrize("rows, width", [(7, 151936), (3, 1003)])
def test_on_a_gpu(dtype, tolerance, rows, width):
    assert sdar.load_kernel(dtype)
    logits = torch.randn(rows, width, device="cuda", dtype=getattr(torch, dtype))
    assert max(on_cpu.largest_errors(logits, 0.7)) < tolerance
