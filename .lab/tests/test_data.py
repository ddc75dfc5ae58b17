"""Questions, skills and passages: what is converted, served and played in a terminal."""

import http.client
import io
import json
import subprocess
import sys
from functools import partial

import convert
import player
import search_server
from conftest import LAB
from pytest import approx, fixture, importorskip, mark

import envs
import sdar
from test_sdar import DATA, table


@fixture
def command(monkeypatch, capsys):
    """A script, its arguments, what is typed -> (exit code, stdout, stderr)."""

    def run(script, argv, keys=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(keys))
        code = sdar.run(partial(script.main, [str(word) for word in argv]))
        return code, *capsys.readouterr()

    return run


def refused(result, *messages):
    """Bad input: exit code 2, and one line that says these things."""
    code, _, error = result
    assert (code, error.count("\n")) == (2, 1)
    assert not [message for message in messages if message not in error], error


# --- Question files ----------------------------------------------------------------------


def test_rows_of_the_public_data_sets_become_questions(command, tmp_path):
    out = tmp_path / "out.jsonl"
    code, printed, _ = command(convert, ["questions", DATA / "public_rows.jsonl", out])
    assert (code, printed) == (0, "4 of 6 rows have a question and an answer\n")
    world = envs.make_env("search", data=str(out))
    assert [*world.goals] == ["test_0", "nq/test_0", "hotpotqa/0", "popqa/4"]
    assert world.tasks("test") == ["nq/test_0", "hotpotqa/0"]
    assert [world.label(task) for task in world.goals][1:] == ["nq", "hotpotqa", "popqa"]
    assert all(goal[3] == ["a"] for goal in world.goals.values())


def test_parquet_is_read_like_json_lines(command, tmp_path, monkeypatch):
    parquet = importorskip("pyarrow.parquet")
    from pyarrow import Table

    # Two data sets, one schema: a field of the one is None in the rows of the other.
    kwargs = {"question": "r", "ground_truth": {"target": ["b"]}, "data_source": "nq"}
    columns = {"id": ["x", None], "question": ["q", None], "golden_answers": [["a"], None]}
    table = Table.from_pydict(columns | {"env_kwargs": [None, kwargs]})
    argv = ["questions", tmp_path / "rows.parquet", tmp_path / "out.jsonl"]
    parquet.write_table(table, argv[1])
    assert command(convert, argv)[0] == 0
    goals = envs.make_env("search", data=str(argv[2])).goals
    assert {name: goal[2:4] for name, goal in goals.items()} == {
        "x": ("q", ["a"]),
        "nq/2": ("r", ["b"]),
    }

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(command(convert, argv), "pip install pyarrow")


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
def test_answers_are_lists_of_texts_or_refused(form, answers, expected, command, tmp_path):
    file, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    file.write_text('{"question": "q", %s}' % (form % answers), "utf-8-sig")
    result = command(convert, ["questions", file, out])
    if isinstance(expected, str):
        refused(result, f"{file}, line 1: not a row of questions", expected)
    else:
        assert json.loads(out.read_text())["golden_answers"] == expected


@mark.parametrize("line", [b'["id"]', b"null", b"{", b"\xff", b'{"question": 3}', b"[" * 10**5])
def test_a_line_that_is_no_row_is_named(line, command, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"question": "q", "golden_answers": "a"}\n' + line)
    result = command(convert, ["questions", file, tmp_path / "out.jsonl"])
    refused(result, f"{file}, line 2")


def test_a_file_that_is_not_there_is_one_line(command, tmp_path):
    for kind in ("questions", "skills"):
        refused(command(convert, [kind, tmp_path / "no", tmp_path / "out"]), f"{tmp_path / 'no'}")


# --- Official skill banks ----------------------------------------------------------------

OFFICIAL = {
    "skill_files": {"general_skills": "g.md", "pick": "p.md", "look": "l.md", "other": "o.md"},
    "task_to_skill": {"pick_and_place": "pick", "pick_two": "pick", "look": "look"},
    "task_keywords": {"pick_and_place": ["put"], "pick_two": ["two"], "look": ["light", "lamp"]},
}


@fixture
def official_bank(tmp_path):
    """A skill_mapping.json with its Markdown files, as in the official repository."""
    for name in "gplo":
        (tmp_path / f"{name}.md").write_text(f"### TASK: {name} ###\n1. Title {name}: look.\n")
    path = tmp_path / "skill_mapping.json"
    path.write_text(json.dumps(OFFICIAL))
    return path


@mark.parametrize(
    "env, pick, look",
    [
        ("alfworld", (["pick_and_place_simple", "pick_two"], ()), (["look"], ())),
        ("webshop", ((), ["put", "two"]), ((), ["light", "lamp"])),
    ],
)
def test_official_skills_are_a_bank(env, pick, look, official_bank, command, tmp_path):
    out = tmp_path / "skills.json"
    assert command(convert, ["skills", official_bank, out, "--env", env])[0] == 0
    bank = envs.SkillBank(envs.load_skills(out))
    found = {skill.name: (skill.task_types, skill.keywords) for skill in bank.skills}
    assert found.pop("general_skills") in (([], ()), ((), []))
    assert found == {"pick": pick, "look": look}
    assert bank.skills[1].text == "1. Title p: look."
    read = bank.retrieve("put two mugs in a cupboard", "pick_two", 0)
    assert [skill.name for skill in read] == ["general_skills", "pick"]


def test_a_missing_skill_file_is_one_line(official_bank, command, tmp_path):
    (tmp_path / "p.md").unlink()
    result = command(convert, ["skills", official_bank, tmp_path / "out"])
    refused(result, f"{official_bank} is no skill_mapping.json", "p.md")


# --- The search server -------------------------------------------------------------------


@fixture(scope="module")
def url():
    """Address of the bundled server, over real HTTP."""
    argv = [sys.executable, LAB / "search_server.py", DATA / "corpus.jsonl", "--port", "0"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        yield process.stdout.readline().split()[-1]
        process.kill()


def post(url, body):
    """(status, answer) of a body, bytes or what becomes JSON."""
    connection = http.client.HTTPConnection(url.split("/")[2], timeout=5)
    data = body if isinstance(body, bytes) else json.dumps(body)
    connection.request("POST", "/retrieve", data)
    with connection.getresponse() as answer:
        return answer.status, json.load(answer)


def test_the_server_speaks_both_dialects(url):
    plain = post(url, {"query": "river Velden", "topk": 1})
    assert plain == (200, {"result": [[{"id": 2, "contents": "Velden lies on the river Arn."}]]})
    body = {"queries": ["river Velden", "zzz"], "return_scores": True}
    hits, none = post(url, body)[1]["result"]
    assert [hit["document"]["id"] for hit in hits] == [2, 1]
    assert hits[0]["score"] > hits[1]["score"] > 0
    assert none == []
    assert envs.ask(url, "river Velden")[0] == "Velden lies on the river Arn."


BODIES = [b"", b"{", b"[]", b"\xff", b"[" * 10**5, {}, {"query": 1}, {"queries": "ab"}]
BODIES += [{"queries": [None]}] + [{"query": "a", "topk": topk} for topk in ("x", -1, 10**9)]


@mark.parametrize("body", BODIES, ids=lambda body: str(body)[:20])
def test_the_server_survives_a_bad_request(body, url):
    assert post(url, body)[0] == 422
    assert post(url, {"query": "arn"})[0] == 200


def test_bm25_by_hand(tmp_path):
    file = tmp_path / "corpus.jsonl"
    texts = ["a a b", "a", "c c c c"]
    file.write_text(
        "".join(json.dumps({"id": i, "contents": t}) + "\n" for i, t in enumerate(texts))
    )
    hits = search_server.Index(file).find("a zzz", 3)
    assert [hit["document"]["id"] for hit in hits] == [0, 1]

    # idf = ln(1 + 1.5 / 2.5) = .470; it times n / (n + .9 (.6 + .4 length / mean length))
    assert [hit["score"] for hit in hits] == approx([0.470004 * 2 / 2.945, 0.470004 / 1.675])


SERVED = """
"{"                     []                    "line 2: not a row"
"[]"                    []                    "line 2: not a row"
'{"contents": 3}'       []                    "line 2: not a row"
'{"contents": "a"}'     ["--port", "70000"]   "--port 70000"
'{"contents": "a"}'     ["--port", "x"]       "invalid int value"
"""


@mark.parametrize("line, more, message", table(SERVED))
def test_the_server_refuses_in_one_line(line, more, message, command, tmp_path):
    file = tmp_path / "corpus.jsonl"
    file.write_text(f'{{"id": 0, "contents": "a"}}\n{line}\n')
    refused(command(search_server, [file, *more]), message)


# --- A person in the terminal ------------------------------------------------------------

WINNERS = json.loads((DATA / "winners.json").read_text())


@mark.parametrize("name", ["toy", "search"])
def test_a_person_wins_in_the_terminal(name, url, command):
    task, actions = WINNERS[name][:2]
    argv = [name, "--task", task]
    if name == "search":
        argv += ["--data", DATA / "questions.jsonl", "--url", url]
    code, printed, _ = command(player, argv, "\n".join(["nonsense words", *actions]))
    assert code == 0
    assert printed.endswith("won\n")
    assert not printed.endswith("not won\n")
    assert printed.count("(an invalid action)") == 1
    assert "Turn 2 of" in printed


COMMANDS = """
"toy"                                0  "Your task is to"
"toy"                                0  "Admissible actions: go to cabinet 1"
"toy --skill"                        0  "Skill: The"
"tpy"                                2  "known are toy, alfworld"
"toy --url x"                        2  "unexpected keyword argument 'url'"
"toy --split tset"                   2  "no tasks in the split 'tset'"
"toy --task x"                       2  "--task x: toy has no such task"
"nowhere:Guess"                      2  "ModuleNotFoundError"
""                                   2  "required"
"toy --fly"                          2  "--fly"
"search"                             2  "no data named"
"search --data /no"                  2  "/no"
"webshop --data /no"                 2  "WebShop"
"""


@mark.parametrize("argv, code, said", table(COMMANDS))
def test_player_command_line(argv, code, said, command):
    result, printed, error = command(player, argv.split(), "go to sofa 1\n")
    assert result == code
    assert said in (error if code else printed)
    assert error.count("\n") == (code == 2)


def test_a_terminal_is_told_nothing_to_obey():
    assert player.harmless("a\x1b[31m\r\nb\x07é") == "a\ufffd[31m\ufffd\nb\ufffdé"
