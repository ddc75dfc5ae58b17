"""Six small ALFWorld games, one of each task type, to play without the data set.

    python .lab/tests/alfworld_games.py games             # writes them into the folder games
    python .lab/player.py alfworld --data games

They need the package (pip install alfworld), not its download: the engine, its rules and its words
are ALFWorld's, the kitchen is hand-written (.assets/test/kitchen.pddl, goals.json).
"""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import envs

KITCHEN = envs.HERE / ".assets" / "test"
GOALS = json.loads((KITCHEN / "goals.json").read_text())  # {task type: (sentence, PDDL)}


def write_games(folder):
    """Write the games below a folder. Returns {path below it: actions that win}. UserError without
    ALFWorld's packages."""
    package = find_spec("textworld") and find_spec("alfworld")
    envs.require(package, "pip install alfworld: its engine makes the games")
    os.environ["ALFWORLD_DATA"] = str(folder)  # else importing the package makes one at home
    import textworld
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler

    data = Path(package.origin).parent / "data"
    domain = (data / "alfred.pddl").read_text()
    grammar = (data / "alfred.twl2").read_text()
    problem = (KITCHEN / "kitchen.pddl").read_text().split("\n", 1)[1]
    plans = {}
    for kind, (text, goal) in GOALS.items():
        path = Path(folder, f"{kind}-Kitchen", "game.tw-pddl")
        path.parent.mkdir(parents=True, exist_ok=True)
        game = {"pddl_domain": domain, "pddl_problem": problem.replace("GOAL", goal)}
        game["grammar"] = grammar.replace("UNKNOWN GOAL", text)
        path.write_text(json.dumps(game))
        infos = textworld.EnvInfos(extras=["walkthrough"])
        state = textworld.start(str(path), infos, [AlfredDemangler]).reset()
        plans[str(path.relative_to(folder))] = state["extra.walkthrough"]
    return plans


if __name__ == "__main__":
    for path, actions in write_games(Path(*sys.argv[1:2] or ["games"])).items():
        print(path, ", ".join(actions), sep="\n  ")
