"""Be the agent: you see what a language model sees, but for the examples.

python .lab/player.py toy            # search for it; Ctrl-D leaves
python .lab/player.py toy --skill    # as the teacher, who has been told where it is
python .lab/player.py alfworld --data FOLDER --split dev
"""

import argparse
import os
import re
import shutil
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import sdar
from envs import ENVS, SkillBank, make_env, require

KEYS = """
Type an action; you need no tags, except in search.
An empty line lists all actions, and costs no turn.
Ctrl-D leaves (on Windows Ctrl-Z, and the return key).
"""


def main(argv=None):
    """Play an episode in the terminal: of the first task of the split, or of one that is named."""
    raw = argparse.RawTextHelpFormatter
    parser = sdar.Parser("python .lab/player.py", epilog=__doc__, formatter_class=raw)
    more = parser.add_argument
    more("env", help=f"{', '.join(ENVS)}, or your own, module:Class")
    more("--data", type=os.path.expanduser, help="its games, checkout or questions")
    more("--url", help="of a search server")
    more("--split", default="eval", help="train, dev or eval")
    more("--task", help="its id")
    more("--skill", action="store_true", help="read what the teacher reads")
    given = parser.parse_args(argv)
    options = {"data": given.data, "url": given.url}
    env = make_env(given.env, **{name: text for name, text in options.items() if text})
    task = given.task or env.tasks(given.split)[0]
    require(task in env.goals, f"--task {task}: {given.env} has no such task")
    try:
        play(env, task, given.skill)
    except EOFError:
        print("\nstopped")


def play(env, task, with_skill):
    """An episode with a person for the policy."""
    env.plain = True  # people need no tags
    observation, info = env.reset(task)
    say(env.instructions + KEYS)
    if with_skill:
        bank = env.bank or SkillBank(env.skills)
        for skill in bank.retrieve(info["task"], info["task_type"], 0):
            say("Skill: " + skill.text)
    while True:
        say(observation + info["hint"])
        while not (line := input("> ").strip()):
            say(", ".join(info["admissible"]))
        action, readable = env.parse(line)
        full = re.sub(" (in|on) ", " in/on ", action.lower())
        action = full if full in info["admissible"] else action
        observation, _, terminated, truncated, info = env.step(action)
        if not (readable and info["valid"]):
            say("(an invalid action)")
        if terminated or truncated:
            break
    say(f"{observation}\nafter {env.turns} of {env.max_turns} turns:")
    print("won" if info["won"] else "not won")


def say(text):
    """Print a text in the terminal's width, no word broken, without what a terminal would obey."""
    width = shutil.get_terminal_size().columns
    for line in text.split("\n"):
        line = "".join(c if c.isprintable() else "\ufffd" for c in line)
        print(textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False))


if __name__ == "__main__":
    sys.exit(sdar.run(main))
