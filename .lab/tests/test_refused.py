"""Every script refuses what it cannot use: one line on stderr, exit code 2, nothing written."""

import shutil

from conftest import DATA, refused
from pytest import importorskip, mark


@mark.filterwarnings("ignore")  # what TRL uses of the deprecated
@mark.parametrize("line", (DATA / "refused.txt").read_text().splitlines())
def test_bad_input_is_one_line_and_exit_code_2(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(shutil.copytree(DATA / "folders", tmp_path, dirs_exist_ok=True))
    command, message = line.replace("DATA", str(DATA)).split(" => ")
    if command.startswith("trainer"):
        importorskip("trl", minversion="1")  # a version, since our folder has the same name
    before = {*tmp_path.rglob("*")}
    assert message in refused(capsys, *command.split())
    assert {*tmp_path.rglob("*")} <= before | {tmp_path / "new"}
