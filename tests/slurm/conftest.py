"""The cluster that all these tests use."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import cluster


@pytest.fixture(scope="session")
def slurm() -> Iterator[dict[str, str]]:
    """The environment in which SLURM's commands use it."""
    folder = Path(tempfile.mkdtemp(prefix="ldft-slurm-"))
    folder.chmod(0o755)  # munge's daemon is another user
    with cluster(folder) as env:
        yield env
    shutil.rmtree(folder, ignore_errors=True)
