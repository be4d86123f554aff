"""A command composes its config once, and a mode that a file or an override sets is still taken."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hydra._internal.hydra import Hydra

from ldft.cli import run_mode
from ldft.environment import CONF_DIR
from tests.config.conftest import CLI

KNOWN = {"hydra", "main", "ldft", "schema"}


@pytest.fixture
def compositions(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The overrides of each composition, but for the mode, which Hydra adds in the end."""
    seen: list[list[str]] = []
    compose = Hydra.compose_config

    def counted(self, *of, **named):
        seen.append([override for override in named["overrides"] if not override.startswith("hydra.mode=")])
        return compose(self, *of, **named)

    monkeypatch.setattr(Hydra, "compose_config", counted)
    return seen


@pytest.mark.parametrize("typed", ["model=nano", "-m model=nano,tiny"])
def test_a_command_composes_its_config_once_and_each_cell(ldft: CLI, compositions: list[list[str]], typed: str) -> None:
    assert ldft(*typed.split(), "dry_run=true").exit_code == 0
    assert len(compositions) == len({tuple(overrides) for overrides in compositions}), compositions


@pytest.mark.parametrize(
    ("typed", "cells"),
    [("+sweep=smoke", 12), ("hydra.mode=MULTIRUN seq_len=1k,2k", 2), ("--config-dir=$MINE +mine=two", 2)],
)
def test_a_mode_that_is_set_makes_a_sweep_without_m(ldft: CLI, tmp_path: Path, typed: str, cells: int) -> None:
    (tmp_path / "conf" / "mine").mkdir(parents=True)
    (tmp_path / "conf" / "mine" / "two.yaml").write_text(
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params: {seq_len: '1k,2k'}\n"
    )
    done = ldft(*typed.replace("$MINE", str(tmp_path / "conf")).split(), "dry_run=true")
    assert done.exit_code == 0 and f"[{cells}/{cells}] " in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("local/default.yaml", "# @package _global_\nhydra: {mode: MULTIRUN}\n"),
        ("local/default.yaml", "# @package _global_\nhydra:\n  mode: 2\n"),
        ("local/default.yaml", "hydra:\n  searchpath: [file:///elsewhere]\n"),
        ("config.yaml", "defaults:\n  - schema\n  - sweep: smoke\n"),
        ("offload/mine.yaml", "defaults:\n  - /sweep@_global_: smoke\n"),
    ],
)
def test_files_that_can_set_it_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, text: str) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(CONF_DIR, conf)
    monkeypatch.setattr(run_mode, "CONF_DIR", conf)
    assert not run_mode.can_be_set(["model=nano"], KNOWN)
    (conf / file).parent.mkdir(exist_ok=True)
    (conf / file).write_text(text)
    assert run_mode.can_be_set(["model=nano"], KNOWN)


@pytest.mark.parametrize("override", ["hydra.mode=RUN", "+hydra.searchpath=[file:///x]", "+sweep=smoke"])
def test_overrides_that_can_set_it_are_seen(override: str) -> None:
    assert run_mode.can_be_set(["model=nano", override], KNOWN)
    assert run_mode.can_be_set(["model=nano"], {*KNOWN, "command-line"})


def test_a_file_behind_a_link_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "default.yaml").write_text("# @package _global_\nhydra:\n  mode: MULTIRUN\n")
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "local").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(run_mode, "CONF_DIR", tmp_path / "conf")
    assert run_mode.can_be_set(["model=nano"], KNOWN)
