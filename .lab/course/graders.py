"""What is wrong with an answer, and what that means. exercise.py calls this file as a process:

    python .lab/course/graders.py LOG SECONDS answers/kl_k3.py ...

For each answer it appends to LOG a line of JSON, the verdict: a mark, a sentence, and what the
answer printed. Marks: R right, n not yet, e still empty, x cannot be used.

An answer and the original get the inputs of checks.json, and have to return the same. Where they do
not, usual mistakes are tried on these inputs: if the answer does what one of them does, the verdict
names it. Then a small training step and a look through the microscope have to run with the answer,
and the step to have the metrics that it has without it.
"""

import copy
import faulthandler
import importlib
import inspect
import io
import json
import math
import os
import random
import runpy
import subprocess
import sys
import tempfile
import traceback
from contextlib import contextmanager, redirect_stdout
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

HERE = Path(__file__).resolve().parent
sys.path[:0] = map(str, (HERE.parents[1], HERE.parent, HERE.parent / "trl"))

import microscope
import numpy as np
import torch

import envs
import sdar
from envs import UserError, naming, require

CHECKS = json.loads((HERE / "checks.json").read_text("utf-8"))
AGAIN = 77  # exit code: what is left needs a fresh process

# --- An answer: its file, its place, its faults ------------------------------------------


class Unusable(UserError):
    """An answer that is no Python, or defines something else."""


class Notes(io.StringIO):
    """Keeps the first characters that are printed. An endless loop may print for a minute."""

    def write(self, text):
        return super().write(text[: max(0, 2000 - self.tell())])


def load(path):
    """What an answer's file defines under the file's name. Unusable if that is nothing to grade."""
    name = path.stem
    sys.path.append(str(path.absolute().parent))  # there may be helpers beside it
    try:
        found = runpy.run_path(str(path))
    except SyntaxError as error:
        raise Unusable(f"{path}: Python cannot read it, {error}") from error
    require(name in found, f"{path}: it defines no {name}", Unusable)
    original = getattr(place_of(name), name)
    if callable(original):
        takes = inspect.signature(original)
        with naming(f"{path}: {name} must be a function of {takes}", Unusable):
            inspect.signature(found[name]).bind(*takes.parameters)  # by whatever names
    return found[name]


def place_of(name):
    """The module, or the class, that has a function."""
    if name == "gated_terms":
        sys.modules.setdefault("datasets", None)  # for TRL alone, and ten seconds to import
        return importlib.import_module("trainer")
    return {"retrieve": envs.SkillBank, "view": sdar.Episode}.get(name, sdar)


def in_place(name, answer):
    """A context in which the answer stands in the original's place."""
    if isinstance(answer, dict):  # others have the table by this object
        return patch.dict(sdar.GATES, answer, clear=True)
    return patch.object(place_of(name), name, answer)


def sentence(error, *paths):
    """What an answer raised, or a grader says of it, in one line, with the answer's own line."""
    files, where = [*map(str, paths)], ""
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename in files:
            where = f"{frame.filename}, line {frame.lineno} ({frame.line}): "
    kind = "" if isinstance(error, (AssertionError, UserError)) else f"{type(error).__name__}: "
    meant = "".join(f" ({note})" for note in getattr(error, "__notes__", []))
    said = " ".join(str(error).split())
    return f"{where}{kind}{said:.500}{meant}"


@contextmanager
def meaning(message):
    """Whatever is raised in here gets a note: what that means."""
    try:
        yield
    except Exception as error:
        error.add_note(message)
        raise


# --- A verdict ---------------------------------------------------------------------------

SMOKE = (
    "--seed 2 --steps 1 --tasks-per-step 2 --group-size 4 --minibatches 2 --eval-episodes 1 "
    "--eval-every 0 --rollout-batch 8 --max-turns 6 --gate soft_or --retrieval ucb"
)  # in one of the groups somebody wins and somebody loses
SHARED = (
    "it changes what all share, the state of a generator (random's, NumPy's, PyTorch's) or a "
    "default of PyTorch's: whatever comes after it is another; have your own"
)
COMPARED = "success reward turns loss policy_loss sdar_loss kl entropy gap gate ratio grad_norm"


def main(log, seconds, *paths):
    """Judge answers, one after the other. One that hangs ends the process, and shows its line."""
    faulthandler.enable()
    Path(log).touch()  # everything could be imported
    for path in map(Path, paths):
        before = shared_state()
        row = verdict(path, float(seconds))
        with open(log, "a") as file:
            print(json.dumps(row), file=file)
        if shared_state() != before:
            os._exit(AGAIN)
    os._exit(0)  # whatever an answer has started


def verdict(path, seconds):
    """(mark, sentence, what was printed) of one answer."""
    notes = Notes()
    mark, said = "R", ""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        with redirect_stdout(notes):
            judge(path)
    except NotImplementedError:
        mark, said = "e", f"{path}: it is still empty"
    except Unusable as error:
        mark, said = "x", str(error)
    except (Exception, SystemExit) as error:
        mark, said = "n", sentence(error, path)
    faulthandler.cancel_dump_traceback_later()
    return mark, said, notes.getvalue()


def judge(path):
    """AssertionError, or what the answer raises, unless it is right."""
    name, answer, before = path.stem, load(path), shared_state()
    check(name, answer)
    assert shared_state() == before, SHARED
    if name == "retrieve":
        check_processes(path)
    if name == "gated_terms":
        return  # a step on TRL takes minutes
    expected = smoke()
    with meaning("by hand numbers it is right, but a small training step or the microscope stops"):
        with in_place(name, answer):
            metrics = smoke.__wrapped__()
    for key in COMPARED.split():
        ours, yours = expected[key], metrics[key]
        alike = math.isclose(ours, yours, rel_tol=0.01, abs_tol=1e-5) or name == "retrieve"
        meant = f"by hand numbers it is right, but in a small training step {key} is"
        assert alike, f"{meant} {yours:.4f} instead of {ours:.4f}"


def shared_state():
    """What an answer has to leave as it was."""
    generators = random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()
    return str((generators, torch.get_default_dtype(), torch.is_grad_enabled()))


@lru_cache  # of the originals: called while no answer is in place
def smoke():
    """Metrics of a small training step, after it and a look through the microscope."""
    temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with temporary as folder, redirect_stdout(io.StringIO()):
        words = [*SMOKE.split(), "--out", f"{folder}/run"]
        metrics = sdar.train(sdar.configure(**vars(sdar.make_parser().parse_args(words))))
        microscope.main([*SMOKE.split(), "--page", f"{folder}/page.html"])
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
            if got.dim() < want.dim() or got.numel() == 1 < want.numel():
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
    (slope,) = torch.autograd.grad(values.sum() + 0 * by.sum(), by)  # 0 where there is no graph
    return slope


def same(one, two):
    """True for tensors of one shape and, but for rounding, the same numbers."""
    return one.shape == two.shape and torch.allclose(one, two, rtol=1e-5, atol=2e-5)


# How to call what is no function of tensors: the function first, then what checks.json hands over.


def gates(table, gap, entropy, beta, kind):
    """One function of the table of gates."""
    if not table:
        raise NotImplementedError
    return table[kind](gap, entropy, beta)


def an_episode(ids, mask, skill_at, skill_ids):
    """An Episode of which nothing but these ids is known."""
    return sdar.Episode(None, "", "", None, ids, mask, skill_at, [], skill_ids)


def view(function, ids, mask, skill_at, skill_ids, with_skill):
    """An episode as one of the two readers sees it."""
    read = function(an_episode(ids, mask, skill_at, skill_ids), with_skill)
    assert {*map(type, read)} <= {list, tuple}, "it returns two lists, and padded makes tensors"
    return {"ids": torch.tensor(read[0]), "mask": torch.tensor(read[1])}


class Counting:
    """A model of four words that finds likely what it has read often: the state at a position is
    how often each id has come up, that position's included, times `one`."""

    device = torch.device("cpu")

    def __init__(self, one, head):
        self.one, self.head = one, head

    def base_model(self, input_ids, attention_mask=None, **options):
        self.halved = torch.tensor([torch.is_autocast_enabled("cpu")])  # called in bfloat16?
        words = torch.nn.functional.one_hot(input_ids, 4)
        words = words if attention_mask is None else words * attention_mask[..., None]
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


BATCH = "completion_mask", "tool_mask", "sampling_per_token_logps", "old_per_token_logps"


def gated_terms(function, logprobs, entropy, *batch, gate="gap", beta=5.0):
    """A batch of TRL's. Of one optimiser step it does not have the last row."""
    output = SimpleNamespace(log_probs=logprobs, entropy=entropy)
    config = SimpleNamespace(gate=gate, gate_beta=beta)
    return function(output, dict(zip(BATCH, batch)), config)


def retrieve(function, strategy, rows=range(6), tasks=("put that mug in drawer 1",), arms=()):
    """What all right draws have in common, over thirty seeds: they may be others than ours."""
    bank = envs.SkillBank([CHECKS["skills"][row] for row in rows], strategy)
    bank.arms, order, draws = dict(arms), [*bank.skills], []
    for seed in [*range(30), *range(30)]:
        for task in tasks:
            skills = function(bank, task, "put", seed)
            assert bank.skills == order, f"{strategy}: the bank itself is changed; have a copy"
            draws.append([order.index(skill) for skill in skills[:]])  # of a list, or the like
    common = {
        "two": draws[0] + draws[1],
        "sizes": [(len(draw), len({*draw})) for draw in draws],
        "ever": sorted({*sum(draws, [])}),
        "by seed": [draws[:30] == draws[30:], len({*map(str, draws)}) > 1],
    }
    return {name: torch.tensor(values) for name, values in common.items()}


CALLS = {
    "GATES": gates,
    "view": view,
    "response_logprobs": response_logprobs,
    "gated_terms": gated_terms,
    "retrieve": retrieve,
}

ELSEWHERE = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
from envs import SkillBank
retrieve = runpy.run_path(sys.argv[2])["retrieve"]
for strategy in ("random", "ucb"):
    bank = SkillBank([dict(name=c, text=c, keywords=[c]) for c in "abcdefghij"], strategy)
    print([[skill.name for skill in retrieve(bank, "a b", "c", seed)] for seed in range(9)])
"""


def check_processes(path):
    """AssertionError unless another process retrieves the same skills."""
    command = [sys.executable, "-c", ELSEWHERE, HERE.parents[1], path]
    said = set()
    for number in "12":
        said.add(subprocess.check_output(command, env=os.environ | {"PYTHONHASHSEED": number}))
    meant = "a resumed run reads other skills: hash(), and a set's order, change with the process"
    assert len(said) == 1, meant


if __name__ == "__main__":
    main(*sys.argv[1:])
