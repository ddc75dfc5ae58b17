"""The microscope: what it shows is what an update does, and its pages are whole."""

import copy
import json
import re
import sys
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import microscope
import numpy as np
import torch
from pytest import approx, fixture, mark

import sdar
from test_sdar import play, small


@mark.parametrize("changes", [{}, {"method": "opsd"}, {"gate": "entropy"}, {"gate": "none"}])
def test_the_push_is_the_losses_gradient(changes, policy, monkeypatch):
    config = small(Path(), group_size=8, sdar_coef=0.3, kl_coef=0.0, **changes)
    group = play(policy, config)
    group[1].reward = 1.0
    values = microscope.dissect(policy[0], group, config)
    batch = sdar.step_batch(policy[0], None, policy[0], group, config, 1)
    _, entropy = sdar.response_logprobs(policy[0], group, config)
    student = values["student"].clone().requires_grad_()
    monkeypatch.setattr(sdar, "response_logprobs", lambda *_: (student, entropy))
    sdar.objective(policy[0], group, batch, config)["loss"].sum().backward()
    assert torch.allclose(-student.grad, values["by reward"] + values["by teacher"], atol=1e-5)
    assert torch.allclose(values["gap"], values["teacher"] - values["student"])


@fixture
def inspect(tiny, tmp_path, monkeypatch, capsys):
    """Flags -> (exit code, stdout, stderr, the page)."""
    monkeypatch.setattr(sdar, "load_policy", lambda config: tiny)
    monkeypatch.chdir(tmp_path)

    def run(flags):
        code = sdar.run(partial(microscope.main, flags.split()))
        page = tmp_path / "inspect.html"
        return code, *capsys.readouterr(), page.read_text("utf-8") if page.exists() else ""

    return run


def test_it_prints_a_line_a_token(inspect):
    _, printed, _, _ = inspect("--seed 6 --episode 2")
    rows = [line for line in printed.splitlines() if re.search(r"( +-?\d\.\d\d){6}$", line)]
    assert len(rows) == 18
    assert max(map(len, rows)) <= 80
    assert "student    teacher" in printed
    assert printed.count("<|assistant|>") == 6
    assert "\nskill: Skill tomato is kept in drawer 4\n" in printed
    assert "\n<|user|> drawer 4 is closed <|assistant|>\n" in printed
    row = next(row for row in rows if row.startswith("drawer 4")).split()
    assert row == "drawer 4 -3.05 0.00 3.05 1.00 1.62 1.00".split()


def test_it_colours_terminals_alone(inspect, monkeypatch):
    assert "\033" not in inspect("--seed 6 --max-turns 2")[1]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for value, coloured in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", value)
        assert ("\033[" in inspect("--seed 6 --max-turns 2")[1]) is coloured


def test_its_page_is_whole_and_loads_nothing(inspect):
    page = inspect("--seed 6 --episode 2")[3]
    tags = [element.tag for element in ElementTree.fromstring(page).iter()]
    assert (tags.count("i"), tags.count("b"), tags.count("mark")) == (20, 27, 1)
    assert len(page) < 25_000
    assert page.index("<mark>") < page.index('id="tokens"')  # first the skill
    assert "favourite cabinet" in page or "favourite drawer" in page
    assert re.search("--d:-?[2-9]", page)
    assert not re.search(r"<script|https?:|url\(|@import|\{[a-z]+\}|src=", page)


REFUSED = {
    "--method grpo": "--method grpo has none",
    "--episode 8": "episodes 0 to 7",
    "--episode -1": "episodes 0 to 7",
    "--page page.txt": "--page page.txt: must be",
    "--page no/page.html": "--page no/page.html: must be",
    "--run nowhere": "--run nowhere holds no run",
    "--run nowhere --lr 1": "no --lr",
}


@mark.parametrize("flags", REFUSED)
def test_it_refuses_what_it_cannot_show(flags, inspect):
    code, _, error, page = inspect(flags)
    assert (code, error.count("\n"), page) == (2, 1, "")
    assert REFUSED[flags] in error


def test_it_starts_with_a_group_that_has_won_and_lost(inspect):
    printed = inspect("")[1]
    assert "\nepisode: 2: won +1.62\n" in printed
    assert "lost -0.54" in printed
    assert "-0.00" not in printed


def test_it_shows_hostile_text_as_text(inspect, tiny, monkeypatch):
    class Rude(type(tiny[1].tokenizer)):
        def decode(self, *args, **options):
            return "<script>\x1b[31m{task}\"'&"

        def batch_decode(self, rows, **options):
            return [self.decode(row) for row in rows]

    rude = copy.copy(tiny[1].tokenizer)
    rude.__class__ = Rude
    monkeypatch.setattr(tiny[1], "tokenizer", rude)
    code, printed, _, page = inspect("--seed 6 --max-turns 3")
    read = ElementTree.fromstring(page.replace("\x1b", ""))
    assert code == 0
    assert "\x1b" not in printed
    assert "<script" not in page
    assert "".join(read.itertext()).count("<script>") > 9


def test_it_compares_a_runs_start_and_end(inspect, tiny, tmp_path, monkeypatch):
    config, loaded = small(tmp_path), []
    Path(config.out).mkdir()
    settings = vars(config) | {"device": "cuda", "kernel": True}  # of another machine
    Path(config.out, "config.json").write_text(json.dumps(settings))
    monkeypatch.setattr(sdar, "load_policy", lambda config: loaded.append(config.model) or tiny)
    code, printed, _, page = inspect("--run run")
    assert code == 0
    assert loaded == ["tiny", "run/checkpoint"]
    means = [line.split(":")[0] for line in printed.splitlines() if "mean gap" in line]
    assert means == ["start", "end"]
    tables = [*ElementTree.fromstring(page).iter("table")]
    assert [len(table) for table in tables] == [11, 4, 11, 4]  # a head; turns, positions in one
    assert not re.search(r"\{[a-z]+\}", page)


def test_gaps_and_kl_by_turn_and_position(policy):
    config = small(Path())
    episodes = play(policy, config)
    tokens = microscope.gaps_of(policy[0], episodes, config)
    turns, positions, gaps, kl, gates = tokens.T
    assert len(tokens) == sum(sum(episode.mask) for episode in episodes)
    assert turns.max() == max(episode.turns for episode in episodes)
    assert (positions == 1).sum() == sum(episode.turns for episode in episodes)
    assert gates == approx(1 / (1 + np.exp(-5 * gaps)), abs=1e-5)

    # The KL of a token's whole distribution, by hand.
    logits = []
    for with_skill in (False, True):
        ids, mask = episodes[0].view(with_skill)
        at = mask.index(1)
        logits.append(policy[0](torch.tensor([ids])).logits[0, at].double().log_softmax(-1))
    student, teacher = logits
    assert kl[1] == approx((student.exp() * (student - teacher)).sum().item(), abs=1e-4)
    assert kl[1] > 0.1


def test_a_long_episode_is_shown_by_some_turns_a_row(capsys):
    tokens = np.array([(turn, 1, -turn, 0, 0) for turn in range(1, 41)])
    html = microscope.show_means("turn", tokens[:, 0], tokens)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 11
    assert rows[2] == "5 to 8 4 -6.500 0.000 0.000".split()
    assert "<td>5 to 8</td><td>4</td><td>-6.500</td>" in html
