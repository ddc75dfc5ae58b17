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
import math
import sys
from dataclasses import replace
from pathlib import Path
from string import Template

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "experiments")]  # a run's env may be households:...
import player
import plots

import sdar
from envs import naming, require

SEEDS = range(30)  # of tasks that are played until a group has won and lost
COLUMNS = ("student", "teacher", "gap", "gate", "by reward", "by teacher")
ROW = "{:<14}{:>15}{:>15}{:>8}{:>6}{:>10}{:>11}"  # a token and its COLUMNS
HEAD = """
task: {task}
episode: {episode}
skill: {skill}
again: {again}
{before}{after}"""
TOKEN = '<i tabindex="0" style="--d:{:.3f};--p:{:.3f}" data-n="{}">{}</i>'  # gap, gate, numbers
BAR = '<b style="--d:{:z.2f};--n:{:.3f}"></b>'  # gap, its share of the tokens


def main(argv=None):
    """Play a group and show one of its episodes; or two batches, with --run."""
    parser = sdar.make_parser("python .lab/microscope.py [flags]", description=__doc__)
    more = parser.add_argument
    more("--episode", type=int, default=-1, help="which of the group [the first that won]")
    more("--page", default="inspect.html", help="file of the web page [inspect.html]")
    more("--run", default="", help="a run's folder: gaps of a batch, by its first policy and last")
    given = vars(parser.parse_args(argv))
    number, page, run = (given.pop(name) for name in ("episode", "page", "run"))
    plots.check_file("--page", page, [".html"])
    if run:
        require(not given, f"--run takes its settings from the run: leave out {' '.join(given)}")
        return show_run(run, page)

    config = sdar.configure(**given)
    gated = config.distil == "gate"
    require(gated, f"the microscope shows the gate, and --method {config.method} has none")
    size = config.group_size
    require(number < size, f"--episode {number}: a group has {size}, the first is 0")
    envs = sdar.make_envs(config)
    model, chat = sdar.load_policy(config)
    seeds = [config.seed] if "seed" in given else SEEDS
    task, seed, group = play_group(model, chat, envs, seeds, config)
    if number < 0:
        won = [episode.won for episode in group]
        number = won.index(max(won))

    episode = group[number]
    rows = dissect(model, group, config)[number]
    episode.env.reset(task, seed)
    parts = parts_of(chat, episode, rows)
    texts = describe(chat, group, number)
    texts["again"] = f"--seed {seed} --episode {number}"
    texts["beta"] = f"{config.gate_beta:g}"
    show(texts, parts)
    write_page(page, texts, parts)


def play_group(model, chat, envs, seeds, config):
    """A group of the training task that a seed chooses: of the first seed by which it has won and
    lost, else of the last. Returns the task, the seed and the episodes."""
    tasks = envs[0].tasks("train")
    for seed in seeds:
        task = tasks[seed % len(tasks)]
        starts = [(task, seed, (4, seed, i)) for i in range(config.group_size)]
        group = sdar.rollout(model, chat, envs, starts, config, config.temperature)
        if len({episode.won for episode in group}) == 2:
            break
    return task, seed, group


@torch.no_grad()
def dissect(model, group, config):
    """What COLUMNS names, of the sampled tokens of each episode of a group: (tokens, 6). The sum of
    the two pushes is minus the loss's gradient: a test compares them."""
    batch = sdar.step_batch(model, model, model, group, config, step=1)
    terms = sdar.objective(model, group, batch, config)
    by_reward = config.policy_coef * batch["advantages"]
    by_teacher = config.sdar_coef * terms["gate"]
    columns = [batch["old"], batch["teacher"], terms["gap"], terms["gate"], by_reward, by_teacher]
    lengths = [len(episode.logprobs) for episode in group]
    return torch.stack(columns, 1).split(lengths)


def parts_of(chat, episode, values):
    """The episode from its first response on, a list of (text, values): of a sampled token with its
    row of values, of what the environment said with None. No episode holds its last reply: so
    the environment, which stands at the start, is played once more."""
    decode = chat.tokenizer.decode
    parts = []
    begin = episode.mask.index(1)
    rest = iter(episode.ids[begin:])
    rows = iter(values.tolist())
    for sampled, turn in itertools.groupby(episode.mask[begin:]):
        ids = [next(rest) for _ in turn]
        if sampled:
            # As if it came twice: with a blank behind it, if decoding puts one between words.
            texts = [decode([i, i]).removesuffix(decode([i])) for i in ids]
            parts += zip(texts, rows)
            whole = ids[-1] in chat.end_ids or not chat.plain  # as in sdar.answer
            action, _ = episode.env.parse(decode(ids, skip_special_tokens=True) if whole else "")
            observation, *_ = episode.env.step(action)
        else:
            parts.append((decode(ids), None))
    return [*parts, (observation, None)]


def describe(chat, group, number):
    """The texts around the tokens of an episode: {name: text}."""
    decode = chat.tokenizer.decode
    episode = group[number]
    at = episode.skill_at
    begin = episode.mask.index(1)
    outcome = "won" if episode.won else "lost"
    won = sum(other.won for other in group)
    return {
        "task": episode.task,
        "episode": f"{number}, {outcome}; of its group {won} of {len(group)} won",
        "skill": decode(episode.skill_ids).strip(),
        "before": decode(episode.ids[:at]),
        "after": decode(episode.ids[at:begin]),
    }


def cells_of(values):
    """The values of a token as texts: of a log-prob with its percent."""
    percents = ["{:z.2f} {:5.1f} %".format(value, 100 * math.exp(value)) for value in values[:2]]
    return percents + [f"{value:z.2f}" for value in values[2:]]


def show(texts, parts):
    """Print the episode, a line a sampled token."""
    player.say(HEAD.format(**texts))
    print(ROW.format("log-probs of", *COLUMNS))
    for text, values in parts:
        if values:
            text = repr(text)[1:-1]  # a line break is seen, and not obeyed
            print(ROW.format(text, *cells_of(values)))
        else:
            player.say(text)


def write_page(path, texts, parts):
    """The same as a web page without scripts: each token coloured by its gap, its numbers where the
    mouse is, and the histogram of the episode's gaps."""
    tokens = ""
    gaps = []
    for text, values in parts:
        text = html.escape(text)
        if values:
            gap, gate = values[2:4]
            gaps.append(gap)
            numbers = "; ".join(map(" ".join, zip(COLUMNS, cells_of(values))))
            tokens += TOKEN.format(gap, gate, numbers, text)
        else:
            tokens += f"<p>{text}</p>"
    texts = {name: html.escape(text) for name, text in texts.items()}
    fill("inspect.html", path, texts | {"tokens": tokens, "histogram": histogram(gaps)})


def histogram(gaps):
    """The bars of a histogram of gaps from -3 to 3 nats, as HTML: shares, so that two histograms
    have one scale."""
    counts, edges = np.histogram(np.clip(gaps, -3, 3), 25, (-3, 3))
    return "".join(map(BAR.format, edges + 0.12, counts / len(gaps)))


def fill(template, path, texts):
    """Write a page: a template of .assets with texts, which are HTML, in the place of $names."""
    page = Template((sdar.HERE / ".assets" / template).read_text("utf-8"))
    Path(path).write_text(page.substitute(texts), "utf-8")
    print(f"\n{path}: the same, for a browser")


# --- A batch, before and after a run: the paper's Figures 2 and 3, in kind ----------------


def show_run(folder, page):
    """Gaps of a batch of tasks, played by a run's start policy and by its last one: their
    histogram, and means by turn and by place in a turn; as text and as a page."""
    settings, _ = plots.read_run(folder)
    # The run may be another machine's, and have a method, a gate or settings of its own.
    settings = {name: settings[name] for name in vars(sdar.Config()) if name in settings}
    here = {"device": "", "kernel": False, "method": "sdar", "gate": "gap"}
    with naming(f"--run {folder}"):
        config = sdar.configure(**settings | here)
    envs = sdar.make_envs(config)
    starts = sdar.draw_starts(envs[0], config, 0, np.random.default_rng([4, config.seed]))
    texts = {"run": html.escape(folder)}
    for when, path in (("start", config.model), ("end", f"{folder}/checkpoint")):
        model, chat = sdar.load_policy(replace(config, model=path))
        episodes = sdar.rollout(model, chat, envs, starts, config, config.temperature)
        turns, places, gaps = gaps_of(model, episodes, config)

        n = len(episodes)
        won = sum(episode.won for episode in episodes)
        said = f"won {won} of {n} ({won / n:.1%}), mean gap {gaps.mean():z.3f} nats\n"
        said += means_of("turn", turns, gaps, config.gate_beta)
        said += means_of("place", places, gaps, config.gate_beta)
        print(f"\n{when}: {said}")
        texts |= {when: said, f"{when}_histogram": histogram(gaps)}
    fill("inspect-run.html", page, texts)


def gaps_of(model, episodes, config):
    """Turn, place in the turn, and gap of each sampled token, (N,) each; turns and places count
    from 1."""
    gaps = sdar.score(model, episodes, config, with_skill=True)
    gaps -= sdar.score(model, episodes, config)
    turns = []
    places = []
    for episode in episodes:
        answers = [len([*run]) for sampled, run in itertools.groupby(episode.mask) if sampled]
        for turn, length in enumerate(answers, 1):
            turns += [turn] * length
            places += range(1, length + 1)
    return np.array(turns), np.array(places), gaps.cpu().numpy()


def means_of(name, places, gaps, beta):
    """A table, as text, of mean gap and gate by turn or place, at most twelve rows. A row may join
    several, from the number in front of it on. The bar is the gap's size: a mark is half a nat,
    whatever the table."""
    row = "{:>8}{:>8}{:>z8.3f}{:>z8.3f}  {}\n"
    table = f"\n{name:>8}  tokens     gap  σ(β Δ)\n"
    width = math.ceil(places.max() / 12)
    for first in range(1, places.max() + 1, width):
        chosen = gaps[(places - first) // width == 0]
        gap = chosen.mean()
        gate = (0.5 + 0.5 * np.tanh(beta * chosen / 2)).mean()
        table += row.format(first, len(chosen), gap, gate, "▪" * round(2 * min(3, abs(gap))))
    return table


if __name__ == "__main__":
    sys.exit(sdar.run(main))
