"""Too few CPU cores are said before the ranks start, with what the update will take."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ldft import results
from ldft.preflight.resolved import resolve
from ldft.runner import cpu_limits
from ldft.runner.cpu_limits import Cpus
from tests.conftest import compose
from tests.memory.conftest import write

LARGE = ("model=llama3_8b", "launch.device=cuda")


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/", {"cgroup.controllers": "cpu memory"}, None),
        ("0::/job", {"cgroup.controllers": "cpu", "job/cpu.max": "max 100000"}, None),
        ("0::/job", {"cgroup.controllers": "cpu", "job/cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b", {"cgroup.controllers": "cpu", "a/cpu.max": "200000 100000", "a/b/cpu.max": "400000 100000"}, 2.0),
        # A container sees its own folder as the root, and the host's path in its own cgroup file.
        ("0::/system/docker-1", {"cgroup.controllers": "cpu", "cpu.max": "50000 100000"}, 0.5),
        ("4:cpu,cpuacct:/job", {"cpu,cpuacct/job/cpu.cfs_quota_us": "300000", "cpu,cpuacct/job/cpu.cfs_period_us": "100000"}, 3.0),
        ("4:cpu,cpuacct:/job", {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}, None),
        ("2:memory:/job", {}, None),
    ],
)  # fmt: skip
def test_the_tightest_quota_counts(own: str, files: dict[str, str], expected: float | None, tmp_path: Path) -> None:
    write(tmp_path / "cgroup", files)
    write(tmp_path / "proc", {"self/cgroup": own})
    assert cpu_limits.quota(tmp_path / "proc", tmp_path / "cgroup") == expected


def test_this_machine() -> None:
    have = cpu_limits.cpus()
    assert 1 <= have.cores <= len(os.sched_getaffinity(0)) and have.cores <= have.machine <= (os.cpu_count() or 1)
    assert 0 < have.usable <= have.cores


@pytest.mark.parametrize(
    ("ranks", "have", "limit"),
    [
        (1, Cpus(64, None, 64), None),
        (8, Cpus(64, None, 64), None),
        (1, Cpus(33, None, 64), None),
        (8, Cpus(2, None, 64), "its CPU affinity"),
        (1, Cpus(1, None, 64), "its CPU affinity"),
        (1, Cpus(64, 2.0, 64), "CPU quota"),
        (4, Cpus(2, None, 2), ""),
    ],
)
def test_where_cores_are_too_few(ranks: int, have: Cpus, limit: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_limits, "_core_bytes_per_s", lambda: 8e9)
    said = cpu_limits.warnings(resolve(compose(*LARGE, f"launch.num_ranks={ranks}")), have)
    if limit is None:
        assert said == []
        return
    (line,) = said
    assert limit in line and re.search(rf" {have.usable:g} CPU core{'s' * (have.usable != 1)}\b", line)
    # 28 bytes a parameter, the 16-bit gradients and weights among them.
    expected = 28 * 8_030_261_248 / (have.usable * 8e9)
    seconds = re.search(r"take ([\d.e+]+) s an iteration", line)
    assert seconds and float(seconds[1]) == pytest.approx(expected, rel=0.06)


def test_nothing_to_say_where_the_device_updates_or_the_update_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_limits, "_core_bytes_per_s", lambda: 8e9)
    few = Cpus(1, None, 64)
    assert cpu_limits.warnings(resolve(compose(*LARGE, "offload=none")), few) == []
    assert cpu_limits.warnings(resolve(compose("model=nano", "launch.device=cpu")), few) == []


def test_the_speed_of_a_core_is_measured() -> None:
    assert 1e8 < cpu_limits._core_bytes_per_s(1 << 20) < 1e11


def test_threads_do_not_outnumber_what_a_quota_lets_run() -> None:
    cores = list(range(32))
    assert cpu_limits.threads(cores, 2, None) == 32
    assert [cpu_limits.threads(cores, 2, quota) for quota in (0.5, 2.0, 7.9, 1000.0)] == [1, 1, 3, 32]


def test_a_run_on_too_few_cores_says_so_first_and_in_its_row(command: Callable[..., list[str]], tmp_path: Path) -> None:
    words = [
        "taskset",
        "-c",
        str(min(os.sched_getaffinity(0))),
        *command("launch.num_ranks=2", "launch.device=cpu", "launch.timeout_s=1"),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=tmp_path, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    (row,) = results.read(tmp_path / "results").to_dict("records")
    assert row["status"] == "timeout", "what comes after the start of the ranks is not waited for"
    (note,) = (note for note in row["notes"] if "CPU core" in note)
    assert note.startswith("2 ranks share 1 CPU core") and "the update is expected to take" in note
    assert f"ldft: warning: {note}\n" in done.stdout
    assert done.stdout.index(note) < done.stdout.index("starting Python")
