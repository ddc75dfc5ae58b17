"""What one update would do to every token.

Plays a group of one training task and shows one of its episodes, in the terminal and as a web page:
for each sampled token the student's and the teacher's log-prob, the gap, the gate, and the two
pushes, which are what a first update multiplies the gradient of log pi with (above 0: likelier).

    python .lab/microscope.py                              # a group that has won and lost
    python .lab/microscope.py --seed 6 --episode 2         # the task and the episode of your choice
    python .lab/microscope.py --run runs/toy-sdar-s0       # gaps of a batch, before and after a run
"""

import html
import itertools
import json
import math
import os
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "experiments")]
import variants  # noqa: F401  a run may have one of its gates

import sdar
from envs import UserError, naming, require

TEMPLATES = sdar.HERE / ".assets"
TRIES = 30  # tasks that are played until a group has won and lost
BOLD, DIM, RED, GREEN = 1, 2, 31, 32  # a terminal's codes


def main(argv):
    """Play a group and show one of its episodes; or two batches, with --run."""
    parser = sdar.make_parser("python .lab/microscope.py [flags]", description=__doc__)
    more = parser.add_argument
    more("--episode", type=int, default=None, help="which of the group [the first that won]")
    more("--page", type=Path, default="inspect.html", help="file of the web page [%(default)s]")
    more("--run", default="", help="a run's folder: gaps of a batch, by its first policy and last")
    given = vars(parser.parse_args(argv))
    number = given.pop("episode")
    page = given.pop("page")
    run = given.pop("run")
    fine = page.suffix == ".html" and page.absolute().parent.is_dir()
    require(fine, f"--page {page}: must be a NAME.html in a folder that is there")
    if run:
        clash = ", ".join(map(sdar.flag, given))
        require(not clash, f"--run takes its settings from the run, and no {clash}")
        return show_run(run, page)

    config = sdar.configure(**given)
    gated = config.distil == "gate"
    require(gated, f"the microscope shows the gate, and --method {config.method} has none")
    last = config.group_size - 1
    known = number is None or 0 <= number <= last
    require(known, f"--episode {number}: a group has episodes 0 to {last}")

    envs = sdar.make_envs(config)
    model, chat = sdar.load_policy(config)
    tries = 1 if "seed" in given else TRIES
    seed, group = play_group(model, chat, envs, config, tries)
    if number is None:
        number = max(range(len(group)), key=lambda i: group[i].won)

    values = dissect(model, group, config)
    names = [*values]
    lengths = [len(episode.logprobs) for episode in group]
    rows = torch.stack([*values.values()], 1).split(lengths)
    texts = describe(chat, group, number, [row[0, 4].item() for row in rows])
    texts["again"] = f"python .lab/microscope.py --seed {seed} --episode {number}"
    parts = parts_of(chat, group[number], rows[number].tolist())
    show(texts, names, parts)
    wishes = favourites(model, chat, group[number], config)
    write_page(page, texts, names, parts, wishes, config.gate_beta)


def play_group(model, chat, envs, config, tries):
    """Episodes of the training task that the seed chooses; with more tries those of the next seeds,
    until a group has won and lost. Returns the seed and the group."""
    tasks = envs[0].tasks("train")
    first, size = config.seed, config.group_size
    for seed in range(first, first + tries):
        task = tasks[seed % len(tasks)]
        starts = [(task, seed, (4, seed, i)) for i in range(size)]
        group = sdar.rollout(model, chat, envs, starts, config, config.temperature)
        if len({episode.won for episode in group}) == 2:
            break
    return seed, group


@torch.no_grad()
def dissect(model, group, config):
    """Of the sampled tokens of a group {name: (N,)}: log-probs, gap, gate, and the pushes of the
    reward and of the teacher. Their sum is minus the loss's gradient: a test compares them."""
    batch = sdar.step_batch(model, model, model, group, config, step=1)
    terms = sdar.objective(model, group, batch, config)
    values = {"student": batch["old"], "teacher": batch["teacher"]}
    values["gap"] = terms["gap"]
    values["gate"] = terms["gate"]
    values["by reward"] = config.policy_coef * batch["advantages"]
    values["by teacher"] = config.sdar_coef * terms["gate"]
    return values


@torch.no_grad()
def next_logprobs(model, episode, config, with_skill):
    """Log-probs of all tokens of the vocabulary in the place of each sampled one, as one of the two
    readers sees them. Yields (rows, V), some rows after the other: all would take gigabytes."""
    ids, mask = episode.view(with_skill)
    ids = torch.tensor([ids], device=model.device)
    sampled = torch.tensor(mask[1:], device=model.device).bool()
    states = model.base_model(ids).last_hidden_state[0, :-1]
    head = model.get_output_embeddings().weight
    for rows in states[sampled].split(256):
        logits = F.linear(rows, head).float()
        yield torch.log_softmax(logits / config.temperature, -1)


def favourites(model, chat, episode, config):
    """What the teacher finds likeliest in the place of each sampled token: a list of texts."""
    found = []
    for logprobs in next_logprobs(model, episode, config, with_skill=True):
        for share, likeliest in zip(*logprobs.exp().max(-1)):
            text = chat.tokenizer.decode([likeliest.item()])
            found.append(f"{text} ({share:.2f})")
    return found


def describe(chat, group, number, pushes):
    """The texts around the tokens: {name: text}."""
    decode, episode = chat.tokenizer.decode, group[number]
    outcomes = []
    for other, push in zip(group, pushes):
        outcome = "won" if other.won else "lost"
        outcomes.append(f"{outcome} {push:+.2f}")
    at, begin = episode.skill_at, episode.mask.index(1)
    texts = {"task": episode.task, "episode": f"{number}: {outcomes[number]}"}
    texts["group"] = ", ".join(outcomes)
    texts["skill"] = decode(episode.skill_ids)
    texts["before"] = decode(episode.ids[:at])
    texts["after"] = decode(episode.ids[at:begin])
    return texts


def parts_of(chat, episode, rows):
    """The episode from its first response on, a list of (text, row): of a sampled token with its
    row of values, of what the environment said with None."""
    rows, parts = iter(rows), []
    begin = episode.mask.index(1)
    pairs = zip(episode.ids[begin:], episode.mask[begin:])
    for sampled, run in itertools.groupby(pairs, lambda pair: pair[1]):
        ids = [i for i, _ in run]
        if not sampled:
            parts.append((chat.tokenizer.decode(ids), None))
            continue
        for i in ids:
            parts.append((chat.tokenizer.decode([i]), next(rows)))
    return parts


def cells_of(row):
    """A row of values as texts."""
    return [f"{value:z.2f}" for value in row]


def show(texts, names, parts):
    """Print the episode: what the environment said is dim, a sampled token has a line, green where
    its gap is positive."""
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def say(code, text, cells=()):
        text = repr(text)[1:-1]  # without what a terminal would obey
        if cells:
            text = f"{text[:13]:<14}"
        text += "".join(f"{cell:>11}" for cell in cells)
        print(f"\033[{code}m{text}\033[0m" if coloured else text)

    for name in ("task", "episode", "group", "skill", "again"):
        say(BOLD, f"{name}: {texts[name]}")
    say(BOLD, "", names)
    say(DIM, texts["before"] + texts["after"])
    for text, row in parts:
        if row is None:
            say(DIM, text)
        else:
            say(GREEN if row[2] > 0 else RED, text, cells_of(row))


def fill(template, path, texts):
    """Write a page: a template of .assets with texts, which are HTML, in the place of {names}."""
    page = (TEMPLATES / template).read_text("utf-8")
    path.write_text(re.sub(r"\{(\w+)\}", lambda name: texts[name[1]], page), "utf-8")
    print(f"\n{path}: the same, for a browser")


def write_page(path, texts, names, parts, wishes, beta):
    """The same as a web page without scripts, at most some 500 kB: each token coloured by its gap,
    its numbers where the mouse is, and the histogram of the episode's gaps."""
    tokens, gaps, wishes = [], [], iter(wishes)
    for text, row in parts:
        text = html.escape(text[:999])
        if row is None:
            tokens.append(f"<p>{text}</p>")
            continue
        numbers = [f"{name} {cell}" for name, cell in zip(names, cells_of(row))]
        numbers.append(f"the teacher's favourite {next(wishes)}")
        numbers = html.escape("; ".join(numbers))
        style = f"--d:{row[2]:.3f};--p:{row[3]:.3f}"
        tokens.append(f'<i tabindex="0" style="{style}" data-n="{numbers}">{text}</i>')
        gaps.append(row[2])

    filled = {name: html.escape(text[:20000]) for name, text in texts.items()}
    filled["tokens"] = "".join(tokens[:1200])
    filled["histogram"] = histogram(gaps)
    filled["beta"] = f"{beta:g}"
    fill("inspect.html", path, filled)


def histogram(gaps):
    """The bars of a histogram of gaps from -3 to 3 nats, as HTML."""
    counts, edges = np.histogram(np.clip(gaps, -3, 3), 25, (-3, 3))
    bars = ""
    for count, gap in zip(counts, edges + 0.12):
        height = count / counts.max()
        bars += f'<b style="--d:{gap:.2f};--n:{height:.3f}" title="{count}"></b>'
    return bars


# --- A batch, before and after a run: the paper's Figures 2 and 3, in kind ----------------


def show_run(folder, page):
    """Gaps of a batch of tasks, played by a run's start policy and by its last one: their
    histogram, and gap, KL and gate by turn and by position in a turn; as text and as a page."""
    texts = {"run": html.escape(folder)}
    for when in ("start", "end"):
        config = settings_of(folder)
        if when == "end":
            config.model = f"{folder}/checkpoint"
        envs = sdar.make_envs(config)
        policy, chat = sdar.load_policy(config)
        rng = np.random.default_rng([4, config.seed])
        starts = sdar.draw_starts(envs[0], config, 0, rng)
        episodes = sdar.rollout(policy, chat, envs, starts, config, config.temperature)
        tokens = gaps_of(policy, episodes, config)

        won = np.mean([episode.won for episode in episodes])
        gaps = tokens[:, 2]
        mean = f"won {won:.2f} of {len(episodes)}, mean gap {gaps.mean():z.3f} nats"
        print(f"\n{when}: {mean}")
        texts[f"{when}_mean"] = mean
        texts[f"{when}_histogram"] = histogram(gaps)
        texts[f"{when}_turn"] = show_means("turn", tokens[:, 0], tokens)
        texts[f"{when}_position"] = show_means("position", tokens[:, 1], tokens)
    fill("inspect-run.html", page, texts)


def settings_of(folder):
    """The Config of a run, for the machine that it is looked at on."""
    here = {"device": "", "kernel": False, "resume": False, "overwrite": False}
    with naming(f"--run {folder} holds no run that can be read", UserError):
        settings = json.loads(Path(folder, "config.json").read_text("utf-8"))
        return sdar.configure(**settings | here)


def gaps_of(model, episodes, config):
    """An array of (turn, position in the turn, gap, KL(student || teacher), gate), a row a sampled
    token; the KL is exact, over the whole vocabulary; turns and positions count from 1."""
    student = sdar.score(model, episodes, config)
    gap = sdar.score(model, episodes, config, with_skill=True) - student
    gate = sdar.GATES["gap"](gap, None, config.gate_beta)
    turns, positions, kl = [], [], []
    for episode in episodes:
        turn, position = 0, 0
        for before, sampled in itertools.pairwise([0, *episode.mask]):
            turn += sampled > before
            position = position + 1 if sampled else 0
            if sampled:
                turns.append(turn)
                positions.append(position)
        readers = [next_logprobs(model, episode, config, skilled) for skilled in (False, True)]
        for ours, theirs in zip(*readers):
            kl += (ours.exp() * (ours - theirs)).sum(-1).tolist()
    return np.array([turns, positions, gap.tolist(), kl, gate.tolist()]).T


def show_means(name, places, tokens):
    """Print mean gap, KL and gate by turn or position, at most twelve rows. Returns them as rows of
    an HTML table."""
    width = math.ceil(places.max() / 12)
    lines = ""
    print("".join(f"{title:>10}" for title in (name, "tokens", "gap", "KL", "gate")))
    for first in range(1, int(places.max()) + 1, width):
        last = first + width - 1
        chosen = tokens[(first <= places) & (places <= last)]
        title = f"{first} to {last}" if width > 1 else first
        cells = [title, len(chosen)]
        for mean in chosen[:, 2:].mean(0):
            cells.append(f"{mean:z.3f}")
        print("".join(f"{cell:>10}" for cell in cells))
        lines += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    return lines


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know every letter
    sys.exit(sdar.run(partial(main, sys.argv[1:])))
