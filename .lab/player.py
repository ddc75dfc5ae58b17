"""Be the agent: you see what the model sees.

python envs.py play toy            # search for it
python envs.py play toy --skill    # as the teacher, who has been told where it is
python envs.py play alfworld --data FOLDER --split eval
python envs.py serve CORPUS.jsonl  # a small search server, for "search"
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import envs


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message):
        self.exit(2, f"envs.py: {message}\n")


def main(argv):
    """Run a command. Returns the exit code: 0, also at the end of input; 2 bad input (one line on
    stderr); 130 Ctrl-C."""
    envs.tolerant_output()
    parser = Parser("envs.py", epilog=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command", parser_class=Parser)
    playing = commands.add_parser("play", argument_default=argparse.SUPPRESS)
    playing.add_argument("name", help=f"{', '.join(envs.ENVS)}, or your own, module:Class")
    playing.add_argument("--data", type=envs.as_typed, help="its games, checkout or questions")
    playing.add_argument("--url")
    playing.add_argument("--split", help="train, dev or eval")
    playing.add_argument("--task")
    playing.add_argument("--skill", action="store_true", help="read what the teacher reads")
    serving = commands.add_parser("serve", argument_default=argparse.SUPPRESS)
    serving.add_argument("file", type=envs.as_typed, help="a JSON-lines file with id and contents")
    serving.add_argument("--port", type=int, help="8000; 0: any")

    options = vars(parser.parse_args(argv))
    command = {"play": play, "serve": serve}[options.pop("command")]
    try:
        command(**options)
    except (EOFError, KeyboardInterrupt) as error:
        print("\nstopped")
        return 130 if isinstance(error, KeyboardInterrupt) else 0
    except (envs.EnvUnavailable, envs.UserError, OSError) as error:
        print(f"envs.py: {error}", file=sys.stderr)
        return 2
    return 0


def play(name, split="eval", task=None, skill=False, **options):
    """A person plays an episode in the terminal and sees what the model sees: the first task of the
    split, or that of an id. skill: and what the teacher sees."""
    env = envs.make_env(name, **options)
    env.tagged = False  # people need no tags
    first = env.tasks(split)[0]
    observation, info = env.reset(task or first)
    read = envs.retrieve(env.skills, info["task"], info["task_type"], "keyword")
    shown = envs.skill_text(read) if skill else ""
    print(env.instructions, harmless(shown + observation), sep="\n\n")
    ended = False
    while not ended:
        action, valid = env.parse(input("> "))
        observation, _, terminated, truncated, info = env.step(action)
        ended = terminated or truncated
        remark = "" if valid and info["valid"] else " (an invalid action)"
        print(harmless(observation) + remark)
    print(f"{'won' if info['won'] else 'not won'}, score {info['score']:g}")


def harmless(text):
    """A text without what a terminal would obey, its line breaks kept."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def serve(file, port=8000):
    """Start the small search server."""
    import search_server

    search_server.serve(file, port)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
