"""What is wrong with an answer, and what that means: for exercise.py.

An answer and the original get the inputs of checks.json, and have to return the same. Where they do
not, usual mistakes are tried on these inputs: if the answer does what one of them does, the verdict
names it. Then a small training step and a look through the microscope have to run with the answer,
and the step to have the metrics that it has without it.
"""

import copy
import inspect
import io
import json
import math
import random
import runpy
import sys
import tempfile
import traceback
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

import microscope
import numpy as np
import torch

import sdar
from envs import UserError, naming, require

CHECKS = json.loads((HERE / "checks.json").read_text("utf-8"))

# --- An answer: its file, its place, its faults ------------------------------------------


class Unusable(UserError):
    """An answer that is no Python, or defines something else."""


def load(path):
    """What an answer's file defines under the file's name. Unusable if that is nothing to grade."""
    name = path.stem
    try:
        found = runpy.run_path(str(path))
    except SyntaxError as error:
        raise Unusable(f"{path}: Python cannot read it, {error}") from error
    require(name in found, f"{path}: it defines no {name}", Unusable)
    original = getattr(place_of(name), name)
    require(found[name] is not original, f"{path}: that is sdar.py's own", Unusable)
    if callable(original):
        takes = inspect.signature(original)
        with naming(f"{path}: {name} must be a function of {takes}", Unusable):
            inspect.signature(found[name]).bind(*takes.parameters)  # by whatever names
    return found[name]


def place_of(name):
    """The module, or the class, that has a function."""
    return sdar.Episode if name == "view" else sdar


def in_place(name, answer):
    """A context in which the answer stands in the original's place."""
    if isinstance(answer, dict):  # others have the table by this object
        return patch.dict(sdar.GATES, answer, clear=True)
    return patch.object(place_of(name), name, answer)


def sentence(error, *paths):
    """What an answer raised, or a grader says of it, in one line, with the answer's own line."""
    where = kind = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if Path(frame.filename) in paths:
            where = f"{frame.filename}, line {frame.lineno} ({frame.line}): "
    if not isinstance(error, (AssertionError, UserError)):
        kind = f"{type(error).__name__}: "
    said = " ".join([str(error), *getattr(error, "__notes__", [])])
    return where + kind + " ".join(said.split())


@contextmanager
def meaning(message):
    """Whatever is raised in here gets a note: what that means."""
    try:
        yield
    except Exception as error:
        error.add_note(f"({message})")
        raise


# --- A verdict ---------------------------------------------------------------------------

SMOKE = (
    "--seed 2 --steps 1 --tasks-per-step 2 --group-size 4 --minibatches 2 --eval-episodes 1 "
    "--eval-every 0 --rollout-batch 8 --max-turns 6 --gate soft_or"
).split()  # in one of the groups somebody wins and somebody loses
SHARED = (
    "it changes what all share, the state of a generator (random's, NumPy's, PyTorch's) or a "
    "default of PyTorch's, and so what runs after it: use your own, or set it back"
)
COMPARED = "success reward turns loss policy_loss sdar_loss kl entropy gap gate ratio grad_norm"


def verdict(path):
    """What is wrong with an answer, in a sentence; "" if it is right. Unusable: there is none.
    Where it never comes back, Ctrl-C names the line."""
    try:
        with torch.enable_grad():  # again, where an answer has turned that off
            judge(path)
    except Unusable:
        raise
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        return sentence(error, path)
    return ""


def judge(path):
    """AssertionError, or what the answer raises, unless it is right."""
    name, answer, before = path.stem, load(path), shared_state()
    check(name, answer)
    assert shared_state() == before, SHARED
    expected = smoke()
    by_hand = "with numbers worked out by hand it is right, but"
    with (
        meaning(f"{by_hand} a small training step or the microscope stops"),
        in_place(name, answer),
    ):
        metrics = smoke.__wrapped__()
    for key in COMPARED.split():
        alike = math.isclose(expected[key], metrics[key], rel_tol=0.01, abs_tol=1e-5)
        values = f"{metrics[key]:.4f} instead of {expected[key]:.4f}"
        assert alike, f"{by_hand} in a small training step {key} is {values}"


def shared_state():
    """What an answer has to leave as it was."""
    generators = random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()
    return str((generators, torch.get_default_dtype(), torch.is_grad_enabled()))


@lru_cache  # of the originals: called while no answer is in place
def smoke():
    """Metrics of a small training step, after it and a look through the microscope."""
    quiet = io.StringIO()
    temporary = tempfile.TemporaryDirectory()
    with temporary as folder, redirect_stdout(quiet), redirect_stderr(quiet):
        words = [*SMOKE, "--out", f"{folder}/run"]
        metrics = sdar.train(sdar.configure(**vars(sdar.make_parser().parse_args(words))))
        microscope.main([*SMOKE, "--page", f"{folder}/page.html"])
    return metrics


# --- Values: checks.json -----------------------------------------------------------------
#
# A case calls a function `of` inputs, lists of which become tensors, and `with` options. Each of
# its looks takes one row of the result (`row`, where that is a dict), or the gradient of its sum by
# an input (`slope`, the number of that input). It says what a difference `means`, and in `wrong`
# what usual mistakes mean: {expression: sentence}. An expression sees the inputs by their names,
# all of sdar.py, and the original as `ours`.


def check(name, yours):
    """AssertionError with a meaning unless an answer does what the original does."""
    ours = getattr(place_of(name), name)
    if name in CALLS:
        ours = partial(CALLS[name], ours)
        yours = partial(CALLS[name], yours)
    takes = str(inspect.signature(ours))[1:-1]
    for case in CHECKS[name]:
        for look in case["looks"]:
            with meaning(look["means"]):
                got = seen(yours, case, look)
            want = seen(ours, case, look)
            if same(got, want):
                continue
            meant = look["means"]
            for formula, usual in look.get("wrong", {}).items():
                wrong = eval(f"lambda {takes}: {formula}", vars(sdar) | {"ours": ours})
                if same(got, seen(wrong, case, look | {"row": ""})):
                    meant = usual
            fewer = got.numel() < want.numel()
            if fewer and (got.dim() < want.dim() or got.numel() == 1):
                meant = "a number for each: no mean or sum here, it is taken in update, once"
            raise AssertionError(f"{meant} (yours {got}, expected {want})")


def seen(function, case, look):
    """The tensor that a look takes of what a function returns."""
    given = [torch.tensor(value) if isinstance(value, list) else value for value in case["of"]]
    options = copy.deepcopy(case.get("with", {}))
    if "slope" in look:
        given[look["slope"]].requires_grad_()
    before = str((given, options))
    values = function(*given, **options)
    meant = "it changes what it was handed, and others still need that: no x += 1, no x_()"
    assert str((given, options)) == before, meant

    row = look.get("row")
    if row:
        assert isinstance(values, dict) and row in values, f"it must return a dict, with {row!r}"
        values = values[row]
    assert isinstance(values, torch.Tensor), "a tensor is needed, and no list or number"
    if "slope" not in look:
        return values.detach().float()
    by = given[look["slope"]]
    (values.sum() + 0 * by.sum()).backward()  # 0 where there is no graph
    return by.grad


def same(one, two):
    """True for tensors of one shape and, but for rounding, the same numbers."""
    return one.shape == two.shape and torch.allclose(one, two, rtol=1e-5, atol=2e-5)


# How to call what is no function of tensors: the function first, then what checks.json hands over.


def gates(table, gap, entropy, beta, kind):
    """One function of the table of gates."""
    return table[kind](gap, entropy, beta)


def an_episode(ids, mask, skill_at, skill_ids):
    """An Episode of which nothing but these ids is known."""
    return sdar.Episode(None, "", "", None, ids, mask, skill_at, [], skill_ids)


def view(function, ids, mask, skill_at, skill_ids, with_skill):
    """An episode as one of the two readers sees it."""
    read = function(an_episode(ids, mask, skill_at, skill_ids), with_skill)
    assert {*map(type, read)} <= {list, tuple}, "return two lists: padded makes the tensors"
    return {"ids": torch.tensor(read[0]), "mask": torch.tensor(read[1])}


class Counting:
    """A model of four words that finds likely what it has read often: the state at a position is
    how often each id has come up, that position's included, times `one`."""

    device = torch.device("cpu")

    def __init__(self, one, head):
        self.one, self.head = one, head

    def base_model(self, input_ids, attention_mask=torch.ones(1), **options):  # noqa: B008
        self.halved = torch.tensor([torch.is_autocast_enabled("cpu")])  # called in bfloat16?
        words = torch.nn.functional.one_hot(input_ids, 4) * attention_mask[..., None]
        return SimpleNamespace(last_hidden_state=words.cumsum(1) * self.one)

    def __call__(self, *ids, **options):
        states = self.base_model(*ids, **options).last_hidden_state
        return SimpleNamespace(logits=states @ self.head.T)

    def get_output_embeddings(self):
        return SimpleNamespace(weight=self.head)


def response_logprobs(function, one, head, temperature=2.0, dtype="float32", with_skill=False):
    """Two conversations, of six and three ids, read by a model that counts."""
    model = Counting(one, head)
    config = SimpleNamespace(temperature=temperature, dtype=dtype, kernel=False)
    long = an_episode([0, 1, 1, 2, 3, 1], [0, 0, 1, 1, 0, 1], 1, [3, 3])
    short = an_episode([2, 2, 3], [0, 0, 1], 1, [])
    logprobs, entropy = function(model, [long, short], config, with_skill)
    return {"logprobs": logprobs, "entropy": entropy, "halved": model.halved}


CALLS = {"GATES": gates, "view": view, "response_logprobs": response_logprobs}
