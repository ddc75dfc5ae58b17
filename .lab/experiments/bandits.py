"""--retrieval ucb with another reward, other arms or less exploration: the paper names none.

    python .lab/bandits.py success,type --retrieval ucb [flags of train]

success: the share of the group's episodes that were won, instead of how well the teacher's gaps
agree with the reward. type: an arm is a skill and a task type, instead of a skill and whether
keyword retrieval would find it. exploit: a fifth of the bonus for arms that were seldom played.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import envs
import sdar


class BySuccess(envs.Bandit):
    """The student's success is the reward of the skills that its teacher read."""

    def reward(self, episodes, advantages, gaps):
        """The share of the group's episodes that were won."""
        return sum(episode.won for episode in episodes) / len(episodes)


class ByType(envs.Bandit):
    """A skill's worth is another one for each task type, whatever the task's words."""

    def arm(self, skill, task, task_type):
        """The skill and the task type."""
        return f"{skill.name} for {task_type}"


class Exploiting(envs.Bandit):
    """Rewards of two arms differ by a tenth here; a bonus of 1 drowns that for a hundred plays."""

    C = 0.2


BANDITS = {"success": BySuccess, "type": ByType, "exploit": Exploiting}


def main(argv):
    """Train with a bandit that is all that the first word names."""
    kinds, *flags = argv or [""]
    kinds = dict.fromkeys(kinds.split(","))  # each once
    unknown = {*kinds} - {*BANDITS}
    if unknown:
        print(f"{unknown.pop()!r}: choose from {','.join(BANDITS)}", file=sys.stderr)
        return 2
    sdar.Bandit = type("Bandit", tuple(BANDITS[kind] for kind in kinds), {})
    return sdar.main(["train", *flags])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
