"""Be the agent: you see what a language model sees.

python .lab/player.py toy            # search for it; Ctrl-D leaves
python .lab/player.py toy --skill    # as the teacher, who has been told where it is
python .lab/player.py alfworld --data FOLDER --split dev
"""

import argparse
import os
import sys
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
    print(env.instructions + "\n")
    if with_skill:
        bank = envs.SkillBank(env.skills)
        for skill in bank.retrieve(info["task"], info["task_type"], 0):
            print("Skill:", harmless(skill.text))
    ended = False
    while not ended:
        print(harmless(observation + info["hint"]))
        action, readable = env.parse(input("> "))
        observation, _, terminated, truncated, info = env.step(action)
        if not (readable and info["valid"]):
            print("(an invalid action)")
        ended = terminated or truncated
    print(harmless(observation))
    print("won" if info["won"] else "not won")


def harmless(text):
    """A text without what a terminal would obey, its line breaks kept."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know every letter
    sys.exit(sdar.run(partial(main, sys.argv[1:])))
