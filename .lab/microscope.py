"""What one update would do to every token.

Plays a group of one training task and shows one of its episodes, in the terminal and as a web page:
for each sampled token the student's and the teacher's log-prob (and percent), the gap, the gate,
and the two pushes, which are what a first update multiplies the gradient of log pi with (above 0:
likelier).

    python .lab/microscope.py                              # a group that has won and lost
    python .lab/microscope.py --seed 6 --episode 5         # the task and the episode of your choice
    python .lab/microscope.py --run runs/toy-sdar-s0       # gaps of a batch, before and after a run
"""

import html
import itertools
import json
import math
import shlex
import sys
from functools import partial
from pathlib import Path
from string import Template

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "experiments")]
import player
import plots
import variants  # noqa: F401  a run may have one of its gates

import sdar
from envs import UserError, naming, require

TEMPLATES = sdar.HERE / ".assets"
TRIES = 30  # tasks that are played until a group has won and lost
COLUMNS = {  # {what is shown of a token: width of its column}
    "student": 15,
    "teacher": 15,
    "gap": 8,
    "gate": 6,
    "by reward": 10,
    "by teacher": 11,
}


def main(argv):
    """Play a group and show one of its episodes; or two batches, with --run."""
    parser = sdar.make_parser("python .lab/microscope.py [flags]", description=__doc__)
    more = parser.add_argument
    more("--episode", type=int, default=None, help="which of the group [the first that won]")
    more("--page", default="inspect.html", help="file of the web page [%(default)s]")
    more("--run", default="", help="a run's folder: gaps of a batch, by its first policy and last")
    given = vars(parser.parse_args(argv))
    number, page, run = (given.pop(name) for name in ("episode", "page", "run"))
    plots.check_file("--page", page, [".html"])
    if run:
        clash = ", ".join(map(sdar.flag, given))
        require(not clash, f"--run takes its settings from the run, and no {clash}")
        return show_run(run, page)

    config = sdar.configure(**given)
    gated = config.distil == "gate"
    require(gated, f"the microscope shows the gate, and --method {config.method} has none")
    known = range(config.group_size)
    fine = number in (None, *known)
    require(fine, f"--episode {number}: a group has episodes 0 to {known[-1]}")

    envs = sdar.make_envs(config)
    model, chat = sdar.load_policy(config)
    tries = 1 if "seed" in given else TRIES
    (task, seed), group = play_group(model, chat, envs, config, tries)
    if number is None:
        number = max(known, key=lambda i: group[i].won)

    lengths = [len(episode.logprobs) for episode in group]
    rows = dissect(model, group, config).split(lengths)
    texts = describe(chat, group, number, rows)
    for flag, value in (("--seed", seed), ("--episode", number)):
        if flag not in argv:
            argv = [*argv, flag, str(value)]
    texts["again"] = "python .lab/microscope.py " + shlex.join(argv)

    episode = group[number]
    episode.env.reset(task, seed)
    wishes = favourites(model, chat, episode, config)
    parts = parts_of(chat, episode, zip(rows[number].tolist(), wishes))
    show(texts, parts)
    texts["beta"] = f"{config.gate_beta:g}"
    write_page(page, texts, parts, " " if chat.plain else "")


def play_group(model, chat, envs, config, tries):
    """Episodes of the training task that the seed chooses; with more tries those of the next seeds,
    until a group has won and lost. Returns (task, seed) and the group."""
    tasks = envs[0].tasks("train")
    for seed in range(config.seed, config.seed + tries):
        task = tasks[seed % len(tasks)]
        starts = [(task, seed, (4, seed, i)) for i in range(config.group_size)]
        group = sdar.rollout(model, chat, envs, starts, config, config.temperature)
        if len({episode.won for episode in group}) == 2:
            break
    return (task, seed), group


@torch.no_grad()
def dissect(model, group, config):
    """What COLUMNS names, of the sampled tokens of a group: (N, 6). The sum of the two pushes is
    minus the loss's gradient: a test compares them."""
    batch = sdar.step_batch(model, model, model, group, config, step=1)
    terms = sdar.objective(model, group, batch, config)
    by_reward = config.policy_coef * batch["advantages"]
    by_teacher = config.sdar_coef * terms["gate"]
    columns = [batch["old"], batch["teacher"], terms["gap"], terms["gate"], by_reward, by_teacher]
    return torch.stack(columns, 1)


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
            found.append(f"{text} {100 * share:.1f} %")
    return found


def describe(chat, group, number, rows):
    """The texts around the tokens: {name: text}. rows: values of the tokens of each episode."""
    decode, episode = chat.tokenizer.decode, group[number]
    outcomes = []
    for other, values in zip(group, rows):
        outcome = "won" if other.won else "lost"
        outcomes.append(f"{outcome} {values[0, 4]:+.2f}")
    at, begin = episode.skill_at, episode.mask.index(1)
    return {
        "task": episode.task,
        "episode": f"{number}: {outcomes[number]}",
        "group": ", ".join(outcomes),
        "skill": decode(episode.skill_ids).strip(),
        "before": decode(episode.ids[:at]),
        "after": decode(episode.ids[at:begin]),
    }


def parts_of(chat, episode, rows):
    """The episode from its first response on, a list of (text, row): of a sampled token with the
    next of rows, of what the environment said with None. What it said at the end no episode has:
    its environment, which stands at the start, is played once more."""
    decode, env, parts = chat.tokenizer.decode, episode.env, []
    begin = episode.mask.index(1)
    pairs = zip(episode.ids[begin:], episode.mask[begin:])
    for sampled, run in itertools.groupby(pairs, lambda pair: pair[1]):
        ids = [i for i, _ in run]
        if not sampled:
            parts.append((decode(ids), None))
            continue
        parts += [(decode([i]), next(rows)) for i in ids]
        action, _ = env.parse(decode(ids, skip_special_tokens=True))
        observation, *_ = env.step(action)
    return [*parts, (observation, None)]


def cells_of(row):
    """A row of values as texts: of a log-prob with its percent."""
    percents = [f"{value:z.2f} {100 * math.exp(value):5.1f} %" for value in row[:2]]
    return percents + [f"{value:z.2f}" for value in row[2:]]


def show(texts, parts):
    """Print the episode, a line a sampled token."""
    for name in ("task", "episode", "group", "skill", "again"):
        player.say(f"{name}: {texts[name]}")
    player.say(texts["before"] + texts["after"])
    show_row("log-probs of", COLUMNS)
    for text, row in parts:
        if row:
            show_row(text, cells_of(row[0]))
        else:
            player.say(text)


def show_row(text, cells):
    """Print a token and its values. One that is too long for its column has a line of its own."""
    text = repr(text)[1:-1]  # a line break is seen, and a terminal obeys nothing
    if len(text) > 14:
        text += "\n" + " " * 14
    print(f"{text:<14}" + "".join(map(str.rjust, cells, COLUMNS.values())))


def fill(template, path, texts):
    """Write a page: a template of .assets with texts, which are HTML, in the place of $names."""
    page = Template((TEMPLATES / template).read_text("utf-8"))
    Path(path).write_text(page.substitute(texts), "utf-8")
    print(f"\n{path}: the same, for a browser")


def write_page(path, texts, parts, between):
    """The same as a web page without scripts, at most some 500 kB: each token coloured by its gap,
    its numbers where the mouse is, and the histogram of the episode's gaps. between: two tokens."""
    tokens, gaps = [], []
    for text, row in parts:
        text = html.escape(text)
        if row is None:
            tokens.append(f"<p>{text}</p>")
            continue
        row, favourite = row
        numbers = [f"{name} {cell}; " for name, cell in zip(COLUMNS, cells_of(row))]
        numbers = html.escape("".join(numbers) + f"the teacher's favourite {favourite}")
        style = f"--d:{row[2]:.3f};--p:{row[3]:.3f}"
        tokens.append(f'<i tabindex="0" style="{style}" data-n="{numbers}">{text}</i>')
        gaps.append(row[2])

    filled = {name: html.escape(text) for name, text in texts.items()}
    filled["tokens"] = between.join(tokens[:1200])
    filled["histogram"] = histogram(gaps)
    fill("inspect.html", path, filled)


def histogram(gaps):
    """The bars of a histogram of gaps from -3 to 3 nats, as HTML: shares, so that two histograms
    have one scale."""
    counts, edges = np.histogram(np.clip(gaps, -3, 3), 25, (-3, 3))
    bars = ""
    for count, gap in zip(counts, edges + 0.12):
        share = count / len(gaps)
        bars += f'<b style="--d:{gap:z.2f};--n:{share:.3f}" title="{count}"></b>'
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
        turns, positions, *values = gaps_of(policy, episodes, config)

        n = len(episodes)
        won = sum(episode.won for episode in episodes)
        mean = f"won {won} of {n} ({100 * won / n:.1f} %), mean gap {values[0].mean():z.3f} nats"
        tables = means_of("turn", turns, values)
        tables += "\n\n" + means_of("place", positions, values)
        print(f"\n{when}: {mean}\n{tables}")
        texts[f"{when}_mean"] = mean
        texts[f"{when}_tables"] = tables
        texts[f"{when}_histogram"] = histogram(values[0])
    fill("inspect-run.html", page, texts)


def settings_of(folder):
    """The Config of a run, for the machine that it is looked at on."""
    here = {"device": "", "kernel": False, "resume": False, "overwrite": False}
    with naming(f"--run {folder} holds no run that can be read", UserError):
        settings = json.loads(Path(folder, "config.json").read_text("utf-8"))
        require(Path(folder, "checkpoint").is_dir(), "it has no checkpoint yet")
        return sdar.configure(**settings | here)


def gaps_of(model, episodes, config):
    """Five rows: turn, position in the turn, gap, KL(student || teacher) and gate of each sampled
    token; the KL is exact, over the whole vocabulary; turns and positions count from 1."""
    student = sdar.score(model, episodes, config)
    gap = sdar.score(model, episodes, config, with_skill=True) - student
    gate = sdar.GATES["gap"](gap, None, config.gate_beta)
    turns, positions, kl = [], [], []
    for episode in episodes:
        mask = np.array(episode.mask)
        turn = (np.diff(mask, prepend=0) > 0).cumsum()[mask > 0]
        turns += turn.tolist()
        begin = np.searchsorted(turn, turn)  # where in this list its turn begins
        positions += (np.arange(len(turn)) - begin + 1).tolist()
        readers = [next_logprobs(model, episode, config, skilled) for skilled in (False, True)]
        for ours, theirs in zip(*readers):
            kl += (ours.exp() * (ours - theirs)).sum(-1).tolist()
    return np.array([turns, positions, gap.tolist(), kl, gate.tolist()])


def means_of(name, places, values):
    """A table, as text, of mean gap, KL and gate by turn or position, at most twelve rows. The bar
    is the gap's size: a mark is half a nat, whatever the table."""
    width = math.ceil(places.max() / 12)
    table = "".join(f"{title:>8}" for title in (name, "tokens", "gap", "KL", "gate"))
    for first in range(1, int(places.max()) + 1, width):
        last = first + width - 1
        chosen = (first <= places) & (places <= last)
        means = [value[chosen].mean() for value in values]
        cells = [f"{first}-{last}" if width > 1 else first, chosen.sum()]
        cells += [f"{mean:z.3f}" for mean in means]
        table += "\n" + "".join(f"{cell:>8}" for cell in cells)
        marks = round(2 * min(3, abs(means[0])))
        table += "  " + "▪" * marks
    return table


if __name__ == "__main__":
    sys.exit(sdar.run(partial(main, sys.argv[1:])))
