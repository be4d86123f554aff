"""Every way to fail, provoked from outside: a row that says so, no orphan, no half-written file."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from ldft import results
from ldft.runner import final_status
from ldft.training.deepspeed import update_overlap
from tests.conftest import long

# More iterations than any test waits for.
ENDLESS = ("train.iterations=100000", "train.warmup_iterations=1")


class Running:
    """A `python -m ldft` that is at work, and its processes."""

    def __init__(self, command: list[str], folder: Path, **options: Any) -> None:
        self.results_dir = folder / "results"
        self.process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
        )
        self.family: list[psutil.Process] = []

    def report(self, rank: int = 0) -> dict:
        files = list(self.results_dir.glob(f"*/attempt-1/rank-{rank}.json"))
        return json.loads(files[0].read_text()) if files else {}

    def wait_for(self, iterations: int, timeout_s: float = 240) -> None:
        """Until rank 0 has that many iterations; remembers every process of the run."""
        deadline = time.monotonic() + timeout_s
        while len(self.report().get("iteration_s", [])) < iterations:
            assert self.process.poll() is None and time.monotonic() < deadline, self.process.communicate()[0]
            time.sleep(0.05)
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def ranks(self) -> list[psutil.Process]:
        ranks = []
        for process in self.family:
            # A probe that was alive then may be gone or a zombie by now, without a command line.
            with suppress(psutil.NoSuchProcess):
                # What a rank starts has the rank's command line until it has one of its own.
                if "ldft.worker" in process.cmdline() and process.ppid() == self.process.pid:
                    ranks.append(process)
        return ranks

    def stop_during_an_update(self, rank: int, timeout_s: float = 60) -> psutil.Process:
        """Stop a rank (SIGSTOP) at a moment at which threads of the overlapped update have work left."""
        victim = next(p for p in self.ranks() if p.environ()["RANK"] == str(rank))
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            victim.send_signal(signal.SIGSTOP)
            while not all(state in "Tt" for state, _ in tasks_of(victim.pid)):
                time.sleep(0.001)
            # They run at this nice value, and end with their work.
            if any(nice == update_overlap.NICE for _, nice in tasks_of(victim.pid)):
                return victim
            victim.send_signal(signal.SIGCONT)
            time.sleep(random.uniform(0.001, 0.02))
        raise AssertionError("never saw an update in progress")

    def end(self) -> tuple[int, str]:
        out = self.process.communicate(timeout=60)[0]
        return self.process.returncode, out

    def assert_nothing_left(self, within_s: float = 10) -> None:
        _gone, alive = psutil.wait_procs(self.family, timeout=within_s)
        assert not alive, f"orphans: {[p.cmdline() for p in alive]}"
        for path in self.results_dir.rglob("*"):
            assert not path.name.endswith(".tmp"), path
            if path.suffix == ".json":
                json.loads(path.read_text())
            if path.suffix == ".parquet":
                pq.read_table(path)


def tasks_of(pid: int) -> list[tuple[str, int]]:
    """State and nice value of each thread of a process."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        fields = path.read_text().rpartition(")")[2].split()
        found.append((fields[0], int(fields[16])))
    return found


@pytest.fixture
def start(tmp_path: Path, command: Callable[..., list[str]]) -> Iterator[Callable[..., Running]]:
    runs = []

    def begin(*overrides: str, **options: Any) -> Running:
        runs.append(Running(command(*overrides), tmp_path, **options))
        return runs[-1]

    yield begin
    for run in runs:
        run.process.kill()


def only_row(folder: Path):
    rows = results.read(folder)
    assert len(rows) == 1
    return rows.iloc[0]


def trace_of(folder: Path, row) -> list[dict[str, Any]]:
    """The samples that a run has left."""
    samples = pq.read_table(folder / row.trace_path).to_pylist()
    assert samples and all(sample["nodes"] for sample in samples)
    return samples


@pytest.mark.parametrize(
    ("number", "status"),
    [
        pytest.param(signal.SIGKILL, "error", marks=long),
        pytest.param(signal.SIGSEGV, "error", marks=long),
        (signal.SIGTERM, "interrupted"),
    ],
)
def test_a_signal_to_one_of_two_ranks_ends_the_run_with_a_row(start, number, status) -> None:
    run = start(*ENDLESS, "launch.num_ranks=2", "monitor.interval_s=0.1")
    run.wait_for(iterations=6)
    victim = next(p for p in run.ranks() if p.environ()["RANK"] == "1")
    victim.send_signal(number)
    exit_code, out = run.end()
    row = only_row(run.results_dir)
    assert (row.status, row.signal) == (status, number.name), out
    assert exit_code == {"error": 1, "interrupted": 130}[status]
    assert row.log_path.endswith("worker-1.log") and "rank 1" in row.error_message
    # What was reached before is kept.
    assert len(row.iteration_s) >= 6 and row.init_s > 0 and row.init_engine_s > 0
    samples = trace_of(run.results_dir, row)
    assert samples[-1]["phase"] == "train" and {entry["rank"] for s in samples for entry in s["memory"]} == {0, 1}
    assert "Traceback" not in out
    run.assert_nothing_left()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=long)])
def test_a_signal_to_ldft_ends_its_ranks_and_leaves_a_row(start, number) -> None:
    run = start(*ENDLESS)
    run.wait_for(iterations=2)
    run.process.send_signal(number)
    exit_code, out = run.end()
    row = only_row(run.results_dir)
    assert (row.status, row.signal, exit_code) == ("interrupted", number.name, 130), out
    assert len(row.iteration_s) >= 2 and trace_of(run.results_dir, row)[-1]["phase"] == "train"
    assert "Traceback" not in out
    run.assert_nothing_left()


# An update that takes a good part of the iteration, beside the forward pass of the next one.
UPDATING = (*ENDLESS, "seq_len.tokens=8", "model.vocab_size=60000", "optimizer.overlap_step=true")


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=long)])
def test_killing_a_rank_during_an_update_ends_the_run_with_a_row(start, ranks: int) -> None:
    run = start(*UPDATING, f"launch.num_ranks={ranks}", "monitor.interval_s=0.1")
    run.wait_for(iterations=2)
    victim = run.stop_during_an_update(rank=ranks - 1)
    # As if it had been killed while it wrote its report.
    (next(run.results_dir.glob("*/attempt-1")) / ".rank-0.json.somewhere-1.tmp").write_text('{"iteration_s": [')
    victim.kill()
    exit_code, out = run.end()
    row = only_row(run.results_dir)
    assert (row.status, row.signal, exit_code) == ("error", "SIGKILL", 1), out
    assert row.overlap_step and len(row.update_s) >= 2 and f"rank {ranks - 1} died" in row.error_message
    assert trace_of(run.results_dir, row)[-1]["phase"] == "train"
    run.assert_nothing_left()


def test_ctrl_c_during_an_update_leaves_no_process_and_a_row(start) -> None:
    run = start(*UPDATING)
    run.wait_for(iterations=2)
    rank = run.stop_during_an_update(rank=0)
    run.process.send_signal(signal.SIGINT)
    rank.send_signal(signal.SIGCONT)
    exit_code, out = run.end()
    row = only_row(run.results_dir)
    assert (row.status, row.signal, exit_code) == ("interrupted", "SIGINT", 130), out
    assert row.overlap_step and len(row.update_s) >= 2 and "Traceback" not in out
    run.assert_nothing_left()


@long
def test_an_exception_during_an_update_ends_the_rank_and_leaves_a_row(start) -> None:
    """Python tears down an engine whose update is in progress: neither a crash nor a thread that nobody ends."""
    run = start(*UPDATING)
    run.wait_for(iterations=2)
    rank = run.stop_during_an_update(rank=0)
    rank.send_signal(signal.SIGINT)  # a KeyboardInterrupt, wherever the rank is
    rank.send_signal(signal.SIGCONT)
    exit_code, out = run.end()
    row = only_row(run.results_dir)
    assert (row.status, row.error_type, row.exit_code, exit_code) == ("error", "KeyboardInterrupt", 1, 1), out
    assert row.overlap_step and len(row.update_s) >= 2
    run.assert_nothing_left()


def test_killing_ldft_leaves_no_orphan_and_nothing_half_written(start) -> None:
    run = start(*ENDLESS, "launch.num_ranks=2")
    run.wait_for(iterations=2)
    first, _ = run.ranks()
    rendezvous = Path(first.environ()["LDFT_RENDEZVOUS_DIR"])
    run.process.kill()
    run.process.wait()
    run.assert_nothing_left()
    assert results.read(run.results_dir).empty and not list(run.results_dir.rglob("*trace*"))
    assert not rendezvous.exists()


def test_a_timeout_is_a_row_with_what_was_reached(start) -> None:
    run = start(*ENDLESS, "launch.timeout_s=20")
    run.wait_for(iterations=2)
    run.ranks()[0].suspend()  # it has done enough, and hangs from now on
    exit_code, out = run.end()
    row = only_row(run.results_dir)
    assert (exit_code, row.status) == (1, "timeout"), out
    assert row.error_message.startswith("launch.timeout_s=20 exceeded; raise it")
    assert len(row.iteration_s) > 0 and trace_of(run.results_dir, row)[-1]["iteration"] > 0
    run.assert_nothing_left()


def test_an_exception_in_a_rank_is_an_error_with_its_type_and_log(ldft, tmp_path) -> None:
    (tmp_path / "operators" / ".ldft.lock").mkdir(parents=True)  # a folder where a file should be
    done = ldft("optimizer.fused_step=false", env={"TORCH_EXTENSIONS_DIR": str(tmp_path / "operators")})
    row = done.row
    assert (done.exit_code, row.status, row.exit_code) == (1, "error", 1)
    assert row.error_type == "IsADirectoryError" and trace_of(done.results_dir, row)
    assert "Traceback" in (done.results_dir / row.log_path).read_text()
    assert "Traceback" not in done.stdout + done.stderr


def memory_group() -> Path | None:
    """A new memory cgroup below our own, v1 or v2, where we may make one."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            root = Path(f"/sys/fs/cgroup/memory{path}")
        elif hierarchy == "0" and Path("/sys/fs/cgroup/cgroup.controllers").exists():
            root = Path(f"/sys/fs/cgroup{path}")
        else:
            continue
        group = root / f"ldft-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            return None
        if (group / "memory.limit_in_bytes").exists() or (group / "memory.max").exists():
            return group
        group.rmdir()
    return None


@pytest.mark.parametrize("hidden", [("/proc/vmstat",), ("/proc/self/cgroup",), ("/proc/vmstat", "/proc/self/cgroup")])
def test_a_container_that_hides_the_kernels_counts_has_none(monkeypatch, hidden) -> None:
    read, is_file = Path.read_text, Path.is_file

    def only_some(self: Path, *arguments: Any, **options: Any) -> str:
        if str(self) in hidden:
            raise FileNotFoundError(2, "No such file or directory", str(self))
        return read(self, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", only_some)
    monkeypatch.setattr(Path, "is_file", lambda self: "/sys/fs/cgroup" not in str(self) and is_file(self))
    assert final_status.oom_kills() >= 0
    assert "/proc/vmstat" not in hidden or final_status.oom_kills() == 0


def test_the_kernel_killing_a_rank_for_memory_is_oom_host(start) -> None:
    group = memory_group()
    if group is None:
        pytest.skip("needs a memory cgroup that this user may make (run as root, outside a locked-down container)")
    limit = next(p for p in (group / "memory.limit_in_bytes", group / "memory.max") if p.exists())
    limit.write_text(str(350 << 20))  # Python and torch alone take more
    try:
        run = start("force=true", preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())))
        exit_code, out = run.end()
        row = only_row(run.results_dir)
        assert (exit_code, row.status, row.signal) == (1, "oom_host", "SIGKILL"), out
        assert re.search("host memory", row.error_message)
    finally:
        group.rmdir()
