"""Questions, skills and passages: what is converted and served. The page's memory."""

import json
from urllib.request import urlopen

import search_server
from conftest import DATA, LAB, call
from pytest import approx, importorskip, mark, raises

import envs

ROWS = DATA / "public_rows.jsonl"


def test_rows_of_the_public_data_sets_become_questions(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert call("convert", "questions", ROWS, out) == 0
    assert capsys.readouterr().out == "5 of 8 lines are rows with a question and an answer\n"
    assert out.read_text().endswith("}\n")  # files are joined
    world = envs.make_env("search", data=out)
    assert [*world.goals] == ["test_0", "nq/test_0", "hotpotqa/0", "popqa/4", "7"]
    assert world.tasks("test") == ["nq/test_0", "hotpotqa/0"]
    assert all(goal[3] == ["a"] for goal in world.goals.values())


TWO_SETS = """
[
  {"question": "q", "golden_answers": ["a"], "id": "x", "env_kwargs": null},
  {"question": null, "golden_answers": ["a"], "id": null, "env_kwargs": {"question": "q"}}
]
"""


def test_parquet_is_read_like_json_lines(tmp_path):
    """Two data sets, one schema: a field of the one is None in the rows of the other."""
    parquet = importorskip("pyarrow.parquet")
    from pyarrow import Table

    file = tmp_path / "rows.parquet"
    out = tmp_path / "out.jsonl"
    parquet.write_table(Table.from_pylist(json.loads(TWO_SETS)), file)
    assert call("convert", "questions", file, out) == 0
    assert [*envs.make_env("search", data=out).goals] == ["x", "2"]


@mark.parametrize("env", ["alfworld", "webshop"])
def test_official_skills_are_a_bank(env, tmp_path):
    out = tmp_path / "skills.json"
    official = DATA / "official_skills"
    assert call("convert", "skills", official / "skill_mapping.json", out, "--env", env) == 0
    assert envs.load_skills(out) == json.loads((official / f"{env}.json").read_text())


def test_the_server_answers_and_survives_bad_requests(server):
    for body in (b"", b"[]", b"{}", b'{"query": 1}', b'{"query": "a", "topk": "x"}'):
        with raises(OSError):
            urlopen(server, body, timeout=5)
    with urlopen(server, b'{"query": "river Velden", "topk": 1}', timeout=5) as answer:
        ((hit,),) = json.load(answer)["result"]
    assert hit["document"]["id"] == 2
    found = envs.ask(server, "river Velden", "zzz")
    assert [*map(len, found.values())] == [2, 0]


def test_bm25_by_hand(tmp_path):
    """idf is ln(1 + 1.5 / 2.5) = .470; it times n / (n + .9 (.6 + .4 length / mean length))."""
    file = tmp_path / "corpus.jsonl"
    file.write_text('{"contents": "a a b"}\n{"contents": "a"}\n{"contents": "c c c c"}')
    hits = search_server.Index(file).find("a zzz", 3)
    assert [hit["document"]["contents"] for hit in hits] == ["a a b", "a"]
    assert [hit["score"] for hit in hits] == approx([0.470004 * 2 / 2.945, 0.470004 / 1.675])


def test_the_page_has_the_memory_that_is_counted(capsys):
    assert call("memory", "--preset", "small") == 0
    page = (LAB / "MODELS.md").read_text("utf-8")
    for line in capsys.readouterr().out.splitlines()[1:]:
        assert f"| {' | '.join(line.split())} |" in page
