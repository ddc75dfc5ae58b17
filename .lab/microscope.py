"""What one update would do to every token: python sdar.py inspect [flags]

Plays a group of one training task and shows one of its episodes, in the terminal and as a web page:
for each sampled token the student's and the teacher's log-prob, the gap, the gate, and the two
pushes, which are what a first update multiplies the gradient of log pi with (up: more likely).

    python sdar.py inspect                              # a group that has won and lost
    python sdar.py inspect --seed 6 --episode 2         # the task and the episode of your choice
    python sdar.py inspect --run runs/toy-sdar-s0       # gaps of a batch, before and after a run
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
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plots

import sdar

OWN = (
    ("--episode", {"type": int, "help": "which of the group [the first that won]"}),
    ("--page", {"help": "file of the web page [inspect.html]"}),
    ("--run", {"help": "a run's folder: show gaps of a batch by its start policy and its last"}),
)
TEMPLATES = sdar.HERE / ".assets"
TRIES = 30  # tasks that are played until a group has won and lost


def main(argv):
    """Play a group and show one of its episodes; or two batches, with --run."""
    typed = sdar.parse_flags("inspect", __doc__, argv, OWN, sdar.OF_TRAINING)
    page, run = typed.pop("page", "inspect.html"), typed.pop("run", "")
    plots.check_file("--page", page, (".html", ".htm"))
    if run:
        clash = ", ".join(map(sdar.flag, typed))
        sdar.require(not clash, f"--run takes its settings from the run, and no {clash}")
        return show_run(run, page)

    number, chosen = typed.pop("episode", None), "seed" in typed
    config = sdar.Config(**typed)
    has_gate = sdar.METHODS[config.method].teacher == "gate"
    sdar.require(has_gate, f"inspect shows the gate, and --method {config.method} has none")
    known = number is None or 0 <= number < config.group_size
    sdar.require(known, f"--episode {number}: a group has episodes 0 to {config.group_size - 1}")

    envs = sdar.make_envs(config)
    model, chat = sdar.load_policy(config)
    group = play_group(model, chat, envs, config)
    while not chosen and config.seed < TRIES and len({episode.won for episode in group}) == 1:
        config.seed += 1
        group = play_group(model, chat, envs, config)
    if number is None:
        number = max(range(len(group)), key=lambda i: group[i].won)
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
    texts = describe(chat, group, number, values["by reward"][:, 0].tolist())
    texts["again"] = f"python sdar.py inspect --seed {config.seed} --episode {number}"
    rows = [list(row) for row in zip(*(value[number].tolist() for value in values.values()))]
    wishes = favourites(model, chat, episode, config)
    show(chat, episode, texts, list(values), rows)
    write_page(page, chat, episode, texts, list(values), rows, wishes, config.gate_beta)


def play_group(model, chat, envs, config):
    """Episodes of the training task that the seed chooses."""
    tasks = envs[0].tasks("train")
    starts = [(tasks[config.seed % len(tasks)], config.seed, 0)] * config.group_size
    stream = (4, config.seed)
    return sdar.rollout(model, chat, envs, starts, config, stream, config.temperature)


@torch.no_grad()
def dissect(model, episodes, config):
    """Of the sampled tokens of a group's episodes, a dict of (B, T): log-probs, gap, gate, and the
    pushes of the reward and of the teacher. A test compares their sum with the loss's gradient."""
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
        "gap": batch["gap"],
        "gate": trust,
        "by reward": weight * batch["advantages"].expand_as(trust),
        "by teacher": config.sdar_coef * trust,
    }


@torch.no_grad()
def favourites(model, chat, episode, config):
    """What the teacher finds likeliest in the place of each sampled token: a list of texts."""
    ids, mask = episode.view(with_skill=True)
    sampled = torch.tensor(mask[1:], device=model.device).bool()
    states = model.base_model(torch.tensor([ids], device=model.device)).last_hidden_state[0]
    logits = F.linear(states[:-1][sampled], model.get_output_embeddings().weight)
    shares, likeliest = (logits.float() / config.temperature).softmax(-1).max(-1)
    texts = [chat.tokenizer.decode([i]) for i in likeliest.tolist()]
    return [f"{text} ({share:.2f})" for text, share in zip(texts, shares.tolist())]


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
    """A row of values as texts; the last two, the pushes, with their direction."""
    cells = [f"{value:z.2f}" for value in row[:-2]]
    for push in row[-2:]:
        arrow = "▲" if push > 0.005 else "▼" if push < -0.005 else " "
        cells.append(f"{arrow}{push:z.2f}")
    return cells


def plain(text):
    """A text without what a terminal would obey."""
    return repr(text)[1:-1]


def show(chat, episode, texts, names, rows):
    """Print the episode: what the environment said is dim, a sampled token has a line, green where
    its gap is positive."""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    narrow = shutil.get_terminal_size().columns < 80
    room = 10 if narrow else 14
    shown = slice(2, None, 3) if narrow else slice(6)  # narrow: the gap and its push

    def say(code, text):
        print(f"\033[{code}m{text}\033[0m" if colour else text)

    def line(text, cells):
        start = f"{plain(text)[: room - 1]:<{room}}"
        return start + "".join(f"{cell:>11}" for cell in cells[shown])

    for name in ("task", "episode", "group", "skill", "again"):
        say(1, f"{name}: {plain(texts[name])}")
    say(1, line("", names))
    say(2, plain(texts["before"] + texts["after"]))
    for ids, row in pieces(episode, rows):
        text = chat.tokenizer.decode(ids)
        if row is None:
            say(2, plain(text))
        else:
            say(32 if row[2] > 0 else 31, line(text, cells_of(row)))


def fill(template, path, texts):
    """Write a page: a template of .assets with texts, which are HTML, in the place of {names}."""
    page = (TEMPLATES / template).read_text("utf-8")
    page = re.sub(r"\{(\w+)\}", lambda name: texts[name[1]], page)
    sdar.write_whole(path, page.replace("\0", "\ufffd"))
    print(f"\n{path}: the same, for a browser")


def write_page(path, chat, episode, texts, names, rows, wishes, beta):
    """The same as a web page without scripts, at most some 500 kB: each token coloured by its gap,
    its numbers where the mouse is, and the histogram of the episode's gaps."""
    tokens, wishes = [], iter(wishes)
    for ids, row in pieces(episode, rows):
        text = html.escape(chat.tokenizer.decode(ids))
        if row is None:
            tokens.append(f"<p>{text[:999]}</p>")
            continue
        numbers = ", ".join(f"{name} {cell}" for name, cell in zip(names, cells_of(row)))
        numbers += f"; the teacher's favourite: {html.escape(next(wishes))}"
        style = f"--d:{row[2]:.3f};--p:{row[3]:.3f}"
        tokens.append(f'<i tabindex="0" style="{style}" data-n="{numbers}">{text}</i>')

    filled = {name: html.escape(text[:20000]) for name, text in texts.items()}
    filled |= {"tokens": "".join(tokens[:1200]), "beta": f"{beta:g}"}
    filled["histogram"] = histogram([row[2] for row in rows[: sum(episode.mask)]])
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
    settings, _ = plots.read_run(folder)
    known = {f.name for f in sdar.fields(sdar.Config)}
    settings = {name: value for name, value in settings.items() if name in known}
    texts = {"run": html.escape(folder)}
    for when, model in (("start", settings["model"]), ("end", f"{folder}/checkpoint")):
        config = sdar.Config(**{**settings, "model": model, "resume": False, "overwrite": False})
        envs = sdar.make_envs(config)
        policy, chat = sdar.load_policy(config)
        starts = sdar.draw_starts(envs[0], config, np.random.default_rng([4, config.seed]))
        stream = (4, config.seed)
        episodes = sdar.rollout(policy, chat, envs, starts, config, stream, config.temperature)
        tokens = gaps_of(policy, episodes, config)
        won = sum(episode.won for episode in episodes) / len(episodes)
        mean = f"won {won:.2f} of {len(episodes)}, mean gap {tokens[:, 0].mean():z.3f} nats"
        print(f"\n{when}: {mean}")
        texts[f"{when}_mean"] = mean
        texts[f"{when}_histogram"] = histogram(tokens[:, 0])
        for name, column in (("turn", 3), ("position", 4)):
            rows = means_by(tokens, column)
            print_means(name, rows)
            texts[f"{when}_{name}"] = table_of(rows)
    fill("inspect-run.html", page, texts)


@torch.no_grad()
def gaps_of(model, episodes, config):
    """An array of (gap, KL(student || teacher), gate, turn, position in the turn), a row a sampled
    token; the KL is exact, over the whole vocabulary; turns and positions count from 1."""
    student = sdar.score(model, episodes, config)
    gap = sdar.score(model, episodes, config, with_skill=True) - student
    gate = torch.sigmoid(config.gate_beta * gap)
    exact = sdar.replace(config, method="sdar", distil="loss", divergence="reverse")
    rows = []
    for i, episode in enumerate(episodes):
        (kl,) = sdar.full_divergence(model, model, [episode], exact)
        turn, position, column = 0, 0, 0
        for before, sampled in itertools.pairwise([0, *episode.mask]):
            if not sampled:
                continue
            turn, position = (turn, position + 1) if before else (turn + 1, 1)
            values = [x.item() for x in (gap[i, column], kl[column], gate[i, column])]
            rows.append((*values, turn, position))
            column += 1
    return np.array(rows)


def means_by(tokens, column):
    """[(turns or positions, tokens, mean gap, mean KL, mean gate)], at most twelve rows."""
    found = []
    last = int(tokens[:, column].max())
    width = -(-last // 12)
    for first in range(1, last + 1, width):
        in_row = (tokens[:, column] >= first) & (tokens[:, column] < first + width)
        some = tokens[in_row]
        if len(some):
            name = f"{first}" if width == 1 else f"{first} to {first + width - 1}"
            found.append((name, len(some), *some[:, :3].mean(0)))
    return found


def print_means(name, rows):
    """The table of means_by, as text."""
    print(f"{name:>10}{'tokens':>10}{'gap':>10}{'KL':>10}{'gate':>10}")
    for number, tokens, *means in rows:
        print(f"{number:>10}{tokens:>10}" + "".join(f"{mean:>z10.3f}" for mean in means))


def table_of(rows):
    """The same, as HTML, with bars."""
    largest = max(max(abs(gap), kl) for *_, gap, kl, _ in rows) or 1.0
    lines = ""
    for number, tokens, gap, kl, gate in rows:
        cells = f"<td>{number}</td><td>{tokens}</td><td>{gate:.2f}</td>"
        for value, kind in ((gap, "gap"), (kl, "kl")):
            width = f"--w:{abs(value) / largest:.3f}"
            cells += f'<td class="{kind}"><u style="{width}"></u>{value:z.3f}</td>'
        lines += f"<tr>{cells}</tr>"
    return lines


if __name__ == "__main__":
    sys.exit(sdar.main(["inspect", *sys.argv[1:]]))
