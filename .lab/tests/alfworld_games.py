"""Six small ALFWorld games, one of each task type, to play without the data set.

    python .lab/tests/alfworld_games.py games             # writes them into the folder games
    python .lab/player.py alfworld --data games

They need the package (pip install alfworld), not its download: the engine, its rules and its words
are ALFWorld's, the kitchen is hand-written: .assets/test/kitchen.pddl, in which GOAL stands for a
goal of goals.json, in the names that ALFWorld's demangler expects.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

KITCHEN = Path(__file__).resolve().parents[2] / ".assets" / "test"


def write_games(folder):
    """Write the games into a folder. Returns {name of its file: actions that win}."""
    data = Path(find_spec("alfworld").origin).parent / "data"
    game = {"solvable": True, "pddl_domain": (data / "alfred.pddl").read_text()}
    grammar = (data / "alfred.twl2").read_text()
    problem = (KITCHEN / "kitchen.pddl").read_text()
    Path(folder).mkdir(exist_ok=True)
    plans = {}
    for kind, (text, goal, plan) in json.loads((KITCHEN / "goals.json").read_text()).items():
        game["pddl_problem"] = problem.replace("GOAL", goal)
        game["grammar"] = grammar.replace("UNKNOWN GOAL", text)
        name = f"{kind}-Kitchen.tw-pddl"
        Path(folder, name).write_text(json.dumps(game))
        plans[name] = plan
    return plans


if __name__ == "__main__":
    print(*write_games(sys.argv[1]), sep="\n")
