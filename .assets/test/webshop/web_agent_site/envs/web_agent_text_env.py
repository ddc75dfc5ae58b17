"""A stand-in for WebShop: the real class's interface and misbehaviour, in three pages."""

import random


class Server:
    def __init__(self):
        self.goals = [
            {"category": "garden", "instruction_text": "Find me a lamp", "price": random.random()}
            for _ in range(3000)
        ]
        self.pages = {}


class WebAgentTextEnv:
    def __init__(
        self,
        observation_mode="html",
        file_path="",
        server=None,
        human_goals=None,
        session_prefix="",
    ):
        assert observation_mode == "text" and human_goals is False
        self.server, self.prefix = server or Server(), session_prefix

    def reset(self, session=None):
        self.session = self.prefix + str(session)
        self.red = False
        self.server.pages[self.session] = (
            "start"  # without prefixes environments on one goal would share it
        )
        return "WebShop [SEP] " + self.text(), None

    def text(self):
        return "Instruction: [SEP] Find me a lamp [SEP] " + self.server.pages[self.session]

    def step(self, action):
        if action[:8] in ("search[<", "search[c"):
            raise TypeError("unhashable")
        done = action == "click[buy now]" and self.server.pages[self.session] == "item"
        self.red |= "red" in action
        clicked = action[6:-1] in self.get_available_actions()["clickables"]
        next_page = (
            "results"
            if action[:7] == "search["
            else "item"
            if clicked
            else self.server.pages[self.session]
        )
        self.server.pages[self.session] = next_page
        return self.text(), done * (1.0 if self.red else 0.5), done, None

    def get_available_actions(self):
        page = self.server.pages[self.session]
        clickables = {
            "start": ["search"],
            "results": ["< prev", "b01"],
            "item": ["red,  x", "buy now"],
        }[page]
        return {"has_search_bar": page == "start", "clickables": clickables}
