"""What is not the paper's, each from outside of sdar.py: the experiments of FINDINGS.

    python .lab/experiments/variants.py divergence:forward -- --gate none --sdar-coef 0.07
    python .lab/experiments/variants.py gate:shuffled teacher:ema skills:0.5 -- --seed 1
    python .lab/experiments/variants.py advantage:reverse_kl -- --sdar-coef 0.1
    python .lab/experiments/variants.py practice:out -- --method grpo

Variants stand in front of --, in any order; behind it stand the flags of sdar.py:

    skills:SHARE      in this share of the groups the teacher reads the right skills, else those of
                      other task types
    retrieval:wrong   it never reads the right ones
    teacher:KIND      it is a copy that stays behind: lagged (made anew every 10 steps), or ema
                      (moved a tenth of the way before each step). Such a run cannot be resumed
    std:off           advantages are not divided by the deviation of their group
    advantage:KIND    distillation in PPO's advantage: the gate (gap), or the gap (reverse_kl)
    gate:KIND         gates fixed when the tokens were sampled: unchanged (own), or controls:
                      their mean (constant), their values on random tokens (shuffled), their
                      values less their mean (centred)
    divergence:KIND   of whole next-token distributions: reverse, forward, jsd
    sampling:T/P      episodes are sampled at temperature T from the likeliest tokens that have
                      together a probability of P, and scored at --temperature all the same
    practice:KIND     no teacher: groups that fail play again with the skill, which is kept in the
                      prompt (keep) or taken out before scoring (out)

They become the step_batch, objective and skill_bank that train() takes; all else is sdar.py's.
"""

import copy
import math
import random
import re
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import sdar
from envs import require

sdar.GATES["reverse_kl"] = lambda gap, entropy, beta: gap  # the signed gradient of that KL
sdar.GATES["beta"] = lambda gap, entropy, beta: beta + 0 * gap  # what is handed in as beta
WORD = re.compile(  # without commas: compare.py has them between the values of a sweep
    r"skills:(0|1|0?\.\d+)|retrieval:wrong|teacher:(lagged|ema)|std:off"
    r"|advantage:(gap|reverse_kl)|gate:(own|constant|shuffled|centred)"
    r"|divergence:(reverse|forward|jsd)|practice:(keep|out)"
    r"|sampling:\d*\.?\d*[1-9]\d*/(1|0?\.\d*[1-9])"
)
NEEDS = {  # {variant: the settings without which it would do nothing, or lose its teacher}
    "teacher": {"teacher": "live", "resume": False},
    "advantage": {"distil": "gate", "gate": "gap"},
    "gate": {"distil": "gate", "gate": "gap"},
    "divergence": {"distil": "gate"},
    "practice": {"distil": "none", "skilled": False},
}

# --- What the teacher reads, and who it is -----------------------------------------------


def bank_of(kinds):
    """The class of skill banks of these variants."""
    share = 0 if "retrieval" in kinds else float(kinds.get("skills", 1))

    class Bank(sdar.SkillBank):
        def retrieve(self, task, task_type, seed):
            found = super().retrieve(task, task_type, seed)
            rng = random.Random(f"{seed} {task}".encode(errors="replace"))
            if rng.random() < share:
                return found
            others = [skill for skill in self.skills if skill.task_types]
            wrong = [skill for skill in others if task_type not in skill.task_types]
            rng.shuffle(wrong)
            return wrong[: max(1, len(found))]  # as many, if there are so many

    return Bank


@torch.no_grad()
def follow(teacher, model, kind, step):
    """The copy of the student that reads the skill in this step: made anew every ten steps, or
    moved a tenth of the way: of what it was itself n steps ago it then keeps 0.9^n."""
    if step == 1 or (kind == "lagged" and step % 10 == 1):
        return copy.deepcopy(model)
    for weight, target in zip(teacher.parameters(), model.parameters()):
        weight.lerp_(target, (kind == "ema") / 10)
    return teacher


# --- Other values for the tokens of a step: {name: (N,)}, which take those of step_batch --


def by_token(values, episodes, like):
    """A number for each episode as one for each of its tokens, (N,), as this tensor is."""
    lengths = torch.tensor([len(episode.logprobs) for episode in episodes])
    return values.flatten().repeat_interleave(lengths).to(like)


def std(kind, batch, episodes, config, step):
    """Advantages multiplied by the deviations again."""
    deviations = sdar.rewards_of(episodes, config).std(1, keepdim=True) + 1e-6
    factors = by_token(deviations.expand(-1, config.group_size), episodes, batch["old"])
    return {"advantages": batch["advantages"] * factors}


def advantage(kind, batch, episodes, config, step):
    """A + lambda w under PPO's ratio and clip, as trainers elsewhere distil. w is the gap itself
    for "reverse_kl", else the gate less its mean: a mean pushes nowhere on average, and would only
    add noise."""
    # Under the clip a token that has moved by eps is left alone until it is sampled again. A loss
    # of its own has no such stop.
    weight = sdar.GATES[kind](batch["teacher"] - batch["old"], None, config.gate_beta)
    if kind != "reverse_kl":
        weight = weight - weight.mean()
    return {"advantages": config.policy_coef * batch["advantages"] + config.sdar_coef * weight}


def gate(kind, batch, episodes, config, step):
    """Gates for all optimiser steps of a step. Less its mean the gate has the same expected
    gradient (up to 1/batch) with less noise, and negative weights."""
    gate = torch.sigmoid(config.gate_beta * (batch["teacher"] - batch["old"]))
    if kind == "constant":
        gate = gate.mean().expand_as(gate)
    if kind == "centred":
        gate = gate - gate.mean()
    if kind == "shuffled":
        generator = torch.Generator().manual_seed(config.seed + 1000 * step)
        gate = gate[torch.randperm(len(gate), generator=generator)]
    return {"gate": gate}


# --- Divergences of all tokens, not of the sampled one alone -----------------------------


def between(student, teacher, kind):
    """Of log-distributions (..., V): "reverse", KL(student || teacher), which the sampled form
    estimates; "forward", KL(teacher || student), which also teaches what the student never samples;
    "jsd", between the two."""
    if kind == "jsd":
        middle = torch.logaddexp(student, teacher) - math.log(2)
        return (between(student, middle, "reverse") + between(teacher, middle, "reverse")) / 2
    if kind == "forward":
        student, teacher = teacher, student
    return (student.exp() * (student - teacher)).sum(-1)


def full_divergence(model, teacher, episodes, config, kind):
    """between() the distributions from which the sampled tokens were drawn, (N,), as student and
    teacher see them; 0 where nobody has a skill. The gradient goes through the student.

    It holds all logits of both at once: a language model needs a small --micro-batch."""
    readers = []
    for reader, with_skill in ((model, False), (teacher, True)):
        views = [episode.view(with_skill) for episode in episodes]
        ids, mask = (sdar.padded(rows, model.device) for rows in zip(*views))
        with sdar.forward_dtype(model, config), torch.set_grad_enabled(not with_skill):
            logits = reader(input_ids=ids, use_cache=False).logits
        logits = logits[:, :-1][mask[:, 1:].bool()]
        readers.append(torch.log_softmax(logits.float() / config.temperature, -1))
    values = between(*readers, kind)
    taught = torch.tensor([bool(episode.skill_ids) for episode in episodes])
    return by_token(taught, episodes, values) * values


# --- A step's tasks, played again --------------------------------------------------------
#
# Practice instead of imitation (arXiv 2609.29051, in kind) has no teacher: the reward alone
# teaches. A group of which less than a quarter has won plays again, and now the student reads the
# skill. These guided episodes are trained on, too; in the log they count as any other.
#
# keep  The skill stays in their prompt, and they are a group of their own. If all of them win, as
#       with a good skill, the group is flat, and teaches nothing.
# out   The skill is taken out of their prompt before they are scored, and the guided and the plain
#       tries of a task have one baseline. What was done with the skill becomes likelier without it.
#       Nobody sampled it so: the ratio begins with 1 all the same.


@lru_cache(1)
def chat_of(model):
    """The Chat of a model."""
    return sdar.load_policy(sdar.configure(model=model, device="cpu"))[1]


def play_again(model, episodes, rows, config, step, temperature, with_skill=False):
    """Play some rows of a step from their starts again. With the skill they are drawn anew."""
    envs = [episode.env for episode in episodes[: config.rollout_batch]]
    rng = np.random.default_rng([2, config.seed, step])  # as train() draws them
    drawn = sdar.draw_starts(envs[0], config, step, rng)
    starts = []
    for row in rows:
        task, seed, (stream, *numbers) = drawn[row]
        starts.append((task, seed, (5 if with_skill else stream, *numbers)))
    chat = chat_of(config.model)
    return sdar.rollout(model, chat, envs, starts, config, temperature, with_skill)


def take_as_scored(model, episodes, config):
    """Replace the sampler's log-probs by those that are scored. The check of drift asks for ids and
    places, and not for a mismatch that an experiment is about."""
    scored = iter(sdar.score(model, episodes, config).tolist())
    for episode in episodes:
        episode.logprobs = [next(scored) for _ in episode.logprobs]


def sample_otherwise(kind, model, episodes, config, step):
    """All episodes are played again, by another sampler."""
    from transformers import TopPLogitsWarper  # here, since it takes seconds

    temperature, top_p = map(float, kind.split("/"))
    warp = TopPLogitsWarper(top_p)  # the fewest tokens that have together that probability

    def likeliest(model, inputs, output):
        output.logits = warp(None, output.logits[:, -1].float() / temperature)[:, None]

    with model.register_forward_hook(likeliest):  # scoring asks for states, and does not pass here
        rows = range(len(episodes))
        episodes[:] = play_again(model, episodes, rows, config, step, 1.0, config.skilled)
    take_as_scored(model, episodes, config)


def failed(episodes, config):
    """Numbers of a step's plain groups of which less than a quarter has won."""
    won = torch.tensor([episode.won for episode in episodes]).view(-1, config.group_size)
    return torch.where(won[: config.tasks_per_step].float().mean(1) < 1 / 4)[0]


def practise(kind, model, episodes, config, step):
    """Add guided episodes to those of a step."""
    rows = torch.arange(len(episodes)).view(-1, config.group_size)
    rows = rows[failed(episodes, config)].flatten().tolist()
    again = play_again(model, episodes, rows, config, step, config.temperature, with_skill=True)
    if kind == "out" and again:
        for row, guided in zip(rows, again):
            length = guided.mask.index(1) - episodes[row].mask.index(1)
            skill = slice(guided.skill_at, guided.skill_at + length)
            del guided.ids[skill], guided.mask[skill]
        take_as_scored(model, again, config)
    episodes += again


def practice(kind, batch, episodes, config, step):
    """Without the skill, the plain and the guided tries of a task have one baseline."""
    plain = config.tasks_per_step
    rewards = sdar.rewards_of(episodes, config)
    advantages = sdar.group_advantages(rewards)
    groups = failed(episodes, config)
    if kind == "out":
        tries = torch.cat([rewards[groups], rewards[plain:]], 1)  # (groups that failed, 2 G)
        advantages[groups], advantages[plain:] = sdar.group_advantages(tries).chunk(2, 1)
    return {"advantages": by_token(advantages, episodes, batch["old"])}


# --- All of them -------------------------------------------------------------------------


def parse(words):
    """{variant: its kind}. UserError for words that are none."""
    for word in words:
        require(WORD.fullmatch(word), f"{word!r} is no variant: variants.py --help names them")
    kinds = dict(word.split(":") for word in words)
    require(len(kinds) == len(words), f"{' '.join(words)}: each variant once")
    return kinds


def check(words, config):
    """UserError for words that are no variants, or do not go together or with these settings."""
    kinds = parse(words)
    for name in kinds:
        for setting, value in NEEDS.get(name, {}).items():
            was = getattr(config, setting)
            needs = f"{name} needs {sdar.flag(setting)} {value}"
            require(was == value, f"{needs}, and here it is {was}")
    for pair in ("advantage gate", "advantage divergence", "practice std"):
        require({*pair.split()} - {*kinds}, f"{pair}: not together")


def hooks(words):
    """What sdar.train takes to run these variants, a dict; for one run, since copies of models are
    kept in it."""
    kinds = parse(words)
    copies = {}

    def step_batch(model, start_policy, teacher, episodes, config, step, *rest):
        if "teacher" in kinds:
            teacher = follow(copies.get("teacher"), model, kinds["teacher"], step)
            copies["teacher"] = teacher
        if "divergence" in kinds:  # from the teacher of now, also when the student has moved
            copies["now"] = copy.deepcopy(teacher)
        if "sampling" in kinds:
            sample_otherwise(kinds["sampling"], model, episodes, config, step)
        if "practice" in kinds:
            practise(kinds["practice"], model, episodes, config, step)
        batch = sdar.step_batch(model, start_policy, teacher, episodes, config, step, *rest)
        for change in (practice, std, advantage, gate):
            if change.__name__ in kinds:
                batch |= change(kinds[change.__name__], batch, episodes, config, step)
        return batch

    def objective(model, episodes, tokens, config):
        if "advantage" in kinds:
            config = replace(config, gate=kinds["advantage"], policy_coef=1.0, sdar_coef=0.0)
        if "gate" in kinds:
            config = replace(config, gate="beta", gate_beta=tokens["gate"])
        terms = sdar.objective(model, episodes, tokens, config)
        if "divergence" in kinds:  # instead of the gap
            kind = kinds["divergence"]
            loss = terms["gate"] * full_divergence(model, copies["now"], episodes, config, kind)
            terms["loss"] = terms["loss"] + config.sdar_coef * (loss - terms["sdar_loss"])
            terms["sdar_loss"] = loss
        return terms

    return {"step_batch": step_batch, "objective": objective, "skill_bank": bank_of(kinds)}


def main(argv):
    """Train with variants."""
    usage = "python .lab/experiments/variants.py VARIANT ... -- [flags of sdar.py]"
    parser = sdar.make_parser(usage, description=__doc__)
    parser.add_argument("words", nargs="*", help="variants, see above")
    given = vars(parser.parse_args([word for word in argv if word != "--"]))
    words = given.pop("words", [])
    config = sdar.configure(**given)
    check(words, config)
    if words:
        config.variant = sorted(words)  # is remembered, and compared when the run is resumed
    sdar.train(config, **hooks(words))


if __name__ == "__main__":
    sys.exit(sdar.run(main, sys.argv[1:]))
