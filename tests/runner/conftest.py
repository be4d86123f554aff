"""Commands on several hosts that a system other than SLURM numbers: here, twice on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

TWO = ("launch.num_ranks=2", "launch.num_hosts=2", "train.warmup_iterations=1", "results.dir=results")
ENDLESS = "train.iterations=100000"


def free_port() -> int:
    with closing(socket.create_server(("", 0))) as server:
        return int(server.getsockname()[1])


class Hosts:
    """Commands by number of their host."""

    def __init__(self, folder: Path, command: Callable[..., list[str]]) -> None:
        self.folder, self._command, self.port = folder, command, str(free_port())
        self.processes: list[subprocess.Popen[str]] = []

    def start(
        self, number: int, *overrides: str, folder: Path | None = None, **environment: str
    ) -> subprocess.Popen[str]:
        there = {"NODE_RANK": str(number), "NNODES": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": self.port}
        process = subprocess.Popen(
            self._command(*TWO, *overrides), cwd=folder or self.folder, env=os.environ | there | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def wait_for(self, file: str) -> None:
        end = time.monotonic() + 60
        while not list(self.folder.glob(file)):
            assert time.monotonic() < end, f"no {file}"
            time.sleep(0.1)

    def row(self) -> dict[str, Any]:
        (path,) = self.folder.glob("results/*/attempt-1/row.parquet")
        (row,) = pq.read_table(path).to_pylist()
        return row

    def ranks(self) -> list[psutil.Process]:
        """Rank 0's first, once both train."""
        end = time.monotonic() + 120
        while time.monotonic() < end:
            reports = [path.read_text() for path in self.folder.glob("results/*/attempt-1/rank-0.json")]
            if reports and '"iteration_s": [' in reports[0] and "," in reports[0].partition('"iteration_s": [')[2][:40]:
                found = [
                    one
                    for process in self.processes
                    for one in psutil.Process(process.pid).children(recursive=True)
                    if "ldft.worker" in one.cmdline()
                ]
                return sorted(found, key=lambda one: int(one.environ()["RANK"]))
            time.sleep(0.1)
        for process in self.processes:
            process.kill()
        raise AssertionError(f"it never trained: {[process.communicate()[0] for process in self.processes]}")


@pytest.fixture
def hosts(tmp_path: Path, command: Callable[..., list[str]]) -> Iterator[Hosts]:
    found = Hosts(tmp_path, command)
    yield found
    left = [one for process in found.processes if process.poll() is None for one in [psutil.Process(process.pid)]]
    for one in [child for parent in left for child in parent.children(recursive=True)] + left:
        one.kill()
    assert not left, "a command did not end"
