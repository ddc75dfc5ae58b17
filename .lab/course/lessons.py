"""Commands of the exercises that are no function to write again; exercise.py calls them. They are
about stored logs, and about lost episodes that are played again."""

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
    """{number: lines of metrics.jsonl} of the stored logs of a kind."""
    with naming("it is log ill 1 to 3, or log alarm 1 to 10", UserError):
        return json.loads((LOGS / f"{name}.json").read_text())


def log(name, number):
    """A stored log as a table."""
    lines = stored(name).get(number)
    require(lines, f"log {name} {number}: there are {', '.join(stored(name))}")
    names, rows = [*lines[-1]], []
    for line in [dict(zip(names, names)), *lines]:
        cells = [str(line.get(name, "")).rjust(max(10, len(name) + 2)) for name in names]
        rows.append("".join(cells))
    return "\n".join(rows)


# --- The teacher that dies ---------------------------------------------------------------


def alarm(file="answers/alarm.py"):
    """Grades a file's alarm(lines), which sees a log as it grows, on ten stored logs."""
    with naming(f"{file} must have a function alarm(lines) -> step or None", UserError):
        function = runpy.run_path(file)["alarm"]
    spare = []
    for number, lines in stored("alarm").items():
        # The student is lost where it falls below two thirds of its best and does not come back.
        won = {line["step"]: line["eval_success"] for line in lines if "eval_success" in line}
        enough = max(won.values()) * 2 / 3
        fine = max(step for step in won if won[step] >= enough)
        lost = won[max(won)] < enough
        steps = range(1, len(lines) + 1)
        with naming(f"{file} fails on log {number}", UserError):
            rung = [step for step in steps if function(lines[:step])]
        look = f"Look: python .lab/course/exercise.py log alarm {number}"
        if lost and min(rung, default=99) > fine:
            return (
                f"Not yet. Log {number}: no alarm up to step {fine}, and its student dies. {look}"
            )
        if rung and not lost:
            return f"Not yet. Log {number}: a false alarm after step {rung[0]}. {look}"
        if lost:
            spare.append(fine - rung[0])
    return (
        f"Right: no false alarm, and {spare} steps to spare. You now know that gap and gate "
        "compare two readers, who can be wrong together."
    )


# --- When is it too late? ----------------------------------------------------------------


def late(*flags):
    """Plays lost episodes again up to turn k; then the player is told the skill. How many are won?
    Takes all flags of sdar.py."""
    given = vars(sdar.make_parser("exercise.py late [flags of sdar.py]").parse_args(flags))
    config = sdar.configure(**given)
    config.rollout_batch = config.eval_episodes  # all at once: each has an environment of its own
    envs, policy = sdar.make_envs(config), sdar.load_policy(config)
    panel = envs[0].panel(config.eval_split, config.eval_episodes)
    starts = [(*start, (1, 0, i)) for i, start in enumerate(panel)]
    play = partial(sdar.rollout, *policy, envs, config=config, temperature=config.eval_temperature)

    tries = zip(starts, play(starts=starts))
    lost = {start: episode for start, episode in tries if not episode.won}
    require(lost, "none is lost alone, so nobody has to be told")
    rows = [f"{len(lost)} of {len(panel)} are lost alone; told after k turns they are won:"]
    for turns in range(min(10, envs[0].max_turns)):
        said = [first_turns(episode, turns) for episode in lost.values()]
        with patch.object(sdar, "Sampler", repeating(dict(zip(envs, said)))):
            again = play(starts=[*lost], with_skill=True)
        won = sum(episode.won for episode in again)
        share = won / len(lost)
        low, high = sdar.wilson(won, len(lost))
        rows.append(f"{turns:>3}  {share:.2f} [{low:.2f}, {high:.2f}]")
    return "\n".join(rows)


def first_turns(episode, turns):
    """The ids that were sampled in an episode's first turns."""
    edges = np.flatnonzero(np.diff([0, *episode.mask, 0]))  # of the answers
    edges = edges.reshape(-1, 2)[:turns]
    return sum((episode.ids[begin:end] for begin, end in edges), [])


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
