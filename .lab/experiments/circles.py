"""SDAR in a household, with another gate on wrong places that were tried before.

    python .lab/experiments/circles.py first --env large_household:Forty --model runs/forty [flags]

The teacher assents to a place that the student has tried already, though it is wrong, and its gate
opens (FINDINGS, section 25). With "first" such a token gets the mean gate of the step's wrong
places that are tried for the first time; with "own" its own gate, a control. All gates are those of
the moment of sampling, as in the variants.
"""

import itertools
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import variants  # it says where sdar.py is, too

import sdar
from envs import ToyEnv

KINDS = ("first", "own")
VISIT = re.compile(r"go to (.+)")


def wrong_places(episode, tokenizer):
    """What its sampled tokens name, a text each: "first", a wrong place to search, tried for the
    first time; "again", one that was tried before; "", anything else. The search ends at the
    object's home."""
    home = episode.env.household.home[episode.env.goals[episode.task][2]]
    named, tried = [], set()
    for sampled, pairs in itertools.groupby(zip(episode.mask, episode.ids), lambda pair: pair[0]):
        if sampled:
            ids = [id for _, id in pairs]
            visit = VISIT.fullmatch(tokenizer.decode(ids, skip_special_tokens=True).strip())
            place = visit and visit[1]
            kind = "again" if place in tried else "first"
            tried.add(place)
            if not place or home in tried:
                kind = ""
            inside = range(1, len(ids) - 1)  # between `go to` and the end
            named += [kind if i in inside else "" for i in range(len(ids))]
    return named


def without_pay(gate, named):
    """The gates (N,) when a wrong place is worth no more for being tried again. named: what each
    token names."""
    first = torch.tensor([kind == "first" for kind in named]).to(gate.device)
    again = torch.tensor([kind == "again" for kind in named]).to(gate.device)
    return gate.masked_fill(again, gate[first].mean()) if first.any() else gate


def hooks(kind, tokenizer):
    """What sdar.train takes for gates of this kind."""
    found = variants.hooks(["gate:own"])

    def step_batch(model, start, teacher, episodes, *rest):
        batch = found["step_batch"](model, start, teacher, episodes, *rest)
        if kind == "first":
            named = [wrong_places(episode, tokenizer) for episode in episodes]
            batch["gate"] = without_pay(batch["gate"], sum(named, []))
        return batch

    return {**found, "step_batch": step_batch}


def main(argv):
    """Train with gates of a kind."""
    parser = sdar.make_parser("python .lab/experiments/circles.py KIND [flags of sdar.py]")
    parser.add_argument("kind", choices=KINDS)
    given = vars(parser.parse_args(argv))
    kind = given.pop("kind")
    config = sdar.configure(**given)
    variants.check(["gate:own"], config)
    fine = isinstance(sdar.make_envs(config)[0], ToyEnv)
    sdar.require(fine, f"--env {config.env}: circles.py knows the places of the toy alone")
    _, chat = sdar.load_policy(config)
    sdar.train(config, **hooks(kind, chat.tokenizer))


if __name__ == "__main__":
    sys.exit(sdar.run(lambda: main(sys.argv[1:])))
