"""Commands of the exercises that are no function to write again; exercise.py calls them. They are
about stored logs, and about lost episodes that are played again."""

import json
import runpy
from functools import partial
from itertools import compress
from pathlib import Path
from unittest.mock import patch

import sdar
from envs import naming, require

LOGS = Path(__file__).resolve().parent / "logs"

# --- Stored logs -------------------------------------------------------------------------


def stored(name):
    """{number: lines of metrics.jsonl} of the stored logs of a kind."""
    return json.loads((LOGS / f"{name}.json").read_text())


def log(name, number):
    """A stored log as a table."""
    with naming("it is log ill 1 to 3, or log alarm 1 to 10"):
        lines = stored(name)[number]
    names = [*lines[-1]]
    rows = []
    for line in [dict(zip(names, names)), *lines]:
        cells = [str(line.get(name, "")).rjust(max(10, len(name) + 2)) for name in names]
        rows.append("".join(cells))
    return "\n".join(rows)


# --- The teacher that dies ---------------------------------------------------------------


def alarm(file="answers/alarm.py"):
    """Grades a file's alarm(lines), which sees a log as it grows, on ten stored logs."""
    with naming(f"{file} must have a function alarm(lines) -> step or None"):
        function = runpy.run_path(file)["alarm"]
    spare = []
    for number, lines in stored("alarm").items():
        # The student is lost where it falls below two thirds of its best and does not come back.
        won = {line["step"]: line["eval_success"] for line in lines if "eval_success" in line}
        fine = max(step for step in won if won[step] >= max(won.values()) * 2 / 3)
        lost = fine < max(won)
        steps = range(1, len(lines) + 1)
        with naming(f"{file} fails on log {number}"):
            rung = min((step for step in steps if function(lines[:step])), default=99)
        if lost != (rung <= fine):
            said = f"a false alarm after step {rung}"
            if lost:
                said = f"no alarm up to step {fine}, and its student dies"
            return (
                f"Not yet. Log {number}: {said}. "
                f"Look: python .lab/course/exercise.py log alarm {number}"
            )
        spare += [fine - rung] * lost
    return (
        f"Right: no false alarm, and {spare} steps to spare. Gap and gate look best in runs "
        "that die: they compare two readers, who can be wrong together."
    )


# --- When is it too late? ----------------------------------------------------------------


def late(*flags):
    """Plays lost episodes again up to turn k; then the player is told the skill. How many are won?
    Takes all flags of sdar.py."""
    given = sdar.make_parser("exercise.py late [flags of sdar.py]").parse_args(flags)
    config = sdar.configure(**vars(given))
    config.rollout_batch = config.eval_episodes  # all at once: each has an environment of its own
    envs = sdar.make_envs(config)
    policy = sdar.load_policy(config)
    panel = enumerate(envs[0].panel(config.eval_split, config.eval_episodes))
    starts = [(*start, (1, 0, i)) for i, start in panel]
    play = partial(sdar.rollout, *policy, envs, config=config, temperature=config.eval_temperature)

    tries = zip(starts, play(starts=starts))
    lost = {start: episode for start, episode in tries if not episode.won}
    require(lost, "no episode is lost alone: there is nothing to play again")
    rows = [f"{len(lost)} of {len(starts)} are lost alone; the share won, if told after k turns:"]
    for turns in range(10):
        with patch.object(sdar, "Sampler", repeating(dict(zip(envs, lost.values())), turns)):
            again = play(starts=[*lost], with_skill=True)
        won = sum(episode.won for episode in again)
        low, high = sdar.wilson(won, len(lost))
        rows.append(f"{turns:>3}  {won / len(lost):.2f} [{low:.2f}, {high:.2f}]")
    return "\n".join(rows)


def repeating(played, turns):
    """A kind of Sampler whose players say in their first turns what they said in an episode that
    was played before: {environment: Episode}."""
    said = {env: [*compress(episode.ids, episode.mask)] for env, episode in played.items()}

    class Repeating(sdar.Sampler):
        def feed(self, episodes):
            self.episodes = episodes
            return super().feed(episodes)

        def draw(self, logits, uniform):
            ids, logprobs = super().draw(logits, uniform)
            for row, episode in enumerate(self.episodes):
                rest = said[episode.env][len(episode.logprobs) :]
                if rest and episode.turns < turns:
                    ids[row] = rest[0]
            return ids, logprobs

    return Repeating
