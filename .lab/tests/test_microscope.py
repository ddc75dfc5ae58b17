"""The microscope: what it shows is what an update does, and its pages are whole."""

import re
from pathlib import Path
from xml.etree import ElementTree

import microscope
import torch
from conftest import ROOT, call
from pytest import fixture, mark

import sdar
from test_sdar import play, small, trained


@mark.parametrize("changes", [{}, {"method": "opsd"}, {"gate": "entropy"}])
def test_the_push_is_the_losses_gradient(changes, policy, monkeypatch):
    model = policy[0]
    config = small(Path(), group_size=8, sdar_coef=0.3, kl_coef=0.0, **changes)
    group = play(policy, config)
    group[1].reward = 1.0
    values = torch.cat(microscope.dissect(model, group, config))
    student, teacher, gap, _, by_reward, by_teacher = values.T
    batch = sdar.step_batch(model, None, model, group, config, 1)
    _, entropy = sdar.response_logprobs(model, group, config)
    student.requires_grad_()
    monkeypatch.setattr(sdar, "response_logprobs", lambda *_: (student, entropy))
    sdar.objective(model, group, batch, config)["loss"].sum().backward()
    assert torch.allclose(-student.grad, by_reward + by_teacher, atol=1e-5)
    assert torch.allclose(gap, teacher - student)


@fixture
def look(tmp_path, capsys):
    """Flags -> what is printed, and the page."""

    def run(flags):
        page = tmp_path / "page.html"
        assert call("microscope", "--page", page, *flags.split()) == 0
        return capsys.readouterr().out, page.read_text("utf-8")

    return run


def test_it_prints_what_the_drawing_shows(look):
    printed, _ = look("--seed 6 --episode 5")
    columns = ElementTree.parse(ROOT / ".assets/method.svg").findall(".//*[@class='token']")
    for column in columns:
        texts = [child.text.replace("−", "-") for child in column if child.text]
        assert re.search("\n{} .* {} .* {} +{} +{} ".format(*texts), printed)
    assert len(columns) == 3
    assert "\nYou put tomato 1 in/on drawer 2.\n" in printed  # after the last action


def test_its_page_is_whole_and_loads_nothing(look):
    """Of the first group that has won and lost."""
    printed, page = look("--max-turns 9")
    assert "\nepisode: 2, won; of its group 2 of 8 won\n" in printed
    assert "\nagain: --seed 6 --episode 2\n" in printed
    tags = [element.tag for element in ElementTree.fromstring(page).iter()]
    assert (tags.count("i"), tags.count("b"), tags.count("mark")) == (20, 27, 1)
    numbers = (
        "student -3.05   4.7 %; teacher 0.00  99.9 %; gap 3.05; gate 1.00; "
        "by reward 1.62; by teacher 1.00"
    )
    assert numbers in page
    assert ">go to </i><i" in page  # whole words stand apart
    assert not re.search(r"<script|https?:|url\(|@import|\$[a-z]+|src=", page)


def test_hostile_text_is_shown_as_text(tmp_path, capsys):
    rude = "<script>\x1b[31m$task"
    texts = dict.fromkeys("task episode again skill before after beta".split(), rude)
    parts = [(rude, None), (rude, [0.0] * 6)]
    microscope.show(texts, parts)
    microscope.write_page(tmp_path / "page.html", texts, parts)
    assert "\x1b" not in capsys.readouterr().out
    assert "<script" not in (tmp_path / "page.html").read_text()


def test_a_runs_start_and_end_have_one_scale(look, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:  # the instrument does not know it
        patch.setitem(sdar.GATES, "own", sdar.GATES["gap"])
        trained(tmp_path, max_turns=10, gate="own")
    printed, page = look(f"--run {tmp_path}/run")
    said = r"(start|end): won \d of 8 \(\d+\.\d%\), mean gap -\d\.\d{3} nats\n"
    assert re.findall(said, printed) == ["start", "end"]
    rows = re.findall(r"(\d+) +(\d+) +(-?\d\.\d{3})   0\.\d{3}  (▪*)\n", page)
    assert rows[0][:2] == ("1", "24")  # the first turn of eight episodes, three tokens each
    gaps = [abs(float(gap)) for _, _, gap, _ in rows]
    assert gaps[11] > gaps[24] > 1 > 100 * gaps[10]  # "drawer 4", the second of a turn; the first
    assert [len(bar) for *_, bar in rows] == [round(2 * gap) for gap in gaps]
    assert len(rows) == 26 and rows[:13] != rows[13:]
    assert "0.554" in microscope.means_of("turn", *torch.tensor([[1, 1], [2, -1]]).numpy(), 0.5)
    assert '"--d:-2.88;--n:0.250"' in microscope.histogram([-2.84, 2, 2, 2])
