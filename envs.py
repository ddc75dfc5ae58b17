"""Text environments for sdar.py: a toy household; thin shims around ALFWorld, WebShop, Search-QA.

    python envs.py play toy                           # be the agent: you see what the model sees
    python envs.py play alfworld --data FOLDER        # .lab/ENVIRONMENTS.md: what each one needs
    python envs.py serve CORPUS.jsonl                 # a small search server, for "search"

Write your own environment: a class with a text for the model, tasks, skills, and two methods.

    # guess.py
    from envs import Skill, TextEnv

    COLOURS = {"banana": "yellow", "plum": "purple", "kiwi": "green", "cherry": "red"}


    class Guess(TextEnv):
        name = "guess"
        instructions = "Guess a colour. Every answer is one line: <action>a colour</action>"
        default_turns = 3
        skills = [Skill(c, f"The {c} is {COLOURS[c]}.", keywords=(c,)) for c in COLOURS]
        goals = {c: ("colour", ("train", "dev", "eval")) for c in COLOURS}  # type, splits

        def _reset(self, task, seed):
            self.colour = COLOURS[task]
            self.task = f"What is the colour of the {task} in my garden?"
            return self.task, {"admissible": None, "won": False, "valid": True}

        def _step(self, action):
            won = action.lower() == self.colour
            observation = "That is it." if won else "No. Try again."
            return observation, {"admissible": None, "won": won, "valid": action != ""}

Then `python envs.py play guess:Guess`, and `python sdar.py --env guess:Guess --model ...`. A real
one holds tasks back: its splits have different tasks.

Signatures are Gymnasium's, without the dependency. Rewards are raw (0 or 1, at the end); scales and
penalties belong to the trainer. What is missing or fails raises EnvUnavailable, and is never shown
to the model as an observation.
"""

import difflib
import importlib
import json
import math
import os
import random
import re
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).resolve().parent


class UserError(ValueError):
    """Bad input: one line on stderr and exit code 2, in sdar.py as here."""


class EnvUnavailable(RuntimeError):
    """What an environment needs is missing or failed; the message says how to get it."""


def require(ok, message, error=UserError):
    """Raise the error unless ok."""
    if not ok:
        raise error(message)


def full_path(path):
    """The path from the root, ~ in front expanded."""
    return os.path.abspath(os.path.expanduser(path))


@contextmanager
def naming(what, kind=EnvUnavailable):
    """Whatever is raised in here becomes one error of this kind: what failed, and how."""
    try:
        yield
    except Exception as error:
        raise kind(f"{what} ({type(error).__name__}: {error})") from error


def as_typed(text):
    """A text from a command line, ~ in front expanded. argparse's error for what no file name and
    no page can hold: half a character, NUL, a line break."""
    from argparse import ArgumentTypeError

    if not text.isprintable():
        raise ArgumentTypeError(f"{text!r} holds a character that cannot be written")
    return os.path.expanduser(text)


def tolerant_output():
    """What a terminal cannot show, such as a bar of a curve in ASCII, appears as its number."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")


def unknown(what, value, known):
    """The message for a bad choice, the nearest good one first."""
    near = difflib.get_close_matches(str(value), known, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {value!r}: {hint}known: {', '.join(known)}"


# --- Skills: the source of the privileged context c+ (paper, section 2.1) ----------------
#
# A skill is a sentence or two that helps with some tasks. Before an episode those that fit its task
# are retrieved. The teacher reads them in front of the task; the student never does.


@dataclass(frozen=True)
class Skill:
    """An entry of a skill bank, for tasks whose type is in `task_types` and whose text holds one of
    `keywords` as a whole word; an empty tuple sets no condition."""

    name: str
    text: str
    task_types: tuple = ()
    keywords: tuple = ()

    def matches(self, task, task_type):
        """True if the skill is for this task text of this task type."""
        if self.task_types and task_type not in self.task_types:
            return False
        words = "|".join(map(re.escape, self.keywords))
        return not words or re.search(rf"\b({words})\b", task, re.IGNORECASE) is not None


# What the real environments tell their players: {environment: {"instructions", "skills"}}.
TEXTS = HERE / ".assets" / "environments.json"
TEXTS = json.loads(TEXTS.read_text("utf-8")) if TEXTS.exists() else {}
SKILLS = {name: [Skill(**row) for row in text.get("skills", ())] for name, text in TEXTS.items()}


def retrieve(bank, task, task_type, strategy, seed=0, bandit=None):
    """The skills of a task, a list. seed: of random choices, the same for a group's episodes.

    keyword: those whose task type and whole-word keywords fit it, each once. full: the whole bank.
    random: as many as keyword finds, at least one, of the whole bank. ucb: those that the bandit
    chooses. none: none. wrong, a control: as many as keyword finds, for other task types."""
    found = [skill for skill in bank if skill.matches(task, task_type)]
    rng = random.Random(f"{task}/{seed}".encode(errors="replace"))
    if strategy == "keyword":
        return found
    if strategy == "full":
        return list(bank)
    if strategy == "none":
        return []
    if strategy == "ucb":  # shuffled, so that ties are broken differently each time
        return (bandit or Bandit()).choose(rng.sample(bank, len(bank)), task, task_type)

    pool = bank
    if strategy == "wrong":
        typed = [skill for skill in bank if skill.task_types]
        pool = [skill for skill in typed if task_type not in skill.task_types]
    return rng.sample(pool, min(len(pool), max(1, len(found))))


def load_skills(file, env):
    """The skill bank in a file: a list of rows with name and text, perhaps task_types and keywords;
    or skill_mapping.json of the official repository, beside its Markdown files. UserError for
    anything else."""
    with naming(f"--skill-bank {file}: a list of name, text, task_types, keywords", UserError):
        rows = json.loads(Path(file).read_text("utf-8-sig"))
        if isinstance(rows, dict):
            rows = official_skills(Path(file).parent, rows, env)
        bank = [Skill(**row) for row in rows]
        require(bank, "it is empty")
        for skill in bank:
            texts = (skill.name, skill.text, *skill.task_types, *skill.keywords)
            lists = {type(skill.task_types), type(skill.keywords)} <= {list, tuple}
            require(lists and {*map(type, texts)} == {str}, f"the skill {skill.name!r:.50}")
        return [replace(s, task_types=(*s.task_types,), keywords=(*s.keywords,)) for s in bank]


def official_skills(folder, mapping, env):
    """Rows of a bank out of skill_files {skill: Markdown}, task_to_skill {task type: skill} and
    perhaps task_keywords {task type: texts}. The file general_skills is for every task. Types that
    this environment does not have are told by their keywords."""
    ours = TEXTS.get(env.name, {}).get("official_types", {})  # {their type: our name of it}
    types = {env.goals[task][0] for task in env.goals}
    rows = []
    for name, file in mapping["skill_files"].items():
        text = re.sub(r"^#.*\n", "", (folder / file).read_text("utf-8-sig")).strip()
        row = {"name": name, "text": text, "task_types": [], "keywords": []}
        for kind, skill in mapping["task_to_skill"].items():
            if skill == name and ours.get(kind, kind) in types:
                row["task_types"].append(ours.get(kind, kind))
            elif skill == name:
                row["keywords"] += mapping.get("task_keywords", {}).get(kind, [])
        if name == "general_skills" or row["task_types"] or row["keywords"]:
            rows.append(row)
    return rows


def skill_text(skills):
    """What a reader of the skills sees in front of the task; empty without skills."""
    if not skills:
        return ""
    return "Skill: " + " ".join(skill.text for skill in skills) + "\n"


class Bandit:
    """Retrieval by UCB1. The paper names it and does not define it; this is ours.

    An arm is a skill in a context: whether keyword retrieval would find it for the task. A task
    gets the SLOTS arms of largest mean reward + C sqrt(ln(all plays) / plays), arms never played
    first. The reward, in [-1, 1], is the correlation over a group's episodes of advantage and mean
    gap: a good skill makes its reader endorse what went well."""

    SLOTS = 3
    C = 1.0  # how much is explored

    def __init__(self, arms=None):
        self.arms = arms or {}  # {arm: [plays, sum of rewards]}

    def arm(self, skill, task, task_type):
        """The name of a skill's arm for a task."""
        return f"{skill.name} {'found' if skill.matches(task, task_type) else 'not found'}"

    def choose(self, bank, task, task_type):
        """The skills for a task; of equal ones those first in the bank."""
        total = sum(plays for plays, _ in self.arms.values())

        def index(skill):
            plays, rewards = self.arms.get(self.arm(skill, task, task_type), (0, 0.0))
            if not plays:
                return math.inf
            return rewards / plays + self.C * math.sqrt(math.log(total) / plays)

        return sorted(bank, key=index, reverse=True)[: self.SLOTS]

    def learn(self, episodes, advantages, gaps):
        """advantages, gaps: of each episode."""
        for group in {episode.group for episode in episodes}:
            rows = [i for i, episode in enumerate(episodes) if episode.group == group]
            its_own = [[values[i] for i in rows] for values in (episodes, advantages, gaps)]
            reward = self.reward(*its_own)
            if reward is None:
                continue
            first = episodes[rows[0]]
            for skill in first.skills:
                name = self.arm(skill, first.task, first.task_type)
                plays, rewards = self.arms.get(name, (0, 0.0))
                self.arms[name] = [plays + 1, rewards + reward]

    def reward(self, episodes, advantages, gaps):
        """Of a group; None if it says nothing, since nothing varies."""
        from statistics import correlation

        if len(set(advantages)) == 1 or len(set(gaps)) == 1:
            return None
        return correlation(advantages, gaps)


# --- What every environment shares -------------------------------------------------------
#
# sdar.py plays many episodes at once, so it makes many environments, and calls them together: one
# after the other, or in threads where a step waits for a server or a process (`slow`).


SPLITS = ("train", "dev", "eval")


class TextEnv:
    """Time limit, refusal to step after the end, cut of overlong observations, admissible actions
    under them, tasks of a split, keys of `info`: what is the same for every environment.

    info holds task (its text), task_type, admissible (list or None), won, score (0..1), valid.

    A subclass sets the attributes below and `goals`: {task id: (task type, splits, ...)}, splits
    out of train, dev, eval. It writes _reset(task, seed) and _step(action) -> (observation, state)
    and sets `task`, the task's text. state: a dict with admissible (list or None), won, valid and,
    where they differ from won, score (0..1) and over (the episode has ended by itself); perhaps
    tail, an end of the observation that is not to be cut off."""

    name = ""
    instructions = ""  # the system message
    examples = ()  # turns before the episode that show the form: (observation, response) pairs
    reminder = "Your next action, in <action></action>:"  # a language model reads it every turn
    skills = None  # the skill bank
    goals = {}
    takes = ()  # options beside max_turns: "data", "url"
    default_turns = 10
    tagged = True  # the player writes tags, as language models do; the tiny policy does not
    show_admissible = False  # under each observation; sdar.py shows them to language models
    brief = True  # what was listed in turn 1 is not listed again
    slow = False  # a step waits for something: it is worth a thread
    stop_strings = ("</action>",)  # a response also ends where one of these does

    def __init__(self, max_turns=0, max_obs_chars=4000):
        texts = TEXTS.get(self.name, {})
        self.instructions = self.instructions or texts.get("instructions")
        self.examples = self.examples or texts.get("examples", ())
        self.reminder = texts.get("reminder", self.reminder)
        if self.skills is None:
            self.skills = SKILLS.get(self.name)
        message = f"no instructions or skills for {self.name!r}: it brings its own, or they are in "
        complete = self.instructions and self.skills is not None
        require(complete, message + ".assets/environments.json", EnvUnavailable)

        self.max_turns = max_turns or self.default_turns
        self.max_obs_chars = max_obs_chars
        self._turns = 0
        self._running = False

    def cut(self, text):
        """The text, no longer than an observation may be. sdar.py puts a cut by tokens here."""
        if len(text) <= self.max_obs_chars:
            return text
        return text[: self.max_obs_chars] + " ..."

    def tasks(self, split):
        """Task ids of a split ("train", "dev", "eval"), in a fixed order; else EnvUnavailable."""
        found = [task for task, goal in self.goals.items() if split in goal[1]]
        known = sorted({name for goal in self.goals.values() for name in goal[1]})
        require(found, unknown(f"split of {self.name}", split, known), EnvUnavailable)
        return found

    def reset(self, task, seed=0):
        """Start an episode. task: an id out of tasks(split); the same (task, seed) is the same
        episode. Returns (observation, info); the first observation states the task. ValueError for
        an unknown id."""
        known = task in self.goals
        require(known, f"{self.name}: unknown task {task!r}; tasks('train') lists the ids")
        self.kind = self.goals[task][0]
        self._running = False
        self._listed = []
        observation, state = self._reset(task, seed)
        self._turns = 0
        self._running = True
        return self._result(observation, state)

    def step(self, action):
        """Play one action. Returns (observation, reward, terminated, truncated, info).

        reward is 1.0 on the step that wins, else 0.0. RuntimeError when no episode is running;
        EnvUnavailable, and none is running, if the engine fails."""
        message = f"{self.name}: no episode is running, call reset() first"
        require(self._running, message, RuntimeError)
        self._running = False
        observation, state = self._step(action)
        self._turns += 1

        # terminated: the world has ended the episode; truncated: our limit has. The reward comes
        # once, at the end, for the whole: which of the actions earned it nobody says.
        terminated = state.get("over", state["won"])
        truncated = not terminated and self._turns >= self.max_turns
        self._running = not (terminated or truncated)
        reward = float(terminated and state["won"])
        observation, info = self._result(observation, state)
        return observation, reward, terminated, truncated, info

    def parse(self, response):
        """Text of the model -> (action, valid): what the first complete <action>...</action> holds,
        tags in any case; without one "", False. Where nobody writes tags (`tagged`), as the tiny
        policy, a text of one line without any."""
        # The first complete pair counts. What stands before it is reasoning, what stands after it
        # was never waited for.
        found = re.search(r"<action>((?:(?!<action>).)*?)</action>", response, re.DOTALL | re.I)
        text = found[1] if found else ""
        if not (found or self.tagged or re.search("[\n<]", response.strip())):
            text = response
        action = " ".join(text.split())
        return action, bool(action)

    def label(self, task):
        """Under which name the success of a task, an id, is reported: its type."""
        return self.goals[task][0]

    def panel(self, split, episodes):
        """The evaluation episodes, a list of (task, seed): always the same ones, every task type
        equally often. episodes: how many; "all": each task of the split once."""
        if episodes == "all":
            return [(task, 10**6) for task in dict.fromkeys(self.tasks(split))]
        # Round after round one task of each type; when a type has no more, its first one again,
        # from another seed.
        pools = {}
        for task in self.tasks(split):
            pools.setdefault(self.label(task), []).append(task)
        kinds = sorted(pools)
        panel = []
        for i in range(episodes):
            turn, kind = divmod(i, len(kinds))
            pool = pools[kinds[kind]]
            panel.append((pool[turn % len(pool)], 10**6 + turn))
        return panel

    def close(self):
        """End the episode, if one is running; may be called twice."""
        self._running = False

    def _result(self, text, state):
        text = self.cut(text) + state.get("tail", "")
        if self.show_admissible and self._running and state["admissible"]:
            text += "\nAdmissible actions: " + self._listing(state["admissible"])
        info = {"task": self.task, "task_type": self.kind, "score": float(state["won"]), **state}
        wanted = ("task", "task_type", "admissible", "won", "score", "valid")
        return text, {key: info[key] for key in wanted}

    def _listing(self, admissible):
        """The actions that are admissible. Most of the first list, every "go to", is there in all
        turns: from then on it is said in a few words, which are no action."""
        news = [action for action in admissible if action not in self._listed]
        gone = [action for action in self._listed if action not in admissible]
        if not (self.brief and self._listed) or len(gone) > 3:
            self._listed = self._listed or admissible
            return ", ".join(admissible)
        without = f", without {' and '.join(gone)}" if gone else ""
        return ", ".join([*news, f"(all that turn 1 listed{without})"])


def call_all(calls, in_threads):
    """Results of functions without arguments, in order; where one raised EnvUnavailable, that."""

    def result(call):
        try:
            return call()
        except EnvUnavailable as error:
            return error

    if not in_threads:
        return [result(call) for call in calls]
    with ThreadPoolExecutor(64) as pool:
        return list(pool.map(result, calls))


# --- The toy household: ALFWorld's spirit and wording, small enough for a CPU -------------
#
# What makes the skill matter: each class of object has one home, of each kind of appliance one
# works, and the lamp stands somewhere. None of it can be seen from the middle of the room, and the
# turns are too few to search. But the skill bank says it.

CLOSABLE = tuple(f"{kind} {n}" for kind in ("cabinet", "drawer") for n in range(1, 9))
SURFACES = ("desk 1", "shelf 1", "sofa 1", "countertop 1")
APPLIANCES = {  # {what it does: those of its kind, of which one works}
    "clean": ("sinkbasin 1", "sinkbasin 2", "sinkbasin 3"),
    "heat": ("microwave 1", "microwave 2", "microwave 3"),
    "cool": ("fridge 1", "fridge 2", "fridge 3"),
}
CLASSES = ("apple", "bowl", "bread", "cup", "egg", "mug", "plate", "potato", "spoon", "tomato")
TASK_TEXT = {  # {task type: sentence}
    "put": "put a {object} in {target}",
    "clean": "clean a {object} and put it in {target}",
    "heat": "heat a {object} and put it in {target}",
    "cool": "cool a {object} and put it in {target}",
    "look": "look at a {object} under the desklamp 1",
    "two": "put two {object} in {target}",
}


@dataclass(frozen=True)
class Household:
    """What a newcomer cannot know: the home of each class, the appliance that works, the lamp's.

    home: {class of object: place}; appliance: {verb: the one that works}; lamp: its place.
    closable: the places that hold things behind a door; a larger household has more of them."""

    home: dict
    appliance: dict
    lamp: str
    closable: tuple = CLOSABLE

    @property
    def storages(self):
        """All places that can hold objects."""
        return self.closable + SURFACES

    # A policy that was trained in random households has learned how to act and how to read a skill,
    # and nothing of the one below: that is what the tiny policy is.
    @classmethod
    def random(cls, rng, closable=CLOSABLE):
        """Draw a household with random.Random `rng`."""
        home = {c: rng.choice(closable + SURFACES) for c in CLASSES}
        appliance = {verb: rng.choice(three) for verb, three in APPLIANCES.items()}
        return cls(home, appliance, rng.choice(SURFACES), closable)

    def skills(self):
        """The household's skill bank: an entry a class of objects, one a verb, one for the lamp."""
        bank = []
        for c, place in self.home.items():
            bank.append(Skill(c, f"The {c} is kept in {place}.", (), (c,)))
        for verb, place in self.appliance.items():
            bank.append(Skill(verb, f"{verb.capitalize()} with {place}.", (verb,), (verb,)))
        bank.append(Skill("lamp", f"The desklamp 1 is on {self.lamp}.", ("look",), ("desklamp",)))
        return bank


HOME = Household.random(random.Random(2605))  # the household of every training and evaluation task
SKILLS["toy"] = HOME.skills()


class ToyEnv(TextEnv):
    """The toy household.

    A task id is the task's sentence; `seed` chooses which other objects are about. A well-formed
    action that cannot be done here is valid and answered "Nothing happens."; its place (`take O
    [from P]`, `put O [in/on P]`, `heat O [with P]`) may be left out. Splits: train 3/5 of each
    type's tasks, dev (to choose settings) and eval 1/5.

    An episode, without and with the skill "The mug is kept in cabinet 3.":

        You are in the middle of a room. Your task is to: put a mug in sofa 1.
        > go to drawer 1                      > go to cabinet 3
        The drawer 1 is closed.               The cabinet 3 is closed.
        > open drawer 1                       > open cabinet 3
        In the drawer 1 you see nothing.      In the cabinet 3 you see a mug 1.
        > go to drawer 2                      > take mug 1
        ...                                   ...
    """

    name = "toy"
    tagged = False  # sdar.py sets it for its player
    instructions = (
        "Play a text game. Every answer is exactly one line:\n"
        "<action>an action from the list</action>"
    )
    GRAMMAR = re.compile(
        r"(?P<short>(?P<verb>go to|open|take|put|clean|heat|cool|use) (?P<what>[a-z]+ \d+))"
        r"(?: (?:from|in/on|with) (?P<place>[a-z]+ \d+))?|(?P<alone>look|inventory)"
    )

    def __init__(self, household=HOME, **options):
        super().__init__(**options)
        self.household = household
        self.skills = household.skills()
        self.places = household.storages + sum(APPLIANCES.values(), ())
        self.goals = {}  # {sentence: (task type, splits, class of object, target)}
        # Every type, object and target, but for targets where the object is already.
        for kind, text in TASK_TEXT.items():
            for c in CLASSES:
                for target in household.storages:
                    if target != household.home[c]:
                        goal = (kind, ("train", "dev", "eval"), c, target)
                        self.goals[text.format(object=c, target=target)] = goal

    def tasks(self, split):
        """Task ids of a split ("train", "dev" or "eval"): disjoint, in a fixed order mixed over
        types. There are few tasks of type look, so train lists each of them several times: every
        type comes equally often. ValueError for another split."""
        require(split in SPLITS, unknown("split of toy", split, SPLITS))
        order = sorted(self.goals)
        random.Random(0).shuffle(order)
        chosen = []
        for kind in TASK_TEXT:
            of_kind = [task for task in order if self.goals[task][0] == kind]
            fifth = len(of_kind) // 5
            if split == "eval":
                chosen += of_kind[:fifth]
            elif split == "dev":
                chosen += of_kind[fifth : 2 * fifth]
            else:
                targets = len(self.household.storages) - 1
                times = targets if kind == "look" else 1  # in the default one 6 tasks, not 114
                chosen += of_kind[2 * fifth :] * times
        return sorted(chosen, key=order.index)

    def _reset(self, task, seed):
        self.task = task
        self.goal_class, self.target = self.goals[task][2:]
        self.where = None  # in the middle of the room
        self.hand = None
        self.opened = set(self.places) - set(self.household.closable)
        self.seen = set()  # storages whose contents were looked at
        self.broken = set()  # appliances that were tried
        self.lit = False
        self.done_to = set()  # (verb, object) pairs

        # The goal's class is at home, and so are four others, to fill the cupboards.
        rng = random.Random(f"{task}/{seed}")
        others = rng.sample([c for c in CLASSES if c != self.goal_class], 4)
        wanted = [self.goal_class] * (2 if self.kind == "two" else 1)
        self.contents = {place: [] for place in self.places}
        for c in sorted(others + wanted):
            place = self.contents[self.household.home[c]]
            number = 1 + sum(is_a(thing, c) for thing in place)
            place.append(f"{c} {number}")
        self.contents[self.household.lamp].append("desklamp 1")
        observation = f"You are in the middle of a room. Your task is to: {task}."
        return observation, self._state(valid=True)

    def _step(self, action):
        match = self.GRAMMAR.fullmatch(action.strip().lower())
        if not match:
            return "Nothing happens.", self._state(valid=False)

        # Understood, but perhaps impossible: then nothing happens, as in ALFWorld, and no penalty.
        # "take mug 1" is short for the admissible "take mug 1 from desk 1".
        short = match["short"] or match["alone"]
        admissible = any(is_a(one, short) for one in self._admissible())
        observation = "Nothing happens."
        if admissible and match["place"] in (None, self.where):
            observation = self._act(match["verb"] or match["alone"], match["what"])
        return observation, self._state(valid=True)

    # What the actions do. Each returns the observation.

    def _act(self, verb, what):
        """Play an action that is admissible. Returns the observation."""
        if verb == "inventory":
            return f"You are carrying {self.hand or 'nothing'}."
        if verb == "use":
            self.lit = True
            return "You turn on desklamp 1."
        if verb == "take":
            self.contents[self.where].remove(what)
            self.hand = what
            return f"You pick up {what}."
        if verb == "put":
            self.contents[self.where].append(what)
            self.hand = None
            return f"You put {what} in/on {self.where}."
        if verb in APPLIANCES:
            return self._use_appliance(verb, what)

        if verb == "go to":
            self.where = what
        if verb == "open":
            self.opened.add(what)
        return self._view()

    def _use_appliance(self, verb, what):
        if self.where != self.household.appliance[verb]:
            self.broken.add(self.where)
            return "Nothing happens."
        if verb in ("heat", "cool"):  # one undoes the other
            self.done_to -= {("heat", what), ("cool", what)}
        self.done_to.add((verb, what))
        return f"You {verb} {what} with {self.where}."

    def _view(self):
        if self.where is None:
            return "You are in the middle of a room."
        if self.where not in self.opened:
            return f"The {self.where} is closed."
        self.seen.add(self.where)
        if self.where not in self.household.storages:
            return f"You arrive at {self.where}."
        here = " and ".join(f"a {thing}" for thing in self.contents[self.where]) or "nothing"
        side = "On" if self.where in SURFACES else "In"
        return f"{side} the {self.where} you see {here}."

    def _state(self, valid):
        return {"admissible": self._admissible(), "won": self._won(), "valid": valid}

    # What can be asked of a state: is the task done, and what could be done next?

    def _won(self):
        # Look: the lamp is lit, and the object in the hand, in one place. Else the target must hold
        # the object, two of them for "two", heated, cooled or cleaned where the task says so.
        if self.kind == "look":
            holds_it = self.hand is not None and is_a(self.hand, self.goal_class)
            lamp_is_here = "desklamp 1" in self.contents.get(self.where, [])
            return self.lit and holds_it and lamp_is_here
        there = [thing for thing in self.contents[self.target] if is_a(thing, self.goal_class)]
        if self.kind in APPLIANCES:
            there = [thing for thing in there if (self.kind, thing) in self.done_to]
        return len(there) >= (2 if self.kind == "two" else 1)

    def _admissible(self):
        # Everywhere one can go; what is here can be opened, taken, put down or used. What does not
        # work here (a broken microwave) is not told: it must be tried, or read in the skill.
        actions = [f"go to {place}" for place in self.places if place != self.where]
        here = []
        if self.where in self.opened:
            here = self.contents[self.where]
        elif self.where:
            actions.append(f"open {self.where}")

        if self.hand is None:
            things = [thing for thing in here if thing != "desklamp 1"]
            actions += [f"take {thing} from {self.where}" for thing in things]
        elif self.where in self.household.storages and self.where in self.opened:
            actions.append(f"put {self.hand} in/on {self.where}")
        for verb, places in APPLIANCES.items():
            if self.hand and self.where in places:
                actions.append(f"{verb} {self.hand} with {self.where}")

        if "desklamp 1" in here:
            actions.append("use desklamp 1")
        return actions + ["look", "inventory"]


def is_a(text, start):
    """True if a text is these words, or begins with them: is_a("mug 1", "mug")."""
    return f"{text} ".startswith(f"{start} ")


# --- The paper's three environments: thin shims, the real engines are imported when used --
#
# Each translates between the engine's calls and the signatures above, and nothing else: what an
# engine says is shown as it is, but for banners and a list that would be repeated every turn. What
# an engine raises becomes EnvUnavailable. The texts for the model and the skills are data, in
# .assets/environments.json.


# ALFWorld's engine is slow, and not safe in threads: a process a core plays it.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
WORKERS = {}  # {core: executor of one process}
LOCK = threading.Lock()
PLAYING = {}  # in a worker, {number of an environment: (path, game)}; loading is half of a reset


def worker_begins():
    """In a worker: leave Ctrl-C and SIGTERM to the parent, and end when it ends, however."""
    from multiprocessing import parent_process

    def end_with_parent():
        parent_process().join()
        os._exit(1)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    os.environ["ALFWORLD_DATA"] = os.sep  # a folder that exists: else the package makes one at home
    threading.Thread(target=end_with_parent, daemon=True).start()


def play_game(number, path, action):
    """In a worker: start a game (action None) or act in the one that environment `number` plays.
    Returns (text, won, admissible)."""
    signal.alarm(120)  # an engine that hangs takes its process along
    with naming(f"cannot play {path}"):
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler

        if action is None:
            if PLAYING.get(number, ("",))[0] != path:
                wanted = textworld.EnvInfos(won=True, admissible_commands=True)
                PLAYING[number] = path, textworld.start(path, wanted, [AlfredDemangler])
            state = PLAYING[number][1].reset()
        else:
            state = PLAYING[number][1].step(action)[0]
        signal.alarm(0)
        admissible = [a for a in state["admissible_commands"] if a != "help"]
        return state["feedback"].strip(), bool(state["won"]), admissible


class AlfworldEnv(TextEnv):
    """ALFWorld's text games on TextWorld's PDDL engine. A task id is a game's path below `data` (or
    ALFWORLD_DATA); `seed` changes nothing. An action that cannot be done is valid and answered
    "Nothing happens.", as in the official code. Splits: train, eval (the data set's valid_seen, as
    in the paper), dev (valid_unseen), or its own names; a folder without the data set's split
    folders is every split."""

    name = "alfworld"
    takes = ("data",)
    default_turns = 50
    show_admissible = True
    slow = True
    number = -1  # of the last environment made
    SPLITS = {
        "train": ("train",),
        "valid_seen": ("eval", "valid_seen"),
        "valid_unseen": ("dev", "valid_unseen"),
    }

    def __init__(self, data="", **options):
        super().__init__(**options)
        message = "ALFWorld is missing: pip install alfworld (built with g++, make, `python`)"
        installed = find_spec("textworld") and find_spec("alfworld")
        require(installed, message, EnvUnavailable)
        self.data = full_path(data or os.environ.get("ALFWORLD_DATA", "(no data named)"))
        AlfworldEnv.number += 1
        self.number = AlfworldEnv.number
        self.goals = self.games(self.data)

    @classmethod
    @lru_cache(maxsize=None)
    def games(cls, folder):
        """{path: (task type, splits)} of the games below a folder, sorted, but for those that the
        official loader leaves out: not solvable, with a movable receptacle, with something sliced.
        EnvUnavailable if there are none: the engine would hang."""
        found, left_out = [], 0
        paths = sorted(Path(folder).rglob("*.tw-pddl"))
        for path in tqdm(paths, "reading games", unit="game", delay=2, leave=False):
            name, text = str(path.relative_to(folder)), path.read_text("utf-8", "replace")
            if re.search("movable|Sliced", name) or re.search(r'"solvable":\s*false', text):
                left_out += 1
            else:
                found.append(path)
        if left_out:
            print(f"alfworld: {left_out} games left out, as officially", file=sys.stderr)
        message = f"no ALFWorld games (*.tw-pddl) in {folder}: run alfworld-download"
        require(found, message, EnvUnavailable)
        paths = [path.relative_to(folder) for path in found]
        splits = {}
        for path in paths:
            for part in path.parts[:-1]:
                if part in cls.SPLITS:
                    splits[path] = cls.SPLITS[part]
        if not splits:  # not the data set's folders: every game is in every split
            splits = dict.fromkeys(paths, sum(cls.SPLITS.values(), ()))

        games = {}
        for path, parts in splits.items():
            kind = re.search(r"(pick|look)_\w+", str(path))
            games[str(path)] = (kind[0] if kind else "other", parts)
        return games

    def _reset(self, task, seed):
        self.path = os.path.join(self.data, task)
        observation, state = self._step(None)
        self.task = observation.split("Your task is to: ")[-1]
        return observation.split("=-")[-1].strip(), state  # without the banner

    def _step(self, action):
        from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
        from multiprocessing import get_context

        core = self.number % CORES
        if action is not None:
            action = action.strip().lower()
        try:
            with LOCK:  # several threads may be the first
                if core not in WORKERS:
                    context = get_context("fork")
                    WORKERS[core] = ProcessPoolExecutor(1, context, worker_begins)
                future = WORKERS[core].submit(play_game, self.number, self.path, action)
            text, won, admissible = future.result()
        except BrokenExecutor as error:
            WORKERS.pop(core, None)  # the next reset starts another
            raise EnvUnavailable(f"cannot play {self.path}: its process died") from error
        return text, {"admissible": admissible, "won": won, "valid": action != ""}


class WebShopEnv(TextEnv):
    """WebShop's own text environment, from a checkout of its code in `data` (or WEBSHOP_ROOT).

    A task id is the index of a synthetic goal, as in the official code; `score` is WebShop's
    reward. Splits by index: eval the first 500 goals (at most a fifth), dev as many, train the
    rest. What the page does not offer does nothing; search works on every page."""

    name = "webshop"
    takes = ("data",)
    default_turns = 15
    show_admissible = True
    brief = False  # another page, other links
    first = {}  # {root: its first environment}, whose server (products, index) is everyone's

    def __init__(self, data="", **options):
        super().__init__(**options)
        root = full_path(data or os.environ.get("WEBSHOP_ROOT", "(none named)"))
        first = self.first.get(root)
        self.shop = self._start(root, first.shop.server if first else None)
        self.first.setdefault(root, self)
        self.goals = first.goals if first else self._goals()

    def _start(self, root, server):
        """The real environment. server: of the first one, or None."""
        before = random.getstate()
        if root not in sys.path:
            sys.path.append(root)
        try:
            from web_agent_site.envs.web_agent_text_env import WebAgentTextEnv

            random.seed(233)  # the engine seeds the order of goals, but not their price limits
            shop = WebAgentTextEnv(
                observation_mode="text",
                human_goals=False,
                server=server,
                session_prefix=f"{id(self)}-",  # else equal goals share a session
            )
        except Exception as error:  # whatever a half-installed engine raises
            reason = f"{self._missing(root)} ({type(error).__name__}: {error})"
            recipe = ".lab/ENVIRONMENTS.md has a recipe"
            raise EnvUnavailable(f"WebShop does not start: {reason}; {recipe}") from error
        random.setstate(before)
        return shop

    @staticmethod
    def _missing(root):
        """The first piece that WebShop needs and that is not there, in words."""
        if not os.path.isdir(os.path.join(root, "web_agent_site")):
            return f"WEBSHOP_ROOT={root} is no checkout of its code"
        packages = "pyserini jnius faiss pandas bs4 cleantext flask rich thefuzz rank_bm25 gym "
        for name in (packages + "selenium spacy sklearn en_core_web_sm").split():
            if not find_spec(name):
                return f"the Python package {name} is missing"
        for folder in ("data", "search_engine/indexes"):
            if not os.path.isdir(os.path.join(root, folder)):
                return f"{root} has no folder {folder}"
        return f"its code in {root} failed"

    def _goals(self):
        goals = self.shop.server.goals
        held = max(1, min(500, len(goals) // 5))
        found = {}
        for i, goal in enumerate(goals):
            split = ("eval", "dev", "train")[min(2, i // held)]
            kind = goal.get("category", "other")
            found[str(i)] = (kind, (split,), goal["instruction_text"])
        return found

    def _reset(self, task, seed):
        self.task = self.goals[task][2].strip()
        observation, state = self._play(self.shop.reset, int(task))
        return f"Instruction: {self.task}\n{observation}", state

    def _step(self, action):
        match = re.fullmatch(r"(search|click)\[\s*(.*?)\s*\]", action.strip().lower())
        if match and match[1] == "click" and match[2] in self.clickable:
            return self._play(self.shop.step, f"click[{self.clickable[match[2]]}]")
        if match and match[1] == "search" and match[2] and not match[2].startswith("<"):
            return self._play(self.shop.step, f"search[{match[2]}]")  # <: its own commands, fragile
        return "Nothing happens.", {**self.state, "valid": match is not None}

    def _play(self, call, argument):
        score, over = 0.0, False
        with naming(f"WebShop failed at {argument!r}"):
            observation, *more = call(argument)
            if (
                call == self.shop.step
            ):  # observation, score, over, info; of reset: observation, info
                score, over = float(more[0] or 0), bool(more[1])
            page = self.shop.get_available_actions()

        offered = [text for text in page["clickables"] if text != "search"]  # that one is dead
        self.clickable = {" ".join(text.split()): text for text in offered}
        actions = [f"click[{text}]" for text in self.clickable]
        if page["has_search_bar"]:
            actions.insert(0, "search[<query>]")
        self.state = {"admissible": actions, "won": over and score == 1, "valid": True}
        self.state |= {"score": score, "over": over}
        return observation.replace(f"Instruction: [SEP] {self.task} [SEP] ", ""), self.state


def file_rows(file, wanted):
    """(number, row) of a JSON-lines or parquet file of dicts, in order. EnvUnavailable, named with
    its line, for what is none. wanted: what the rows should hold, in words."""
    if str(file).endswith(".parquet"):
        yield from enumerate(parquet_rows(file), 1)
        return
    with naming(f"{file!r} must be {wanted}"):
        require(os.path.isfile(file), "there is no such file")
        lines = Path(file).read_text("utf-8-sig").split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            with naming(f"{file}, line {number}: not a row of {wanted}"):
                row = json.loads(line)
                require(isinstance(row, dict), "it is no object")
            yield number, row


def parquet_rows(file):
    """The rows of a parquet file, dicts, by pyarrow or pandas. EnvUnavailable without them."""
    message = f"{file}: a parquet file needs pyarrow (pip install pyarrow), or a conversion to JSON"
    reader = next((name for name in ("pyarrow", "pandas") if find_spec(name)), None)
    require(reader, f"{message} lines elsewhere: pandas' read_parquet, to_json", EnvUnavailable)
    with naming(f"{file!r} must be a parquet file"):
        if reader == "pyarrow":
            from pyarrow.parquet import read_table

            return read_table(file).to_pylist()
        import pandas

        return json.loads(pandas.read_parquet(file).to_json(orient="records"))


def read_rows(file, **types):
    """The rows of a file: dicts with an id, each once, and values of these types. EnvUnavailable
    names the line that is no such row."""
    wanted = "a JSON-lines file with " + ", ".join(types)
    rows, places = [], {}
    for number, row in file_rows(file, wanted):
        with naming(f"{file}, line {number}: not a row of {wanted}"):
            for key, kinds in types.items():
                fine = type(row[key]) in kinds and row[key] != ""
                require(fine, f"{key} is {row[key]!r:.50}")
            place = places.setdefault(str(row["id"]), number)
            require(place == number, f"its id is that of line {place}")
            rows.append(row)
    return rows


def ask(url, query, topk=3, seconds=30):
    """Passages for a query from a retrieval server: a list of str, best first.

    At most three tries in so many seconds, one if the fault is ours (4xx); then EnvUnavailable,
    with what came back."""
    body = {
        "query": query,
        "queries": [query],
        "topk": topk,
        "return_scores": True,
    }  # both dialects
    end = time.monotonic() + seconds
    for pause in (0.2, 1.0, seconds):
        answer = bytearray()
        try:
            post(url, json.dumps(body).encode(), end, answer)
            found = json.loads(answer)["result"][0]
            passages = []
            for row in found:
                document = row.get("document", row)
                text = document.get("contents") or f"{document['title']}\n{document['text']}"
                require(isinstance(text, str), "contents that are no text")
                padding = row.get("score", 0) < -1e30  # of an index that found too little
                if not padding and text not in passages:
                    passages.append(text)
            if len(passages) > topk:
                too_many(url, topk)
            return passages[:topk]
        except Exception as error:  # no connection, a status, half an answer, JSON of another shape
            trouble = f"{type(error).__name__}: {error}"
            if answer:
                trouble += f"; it sent {bytes(answer[:200])}"
            ours = 400 <= getattr(error, "code", 0) < 500
            if ours or time.monotonic() + pause >= end:
                break
            time.sleep(pause)
    hint = "`python envs.py serve CORPUS.jsonl` starts a server"
    raise EnvUnavailable(f"no search results from {url} ({trouble}); {hint}")


@lru_cache
def too_many(url, topk):
    """Say once that a server sends more than it was asked for."""
    print(f"{url} sends more than {topk} passages: the others are dropped", file=sys.stderr)


def post(url, body, end, answer):
    """POST a JSON body, and add what comes back to `answer`, part by part: a server that drips must
    not outlast the time. TimeoutError at time.monotonic() `end`, or after 8 MB."""
    from urllib.request import ProxyHandler, Request, build_opener

    request = Request(url, body, {"Content-Type": "application/json"})
    timeout = max(0.1, min(10, end - time.monotonic()))
    with build_opener(ProxyHandler({})).open(request, timeout=timeout) as response:
        while part := response.read1(2**16):
            answer += part
            if len(answer) > 2**23 or time.monotonic() > end:
                raise TimeoutError("more than 8 MB, or too slow")


class SearchEnv(TextEnv):
    """Questions to answer with a search server, as in Search-R1.

    A task id is a question's id, with data sets set/id; `seed` changes nothing. Won: a golden
    answer but for case, punctuation, articles and blanks. At the last turn a search is not
    executed.

    data: a JSON-lines or parquet file: see `question_of`. Without a split, a hash of the id puts
    3/5 into train, 1/5 into dev and 1/5 into eval. url: of the server."""

    name = "search"
    takes = ("data", "url")
    default_turns = 4
    slow = True
    stop_strings = ("</search>", "</answer>")
    TYPES = {  # {task type: words in a question that tell it}, the first that fits
        "compare": r"\b(both|same|older|younger|earlier|later|first|more|larger|longer|higher)\b"
        r".*\b(or|and)\b",
        "multi_hop": r"hotpot|2wiki|musique|bamboogle"
        r"|\b(whose|of the \w+ (that|who|which|where))\b",
        "attribute": r"\b(when|where|how (many|much|old|long|tall)|what (year|date|city|number))\b",
        "direct": "",
    }
    ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL | re.IGNORECASE)
    TAG = re.compile(r"<(?=\s*(?:/\s*)?(?:search|answer|information|think|action)\b)", re.I)

    def __init__(self, data="(no data named)", url="http://127.0.0.1:8000/retrieve", **options):
        super().__init__(**options)
        self.url = url
        self.goals = self.questions(os.path.expanduser(data), url)

    @classmethod
    @lru_cache(maxsize=None)
    def questions(cls, file, url):
        """{task id: (task type, splits, (question, golden answers, data set))} of a file; the
        server was tried."""
        require(url.startswith(("http://", "https://")), f"{url}: a server's http:// address")
        wanted = "questions, with id, question and golden_answers"
        goals, places, empty = {}, {}, 0
        for number, row in file_rows(file, wanted):
            with naming(f"{file}, line {number}: not a row of {wanted}"):
                name, question, golden, source, split = question_of(row, number)
                name = f"{source}/{name}" if source else name
                place = places.setdefault(name, number)
                require(place == number, f"its id is that of line {place}")
            if not (question and golden):
                empty += 1
                continue
            text = f"{question[:2000]} {source}"
            kinds = [kind for kind, words in cls.TYPES.items() if re.search(words, text, re.I)]
            draw = random.Random(name.encode(errors="replace"))
            of_hash = draw.choice(("eval", "dev", "train", "train", "train"))
            goals[name] = (kinds[0], (split or of_hash,), (question, golden, source))
        if empty:
            print(f"{file}: {empty} rows without question or answer left out", file=sys.stderr)
        require(goals, f"{file}: no row can be answered", EnvUnavailable)
        ask(url, "probe")
        return goals

    def label(self, task):
        """With data sets success is reported by set, as in the paper's table."""
        return self.goals[task][2][2] or self.goals[task][0]

    def parse(self, response):
        """Text of the model -> (action, valid): the first <search> or <answer> in it, without line
        breaks; else ""."""
        found = self.ACTION.search(response)
        text = " ".join(found[2].split()) if found else ""
        if not text:
            return "", False
        tag = found[1].lower()
        return f"<{tag}>{text}</{tag}>", True

    def _reset(self, task, seed):
        self.task, self.golden, _ = self.goals[task][2]
        return self.task, {"admissible": None, "won": False, "valid": True}

    def _step(self, action):
        action, valid = self.parse(action)
        state = {"admissible": None, "won": False, "valid": valid, "over": False}
        if not valid:
            return "Nothing happens.", state
        kind, text = self.ACTION.fullmatch(action).groups()
        if kind == "answer":
            return "", {**state, "won": self.matches(text, self.golden), "over": True}
        if self._turns + 1 >= self.max_turns:
            return "", state

        found = ""
        for i, passage in enumerate(ask(self.url, text), 1):
            found += f"\nDoc {i}: " + self.TAG.sub("(", passage)  # no forged tags
        found = found.strip("\n") or "nothing found"
        return f"<information>{found}", {**state, "tail": "</information>"}

    @staticmethod
    def matches(answer, golden):
        """True if the answer is a golden one (a str or a list) but for case, punctuation, articles
        and blanks. Of "A" or "The" these leave nothing: there but for case and blanks."""

        def plain(text):
            text = str(text).lower()
            letters = re.sub(r"[!-/:-@[-`{-~]", "", text)
            return re.sub(r"\b(a|an|the)\b", " ", letters).split() or text.split()

        if isinstance(golden, str):
            golden = [golden]
        return any(plain(text) == plain(answer) for text in golden if plain(text))


def question_of(row, number):
    """(id, question, golden answers, data set or "", split or "") of a row as FlashRAG, Search-R1
    or SDAR write it. number: the row's, its id where it brings none. UserError for another type."""
    of_env, extra = row.get("env_kwargs") or {}, row.get("extra_info") or {}
    truth = (row.get("reward_model") or of_env).get("ground_truth") or {}
    golden = row.get("golden_answers")
    if golden is None:
        golden = truth.get("target", ()) if isinstance(truth, dict) else truth
    golden = [golden] if isinstance(golden, str) else golden
    named = row.get("id", extra.get("index"))
    require(named is not None or of_env, "it has no id")
    found = {
        "id": number if named is None else named,
        "question": row.get("question", of_env.get("question")) or "",
        "data_source": row.get("data_source") or of_env.get("data_source") or "",
        "split": row.get("split") or extra.get("split") or "",
    }
    for key, value in found.items():
        kinds = (str, int) if key == "id" else (str,)
        require(type(value) in kinds and (value != "" or key != "id"), f"{key} is {value!r:.50}")
    fine = isinstance(golden, (list, tuple)) and all(isinstance(text, str) for text in golden)
    require(fine, "golden_answers must be texts")
    golden = [text for text in golden if text.strip()]
    return str(found["id"]), found["question"].strip(), golden, *list(found.values())[2:]


# --- Environments by name, the command line ----------------------------------------------
#
# `python envs.py play toy`: playing an environment yourself is the quickest way to see what a model
# is asked to do, and whether its task can be solved from what is shown.

ENVS = {"toy": ToyEnv, "alfworld": AlfworldEnv, "webshop": WebShopEnv, "search": SearchEnv}


def make_env(name, **options):
    """A new environment by its name, or "module:Class" for one of your own.

    options go to its constructor: max_turns, max_obs_chars, and data or url where it takes them.
    ValueError for an unknown name or option; EnvUnavailable where something is missing."""
    if ":" in name:
        made = own_class(name)
    else:
        require(name in ENVS, unknown("environment", name, ENVS))
        made = ENVS[name]
    for option in ("data", "url"):
        takes = option in made.takes or option not in options
        require(takes, f"the environment {name} takes no option {option}")
    env = made(**options)
    require(env.goals, f"the environment {name} has no goals")
    return env


def own_class(name):
    """The class that "module:Class" names, from the current folder or an installed package.
    UserError if there is none that is a TextEnv, or if its module cannot be imported."""
    module, _, attribute = name.partition(":")
    sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever somebody's module raises
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"the environment {name} cannot be imported: {reason}") from error
    is_env = isinstance(found, type) and issubclass(found, TextEnv)
    require(is_env, f"the environment {name} must be a class made from envs.TextEnv")
    return found


def main(argv):
    """Hand the command line over to .lab/player.py. Returns the exit code: 0, also at the end of
    input; 2 bad input (one line on stderr); 130 Ctrl-C."""
    folder = HERE / ".lab"
    if not (folder / "player.py").exists():
        print("envs.py: playing comes with the repository, in its folder .lab", file=sys.stderr)
        return 2
    sys.path.append(str(folder))
    return importlib.import_module("player").main(argv)


if __name__ == "__main__":
    from envs import main  # the module that an environment of your own imports, not a second one

    sys.exit(main(sys.argv[1:]))
