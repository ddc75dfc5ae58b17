"""An episode token by token, in the terminal and as a web page: python sdar.py inspect [flags]

Plays the group of the training task that --seed chooses, and shows one episode of it: each sampled
token with the student's and the teacher's log-prob, the advantage, the gap, the gate, and the push,
which is what a first update multiplies the gradient of log pi with (up is more likely).
"""

import html
import itertools
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plots

import sdar

OWN = (
    ("--episode", {"type": int, "help": "which of the group [0]"}),
    ("--page", {"help": "file of the web page [inspect.html]"}),
)
TEMPLATE = sdar.HERE / ".assets" / "inspect.html"


def main(argv):
    """Play a group, show one of its episodes."""
    typed = sdar.parse_flags("inspect", __doc__, argv, OWN, sdar.OF_TRAINING)
    number, page = typed.pop("episode", 0), typed.pop("page", "inspect.html")
    config = sdar.Config(**typed)
    plots.check_file("--page", page, (".html", ".htm"))
    has_gate = sdar.METHODS[config.method].teacher == "gate"
    sdar.require(has_gate, f"inspect shows the gate, and --method {config.method} has none")

    known = 0 <= number < config.group_size
    sdar.require(known, f"--episode {number}: a group has episodes 0 to {config.group_size - 1}")

    model, chat, group = play_group(config)
    sdar.require(number < len(group), f"--episode {number}: its engine failed")
    episode = group[number]
    prompt = episode.ids[: episode.mask.index(1)]
    unreadable = 2 * prompt.count(chat.tokenizer.unk_token_id) >= len(prompt)
    sdar.require(
        not unreadable,
        f"--model {config.model} cannot read --env {config.env}: its tokenizer does not know most "
        "of the prompt",
    )
    values = dissect(model, group, config)
    texts = describe(chat, group, number, values["advantage"][:, 0].tolist())
    rows = [list(row) for row in zip(*(value[number].tolist() for value in values.values()))]
    show(chat, episode, texts, list(values), rows)
    write_page(page, chat, episode, texts, list(values), rows, config.gate_beta)


def play_group(config):
    """(model, chat, Episodes) of the training task that the seed chooses."""
    envs = sdar.make_envs(config)
    model, chat = sdar.load_policy(config)
    tasks = envs[0].tasks("train")
    starts = [(tasks[config.seed % len(tasks)], config.seed, 0)] * config.group_size
    stream = (4, config.seed)
    group = sdar.rollout(model, chat, envs, starts, config, stream, config.temperature)
    return model, chat, group


@torch.no_grad()
def dissect(model, episodes, config):
    """Of the sampled tokens of a group's episodes, a dict of (B, T): log-probs, advantage, gap,
    gate, and push. A test compares the push with the loss's gradient."""
    scored = sdar.score(model, episodes, config, with_skill=True)
    batch = sdar.step_batch(model, None, scored, episodes, config)
    _, entropy = sdar.response_logprobs(model, episodes, config, with_entropy=True)
    trust = batch.get("gate")
    if trust is None:
        trust = sdar.gate(config.gate, batch["gap"], entropy, config.gate_beta)
    weight = sdar.METHODS[config.method].policy_weight
    return {
        "student": batch["old"],
        "teacher": batch["teacher"],
        "advantage": batch["advantages"],
        "gap": batch["gap"],
        "gate": trust,
        "push": weight * batch["advantages"] + config.sdar_coef * trust,
    }


def describe(chat, group, number, advantages):
    """The texts around the tokens: {name: text}."""
    decode = chat.tokenizer.decode
    episode = group[number]
    scores = []
    for other, advantage in zip(group, advantages):
        scores.append(f"{'won' if other.won else 'lost'} {advantage:+.2f}")
    return {
        "task": episode.task,
        "episode": f"{number}: {scores[number]}",
        "group": ", ".join(scores),
        "skill": decode(episode.skill_ids),
        "before": decode(episode.ids[: episode.skill_at]),
        "after": decode(episode.ids[episode.skill_at : episode.mask.index(1)]),
    }


def pieces(episode, rows):
    """The episode from its first response on: (ids, None) of what the environment said, ([id], its
    row of values) of a sampled token."""
    rows = iter(rows)
    first = episode.mask.index(1)
    pairs = zip(episode.ids[first:], episode.mask[first:])
    for sampled, run in itertools.groupby(pairs, lambda pair: pair[1]):
        ids = [i for i, _ in run]
        if not sampled:
            yield ids, None
            continue
        for i in ids:
            yield [i], next(rows)


def cells_of(row):
    """A row of values as texts; the last, the push, with its direction."""
    cells = [f"{value:.2f}" for value in row]
    arrow = "▼" if row[-1] < 0 else "▲"
    return [*cells[:-1], f"{arrow}{row[-1]:+.2f}"]


def plain(text):
    """A text without what a terminal would obey."""
    return repr(text)[1:-1]


def show(chat, episode, texts, names, rows):
    """Print the episode: what the environment said is dim, a sampled token has a line, green where
    its gap is positive."""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    narrow = shutil.get_terminal_size().columns < 80
    room = 10 if narrow else 20
    shown = slice(3, 6) if narrow else slice(6)

    def say(code, text):
        print(f"\033[{code}m{text}\033[0m" if colour else text)

    def line(text, cells):
        return f"{plain(text)[: room - 1]:<{room}}" + "".join(
            f"{cell:>10}" for cell in cells[shown]
        )

    for name in ("task", "episode", "group", "skill"):
        say(1, f"{name}: {plain(texts[name])}")
    say(1, line("", names))
    say(2, plain(texts["before"] + texts["after"]))
    for ids, row in pieces(episode, rows):
        text = chat.tokenizer.decode(ids)
        if row is None:
            say(2, plain(text))
        else:
            say(32 if row[3] > 0 else 31, line(text, cells_of(row)))


def write_page(path, chat, episode, texts, names, rows, beta):
    """The same as a web page without scripts, at most some 500 kB: each token coloured by its gap,
    its numbers where the mouse is, and the histogram of the episode's gaps."""
    tokens = []
    for ids, row in pieces(episode, rows):
        text = html.escape(chat.tokenizer.decode(ids))
        if row is None:
            tokens.append(f"<p>{text[:999]}</p>")
            continue
        numbers = ", ".join(f"{name} {cell}" for name, cell in zip(names, cells_of(row)))
        style = f"--d:{row[3]:.3f};--p:{row[4]:.3f}"
        tokens.append(f'<i tabindex="0" style="{style}" data-n="{numbers}">{text}</i>')

    gaps = np.clip([row[3] for row in rows[: sum(episode.mask)]], -3, 3)
    counts, edges = np.histogram(gaps, 25, (-3, 3))
    bars = ""
    for count, gap in zip(counts, edges + 0.12):
        height = count / counts.max()
        bars += f'<b style="--d:{gap:.2f};--n:{height:.3f}" title="{count}"></b>'

    filled = {name: html.escape(text[:20000]) for name, text in texts.items()}
    filled |= {"tokens": "".join(tokens[:1200]), "histogram": bars, "beta": f"{beta:g}"}
    template = TEMPLATE.read_text("utf-8")
    page = re.sub(r"\{(\w+)\}", lambda name: filled[name[1]], template)
    sdar.write_whole(path, page.replace("\0", "\ufffd"))
    print(f"\n{path}: the same, for a browser")


if __name__ == "__main__":
    sys.exit(sdar.main(["inspect", *sys.argv[1:]]))
