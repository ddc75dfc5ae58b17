"""What is wrong with an answer, and what that means. exercise.py calls this file as a process:

    python .lab/course/graders.py LOG SECONDS answers/kl_k3.py ...

For each answer it appends to LOG a line of JSON, the verdict: a mark, a sentence, and what the
answer printed. Marks: R right, n not yet, e still empty, x cannot be used.

An answer is put into its module in memory. First it has to give the numbers of checks.json, or
those of a function below. Then a small training step and a look through the microscope have to run
with it, and the step to have the metrics that it has without it.
"""

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
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path[:0] = map(str, (HERE.parents[1], HERE.parent, HERE.parent / "trl", HERE))

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
        line = (error.text or "").strip()
        where = f"{error.filename or path}, line {error.lineno} ({line})"
        raise Unusable(f"{where}: Python cannot read it, {error.msg}") from error
    require(name in found, f"{path} defines no {name}", Unusable)
    answer, original = found[name], getattr(place_of(name), name)
    if isinstance(original, dict):
        require(isinstance(answer, dict), f"{path}: {name} must be a table", Unusable)
        return answer

    # It may name what it takes as it likes, but for what has a default.
    theirs, required, options = inspect.signature(original), [], {}
    for parameter in theirs.parameters.values():
        if parameter.default is parameter.empty:
            required.append(0)
        else:
            options[parameter.name] = 0
    with naming(f"{path}: {name} must be a function of {theirs}", Unusable):
        inspect.signature(answer).bind(*required, *options)
        inspect.signature(answer).bind(*required, **options)
    return answer


def place_of(name):
    """The module, or the class, that has a function."""
    if name == "gated_terms":
        sys.modules.setdefault("trl", None)  # not needed for this, and ten seconds to import
        return importlib.import_module("trainer")
    return {"retrieve": envs.SkillBank, "view": sdar.Episode}.get(name, sdar)


@contextmanager
def in_place(name, answer):
    """In this block the answer stands in the original's place."""
    place, original = place_of(name), getattr(place_of(name), name)
    rows = {**original} if isinstance(original, dict) else None
    try:
        if rows is None:
            setattr(place, name, answer)
        else:  # others have the table by this object
            original.clear()
            original.update(answer)
        yield
    finally:
        setattr(place, name, original)
        if rows is not None:
            original.clear()
            original.update(rows)


def sentence(error, *paths):
    """What an answer raised, or a grader says of it, in one line, with the answer's own line."""
    cause = error.__cause__ or error
    files = [*map(str, paths)]
    frames = [f for f in traceback.extract_tb(cause.__traceback__) if f.filename in files]
    said = " ".join(str(cause).split())[:300]
    if frames or not isinstance(cause, (AssertionError, UserError)):
        said = f"{type(cause).__name__}: {said}"
    if frames:
        said = f"{frames[-1].filename}, line {frames[-1].lineno} ({frames[-1].line}): {said}"
    meant = error is not cause and not isinstance(cause, (NameError, AttributeError))
    return f"{said} ({error})" if meant else said


@contextmanager
def meaning(message):
    """Whatever an answer raises in here becomes an AssertionError with a meaning."""
    try:
        yield
    except NotImplementedError:
        raise
    except Exception as error:
        raise AssertionError(message) from error


# --- A verdict ---------------------------------------------------------------------------

SMOKE = (
    "--seed 2 --steps 1 --tasks-per-step 2 --group-size 4 --minibatches 2 --eval-episodes 1 "
    "--eval-every 0 --rollout-batch 8 --max-turns 6"
)  # in one of the groups somebody wins and somebody loses
COUNTS = ("gate_active", "clipped")  # rounding alone moves them
WITH = {"GATES": "--gate soft_or", "retrieve": "--retrieval ucb"}


def main(log, seconds, *paths):
    """Judge answers, one after the other. One that hangs ends the process, and shows its line."""
    faulthandler.enable()
    Path(log).touch()  # everything could be imported
    for path in map(Path, paths):
        before = shared_state()
        row = verdict(path, float(seconds))
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if shared_state() != before:
            os._exit(AGAIN)
    os._exit(0)  # whatever an answer has started


def verdict(path, seconds):
    """(mark, sentence, what was printed) of one answer."""
    name, notes = path.stem, Notes()
    try:
        with redirect_stdout(notes):
            judge(name, path, seconds)
        mark, said = "R", ""
    except NotImplementedError:
        mark, said = "e", f"{path} is still empty"
    except Unusable as error:
        mark, said = "x", str(error)
    except (Exception, SystemExit) as error:
        mark, said = "n", sentence(error, path)
    faulthandler.cancel_dump_traceback_later()
    return mark, said, notes.getvalue()


def judge(name, path, seconds):
    """AssertionError, or what the answer raises, unless it is right."""

    def watch():
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)

    watch()
    answer, before = load(path), shared_state()
    with in_place(name, answer):
        if name in CHECKS:
            check_numbers(name)
        else:
            check_skills()
            check_processes(path)
    for what, state in shared_state().items():
        meant = "which all share: whatever is random or computed after it is another; have your own"
        assert state == before[what], f"it changes {what}, {meant}"
    if name == "gated_terms":
        return  # a step on TRL takes minutes
    faulthandler.cancel_dump_traceback_later()
    expected = known_smoke(WITH.get(name, ""))

    watch()
    with meaning("by hand numbers it is right, but a small training step or the microscope stops"):
        with in_place(name, answer):
            metrics = smoke(WITH.get(name, ""))
    for key, value in expected.items():
        meant = f"by hand numbers it is right, but in a small training step {key} is"
        got = metrics.get(key, math.nan)
        same = abs(got - value) < 1e-5 + abs(value) / 100
        assert same or key in COUNTS or name == "retrieve", (
            f"{meant} {got:.4f} instead of {value:.4f}"
        )


def shared_state():
    """What an answer has to leave as it was."""
    return {
        "random's generator": str(random.getstate()),
        "NumPy's generator": str(np.random.get_state()),
        "PyTorch's generator": torch.get_rng_state().tolist(),
        "PyTorch's default dtype": torch.get_default_dtype(),
        "PyTorch's grad mode": torch.is_grad_enabled(),
    }


def smoke(flags):
    """Metrics of a small training step, after it and a look through the microscope."""
    words = f"{SMOKE} {flags}".split()
    silent = redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO())
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, silent[0], silent[1]:
        given = vars(sdar.make_parser().parse_args([*words, "--out", f"{folder}/run"]))
        metrics = sdar.train(sdar.configure(**given))
        microscope.main([*words, "--page", f"{folder}/page.html"])
    timed = [name for name in metrics if "second" in name or name.startswith("eval")]
    return {name: value for name, value in metrics.items() if name not in timed}


known_smoke = lru_cache(smoke)  # of the originals: called while no answer is in place


# --- Numbers: checks.json ----------------------------------------------------------------
#
# A row calls a function `of` tensors and `with` options. It wants values, or a dict of them, within
# a tolerance; and a slope, the gradient of their sum by the input of that number. A text in place
# of a slope: there must be none, and why. What is got instead may be `known`, a usual mistake.

NOTHING = (
    "nothing is learned from it: the values must keep the gradient of the student's log-probs, so "
    "no detach, no_grad, item or tolist on their way"
)


def check_numbers(name):
    """AssertionError unless a function, or a table of them, gives the numbers of checks.json."""
    function = AS_NUMBERS.get(name) or getattr(sdar, name)
    if function == {}:
        raise NotImplementedError
    for row in CHECKS[name]:
        if "gate" in row:
            function = sdar.GATES.get(row["gate"])
            assert callable(function), f"the table has no function {row['gate']!r}"
        check_row(function, row)


def check_row(function, row):
    """AssertionError with a meaning unless the function does what a row says."""
    slopes, wants, handed = row.get("slope", {}), row["want"], []
    for place, value in enumerate(row["of"]):
        tensor = torch.tensor(value) if isinstance(value, list) else value
        if str(place) in slopes or "constant" in row:
            tensor.requires_grad_()
        handed.append(tensor)
    before = str(handed)
    with meaning(row["means"]):
        values = function(*handed, **row.get("with", {}))
    if not isinstance(wants, dict):
        values, wants = {"": values}, {"": wants}
    for key, want in wants.items():
        known = isinstance(values, dict) and key in values
        assert known, f"it must return a dict, with a row {key!r}"
        check_near(values[key], want, row["means"], row.get("known"), row.get("within", 2e-5))
        assert not (values[key].requires_grad and key in row.get("constant", ())), row["means"]
    same = str(handed) == before
    assert same, "it changes what it was handed, and others still need that: no x += 1, no x_()"
    if not slopes:
        return

    total = values[[*wants][0]].sum()
    assert total.requires_grad, NOTHING
    inputs = [handed[int(place)] for place in slopes]
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    for slope, want in zip(found, slopes.values()):
        if isinstance(want, str):
            assert slope is None or not slope.any(), want
        else:
            slope = torch.zeros_like(torch.tensor(want)) if slope is None else slope
            check_near(slope, want, row["slope_means"], row.get("known_slopes"))


def check_near(got, want, meant, known=None, within=2e-5):
    """AssertionError with what it means unless a tensor has these numbers, in this shape."""
    want = torch.tensor(want)
    kind = type(got).__name__
    assert isinstance(got, torch.Tensor), f"{meant} (a tensor, and yours is a {kind})"
    got = got.detach().float()
    numbers = f"yours {shown(got)}, expected {shown(want)}"
    if got.dim() < want.dim() or got.numel() == 1 < want.numel():
        meant = "a number for each: no mean or sum here, it is taken in update, once"
    assert got.shape == want.shape, f"{meant} ({numbers})"
    if not torch.allclose(got, want, rtol=1e-5, atol=within):
        for text, values in (known or {}).items():
            if torch.allclose(got, torch.tensor(values), atol=1e-4):
                meant = text
        raise AssertionError(f"{meant} ({numbers})")


def shown(values):
    """The first numbers of a tensor."""
    return ", ".join(f"{value:.5g}" for value in values.flatten()[:8].tolist())


# What is no function of tensors becomes one.


def an_episode(ids, mask, skill_at, skill_ids):
    """An Episode of which nothing but these ids is known."""
    nothing = dict(env=None, task="", task_type="", random=None, skills=[])
    return sdar.Episode(ids=ids, mask=mask, skill_at=skill_at, skill_ids=skill_ids, **nothing)


def view(ids, mask, skill_at, skill_ids, with_skill):
    episode = an_episode([*ids], [*mask], skill_at, [*skill_ids])
    read = episode.view(with_skill)
    alike = (episode.ids, episode.mask, episode.skill_ids) == (ids, mask, skill_ids)
    require(alike, "the episode itself must stay as it is: others still read it")
    require(len(read) == 2, "it returns two lists, ids and mask")
    plain = all(isinstance(values, (list, tuple)) for values in read)
    require(plain, "it returns lists: padded makes tensors of them")
    return {name: torch.tensor(values).float() for name, values in zip(("ids", "mask"), read)}


class Counting:
    """A model of four words that finds likely what it has read often: the state at a position is
    how often each id has come up, that position's included, times `one`."""

    device = torch.device("cpu")
    halved = False  # has it been called in bfloat16?

    def __init__(self, one, head):
        self.one, self.head = one, head

    def base_model(self, input_ids, attention_mask=None, **options):
        self.halved = torch.is_autocast_enabled("cpu")
        words = torch.nn.functional.one_hot(input_ids, 4)
        words = words if attention_mask is None else words * attention_mask[..., None]
        return SimpleNamespace(last_hidden_state=words.cumsum(1) * self.one)

    def __call__(self, *ids, **options):
        states = self.base_model(*ids, **options).last_hidden_state
        return SimpleNamespace(logits=states @ self.head.T)

    def get_output_embeddings(self):
        return SimpleNamespace(weight=self.head)


def response_logprobs(one, head, with_skill=False, dtype="float32"):
    model, config = Counting(one, head), SimpleNamespace(temperature=2.0, dtype=dtype, kernel=False)
    episodes = [
        an_episode([0, 1, 1, 2, 3, 1], [0, 0, 1, 1, 0, 1], 1, [3, 3]),
        an_episode([2, 2, 3], [0, 0, 1], 1, []),
    ]
    logprobs, entropy = sdar.response_logprobs(model, episodes, config, with_skill)
    return {"logprobs": logprobs, "entropy": entropy, "halved": torch.tensor([float(model.halved)])}


def gated_terms(log_probs, entropy, completion, tools, teacher, *old, gate="gap", beta=5.0):
    inputs = {"completion_mask": completion, "tool_mask": tools}
    inputs |= {"sampling_per_token_logps": teacher}
    if old:
        inputs["old_per_token_logps"] = old[0]
    output = SimpleNamespace(log_probs=log_probs, entropy=entropy)
    config = SimpleNamespace(gate=gate, gate_beta=beta)
    return place_of("gated_terms").gated_terms(output, inputs, config)


AS_NUMBERS = {
    "view": view,
    "response_logprobs": response_logprobs,
    "gated_terms": gated_terms,
}

# --- Skills: what any right draw has -----------------------------------------------------

ROWS = [
    dict(name="mug", text="m", task_types=["put", "heat"], keywords=["mug"]),
    dict(name="hat", text="h", keywords=["hat"]),
    dict(name="all", text="a"),
    dict(name="cup", text="c", task_types=["cool"], keywords=["cup"]),
    dict(name="hot", text="o", task_types=["heat"], keywords=["mug"]),
    dict(name="lamp", text="l", task_types=["look"]),
]


def check_skills():
    def names(strategy, seed=0, rows=ROWS, arms=(), task="put that mug in drawer 1", bank=None):
        bank = bank or envs.SkillBank(rows, strategy)
        bank.arms = dict(arms)
        order = [*bank.skills]
        with meaning(f"{strategy}: it stops, with {len(rows)} skills"):
            skills = bank.retrieve(task, "put", seed)
        assert isinstance(skills, (list, tuple)), "a list: it is read several times, and in order"
        assert bank.skills == order, f"{strategy}: the bank itself is shuffled or cut; copy it"
        known = all(skill in order for skill in skills)
        assert known, f"{strategy}: skills of the bank, not their texts or names"
        return [skill.name for skill in skills]

    found = names("keyword")
    assert "hot" not in found, (
        "keyword: a skill of another task type does not fit, whatever it says"
    )
    meant = "keyword: a whole word must fit ('hat' is in 'that'), and what has no condition always"
    assert found == ["mug", "all"], meant
    bank = envs.SkillBank(ROWS, "keyword")
    meant = "keyword: another task has other skills, and nothing is kept of the one before"
    tasks = ("put that mug in drawer 1", "put a hat in drawer 1")
    assert [names("", task=task, bank=bank)[0] for task in tasks] == ["mug", "hat"], meant
    assert names("full") == [row["name"] for row in ROWS], "full is the bank, in its order"

    choices = [[names("random", seed) for seed in range(30)] for _ in range(2)]
    meant = "one seed, one choice: the episodes of a group read the same skills"
    assert choices[0] == choices[1], meant
    assert len({*map(str, choices[0])}) > 1, "random: another seed, another choice"
    meant = "random: as many as keyword finds, each once"
    assert all(len({*choice}) == len(choice) == 2 for choice in choices[0]), meant
    assert len({*sum(choices[0], [])}) == 6, "random: of the whole bank, not of what fits alone"
    alone = names("random", rows=ROWS[1:2] + ROWS[3:])
    assert len(alone) == 1, "random: exactly one where nothing fits, and not all or none"

    arms = {"mug found": [5, 5.0], "all found": [5, -5.0], "hat not found": [5, 5.0]}
    best = names("ucb", rows=[*ROWS[:3], ROWS[5]], arms=arms)
    meant = "ucb: the three of largest index: one never tried, then those that were worth something"
    assert best[:1] == ["lamp"] and sorted(best) == ["hat", "lamp", "mug"], meant
    orders = {str(names("ucb", seed)) for seed in range(9)}
    assert len(orders) > 1, "ucb: ties are broken differently with each seed: shuffle a copy"


ELSEWHERE = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
from envs import SkillBank
retrieve = runpy.run_path(sys.argv[2])["retrieve"]
bank = SkillBank([dict(name=c, text=c, keywords=[c]) for c in "abcdefghij"], sys.argv[3])
print([[skill.name for skill in retrieve(bank, "a b", "c", seed)] for seed in range(9)])
"""


def check_processes(path):
    """AssertionError unless another process retrieves the same skills."""
    for strategy in ("random", "ucb"):
        said = set()
        for number in "12":
            command = [sys.executable, "-c", ELSEWHERE, HERE.parents[1], path, strategy]
            env = {**os.environ, "PYTHONHASHSEED": number}
            said.add(subprocess.run(command, env=env, capture_output=True, check=True).stdout)
        meant = (
            "a resumed run reads other skills: hash(), and a set's order, change with the process"
        )
        assert len(said) == 1, f"{strategy}: {meant}"


if __name__ == "__main__":
    main(*sys.argv[1:])
