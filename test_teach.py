"""What teaches: inspect, plot, the exercises, and the README's commands."""
import base64
import json
import os
import re
import runpy
import shlex
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import envs
import sdar
from test_sdar import grad_of, play, policy, small, tensor, tiny  # noqa: F401

ROOT = Path(sdar.__file__).resolve().parent
README = (ROOT / "README_teach.md").read_text()
exercise = SimpleNamespace(**runpy.run_path(str(ROOT / ".assets/exercises/exercise.py")))
near = lambda x, y: torch.allclose(torch.as_tensor(x).double(), torch.as_tensor(y).double(), atol=1e-5)

def test_exercise_group_advantages():
    score, advantages = tensor([1, 0, 0, 0, 1, 1])[0], sdar.group_advantages
    assert near(advantages(score[:4], torch.tensor([7] * 4))[0], 1.5), "1.5 is (1 - 1/4) / 0.5: the deviation has n - 1 under it (1.73: n)"
    mixed = advantages(torch.tensor([1., 5., 0., 5.]), torch.tensor([3, 9, 3, 9]))
    assert near(mixed[[1, 3]], [0, 0]), "all of group 9 scored alike, so nothing is to be learned: 0, not nan (eps), not the batch's mean"
    assert near(mixed[[0, 2]], [.707106, -.707106]), "a group's rows need not stand together, and another group's scores are not its business"
    assert near(advantages(torch.tensor([.5]), torch.tensor([0])), .5), "a group of one: mean 0, deviation 1"
    assert near(advantages(score[:2], torch.tensor([0, 0]), normalize_std=False), [.5, -.5]), "normalize_std=False leaves the mean off alone"
    weighted = advantages(score[:2], torch.tensor([0, 0]), weights=torch.tensor([3, 1]))
    assert near(weighted, advantages(tensor([1, 1, 1, 0])[0], torch.zeros(4))[[0, 3]]), "a weight of 3 counts a row three times"

def test_exercise_gate():
    gap, h, mask = tensor([.5, -.2, 0.0, 9.0]).requires_grad_(), tensor([.1, .7, 0.0, 9.0]), tensor([1, 1, 1, 0])
    g = sdar.gate("gap", gap, h, 5.0, mask)
    assert not g.requires_grad, "the gate must be detached: else tokens with a clearly negative gap are pushed down, without a bound"
    assert near(g[0, :3], [.924142, .268941, .5]), "sigmoid(beta gap): 1/2 without a gap, more where the teacher finds the token likelier"
    assert near(sdar.gate("gap", gap, h, 0.0, mask), [[.5] * 4]), "beta 0 is a gate of 1/2 whatever the gap"
    for kind, expected, message in (
            ("entropy", [.622459, .970688, .5], "sigmoid(beta h): it must not know the gap"),
            ("soft_or", [.939913, .960834, .5], "1 - (1 - h)(1 - gap) goes into the sigmoid"),
            ("none", [1, 1, 1], "1 everywhere"), ("reverse_kl", [.5, -.2, 0], "the gap itself, signed"),
            ("constant", [.564361] * 3, "the mean of the gap gate over the mask: what stands behind it must not count"),
            ("centred", [.359781, -.29542, -.064361], "the gap gate less its mean over the mask")):
        assert near(sdar.gate(kind, gap, h, 5.0, mask)[0, :3], expected), f"{kind}: {message}"
    shuffled = sdar.gate("shuffled", gap, h, 5.0, mask, torch.Generator().manual_seed(0))
    assert near(shuffled[mask > 0].sort().values, g[mask > 0].sort().values), "shuffled: the same values, on other tokens, within the mask"
    with pytest.raises(ValueError, match="unknown gate"):
        sdar.gate("sharp", gap)

def test_exercise_sdar_loss():
    nan = float("nan")
    student, teacher, mask = tensor([-1, -.5, -2, nan]).requires_grad_(), tensor([-.5, -.7, -2, nan]).requires_grad_(), tensor([1, 1, 1, 0])
    loss, stats = sdar.sdar_loss(student, teacher, mask)
    push = -torch.autograd.grad(loss, student, retain_graph=True)[0]
    assert push.isfinite().all() and not push[0, 3], "what stands under a mask of 0, nan included, may reach nothing: multiplying does not stop nan"
    assert (push[0, :3] > 0).all(), "every sampled token is pushed up; down means a turned sign or a gate that is not detached"
    assert near(push[0, :3] * 3, [.924142, .268941, .5]), "the push is g / tokens of the mask: a mean over tokens, not rows or columns"
    assert torch.autograd.grad(loss, teacher, allow_unused=True)[0] is None, "the teacher must be detached, or it learns to please the student"
    assert near(loss.item(), (.924142 * .5 - .268941 * .2) / 3), "the value: mean of g (teacher - student)"
    assert stats == pytest.approx({"gate_mean": .564361, "gate_active": 1 / 3, "gap_mean": .1}, abs=1e-5), "a gate of 1/2 is not active"

def test_exercise_kl_k3():
    p, q = tensor([.5, .3, .2]), tensor([.2, .3, .5])
    policy = p.log().requires_grad_()
    k3 = sdar.kl_k3(policy, q.log())
    assert (k3 >= 0).all() and near(k3[0, 1], 0), "k3 is 0 where the two agree and never negative; the plain difference is neither"
    assert near((p * k3).sum(), (p * (p / q).log()).sum()), "its mean under the policy is KL(policy || reference): d = reference - policy"
    assert near(grad_of(k3.sum(), policy), 1 - q / p), "reference is a constant, the policy is not"
    assert sdar.kl_k3(tensor([-50.0]), tensor([0.0])) == 10, "the value is clamped to 10, and exp must not overflow before"

def test_exercise_retrieve():
    bank = [envs.Skill("mug", "m", ("put", "heat"), ("mug",)), envs.Skill("hat", "h", (), ("hat",)), envs.Skill("all", "a"),
            envs.Skill("cup", "c", ("cool",), ("cup",)), envs.Skill("lamp", "l", ("look",))]
    names = lambda strategy, seed=0: [skill.name for skill in envs.retrieve(bank, "put that mug in drawer 1", "put", strategy, seed)]
    assert names("keyword") == ["mug", "all"], "task type and a whole word must fit ('hat' is in 'that'); no condition fits always"
    assert names("none") == [] and names("full") == ["mug", "hat", "all", "cup", "lamp"], "none is empty, full is the bank in its order"
    assert len(names("random")) == len(names("wrong")) == 2, "as many as keyword finds"
    assert {*names("wrong")} == {"cup", "lamp"}, "wrong: of other task types only; a skill without types is never wrong"
    assert names("random") == names("random"), "one seed, one choice: the episodes of a group read the same skills"
    assert len({str(names("random", seed)) for seed in range(9)}) > 1, "another seed, another choice"

def graded(kind):
    puzzle, _, answer = os.environ.get("ANSWER", "").partition(" ")
    if not puzzle or puzzle.isdigit() != (kind == "bug"):
        pytest.skip('no answer to judge: ANSWER="6 eos" or ANSWER="beta a"')
    assert puzzle in exercise.puzzles(), f"{puzzle!r} is none of {', '.join(exercise.puzzles())}"
    right, hint = exercise.judge(puzzle, answer)
    assert right, f"{puzzle} is not {answer!r}. {hint}"

def test_exercise_bug():
    graded("bug")

def test_exercise_experiment():
    graded("experiment")

def test_the_exercises_grade(tmp_path, monkeypatch):
    for name, file in exercise.BLANKS.items():
        (tmp_path / file).write_text((ROOT / file).read_text())
        exercise.blank(name, tmp_path)
        emptied = runpy.run_path(str(tmp_path / file))[name]
        assert emptied.__doc__ == getattr(sdar, name).__doc__
        [monkeypatch.setattr(module, name, emptied, raising=False) for module in (sdar, envs)]
        with pytest.raises(NotImplementedError, match=f"write {name} again"):
            globals()["test_exercise_" + name]()
    monkeypatch.setenv("ANSWER", "beta a")
    with pytest.raises(AssertionError, match="is not 'a'. .*gate_mean"):
        graded("experiment")
    bugs, packed = "eos observations shift skill detach temperature groups micro".split(), str(exercise.puzzles())
    for puzzle in exercise.puzzles():
        assert sum(exercise.judge(puzzle, name)[0] for name in (bugs if puzzle.isdigit() else "abc")) == 1
    assert not any(name in packed for name in bugs), "no solution may be read by accident"

def test_planted_bugs_show_in_the_metrics_of_step_1(tiny, tmp_path, monkeypatch):
    def step(module):
        monkeypatch.setattr(module, "load_policy", lambda config: (sdar.copy.deepcopy(tiny[0]), tiny[1]))
        config = module.Config(group_size=2, tasks_per_step=4, max_turns=5, minibatches=1, micro_tokens=300, temperature=2.0, out=str(tmp_path))
        metrics = module.training_step(module.Run(config), 1)[1]
        return {key: round(value, 5) for key, value in metrics.items() if value is not None}
    monkeypatch.setitem(sys.modules, "sdar", sdar)
    right = step(sdar)
    for number in range(1, 9):
        assert step(exercise.planted(str(number))) != right, f"bug {number} was not planted: sdar.py has changed under it"

def test_the_push_is_the_losses_gradient(policy):
    for changes in ({}, {"method": "opsd"}, {"gate": "entropy"}, {"gate": "constant", "clip_eps": .1}):
        config = small(Path(), group_size=8, sdar_coef=.3, **changes)
        group, method = play(policy, config), sdar.METHODS[config.method]
        group[1].reward = 1.0
        of, batch = sdar.dissect(policy[0], group, config), sdar.step_batch(policy[0], None, group, config)
        student, mask = of["student"].clone().requires_grad_(), batch["mask"]
        entropy = sdar.response_logprobs(policy[0], group, config, with_entropy=True)[1].detach()
        loss = method.policy * sdar.policy_loss(student, batch["old"], batch["advantages"], mask)[0] + .3 * sdar.sdar_loss(
            student, of["teacher"], mask, config.gate, 5.0, entropy)[0]
        assert torch.allclose(-grad_of(loss, student) * mask.sum(), of["push"] * mask, atol=1e-5)

class Page(HTMLParser):
    """Checks that tags are closed in order, and keeps which there are and the text."""
    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text), self.close()
    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.open += [tag] * (tag not in ("meta", "input"))
    def handle_endtag(self, tag):
        assert self.open.pop() == tag
    def handle_data(self, data):
        self.text += data

@pytest.mark.parametrize("columns", [40, 100])
def test_inspect(columns, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sdar, "load_policy", lambda config: tiny)
    monkeypatch.setenv("COLUMNS", str(columns)), monkeypatch.chdir(tmp_path)
    assert sdar.main("inspect --seed 6 --episode 2".split()) == 0
    out, page = capsys.readouterr().out, Path("inspect.html").read_text()
    rows = [line for line in out.splitlines() if re.search("[▲▼]", line)]
    assert "won +1.62" in out and "\033" not in out and all(len(line) <= columns for line in rows) and len(rows) == 18
    assert ("teacher" in out.split("go to")[0].split("skill")[1]) == (columns == 100)
    parsed = Page(page)
    assert not parsed.open and parsed.tags.count("i") == len(rows) and parsed.tags.count("mark") == 1 and parsed.tags.count("b") == 25
    assert len(page) < 20_000 and not re.search(r"<script|https?:|url\(|@import|\{(task|tokens|skill)\}|src=", page)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert sdar.main("inspect --seed 6 --episode 2".split()) == 0 and "\033[3" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert sdar.main("inspect --seed 6 --episode 2".split()) == 0 and capsys.readouterr().out == out

def test_inspect_shows_hostile_text_as_text_and_refuses_what_it_cannot_show(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    failing = lambda flags: (sdar.main(["inspect", *flags.split()]), capsys.readouterr().err)[1]
    tokenizer = sdar.copy.deepcopy(tiny[1].tokenizer)
    hostile = sdar.Chat(tokenizer)
    tokenizer.decode = lambda *args, **options: "<script>\x1b[31m{task}\"'&"
    monkeypatch.setattr(sdar, "load_policy", lambda config: (tiny[0], hostile))
    assert sdar.main(["inspect"]) == 0 and "\x1b" not in capsys.readouterr().out
    page = Path("inspect.html").read_text()
    assert "<script" not in page and not Page(page).open and Page(page).text.count("<script>") > 30 and len(page) < 500_000
    monkeypatch.setattr(sdar, "load_policy", lambda config: tiny)
    reset = envs.ToyEnv.reset
    monkeypatch.setattr(envs.ToyEnv, "reset", lambda self, *start: ("lorem ipsum dolor sit amet", reset(self, *start)[1]))
    assert failing("--max-turns 1") == "sdar.py: --model tiny cannot read --env toy: its tokenizer does not know most of the prompt\n"
    for flags, message in (("--method grpo", "--method grpo has none"), ("--episode 8", "--episode 8: there is none")):
        assert message in failing(flags + " --max-turns 1")

def test_plot(tmp_path, monkeypatch, capsys):
    def run(name, success, **changes):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(vars(sdar.Config(out=name, **changes))))
        lines = [{"step": step, "success": success, "kl": step / 7, "gap_mean": None} for step in (1, 2, 3)[:3 - changes.get("seed", 0)]]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.chdir(tmp_path)
    run("a-s0", .25), run("a-s1", .75, seed=1), run("b-s0", 1.0, lr=1.0), run("b-s1", 0.0, lr=2.0, seed=1)
    assert sdar.main("plot a-s0 a-s1 b-s0 --picture p.png".split()) == 0
    out = capsys.readouterr().out
    assert "▅▅  1: 0.50  2: 0.50  a\n███  1: 1.00  2: 1.00  3: 1.00  b\n" in out and "mean gap" not in out and "KL, nats\n▁▄  1: 0.14" in out
    assert Path("p.png").exists() == ("no picture" not in out)
    run("none", 0, seed=3), (tmp_path / "torn").mkdir(), (tmp_path / "torn/metrics.jsonl").write_text("{")
    for runs, message in (("", "takes folders"), ("none", "finished a step"), ("torn", "torn holds no run"), ("x", "x holds no run"), (".", ". holds no")):
        assert sdar.main(["plot", *runs.split()]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1

NOT_RUN = {r"pytest test_sdar.py": "it is this suite", r"git checkout": "undoes blank", r"exercise.py blank": "test_the_exercises_grade does it on a copy",
           r"sdar.py compare": "minutes; its flags are parsed, and test_compare_for_real runs the like", r"^python sdar.py$": "test_a_short_run..."}

def test_the_readmes_commands(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path), monkeypatch.setitem(sys.modules, "sdar", sdar), monkeypatch.setattr(sdar, "launch", None)
    short = "--tasks-per-step 2 --group-size 2 --eval-episodes 6 --eval-every 0 --max-turns 3 --steps 1".split()
    assert sdar.main(["--out", "runs/toy-sdar-s0", *short]) == 0
    blocks = "\n".join(re.findall("```bash\n(.*?)```", README, re.DOTALL)).splitlines()
    commands = dict.fromkeys(line.partition("  #")[0].strip() for line in list(filter(None, blocks)) + re.findall(r"`((?:python|git) [^`]*)`", README))
    for command in commands:
        words = shlex.split(command)
        if "compare" in words:
            sdar.parse_args(words[2:])
        if any(re.search(pattern, command) for pattern in NOT_RUN) or "RUN" in command:
            continue
        name, train = Path(words[1]).name, "--steps" in words
        main = sdar.main if name == "sdar.py" else lambda argv: exercise.main(*argv)
        assert main(words[2:] + short * train + ["g.svg"] * (words[2] == "gradient")) in (0, None), command
    assert len(commands) > 15

def test_the_readmes_library_example():
    code, = re.findall("```python\n(.*?)```", README, re.DOTALL)
    table = torch.randn(9, 9, requires_grad=True)
    ids, response = torch.randint(9, (2, 8)), torch.randint(9, (2, 5))
    names = {"model": lambda ids: SimpleNamespace(logits=table[ids]), "response": response, "mask": torch.ones(2, 5),
             "student_ids": torch.cat([ids[:, :3], response], 1), "teacher_ids": torch.cat([ids, response], 1),
             "grpo_loss": lambda logprobs, ids, mask: (logprobs * mask).sum()}
    exec(code, names)
    names["loss"].backward()
    assert names["student"].shape == (2, 5) and table.grad.abs().sum() > 0 and not names["teacher"].requires_grad
    assert names["stats"]["gap_mean"] != 0  # the last prompt token is another
    expected = torch.log_softmax(table[names["student_ids"][:, 2:-1]], -1).gather(-1, response[..., None])[..., 0]
    assert torch.allclose(names["student"], expected)

def test_the_table_of_contents_leads_to_the_method():
    text = (ROOT / "sdar.py").read_text()
    sections = dict(re.findall(r"^# --- (\d+)\. .*?-\n(.*?)(?=^# ---|^# ====|\Z)", text, re.MULTILINE | re.DOTALL))
    assert [*sections] == [str(n) for n in range(1, len(sections) + 1)]
    found = re.findall(r"(\d) ([^,(]+?) \(([^)]*)\)", " ".join(sdar.__doc__.partition("Sections:")[2].split()))
    assert {"gate", "view", "group_advantages", "response_mask"} <= {name for _, _, names in found for name in re.split(r"\W+", names)}
    for number, _, names in found:
        for name in names.split(", "):
            assert re.search(rf"(def|class) {name.split('.')[-1]}\b", sections[number]), f"{name} is not in section {number}"
