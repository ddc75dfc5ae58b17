"""The CUDA kernel: on a GPU where there is one, else run by the threads of a CPU."""

import math
import shutil

import kernel
import on_cpu
import pytest
import torch
from pytest import fixture, mark

import sdar
from test_sdar import table


@fixture
def runs(monkeypatch):
    """The kernel runs, in one way or the other, on tensors that are made meanwhile."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        if not shutil.which("g++"):
            pytest.skip("needs g++ or a GPU")
        monkeypatch.setattr(kernel, "launch", on_cpu.launch)
    with torch.device(device):
        yield


SHAPES = """
3  1003    1.0
2  5       0.7
2  1024    1.3
2  64      0.5
2  151936  0.7
"""


@mark.parametrize("dtype", kernel.DEFINES, ids=str)
@mark.parametrize("rows, width, temperature", table(SHAPES))
def test_it_agrees_with_float64(dtype, rows, width, temperature, runs):
    """Any width, alignment and temperature; -inf logits; a row with one huge value. In bfloat16
    the gradient is rounded to the nearest: cut off it would be 3e-3 away. It takes the logits'
    place, and their version tells PyTorch: a second backward pass is an error."""
    torch.manual_seed(0)
    logits = (4 * torch.randn(rows, width)).to(dtype)
    if width > 64:
        logits[0, 1::7] = logits[0, 200:400] = -math.inf
        logits[1, 5] = 1e30
    version = logits._version
    values, slope = on_cpu.largest_errors(logits, temperature)
    assert logits._version > version
    assert values < 1e-5
    assert slope < (1e-5 if dtype == torch.float32 else 2e-3)


def test_token_logprobs_learn_through_it(runs):
    hidden = torch.randn(5, 8, requires_grad=True)
    head = torch.randn(50, 8)
    slopes = []
    for function in (kernel.RowLogprobs.apply, None):
        logprobs, _ = sdar.token_logprobs(hidden, head, torch.arange(5), 0.7, function)
        slopes += torch.autograd.grad(logprobs.sum(), hidden)
    assert torch.allclose(*slopes, atol=1e-5)


def test_without_a_compiler_pytorch_does_the_work(monkeypatch, capsys):
    monkeypatch.setattr(kernel, "compiled", None)  # as if the private function were gone
    assert sdar.load_kernel.__wrapped__("float32") is None
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("--kernel: not compiled, PyTorch's functions do the work: ")
