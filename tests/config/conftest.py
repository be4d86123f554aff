"""The command line in this process: quick, and its parts can be replaced."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ldft.cli import command
from tests.conftest import Done

CLI = Callable[..., Done]


@pytest.fixture
def ldft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> CLI:
    """`python -m ldft` in this process: what it refuses starts no rank, so that only the parent's time is paid."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    def run(*overrides: str) -> Done:
        folder = tmp_path / "results"
        arguments = [item for item in overrides]
        if not any(item.startswith("results.dir=") for item in arguments):
            arguments.append(f"results.dir={folder}")
        monkeypatch.setattr(sys, "argv", ["ldft", *arguments])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        capfd.readouterr()
        code = command.main()
        out, err = capfd.readouterr()
        return Done(code, out, err, folder)

    return run
