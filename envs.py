"""Text environments for sdar.py: one small base class, the skill banks, the toy household and its tiny policy's warm start.

    env = make_env("toy")
    observation, info = env.reset(env.tasks("train")[0], seed=0)
    observation, reward, terminated, truncated, info = env.step("go to desk 1")

Signatures are Gymnasium's, without the dependency. Rewards are raw (0 or 1, at the end); scales
and penalties belong to the trainer. A missing package, data set or server raises EnvUnavailable:
trouble with the machinery is never shown to the model as an observation.
"""
import difflib
import hashlib
import json
import math
import random
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np


class UserError(ValueError):
    """Bad input: one line on stderr and exit code 2, in sdar.py as here."""


def require(ok, message):
    """UserError unless ok."""
    if not ok:
        raise UserError(message)


def unknown(what, value, known):
    """The message for a bad choice, the nearest good one first."""
    near = difflib.get_close_matches(str(value), known, 1)
    return f"unknown {what} {value!r}: " + (f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(known)}"


class EnvUnavailable(RuntimeError):
    """A package, data file or server that an environment needs is missing; the message says how to get it."""


@dataclass(frozen=True)
class Skill:
    """One entry of a skill bank, the source of the privileged context c+ (paper, section 2.1).

    A skill is for the tasks whose type is in `task_types` and whose text holds one of `keywords`
    as a whole word; an empty tuple sets no condition.
    """
    name: str
    text: str
    task_types: tuple = ()
    keywords: tuple = ()

    def matches(self, task, task_type):
        """True if the skill is for this task text of this task type."""
        hit = any(re.search(rf"\b{re.escape(word)}\b", task, re.IGNORECASE) for word in self.keywords)
        return (not self.task_types or task_type in self.task_types) and (hit or not self.keywords)


def retrieve(bank, task, task_type, strategy, seed=0, bandit=None):
    """The skills of a task, a list. seed: of random choices, the same for all episodes of a group.

    keyword: those whose task type and whole-word keywords fit it, each once. full: the whole bank. random: as many as
    keyword finds, at least one, from the whole bank. ucb: those that the bandit chooses. none: none. The control wrong: as
    many as keyword finds, of those that are for other task types.
    """
    found, rng = [skill for skill in bank if skill.matches(task, task_type)], random.Random(f"{task}/{seed}")
    if strategy in ("random", "wrong"):
        pool = [s for s in bank if strategy == "random" or s.task_types and task_type not in s.task_types]
        return rng.sample(pool, min(len(pool), max(1, len(found))))
    if strategy == "ucb":
        return (bandit or Bandit()).choose(rng.sample(bank, len(bank)), task, task_type)
    return {"keyword": found, "full": list(bank), "none": []}[strategy]


def skill_text(skills):
    """What a reader of the skills sees in front of the task; empty without skills."""
    return "Skill: " + " ".join(skill.text for skill in skills) + "\n" if skills else ""


class Bandit:
    """Retrieval by UCB1. The paper names it and does not define it; this definition is ours.

    An arm is a skill in a context: whether keyword retrieval would find it for the task. A task gets the SLOTS arms of
    the largest mean reward + sqrt(ln(all plays) / plays), arms never played first. The reward, in [-1, 1], is the
    correlation over a group's episodes of advantage and mean gap: a good skill makes its reader endorse what went well.
    """
    SLOTS = 3

    def __init__(self, arms=None):
        self.arms = arms or {}  # {arm: [plays, sum of rewards]}

    def arm(self, skill, task, task_type):
        return f"{skill.name} {'found' if skill.matches(task, task_type) else 'not found'}"

    def choose(self, bank, task, task_type):
        """The skills for a task; of equal ones those first in the bank."""
        total = sum(plays for plays, _ in self.arms.values())

        def index(skill):
            plays, rewards = self.arms.get(self.arm(skill, task, task_type), (0, 0.0))
            return rewards / plays + math.sqrt(math.log(total) / plays) if plays else math.inf
        return sorted(bank, key=index, reverse=True)[:self.SLOTS]

    def learn(self, episodes, advantages, gaps):
        """advantages, gaps: of each episode. A group without variation says nothing and does not count."""
        for group in {episode.group for episode in episodes}:
            rows = [i for i, episode in enumerate(episodes) if episode.group == group]
            pairs, first = np.array([(advantages[i], gaps[i]) for i in rows]).T, episodes[rows[0]]
            if np.ptp(pairs, 1).min() > 0:
                for skill in first.skills:
                    arm = self.arms.setdefault(self.arm(skill, first.task, first.task_type), [0, 0.0])
                    arm[0] += 1
                    arm[1] += float(np.corrcoef(pairs)[0, 1])


class TextEnv:
    """What every environment shares: the time limit, the refusal to step after the end, the cut of
    overlong observations, and the keys of `info`.

    A subclass sets `name`, `instructions` (the system message), `default_turns` and `skills`, and writes
    tasks(split), _reset(task, seed) -> (observation, state) and _step(action) -> (observation, state),
    where state is a dict with task, task_type, admissible, won, score, valid and over (the episode
    has ended by itself).
    """
    name, instructions, default_turns, skills = "", "", 10, ()
    stop_strings = ("</action>",)  # a response also ends where one of these does

    def __init__(self, max_turns=0, max_obs_chars=4000):
        self.max_turns = max_turns or self.default_turns
        self.max_obs_chars = max_obs_chars
        self._turns, self._running = 0, False

    def reset(self, task, seed=0):
        """Start an episode. task: an id out of tasks(split); the same (task, seed) is the same episode.
        Returns (observation, info); the first observation states the task."""
        observation, state = self._reset(task, seed)
        self._turns, self._running = 0, True
        return self._cut(observation), self._info(state)

    def step(self, action):
        """Play one action. Returns (observation, reward, terminated, truncated, info); reward is 1.0 on
        the step that wins and 0.0 elsewhere. RuntimeError when no episode is running."""
        if not self._running:
            raise RuntimeError(f"{self.name}: no episode is running, call reset() first")
        observation, state = self._step(action)
        self._turns += 1
        terminated = bool(state["over"])
        truncated = not terminated and self._turns >= self.max_turns
        self._running = not (terminated or truncated)
        reward = float(terminated and state["won"])
        return self._cut(observation), reward, terminated, truncated, self._info(state)

    def parse(self, response):
        """Text of the model -> (action, valid). With <action>...</action> it is what the first pair of
        tags holds; without tags the whole text is the action, as long as it is one line."""
        tagged = re.search(r"<action>(.*?)</action>", response, re.DOTALL)
        action = " ".join((tagged.group(1) if tagged else response).split())
        return action, bool(action) and (tagged is not None or "\n" not in response.strip())

    def panel(self, split, episodes):
        """The evaluation episodes, a list of (task, seed): always the same ones, every task type equally often."""
        pools = {}
        for task in self.tasks(split):
            pools.setdefault(self.reset(task)[1]["task_type"], []).append(task)
        pools = [pools[kind] for kind in sorted(pools)]
        turns = [divmod(i, len(pools)) for i in range(episodes)]
        return [(pools[kind][turn % len(pools[kind])], 10 ** 6 + turn) for turn, kind in turns]

    def close(self):
        """End the episode, if one is running; may be called twice."""
        self._running = False

    def _cut(self, text):
        return text if len(text) <= self.max_obs_chars else text[:self.max_obs_chars] + " ..."

    def _info(self, state):
        return {key: state[key] for key in ("task", "task_type", "admissible", "won", "score", "valid")}


# ---------------------------------------------------------------------------------------------
# The toy household: ALFWorld's spirit and wording, small enough for a CPU.
#
# What makes the skill matter is by construction: each class of object has one home, of each
# kind of appliance one works, and the lamp stands somewhere. None of this can be seen from the
# middle of the room and the turns are too few to search, but the skill bank says it.
# ---------------------------------------------------------------------------------------------

CLOSABLE = tuple(f"{kind} {n}" for kind in ("cabinet", "drawer") for n in range(1, 9))
SURFACES = ("desk 1", "shelf 1", "sofa 1", "countertop 1")
STORAGES = CLOSABLE + SURFACES  # what can hold objects; the closable ones start closed
APPLIANCES = {verb: tuple(f"{kind} {n}" for n in (1, 2, 3))
              for verb, kind in (("clean", "sinkbasin"), ("heat", "microwave"), ("cool", "fridge"))}
PLACES = STORAGES + sum(APPLIANCES.values(), ())
CLASSES = ("apple", "bowl", "bread", "cup", "egg", "mug", "plate", "potato", "spoon", "tomato")
TASK_TEXT = {"put": "put a {object} in {target}",
             "clean": "clean a {object} and put it in {target}",
             "heat": "heat a {object} and put it in {target}",
             "cool": "cool a {object} and put it in {target}",
             "look": "look at a {object} under the desklamp 1",
             "two": "put two {object} in {target}"}
# Every fixed phrase of the world's text; sdar.py makes the tiny policy's vocabulary from them.
PHRASES = ("You are in the middle of a room", "Your task is to", "put", "put it in", "put two", "clean", "heat",
           "cool", "look at", "under", "desklamp 1", "go to", "open", "take", "use", "look", "inventory", "in",
           "from", "in/on", "with", "is closed", "On", "In", "you see", "nothing", "You arrive at",
           "You pick up", "You put", "You clean", "You heat", "You cool", "You turn on", "You are carrying",
           "Nothing happens", "Skill", "is kept in", "is on", "Clean with", "Heat with", "Cool with")


@dataclass(frozen=True)
class Household:
    """What a newcomer cannot know: the home of each class, the appliance that works, the lamp's place."""
    home: dict
    appliance: dict
    lamp: str

    @classmethod
    def random(cls, rng):
        """Draw a household with random.Random `rng`."""
        return cls({c: rng.choice(STORAGES) for c in CLASSES},
                   {verb: rng.choice(pair) for verb, pair in APPLIANCES.items()}, rng.choice(SURFACES))

    def skills(self):
        """The household's skill bank: one entry a class of objects, one a verb, one for the lamp."""
        bank = [Skill(c, f"The {c} is kept in {place}.", (), (c,)) for c, place in self.home.items()]
        bank += [Skill(verb, f"{verb.capitalize()} with {place}.", (verb,), (verb,))
                 for verb, place in self.appliance.items()]
        return bank + [Skill("lamp", f"The desklamp 1 is on {self.lamp}.", ("look",), ("desklamp",))]


HOME = Household.random(random.Random(2605))  # the household of every training and evaluation task


class ToyEnv(TextEnv):
    """The toy household. A task id is the task's sentence; `seed` chooses which other objects are about.

    Task types: put, clean, heat, cool, look (in light), two (put two). Actions: `go to P`, `open P`,
    `take O [from P]`, `put O [in/on P]`, `clean|heat|cool O [with P]`, `use desklamp 1`, `look`,
    `inventory`. A well-formed action that cannot be done here is valid and answered "Nothing happens."
    Splits: train 3/5 of the tasks of each type, dev (for choosing settings) and eval 1/5 each.
    """
    name, default_turns = "toy", 10
    instructions = (
        "You act in a household. Places: " + ", ".join(PLACES) + ". Cabinets and drawers must be opened before "
        "you see what they hold. You carry one object at a time. Answer with your reasoning in <think></think>, "
        "then one action in <action></action>. Actions: go to PLACE, open PLACE, take OBJECT from PLACE, "
        "put OBJECT in/on PLACE, clean OBJECT with SINKBASIN, heat OBJECT with MICROWAVE, cool OBJECT with "
        "FRIDGE, use desklamp 1, look, inventory. Objects and places have a number, as in: go to desk 1.")
    GRAMMAR = re.compile(r"(?P<verb>go to|open|take|put|clean|heat|cool|use) (?P<what>[a-z]+ \d+)"
                         r"(?: (?:from|in/on|with) (?P<place>[a-z]+ \d+))?|(?P<alone>look|inventory)")

    def __init__(self, household=HOME, **options):
        super().__init__(**options)
        self.household, self.skills = household, household.skills()
        self.goals = {TASK_TEXT[kind].format(object=c, target=target): (kind, c, target)  # of every task
                      for kind in TASK_TEXT for c in CLASSES for target in STORAGES if target != household.home[c]}

    def tasks(self, split):
        """Task ids of a split ("train", "dev" or "eval"): disjoint, in a fixed order mixed over types. There are few
        tasks of type look, so train lists each of them several times: every type comes equally often."""
        order = sorted(self.goals)
        random.Random(0).shuffle(order)
        chosen = []
        for kind in TASK_TEXT:
            of_kind = [task for task in order if self.goals[task][0] == kind]
            fifth = len(of_kind) // 5
            part = {"eval": of_kind[:fifth], "dev": of_kind[fifth:2 * fifth], "train": of_kind[2 * fifth:]}[split]
            chosen += part * (19 if (kind, split) == ("look", "train") else 1)  # 6 tasks, of other types 114
        return sorted(chosen, key=order.index)

    def _reset(self, task, seed):
        if task not in self.goals:
            raise ValueError(f"toy: unknown task {task!r}; tasks('train') lists the ids")
        self.task, (self.kind, self.goal_class, self.target) = task, self.goals[task]
        rng = random.Random(f"{task}/{seed}")
        self.contents = {place: [] for place in PLACES}
        others = rng.sample([c for c in CLASSES if c != self.goal_class], 4)
        for c in sorted(others + [self.goal_class] * (2 if self.kind == "two" else 1)):
            place = self.contents[self.household.home[c]]
            place.append(f"{c} {1 + sum(o.startswith(c + ' ') for o in place)}")
        self.contents[self.household.lamp].append("desklamp 1")
        self.where, self.hand, self.done_to = None, None, set()  # done_to: (verb, object) pairs
        self.opened, self.seen, self.broken, self.lit = set(PLACES) - set(CLOSABLE), set(), set(), False
        return f"You are in the middle of a room. Your task is to: {task}.", self._state(True)

    def _step(self, action):
        match = self.GRAMMAR.fullmatch(action.strip().lower())
        if match is None:
            return "Nothing happens.", self._state(False)
        return self._act(match["verb"] or match["alone"], match["what"], match["place"]) or "Nothing happens.", self._state(True)

    def _act(self, verb, what, place):
        """Play one parsed action; None means that it cannot be done here."""
        if place is not None and place != self.where:
            return None
        here = self.contents.get(self.where, [])
        if verb == "go to" and what in self.contents and what != self.where:
            self.where = what
            return self._view()
        if verb == "open" and what == self.where and what not in self.opened:
            self.opened.add(what)
            return self._view()
        if verb == "take" and self.hand is None and self.where in self.opened and what in here and what != "desklamp 1":
            here.remove(what)
            self.hand = what
            return f"You pick up {what}."
        if verb == "put" and what == self.hand is not None and self.where in self.opened & set(STORAGES):
            here.append(what)
            self.hand = None
            return f"You put {what} in/on {self.where}."
        if verb in APPLIANCES and what == self.hand is not None and self.where in APPLIANCES[verb]:
            if self.where != self.household.appliance[verb]:
                self.broken.add(self.where)
                return None
            self.done_to -= {("heat", what), ("cool", what)} if verb != "clean" else set()
            self.done_to.add((verb, what))
            return f"You {verb} {what} with {self.where}."
        if verb == "use" and what == "desklamp 1" and what in here:
            self.lit = True
            return "You turn on desklamp 1."
        if verb == "look":
            return self._view() if self.where else "You are in the middle of a room."
        if verb == "inventory":
            return f"You are carrying {self.hand or 'nothing'}."
        return None

    def _view(self):
        if self.where not in self.opened:
            return f"The {self.where} is closed."
        self.seen.add(self.where)
        if self.where not in STORAGES:
            return f"You arrive at {self.where}."
        here = " and ".join(f"a {thing}" for thing in self.contents[self.where]) or "nothing"
        return f"{'On' if self.where in SURFACES else 'In'} the {self.where} you see {here}."

    def _state(self, valid):
        won = self._won()
        return dict(task=self.task, task_type=self.kind, admissible=self._admissible(), won=won, score=float(won),
                    valid=valid, over=won)

    def _won(self):
        of_class = lambda thing: thing is not None and thing.startswith(self.goal_class + " ")
        if self.kind == "look":
            return self.lit and of_class(self.hand) and "desklamp 1" in self.contents.get(self.where, [])
        there = [thing for thing in self.contents[self.target] if of_class(thing)]
        if self.kind in APPLIANCES:
            there = [thing for thing in there if (self.kind, thing) in self.done_to]
        return len(there) >= (2 if self.kind == "two" else 1)

    def _admissible(self):
        here = self.contents[self.where] if self.where in self.opened else []
        actions = [f"go to {place}" for place in PLACES if place != self.where]
        actions += [f"open {self.where}"] if self.where and self.where not in self.opened else []
        if self.hand is None:
            actions += [f"take {thing} from {self.where}" for thing in here if thing != "desklamp 1"]
        elif self.where in self.opened & set(STORAGES):
            actions += [f"put {self.hand} in/on {self.where}"]
        else:
            actions += [f"{verb} {self.hand} with {self.where}" for verb in APPLIANCES if self.where in APPLIANCES[verb]]
        return actions + (["use desklamp 1"] if "desklamp 1" in here else []) + ["look", "inventory"]


def scripted_action(env, known, rng):
    """The next action of a sensible player of a running ToyEnv episode.

    known: names of the skills the player has read (a set; empty: a newcomer who explores). It uses those
    facts, what it has seen in this episode, and nothing else. rng: random.Random for free choices.
    """
    has = lambda thing, c: thing.startswith(c + " ")

    def find(c, home, known_home, ends):
        """Step towards the thing of class c: its known place, or one not seen yet. Who stands in front of something
        closed looks into it first, also when the thing is known to be elsewhere: see "imitation gap" in README.md."""
        if env.where in STORAGES and env.where not in env.opened:
            return f"open {env.where}"
        seen = [p for p in STORAGES if p in env.seen and p not in ends and any(has(o, c) for o in env.contents[p])]
        place = seen[0] if seen else home if known_home and home not in env.seen else None
        return move_to(place or rng.choice([p for p in STORAGES if p not in env.seen] or STORAGES))

    def move_to(place):
        if env.where != place:
            return f"go to {place}"
        return None if place in env.opened else f"open {place}"

    c, house = env.goal_class, env.household
    if env.hand is not None and not has(env.hand, c):
        return move_to(env.where if env.where in STORAGES else rng.choice(STORAGES)) or f"put {env.hand}"
    if env.hand is None:
        things = [o for o in env.contents.get(env.where, []) if has(o, c)]
        if things and env.where in env.opened and not (env.kind == "two" and env.where == env.target):
            return f"take {things[0]}"
        return find(c, house.home[c], c in known, (env.target,) if env.kind == "two" else ())
    if env.kind == "look":
        return (find("desklamp", house.lamp, "lamp" in known, ()) if env.where != house.lamp else None) or "use desklamp 1"
    if env.kind in APPLIANCES and (env.kind, env.hand) not in env.done_to:
        choices = [p for p in APPLIANCES[env.kind] if p not in env.broken]
        likely = [house.appliance[env.kind]] if env.kind in known else choices
        return move_to(env.where if env.where in choices else rng.choice(likely)) or f"{env.kind} {env.hand}"
    return move_to(env.target) or f"put {env.hand}"


def demonstration(chat, rng, skilled=0.75, distracted=0.3, takeover=0.5, noise=0.05, observations=0.2):
    """One scripted episode in a fresh random household, to imitate: weights can learn from it the format, exploring and
    reading a skill, but nothing of the household of training and evaluation. chat: sdar.Chat. rng: random.Random.

    skilled: share of episodes whose player has read the skills of its task. distracted: share in which skills of other
    tasks stand between them. takeover: share of skilled ones whose first 1-8 turns an explorer plays, since the teacher
    will have to judge states that the student got itself into. noise: share of random actions: played, so that states
    off the path are seen, but not imitated. observations: weight of their tokens; knowing the world helps acting in it.
    Returns (ids, loss weight of each id).
    """
    env = ToyEnv(Household.random(rng), max_turns=12)
    kind = rng.choice(sorted(TASK_TEXT))
    task = rng.choice([task for task, goal in env.goals.items() if goal[0] == kind])
    observation, info = env.reset(task, rng.random())
    relevant = [skill for skill in env.skills if skill.matches(task, kind)]
    skills = relevant if rng.random() < skilled else []
    if rng.random() < distracted:
        others = [skill for skill in env.skills if skill not in relevant]
        skills = skills + rng.sample(others, rng.randint(1, len(others)))
        rng.shuffle(skills)
    known, over, turn = {skill.name for skill in skills}, False, 0
    explores = rng.randint(1, 8) if known and rng.random() < takeover else 0
    prompt, at = chat.first(env.instructions, observation)
    ids = prompt[:at] + chat.encode(skill_text(skills)) + prompt[at:]
    weights = [0.0] * len(ids)
    while not over:
        noisy = rng.random() < noise
        action = scripted_action(env, known if turn >= explores else set(), rng)
        action = re.sub(r" (from|in/on|with) .*", "", rng.choice(info["admissible"])) if noisy else action
        observation, _, terminated, truncated, info = env.step(action)
        over = terminated or truncated
        response = chat.encode(action) + [chat.end_id]
        between = [] if over else chat.next(observation, ended=True)
        ids += response + between
        weights += [float(turn >= explores and not noisy)] * len(response) + [observations] * len(between)
        turn += 1
    return ids, weights


TOY_TEMPLATE = (  # no system role: what the system message says, the tiny policy learned in its warm start
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|assistant|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def toy_tokenizer():
    """The tiny policy's: one token a phrase of the toy world, articles and punctuation dropped; an episode is some 90
    tokens."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    things = [*PLACES, *CLASSES, *(f"{c} {n}" for c in CLASSES for n in (1, 2))]
    words = sorted({*PHRASES, *things}, key=lambda word: (-len(word), word))
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>"] + words)}, unk_token="<unk>"))
    known = "|".join(map(re.escape, words))
    other = r"(?!(?:a|an|and|the|The)(?!\w))[^\s.,:]+"
    core.pre_tokenizer = pre_tokenizers.Split(Regex(rf"(?<!\w)(?:{known})(?!\w)|(?<!\w){other}"), "removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>", unk_token="<unk>",
                                   additional_special_tokens=["<|user|>", "<|assistant|>"], chat_template=TOY_TEMPLATE)


WARMSTART = 1  # raise it with every change of warmstart()
TINY_FOLDER = Path(__file__).resolve().parent / ".assets" / "tiny-policy"


def fingerprint(folder, chat):
    """Hashes of a tiny policy's files and of its recipe: WARMSTART and sample demonstrations, in which the world, the
    scripted player, the skills, the tokenizer and the chat template show. chat: sdar.Chat of toy_tokenizer()."""
    rng = random.Random("fingerprint")
    sample = [WARMSTART, len(chat.tokenizer), [demonstration(chat, rng) for _ in range(32)]]
    parts = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "fingerprint.json"}
    parts["recipe"] = json.dumps(sample).encode()
    return {name: hashlib.sha256(data).hexdigest() for name, data in parts.items()}


def warmstart(folder, chat, steps=900):
    """Train the tiny policy by imitation and save it in `folder`. Deterministic on one machine and PyTorch. Muon on the
    matrices matters: with AdamW alone the policy needs several times the steps before it reads the skill."""
    import torch
    import transformers
    from tqdm import tqdm
    transformers.utils.logging.disable_progress_bar()
    folder.with_name(folder.name + ".new").mkdir(parents=True, exist_ok=True)  # cannot be written? say so now
    rng = random.Random(0)
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=len(chat.tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=16, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=chat.tokenizer.eos_token_id, pad_token_id=chat.tokenizer.pad_token_id))
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    rest = [p for name, p in model.named_parameters() if "layers." not in name or p.ndim < 2]
    optimizers = [torch.optim.Muon(matrices, lr=0.05, weight_decay=0.01),
                  torch.optim.AdamW(rest, lr=4e-3, betas=(0.9, 0.98), weight_decay=0.01)]
    schedule = lambda step: min(1, (step + 1) / 50) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) for optimizer in optimizers]
    for _ in tqdm(range(steps), desc="warm start of the tiny policy", unit="step"):
        rows = [demonstration(chat, rng) for _ in range(32)]
        columns = (*zip(*rows), [[1] * len(ids) for ids, _ in rows])
        ids, weights, real = (torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, c)), batch_first=True) for c in columns)
        logits = model(input_ids=ids, attention_mask=real).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for item in (*optimizers, *schedulers):
            item.step()
        model.zero_grad()

    def write(target):
        model.save_pretrained(target)
        chat.tokenizer.save_pretrained(target)
        (target / "fingerprint.json").write_text(json.dumps(fingerprint(target, chat), indent=1) + "\n")
    replace_folder(folder, write)


def tiny_policy(chat):
    """The folder of the tiny policy. It is built anew when absent, of another recipe, or not as it was written."""
    try:
        trusted = json.loads((TINY_FOLDER / "fingerprint.json").read_text()) == fingerprint(TINY_FOLDER, chat)
    except (OSError, ValueError):
        trusted = False
    if not trusted:
        print(f"{TINY_FOLDER} is absent, changed or of another recipe: building it, once, in some minutes.", file=sys.stderr)
        warmstart(TINY_FOLDER, chat)
    return TINY_FOLDER


def replace_folder(folder, write):
    """Let write(temporary folder) fill a folder, then put it in the place of `folder`."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    write(fresh)  # save_pretrained makes the folder
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


SKILLS = {"toy": HOME.skills()}
ENVS = {"toy": ToyEnv}


def make_env(name, **options):
    """A new environment by name. ValueError names the known ones; options go to its constructor."""
    if name not in ENVS:
        raise ValueError(f"unknown environment {name!r}: choose one of {', '.join(ENVS)}")
    return ENVS[name](**options)
