"""The microscope: what it shows is what an update does, and its pages are whole."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import microscope
import numpy as np
import torch
from conftest import ROOT, call, refused
from pytest import approx, fixture, mark

import sdar
from test_sdar import play, small


@mark.parametrize("changes", [{}, {"method": "opsd"}, {"gate": "entropy"}, {"gate": "none"}])
def test_the_push_is_the_losses_gradient(changes, policy, monkeypatch):
    config = small(Path(), group_size=8, sdar_coef=0.3, kl_coef=0.0, **changes)
    group = play(policy, config)
    group[1].reward = 1.0
    values = microscope.dissect(policy[0], group, config).T
    values = dict(zip(microscope.COLUMNS, values))
    batch = sdar.step_batch(policy[0], None, policy[0], group, config, 1)
    _, entropy = sdar.response_logprobs(policy[0], group, config)
    student = values["student"].clone().requires_grad_()
    monkeypatch.setattr(sdar, "response_logprobs", lambda *_: (student, entropy))
    sdar.objective(policy[0], group, batch, config)["loss"].sum().backward()
    assert torch.allclose(-student.grad, values["by reward"] + values["by teacher"], atol=1e-5)
    assert torch.allclose(values["gap"], values["teacher"] - values["student"])


@fixture
def look(tiny, tmp_path, monkeypatch, capsys):
    """Flags -> what is printed, and the page."""
    monkeypatch.setattr(sdar, "load_policy", lambda config: tiny)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)

    def run(flags):
        assert call("microscope", *flags.split()) == 0
        return capsys.readouterr().out, Path("inspect.html").read_text("utf-8")

    return run


def test_it_prints_a_line_a_token(look):
    printed, _ = look("--max-turns 9")
    rows = re.findall(r".*%(?: +-?\d+\.\d\d){4}$", printed, re.MULTILINE)
    assert len(rows) == 18
    assert rows[1].split() == "drawer 4 -3.05 4.7 % 0.00 99.9 % 3.05 1.00 1.62 1.00".split()
    assert max(map(len, printed.splitlines())) <= 80
    assert "\nagain: python .lab/microscope.py --max-turns 9 --seed 6 --episode 2\n" in printed
    assert "\nepisode: 2: won +1.62\n" in printed and "lost -0.54" in printed  # a mixed group
    assert "\nskill: Skill tomato is kept in drawer 4\n" in printed
    assert "\n<|user|> drawer 4 is closed <|assistant|>\n" in printed
    assert "\nYou put tomato 1 in/on drawer 2.\n" in printed  # after the last action
    assert "-0.00" not in printed


def test_the_drawing_has_the_microscopes_numbers(look):
    printed, _ = look("--seed 6 --episode 5")
    drawing = ElementTree.parse(ROOT / ".assets/method.svg")
    columns = drawing.findall(".//*[@class='token']")
    for column in columns:
        texts = [child.text.replace("−", "-") for child in column if child.text]
        token, student, teacher, gap, gate = texts
        assert re.search(rf"\n{token} .* {student} .* {teacher} +{gap} +{gate} ", printed)
    assert len(columns) == 3


def test_its_page_is_whole_and_loads_nothing(look):
    _, page = look("--seed 6 --episode 2")
    tags = [element.tag for element in ElementTree.fromstring(page).iter()]
    assert (tags.count("i"), tags.count("b"), tags.count("mark")) == (20, 27, 1)
    assert len(page) < 25_000
    assert page.index("<mark>") < page.index('id="tokens"')  # first the skill
    assert re.search("student -3.05 +4.7 %;.*favourite drawer 4 99.9 %", page)
    assert re.search("--d:-?[2-9]", page)
    assert not re.search(r"<script|https?:|url\(|@import|\$[a-z]+|src=", page)


REFUSED = {
    "--method grpo": "--method grpo has none",
    "--episode 8": "episodes 0 to 7",
    "--episode -1": "episodes 0 to 7",
    "--page page.txt": "--page page.txt: its name must end in .html",
    "--page no/page.html": "--page no/page.html: no file",
    "--run nowhere": "--run nowhere holds no run",
    "--run nowhere --lr 1": "no --lr",
}


@mark.parametrize("flags", REFUSED)
def test_it_refuses_what_it_cannot_show(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert REFUSED[flags] in refused(capsys, "microscope", *flags.split())
    assert not list(tmp_path.iterdir())


def test_hostile_text_is_shown_as_text(tmp_path, capsys):
    rude = "<script>\x1b[31m$task\"'&"
    texts = dict.fromkeys("task episode group again skill before after beta".split(), rude)
    parts = [(rude, None), (rude, ([0.0] * 6, rude))]
    microscope.show(texts, parts)
    microscope.write_page(tmp_path / "page.html", texts, parts, "")
    page = (tmp_path / "page.html").read_text("utf-8").replace("\x1b", "")
    assert "\x1b" not in capsys.readouterr().out and "<script" not in page
    assert "".join(ElementTree.fromstring(page).itertext()).count("<script>") == 13


def test_it_compares_a_runs_start_and_end(look, tiny, tmp_path, monkeypatch):
    settings = vars(small(tmp_path)) | {"device": "cuda", "kernel": True}  # of another machine
    Path("run").mkdir()
    Path("run/config.json").write_text(json.dumps(settings))
    assert call("microscope", "--run", "run") == 2  # before the first checkpoint
    Path("run/checkpoint").mkdir()
    loaded = []
    monkeypatch.setattr(sdar, "load_policy", lambda config: loaded.append(config.model) or tiny)
    printed, page = look("--run run")
    assert loaded == ["tiny", "run/checkpoint"]
    assert len(re.findall(r"won \d of 8 \(\d+\.\d %\), mean gap", printed)) == 2
    assert page.count("<pre>    turn  tokens") == printed.count("\n   place  tokens") == 2


def test_gaps_and_kl_by_turn_and_position(policy):
    config = small(Path())
    episodes = play(policy, config)
    turns, positions, gaps, kl, gates = microscope.gaps_of(policy[0], episodes, config)
    first = turns[: len(episodes[0].logprobs)]
    assert (first[-1], (first == 1).sum()) == (episodes[0].turns, 3)
    assert (positions == 1).sum() == sum(episode.turns for episode in episodes)
    assert positions[:5].tolist() == [1, 2, 3, 1, 2]
    assert gates == approx(1 / (1 + np.exp(-5 * gaps)), abs=1e-5)

    # The KL of a token's whole distribution, by hand.
    student, teacher = (
        policy[0](torch.tensor([ids])).logits[0, mask.index(1)].log_softmax(-1)
        for ids, mask in map(episodes[0].view, (False, True))
    )
    assert kl[1] == approx((student.exp() * (student - teacher)).sum().item(), abs=1e-4)
    assert kl[1] > 0.1


def test_a_runs_start_and_end_have_one_scale():
    """A gap of -.015 does not look like one of -2.84; long episodes are some turns a row."""
    turns, zeros = np.arange(1, 41), np.zeros(40)
    for gap, marks, place in ((-0.015, 0, "0.00"), (-2.84, 60, "-2.88")):
        table = microscope.means_of("turn", turns, [zeros + gap, zeros, zeros])
        assert f"\n     5-8       4  {gap:.3f}   0.000   0.000" in table
        assert (table.count("\n"), table.count("▪")) == (10, marks)
        assert f'"--d:{place};--n:0.250"' in microscope.histogram([gap, 2, 2, 2])
