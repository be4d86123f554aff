"""Processes and files that look like a run's but are not: any user can have them, and the monitor goes on for everybody."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.monitor.test_monitor import monitor

CONFIG = {
    "model": {"name": "nano"},
    "seq_len": {"tokens": 64},
    "numa": {"name": "default"},
    "train": {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "iterations": 5},
    "launch": {"num_ranks": 1},
}
CONTENTS: dict[str, bytes] = {
    "a list": b"[]",
    "cut": b'{"model": ',
    "not UTF-8": b"\xff\xfe",
    "empty": b"",
    "nested": b"[" * 100_000,
    "of other types": json.dumps(CONFIG | {"launch": {"num_ranks": "1"}}).encode(),
    "without keys": b"{}",
    "of a billion ranks": json.dumps(CONFIG | {"launch": {"num_ranks": 10**9}}).encode(),
    "of infinite length": json.dumps(CONFIG).replace("64", "Infinity").encode(),
}
REPORTS: dict[str, object] = {
    "times are zero": {"iteration_s": [0, 0]},
    "times are text": {"iteration_s": "soon"},
    "a list": [],
    "roles are a list": {"role_memory": []},
    "nodes are words": {"role_memory": {"momentum": {"bytes": 1, "nodes": {"first": 1}}}},
    "the GPU is a number": {"gpu_uuid": 7},
    "the phase is a list": {"phase": ["train"], "iteration_s": [1.0]},
}


@pytest.fixture
def looks_like_a_rank(tmp_path: Path) -> Iterator[Callable[[str], int]]:
    """Start a process whose command line is that of a rank, with this attempt; returns its pid."""
    (tmp_path / "ldft.worker").write_text("read _\n")
    started = []

    def begin(attempt: str, module: str = "ldft.worker") -> int:
        # For sh, `-m` is an option of its own, and what follows is a script.
        process = subprocess.Popen(
            ["X", "-m", module, attempt], executable="/bin/sh", cwd=tmp_path, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=os.environ | {"RANK": "0"},
        )  # fmt: skip
        started.append(process)
        return process.pid

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_a_config_that_ldft_would_not_write_is_not_readable(looks_like_a_rank, tmp_path: Path) -> None:
    pids = {}
    for name, content in CONTENTS.items():
        folder = tmp_path / name / "run" / "attempt-1"
        folder.mkdir(parents=True)
        (folder / "config.json").write_bytes(content)
        pids[name] = looks_like_a_rank(str(folder))
    for name in ("a folder", "a pipe", "a link to itself"):
        folder = tmp_path / name / "run" / "attempt-1"
        folder.mkdir(parents=True)
        pids[name] = looks_like_a_rank(str(folder))
    (tmp_path / "a folder" / "run" / "attempt-1" / "config.json").mkdir()
    os.mkfifo(tmp_path / "a pipe" / "run" / "attempt-1" / "config.json")
    (tmp_path / "a link to itself" / "run" / "attempt-1" / "config.json").symlink_to("config.json")
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    pids["inside a file"] = looks_like_a_rank(str(tmp_path / "file" / "x" / "attempt-1"))
    pids["a file"] = looks_like_a_rank(str(tmp_path / "file"))
    pids["inside a loop"] = looks_like_a_rank(str(tmp_path / "loop" / "x" / "attempt-1"))
    done = monitor("--once", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = {rank["pid"]: run for run in json.loads(done.stdout)["runs"] for rank in run["ranks"]}
    assert {name: found[pid]["title"] for name, pid in pids.items()} == dict.fromkeys(pids, "")
    done = monitor("--once")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.count("config not readable\n  phase not readable") >= len(pids)
    for name in ("a list", "loop"):
        done = monitor("--once", "--results", str(tmp_path / name)) if name != "loop" else done
        assert done.returncode == 0 and done.stderr == "" and "config not readable" in done.stdout


def test_a_report_that_ldft_would_not_write_leaves_the_run_at_its_start(looks_like_a_rank, tmp_path: Path) -> None:
    folders = []
    for name, report in REPORTS.items():
        folders.append(tmp_path / name / "run" / "attempt-1")
        folders[-1].mkdir(parents=True)
        (folders[-1] / "config.json").write_text(json.dumps(CONFIG))
        (folders[-1] / "rank-0.json").write_text(json.dumps(report))
        looks_like_a_rank(str(folders[-1]))
    done = monitor("--once", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = {run["folder"]: run for run in json.loads(done.stdout)["runs"]}
    for folder in folders:
        run = found[str(folder)]
        assert (run["title"], run["phase"], run["phase_text"]) == ("nano, 64 tokens, numa=default", "start", "")


def test_what_is_no_attempt_of_ldfts_is_no_run(looks_like_a_rank, tmp_path: Path) -> None:
    pids = {looks_like_a_rank(attempt) for attempt in ("x", "", "/", "/x", "a/b/attempt-1")}
    for words in (["--once", "--json"], ["--once", "--json", "--results", str(tmp_path)]):
        done = monitor(*words)
        assert (done.returncode, done.stderr) == (0, "")
        assert not pids & {rank["pid"] for run in json.loads(done.stdout)["runs"] for rank in run["ranks"]}


def test_a_command_line_is_text_and_nothing_more(looks_like_a_rank, tmp_path: Path) -> None:
    (tmp_path / "ldft").write_text("read _\n")
    pid = looks_like_a_rank("\x1b[31mred\nrun 0123456789ab/attempt-1\x07", module="ldft")
    done = monitor("--once")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"pid {pid} of ")]
    assert line.endswith("ldft ?[31mred?run 0123456789ab/attempt-1?") and "\x1b" not in done.stdout
