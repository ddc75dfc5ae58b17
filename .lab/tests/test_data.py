"""Questions, skills and passages: what is converted, served and played in a terminal."""

import http.client
import io
import json
import sys

import player
import search_server
from conftest import DATA, QUESTIONS, call, refused
from pytest import approx, importorskip, mark

import envs
from test_sdar import table

# --- What is converted -------------------------------------------------------------------


def test_rows_of_the_public_data_sets_become_questions(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert call("convert", "questions", DATA / "public_rows.jsonl", out) == 0
    assert capsys.readouterr().out == "4 of 6 rows have a question and an answer\n"
    world = envs.make_env("search", data=str(out))
    assert [*world.goals] == ["test_0", "nq/test_0", "hotpotqa/0", "popqa/4"]
    assert world.tasks("test") == ["nq/test_0", "hotpotqa/0"]
    assert [world.label(task) for task in world.goals][1:] == ["nq", "hotpotqa", "popqa"]
    assert all(goal[3] == ["a"] for goal in world.goals.values())


def test_parquet_is_read_like_json_lines(tmp_path, monkeypatch, capsys):
    """Two data sets, one schema: a field of the one is None in the rows of the other."""
    parquet = importorskip("pyarrow.parquet")
    from pyarrow import Table

    rows = [json.loads(line) for line in open(DATA / "public_rows.jsonl")]
    rows = [rows[0] | {"env_kwargs": None, "metadata": None}, rows[3] | {"id": None}]
    out, words = tmp_path / "out.jsonl", ["convert", "questions", tmp_path / "rows.parquet"]
    parquet.write_table(Table.from_pylist(rows), words[-1])
    assert call(*words, out) == 0
    assert [*envs.make_env("search", data=str(out)).goals] == ["test_0", "popqa/2"]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in refused(capsys, *words, out)


ANSWERS = """
'"a"'                ["a"]
'["a", " ", "b"]'    ["a", "b"]
'"[\\\\"a\\\\", \\\\"b\\\\"]"'  ["a", "b"]
"\\"['a', 'b']\\""   "Expecting value"
'"[\\\\"a\\\\", 3]"'     "no attribute"
'{"a": 1}'           "golden_answers is {'a': 1}"
'["a", 3]'           "no attribute"
"1998"               "golden_answers is 1998"
"""


@mark.parametrize("answers, expected", table(ANSWERS))
@mark.parametrize("form", ['"golden_answers": %s', '"reward_model": {"ground_truth": %s}'])
def test_answers_are_lists_of_texts_or_refused(form, answers, expected, tmp_path, capsys):
    file, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    file.write_text('{"question": "q", %s}' % (form % answers), "utf-8-sig")
    if isinstance(expected, str):
        error = refused(capsys, "convert", "questions", file, out)
        assert f"{file}, line 1: not a row of questions" in error
        assert expected in error
    else:
        call("convert", "questions", file, out)
        assert json.loads(out.read_text())["golden_answers"] == expected


@mark.parametrize("line", [b'["id"]', b"null", b"{", b"\xff", b'{"question": 3}', b"[" * 10**5])
def test_a_line_that_is_no_row_is_named(line, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"question": "q", "golden_answers": "a", "contents": "c"}\n' + line)
    for words in (["convert", "questions", file, tmp_path / "out"], ["search_server", file]):
        assert f"{file}, line 2: not a row" in refused(capsys, *words)


@mark.parametrize("env", ["alfworld", "webshop"])
def test_official_skills_are_a_bank(env, tmp_path):
    out, official = tmp_path / "skills.json", DATA / "official_skills"
    assert call("convert", "skills", official / "skill_mapping.json", out, "--env", env) == 0
    assert json.loads(out.read_text()) == json.loads((official / f"{env}.json").read_text())
    bank = envs.SkillBank(envs.load_skills(out))
    read = bank.retrieve("put two mugs in a cupboard", "pick_two", 0)
    assert [skill.name for skill in read] == ["general_skills", "pick"]


# --- The search server -------------------------------------------------------------------


def post(url, body):
    """(status, answer) of a body, bytes or what becomes JSON."""
    connection = http.client.HTTPConnection(url.split("/")[2], timeout=5)
    data = body if isinstance(body, bytes) else json.dumps(body)
    connection.request("POST", "/retrieve", data)
    with connection.getresponse() as answer:
        return answer.status, json.load(answer)


def test_the_server_speaks_both_dialects(server):
    plain = post(server, {"query": "river Velden", "topk": 1})
    assert plain == (200, {"result": [[{"id": 2, "contents": "Velden lies on the river Arn."}]]})
    body = {"queries": ["river Velden", "zzz"], "return_scores": True}
    hits, none = post(server, body)[1]["result"]
    assert [hit["document"]["id"] for hit in hits] == [2, 1]
    assert hits[0]["score"] > hits[1]["score"] > 0
    assert none == []
    found = envs.ask(server, "river Velden", "zzz")
    assert [*map(len, found.values())] == [2, 0]


BODIES = [b"", b"{", b"[]", b"\xff", b"[" * 10**5, {}, {"query": 1}, {"queries": "ab"}]
BODIES += [{"queries": [None]}, {"query": "a", "topk": -1}, {"query": "a", "topk": "x"}]


@mark.parametrize("body", BODIES, ids=lambda body: str(body)[:20])
def test_the_server_survives_a_bad_request(body, server):
    assert post(server, body)[0] == 422
    assert post(server, {"query": "arn"})[0] == 200


def test_bm25_by_hand(tmp_path):
    """idf is ln(1 + 1.5 / 2.5) = .470; it times n / (n + .9 (.6 + .4 length / mean length))."""
    file = tmp_path / "corpus.jsonl"
    file.write_text('{"contents": "a a b"}\n{"contents": "a"}\n{"contents": "c c c c"}')
    hits = search_server.Index(file).find("a zzz", 3)
    assert [hit["document"]["contents"] for hit in hits] == ["a a b", "a"]
    assert [hit["score"] for hit in hits] == approx([0.470004 * 2 / 2.945, 0.470004 / 1.675])


# --- A person in the terminal ------------------------------------------------------------

WINNERS = json.loads((DATA / "winners.json").read_text())


@mark.parametrize("name", ["toy", "search"])
def test_a_person_wins_in_the_terminal(name, server, monkeypatch, capsys):
    task, actions = WINNERS[name]
    keys = "\n".join(["nonsense words", *actions])
    monkeypatch.setattr(sys, "stdin", io.StringIO(keys))
    data = ["--data", QUESTIONS, "--url", server] if name == "search" else ["--skill"]
    assert call("player", name, "--task", task, *data) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("\nwon\n")
    assert printed.count("(an invalid action)") == 1
    assert "Turn 2 of" in printed
    assert name == "search" or "Skill: The" in printed


def test_a_terminal_is_told_nothing_to_obey():
    assert player.harmless("a\x1b[31m\r\nb\x07é") == "a\ufffd[31m\ufffd\nb\ufffdé"
