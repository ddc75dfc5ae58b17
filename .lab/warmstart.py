"""How the tiny policy was made: a network of 309 thousand parameters imitates a scripted player.

    python .lab/warmstart.py                          # into .assets/tiny-policy, in some minutes
    python .lab/warmstart.py --out elsewhere --steps 300
    python .lab/warmstart.py --model Qwen/Qwen2.5-0.5B-Instruct --out FOLDER    # any language model

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
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sdar
from envs import APPLIANCES, CLASSES, TASK_TEXT, Household, SkillBank, ToyEnv, is_a

WARMSTART = 1  # raise it with every change of how the policy is trained: it is part of the recipe
BATCH = 32  # demonstrations a step

# --- 1. The scripted player --------------------------------------------------------------


class Player:
    """A sensible player of one ToyEnv episode. It uses the skills that it has read, what it has
    seen in this episode, and nothing else. rng: a random.Random for free choices."""

    def __init__(self, env, rng):
        self.env = env
        self.rng = rng
        self.seen = set()  # places whose contents it has looked at
        self.broken = set()  # appliances that it has tried

    def act(self, observation, known):
        """The next action after an observation. known: names of skills, a set; empty: a newcomer
        who explores."""
        env, house, wanted = self.env, self.env.household, self.env.goal_class
        if env.where in env.opened:
            self.seen.add(env.where)
        if observation == "Nothing happens.":
            self.broken.add(env.where)

        # It carries something else, picked up by a random action: put it away.
        if env.hand and not is_a(env.hand, wanted):
            place = env.where if env.where in env.storages else self.rng.choice(env.storages)
            return self.way_to(place) or f"put {env.hand}"

        # It carries nothing: take the thing that is wanted, but not one that was already brought.
        if not env.hand:
            brought_to = env.target if env.kind == "two" else None
            here = env.contents[env.where] if env.where in env.opened - {brought_to} else []
            for thing in here:
                if is_a(thing, wanted):
                    return f"take {thing}"
            return self.look_for(wanted, house.home[wanted], wanted in known, brought_to)

        # It carries what is wanted: to the lamp, to an appliance, or to its target.
        if env.kind == "look":
            light = "use desklamp 1"
            if env.where == house.lamp:
                return light
            return self.look_for("desklamp", house.lamp, "lamp" in known) or light
        if env.kind in APPLIANCES and (env.kind, env.hand) not in env.done_to:
            untried = [place for place in APPLIANCES[env.kind] if place not in self.broken]
            likely = [house.appliance[env.kind]] if env.kind in known else untried
            place = env.where if env.where in untried else self.rng.choice(likely)
            return self.way_to(place) or f"{env.kind} {env.hand}"
        return self.way_to(env.target) or f"put {env.hand}"

    def way_to(self, place):
        """The next action towards a place; None for who stands in front of it and it is open."""
        if self.env.where != place:
            return f"go to {place}"
        return None if place in self.env.opened else f"open {place}"

    def look_for(self, name, home, known, brought_to=None):
        """A step towards a thing of a class: to where one was seen, to its home if that is known,
        or to a place that was not seen yet. brought_to: the place that does not count."""
        # Who stands in front of something closed looks into it first, also who knows that the thing
        # is elsewhere: see "imitation gap" in FINDINGS.md.
        env = self.env
        if env.where in env.storages and env.where not in env.opened:
            return f"open {env.where}"

        for place in env.storages:
            if place in self.seen - {brought_to}:
                if any(is_a(thing, name) for thing in env.contents[place]):
                    return self.way_to(place)
        if known and home not in self.seen:
            return self.way_to(home)
        unseen = [place for place in env.storages if place not in self.seen]
        return self.way_to(self.rng.choice(unseen or env.storages))


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


class Library(SkillBank):
    """What a demonstration's player has read, in the order of its prompt. rng: random.Random."""

    def __init__(self, rows, rng):
        super().__init__(rows)
        self.rng = rng

    def retrieve(self, task, task_type, seed):
        """The skills of a task, none, or others among them."""
        rng, relevant = self.rng, super().retrieve(task, task_type, seed)
        skills = relevant if rng.random() < SKILLED else []
        if rng.random() < DISTRACTED:
            others = [skill for skill in self.skills if skill not in relevant]
            skills = skills + rng.sample(others, rng.randint(1, len(others)))
            rng.shuffle(skills)
        return skills


TOY = ToyEnv()


def demonstration(chat, rng, habit=0.0, world=TOY):
    """One scripted episode in a fresh random household, as this chat's model reads it: an Episode
    whose mask is the weight of each id in the loss. rng: random.Random; habit: see Habit; world: a
    ToyEnv, which says how many places and turns there are.

    Some begin with turns of an explorer, which are not imitated: the teacher will have to judge
    states that the student got itself into."""
    household = Household.random(rng, world.household.closable)
    env = ToyEnv(world.max_turns + 2 * chat.plain, household)
    env.bank = Library(env.skills, rng)
    kind = rng.choice(sorted(TASK_TEXT))
    tasks = [(*goal[2:], task) for task, goal in env.goals.items() if goal[0] == kind]
    tasks.sort(key=lambda task: (task[0], env.storages.index(task[1])))
    task, seed = rng.choice(tasks)[2], rng.random()
    observation, info = begun = env.reset(task, seed)
    episode = sdar.start_episode(chat, env, (task, seed, 0), begun, with_skill=True)
    known, explored_turns = {skill.name for skill in episode.skills}, 0
    if known and rng.random() < TAKEOVER:
        explored_turns = rng.randint(1, max(1, world.max_turns - 2))

    player = Player(env, Habit(rng.random(), habit) if habit else rng)
    while True:
        explores, noisy = env.turns < explored_turns, rng.random() < NOISE
        action = player.act(observation, set() if explores else known)
        if noisy:
            action = rng.choice(info["admissible"])
            action = re.sub(r" (from|in/on|with) .*", "", action)  # as short as the player's
        said = action
        if not chat.plain:  # as the list has it
            listed = [text for text in info["admissible"] if is_a(text, action)]
            said = f"<action>{(listed or [action])[0]}</action>"
        episode.add(chat.encode(said) + [chat.end_id], sampled=int(not (explores or noisy)))
        observation, _, terminated, truncated, info = env.step(action)
        if terminated or truncated:
            return episode
        prompt = chat.next(sdar.as_read(chat, observation, info), chat.end_id)
        episode.add(prompt, sampled=OBSERVATIONS if chat.plain else 0)


# --- 3. The tokenizer --------------------------------------------------------------------
#
# One token for each phrase and each thing of the toy's world: an episode has some 90. Articles and
# punctuation are dropped. What is not of this world becomes <unk>.

PHRASES = """You are in the middle of a room, Your task is to, put, put it in, put two, clean, heat,
    cool, look at, under, desklamp 1, go to, open, take, use, look, inventory, in, from, in/on,
    with, is closed, On, In, you see, nothing, You arrive at, You pick up, You put, You clean,
    You heat, You cool, You turn on, You are carrying, Nothing happens, Skill, is kept in,
    is on, Clean with, Heat with, Cool with"""
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
    words = {*re.split(r",\s+", PHRASES), *world.places, *CLASSES, *objects}
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
        whole_words=True,  # sdar.Chat's `plain`: no tags, no system message
    )


# --- 4. Training -------------------------------------------------------------------------


def recipe(chat, world=TOY):
    """Hash of what the tiny policy is made from: WARMSTART and sample demonstrations, in which the
    world, the scripted player, the skills, the tokenizer and the chat template show.

    The folder of the policy keeps it: a test says when the carried one is out of date."""
    rng, rows = random.Random("recipe"), []
    for _ in range(32):
        episode = demonstration(chat, rng, world=world)
        rows.append([episode.ids, list(map(float, episode.mask))])
    sample = [WARMSTART, len(chat.tokenizer), rows]
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


def imitation_loss(model, episodes):
    """Mean cross-entropy of demonstrations by the weights of their ids."""
    ids = sdar.padded([episode.ids for episode in episodes])  # (B, S)
    real = sdar.padded([[1] * len(episode.ids) for episode in episodes])
    masks = [torch.tensor(episode.mask, dtype=torch.float32) for episode in episodes]
    weights = pad_sequence(masks, batch_first=True)[:, 1:]
    logits = model(input_ids=ids, attention_mask=real).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (losses * weights).sum() / weights.sum()


def warmstart(chat, steps=900, habit=0.0, world=TOY):
    """A tiny policy, trained by imitation. habit, world: see demonstration. Deterministic on one
    machine and PyTorch."""
    rng = random.Random(0)
    torch.manual_seed(0)
    model = new_policy(chat.tokenizer)
    optimizers = make_optimizers(model)

    def rate(step):
        """Up in 50 steps, then down along a cosine to a fiftieth."""
        cosine = math.cos(math.pi * step / max(1, steps))
        return min(1, (step + 1) / 50) * (0.51 + 0.49 * cosine)

    schedulers = [torch.optim.lr_scheduler.LambdaLR(each, rate) for each in optimizers]
    for _ in tqdm(range(steps), desc="warm start of the tiny policy", unit="step"):
        episodes = [demonstration(chat, rng, habit, world) for _ in range(BATCH)]
        imitation_loss(model, episodes).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for item in (*optimizers, *schedulers):
            item.step()
        model.zero_grad()
    return model.eval()


def imitate(model, chat, config, world=TOY):
    """Teach a language model the same, in place: AdamW, the mean log-prob of what the player says.
    A step's demonstrations are as many as the config's tasks times its group size."""
    rng, order = random.Random(config.seed), np.random.default_rng(config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.01)
    progress = tqdm(range(config.steps), desc=f"imitation by {config.model}", unit="step")
    for step in progress:
        optimizer.param_groups[0]["lr"] = config.lr * min(1, (step + 1) / 10)
        rows = range(config.tasks_per_step * config.group_size)
        episodes = [demonstration(chat, rng, world=world) for _ in rows]
        for episode in episodes:
            episode.logprobs = [0.0] * sum(episode.mask)  # update counts them
        old = {"old": torch.zeros(sum(len(episode.logprobs) for episode in episodes))}
        metrics = sdar.update(model, optimizer, episodes, old, config, order, likelihood)
        progress.set_postfix(loss=f"{metrics['loss']:.3f}")


def likelihood(model, episodes, tokens, config):
    """Imitation's objective."""
    logprobs, _ = sdar.response_logprobs(model, episodes, config)
    return {"loss": -logprobs}


# --- 5. The command ----------------------------------------------------------------------

IMITATION = {"preset": "small", "steps": 200, "lr": 2e-5, "group_size": 2, "minibatches": 1}


def settings(argv):
    """Config of a command line, and its habit. Only the carried policy is replaced unasked."""
    parser = sdar.make_parser("python .lab/warmstart.py [flags]", description=__doc__)
    text = "share of the cases in which the tiny policy's player takes its first choice [0]"
    parser.add_argument("--habit", type=float, default=0.0, help=text)
    given = vars(parser.parse_args(argv))
    habit, tiny = given.pop("habit"), given.get("model", "tiny") == "tiny"
    sdar.require(0 <= habit <= tiny, f"--habit {habit}: from 0 to 1, and without --model")
    if tiny:
        carried = {"out": str(sdar.TINY_FOLDER), "overwrite": True} if "out" not in given else {}
        return sdar.configure(**carried | {"steps": 900} | given), habit
    sdar.require("out" in given, "--out: the folder for the checkpoint")
    return sdar.configure(**IMITATION | given), habit


def main(argv):
    """Make the tiny policy, or teach a language model, and play the held-out panel with it."""
    config, habit = settings(argv)
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)  # cannot be written? say so now
    free = not any(folder.iterdir()) or config.overwrite and (folder / "config.json").exists()
    sdar.require(free, f"--out {folder} is not empty: --overwrite the policy in it")
    envs = sdar.make_envs(config)
    fine = isinstance(envs[0], ToyEnv)
    sdar.require(fine, f"--env {config.env}: the scripted player knows the toy alone")

    if config.model == "tiny":
        chat = sdar.Chat(toy_tokenizer(envs[0]))
        model = warmstart(chat, config.steps, habit, envs[0])
    else:
        model, chat = sdar.load_policy(config)
        sdar.say_success("before", sdar.evaluate(model, chat, envs, config))
        imitate(model, chat, config, envs[0])
    save_policy(folder, model, chat, envs[0])
    sdar.say_success(config.out, sdar.evaluate(model, chat, envs, config))


def save_policy(folder, model, chat, world):
    """Write a model folder; into the tiny policy's also its recipe, and what it was written as."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)
    if chat.plain:
        weights = (folder / "model.safetensors").read_bytes()
        sums = {"model.safetensors": hashlib.sha256(weights).hexdigest()}
        sums["recipe"] = recipe(chat, world)
        (folder / "sums.json").write_text(json.dumps(sums, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(sdar.run(lambda: main(sys.argv[1:])))
