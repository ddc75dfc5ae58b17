"""Imitation: how the tiny policy was made, and how a language model learns the toy's format.

    python .lab/warmstart.py                                # the tiny policy, in some minutes
    python .lab/warmstart.py --out elsewhere --steps 300
    python .lab/warmstart.py --model Qwen/Qwen2.5-0.5B-Instruct --plain --out runs/warm
    python sdar.py --model runs/warm/checkpoint --preset small

Reinforcement learning needs a policy that sometimes wins, and SDAR one that can read a skill. Here
a new network, or a language model, imitates a scripted player. Every demonstration is played in a
household of its own, drawn at random. So the weights can learn the format of actions, how to
explore, and to believe what a skill says; but not where this toy's household keeps its mugs. That
is left to learn.

The tiny policy is a network of 309 thousand parameters. A language model imitates in its own chat
template, and only what the player says, not the world. Its run is a folder like those of sdar.py,
which goes on with --resume. It ends when the format is there: every answer of the held-out panel is
valid, and a share of --enough is won with the skill. With --plain it reads what the tiny policy
reads: one line of instructions, no list of actions, no tags. That is a third of the tokens, and
its checkpoint remembers it.
"""

import math
import random
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sdar
from envs import APPLIANCES, CLASSES, TASK_TEXT, Household, SkillBank, ToyEnv, is_a, require

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
            brought_to = env.target if env.task_type == "two" else None
            here = env.contents[env.where] if env.where in env.opened - {brought_to} else []
            for thing in here:
                if is_a(thing, wanted):
                    return f"take {thing}"
            return self.look_for(wanted, house.home[wanted], wanted in known, brought_to)

        # It carries what is wanted: to the lamp, to an appliance, or to its target.
        if env.task_type == "look":
            found = self.look_for("desklamp", house.lamp, "lamp" in known)
            return found or "use desklamp 1"
        if env.task_type in APPLIANCES and (env.task_type, env.hand) not in env.done_to:
            untried = [place for place in APPLIANCES[env.task_type] if place not in self.broken]
            likely = [house.appliance[env.task_type]] if env.task_type in known else untried
            place = env.where if env.where in untried else self.rng.choice(likely)
            return self.way_to(place) or f"{env.task_type} {env.hand}"
        return self.way_to(env.target) or f"put {env.hand}"

    def way_to(self, place):
        """The next action towards a place; None if it is here and open."""
        if self.env.where != place:
            return f"go to {place}"
        return None if place in self.env.opened else f"open {place}"

    def look_for(self, name, home, known, brought_to=None):
        """A step towards a thing of a class: to where one was seen, to its home if that is known,
        or to a place that was not seen yet. brought_to: the place that does not count."""
        # In front of something closed it looks inside first, even if it knows that the thing is
        # elsewhere: see "imitation gap" in APPENDIX.md.
        env = self.env
        if env.where and env.where not in env.opened:
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
TAKEOVER = 0.5  # share of those with skills whose first turns (1 to 8 of 10) an explorer plays
NOISE = 0.05  # share of random actions: played, so that other states are seen, but not imitated
OBSERVATIONS = 0.2  # the tiny policy's weight of what it reads: knowing the world helps acting


class Library(SkillBank):
    """What a demonstration's player has read, in the order of its prompt. rng: random.Random."""

    def __init__(self, rows, rng):
        super().__init__(rows)
        self.rng = rng

    def retrieve(self, task, task_type, seed):
        """The skills of a task, none, or others among them."""
        rng = self.rng
        relevant = super().retrieve(task, task_type, seed)
        skills = relevant if rng.random() < SKILLED else []
        if rng.random() < DISTRACTED:
            others = [skill for skill in self.skills if skill not in relevant]
            skills = skills + rng.sample(others, rng.randint(1, len(others)))
            rng.shuffle(skills)
        return skills


TOY = ToyEnv()


def demonstration(chat, rng, world=TOY, observations=0.0):
    """One scripted episode in a fresh random household, as this chat's model reads it: an Episode
    whose mask is the weight of each id in the loss. rng: random.Random; world: a ToyEnv, which says
    how many places and turns there are; observations: the weight of their ids.

    Some begin with turns of an explorer, which are not imitated: the teacher will have to judge
    states that the student got itself into."""
    household = Household.random(rng, world.household.closable)
    env = ToyEnv(world.max_turns + 2 * chat.plain, household)
    env.bank = Library(env.skills, rng)
    kind = rng.choice(sorted(TASK_TEXT))
    tasks = {}  # a dict: some are the same
    for name in CLASSES:
        for target in env.storages:
            tasks[TASK_TEXT[kind].format(object=name, target=target)] = None
    task = rng.choice([task for task in tasks if task in env.goals])
    seed = rng.random()
    observation, info = begun = env.reset(task, seed)
    episode = sdar.start_episode(chat, env, (task, seed, 0), begun, with_skill=True)
    known = {skill.name for skill in episode.skills}
    explored_turns = 0
    if known and rng.random() < TAKEOVER:
        explored_turns = rng.randint(1, max(1, world.max_turns - 2))

    player = Player(env, rng)
    while True:
        explores = env.turns < explored_turns
        noisy = rng.random() < NOISE
        action = player.act(observation, set() if explores else known)
        if noisy:
            action = rng.choice(info["admissible"])
            action = re.sub(r" (from|in/on|with) .*", "", action)  # as short as the player's
        said = action
        if not chat.plain:  # as the list has it
            listed = [text for text in info["admissible"] if is_a(text, action)]
            said = f"<action>{listed[0]}</action>"
        episode.add(chat.encode(said) + [chat.end_id], sampled=float(not (explores or noisy)))
        observation, _, terminated, truncated, info = env.step(action)
        if terminated or truncated:
            episode.turns = env.turns
            episode.won = info["won"]
            return episode
        prompt = chat.next(sdar.as_read(chat, observation, info), chat.end_id)
        episode.add(prompt, sampled=observations)


# --- 3. The tiny policy ------------------------------------------------------------------
#
# Its tokenizer has one token for each phrase and each thing of the toy's world: an episode has some
# 90. Articles and punctuation are dropped. What is not of this world becomes <unk>.

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
        plain=True,  # sdar.Chat: no tags, no system message
    )


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


def learn(model, optimizer, config, chat, *what):
    """A step of imitation, of as many demonstrations as the config's tasks times its group size.
    what: as for demonstration. Returns the Episodes, and metrics."""
    episodes = []
    weights = []
    for _ in range(config.tasks_per_step * config.group_size):
        episode = demonstration(chat, *what)
        episodes.append(episode)
        episode.logprobs = [weight for weight in episode.mask if weight]
        episode.mask = [int(weight > 0) for weight in episode.mask]
        weights += episode.logprobs
    weights = torch.tensor(weights)
    batch = {"old": weights / weights.mean()}  # update gives each episode its own
    rng = np.random.default_rng(0)  # they are as good in any order
    return episodes, sdar.update(model, optimizer, episodes, batch, config, rng, likelihood)


def likelihood(model, episodes, tokens, config):
    """Imitation's objective: log-probs of what was said, by weight."""
    logprobs, _ = sdar.response_logprobs(model, episodes, config)
    return {"loss": -tokens["old"].to(logprobs) * logprobs}


def warmstart(config, world):
    """(model, chat) of a tiny policy, trained by imitation. Deterministic on one machine.

    Muon for the layers' matrices, AdamW for the rest. It matters: with AdamW alone the policy needs
    several times the steps before it reads the skill."""
    torch.manual_seed(config.seed)
    chat = sdar.Chat(toy_tokenizer(world))
    rng = random.Random(config.seed)
    model = new_policy(chat.tokenizer)
    matrices = [weights for weights in model.model.layers.parameters() if weights.ndim == 2]
    rest = [weights for weights in model.parameters() if not any(weights is m for m in matrices)]
    muon = torch.optim.Muon(matrices, weight_decay=0.01)
    adamw = torch.optim.AdamW(rest, betas=(0.9, 0.98))

    @muon.register_step_post_hook
    def step_the_rest(*_):
        adamw.step()
        adamw.zero_grad()

    for step in tqdm(range(config.steps), "warm start of the tiny policy", unit="step"):
        # The learning rate: up in 50 steps, then down along a cosine to a fiftieth.
        rate = min(1, (step + 1) / 50) * (0.51 + 0.49 * math.cos(math.pi * step / config.steps))
        muon.param_groups[0]["lr"] = 0.05 * rate
        adamw.param_groups[0]["lr"] = 0.004 * rate
        learn(model, muon, config, chat, rng, world, OBSERVATIONS)
    return model, chat


# --- 4. A language model -----------------------------------------------------------------


def imitate(config, envs, plain, enough):
    """Teach a language model, in a run as sdar.train's: evaluated, logged, saved, and resumed
    exactly. It ends when the format is there, see above."""
    model, chat = sdar.load_policy(config)
    optimizer = torch.optim.AdamW(model.parameters())
    if plain:
        chat.plain = chat.tokenizer.init_kwargs["plain"] = True
        config.variant = "plain"  # is remembered, and compared when it is resumed
    done = sdar.load_checkpoint(config, model, optimizer, envs[0].bank)
    for step in tqdm(range(done + 1, config.steps + 1), "imitation"):
        clock = [time.perf_counter()] * 3  # nobody plays, and nothing is scored
        optimizer.param_groups[0]["lr"] = config.lr * min(1, step / 10)
        rng = random.Random(f"{config.seed} {step}")
        episodes, metrics = learn(model, optimizer, config, chat, rng, envs[0])
        clock.append(time.perf_counter())

        last = step == config.steps
        result = {}
        if last or (config.eval_every and step % config.eval_every == 0):
            result = sdar.evaluate(model, chat, envs, config)
            tqdm.write(f"{result['valid']:.1%} of the answers are valid")
            last = last or (result["valid"] == 1 and result["success_skill"] >= enough)
        sdar.log_step(config, step, episodes, metrics, result, clock)
        if last or step % config.save_every == 0:
            sdar.save_checkpoint(config, model, chat, optimizer, envs[0].bank, step)
        if last:
            break


# --- 5. The command ----------------------------------------------------------------------

TINY = {"out": str(sdar.TINY_FOLDER), "steps": 900, "group_size": 4, "minibatches": 1}
IMITATION = {
    "out": "runs/warm",
    "preset": "small",
    "steps": 200,
    "lr": 5e-5,
    "group_size": 2,
    "minibatches": 1,
}


def main(argv=None):
    """Make the tiny policy, or teach a language model."""
    parser = sdar.make_parser("python .lab/warmstart.py [flags]", description=__doc__)
    parser.add_argument(
        "--enough",
        type=float,
        default=0.9,
        help="a language model's imitation ends when all answers are valid, and this share is won "
        "with the skill [0.9]",
    )
    parser.add_argument(
        "--plain",
        action="store_true",
        default=False,
        help="a language model imitates, and from then on reads, the tiny policy's view",
    )
    given = vars(parser.parse_args(argv))
    enough = given.pop("enough")
    plain = given.pop("plain")
    tiny = given.get("model", "tiny") == "tiny"
    config = sdar.configure(**(TINY if tiny else IMITATION) | given)
    envs = sdar.make_envs(config)
    fine = isinstance(envs[0], ToyEnv)
    require(fine, f"--env {config.env}: the scripted player knows only the toy")
    require(config.steps, "--steps 0: nothing would be learned")
    require(
        "out" in given or config.env == "toy" or not tiny, "--out: else the toy's policy is lost"
    )
    if not tiny:
        imitate(config, envs, plain, enough)
        return
    if "out" in given:  # only the carried policy is replaced unasked
        sdar.load_checkpoint(config, None, None, None)  # may it be written?
    model, chat = warmstart(config, envs[0])
    model.save_pretrained(config.out)
    chat.tokenizer.save_pretrained(config.out)
    sdar.say_success(config.out, sdar.evaluate(model.eval(), chat, envs, config))


if __name__ == "__main__":
    sys.exit(sdar.run(main))
