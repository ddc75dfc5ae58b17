"""The queries of a turn: one request where the server takes a list, else a few at once."""

import io
import json
import time
import urllib.request
from functools import partial

from conftest import QUESTIONS
from pytest import fixture

import envs


@fixture(params=[None, 1])
def server(request, monkeypatch):
    """In the place of urlopen: answers all queries of a request, or the first one alone. The object
    has the requests that came, and the most at once."""

    def urlopen(request_, timeout):
        queries = json.loads(request_.data)["queries"]
        urlopen.requests.append((queries, timeout))
        urlopen.now += 1
        urlopen.most = max(urlopen.most, urlopen.now)
        time.sleep(0.01)
        urlopen.now -= 1
        rows = [[{"contents": f"of {query}"}] for query in queries]
        return io.StringIO(json.dumps({"result": rows[: request.param]}))

    urlopen.requests, urlopen.now, urlopen.most, urlopen.lists = [], 0, 0, not request.param
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return urlopen


def test_a_turns_queries_go_together_where_the_server_takes_a_list(server):
    actions = ["<search>a</search>", "<answer>x</answer>", "", "<search>b c</search>"]
    worlds = [envs.make_env("search", data=QUESTIONS, max_turns=2) for _ in actions]
    for world in worlds:
        world.reset("1")
    results = worlds[0].step_all(worlds, actions)
    said = [observation.split(": ")[-1] for observation, *_ in results]
    assert said == ["of a", "", "Nothing happens.", "of b c"]
    first, *rest = server.requests
    assert first == (["a", "b c"], 40)  # twenty seconds, and ten for each
    assert sorted(rest) == ([] if server.lists else [(["a"], 30), (["b c"], 30)])
    worlds[0].step_all(worlds[:1], actions[:1])  # at the last turn nothing is asked
    assert len(server.requests) == 1 + len(rest)


def test_a_few_ask_at_once_and_no_clock_runs_for_who_waits(server):
    calls = [partial(envs.ask, "http://x", f"q{i}") for i in range(30)]
    assert envs.call_all(calls, in_threads=True) == [{f"q{i}": [f"of q{i}"]} for i in range(30)]
    assert 1 < server.most <= 4
