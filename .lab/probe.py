"""What does a policy know? How likely its first answer is the way to each place, class by class.

    python .lab/probe.py                              # the tiny policy, as it comes
    python .lab/probe.py --preset toy --model runs/toy-sdar-s0/checkpoint    # the end of a run
    python .lab/probe.py --steps 0,2,5,10,20,30,40,60 [flags of sdar.py]     # train, and look

To look, nothing is played and nothing sampled: in front of "put an apple in ..." the policy could
answer "go to" each of the places, and every such answer has a probability. A row is a class of
objects, a column a place, a digit tenths of the probability; brackets stand around the class's
home. The mean over the homes is "home". Beside it is "blind", what a policy would have there that
takes no notice of the class: it knows where things are kept at all, and not which thing where.
"""

import itertools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import compare
import plots

import sdar
from envs import ToyEnv, naming, require

LOGGED = "success gap gate entropy seconds_rollout seconds_score seconds_update".split()
SEEN = "\nstep {}, {}: home {:.3f}, blind {:.3f}"


@torch.no_grad()
def matrix(model, chat, env, config, with_skill):
    """P(the first answer is "go to PLACE"), (classes, places), in front of a class's first task of
    the type put."""
    tasks = {goal[2]: task for task, goal in reversed(env.goals.items()) if goal[0] == "put"}
    form, end = ("go to {}", [chat.end_id]) if chat.plain else ("<action>go to {}</action>", [])
    episodes = []
    for name, place in itertools.product(env.household.home, env.storages):
        task = tasks[name]
        episode = sdar.start_episode(chat, env, (task, 0, 0), env.reset(task), with_skill=False)
        episode.add(chat.encode(form.format(place)) + end, sampled=1)
        episodes.append(episode)
    lengths = [sum(episode.mask) for episode in episodes]
    logprobs = sdar.score(model, episodes, config, with_skill).split(lengths)
    chances = torch.stack([of_answer.sum() for of_answer in logprobs]).exp()
    return chances.view(-1, len(env.storages)).cpu()


def homes(env):
    """The column of each class's home."""
    return [env.storages.index(place) for place in env.household.home.values()]


def means(found, columns):
    """(mean over the homes, the same of answers that take no notice of the class)."""
    known = found[range(len(columns)), columns]
    return known.mean().item(), found.mean(0)[columns].mean().item()


def look(model, chat, env, config, step):
    """Print what the policy knows at a step. Returns it: {step, reader: figures}."""
    seen = {"step": step}
    for reader in ("skill", "alone"):
        found = matrix(model, chat, env, config, with_skill=reader == "skill")
        known, blind = means(found, homes(env))
        percent = (100 * found).round().int().tolist()
        seen[reader] = {"home": known, "blind": blind, "percent": percent}
        print(SEEN.format(step, reader, known, blind))
    show(env, percent)
    return seen


def order(env):
    """The columns as they are shown: the homes in the order of their classes, then the others."""
    return [*dict.fromkeys([*homes(env), *range(len(env.storages))])]


def show(env, percent):
    """Print a matrix."""
    heads = [env.storages[column] for column in order(env)]
    print(" " * 8, *["{:.2}{:<2}".format(*head.split()) for head in heads], sep="")
    for name, row, home in zip(env.household.home, percent, homes(env)):
        cells = [".123456789#"[(share + 5) // 10] for share in row]
        cells[home] = f"[{cells[home]}]"
        print(f"{name:<8}", *[f"{cells[column]:^4}" for column in order(env)], sep="")


def looks_at(steps, config, env, looks):
    """Train up to each of the steps, and look, also at what was logged since the look before
    (medians). A run that is resumed is the run that was never stopped. looks: earlier ones, to
    which each is added before the next one is made."""
    policy = config.model
    for step in steps:
        if step:
            state = Path(config.out, "state.pt")  # was it stopped while it looked?
            kept = config.resume and state.exists()
            if not kept or torch.load(state, map_location="cpu")["step"] != step:
                sdar.train(replace(config, steps=step))
            config = replace(config, resume=True, overwrite=False)
            policy = f"{config.out}/checkpoint"
        looks.append(look(*sdar.load_policy(replace(config, model=policy)), env, config, step))
        if step:
            log = plots.read_run(config.out)[1][looks[-2]["step"] if looks[1:] else 0 : step]
            looks[-1]["learning"] = {
                name: np.median([line[name] for line in log]) for name in LOGGED if name in log[0]
            }
        yield


def main(argv=None):
    """Look at a policy as it is, or at some steps of its training."""
    parser = sdar.make_parser("python .lab/probe.py [flags]", description=__doc__)
    parser.add_argument("--json", default="", help="add what was seen to this file")
    given = vars(parser.parse_args(argv))
    file = given.pop("json")
    steps = given.pop("steps", "0")
    require(re.fullmatch(r"\d+(,\d+)*", steps), f"--steps {steps}: must be numbers like 0,2,5")
    steps = {*map(int, steps.split(","))}
    runs = {}
    if file:
        plots.check_file("--json", file, [".json"])
    if Path(file).is_file():
        with naming(f"--json {file} holds something else"):
            runs.update(json.loads(Path(file).read_text("utf-8")))
    config = sdar.configure(**{"eval_every": 0} | given, steps=max(steps))
    name = Path(config.out).name
    looks = runs.get(name, {"looks": []})["looks"]
    fine = config.resume or not looks
    require(fine, f"--json {file} has a run {name}: another --out, or another file")
    env = sdar.make_envs(config)[0]
    require(isinstance(env, ToyEnv), f"--env {config.env}: the probe knows only the toy's places")

    if not config.resume:  # asks whether --out may be written, before anything is kept
        sdar.load_checkpoint(config, None, None, None)
    made = compare.origin(config.device)
    runs[name] = {"settings": vars(config), "made": made, "looks": looks}
    left = sorted(steps - {of_step["step"] for of_step in looks})
    for _ in looks_at(left, config, env, looks):
        if file:
            Path(file).write_text(json.dumps(runs) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(sdar.run(main))
