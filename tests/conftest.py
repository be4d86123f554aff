"""Shared by all tests: the command line in a subprocess, rows read back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

from ldft import results


@dataclass(slots=True)
class Done:
    """A finished `python -m ldft`."""

    exit_code: int
    stdout: str
    stderr: str
    results_dir: Path

    @property
    def rows(self) -> pd.DataFrame:
        return results.read(self.results_dir)

    @property
    def row(self) -> pd.Series:
        rows = self.rows
        assert len(rows) == 1, f"{len(rows)} rows\n{self.stdout}\n{self.stderr}"
        return rows.iloc[0]


# Small enough for a second of training on two cores.
FAST = ("model=nano", "seq_len.tokens=64", "train.iterations=3", "train.warmup_iterations=1")


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a small run with results under tmp_path."""

    def build(*overrides: str, base: tuple[str, ...] = FAST) -> list[str]:
        return [sys.executable, "-m", "ldft", *base, f"results.dir={tmp_path / 'results'}", *overrides]

    return build


@pytest.fixture
def ldft(tmp_path: Path, command: Callable[..., list[str]]) -> Callable[..., Done]:
    """Run a small `python -m ldft` to its end."""

    def run(
        *overrides: str, base: tuple[str, ...] = FAST, env: dict[str, str] | None = None, timeout_s: float = 300
    ) -> Done:
        done = subprocess.run(
            command(*overrides, base=base),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd=tmp_path,
            env=os.environ | (env or {}),
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr, tmp_path / "results")

    return run
