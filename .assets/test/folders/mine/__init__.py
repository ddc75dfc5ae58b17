from envs import TextEnv


class Tags(TextEnv):
    instructions = "Write <answer>a word</answer>"
    closing_tags = "</answer>"


class Held(TextEnv):
    """Nothing to train on."""

    instructions = "Answer."
    goals = {"a": ("b", ("eval",))}
