"""--retrieval ucb with another reward, other arms or less exploration: the paper names none.

    python .lab/experiments/bandits.py success type [flags of sdar.py]

success: the share of the group's episodes that were won, instead of how well the teacher's gaps
agree with the reward. type: an arm is a skill and a task type, instead of a skill and whether
keyword retrieval would find it. exploit: a fifth of the bonus for arms that were seldom played.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import sdar


class BySuccess(sdar.SkillBank):
    """The student's success is the reward of the skills that its teacher read."""

    def learn(self, episodes, advantages, gaps):
        """Each episode of a group is a part of its play."""
        part = 1 / len(gaps[0])
        for episode in episodes:
            for skill in episode.skills:
                arm = self.arm(skill, episode.task, episode.task_type)
                plays, rewards = self.arms.get(arm, (0, 0.0))
                self.arms[arm] = [plays + part, rewards + part * episode.won]


class ByType(sdar.SkillBank):
    """A skill's worth is another one for each task type, whatever the task's words."""

    def arm(self, skill, task, task_type):
        """The skill and the task type."""
        return f"{skill.name} for {task_type}"


class Exploiting(sdar.SkillBank):
    """Rewards of two arms differ by a tenth here; the whole bonus drowns that for 100 plays."""

    def index(self, skill, task, task_type):
        """The mean reward, and a fifth of the bonus."""
        plays, rewards = self.arms.get(self.arm(skill, task, task_type), (1, 0.0))
        mean = rewards / plays
        return mean + (super().index(skill, task, task_type) - mean) / 5


BANDITS = {"success": BySuccess, "type": ByType, "exploit": Exploiting}


def main(argv):
    """Train with a bandit that is all that the first words name."""
    parser = sdar.make_parser("python .lab/experiments/bandits.py KIND ... [flags of sdar.py]")
    parser.add_argument("kinds", nargs="+", choices=BANDITS)
    given = {"retrieval": "ucb"} | vars(parser.parse_args(argv))
    kinds = dict.fromkeys(given.pop("kinds"))  # each once
    config = sdar.configure(**given)
    sdar.require(config.retrieval == "ucb", "--retrieval: a bandit is for ucb")
    sdar.train(config, skill_bank=type("Bandit", tuple(map(BANDITS.get, kinds)), {}))


if __name__ == "__main__":
    sys.exit(sdar.run(lambda: main(sys.argv[1:])))
