"""What teaches: inspect, plot, the exercises, and the README's commands."""
import json
import os
import re
import runpy
import shlex
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import envs
import sdar
from test_sdar import grad_of, play, policy, small, tiny  # noqa: F401

ROOT = Path(sdar.__file__).resolve().parent
README = (ROOT / "README_teach.md").read_text()
exercise = SimpleNamespace(**runpy.run_path(str(ROOT / ".assets/exercises/exercise.py")))
grade = lambda name: runpy.run_path(str(ROOT / ".assets/exercises/graders.py"))["grade_" + name]()

@pytest.mark.parametrize("name", exercise.BLANKS, ids="exercise_{}".format)
def test_fill_in(name):
    grade(name)

@pytest.mark.parametrize("kind", ["bug", "experiment"], ids="exercise_{}".format)
def test_answer(kind):
    puzzle, _, answer = os.environ.get("ANSWER", "").partition(" ")
    if not puzzle or puzzle.isdigit() != (kind == "bug"):
        pytest.skip('no answer to judge: ANSWER="6 eos" or ANSWER="beta a"')
    assert puzzle in exercise.puzzles(), f"{puzzle!r} is none of {', '.join(exercise.puzzles())}"
    right, hint = exercise.judge(puzzle, answer)
    assert right, f"{puzzle} is not {answer!r}. {hint}"

def test_the_exercises_grade(tmp_path, monkeypatch):
    for name, file in exercise.BLANKS.items():
        (tmp_path / file).write_text((ROOT / file).read_text())
        exercise.blank(name, tmp_path)
        emptied = runpy.run_path(str(tmp_path / file))[name]
        assert emptied.__doc__ == getattr(sdar, name).__doc__
        for module in (sdar, envs):
            monkeypatch.setattr(module, name, emptied, raising=False)
        with pytest.raises(NotImplementedError, match=f"write {name} again"):
            grade(name)
    monkeypatch.setenv("ANSWER", "beta a")
    with pytest.raises(AssertionError, match="is not 'a'. .*gate_mean"):
        test_answer("experiment")
    bugs, packed = "eos observations shift skill detach temperature groups micro".split(), str(exercise.puzzles())
    for puzzle in exercise.puzzles():
        assert sum(exercise.judge(puzzle, name)[0] for name in (bugs if puzzle.isdigit() else "abc")) == 1
    assert not any(name in packed for name in bugs), "no solution may be read by accident"

def test_planted_bugs_show_in_the_metrics_of_step_1(tiny, tmp_path, monkeypatch):
    def step(module):
        monkeypatch.setattr(module, "load_policy", lambda config: (sdar.copy.deepcopy(tiny[0]), tiny[1]))
        config = module.Config(group_size=2, tasks_per_step=4, max_turns=5, minibatches=1, micro_tokens=300, temperature=2.0,
                               out=str(tmp_path))
        return {key: value and round(value, 5) for key, value in module.training_step(module.Run(config), 1)[1].items()}
    monkeypatch.setitem(sys.modules, "sdar", sdar)
    right = step(sdar)
    for number in range(1, 9):
        assert step(exercise.planted(str(number))) != right, f"bug {number} was not planted: sdar.py has changed under it"

def test_the_push_is_the_losses_gradient(policy):
    for changes in ({}, {"method": "opsd"}, {"gate": "entropy"}, {"gate": "constant"}):
        config = small(Path(), group_size=8, sdar_coef=.3, **changes)
        group, method = play(policy, config), sdar.METHODS[config.method]
        group[1].reward = 1.0
        of, batch = sdar.dissect(policy[0], group, config), sdar.step_batch(policy[0], None, group, config)
        student, mask = of["student"].clone().requires_grad_(), batch["mask"]
        entropy = sdar.response_logprobs(policy[0], group, config, with_entropy=True)[1].detach()
        loss = method.policy * sdar.policy_loss(student, batch["old"], batch["advantages"], mask)[0] + .3 * sdar.sdar_loss(
            student, of["teacher"], mask, config.gate, 5.0, entropy)[0]
        assert torch.allclose(-grad_of(loss, student) * mask.sum(), of["push"] * mask, atol=1e-5)

@pytest.fixture
def inspect(tiny, tmp_path, monkeypatch, capsys):
    """Flags -> (exit code, stdout, stderr, the page)."""
    monkeypatch.setattr(sdar, "load_policy", lambda config: tiny), monkeypatch.chdir(tmp_path)
    page = tmp_path / "inspect.html"
    return lambda flags: (sdar.main(["inspect", *flags.split()]), *capsys.readouterr(), page.exists() and page.read_text())

@pytest.mark.parametrize("columns", [40, 80])
def test_inspect(columns, inspect, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _, page = inspect("--seed 6 --episode 2")
    rows = [line for line in out.splitlines() if re.search("[▲▼]", line)]
    assert code == 0 and len(rows) == 18 and max(map(len, rows)) <= columns and "won +1.62" in out and "\033" not in out
    assert ("student   teacher" in out) == (columns == 80)
    tags = [element.tag for element in ElementTree.fromstring(page).iter()]
    assert (tags.count("i"), tags.count("b"), tags.count("mark")) == (len(rows), 25, 1)
    assert len(page) < 20_000 and re.search("--d:-[2-9]", page)
    assert not re.search(r"<script|https?:|url\(|@import|\{[a-z]+\}|src=", page)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False), monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\033[32m" in inspect("--seed 6 --episode 2")[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert inspect("--seed 6 --episode 2")[1] == out

def test_inspect_shows_hostile_text_as_text_and_refuses_what_it_cannot_show(inspect, tiny, monkeypatch):
    for flags, message in (("--method grpo", "--method grpo has none"), ("--episode 8", "--episode 8: there is none")):
        assert message in inspect(flags + " --max-turns 1")[2]
    with monkeypatch.context() as patch:
        patch.setattr(type(tiny[1].tokenizer), "decode", lambda *args, **options: "<script>\x1b[31m{task}\"'&")
        code, out, _, page = inspect("--max-turns 3")
        read = ElementTree.fromstring(page.replace("\x1b", ""))
        assert code == 0 and "\x1b" not in out and "<script" not in page and "".join(read.itertext()).count("<script>") > 9
    reset = envs.ToyEnv.reset
    monkeypatch.setattr(envs.ToyEnv, "reset", lambda self, *start: ("lorem ipsum dolor sit amet", reset(self, *start)[1]))
    code, _, error, _ = inspect("--max-turns 1")
    assert (code, error) == (2, "sdar.py: --model tiny cannot read --env toy: its tokenizer does not know most of the prompt\n")

def test_plot(tmp_path, monkeypatch, capsys):
    def run(name, success, steps=3, **changes):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(vars(sdar.Config(out=name, **changes))))
        lines = [json.dumps({"step": step, "success": success, "kl": step / 7, "gap_mean": None}) for step in range(1, steps + 1)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    run("a-s0", .25), run("a-s1", .75, 2, seed=1), run("b-s0", 1.0, lr=1.0), run("b-s1", 0.0, lr=2.0, seed=1), run("empty", 0, 0)
    assert sdar.main("plot a-s0 a-s1 b-s0 --picture p.png".split()) == 0
    out = capsys.readouterr().out
    assert "▅▅  1: 0.50  2: 0.50  a\n███  1: 1.00  2: 1.00  3: 1.00  b\n" in out
    assert "mean gap" not in out and "KL\n▁▄  1" in out
    assert Path("p.png").exists() == ("no picture" not in out)
    Path("torn").mkdir(), Path("torn/metrics.jsonl").write_text("{")
    for runs, message in (("", "takes folders"), ("empty", "finished a step"), ("torn", "torn holds no"), (".", ". holds no")):
        assert sdar.main(["plot", *runs.split()]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1

NOT_RUN = {"pytest test_sdar.py": "it is this suite", "git checkout": "undoes blank", "exercise.py blank": "done on copies",
           "sdar.py compare": "minutes; its flags are parsed, the rest is test_compare_for_real", "RUN": "a form, not a command"}

def test_the_readmes_commands(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path), monkeypatch.setitem(sys.modules, "sdar", sdar)
    short = "--tasks-per-step 2 --group-size 2 --eval-episodes 6 --eval-every 0 --max-turns 3 --steps 1".split()
    lines = re.findall(r"^(\w.*?)(?:  +#.*)?$", "\n".join(re.findall("```bash\n(.*?)```", README, re.DOTALL)), re.MULTILINE)
    commands = list(dict.fromkeys(re.findall(r"`(python [^`]*)`", README) + lines))
    assert len(commands) > 20 and commands[0] == "python sdar.py"
    for command in commands:
        script, *words = shlex.split(command)[1:]
        if "compare" in words:
            assert sdar.parse_args(words)
        elif not any(form in command for form in NOT_RUN):
            main = sdar.main if script == "sdar.py" else lambda argv: exercise.main(*argv)
            words += short * (words == [] or "--steps" in words) + ["gate.svg"] * ("gradient" in words)
            assert main(words) in (0, None), command

def test_the_readmes_library_example():
    code, = re.findall("```python\n(.*?)```", README, re.DOTALL)
    table, ids, response = torch.randn(9, 9, requires_grad=True), torch.randint(9, (2, 8)), torch.randint(9, (2, 5))
    names = {"model": lambda ids: SimpleNamespace(logits=table[ids]), "response": response, "mask": torch.ones(2, 5),
             "student_ids": torch.cat([ids[:, :3], response], 1), "teacher_ids": torch.cat([ids, response], 1),
             "grpo_loss": lambda logprobs, ids, mask: (logprobs * mask).sum()}
    exec(code, names)
    names["loss"].backward()
    expected = torch.log_softmax(table[names["student_ids"][:, 2:-1]], -1).gather(-1, response[..., None])[..., 0]
    assert torch.allclose(names["student"], expected) and table.grad.abs().sum() > 0 and not names["teacher"].requires_grad

def test_the_table_of_contents_leads_to_the_method():
    sections = dict(re.findall(r"^# --- (\d+)\. .*?-\n(.*?)(?=^# ---|^# ====|\Z)", (ROOT / "sdar.py").read_text(), re.M | re.S))
    assert [*sections] == [str(n) for n in range(1, len(sections) + 1)]
    contents = re.findall(r"(\d) [^,(]+? \(([^)]*)\)", " ".join(sdar.__doc__.partition("Sections:")[2].split()))
    places = {name.split(".")[-1]: section for section, names in contents for name in names.split(", ")}
    assert {"gate", "view", "group_advantages", "response_mask"} <= {*places}
    assert all(re.search(rf"(def|class) {name}\b", sections[section]) for name, section in places.items()), places
