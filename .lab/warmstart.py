"""How the tiny policy was made: a network of 309 thousand parameters imitates a scripted player.

    python sdar.py warmstart                    # into .assets/tiny-policy, in some minutes
    python sdar.py warmstart --folder elsewhere --steps 300
    python sdar.py warmstart --model Qwen/Qwen2.5-0.5B-Instruct --out FOLDER    # any language model

Reinforcement learning needs a policy that sometimes wins, and SDAR one that can read a skill. For a
language model pretraining has done both. Here imitation does. Every demonstration is played in a
household of its own, drawn at random. So the weights can learn the format of actions, how to
explore, and to believe what a skill says; but not where this toy's household keeps its mugs. That
is left to learn.

Then the policy is played with and without skills: it should win nearly always, and seldom.

A language model imitates the same player in its own chat template, with tags, examples, and the
list of actions: what --env toy shows it. Only what the player says is learned, not the world.
"""

import hashlib
import json
import math
import random
import re
import shutil
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sdar
from envs import APPLIANCES, CLASSES, TASK_TEXT, Household, ToyEnv, skill_text

WARMSTART = 1  # raise it with every change of how the policy is trained: it is part of the recipe
BATCH = 32  # demonstrations a step

# --- 1. The scripted player --------------------------------------------------------------


def scripted_action(env, known, rng):
    """The next action of a sensible player of a running ToyEnv episode.

    known: names of the skills that the player has read, a set; empty: a newcomer who explores. The
    player uses these facts, what it has seen in this episode, and nothing else. rng: a
    random.Random for free choices."""
    house = env.household
    storages = house.storages
    wanted = env.goal_class

    # It carries something else, picked up by a random action: put it away.
    if env.hand is not None and not is_of(env.hand, wanted):
        place = env.where if env.where in storages else rng.choice(storages)
        return way_to(env, place) or f"put {env.hand}"

    # It carries nothing: take the thing that is wanted, but not one that was already brought.
    if env.hand is None:
        brought_to = env.target if env.kind == "two" else None
        if env.where in env.opened and env.where != brought_to:
            things = [thing for thing in env.contents[env.where] if is_of(thing, wanted)]
            if things:
                return f"take {things[0]}"
        return look_for(env, wanted, house.home[wanted], wanted in known, rng, brought_to)

    # It carries what is wanted: to the lamp, to an appliance, or to its target.
    if env.kind == "look":
        if env.where == house.lamp:
            return "use desklamp 1"
        return look_for(env, "desklamp", house.lamp, "lamp" in known, rng) or "use desklamp 1"
    if env.kind in APPLIANCES and (env.kind, env.hand) not in env.done_to:
        untried = [place for place in APPLIANCES[env.kind] if place not in env.broken]
        likely = [house.appliance[env.kind]] if env.kind in known else untried
        place = env.where if env.where in untried else rng.choice(likely)
        return way_to(env, place) or f"{env.kind} {env.hand}"
    return way_to(env, env.target) or f"put {env.hand}"


def is_of(thing, name):
    """True if a thing is of a class: "mug 1" is of "mug"."""
    return thing.startswith(name + " ")


def way_to(env, place):
    """The next action towards a place; None for who stands in front of it and it is open."""
    if env.where != place:
        return f"go to {place}"
    if place not in env.opened:
        return f"open {place}"
    return None


def look_for(env, name, home, known, rng, brought_to=None):
    """A step towards a thing of a class: to where one was seen, to its home if that is known, or to
    a place that was not seen yet. brought_to: the place that does not count."""
    # Who stands in front of something closed looks into it first, also who knows that the thing is
    # elsewhere: see "imitation gap" in FINDINGS.md.
    storages = env.household.storages
    if env.where in storages and env.where not in env.opened:
        return f"open {env.where}"

    for place in storages:
        if place in env.seen and place != brought_to:
            if any(is_of(thing, name) for thing in env.contents[place]):
                return way_to(env, place)
    if known and home not in env.seen:
        return way_to(env, home)
    unseen = [place for place in storages if place not in env.seen]
    return way_to(env, rng.choice(unseen or storages))


# --- 2. Demonstrations -------------------------------------------------------------------

SKILLED = 0.75  # share of episodes whose player has read the skills of its task
DISTRACTED = 0.3  # share in which skills of other tasks stand between them
TAKEOVER = 0.5  # share of these whose first turns (1 to 8 of 10) an explorer plays
NOISE = 0.05  # share of random actions: played, so that other states are seen, but not imitated
OBSERVATIONS = 0.2  # weight of an observation's tokens: knowing the world helps acting in it


class Habit(random.Random):
    """Random numbers of a player who takes the first of several choices in a `share` of cases. A
    policy that imitates it is surer of itself: its entropy is lower."""

    def __init__(self, seed, share):
        super().__init__(seed)
        self.share = share

    def choice(self, options):
        """The first of them, or one of all."""
        return options[0] if self.random() < self.share else super().choice(options)


TOY = ToyEnv()


def demonstration(chat, rng, habit=0.0, world=TOY):
    """One scripted episode in a fresh random household, as this chat's model reads it. rng:
    random.Random; habit: see Habit; world: a ToyEnv, which says how many places and turns there
    are. Returns (ids, weight of each id in the loss), lists.

    Some begin with turns of an explorer, which are not imitated: the teacher will have to judge
    states that the student got itself into."""
    tagged = not chat.whole_words
    household = Household.random(rng, world.household.closable)
    env = ToyEnv(household, max_turns=world.max_turns + (0 if tagged else 2))
    env.tagged = env.show_admissible = tagged
    kind = rng.choice(sorted(TASK_TEXT))
    task = rng.choice([task for task, goal in env.goals.items() if goal[0] == kind])
    observation, info = env.reset(task, rng.random())

    skills = skills_to_read(env, rng)
    known = {skill.name for skill in skills}
    explored_turns = 0
    if known and rng.random() < TAKEOVER:
        explored_turns = rng.randint(1, max(1, world.max_turns - 2))

    examples = env.examples if tagged else ()
    prompt, at = chat.first(env.instructions, sdar.as_read(observation, env, 1), examples)
    ids = prompt[:at] + chat.encode(skill_text(skills)) + prompt[at:]
    weights = [0.0] * len(ids)
    turn, over = 0, False
    player_rng = Habit(rng.random(), habit) if habit else rng
    while not over:
        explores = turn < explored_turns
        noisy = rng.random() < NOISE
        action = scripted_action(env, set() if explores else known, player_rng)
        if noisy:
            action = rng.choice(info["admissible"])
            action = re.sub(r" (from|in/on|with) .*", "", action)  # as short as the player's
        said = action
        if tagged:  # as the list has it
            whole = [one for one in info["admissible"] if f"{one} ".startswith(f"{action} ")]
            said = f"<action>{whole[0] if whole else action}</action>"
        observation, _, terminated, truncated, info = env.step(action)
        over = terminated or truncated
        turn += 1

        response = chat.encode(said) + [chat.end_id]
        imitated = 0.0 if explores or noisy else 1.0
        ids += response
        weights += [imitated] * len(response)
        if not over:
            between = chat.next(sdar.as_read(observation, env, turn + 1), ended=True)
            ids += between
            weights += [0.0 if tagged else OBSERVATIONS] * len(between)
    return ids, weights


def skills_to_read(env, rng):
    """The skills that a demonstration's player has read, in the order of its prompt."""
    relevant = [skill for skill in env.skills if skill.matches(env.task, env.kind)]
    skills = relevant if rng.random() < SKILLED else []
    if rng.random() < DISTRACTED:
        others = [skill for skill in env.skills if skill not in relevant]
        skills = skills + rng.sample(others, rng.randint(1, len(others)))
        rng.shuffle(skills)
    return skills


# --- 3. The tokenizer --------------------------------------------------------------------
#
# One token for each phrase and each thing of the toy's world: an episode has some 90. Articles and
# punctuation are dropped. What is not of this world becomes <unk>.

PHRASES = (
    *("You are in the middle of a room", "Your task is to", "put", "put it in", "put two"),
    *("clean", "heat", "cool", "look at", "under", "desklamp 1", "go to", "open", "take", "use"),
    *("look", "inventory", "in", "from", "in/on", "with", "is closed", "On", "In", "you see"),
    *("nothing", "You arrive at", "You pick up", "You put", "You clean", "You heat", "You cool"),
    *("You turn on", "You are carrying", "Nothing happens", "Skill", "is kept in", "is on"),
    *("Clean with", "Heat with", "Cool with"),
)
TOY_TEMPLATE = (  # no system message: what the toy's says was learned by imitation
    "{% for m in messages %}"
    "{% if m.role == 'user' %}<|user|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|assistant|>{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def toy_tokenizer(world=TOY):
    """The tiny policy's tokenizer, as a Hugging Face one: it has a word for each place of a ToyEnv,
    `world`."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    objects = [f"{name} {number}" for name in CLASSES for number in (1, 2)]
    words = {*PHRASES, *world.places, *CLASSES, *objects}
    words = sorted(words, key=lambda word: (-len(word), word))  # the longest that fits is taken
    ids = {word: i for i, word in enumerate(["<unk>", *words])}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))

    known = r"(?<!\w)(?:" + "|".join(map(re.escape, words)) + r")(?!\w)"
    other = r"(?<!\w)(?!(?:a|an|and|the|The)(?!\w))[^\s.,:]+"
    pattern = Regex(f"{known}|{other}")
    core.pre_tokenizer = pre_tokenizers.Split(pattern, "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        unk_token="<unk>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=TOY_TEMPLATE,
        whole_words=True,  # what is no word of this world is lost, and load_policy need not mind
    )


# --- 4. Training -------------------------------------------------------------------------


def recipe(chat, world=TOY):
    """Hash of what the tiny policy is made from: WARMSTART and sample demonstrations, in which the
    world, the scripted player, the skills, the tokenizer and the chat template show.

    The folder of the policy keeps it: a test says when the carried one is out of date."""
    rng = random.Random("recipe")
    demonstrations = [demonstration(chat, rng, world=world) for _ in range(32)]
    sample = [WARMSTART, len(chat.tokenizer), demonstrations]
    return hashlib.sha256(json.dumps(sample).encode()).hexdigest()


def new_policy(tokenizer):
    """A Qwen3 of two layers, with random weights."""
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return transformers.Qwen3ForCausalLM(config)


def make_optimizers(model):
    """Muon for the layers' matrices, AdamW for the rest. It matters: with AdamW alone the policy
    needs several times the steps before it reads the skill."""
    matrices, rest = [], []
    for name, weights in model.named_parameters():
        in_layer = "layers." in name and weights.ndim == 2
        (matrices if in_layer else rest).append(weights)
    muon = torch.optim.Muon(matrices, lr=0.05, weight_decay=0.01)
    adamw = torch.optim.AdamW(rest, lr=4e-3, betas=(0.9, 0.98), weight_decay=0.01)
    return muon, adamw


def imitation_loss(model, rows):
    """Mean cross-entropy of demonstrations, (ids, weights) pairs, by the weights of their ids."""
    ids = sdar.padded([ids for ids, _ in rows])  # (B, S)
    weights = sdar.padded([weights for _, weights in rows])[:, 1:]
    real = sdar.padded([[1] * len(ids) for ids, _ in rows])
    logits = model(input_ids=ids, attention_mask=real).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (losses * weights).sum() / weights.sum()


def warmstart(folder, chat, steps=900, habit=0.0, world=TOY):
    """Train the tiny policy by imitation and save it in `folder`, a Path. habit, world: see
    demonstration. Deterministic on one machine and PyTorch. OSError for a folder that cannot be
    written."""
    fresh = folder.with_name(f".{folder.name}-unfinished")
    fresh.mkdir(parents=True, exist_ok=True)  # cannot be written? say so now
    rng = random.Random(0)
    torch.manual_seed(0)
    model = new_policy(chat.tokenizer)
    optimizers = make_optimizers(model)

    def rate(step):
        """Up in 50 steps, then down along a cosine to a fiftieth."""
        cosine = math.cos(math.pi * step / steps)
        return min(1, (step + 1) / 50) * (0.51 + 0.49 * cosine)

    schedulers = [torch.optim.lr_scheduler.LambdaLR(each, rate) for each in optimizers]
    for _ in tqdm(range(steps), desc="warm start of the tiny policy", unit="step"):
        rows = [demonstration(chat, rng, habit, world) for _ in range(BATCH)]
        imitation_loss(model, rows).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for item in (*optimizers, *schedulers):
            item.step()
        model.zero_grad()
    save_policy(folder, fresh, model, chat, recipe(chat, world))


def imitate(model, chat, config):
    """Teach a language model the same, in place: AdamW, the mean log-prob of what the player says.
    A step's demonstrations are as many as the config's tasks times its group size."""
    rng = random.Random(config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.01)
    rows = range(config.tasks_per_step * config.group_size)
    with tqdm(range(config.steps), desc=f"imitation by {config.model}", unit="step") as progress:
        for step in progress:
            optimizer.param_groups[0]["lr"] = config.lr * min(1, (step + 1) / 10)
            episodes = []
            for ids, weights in (demonstration(chat, rng) for _ in rows):
                mask = [int(weight) for weight in weights]
                episodes.append(sdar.Episode("", "", 0, ids, mask, 0, [], []))
            tokens = max(1, sum(sum(episode.mask) for episode in episodes))
            total = 0.0
            model.train(config.gradient_checkpointing)
            for part in sdar.micro_batches(rows, episodes, config.micro_tokens):
                micro = [episodes[row] for row in part]
                logprobs, _ = sdar.response_logprobs(model, micro, config)
                loss = -logprobs.sum() / tokens
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            progress.set_postfix(loss=f"{total:.3f}")
    model.eval()


def save_policy(folder, fresh, model, chat, made_from):
    """Write the policy to `fresh`, which takes the place of `folder` when it is whole. made_from:
    its recipe."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(fresh)
    chat.tokenizer.save_pretrained(fresh)
    sums = sdar.hashes(fresh) | {"recipe": made_from}
    (fresh / "sums.json").write_text(json.dumps(sums, indent=1) + "\n")

    old = folder.with_name(f".{folder.name}-replaced")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def main(argv):
    """Make the tiny policy, or teach a language model, and play the held-out panel with it. Returns
    None."""
    about = "build the tiny policy again, in some minutes; or with --model teach a language model"
    where = {"type": Path, "default": sdar.TINY_FOLDER, "help": "of the tiny policy, replaced"}
    sure = {"type": float, "default": 0.0, "help": "share of the player's first choices [0]"}
    own = [("--folder", where), ("--habit", sure)]
    flags = sdar.parse_flags("warmstart", about, argv, own)
    folder, habit = flags.pop("folder"), flags.pop("habit")
    sdar.require(0 <= habit <= 1, f"--habit {habit}: a share, from 0 to 1")
    if flags.get("model", "tiny") != "tiny":
        sdar.require(not habit, "--habit is for the tiny policy's player, not for --model")
        return teach(flags)
    ours = (folder / "sums.json").is_file() or not folder.exists()
    above = next(place for place in folder.absolute().parents if place.exists())
    sdar.require(ours and above.is_dir(), f"--folder {folder}: something else is there")
    toy = {"model": str(folder), "preset": "toy", "device": "cpu"}
    config = sdar.Config(**{"steps": 900} | flags | toy)
    envs = sdar.make_envs(config)
    fine = isinstance(envs[0], ToyEnv)
    sdar.require(fine, f"--env {config.env}: the scripted player knows the toy alone")

    chat = sdar.Chat(toy_tokenizer(envs[0]))
    warmstart(folder, chat, config.steps, habit, envs[0])
    model, chat = sdar.load_policy(config)
    result = sdar.evaluate(model, chat, envs, config)
    sdar.print_success(str(folder), result)


IMITATION = {"steps": 200, "lr": 2e-5, "tasks_per_step": 8, "group_size": 2}


def teach(flags):
    """Imitation for a language model: a checkpoint in --out that `--model` takes."""
    sdar.require(flags.get("out"), "--out: the folder for the checkpoint")
    sdar.require(flags.get("env", "toy") == "toy", "--env: the scripted player knows the toy alone")
    config = sdar.Config(**{"preset": "small"} | IMITATION | flags)
    sdar.check_out(config)
    envs = sdar.make_envs(config)
    model, chat = sdar.load_policy(config)
    sdar.print_success("before", sdar.evaluate(model, chat, envs, config))
    imitate(model, chat, config)
    model.save_pretrained(config.out)
    chat.tokenizer.save_pretrained(config.out)
    sdar.print_success(config.out, sdar.evaluate(model, chat, envs, config))


if __name__ == "__main__":
    sys.exit(sdar.main(["warmstart", *sys.argv[1:]]))
