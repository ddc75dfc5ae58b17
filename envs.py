"""Text environments for sdar.py: the toy household and its scripted player; thin shims around ALFWorld, WebShop, Search-QA.

    env = make_env("toy")                         # or "alfworld", "webshop", "search": README.md says what they need
    observation, info = env.reset(env.tasks("train")[0], seed=0)
    observation, reward, terminated, truncated, info = env.step("go to desk 1")
    python envs.py play alfworld --data FOLDER    # be the agent: the same observations and actions as the model's
    python envs.py serve CORPUS.jsonl             # a small search server, for "search"

Signatures are Gymnasium's, without the dependency. Rewards are raw (0 or 1, at the end); scales and penalties belong to the
trainer. A missing package, data set or server raises EnvUnavailable and is never shown to the model as an observation.
"""
import difflib
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
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

class UserError(ValueError):
    """Bad input: one line on stderr and exit code 2, in sdar.py as here."""

class EnvUnavailable(RuntimeError):
    """A package, data file or server that an environment needs is missing or failed; the message says how to get it."""

def require(ok, message, error=UserError):
    """Raise the error unless ok."""
    if not ok:
        raise error(message)

def unknown(what, value, known):
    """The message for a bad choice, the nearest good one first."""
    near = difflib.get_close_matches(str(value), known, 1)
    return f"unknown {what} {value!r}: " + (f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(known)}"

# --- Skills: the source of the privileged context c+ (paper, section 2.1) ------------------------
@dataclass(frozen=True)
class Skill:
    """An entry of a skill bank, for tasks whose type is in `task_types` and whose text holds one of `keywords` as a whole
    word; an empty tuple sets no condition."""
    name: str
    text: str
    task_types: tuple = ()
    keywords: tuple = ()

    def matches(self, task, task_type):
        """True if the skill is for this task text of this task type."""
        hit = any(re.search(rf"\b{re.escape(word)}\b", task, re.IGNORECASE) for word in self.keywords)
        return (not self.task_types or task_type in self.task_types) and (hit or not self.keywords)

TEXTS = Path(__file__).resolve().parent / ".assets" / "environments.json"  # what the real environments tell their players
TEXTS = json.loads(TEXTS.read_text("utf-8")) if TEXTS.exists() else {}  # {environment: {"instructions": text, "skills": rows}}
SKILLS = {name: [Skill(**row) for row in texts["skills"]] for name, texts in TEXTS.items()}  # {environment: its bank}

def retrieve(bank, task, task_type, strategy, seed=0, bandit=None):
    """The skills of a task, a list. seed: of random choices, the same for all episodes of a group. keyword: those whose task
    type and whole-word keywords fit it, each once. full: the whole bank. random: as many as keyword finds, at least one, of
    the whole bank. ucb: those that the bandit chooses. none: none. The control wrong: as many as keyword finds, of those for
    other task types."""
    found, rng = [s for s in bank if s.matches(task, task_type)], random.Random(f"{task}/{seed}".encode(errors="replace"))
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
    """Retrieval by UCB1. The paper names it and does not define it; this is ours. An arm is a skill in a context: whether
    keyword retrieval would find it for the task. A task gets the SLOTS arms of largest mean reward + sqrt(ln(all plays) /
    plays), arms never played first. The reward, in [-1, 1], is the correlation over a group's episodes of advantage and mean
    gap: a good skill makes its reader endorse what went well."""
    SLOTS = 3

    def __init__(self, arms=None):
        self.arms = arms or {}  # {arm: [plays, sum of rewards]}

    def arm(self, skill, task, task_type):
        return f"{skill.name} {'found' if skill.matches(task, task_type) else 'not found'}"

    def choose(self, bank, task, task_type):
        """The skills for a task; of equal ones those first in the bank."""
        total = sum(plays for plays, _ in self.arms.values())
        bound = lambda plays, rewards: rewards / plays + math.sqrt(math.log(total) / plays) if plays else math.inf
        index = lambda skill: bound(*self.arms.get(self.arm(skill, task, task_type), (0, 0.0)))
        return sorted(bank, key=index, reverse=True)[:self.SLOTS]

    def learn(self, episodes, advantages, gaps):
        """advantages, gaps: of each episode. A group without variation says nothing and does not count."""
        from statistics import correlation
        for group in {episode.group for episode in episodes}:
            rows = [row for row in zip(episodes, advantages, gaps) if row[0].group == group]
            (first, *_), *pair = zip(*rows)
            for skill in first.skills if min(len(set(values)) for values in pair) > 1 else ():
                arm = self.arms.setdefault(self.arm(skill, first.task, first.task_type), [0, 0.0])
                arm[0] += 1
                arm[1] += correlation(*pair)

# --- What every environment shares ---------------------------------------------------------------
class TextEnv:
    """Time limit, refusal to step after the end, cut of overlong observations, admissible actions under them, tasks of a
    split, keys of `info`. A subclass sets the attributes below and, in its constructor, `goals`: {task id: (task type,
    splits, ...)}. It writes _reset(task, seed) and _step(action) -> (observation, state) and sets `task`, the task's text.
    state: a dict with admissible (list or None), won, valid and, where they differ from won, score (0..1) and over (the
    episode has ended by itself); perhaps tail, an end of the observation that is not to be cut off."""
    name, instructions, default_turns, show_admissible = "", "", 10, False  # instructions: the system message
    slow, stop_strings = False, ("</action>",)  # steps are worth a thread each; a response also ends where one of these does

    def __init__(self, max_turns=0, max_obs_chars=4000):
        require(self.name in SKILLS, f"no texts for {self.name}: .assets/environments.json comes with the code", EnvUnavailable)
        self.max_turns, self.skills = max_turns or self.default_turns, SKILLS[self.name]
        self.instructions = self.instructions or TEXTS[self.name]["instructions"]
        self._turns, self._running = 0, False
        self.cut = lambda text: text if len(text) <= max_obs_chars else text[:max_obs_chars] + " ..."  # sdar.py's counts tokens

    def tasks(self, split):
        """Task ids of a split ("train", "dev" or "eval"), in a fixed order. EnvUnavailable if there are none."""
        splits = {part for goal in self.goals.values() for part in goal[1]}
        require(split in splits, f"{self.name}: no task is in the split {split!r}, but in {sorted(splits)}", EnvUnavailable)
        return [task for task, goal in self.goals.items() if split in goal[1]]

    def reset(self, task, seed=0):
        """Start an episode. task: an id out of tasks(split); the same (task, seed) is the same episode. Returns
        (observation, info); the first observation states the task. ValueError for an unknown id."""
        require(task in self.goals, f"{self.name}: unknown task {task!r}; tasks('train') lists the ids")
        self.kind, self._running, self._listed = self.goals[task][0], False, []
        observation, state = self._reset(task, seed)
        self._turns, self._running = 0, True
        return self._result(observation, state)

    def step(self, action):
        """Play one action. Returns (observation, reward, terminated, truncated, info); reward is 1.0 on the step that wins,
        else 0.0. RuntimeError when no episode is running; EnvUnavailable, and none is running, if the engine fails."""
        require(self._running, f"{self.name}: no episode is running, call reset() first", RuntimeError)
        self._running = False
        observation, state = self._step(action)
        self._turns += 1
        terminated = state.get("over", state["won"])
        truncated = not terminated and self._turns >= self.max_turns
        self._running = not (terminated or truncated)
        observation, info = self._result(observation, state)
        return observation, float(terminated and state["won"]), terminated, truncated, info

    def parse(self, response):
        """Text of the model -> (action, valid): what the first <action>...</action> holds, or a text of one line."""
        tagged = re.search(r"<action>(.*?)</action>", response, re.DOTALL)
        action = " ".join((tagged.group(1) if tagged else response).split())
        return action, bool(action) and (tagged is not None or "\n" not in response.strip())

    def panel(self, split, episodes):
        """The evaluation episodes, a list of (task, seed): always the same ones, every task type equally often."""
        pools = {}
        for task in self.tasks(split):
            pools.setdefault(self.goals[task][0], []).append(task)
        turns = [divmod(i, len(pools)) for i in range(episodes)]
        return [(pool[turn % len(pool)], 10 ** 6 + turn) for turn, kind in turns for pool in [pools[sorted(pools)[kind]]]]

    def close(self):
        """End the episode, if one is running; may be called twice."""
        self._running = False

    def _result(self, text, state):
        text, listed = self.cut(text) + state.get("tail", ""), self._listed
        if self.show_admissible and self._running:  # most of the first list, every "go to", is there in all turns: once is enough
            news = [action for action in state["admissible"] if action not in listed]
            text += "\nAdmissible actions: " + ", ".join(news + ["those listed first"] * bool(listed))
            self._listed = listed or news
        info = {"task": self.task, "task_type": self.kind, "score": float(state["won"]), **state}
        return text, {key: info[key] for key in ("task", "task_type", "admissible", "won", "score", "valid")}

# --- The toy household: ALFWorld's spirit and wording, small enough for a CPU ---------------------
# What makes the skill matter: each class of object has one home, of each kind of appliance one works, and the lamp stands
# somewhere. None of it can be seen from the middle of the room, the turns are too few to search, but the skill bank says it.
CLOSABLE = tuple(f"{kind} {n}" for kind in ("cabinet", "drawer") for n in range(1, 9))
SURFACES = ("desk 1", "shelf 1", "sofa 1", "countertop 1")
STORAGES = CLOSABLE + SURFACES  # what can hold objects; the closable ones start closed
APPLIANCES = {verb: tuple(f"{kind} {n}" for n in (1, 2, 3))
              for verb, kind in (("clean", "sinkbasin"), ("heat", "microwave"), ("cool", "fridge"))}
PLACES = STORAGES + sum(APPLIANCES.values(), ())
CLASSES = ("apple", "bowl", "bread", "cup", "egg", "mug", "plate", "potato", "spoon", "tomato")
TASK_TEXT = {"put": "put a {object} in {target}", **{v: v + " a {object} and put it in {target}" for v in APPLIANCES},
             "look": "look at a {object} under the desklamp 1", "two": "put two {object} in {target}"}
PHRASES = ("You are in the middle of a room", "Your task is to", "put", "put it in", "put two", "clean", "heat", "cool",
           "look at", "under", "desklamp 1", "go to", "open", "take", "use", "look", "inventory", "in", "from", "in/on", "with",
           "is closed", "On", "In", "you see", "nothing", "You arrive at", "You pick up", "You put", "You clean", "You heat",
           "You cool", "You turn on", "You are carrying", "Nothing happens", "Skill", "is kept in", "is on", "Clean with",
           "Heat with", "Cool with")

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
                   {verb: rng.choice(three) for verb, three in APPLIANCES.items()}, rng.choice(SURFACES))

    def skills(self):
        """The household's skill bank: one entry a class of objects, one a verb, one for the lamp."""
        return [*(Skill(c, f"The {c} is kept in {place}.", (), (c,)) for c, place in self.home.items()),
                *(Skill(v, f"{v.capitalize()} with {place}.", (v,), (v,)) for v, place in self.appliance.items()),
                Skill("lamp", f"The desklamp 1 is on {self.lamp}.", ("look",), ("desklamp",))]

HOME = Household.random(random.Random(2605))  # the household of every training and evaluation task
SKILLS["toy"] = HOME.skills()

class ToyEnv(TextEnv):
    """The toy household. A task id is the task's sentence; `seed` chooses which other objects are about. A well-formed action
    that cannot be done here is valid and answered "Nothing happens."; its place (`take O [from P]`, `put O [in/on P]`,
    `heat O [with P]`) may be left out. Splits: train 3/5 of each type's tasks, dev (to choose settings) and eval 1/5."""
    name, default_turns = "toy", 10
    instructions = (
        "You act in a household. Places: " + ", ".join(PLACES) + ". Cabinets and drawers must be opened before you see what "
        "they hold. You carry one object at a time. Answer with your reasoning in <think></think>, then one action in "
        "<action></action>. Actions: go to PLACE, open PLACE, take OBJECT from PLACE, put OBJECT in/on PLACE, clean OBJECT "
        "with SINKBASIN, heat OBJECT with MICROWAVE, cool OBJECT with FRIDGE, use desklamp 1, look, inventory. Objects and "
        "places have a number, as in: go to desk 1.")
    GRAMMAR = re.compile(r"(?P<short>(?P<verb>go to|open|take|put|clean|heat|cool|use) (?P<what>[a-z]+ \d+))"
                         r"(?: (?:from|in/on|with) (?P<place>[a-z]+ \d+))?|(?P<alone>look|inventory)")

    def __init__(self, household=HOME, **options):
        super().__init__(**options)
        self.household, self.skills = household, household.skills()
        self.goals = {TASK_TEXT[kind].format(object=c, target=target): (kind, c, target)  # of every task
                      for kind in TASK_TEXT for c in CLASSES for target in STORAGES if target != household.home[c]}

    def tasks(self, split):
        """Task ids of a split ("train", "dev" or "eval"): disjoint, in a fixed order mixed over types. There are few
        tasks of type look, so train lists each of them several times: every type comes equally often."""
        order, chosen = sorted(self.goals), []
        random.Random(0).shuffle(order)
        for kind in TASK_TEXT:
            of_kind = [task for task in order if self.goals[task][0] == kind]
            fifth = len(of_kind) // 5
            part = {"eval": of_kind[:fifth], "dev": of_kind[fifth:2 * fifth], "train": of_kind[2 * fifth:]}[split]
            chosen += part * (19 if (kind, split) == ("look", "train") else 1)  # 6 tasks, of other types 114
        return sorted(chosen, key=order.index)

    def _reset(self, task, seed):
        self.task, (self.kind, self.goal_class, self.target) = task, self.goals[task]
        rng, self.contents = random.Random(f"{task}/{seed}"), {place: [] for place in PLACES}
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
        short, verb, what, place, alone = match.groups() if match else [None] * 5
        here = place in (None, self.where) and any(f"{one} ".startswith(f"{short or alone} ") for one in self._admissible())
        return here and self._act(verb or alone, what) or "Nothing happens.", self._state(match is not None)

    def _act(self, verb, what):
        """Play an action that is admissible. None: it is, but the appliance is broken."""
        if verb == "go to":
            self.where = what
        if verb == "open":
            self.opened.add(what)
        if verb in ("go to", "open", "look"):
            return self._view()
        if verb == "take":
            self.contents[self.where].remove(what)
            self.hand = what
            return f"You pick up {what}."
        if verb == "put":
            self.contents[self.where].append(what)
            self.hand = None
            return f"You put {what} in/on {self.where}."
        if verb == "use":
            self.lit = True
            return "You turn on desklamp 1."
        if verb == "inventory":
            return f"You are carrying {self.hand or 'nothing'}."
        if self.where != self.household.appliance[verb]:
            return self.broken.add(self.where)
        self.done_to -= {("heat", what), ("cool", what)} if verb != "clean" else set()
        self.done_to.add((verb, what))
        return f"You {verb} {what} with {self.where}."

    def _view(self):
        if self.where is None:
            return "You are in the middle of a room."
        if self.where not in self.opened:
            return f"The {self.where} is closed."
        self.seen.add(self.where)
        if self.where not in STORAGES:
            return f"You arrive at {self.where}."
        here = " and ".join(f"a {thing}" for thing in self.contents[self.where]) or "nothing"
        return f"{'On' if self.where in SURFACES else 'In'} the {self.where} you see {here}."

    def _state(self, valid):
        return dict(admissible=self._admissible(), won=self._won(), valid=valid)

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
    """The next action of a sensible player of a running ToyEnv episode. known: names of the skills the player has read (a
    set; empty: a newcomer who explores): it uses those facts, what it has seen in this episode, and nothing else. rng:
    random.Random for free choices."""
    has = lambda thing, c: thing.startswith(c + " ")
    move_to = lambda place: f"go to {place}" if env.where != place else None if place in env.opened else f"open {place}"

    def find(c, home, known_home, ends):
        """Step towards the thing of class c: its known place, or one not seen yet. Who stands in front of something
        closed looks into it first, also when the thing is known to be elsewhere: see "imitation gap" in README.md."""
        if env.where in STORAGES and env.where not in env.opened:
            return f"open {env.where}"
        seen = [p for p in STORAGES if p in env.seen and p not in ends and any(has(o, c) for o in env.contents[p])]
        place = seen[0] if seen else home if known_home and home not in env.seen else None
        return move_to(place or rng.choice([p for p in STORAGES if p not in env.seen] or STORAGES))

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
    reading a skill, but nothing of the household of training and evaluation. chat: sdar.Chat. rng: random.Random. skilled:
    share of episodes whose player has read the skills of its task. distracted: share in which skills of other tasks stand
    between them. takeover: share of skilled ones whose first 1-8 turns an explorer plays, since the teacher will have to judge
    states that the student got itself into. noise: share of random actions: played, so that states off the path are seen, but
    not imitated. observations: weight of their tokens; knowing the world helps acting in it. Returns (ids, loss weight of each
    id)."""
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

# --- The paper's three environments: thin shims around the real engines, imported when used -------
@contextmanager
def engine(what):
    """Whatever an engine raises in here becomes EnvUnavailable: what failed, and how."""
    try:
        yield
    except Exception as error:
        raise EnvUnavailable(f"{what} ({type(error).__name__}: {error})") from error

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
WORKERS, LOCK = {}, threading.Lock()  # {core: executor of one process}: ALFWorld's engine is slow and not safe in threads
PLAYING = {}  # in such a process, {number of an environment: (path, game)}: its last game stays loaded, half of a reset

def worker_begins():
    """In a worker: leave Ctrl-C and SIGTERM to the parent process, and end when that ends, however it does."""
    from multiprocessing import parent_process
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    os.environ["ALFWORLD_DATA"] = os.sep  # any folder that exists, else the package makes one below the user's home
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()

def play_game(number, path, action):
    """In a worker: start a game (action None) or act in the one that environment `number` plays: (text, won, admissible)."""
    signal.alarm(120)  # an engine that hangs takes its process along
    with engine(f"cannot play {path}"):
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
        if action is None and PLAYING.get(number, ("",))[0] != path:
            wanted = textworld.EnvInfos(won=True, admissible_commands=True)
            PLAYING[number] = path, textworld.start(path, wanted, [AlfredDemangler])
        game = PLAYING[number][1]
        state = game.reset() if action is None else game.step(action)[0]
        signal.alarm(0)
        return state["feedback"].strip(), bool(state["won"]), [a for a in state["admissible_commands"] if a != "help"]

class AlfworldEnv(TextEnv):
    """ALFWorld's text games on TextWorld's PDDL engine. A task id is a game's path below `data` (or ALFWORLD_DATA); `seed`
    changes nothing. An action that cannot be done is valid and answered "Nothing happens.", as in the official code. Splits:
    train, eval (the data set's valid_seen, as in the paper), dev (valid_unseen), or its own names; a folder without the data
    set's split folders is every split."""
    name, default_turns, show_admissible, slow, numbers = "alfworld", 50, True, True, iter(range(10 ** 9))
    SPLITS = {"train": ("train",), "valid_seen": ("eval", "valid_seen"), "valid_unseen": ("dev", "valid_unseen")}

    def __init__(self, data="", **options):
        super().__init__(**options)
        require(find_spec("textworld") and find_spec("alfworld"),
                "ALFWorld is missing: pip install alfworld (it builds with g++, make and a command python)", EnvUnavailable)
        self.data, self.number = os.path.abspath(data or os.environ.get("ALFWORLD_DATA", "(no data named)")), next(self.numbers)
        self.goals = self.games(self.data)

    @classmethod
    @lru_cache(maxsize=None)
    def games(cls, folder):
        """{path: (task type, splits)} of the games below a folder, sorted. EnvUnavailable if none: the engine would hang."""
        paths = sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*.tw-pddl"))
        require(paths, f"no ALFWorld games (*.tw-pddl) in {folder}: run alfworld-download or name their folder", EnvUnavailable)
        splits = {path: cls.SPLITS[part] for path in paths for part in path.split(os.sep)[:-1] if part in cls.SPLITS}
        splits = splits or dict.fromkeys(paths, sum(cls.SPLITS.values(), ()))
        return {path: ((re.search(r"(pick|look)_\w+", path) or ["other"])[0], parts) for path, parts in splits.items()}

    def _reset(self, task, seed):
        self.path = os.path.join(self.data, task)
        observation, state = self._step(None)
        self.task = observation.split("Your task is to: ")[-1]
        return observation.split("=-")[-1].strip(), state  # without the banner

    def _step(self, action):
        from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
        from multiprocessing import get_context
        core, action = self.number % CORES, action and action.strip().lower()
        try:
            with LOCK:  # several threads may be the first
                WORKERS[core] = WORKERS.get(core) or ProcessPoolExecutor(1, get_context("fork"), worker_begins)
                future = WORKERS[core].submit(play_game, self.number, self.path, action)
            text, won, admissible = future.result()
        except BrokenExecutor as error:
            WORKERS.pop(core, None)  # the next reset starts another
            raise EnvUnavailable(f"cannot play {self.path}: its process died") from error
        return text, dict(admissible=admissible, won=won, valid=action != "")

class WebShopEnv(TextEnv):
    """WebShop's own text environment, from a checkout of its code in `data` (or WEBSHOP_ROOT). A task id is the index of a
    synthetic goal, as in the official code; `score` is WebShop's reward. Splits by index: eval the first 500 goals (at most
    a fifth), dev as many, train the rest. What the page does not offer does nothing; search works on every page."""
    name, default_turns, show_admissible, first = "webshop", 15, True, {}

    def __init__(self, data="", **options):
        super().__init__(**options)
        root, before = os.path.abspath(data or os.environ.get("WEBSHOP_ROOT", "(none named)")), random.getstate()
        first = self.first.get(root)  # its server, with products and index, is everyone's
        sys.path += [] if root in sys.path else [root]
        with engine(f"WebShop does not start: WEBSHOP_ROOT={root} must be a checkout of its code after its setup.sh"):
            from web_agent_site.envs.web_agent_text_env import WebAgentTextEnv
            random.seed(233)  # the engine seeds the order of goals, but not their price limits
            self.shop = WebAgentTextEnv(observation_mode="text", human_goals=False, server=first and first.shop.server,
                                        session_prefix=f"{id(self)}-")  # else equal goals share a session
        random.setstate(before)
        self.first.setdefault(root, self)
        goals = self.shop.server.goals
        held = max(1, min(500, len(goals) // 5))
        self.goals = first.goals if first else {
            str(i): (goal.get("category", "other"), (("eval", "dev", "train")[min(2, i // held)],), goal["instruction_text"])
            for i, goal in enumerate(goals)}

    def _reset(self, task, seed):
        self.task = self.goals[task][2].strip()
        observation, state = self._play(self.shop.reset, int(task))
        return f"Instruction: {self.task}\n{observation}", state

    def _step(self, action):
        match = re.fullmatch(r"(search|click)\[\s*(.*?)\s*\]", action.strip().lower())
        name, text = match.groups() if match else ("", "")
        text = self.clickable.get(text) if name == "click" else text
        if text and not (name == "search" and text.startswith("<")):  # the engine's own commands, on which it may break
            return self._play(self.shop.step, f"{name}[{text}]")
        return "Nothing happens.", {**self.state, "valid": match is not None}

    def _play(self, call, argument):
        with engine(f"WebShop failed at {argument!r}"):
            observation, score, over = (*call(argument), False)[:3]  # reset returns two values, step four
            page = self.shop.get_available_actions()
        self.clickable = {" ".join(text.split()): text for text in page["clickables"] if text != "search"}  # which is dead
        actions = ["search[<query>]"] * page["has_search_bar"] + [f"click[{text}]" for text in self.clickable]
        self.state = dict(admissible=actions, won=bool(over and score == 1), valid=True, score=float(score or 0), over=bool(over))
        return observation.replace(f"Instruction: [SEP] {self.task} [SEP] ", ""), self.state

def read_rows(file, **types):
    """The rows of a JSON-lines file: dicts with values of these types. EnvUnavailable names a line that is no such row."""
    wanted, rows = "a JSON-lines file with " + ", ".join(types), []
    with engine(f"{file!r} must be {wanted}"):
        lines = Path(file).read_text("utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        with engine(f"{file}, line {number}: not a row of {wanted}"):
            rows += [json.loads(line)] if line.strip() else []
            assert not line.strip() or all(isinstance(rows[-1][key], kind) for key, kind in types.items()), "another type"
    return rows

def ask(url, query, topk=3, seconds=30):
    """Passages for a query from a retrieval server: a list of str, best first. The payload suits both public dialects. At
    most three tries in so many seconds, one if the fault is ours (4xx); then EnvUnavailable, with what came back."""
    from urllib.request import ProxyHandler, Request, build_opener
    payload = json.dumps({"query": query, "queries": [query], "topk": topk, "return_scores": True}).encode()
    end = time.monotonic() + seconds
    for pause in (0.2, 1.0, seconds):
        data = b""
        try:
            request, timeout = Request(url, payload, {"Content-Type": "application/json"}), min(10, end - time.monotonic())
            with build_opener(ProxyHandler({})).open(request, timeout=max(0.1, timeout)) as answer:
                while part := answer.read1(2 ** 16):  # in parts: a server that drips must not outlast the time
                    data += part
                    if len(data) > 2 ** 23 or time.monotonic() > end:
                        raise TimeoutError("more than 8 MB, or too slow")
            rows = [row for row in json.loads(data)["result"][0] if row.get("score", 0) > -1e30]  # less: an index's padding
            return list(dict.fromkeys("" + row.get("document", row)["contents"] for row in rows))
        except Exception as error:  # no connection, too slow, a status, half an answer, not JSON, JSON of another shape
            trouble = f"{type(error).__name__}: {error}" + (f"; it sent {data[:200]}" if data else "")
            if 400 <= getattr(error, "code", 0) < 500 or time.monotonic() + pause >= end:
                break
            time.sleep(pause)
    raise EnvUnavailable(f"no search results from {url} ({trouble}); `python envs.py serve CORPUS.jsonl` starts a server")

class SearchEnv(TextEnv):
    """Questions to answer with a search server, as in Search-R1. A task id is a question's id; `seed` changes nothing. Won: a
    golden answer but for normalisation. At the last turn a search is not executed. data: a JSON-lines file with id, question,
    golden_answers (str or list) and perhaps data_source and split; without split, a hash of the id puts 3/5 into train, 1/5
    into dev and 1/5 into eval. url: of the server."""
    name, default_turns, slow, stop_strings = "search", 4, True, ("</search>", "</answer>")
    TYPES = {"compare": r"\b(both|same|older|younger|earlier|later|first|more|larger|longer|higher)\b.*\b(or|and)\b",
             "multi_hop": r"hotpot|2wiki|musique|bamboogle|\b(whose|of the \w+ (that|who|which|where))\b",
             "attribute": r"\b(when|where|how (many|much|old|long|tall)|what (year|date|city|number))\b", "direct": ""}
    ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL | re.IGNORECASE)
    TAG = re.compile(r"<(?=\s*(?:/\s*)?(?:search|answer|information|think|action)\b)", re.IGNORECASE)

    def __init__(self, data="(no data named)", url="http://127.0.0.1:8000/retrieve", **options):
        super().__init__(**options)
        self.goals, self.url = self.questions(data, url), url

    @classmethod
    @lru_cache(maxsize=None)
    def questions(cls, file, url):
        """{id: (task type, splits, (question, golden answers))} of a file; the server has been tried."""
        goals, of_hash = {}, ("eval", "dev", "train", "train", "train")
        for row in read_rows(file, id=(str, int), question=str, golden_answers=(str, list)):
            text, name = f"{row['question'][:2000]} {row.get('data_source', '')}", str(row["id"])
            kind = next(kind for kind, words in cls.TYPES.items() if re.search(words, text, re.IGNORECASE))
            split = row.get("split") or random.Random(name.encode(errors="replace")).choice(of_hash)
            goals[name] = kind, (split,), (row["question"], row["golden_answers"])
        ask(url, "probe")
        return goals

    def parse(self, response):
        """Text of the model -> (action, valid): the first <search> or <answer> in it, without line breaks; else ""."""
        found = self.ACTION.search(response)
        text = " ".join(found[2].split()) if found else ""
        return (f"<{found[1].lower()}>{text}</{found[1].lower()}>", True) if text else ("", False)

    def _reset(self, task, seed):
        self.task, self.golden = self.goals[task][2]
        return self.task, dict(admissible=None, won=False, valid=True)

    def _step(self, action):
        action, valid = self.parse(action)
        kind, text = self.ACTION.fullmatch(action).groups() if valid else ("", "")
        shown, tail = "" if valid else "Nothing happens.", ""
        if kind == "search" and self._turns + 1 < self.max_turns:
            found = [f"Doc {i}: {self.TAG.sub('(', passage)}" for i, passage in enumerate(ask(self.url, text), 1)]
            shown, tail = "<information>" + ("\n".join(found) or "nothing found"), "</information>"
        won = kind == "answer" and self.matches(text, self.golden)
        return shown, dict(admissible=None, won=won, valid=valid, over=kind == "answer", tail=tail)

    @staticmethod
    def matches(answer, golden):
        """True if the answer is a golden one (a str or a list) but for case, punctuation, articles and blanks."""
        plain = lambda text: re.sub(r"\b(a|an|the)\b", " ", re.sub(r"[!-/:-@[-`{-~]", "", str(text).lower())).split()
        return plain(answer) in [plain(text) for text in ([golden] if isinstance(golden, str) else golden) if plain(text)]

def serve(file, port=8000):
    """Serve a JSON-lines file of rows (id, contents) on loopback for ever, by BM25 (k1 0.9, b 0.4), in both public dialects
    of POST /retrieve: query or queries, topk, return_scores -> {"result": [[{"document": row, "score": float}]]}."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    rows, postings = read_rows(file, id=(str, int), contents=str), {}
    words = lambda text: re.findall(r"\w+", text.lower())
    counts = [Counter(words(row["contents"])) for row in rows]
    mean = sum(count.total() for count in counts) / max(1, len(rows))
    for i, count in enumerate(counts):
        for word, n in count.items():
            postings.setdefault(word, []).append((i, n / (n + 0.9 * (0.6 + 0.4 * count.total() / mean))))

    def find(query, topk, scored):
        scores = Counter()
        for found in (postings.get(word, ()) for word in words(query)):
            for i, weight in found:
                scores[i] += weight * math.log(1 + (len(rows) - len(found) + 0.5) / (len(found) + 0.5))
        return [{"document": rows[i], "score": score} if scored else rows[i] for i, score in scores.most_common(topk)]

    class Handler(BaseHTTPRequestHandler):
        timeout = 30  # seconds in which a request must have come
        log_message = lambda self, *args: None

        def do_POST(self):
            try:
                request = json.loads(self.rfile.read(max(0, min(int(self.headers["Content-Length"]), 10 ** 6))))
                queries, topk = request.get("queries") or [request["query"]], request.get("topk") or 3
                assert type(queries) is list and topk in range(1, 1001)
                code, value = 200, {"result": [find(query, topk, request.get("return_scores")) for query in queries]}
            except Exception:  # whatever is wrong with a request
                code, value = 422, {"detail": "wanted: query (str) or queries (list of str), topk 1 to 1000, return_scores"}
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # of connections that wait: a step's searches come all at once

        def handle_error(self, request, client_address):
            """A client went away."""

    with Server(("127.0.0.1", port), Handler) as server:
        print(f"search server: http://127.0.0.1:{server.server_port}/retrieve", flush=True)
        server.serve_forever()

# --- Environments by name, the command line ------------------------------------------------------
ENVS = {"toy": ToyEnv, "alfworld": AlfworldEnv, "webshop": WebShopEnv, "search": SearchEnv}

def make_env(name, **options):
    """A new environment by name; options go to its constructor. ValueError for an unknown name."""
    require(name in ENVS, unknown("environment", name, ENVS))
    return ENVS[name](**options)

def play(name, split="eval", task=None, **options):
    """A person plays an episode in the terminal and sees what the model sees: the split's first task, or that of an id."""
    env, over = make_env(name, **options), []
    print(env.instructions, env.reset(task or env.tasks(split)[0])[0], sep="\n\n")
    while not any(over):
        action, valid = env.parse(input("> "))
        observation, _, *over, info = env.step(action)
        print(observation if valid and info["valid"] else f"{observation} (an invalid action)")
    print(f"{'won' if info['won'] else 'not won'}, score {info['score']:g}")

def main(argv):
    """The command line. Returns the exit code: 0, also at the end of input; 2 bad input (one line on stderr); 130 Ctrl-C."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            self.exit(2, f"envs.py: {message}\n")  # one line, without the usage

    parser = Parser("envs.py", description="play: be the agent. serve: a search server on loopback.")
    parser.add_argument("command", choices=("play", "serve"))
    parser.add_argument("what", help=f"play: {', '.join(ENVS)}. serve: a JSON-lines file with id and contents")
    for flag, help in {"data": "play: its games, checkout or questions", "url": "play search: of the server",
                       "split": "play: train, dev or eval", "task": "play: an id", "port": "serve: 8000, 0 for any"}.items():
        parser.add_argument("--" + flag, default=argparse.SUPPRESS, help=help, type=int if flag == "port" else str)
    options = vars(parser.parse_args(argv))
    try:
        return {"play": play, "serve": serve}[options.pop("command")](options.pop("what"), **options) or 0
    except (EOFError, KeyboardInterrupt) as error:
        print("\nstopped")
        return 0 if isinstance(error, EOFError) else 130
    except (EnvUnavailable, ValueError, OverflowError, TypeError, LookupError, OSError) as error:
        print(f"envs.py: {error}", file=sys.stderr)
        return 2

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
