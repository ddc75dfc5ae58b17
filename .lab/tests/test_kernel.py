"""The CUDA kernel, run by the threads of a CPU, and on a GPU where there is one.

python -m pytest -q .lab/tests/test_kernel.py
"""

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
    (tmp_path / "k.cu").write_text(on_cpu.source(dtype), "utf-8")
    command = "nvcc -arch=sm_80 -ftz=true -Werror all-warnings -cubin -o k k.cu"
    subprocess.run(command.split(), cwd=tmp_path, check=True)


@fixture(params=on_cpu.DTYPES, ids=str)
def dtype(request, tmp_path, monkeypatch):
    """The dtype of a kernel that is now run by the threads of a CPU."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    monkeypatch.setattr(kernel, "compiled", on_cpu.build(request.param, tmp_path))
    return request.param


SHAPES = """
3  1003  1.0  0
2  5     0.7  0
2  1024  1.3  3
2  64    0.5  0
1  1     1.0  0
"""


@mark.parametrize("rows, width, temperature, offset", table(SHAPES))
def test_it_agrees_with_float64(dtype, rows, width, temperature, offset):
    """Any width, alignment and temperature; -inf logits; a row with one huge value."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.zeros(rows * width + offset, dtype=dtype)[offset:].view(rows, width)
    logits.copy_(4 * torch.randn(rows, width, generator=draw))
    if width > 64:
        logits[0, ::7] = logits[0, 200:400] = -math.inf
        logits[1, 5] = 1e30
    ids = torch.full((rows,), min(width - 1, width // 2 + 1 - width % 2))
    g, h = torch.randn(2, rows, generator=draw)
    exact, slope = on_cpu.reference(logits, ids, temperature, g, h)
    logprobs, entropy = kernel.RowLogprobs.apply(logits.requires_grad_(), ids, temperature)
    ours = torch.stack([logprobs, entropy]).double()
    assert torch.allclose(ours, exact, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad((g * logprobs + h * entropy).sum(), logits)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert (gradient.double() - slope).norm() <= tolerance * slope.norm() + 1e-7


def test_it_stores_as_pytorch_rounds(dtype):
    """float32 numbers of any bits: to the nearest, ties to even, and NaN stays NaN."""
    draw = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (10**5,), generator=draw).int()
    bits[:2] = torch.tensor([0x7FFFFFFF, 0x3F808000])  # a card's NaN, and a tie
    x = bits.view(torch.float32)
    stored = torch.empty(len(x), dtype=dtype)
    kernel.compiled("encode", dtype)((len(x),), None, [x, stored])
    assert torch.equal(stored.nan_to_num(0.5), x.to(dtype).nan_to_num(0.5))


def test_the_gradient_takes_the_logits_place_once(dtype):
    logits = torch.randn(3, 300).to(dtype).requires_grad_()
    logprobs, _ = kernel.RowLogprobs.apply(logits, torch.tensor([0, 7, 299]), 1.0)
    (gradient,) = torch.autograd.grad(logprobs.sum(), logits, retain_graph=True)
    assert gradient.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="inplace"):
        torch.autograd.grad(logprobs.sum(), logits)


@mark.parametrize("bad", [math.nan, -math.inf])
def test_a_bad_row_spoils_no_other(dtype, bad):
    """Nor has a row of -inf a log-prob."""
    logits = torch.ones(2, 200).to(dtype)
    logits[0, :] = bad
    both = kernel.RowLogprobs.apply(logits.requires_grad_(), torch.zeros(2).long(), 1.0)
    (gradient,) = torch.autograd.grad(sum(both).sum(), logits)
    assert torch.stack(both).isfinite().all(0).tolist() == [False, True]
    assert gradient.isfinite().all(1).tolist() == [False, True]


def test_token_logprobs_learn_through_it(dtype, monkeypatch):
    """In chunks that the backward pass computes again: values and gradients are PyTorch's."""
    monkeypatch.setattr(sdar, "LOGITS_AT_ONCE", 2 * 50)  # two rows a chunk
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 8, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(50, 8, generator=draw).to(dtype).requires_grad_()
    ids = torch.tensor([0, 49, 7, 7, 20])

    def results(function):
        logprobs, entropy = sdar.token_logprobs(hidden, weight, ids, 0.7, function)
        gradients = torch.autograd.grad((logprobs - entropy / 2).sum(), (hidden, weight))
        return logprobs, entropy, *gradients

    for ours, plain in zip(results(kernel.RowLogprobs.apply), results(None)):
        tolerance = 1e-5 if ours.dtype == torch.float32 else 1e-2
        assert (ours - plain).norm() <= tolerance * plain.norm()


def test_without_a_compiler_pytorch_does_the_work(monkeypatch, capsys):
    def broken(name, dtype):
        raise AttributeError("no _compile_kernel")

    monkeypatch.setattr(kernel, "compiled", broken)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sdar.load_kernel.cache_clear()
    assert sdar.load_kernel("float32") is None
    sdar.load_kernel.cache_clear()
    said = capsys.readouterr().out
    assert said.startswith("--kernel: not compiled, PyTorch's functions do the work: ")
    assert said.count("\n") == 1


def test_the_script_prints_small_errors(monkeypatch, capsys):
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    monkeypatch.setattr(kernel, "compiled", None)  # to be put back
    on_cpu.main()
    errors = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert errors[0] < 1e-5 and errors[1] < 1e-2


@mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 1e-2)])
@mark.parametrize("rows, width", [(7, 151936), (3, 1003)])
def test_on_a_gpu(dtype, tolerance, rows, width):
    assert sdar.load_kernel(dtype)
    logits = torch.randn(rows, width, device="cuda", dtype=getattr(torch, dtype))
    ids, ones = torch.arange(rows, device="cuda"), torch.ones(rows, device="cuda")
    errors = on_cpu.largest_errors(logits, ids, 0.7, ones, -0.3 * ones)
    assert max(errors) < tolerance
