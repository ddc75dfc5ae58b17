"""The queries of a turn, and servers that are slow or take one query a request."""

import json
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from conftest import QUESTIONS
from pytest import fixture, mark

import envs
from envs import make_env


class Server(ThreadingHTTPServer):
    """Answers a query with its text; reads all queries of a request, or the first one alone."""

    request_queue_size = 128
    takes_lists, seconds = True, 0.0  # to answer a query

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/retrieve"
        self.asked, self.now, self.most = [], 0, 0
        self.serial = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        queries = request["queries"] if server.takes_lists else [request["query"]]
        server.asked.append(queries)
        server.now += 1
        server.most = max(server.most, server.now)
        with server.serial:
            time.sleep(server.seconds * len(queries))
            server.now -= 1
        rows = [[{"document": {"contents": f"of {query}"}}] for query in queries]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"result": rows}).encode())

    def log_message(self, *args):
        """Nothing."""


@fixture
def server():
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.shutdown()


def worlds(server, turns=4):
    """Five environments in the same question."""
    found = [make_env("search", data=QUESTIONS, url=server.url, max_turns=turns) for _ in range(5)]
    for world in found:
        world.reset(world.tasks("train")[0])
    return found


ACTIONS = ["<search>a</search>", "<answer>x</answer>", "", "<search>b c</search>"]
ACTIONS += ["<search>a</search>"]


@mark.parametrize("takes_lists", [True, False])
def test_a_turns_queries_go_together_where_the_server_takes_a_list(takes_lists, server):
    server.takes_lists = takes_lists
    found = worlds(server)
    results = found[0].step_all(found, ACTIONS)
    last_words = [result[0].split(": ")[-1] for result in results]
    assert last_words == ["of a", "", "Nothing happens.", "of b c", "of a"]
    assert [result[2] for result in results] == [False, True, False, False, False]
    assert server.asked[0] == (["a", "b c", "a"] if takes_lists else ["a"])
    rest = [query for queries in server.asked[1:] for query in queries]
    assert sorted(rest) == ([] if takes_lists else ["a", "a", "b c"])
    asked = len(server.asked)
    found[0].step("<search>a</search>")  # one alone, which has been answered
    found[3].step("<search>new</search>")
    found[3].reset(found[3].tasks("train")[0])  # an episode remembers none of another's
    found[3].step("<search>new</search>")
    assert server.asked[asked:] == [["new"], ["new"]]


def test_nothing_is_asked_at_the_last_turn_or_for_answers_alone(server):
    found = worlds(server, turns=1)
    assert {result[0] for result in found[0].step_all(found, [ACTIONS[0]] * 5)} == {""}
    found = worlds(server)
    found[0].step_all(found, ["<answer>x</answer>"] * 5)
    assert server.asked == []


def test_many_never_wait_for_one_another_longer_than_the_limit(server):
    """Who waits for its turn waits here, where no clock runs."""
    server.seconds = 0.02
    calls = [partial(envs.ask, server.url, f"q{i}") for i in range(30)]
    results = envs.call_all(calls, in_threads=True)
    assert results == [{f"q{i}": [f"of q{i}"]} for i in range(30)]
    assert server.most <= 4
