"""Be the agent: you see what a language model sees.

python .lab/player.py toy            # search for it; Ctrl-D leaves
python .lab/player.py toy --skill    # as the teacher, who has been told where it is
python .lab/player.py alfworld --data FOLDER --split dev
"""

import argparse
import os
import shutil
import sys
import textwrap
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import envs
import sdar


def main(argv):
    """Play an episode in the terminal: of the first task of the split, or of one that is named."""
    raw = argparse.RawTextHelpFormatter
    parser = sdar.Parser("python .lab/player.py", epilog=__doc__, formatter_class=raw)
    parser.add_argument("env", help=f"{', '.join(envs.ENVS)}, or your own, module:Class")
    parser.add_argument("--data", type=os.path.expanduser, help="its games, checkout or questions")
    parser.add_argument("--url", help="of a search server")
    parser.add_argument("--split", default="eval", help="train, dev or eval")
    parser.add_argument("--task", help="its id")
    parser.add_argument("--skill", action="store_true", help="read what the teacher reads")
    given = parser.parse_args(argv)
    options = {name: vars(given)[name] for name in ("data", "url") if vars(given)[name]}
    env = envs.make_env(given.env, **options)
    env.plain = True  # people need no tags
    task = given.task or env.tasks(given.split)[0]
    envs.require(task in env.goals, f"--task {task}: {given.env} has no such task")
    try:
        play(env, task, given.skill)
    except EOFError:
        print("\nstopped")


def play(env, task, with_skill):
    """An episode with a person for the policy."""
    observation, info = env.reset(task)
    say(f"{env.instructions}\nAn empty line lists all actions, and costs no turn.\n")
    if with_skill:
        bank = envs.SkillBank(env.skills)
        for skill in bank.retrieve(info["task"], info["task_type"], 0):
            say("Skill: " + skill.text)
    ended = False
    while not ended:
        say(observation + info["hint"])
        while not (line := input("> ").strip()):
            say(", ".join(info["admissible"]))
        typed, readable = env.parse(line)
        action = meant(typed, info["admissible"])
        if action != typed:
            say(f"(taken as: {action})")
        observation, _, terminated, truncated, info = env.step(action)
        if not (readable and info["valid"]):
            say("(an invalid action)")
        ended = terminated or truncated
    say(f"{observation}\nafter {env.turns} of {env.max_turns} turns:")
    print("won" if info["won"] else "not won")


def meant(action, admissible):
    """The admissible action that is typed with "in" or "on" for "in/on"; else what is typed."""
    for known in admissible:
        if action.lower() in (known.replace("in/on", "in"), known.replace("in/on", "on")):
            return known
    return action


def say(text):
    """Print a text in the terminal's width, no word broken."""
    width = shutil.get_terminal_size().columns
    for line in harmless(text).split("\n"):
        print(textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False))


def harmless(text):
    """A text without what a terminal would obey, its line breaks kept."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


if __name__ == "__main__":
    sys.exit(sdar.run(partial(main, sys.argv[1:])))
