"""Whole runs, where it takes longer: killed at any moment, on every environment, with engines and
servers that die, and on input drawn at random."""

import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from itertools import count
from multiprocessing import get_context
from pkgutil import resolve_name
from types import ModuleType

import pytest
from alfworld_games import GOALS, write_games
from conftest import DATA, FEW, HERE, QUESTIONS, start_server
from pytest import fixture, mark, raises

import envs
import sdar
from envs import EnvUnavailable, make_env
from test_sdar import lines, own, small, trained

# --- Kills -------------------------------------------------------------------------------


def train_until(config, name):
    """In a process: train, and be killed as soon as the first call of a function is done."""
    place, _, attribute = name.rpartition(".")
    owner = resolve_name(place)
    function = getattr(owner, attribute)

    def last(*args, **more):
        function(*args, **more)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, attribute, last)
    sdar.train(config)


def start_process(function, *args):
    """A process that has imported what takes long."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["sdar", "transformers"])
    process = context.Process(target=function, args=args)
    process.start()
    return process


def result(folder):
    """The metrics of a run, and the bytes of its weights."""
    return lines(folder), (folder / "checkpoint" / "model.safetensors").read_bytes()


KILLED = {"steps": 2, "save_every": 1, "eval_every": 0, "max_turns": 4, "retrieval": "ucb"}
MOMENTS = """sdar.evaluate sdar.log_step transformers.PreTrainedModel.save_pretrained torch.save
    os.replace sdar.log_step"""


@fixture(scope="module")
def whole(tmp_path_factory):
    """Of a run that nobody kills: (its result, seconds that it takes in a process)."""
    folder, begun = tmp_path_factory.mktemp("whole"), time.monotonic()
    start_process(sdar.train, small(folder, **KILLED)).join()
    return result(folder / "run"), time.monotonic() - begun


def test_killed_after_any_write_a_run_resumes_exactly(whole, tmp_path):
    """One run that gets further each time. At its end a checkpoint is whole."""
    config = small(tmp_path, resume=True, **KILLED)
    for name in MOMENTS.split():
        process = start_process(train_until, config, name)
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"not killed after {name}"
    trained(tmp_path, resume=True, **KILLED)
    assert result(tmp_path / "run") == whole[0]


def test_killed_at_any_moment_a_run_resumes_exactly(whole, tmp_path):
    """SIGKILL at random moments, in as many runs as SDAR_FAULTS says."""
    rng = random.Random(7)
    for number in range(int(os.environ.get("SDAR_FAULTS", 3))):
        process = start_process(sdar.train, small(tmp_path, str(number), **KILLED))
        process.join(rng.uniform(0, whole[1]))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode:  # it was not done
            trained(tmp_path, str(number), resume=True, **KILLED)
        assert result(tmp_path / str(number)) == whole[0]


# --- Every environment -------------------------------------------------------------------


@fixture(scope="session")
def games(tmp_path_factory):
    """A folder with a hand-written ALFWorld game of each type, and {game: actions that win}."""
    if not find_spec("alfworld"):
        pytest.skip("pip install alfworld: without it ALFWorld's games cannot be played")
    folder = tmp_path_factory.mktemp("games")
    return str(folder), write_games(folder)


@fixture(params=["alfworld", "webshop", "search"])
def engine(request):
    """(name, options, a task, actions that win it) of an environment."""
    name = request.param
    if name == "alfworld":
        folder, plans = request.getfixturevalue("games")
        return name, {"data": folder}, *next(iter(plans.items()))
    options = {"data": str(DATA / "webshop")}
    if name == "search":
        options = {"data": QUESTIONS, "url": request.getfixturevalue("server")}
    return name, options, *json.loads((DATA / "winners.json").read_text())[name]


def test_an_episode_is_won_twice_alike_beside_another(engine):
    name, options, task, actions = engine
    one, two = make_env(name, **options), make_env(name, **options)
    logs = []
    for _ in "ab":  # beside an environment that does something else in the same task
        log = [one.reset(task, 5)]
        assert two.reset(task, 5) == log[0]
        for action in actions:
            log.append(one.step(action))
            two.step("look")
        logs.append(log)
    assert logs[0] == logs[1]
    outcomes = [step[1:4] for step in log[1:]]
    assert outcomes == [(0.0, False, False)] * (len(actions) - 1) + [(1.0, True, False)]
    assert log[-1][4]["won"] is True
    assert log[0][1]["task"] in log[0][0]


def test_two_steps_of_training(engine, tmp_path):
    name, options, _, _ = engine
    flags = {"env": name, "env_data": options["data"], "search_url": options.get("url", "")}
    rows = trained(tmp_path, max_turns=3, group_size=2, eval_episodes=2, **flags)[1]
    assert [row["step"] for row in rows if math.isfinite(row["loss"])] == [1, 2]


# --- ALFWorld: many games at once, and what kills or stops one ------------------------------


def test_alfworld_plays_in_parallel(games):
    folder, plans = games

    def play(task):
        world = make_env("alfworld", data=folder)
        kind = world.reset(task)[1]["task_type"]
        return kind, [world.step(action.title())[1] for action in plans[task]]

    played = envs.call_all([partial(play, task) for task in plans], in_threads=True)
    rewards = [[0.0] * (len(actions) - 1) + [1.0] for actions in plans.values()]
    assert played == [*zip(GOALS, rewards)]


@mark.parametrize("text", ["not json", "{}"])
def test_alfworld_names_a_broken_game(text, games, tmp_path):
    (tmp_path / "broken.tw-pddl").write_text(text)
    with raises(EnvUnavailable, match="broken.tw-pddl"):
        make_env("alfworld", data=str(tmp_path)).reset("broken.tw-pddl")


class Game:
    """A stand-in for ALFWorld's games, of which one dies and one hangs."""

    def __init__(self, path, infos, wrappers):
        pass

    def reset(self):
        text = "-= Welcome =-\n\nYou are here. Your task is to: wait"
        commands = ["wait", "die", "hang", "help"]
        return {"feedback": text, "won": False, "admissible_commands": commands}

    def step(self, action):
        if action == "die":
            os._exit(1)
        if action == "hang":
            time.sleep(60)
        return {"feedback": action, "won": False, "admissible_commands": ["wait"]}, 0, False


@fixture
def stand_in(tmp_path, monkeypatch):
    """A folder with such a game. Its processes wait for one second where they wait for 120."""
    for name in ("textworld", "alfworld", "alfworld.agents.environment.alfred_tw_env"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.EnvInfos, module.start, module.AlfredDemangler = dict, Game, None
        monkeypatch.setitem(sys.modules, name, module)
    alarm = signal.alarm
    monkeypatch.setattr(signal, "alarm", lambda seconds: alarm(min(seconds, 1)))
    (tmp_path / "games").mkdir()
    (tmp_path / "games" / "pick_one.tw-pddl").write_text("{}")
    envs.game_process.cache_clear()  # processes that are forked now have all that
    yield str(tmp_path / "games")
    envs.game_process.cache_clear()


@mark.parametrize("action", ["die", "hang"])
def test_a_game_that_dies_or_hangs_is_named(action, stand_in):
    one, two = (make_env("alfworld", data=stand_in) for _ in "ab")
    for world in (one, two):
        assert world.reset("pick_one.tw-pddl")[0] == "You are here. Your task is to: wait"
    with raises(EnvUnavailable, match="ALFWorld failed at .*pick_one.tw-pddl, or was silent"):
        one.step(action)
    if envs.CORES > 1:
        assert two.step("wait")[0] == "wait"  # another process


# --- What fails ends the run with one line, and --resume has the same outcome ----------------


def check_failure(tmp_path, capsys, flags, kill, word, restarted):
    """A run whose engine is killed in step 2 ends with one line that holds a word. Resumed with
    the flags `restarted` it becomes what it had been."""
    flags |= {"max_turns": 3, "steps": 3, "save_every": 1}
    whole = trained(tmp_path, "whole", **flags | restarted)[1]
    calls = count(1)

    def step_batch(*args):
        batch = sdar.step_batch(*args)
        if next(calls) == 2:
            kill()
        return batch

    capsys.readouterr()
    assert sdar.run(partial(sdar.train, small(tmp_path, **flags), step_batch)) == 2
    said = re.sub(r"\r[^\r\n]*", "", capsys.readouterr().err).strip()  # without bars
    assert "\n" not in said
    assert word in said
    envs.game_process.cache_clear()  # another day, other processes
    assert trained(tmp_path, resume=True, **flags | restarted)[1] == whole


def test_a_run_whose_game_process_dies_resumes_exactly(stand_in, tmp_path, capsys):
    def kill():
        process = envs.game_process(0).submit(os.getpid).result()
        os.kill(process, signal.SIGKILL)

    flags = {"env": "alfworld", "env_data": stand_in}
    check_failure(tmp_path, capsys, flags, kill, "ALFWorld failed", {})


def test_a_run_whose_search_server_dies_resumes_at_another(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(envs.SearchEnv, "parse", lambda self, text: ("<search>Arn</search>", True))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    process, url = start_server()

    def kill():
        process.kill()
        process.wait()

    flags = {"env": "search", "env_data": QUESTIONS, "search_url": url}
    check_failure(tmp_path, capsys, flags, kill, url, {"search_url": server})


# --- Anything ----------------------------------------------------------------------------


def test_fuzz():
    """SDAR_FUZZ=500 python -m pytest -k fuzz tries so many."""
    command = [sys.executable, HERE / "fuzz.py", os.environ.get("SDAR_FUZZ", "28")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "LOAD REPORT" not in done.stderr  # transformers' table of tensors
    assert done.stdout.splitlines()[-1:] == ["0 wrong"], done.stdout


def test_what_a_terminal_cannot_show_ends_no_run(own, monkeypatch):
    """Half a character, a NUL, control tokens, a folder that has a name; on a terminal that knows
    ASCII alone. The second time the run is there already."""
    for code in (0, 2):
        terminal = io.TextIOWrapper(io.BytesIO(), "ascii", errors="backslashreplace")
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
        assert sdar.main(["--env", "num:Num", "--out", "r\u00fcn", *FEW]) == code
    assert len(lines("r\u00fcn")) == 1
