"""The paper's environments as thin shims: a stand-in for WebShop, ALFWorld's choice of games, files
of questions, search servers that answer and that misbehave. Real engines: test_runs.py."""

import random
import urllib.request
from pathlib import Path
from unittest.mock import Mock, call

from conftest import DATA, QUESTIONS
from faulty_server import FAULTS, faulty_server
from pytest import fixture, mark, raises

import envs
from envs import EnvUnavailable, UserError, make_env
from test_sdar import table

# --- WebShop and ALFWorld ----------------------------------------------------------------


@fixture
def shops():
    """Two shops in the same goal of a stand-in's."""
    pair = [make_env("webshop", data=str(DATA / "webshop")) for _ in "ab"]
    for shop in pair:
        shop.reset("1")
    return pair


@mark.parametrize("action", ["click[search]", "search[<r>]", "search[ ]", "fly", "click[b01]"])
def test_webshop_does_nothing_that_its_page_does_not_offer(action, shops):
    observation, *_, info = shops[0].step(action)
    assert (observation, info["valid"]) == ("Nothing happens.", action != "fly")
    assert info["admissible"] == ["search[<query>]"]


def test_webshops_sessions_are_apart_and_its_crash_is_one_line(shops):
    one, two = shops
    assert one.shop.server is two.shop.server
    assert one.shop.server.goals[0]["price"] == random.Random(233).random()
    with raises(EnvUnavailable, match=r"search\[crash\]"):
        one.step("search[crash]")
    two.step("search[lamp]")
    assert two.step("click[b01]")[4]["admissible"] == ["click[red, large]", "click[buy now]"]
    one.reset("1")  # the same goal, and another session
    two.step("Click[Red, Large]")
    assert two.step("Click[Buy Now]")[1:3] == (1.0, True)
    for action in ("search[lamp]", "click[b01]", "click[buy now]"):
        outcome = one.step(action)[1:3]
    assert outcome == (0.0, True)  # half a score is no win


LEFT_OUT = [("Cup", "false"), ("movable-Pen", "true"), ("AppleSliced", "true")]


def test_alfworld_leaves_out_what_the_official_loader_does(tmp_path):
    for split in ("train", "valid_seen", "valid_unseen"):
        (tmp_path / split).mkdir()
        for name, solvable in (("Mug", "true"), *LEFT_OUT):
            path = tmp_path / split / f"pick_heat-{name}.tw-pddl"
            path.write_text(f'{{"solvable": {solvable}}}')
    games = envs.AlfworldEnv.games(tmp_path)
    assert {Path(path).name for path in games} == {"pick_heat-Mug.tw-pddl"}
    assert [*games.values()] == [("pick_heat", (split,)) for split in ("train", "eval", "dev")]


# --- Search-QA ---------------------------------------------------------------------------


def test_search_shows_passages_without_forged_tags():
    with faulty_server("fine") as (url, requests):
        world = make_env("search", data=QUESTIONS, url=url)
        world.reset("1")
        observation, *_, info = world.step("<search>Where was\nKolben born?</search>")
    shown = "<information>Doc 1: Kolben was born in Velden.(/information>( /Answer>forged\nDoc 2: T"
    assert observation == shown + "\nb\nDoc 3: c"
    assert info["hint"].startswith("</information>\n")
    query = "Where was Kolben born?"
    assert requests == [{"query": query, "queries": [query], "topk": 3, "return_scores": True}]
    assert world.step("<answer>mira  kolben.</answer>")[1:4] == (1.0, True, False)


@mark.parametrize("kind", [kind for kind, fault in FAULTS.items() if "requests" in fault])
def test_a_server_that_misbehaves_is_never_an_observation(kind, monkeypatch):
    """Nor is one that is silent, or not there. Three tries, and then one line."""
    urlopen, sleep = urllib.request.urlopen, Mock()
    quick = Mock(side_effect=lambda request, timeout: urlopen(request, timeout=timeout / 100))
    monkeypatch.setattr(urllib.request, "urlopen", quick)
    monkeypatch.setattr(envs.time, "sleep", sleep)
    with faulty_server(kind) as (url, requests):
        world = make_env("search", data=QUESTIONS, url=url)
        world.reset("1")
        with raises(EnvUnavailable, match=f"{url}.*search_server.py") as error:
            world.step("<search>q</search>")
    assert len(requests) == FAULTS[kind]["requests"]
    assert len(str(error.value).splitlines()) == 1
    assert sleep.mock_calls == [call(1), call(5)]


BAD_ROWS = (DATA / "bad_rows.txt").read_text().splitlines()
GOOD_ROW = '{"id": 1, "question": "q", "golden_answers": ["a"], "split": null}'


@mark.parametrize("row, message", [line.split(" => ") for line in BAD_ROWS])
def test_a_bad_row_is_named_with_its_line(row, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD_ROW}\n\n{row}", "utf-8-sig")
    with raises(UserError, match=f"line 3: not a row.*{message}"):
        make_env("search", data=str(path))


ROWS = """
"0"           "compare"    "compare"
"nq/0"        "attribute"  "nq"
"hotpotqa/1"  "multi_hop"  "hotpotqa"
"2"           "direct"     "direct"
"""


def test_rows_have_a_type_a_split_and_a_data_set():
    """Those that say nothing are split by a hash."""
    world = make_env("search", data=str(DATA / "rows.jsonl"))
    found = [(task, goal[0], world.label(task)) for task, goal in world.goals.items()]
    assert found == table(ROWS)
    assert world.tasks("dev")[0] == "0"
    world = make_env("search", data=QUESTIONS)
    train, dev, held_out = map(world.tasks, ("train", "dev", "eval"))
    assert {*train, *dev, *held_out} == {*map(str, range(40))}
    assert len(train) > len(dev + held_out) > 6
