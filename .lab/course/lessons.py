"""Commands of the exercises that are no function to write again. exercise.py calls them.

    python .lab/course/exercise.py log ill 1     # a stored log as a table; alarm 1 to 10, too
    python .lab/course/exercise.py alarm         # grades answers/alarm.py on ten stored logs
    python .lab/course/exercise.py late [flags]  # when is it too late to be told?

`late` takes all flags of sdar.py.
"""

import json
import runpy
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np

import sdar
from envs import UserError, naming, require

LOGS = Path(__file__).resolve().parent / "logs"

# --- Stored logs -------------------------------------------------------------------------


def stored(name):
    """The logs of a file, each a list of lines of metrics.jsonl."""
    with naming("log ill 1 to 3, or log alarm 1 to 10", UserError):
        logs = json.loads((LOGS / f"{name}.json").read_text())
    found = []
    for columns in logs.values():
        rows = (zip(columns, cells) for cells in zip(*columns.values()))
        found.append([{k: cell for k, cell in row if cell is not None} for row in rows])
    return found


def log(name="", number=""):
    """A stored log as a table."""
    logs = {str(i): lines for i, lines in enumerate(stored(name), 1)}
    require(number in logs, f"log {name}: the number is one of {', '.join(logs)}")
    widths = {name: max(10, len(name) + 2) for name in logs[number][-1]}
    rows = ["".join(f"{name:>{width}}" for name, width in widths.items())]
    for line in logs[number]:
        cells = [f"{line[name]:.4g}" if name in line else "" for name in widths]
        rows.append("".join(map(str.rjust, cells, widths.values())))
    return "\n".join(rows)


# --- The teacher that dies ---------------------------------------------------------------


def alarm(file="answers/alarm.py"):
    """Grades a file's alarm(lines), which sees a log as it grows, on ten stored logs."""
    with naming(f"{file} must have a function alarm(lines) -> step or None", UserError):
        function = runpy.run_path(file)["alarm"]
    warned = []
    for number, lines in enumerate(stored("alarm"), 1):
        # The student is lost where it falls below two thirds of its best and does not come back.
        looks = {line["step"]: line["eval_success"] for line in lines if "eval_success" in line}
        fine = max(step for step, won in looks.items() if won >= max(looks.values()) * 2 / 3)
        lost = fine < max(looks)
        with naming(f"{file} fails on log {number}", UserError):
            steps = [line["step"] for i, line in enumerate(lines, 1) if function(lines[:i])]
        step = min(steps, default=None)
        look = f"python .lab/course/exercise.py log alarm {number}"
        end = f"its student ends at {looks[max(looks)]:.2f}. Look: {look}"
        if lost and (step is None or step > fine):
            return f"Not yet. Log {number}: no alarm up to step {fine}, and {end}"
        if step and not lost:
            return f"Not yet. Log {number}: a false alarm after step {step}, {end}"
        if lost:
            warned.append(f"{fine - step}")
    return (
        f"Right: no false alarm, and {', '.join(warned)} steps to spare. You now know that gap and "
        "gate compare two readers, who can be wrong together."
    )


# --- When is it too late? ----------------------------------------------------------------


def late(*flags):
    """Replays lost episodes to turn k; then the player is told the skill. How many are won?"""
    given = vars(sdar.make_parser("exercise.py late [flags of sdar.py]").parse_args(flags))
    config = sdar.configure(**{"eval_episodes": 60} | given)
    envs, policy = sdar.make_envs(config), sdar.load_policy(config)
    panel = envs[0].panel(config.eval_split, min(config.eval_episodes, len(envs)))
    starts = [(*start, (1, 0, i)) for i, start in enumerate(panel)]
    play = partial(sdar.rollout, *policy, envs, config=config, temperature=config.eval_temperature)
    lost = [pair for pair in zip(starts, play(starts=starts)) if not pair[1].won]
    rows = [f"{len(lost)} of {len(starts)} are lost alone; told after k turns they are won:"]
    for turns in range(min(10, envs[0].max_turns) * bool(lost)):
        said = [first_turns(episode, turns) for _, episode in lost]
        with patch.object(sdar, "Sampler", repeating(dict(zip(envs, said)))):
            again = play(starts=[start for start, _ in lost], with_skill=True)
        won = sum(episode.won for episode in again)
        low, high = sdar.wilson(won, len(lost))
        rows.append(f"{turns:>3}  {won / len(lost):.2f} [{low:.2f}, {high:.2f}]")
    return "\n".join(rows)


def first_turns(episode, turns):
    """The ids that were sampled in an episode's first turns."""
    edges = np.flatnonzero(np.diff([0, *episode.mask, 0])).reshape(-1, 2)  # of the answers
    return sum((episode.ids[begin:end] for begin, end in edges[:turns]), [])


def repeating(said):
    """A kind of Sampler whose player begins with ids that were said before: {environment: ids}."""

    class Repeating(sdar.Sampler):
        def feed(self, episodes):
            self.episodes = episodes
            return super().feed(episodes)

        def draw(self, logits, uniform):
            ids, logprobs = super().draw(logits, uniform)
            for row, episode in enumerate(self.episodes):
                rest = said[episode.env][len(episode.logprobs) :]
                ids[row] = rest[0] if rest else ids[row]
            return ids, logprobs

    return Repeating


COMMANDS = {"log": log, "alarm": alarm, "late": late}
