"""What the tests of .lab share: where everything is, the fixtures of test_sdar.py, calls of a
script, and one search server for all."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

from pytest import fixture

LAB = Path(__file__).resolve().parents[1]
ROOT = LAB.parent
for folder in "tests trl kernel course experiments . ..".split():
    sys.path.insert(0, str((LAB / folder).resolve()))

import sdar
import test_sdar

test_sdar.TURNS = 0  # small runs play whole episodes here

from test_sdar import DATA, checkpoint, hub, policy, tiny

FEW = "--steps 1 --tasks-per-step 2 --group-size 2 --eval-episodes 6 --max-turns 2".split()
QUESTIONS = DATA / "questions.jsonl"


def call(script, *words):
    """The exit code of a script of .lab, by its module's name."""
    return sdar.run(import_module(script).main, [str(word) for word in words])


def refused(capsys, script, *words):
    """The one line with which a script refuses a command line."""
    capsys.readouterr()
    code = call(script, *words)
    said = capsys.readouterr().err.splitlines()
    assert (code, len(said)) == (2, 1)
    return said[0]


@fixture(scope="session")
def server():
    """Address of the bundled search server, over real HTTP."""
    command = [sys.executable, LAB / "search_server.py", DATA / "corpus.jsonl", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process.stdout.readline().split()[-1]
        process.kill()
