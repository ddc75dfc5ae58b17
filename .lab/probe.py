"""What does a policy know? How likely its first answer is the way to each place, class by class.

    python .lab/probe.py                              # the tiny policy, as it comes
    python .lab/probe.py --preset toy --model runs/toy-sdar-s0/checkpoint    # the end of a run
    python .lab/probe.py --steps 0,2,5,10,20,30,40,60 [flags of sdar.py]     # train, and look

Nothing is played and nothing is sampled: in front of "put an apple in ..." the policy could answer
"go to" each of the places, and every such answer has a probability. A row is a class of objects, a
column a place, a digit tenths of the probability; brackets stand around the class's home. The mean
over the homes is the diagonal. Beside it is what a policy would have there that takes no notice of
the class (blind): it knows where things are kept at all, and not which thing where.
"""

import itertools
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

LAB = Path(__file__).resolve().parent
sys.path[:0] = [str(LAB.parent), str(LAB / "experiments")]
import compare
import plots
import variants

import sdar
from envs import ToyEnv, UserError, naming, require


@torch.no_grad()
def matrix(model, chat, env, config, with_skill):
    """P(the first answer is "go to PLACE"), (classes, places), in front of a class's first task of
    the type put."""
    tasks = {goal[2]: task for task, goal in reversed(env.goals.items()) if goal[0] == "put"}
    form, end = ("go to {}", [chat.end_id]) if chat.plain else ("<action>go to {}</action>", [])
    episodes = []
    for name, place in itertools.product(env.household.home, env.storages):
        start = (tasks[name], 0, 0)
        episode = sdar.start_episode(chat, env, start, env.reset(tasks[name]), with_skill=False)
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
        seen[reader] = {"diagonal": round(known, 4), "blind": round(blind, 4), "percent": percent}
        print(f"\nstep {step}, {reader}: diagonal {known:.3f}, blind {blind:.3f}")
    show(env, percent)
    return seen


def order(env):
    """The columns as they are shown: the homes in the order of their classes, then the others."""
    return [*dict.fromkeys([*homes(env), *range(len(env.storages))])]


def show(env, percent):
    """Print a matrix."""
    heads = [env.storages[column] for column in order(env)]
    print(" " * 8 + "".join(f"{head[:2] + head.split()[-1]:>4}" for head in heads))
    for name, row, home in zip(env.household.home, percent, homes(env)):
        print(f"{name:<8}", end="")
        for column in order(env):
            tenths = ".123456789#"[(row[column] + 5) // 10]
            print(f" [{tenths}]" if column == home else f"  {tenths} ", end="")
        print()


def draw(env, looks, path):
    """The matrices of several steps beside each other, as a picture."""
    from matplotlib import pyplot

    grey = "#8b949e"  # is read on white and on black, as is an orange that lets the page through
    figure, axes = pyplot.subplots(1, len(looks), figsize=(2.4 * len(looks), 2), squeeze=False)
    for axis, seen in zip(axes[0], looks):
        shares = torch.tensor(seen["alone"]["percent"])[:, order(env)] / 100
        axis.imshow(torch.ones_like(shares), cmap="autumn", vmin=0, vmax=2, alpha=shares)
        axis.set_title(f"step {seen['step']}: {seen['alone']['diagonal']:.2f}", color=grey)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_color(grey)
    axes[0, 0].set_yticks(range(10), env.household.home, color=grey, fontsize=7)
    figure.savefig(path, transparent=True, bbox_inches="tight")


def trained(config, words, steps):
    """Train with variants, and look after some of the steps. Returns the looks."""
    hooks, looks, kept = variants.hooks(words), [], []
    step_batch, (_, chat) = hooks["step_batch"], sdar.load_policy(config)

    def looking(model, start, teacher, episodes, config, step, *rest):
        kept[:] = [model, chat, episodes[0].env, config]
        if step - 1 in steps:  # before a step's update as many are done
            looks.append(look(*kept, step - 1))
        return step_batch(model, start, teacher, episodes, config, step, *rest)

    sdar.train(config, **hooks | {"step_batch": looking})
    return [*looks, look(*kept, config.steps)]


def main(argv):
    """Look at a policy as it is, or while it is trained."""
    parser = sdar.make_parser("python .lab/probe.py [flags]", description=__doc__)
    parser.add_argument("--variant", default="", help="words of experiments/variants.py, with +")
    parser.add_argument("--json", default="", help="add what was seen to this file")
    parser.add_argument(
        "--picture", default="", help="draw the looks (matplotlib): .svg, .png, .pdf"
    )
    given = vars(parser.parse_args(argv))
    words, file, picture = (given.pop(name) for name in ("variant", "json", "picture"))
    words = [word for word in words.split("+") if word]
    with naming(f"--steps {given.get('steps')}: must be numbers like 0,2,5", UserError):
        steps = sorted({*map(int, given.pop("steps", "0").split(","))})
        require(steps[0] >= 0, "none is below 0")
    runs = {}
    if file:
        plots.check_file("--json", file, (".json",))
        with naming(f"--json {file} holds something else", UserError):
            runs |= json.loads(Path(file).read_text("utf-8")) if Path(file).exists() else {}
    if picture:
        plots.check_file("--picture", picture, (".svg", ".png", ".pdf"))
        require(find_spec("matplotlib"), "--picture: pip install matplotlib")
    config = sdar.configure(**{"eval_every": 0} | given, steps=steps[-1])
    variants.check(words, config)
    env = sdar.make_envs(config)[0]
    known = isinstance(env, ToyEnv)
    require(known, f"--env {config.env}: the probe knows the places of the toy alone")

    if config.steps:
        looks = trained(config, words, steps)
    else:
        looks = [look(*sdar.load_policy(config), env, config, 0)]
    if picture:
        draw(env, looks, picture)
    if file:
        runs[Path(config.out).name] = {
            "settings": vars(config) | {"variant": words},
            "made": compare.origin(config.device),
            "home": env.household.home,
            "places": env.storages,
            "looks": looks,
        }
        Path(file).write_text(json.dumps(runs) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(sdar.run(lambda: main(sys.argv[1:])))
