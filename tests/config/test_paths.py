"""Paths that the system refuses to look at, wherever a config names one: one line with the key, not pathlib's error."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ldft.cli import command
from ldft.errors import ConfigError
from ldft.files import named
from ldft.training import model_option

KEYS = {
    "data.path": "data=text data.tokenizer=x data.path=",
    "data.tokenizer": "data=text data.path=text.txt data.tokenizer=",
    "model.path": "model.weights=pretrained model.path=",
    "offload.deepspeed_file": "offload.deepspeed_file=",
    "offload.nvme_path": "offload=nvme offload.nvme_path=",
    "results.dir": "results.dir=",
}
WRONG = {
    "x" * 300 + ".txt": "cannot look at '{}' (File name too long); name a path that you can read",
    '"~nobody_here/x.txt"': "'~nobody_here/x.txt': there is no such home folder; name the folder in full",
}


@pytest.mark.parametrize("wrong", WRONG, ids=["long", "home"])
@pytest.mark.parametrize("key", KEYS)
def test_a_path_that_cannot_be_looked_at_is_one_line(key: str, wrong: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a b c")
    line = f"model=nano launch.device=cpu {KEYS[key]}{wrong} dry_run=true"
    monkeypatch.setattr(sys, "argv", ["ldft", *line.split(" ")])
    assert command.main() == 2
    assert capsys.readouterr().err == f"ldft: {key}: {WRONG[wrong].format(wrong)}\n"


def test_a_model_is_looked_for_without_an_internal_error(monkeypatch, capsys) -> None:
    for wrong in ("x" * 300, "~nobody_here/x"):
        monkeypatch.setattr(sys, "argv", ["ldft.model", wrong])
        assert model_option.main() == 2
        said = capsys.readouterr().err
        assert said.startswith("ldft: model.path: ") and said.count("\n") == 1


def test_a_missing_file_and_a_nul(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    for there in ("nothing", "loop", "file", "file/below"):
        assert named(f"{tmp_path}/{there}", "data.path") == tmp_path / there
    with pytest.raises(ConfigError, match=r"^data.path: 'a\\x00b' holds a NUL, which no name can; correct it$"):
        named("a\0b", "data.path")
