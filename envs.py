"""Text environments for sdar.py: a toy household; thin shims around ALFWorld, WebShop, Search-QA.

    python .lab/player.py toy            # be the agent
    python .lab/player.py toy --skill    # and read what the teacher reads

Write your own: a class with a text for the model, tasks, skills, and two methods.

    # guess.py
    from envs import TextEnv

    COLOURS = {"banana": "yellow", "plum": "purple", "kiwi": "green", "cherry": "red"}


    class Guess(TextEnv):
        name = "guess"
        instructions = "Guess a colour. Every answer is one line: <action>a colour</action>"
        default_turns = 3
        skills = [
            {"name": fruit, "text": f"The {fruit} is {colour}.", "keywords": [fruit]}
            for fruit, colour in COLOURS.items()
        ]
        goals = {fruit: ("colour", ("train", "eval")) for fruit in COLOURS}  # id: (type, splits)

        def _reset(self, task, seed):
            self.colour = COLOURS[task]
            self.task = f"What is the colour of the {task} in my garden?"
            return self.task, {}

        def _step(self, action):
            won = action.lower() == self.colour
            return "That is it." if won else "No. Try again.", {"won": won}

Then `python .lab/player.py guess:Guess`, or `python sdar.py --env guess:Guess --model ...`. Without
a model the tiny policy plays, which knows the toy's words alone. A real environment holds tasks
back: its splits have different tasks.

step() returns what Gymnasium's does. Rewards are raw (0 or 1, at the end); scales and
penalties belong to the trainer. What fails in play raises EnvUnavailable, and is never shown to the
model as an observation.
"""

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
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from multiprocessing import get_context, parent_process
from pathlib import Path
from statistics import correlation

HERE = Path(__file__).resolve().parent


class UserError(ValueError):
    """Bad input: one line on stderr and exit code 2."""


class EnvUnavailable(UserError):
    """What an environment needs is missing or failed; the message says how to get it."""


def require(ok, message, error=UserError):
    """Raise the error unless ok."""
    if not ok:
        raise error(message)


@contextmanager
def naming(what, kind=UserError):
    """Whatever is raised in here becomes one error of this kind: what failed, and how. An
    EnvUnavailable has said so already."""
    try:
        yield
    except EnvUnavailable:
        raise
    except (Exception, SystemExit) as error:  # a module may exit while it is imported
        reason = str(error).strip().split("\n")[0]
        if not isinstance(error, UserError):
            reason = f"{type(error).__name__}: {reason}"
        raise kind(f"{what}: {reason:.300}") from error


# --- What every environment shares -------------------------------------------------------

SPLITS = ("eval", "dev", "train", "train", "train")  # where tasks are cut into fifths

# What environments tell their players: {environment: attributes that its objects get}.
TEXTS = HERE / ".assets/environments.json"
TEXTS = json.loads(TEXTS.read_text("utf-8")) if TEXTS.exists() else {}


class TextEnv:
    """What is the same for every environment: the time limit, the tasks of a split, what a language
    model is told each turn, the keys of `info`.

    A subclass sets the attributes below and `goals`: {task id: (task type, splits, ...)}, splits
    out of train, dev, eval. It writes _reset(task, seed) and _step(action) -> (observation, state)
    and sets `task`, the task's text. An action is any text, "" where nothing could be read. state
    may have: won; over (the episode has ended; a win ends it, too); valid (the action could be
    read); admissible (a list of actions); tail (an end of the observation that no limit cuts off).
    TextEnv's own are task_type, turns, max_turns and listed. A constructor takes max_turns, and
    perhaps data, which is --env-data.

    info has task (its text), task_type, won, over, valid, admissible, and hint: what a language
    model reads under the observation."""

    name = ""  # if TEXTS has this name, its texts win over the class's
    instructions = ""  # the system message
    examples = ()  # turns before the episode that show the form: (observation, response) pairs
    reminder = "Your next action, in <action></action>:"  # every turn, but not to a `plain` policy
    closing_tags = ("</action>",)  # in small letters; a response ends with one; others need a parse
    skills = ()  # rows of the skill bank
    bank = None  # the SkillBank, which sdar.py makes of them
    goals = {}
    default_turns = 10
    plain = False  # sdar.py sets it for a policy that writes no tags
    slow = False  # True: a step waits for a server or a process, and is worth a thread
    longest = 3000  # characters of an observation

    def __init__(self, max_turns=0):
        vars(self).update(TEXTS.get(self.name, {}))
        require(self.instructions, "no instructions, in its class or .assets/environments.json")
        require(not isinstance(self.closing_tags, str), "closing_tags must be a tuple of texts")
        self.max_turns = max_turns or self.default_turns

    def tasks(self, split):
        """Task ids of a split ("train", "dev", "eval"), in a fixed order; UserError for none."""
        found = [task for task, goal in self.goals.items() if split in goal[1]]
        require(found, f"{self.name} has no tasks in the split {split!r}")
        return found

    def reset(self, task, seed=0):
        """Start an episode. task: an id out of tasks(split); the same (task, seed) is the same
        episode. Returns (observation, info); the first observation states the task."""
        self.task_type = str(self.goals[task][0])
        self.turns = 0
        self.listed = []
        with naming(f"{self.name} failed at {task!r}", EnvUnavailable):
            return self._result(*self._reset(task, seed))

    def step(self, action):
        """Play one action. Returns (observation, reward, terminated, truncated, info). reward is
        1.0 on the step that wins, else 0.0. After the end do not step."""
        self.turns += 1
        with naming(f"{self.name} failed at {action!r}", EnvUnavailable):
            observation, info = self._result(*self._step(action))

        # terminated: the world has ended the episode; truncated: our limit has. The reward comes
        # once, at the end, for the whole: nobody says which of the actions earned it.
        terminated = info["over"]
        truncated = not terminated and self.turns >= self.max_turns
        return observation, float(info["won"]), terminated, truncated, info

    def step_all(self, envs, actions):
        """Play an action in each of many environments of this kind; called on one for all. Returns
        a list of what step returns."""
        return call_all(
            [partial(env.step, action) for env, action in zip(envs, actions)], self.slow
        )

    def parse(self, response):
        """Text of the model -> (action, valid): what the first complete <action>...</action> holds,
        its tags in small or capital letters; from a plain policy, which writes no tags, any text of
        one line without a tag ("< " begins none: WebShop has a button "< prev")."""
        found = re.search(r"(?is)<action>((?:(?!<action>).)*?)</action>", response)
        text = found[1] if found else ""
        if self.plain and not re.search("\n|<(?! )", response.strip()):
            text = response
        action = " ".join(text.split())
        return action, action != ""

    def label(self, task):
        """The name under which the success of a task, an id, is reported: its type."""
        return str(self.goals[task][0])

    def panel(self, split, episodes):
        """The evaluation episodes, a list of (task, seed): always the same ones, the labels in
        turn."""
        pools = {}
        for task in self.tasks(split):
            pools.setdefault(self.label(task), []).append(task)
        panel = []
        for i in range(episodes):  # after a label's last task its first again
            lap, place = divmod(i, len(pools))
            pool = pools[sorted(pools)[place]]
            panel.append((pool[lap % len(pool)], 1_000_000 + lap))  # seeds of training are below
        return panel

    def _result(self, observation, state):
        # A language model is told what it can do, the turn, and the form of an answer. Of the
        # actions only those that the turn before did not list: most are still there.
        hint = state.get("tail", "")
        admissible = list(state.get("admissible", []))
        news = [action for action in admissible if action not in self.listed]
        if news:
            hint += "\nNew admissible" if self.listed else "\nAdmissible"
            hint += " actions: " + ", ".join(news)
        self.listed = admissible
        hint += f"\nTurn {self.turns + 1} of {self.max_turns}. {self.reminder}"

        won = bool(state.get("won"))
        return f"{observation:.{self.longest}}", {  # a str, and not too long
            "task": str(self.task),
            "task_type": self.task_type,
            "won": won,
            "over": won or bool(state.get("over")),
            "valid": bool(state.get("valid", True)),
            "admissible": admissible,
            "hint": hint,
        }


def call_all(calls, in_threads):
    """Results of functions without arguments, in order."""
    if not in_threads:
        return [call() for call in calls]
    with ThreadPoolExecutor(64) as pool:
        return list(pool.map(lambda call: call(), calls))


# --- Skills: the source of the privileged context c+ (paper, section 2.1) ----------------
#
# A skill is a sentence or two that helps with some tasks. Before an episode those that fit its task
# are retrieved. The teacher reads them in front of the task; the student never does.


@dataclass(frozen=True)
class Skill:
    """An entry of a skill bank, for tasks whose type is in `task_types` and whose text holds one of
    `keywords` as a whole word; an empty list sets no condition."""

    name: str
    text: str
    task_types: tuple = ()
    keywords: tuple = ()

    def matches(self, text, task_type):
        """True if the skill is for a task of this text and type."""
        if self.task_types and task_type not in self.task_types:
            return False
        words = "|".join(map(re.escape, self.keywords))
        return not words or re.search(rf"(?i)(?<!\w)({words})(?!\w)", text) is not None


class SkillBank:
    """Skills, and one of the paper's four ways to retrieve those of a task.

    keyword: those whose task type and keywords fit it. full: all. random: as many as keyword finds,
    at least one, drawn from all. ucb: the paper leaves reward and constant open; ours is like UCB1.
    A skill has two arms: for tasks that keyword retrieval finds it for, and for others. A task gets
    the three arms of largest mean reward + sqrt(ln(all plays) / plays), unplayed arms first. The
    reward, in [-1, 1], is the correlation over a group's episodes of advantage and mean gap: a good
    skill makes the teacher find likelier what went well."""

    STRATEGIES = ("keyword", "full", "random", "ucb")

    def __init__(self, rows, strategy="keyword"):
        with naming("a skill has a name and a text"):
            self.skills = [Skill(**row) for row in rows]
            for skill in self.skills:
                lists = [skill.task_types, skill.keywords]  # a str would pass as one, of letters
                texts = [skill.name, skill.text, *skill.task_types, *skill.keywords]
                require(
                    {*map(type, texts)} == {str} and str not in map(type, lists),
                    f"the skill {skill.name!r:.50}",
                )
        self.strategy = strategy
        self.arms = {}  # {arm: [plays, sum of rewards]}, of ucb

    def retrieve(self, task, task_type, seed):
        """The skills of a task, a list; the same for all episodes of a group."""
        found = [skill for skill in self.skills if skill.matches(task, task_type)]
        rng = random.Random(f"{task}/{seed}".encode(errors="replace"))  # half a character becomes ?
        match self.strategy:
            case "keyword":
                return found
            case "full":
                return self.skills
            case "random":
                return rng.sample(self.skills, len(found or self.skills[:1]))

        shuffled = rng.sample(self.skills, len(self.skills))  # ucb; breaks ties
        return sorted(shuffled, key=lambda skill: -self.index(skill, task, task_type))[:3]

    def arm(self, skill, task, task_type):
        """The name of a skill's arm for a task."""
        return f"{skill.name} {'found' if skill.matches(task, task_type) else 'not found'}"

    def index(self, skill, task, task_type):
        """Upper bound of a skill's arm: its mean reward, and a bonus for what was seldom tried."""
        plays, rewards = self.arms.get(self.arm(skill, task, task_type), (0, 0.0))
        if plays == 0:
            return math.inf
        total = sum(tried for tried, _ in self.arms.values())
        return rewards / plays + math.sqrt(math.log(total) / plays)

    def learn(self, episodes, advantages, gaps):
        """Credit the skills that each group had. advantages, gaps: rows are groups, which stand one
        after the other in episodes."""
        for first, its_advantages, its_gaps in zip(episodes[:: len(gaps[0])], advantages, gaps):
            if len(set(its_advantages)) == 1 or len(set(its_gaps)) == 1:
                continue  # nothing varies, so nothing is said
            reward = correlation(its_advantages, its_gaps)
            for skill in first.skills:
                arm = self.arm(skill, first.task, first.task_type)
                tried = self.arms.setdefault(arm, [0, 0.0])
                tried[0] += 1
                tried[1] += reward


def load_skills(file):
    """Rows of the skill bank in a JSON file: a list of objects with name and text, and perhaps
    task_types and keywords, lists of texts. UserError for anything else."""
    with naming(f"--skills {file}: must be a list of name, text, task_types, keywords"):
        rows = json.loads(Path(file).read_text("utf-8-sig"))
        require(rows, "it is empty")
        SkillBank(rows)  # checks them
        return rows


# --- The toy household: ALFWorld's spirit and wording, small enough for a CPU -------------
#
# What makes the skill matter: each class of object has one home, one appliance of each kind
# works, and the lamp stands somewhere. None of it can be seen from the middle of the room, and the
# turns are too few to search. But the skill bank says it.

CLOSABLE = tuple(f"{kind} {n}" for kind in ("cabinet", "drawer") for n in range(1, 9))
SURFACES = ("desk 1", "shelf 1", "sofa 1", "countertop 1")
APPLIANCES = {  # {verb: its three appliances, of which one works}
    "clean": ("sinkbasin 1", "sinkbasin 2", "sinkbasin 3"),
    "heat": ("microwave 1", "microwave 2", "microwave 3"),
    "cool": ("fridge 1", "fridge 2", "fridge 3"),
}
CLASSES = "apple bowl bread cup egg mug plate potato spoon tomato".split()
TASK_TEXT = {  # {task type: sentence}
    "put": "put a {object} in {target}",
    "clean": "clean a {object} and put it in {target}",
    "heat": "heat a {object} and put it in {target}",
    "cool": "cool a {object} and put it in {target}",
    "look": "look at a {object} under the desklamp 1",
    "two": "put two {object} in {target}",
}


def is_a(text, start):
    """True if a text is these words, or begins with them: is_a("mug 1", "mug")."""
    return f"{text} ".startswith(f"{start} ")


@dataclass(frozen=True)
class Household:
    """What a newcomer cannot know: where each class and the lamp are, which appliances work."""

    home: dict  # {class of object: place}
    appliance: dict  # {verb: the one that works}
    lamp: str
    closable: tuple = CLOSABLE  # places that hold things behind a door

    # A policy that was trained in random households has learned how to act and how to read a skill,
    # and nothing about HOME, the household below: the tiny policy is such a one.
    @classmethod
    def random(cls, rng, closable=CLOSABLE):
        """Draw a household with random.Random `rng`."""
        home = {c: rng.choice(closable + SURFACES) for c in CLASSES}
        appliance = {verb: rng.choice(three) for verb, three in APPLIANCES.items()}
        return cls(home, appliance, rng.choice(SURFACES), closable)

    def skills(self):
        """The household's skill bank: an entry per class of objects, per verb, and for the lamp."""
        rows = [
            {"name": c, "text": f"The {c} is kept in {place}.", "keywords": [c]}
            for c, place in self.home.items()
        ]
        rows += [
            {"name": verb, "text": f"{verb.capitalize()} with {place}.", "task_types": [verb]}
            for verb, place in self.appliance.items()
        ]
        text = f"The desklamp 1 is on {self.lamp}."
        return rows + [{"name": "lamp", "text": text, "task_types": ["look"]}]


HOME = Household.random(random.Random(2605))  # the household of every training and evaluation task


class ToyEnv(TextEnv):
    """The toy household.

    A task id is the task's sentence; `seed` chooses which other objects are about. A well-formed
    action that cannot be done here is valid and answered "Nothing happens."; the place in it (`take
    O [from P]`, `put O [in/on P]`, `heat O [with P]`) may be left out. Splits: train 3/5 of each
    type's tasks, dev (to choose settings) 1/5, eval 1/5.

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
    instructions = (
        "Play a text game. Answer with one action.\nWrite it as one line: "
        "<action>an action from the lists</action>"
    )
    GRAMMAR = re.compile(
        r"(?P<short>(?P<verb>go to|open|take|put|clean|heat|cool|use) (?P<what>[a-z]+ \d+))"
        r"(?: (?:from|in/on|with) (?P<place>[a-z]+ \d+))?|(?P<alone>look|inventory)"
    )

    def __init__(self, max_turns=0, household=HOME):
        super().__init__(max_turns)
        self.household = household
        self.skills = household.skills()
        self.storages = household.closable + SURFACES
        self.places = self.storages + sum(APPLIANCES.values(), ())
        self.goals = {}  # {sentence: (task type, (split,), class of object, target)}

        # Every type, object and target where the object is not yet. A task of look has no target:
        # there is one for each object.
        found = {}
        for kind, text in TASK_TEXT.items():
            for c in CLASSES:
                for target in self.storages:
                    if target != household.home[c]:
                        found[text.format(object=c, target=target)] = (kind, c, target)
        order = sorted(found)
        random.Random(0).shuffle(order)
        seen = Counter()
        of_kind = Counter(kind for kind, _, _ in found.values())
        for task in order:
            kind, c, target = found[task]
            fifth = 5 * seen[kind] // of_kind[kind]
            seen[kind] += 1
            self.goals[task] = (kind, (SPLITS[fifth],), c, target)

    def tasks(self, split):
        """Task ids of a split, in a fixed order mixed over types. There are few tasks of type look:
        train lists each of them several times, so that every type comes equally often."""
        times = len(self.storages) - 1 if split == "train" else 1
        found = []
        for task in super().tasks(split):
            found += [task] * (times if self.goals[task][0] == "look" else 1)
        return found

    def _reset(self, task, seed):
        self.task = task
        self.goal_class, self.target = self.goals[task][2:]
        self.where = None  # in the middle of the room
        self.hand = None
        self.opened = set(self.places) - set(self.household.closable)
        self.lit = False
        self.done_to = set()  # (verb, object) pairs

        # The goal's class is at home, and so are four others, to fill the cupboards.
        rng = random.Random(f"{task}/{seed}")
        others = rng.sample([c for c in CLASSES if c != self.goal_class], 4)
        things = [f"{c} 1" for c in (*others, self.goal_class)]
        if self.task_type == "two":
            things.append(f"{self.goal_class} 2")
        self.contents = {place: [] for place in self.places}
        for thing in sorted(things):
            c = thing.split()[0]
            self.contents[self.household.home[c]].append(thing)
        self.contents[self.household.lamp].append("desklamp 1")
        return (
            f"You are in the middle of a room. Your task is to: {task}.",
            {"admissible": self._admissible()},
        )

    def _step(self, action):
        # Understood, but perhaps impossible: then nothing happens, as in ALFWorld, and no penalty.
        # "take mug 1" is short for the admissible "take mug 1 from desk 1".
        match = self.GRAMMAR.fullmatch(action.strip().lower())
        observation = "Nothing happens."
        if match and match["place"] in (None, self.where):
            short = match["short"] or match["alone"]
            if any(is_a(one, short) for one in self._admissible()):
                observation = self._act(match["verb"] or short, match["what"])
        return observation, {
            "admissible": self._admissible(),
            "won": self._won(),
            "valid": match is not None,
        }

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
            if self.where != self.household.appliance[verb]:
                return "Nothing happens."
            self.done_to -= {("heat", what), ("cool", what)}  # cleaning undoes both, too
            self.done_to.add((verb, what))
            return f"You {verb} {what} with {self.where}."

        if verb == "go to":
            self.where = what
        if verb == "open":
            self.opened.add(what)
        return self._view()

    def _view(self):
        where = self.where
        if where is None:
            return "You are in the middle of a room."
        if where not in self.opened:
            return f"The {where} is closed."
        if where not in self.storages:
            return f"You arrive at {where}."
        here = " and ".join(f"a {thing}" for thing in self.contents[where]) or "nothing"
        side = "On" if where in SURFACES else "In"
        return f"{side} the {where} you see {here}."

    def _won(self):
        # Look: the lamp is lit, here, and the object is in the hand. Else the target must hold
        # the object, two of them for "two", heated, cooled or cleaned where the task says so.
        if self.task_type == "look":
            return (
                self.lit and is_a(self.hand, self.goal_class) and self.where == self.household.lamp
            )
        there = [thing for thing in self.contents[self.target] if is_a(thing, self.goal_class)]
        if self.task_type in APPLIANCES:
            there = [thing for thing in there if (self.task_type, thing) in self.done_to]
        return len(there) >= (2 if self.task_type == "two" else 1)

    def _admissible(self):
        # Everywhere one can go; what is here can be opened, taken, put down or used. The list
        # does not say what is broken (a microwave): that must be tried, or read in the skill.
        where = self.where
        actions = [f"go to {place}" for place in self.places if place != where]
        here = []
        if where in self.opened:
            here = self.contents[where]
        elif where:
            actions.append(f"open {where}")
        if self.hand is None:
            actions += [f"take {thing} from {where}" for thing in here if thing != "desklamp 1"]
        elif where in self.storages and where in self.opened:
            actions.append(f"put {self.hand} in/on {where}")
        for verb, places in APPLIANCES.items():
            if self.hand and where in places:
                actions.append(f"{verb} {self.hand} with {where}")
        if "desklamp 1" in here:
            actions.append("use desklamp 1")
        return actions + ["look", "inventory"]


# --- The paper's three environments: thin shims, the real engines are imported when used --
#
# Each translates between the engine's calls and the signatures above. What an engine raises becomes
# EnvUnavailable. The texts for the model and the skills are data, in .assets/environments.json.


class AlfworldEnv(TextEnv):
    """ALFWorld's text games, in `data` (or ALFWORLD_DATA, or where alfworld-download puts them). A
    task id is a game's path below it; `seed` changes nothing. An action that cannot be done is
    valid and answered "Nothing happens.", as in the official code. Splits: train, eval (the data
    set's valid_seen, as in the paper), dev (valid_unseen); a folder in which no game lies in one of
    these three folders serves all splits."""

    name = "alfworld"
    default_turns = 50
    slow = True
    made = 0  # environments
    FOLDERS = {"train": "train", "valid_seen": "eval", "valid_unseen": "dev"}

    def __init__(self, max_turns=0, data=""):
        super().__init__(max_turns)
        require(find_spec("alfworld"), "ALFWorld is missing: pip install alfworld", EnvUnavailable)
        data = data or os.environ.get("ALFWORLD_DATA", "~/.cache/alfworld")
        self.data = os.path.abspath(os.path.expanduser(data))
        self.goals = self.games(self.data)
        self.number = AlfworldEnv.made
        AlfworldEnv.made += 1
        self.process = game_process(self.number % CORES)
        self.process.submit(int).result()  # forks now, and not in a thread

    @classmethod
    @cache
    def games(cls, folder):
        """{path: (task type, splits)} of the games in a folder, without those that the official
        loader leaves out: not solvable, with a movable receptacle, with something sliced."""
        paths = []
        for path in sorted(Path(folder).rglob("*.tw-pddl")):
            solvable = re.search(r'"solvable":\s*true', path.read_text("utf-8", "replace"))
            if solvable and not re.search("movable|Sliced", str(path.relative_to(folder))):
                paths.append(path.relative_to(folder))
        require(paths, f"no ALFWorld games in {folder}: run alfworld-download", EnvUnavailable)

        games = {}
        in_folders = any(cls.FOLDERS.keys() & {*path.parts} for path in paths)
        for path in paths:
            splits = [
                split for name, split in cls.FOLDERS.items() if name in path.parts or not in_folders
            ]
            kind = re.search(r"(pick|look)_\w+", str(path))
            if splits:
                games[str(path)] = (kind[0] if kind else "other", tuple(splits))
        return games

    def _reset(self, task, seed):
        self.path = os.path.join(self.data, task)
        observation, state = self._step(None)
        self.task = observation.split("Your task is to: ")[-1]
        return observation.split("=-")[-1].strip(), state  # without the banner

    def _step(self, action):
        with naming(f"ALFWorld failed at {self.path}, or was silent for 2 minutes", EnvUnavailable):
            text, won, commands = self.process.submit(
                play_game, self.number, self.path, action
            ).result()
        return text, {"won": won, "admissible": [line for line in commands if line != "help"]}


# ALFWorld's engine is slow, and not safe in threads: some processes play it.
CORES = min(8, os.cpu_count())
GAMES = {}  # in such a process, {number of an environment: its game}


@cache
def game_process(core):
    """The executor of one core's process. Libraries of macOS do not survive a fork."""
    kind = "fork" if sys.platform == "linux" else "spawn"
    return ProcessPoolExecutor(1, get_context(kind), process_begins)


def process_begins():
    """In a process of games: leave Ctrl-C to the parent, and end with it, however it ends."""

    def end_with_parent():
        parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["ALFWORLD_DATA"] = str(HERE)  # any folder: else the package makes one at home
    threading.Thread(target=end_with_parent, daemon=True).start()


def play_game(number, path, action):
    """In a process of games: start a game (action None) or act in it. Returns (text, won,
    admissible commands). A game that hangs for two minutes ends its process."""
    import textworld
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler

    signal.alarm(120)
    if action is None:
        if number in GAMES:  # a new one would load the planner's library again, and keep it
            GAMES[number].load(path)
        else:
            wanted = textworld.EnvInfos(won=True, admissible_commands=True)
            GAMES[number] = textworld.start(path, wanted, [AlfredDemangler])
        state = GAMES[number].reset()
    else:
        state = GAMES[number].step(action.strip().lower())[0]
    signal.alarm(0)
    return state["feedback"].strip(), state["won"], state["admissible_commands"]


class WebShopEnv(TextEnv):
    """WebShop's own text environment, from a checkout of its code in `data` (or WEBSHOP_ROOT).

    A task id is the index of a synthetic goal, as in the official code. Splits by index: eval the
    first 500 goals (at most a fifth), dev as many, train the rest. A click on what the
    page does not offer does nothing; search works on every page."""

    name = "webshop"
    default_turns = 15
    longest = 8000  # a product's title and price come after its options
    servers = {}  # {root: products and index}, everyone's

    def __init__(self, max_turns=0, data=""):
        super().__init__(max_turns)
        root = os.path.abspath(data or os.environ.get("WEBSHOP_ROOT", "(no checkout named)"))
        sys.path.append(root)
        with naming(f"WebShop does not start from {root}: .lab/ENVIRONMENTS.md", EnvUnavailable):
            from web_agent_site.envs.web_agent_text_env import WebAgentTextEnv

            random.seed(233)  # the engine seeds the order of goals, but not their price limits
            self.shop = WebAgentTextEnv(
                observation_mode="text",
                human_goals=False,
                server=self.servers.get(root),
                session_prefix=f"{id(self)}-",  # else equal goals share a session
            )
        self.servers[root] = self.shop.server

        goals = self.shop.server.goals
        held = max(1, min(500, len(goals) // 5))
        self.goals = {}
        for i, goal in enumerate(goals):
            split = SPLITS[min(2, i // held)]  # all behind the first two parts: train
            text = goal["instruction_text"].strip()
            self.goals[str(i)] = (goal.get("category", "other"), (split,), text)

    def _reset(self, task, seed):
        self.task = self.goals[task][2]
        observation, _ = self.shop.reset(int(task))
        return f"Instruction: {self.task}\n{self._without_task(observation)}", self._page()

    def _step(self, action):
        self.listed = []  # another page, other links: all are listed again
        match = re.fullmatch(r"(search|click)\[\s*(.*?)\s*\]", action.strip().lower())
        verb, words = match.groups() if match else ("", "")
        if verb == "click":
            words = self.clickable.get(words)
        elif words.startswith("<"):  # the engine's own commands, fragile
            words = ""
        if not words:
            return "Nothing happens.", self.page | {"valid": match is not None}
        observation, score, over, _ = self.shop.step(f"{verb}[{words}]")
        page = self._page()
        return self._without_task(observation), page | {"won": over and score == 1, "over": over}

    def _without_task(self, observation):
        return observation.replace(f"Instruction: [SEP] {self.task} [SEP] ", "")

    def _page(self):
        page = self.shop.get_available_actions()
        self.clickable = {  # without "search", which is dead
            " ".join(text.split()): text for text in page["clickables"] if text != "search"
        }
        actions = [f"click[{text}]" for text in self.clickable]
        if page["has_search_bar"]:
            actions.insert(0, "search[<query>]")
        self.page = {"admissible": actions}
        return self.page


class SearchEnv(TextEnv):
    """Questions to answer with a search server, as in Search-R1.

    data: a JSON-lines file; a row has id, question, golden_answers (a list of texts), and perhaps
    data_source and split (any name); without a split a hash of the id puts 3/5 into train, 1/5 into
    dev and 1/5 into eval. Other formats: .lab/convert.py. url: of the server. An answer wins if it
    is a golden one, except for case, punctuation, articles and blanks. At the last turn a search is
    not executed."""

    name = "search"
    default_turns = 4
    closing_tags = ("</search>", "</answer>")
    TYPES = {  # {task type: words that tell it, in question or data set}, the first that fits
        "compare": r"\b(both|same|older|younger|earlier|later|first|more|larger|longer|higher)\b"
        r".*\b(or|and)\b",
        "multi_hop": r"hotpot|2wiki|musique|bamboogle"
        r"|\b(whose|of the \w+ (that|who|which|where))\b",
        "attribute": r"\b(when|where|how (many|much|old|long|tall)|what (year|date|city|number))\b",
        "direct": "",
    }
    ACTION = re.compile(r"(?is)<(search|answer)>(.*?)</\1>")
    TAG = re.compile(r"(?i)<(?=\s*(?:/\s*)?(?:search|answer|information|think|action)\b)")

    def __init__(self, max_turns=0, data="(no data named)", url="http://127.0.0.1:8000/retrieve"):
        super().__init__(max_turns)
        self.url = url
        self.goals = self.questions(data)

    @classmethod
    @cache
    def questions(cls, file):
        """{task id: (task type, (split,), question, golden answers, data set or "")} of a file."""
        goals = {}
        lines = Path(file).read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            with naming(f"{file}, line {number}: not a row with id, question, golden_answers"):
                row = json.loads(line)
                question = row["question"].strip()
                golden = row["golden_answers"]
                require(
                    question and isinstance(golden, list) and "".join(golden).strip(),
                    "an empty one, or no list of texts",
                )
                source = str(row.get("data_source") or "")
                task = f"{source}/{row['id']}" if source else str(row["id"])
                require(task not in goals, "its id is that of another line")
            text = f"{question[:2000]} {source}"
            kind = next(k for k, words in cls.TYPES.items() if re.search(words, text, re.I))
            draw = random.Random(task.encode(errors="replace"))
            split = row.get("split") or draw.choice(SPLITS)
            goals[task] = (kind, (split,), question, golden, source)
        return goals

    def label(self, task):
        """With data sets success is reported by set, as in the paper's table."""
        return self.goals[task][4] or self.goals[task][0]

    def parse(self, response):
        """Text of the model -> (action, valid): the first <search> or <answer> in it, without line
        breaks; else ""."""
        found = self.ACTION.search(response)
        text = " ".join(found[2].split()) if found else ""
        if not text:
            return "", False
        tag = found[1].lower()
        return f"<{tag}>{text}</{tag}>", True

    def step_all(self, envs, actions):
        """As in TextEnv, with one request for all queries of the turn."""
        queries = re.findall("<search>(.*)</search>", "\n".join(actions))
        if queries and self.turns + 1 < self.max_turns:  # all of `envs` are at the same turn
            found = ask(self.url, *queries)
            for env in envs:
                env.found = found
        return super().step_all(envs, actions)

    def _reset(self, task, seed):
        self.task, self.golden = self.goals[task][2:4]
        self.found = {}  # {query: its passages}
        return self.task, {}

    def _step(self, action):
        action, valid = self.parse(action)
        if not valid:
            return "Nothing happens.", {"valid": False}
        kind, text = self.ACTION.fullmatch(action).groups()
        if kind == "answer":
            won = any(normalized(text) == normalized(golden) for golden in self.golden)
            return "", {"won": won, "over": True}
        if self.turns >= self.max_turns:
            return "", {}
        if text not in self.found:
            self.found = ask(self.url, text)
        rows = [f"Doc {i}: {row}" for i, row in enumerate(self.found[text], 1)]
        found = self.TAG.sub("(", "\n".join(rows)) or "nothing found"  # no forged tags
        return f"<information>{found}", {"tail": "</information>"}


def normalized(text):
    """The words of an answer as the official exact match compares them: in lower case, without
    ASCII punctuation and articles. Unlike there, an answer of nothing else keeps them."""
    text = text.lower()
    letters = re.sub(r"[!-/:-@[-`{-~]", "", text)
    return re.sub(r"\b(a|an|the)\b", " ", letters).split() or letters.split() or text.split()


ASKING = threading.Semaphore(4)  # requests at once: a retriever may answer one after the other


def ask(url, *queries):
    """{query: passages, a list of str, best first} from a retrieval server (Search-R1's), in one
    request where it takes a list. Three tries, then EnvUnavailable with what came back."""
    from urllib.request import Request, urlopen

    # Search-R1's server reads `queries`, SDAR's `query`. The time limit grows with what is asked.
    body = {"query": queries[0], "queries": queries, "topk": 3, "return_scores": True}
    for pause in (1, 5, 0):  # seconds until the next try; 0: this is the last
        try:
            request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
            with ASKING, urlopen(request, timeout=20 + 10 * len(queries)) as response:
                found = [passages(rows) for rows in json.load(response)["result"]]
            require(0 < len(found) <= len(queries), "not as many results as queries")
            break
        except Exception as error:  # no connection, a status, half an answer, another shape
            if not pause:
                raise EnvUnavailable(
                    f"no search results from {url} ({error!r:.200}); "
                    ".lab/search_server.py CORPUS.jsonl starts a server"
                ) from error
            time.sleep(pause)
    if len(found) == len(queries):  # else the server has read the first query alone
        return dict(zip(queries, found))
    one_by_one = {}
    for one in call_all([partial(ask, url, query) for query in queries], in_threads=True):
        one_by_one |= one
    return one_by_one


def passages(rows):
    """At most three texts out of a server's rows for a query."""
    texts = []
    for row in rows:
        text = row.get("document", row)
        if isinstance(text, dict):
            text = text.get("contents") or f"{text['title']}\n{text['text']}"
        require(isinstance(text, str), "a passage that is no text")
        if (row.get("score") or 0) < -1e30:  # padding of an index that found too little
            continue
        if text not in texts:
            texts.append(text)
    return texts[:3]


# --- Environments by name ----------------------------------------------------------------

ENVS = {"toy": ToyEnv, "alfworld": AlfworldEnv, "webshop": WebShopEnv, "search": SearchEnv}


def make_env(name, **options):
    """A new environment by its name, or "module:Class" for one of your own. options go to its
    constructor: max_turns, and data or url where it takes them. UserError if there is none."""
    kind = ENVS.get(name)
    if kind is None:
        module, _, attribute = name.partition(":")
        require(attribute, f"--env {name}: known are {', '.join(ENVS)}, or your own module:Class")
        sys.path.append(os.getcwd())
        with naming(f"--env {name} cannot be imported"):
            found = importlib.import_module(module)
            kind = getattr(found, attribute, None)
            require(
                isinstance(kind, type) and issubclass(kind, TextEnv),
                f"{found} has no class {attribute} made from envs.TextEnv",
            )
    with naming(f"--env {name}"):
        return kind(**options)
