"""Experiments of FINDINGS that are not the paper's, each from outside of sdar.py.

    python .lab/experiments/variants.py divergence:forward -- --gate none --sdar-coef 0.07
    python .lab/experiments/variants.py gate:shuffled teacher:ema skills:0.5 -- --seed 1
    python .lab/experiments/variants.py advantage:reverse_kl -- --sdar-coef 0.1
    python .lab/experiments/variants.py -- --gate reverse_kl --sdar-coef 0.1

In front of -- stand variants, in any order, behind it the flags of sdar.py:

    skills:SHARE      in this share of the groups the teacher reads the right skills, else those of
                      other task types
    retrieval:wrong   it never reads the right ones
    teacher:KIND[,N]  it is a copy that stays behind: lagged (made anew every N steps, 10), or ema
                      (moved by 1/N of the way before each step). Such a run cannot be resumed
    std:off           advantages are not divided by the deviation of their group
    advantage:KIND    distillation in PPO's advantage; KIND is the gate: gap, none, reverse_kl
    gate:KIND         gates of the moment of sampling: unchanged (own), or controls. What of them
                      does the work? Their mean (constant), their values, on whatever tokens
                      (shuffled), what is left without their mean (centred)
    divergence:KIND   of whole next-token distributions: reverse, forward, jsd
    sampling:T/P      episodes are sampled at temperature T from the likeliest tokens that have
                      together a probability of P, and scored at --temperature all the same
    practice:KIND     no teacher: groups that fail play again with the skill, which is kept in the
                      prompt (keep) or taken out before scoring (out). See practice.py

They become the step_batch, objective and skill_bank that train() takes; all else is sdar.py's.
"""

import copy
import math
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]
import practice
from practice import by_token

import sdar

sdar.GATES["reverse_kl"] = lambda gap, entropy, beta: gap  # the signed gradient of that KL
sdar.GATES["beta"] = lambda gap, entropy, beta: beta + 0 * gap  # what is handed in as beta
WORD = re.compile(
    r"skills:(0|1|0?\.\d+)|retrieval:wrong|teacher:(lagged|ema)(,[1-9]\d*)?|std:off"
    r"|advantage:(gap|none|reverse_kl)|gate:(own|constant|shuffled|centred)"
    r"|divergence:(reverse|forward|jsd)|practice:(keep|out)"
    r"|sampling:(\d*\.)?[1-9]\d*/(1|0?\.\d*[1-9])"
)

# --- What the teacher reads, and who it is -----------------------------------------------


def partly_wrong(share):
    """A class of skill banks that find right skills in this share of the groups, in the others as
    many wrong ones."""

    class PartlyWrong(sdar.SkillBank):
        def retrieve(self, task, task_type, seed):
            found = super().retrieve(task, task_type, seed)
            text = task.encode(errors="replace")
            if np.random.default_rng([seed, *text]).random() < share:
                return found
            typed = [skill for skill in self.skills if skill.task_types]
            wrong = [skill for skill in typed if task_type not in skill.task_types]
            rng = random.Random(f"{task}/{seed}".encode(errors="replace"))
            return rng.sample(wrong, min(len(wrong), max(1, len(found))))

    return PartlyWrong


@torch.no_grad()
def follow(teacher, model, kind, step):
    """Before a step's scoring, move a copy of the student to where the student is: a part of the
    way ("ema,20"), or all of it, every so many steps ("lagged,20")."""
    # Of what the student was n steps ago an ema keeps (1 - 1/refresh)^n: a memory of about
    # `refresh` steps.
    kind, refresh = f"{kind},10".split(",")[:2]
    if kind == "ema":
        for weight, target in zip(teacher.parameters(), model.parameters()):
            weight.lerp_(target, 1 / int(refresh))
    elif (step - 1) % int(refresh) == 0:
        teacher.load_state_dict(model.state_dict())


# --- Other values for the tokens of a step: {name: (N,)}, which take those of step_batch --


def std(kind, batch, episodes, config, step):
    """Advantages multiplied by the deviations again."""
    rewards = [one.reward - config.invalid_penalty * one.invalid for one in episodes]
    groups = torch.tensor(rewards, dtype=torch.float64).view(-1, config.group_size)
    deviations = (groups.std(1) + 1e-6).repeat_interleave(config.group_size)
    return {"advantages": batch["advantages"] * by_token(deviations, episodes).to(batch["old"])}


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
        gate = gate[torch.randperm(len(gate), generator=generator).to(gate.device)]
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

    It holds (N, V) values of both at once: a language model needs a small --micro-batch."""
    readers = []
    for reader, with_skill in ((model, False), (teacher, True)):
        views = [episode.view(with_skill) for episode in episodes]
        ids, mask = (sdar.padded(rows, model.device) for rows in zip(*views))
        with sdar.forward_dtype(model, config), torch.set_grad_enabled(not with_skill):
            logits = reader(input_ids=ids, use_cache=False).logits[:, :-1][mask[:, 1:].bool()]
        readers.append(torch.log_softmax(logits.float() / config.temperature, -1))
    taught = by_token([bool(episode.skill_ids) for episode in episodes], episodes)
    return taught.to(model.device) * between(*readers, kind)


# --- All of them -------------------------------------------------------------------------


def hooks(words):
    """What sdar.train takes to run these variants, a dict; for one run, since a copied teacher is
    kept in it. UserError for words that are none."""
    for word in words:
        sdar.require(WORD.fullmatch(word), f"{word!r} is no variant, --help names them")
    kinds = dict(word.split(":") for word in words)
    sdar.require(len(kinds) == len(words), f"{' '.join(words)}: each variant once")
    kept = {}  # copies of models

    def step_batch(model, start, teacher, episodes, config, step, *rest):
        if "teacher" in kinds:
            teacher = kept["copy"] = kept.get("copy") or copy.deepcopy(model)
            follow(teacher, model, kinds["teacher"], step)
        if "divergence" in kinds:  # from the teacher of now, also when the student has moved
            kept["now"] = copy.deepcopy(teacher)
        batch = practice.step_batch(kinds, model, start, teacher, episodes, config, step, *rest)
        for change in (std, advantage, gate):
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
            loss = terms["gate"] * full_divergence(model, kept["now"], episodes, config, kind)
            terms["loss"] = terms["loss"] + config.sdar_coef * (loss - terms["sdar_loss"])
            terms["sdar_loss"] = loss
        return terms

    bank = partly_wrong(0 if "retrieval" in kinds else float(kinds.get("skills", 1)))
    return {"step_batch": step_batch, "objective": objective, "skill_bank": bank}


def check(words, config):
    """UserError where a run with these settings would ignore a variant, or lose its teacher."""
    names = {word.split(":")[0] for word in words}
    losses = names & {"advantage", "gate", "divergence"}
    own_gate = losses - {"divergence"} and config.gate != "gap"
    for wrong, message in (
        (losses and config.distil != "gate", f"--method {config.method}: it has no gate"),
        (own_gate, f"--gate {config.gate}: {', '.join(losses)} brings its own"),
        ("practice" in names and config.distil != "none", "practice has no teacher: --method grpo"),
        ("advantage" in names and len(losses) > 1, "advantage: not with gate or divergence"),
        ("teacher" in names and config.teacher != "live", "--teacher: the variant is another"),
        ("teacher" in names and config.resume, "--resume: its copy was not kept, --overwrite"),
    ):
        sdar.require(not wrong, message)


def main(argv):
    """Train with variants. Returns the exit code."""

    def command():
        usage = "python .lab/experiments/variants.py VARIANT ... -- [flags of sdar.py]"
        parser = sdar.make_parser(usage, description=__doc__)
        parser.add_argument("words", nargs="*", help="variants, see above")
        given = vars(parser.parse_args([word for word in argv if word != "--"]))
        words = given.pop("words", [])
        config = sdar.configure(**given)
        check(words, config)
        sdar.train(config, **hooks(words))

    return sdar.run(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
