"""`| head`: when nobody reads the output any more, a run still writes its row, and no command ends with a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ldft import closed_pipe, results
from ldft.bench import command as bench
from ldft.cli import command as ldft_command
from ldft.config import run_id
from ldft.monitor import live
from ldft.results import __main__ as results_command
from ldft.sweep import plan, status
from multirun_analysis import __main__ as analysis
from tests.synthetic import config, leave


@contextmanager
def unread() -> Iterator[None]:
    """Standard output is a pipe without a reader, for half a minute at most: some commands would never end."""
    reader, writer = os.pipe()
    os.close(reader)
    before = sys.stdout
    signal.alarm(30)
    try:
        with os.fdopen(writer, "w") as sys.stdout:
            yield
    finally:
        sys.stdout = before
        signal.alarm(0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    of = config()
    leave(tmp_path, of, tokens_per_s=5.0, error_message="x" * 100_000)  # more than a buffer of output
    cell = plan.Cell(run_id(of), "tiny", "tiny", 1024, 1, 1024, [])
    plan.Plan("sweep", 0.0, "here", [cell]).save(tmp_path)
    return tmp_path


def test_a_run_goes_on_and_writes_its_row(command: Callable[..., list[str]], tmp_path: Path) -> None:
    with subprocess.Popen(command(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as run:
        assert run.stdout is not None and run.stderr is not None
        assert run.stdout.readline()  # the first line comes before the ranks start
        run.stdout.close()
        said = run.stderr.read()
    assert run.returncode == closed_pipe.EXIT_CODE and said == ""
    assert results.read(tmp_path / "results")["status"].tolist() == ["ok"]
    assert not list(tmp_path.glob("*.log"))


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (results_command.main, ["export", "--csv", "FOLDER"]),
        (results_command.main, ["compact", "FOLDER"]),
        (results_command.main, ["--help"]),
        (status.main, ["FOLDER"]),
        (status.main, ["FOLDER", "--watch"]),
        (live.main, ["--once"]),
        (live.main, ["--json", "--interval", "0.1"]),
        (analysis.main, ["FOLDER", "--no-figures"]),
        (ldft_command.main, ["dry_run=true"]),
        (bench.main, ["nodes", "--sizes", "1M", "--repeats", "1", "--kernels", "read", "--processes", "1"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_no_command_complains(folder: Path, monkeypatch, main: Callable[[], int], arguments: list[str]) -> None:
    words = [word.replace("FOLDER", str(folder)) for word in arguments]
    monkeypatch.setattr(sys, "argv", ["command", *words])
    monkeypatch.chdir(folder)
    with unread():
        code = main()
        sys.stdout.flush()  # as the interpreter does at its end
    assert code == closed_pipe.EXIT_CODE
    assert not list(folder.glob("*.log"))


@pytest.mark.parametrize(
    "words",
    [
        ["ldft.monitor", "--once"],
        ["ldft.status", "FOLDER"],
        ["ldft.results", "compact", "FOLDER"],
        ["ldft", "dry_run=true"],
    ],
)
def test_output_that_nothing_takes_is_one_line_and_ascii_is_enough(folder: Path, words: list[str]) -> None:
    command = f"{sys.executable} -m {' '.join(words)}".replace("FOLDER", str(folder))

    def run(redirection: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", "-c", command + redirection],
            cwd=folder,
            env=os.environ | environment,
            text=True,
            capture_output=True,
            check=False,
        )

    full = run(" > /dev/full")
    reason = "cannot write to standard output (No space left on device); write to another file or terminal"
    assert (full.returncode, full.stderr) == (1, f"ldft: {reason}\n")
    closed = run(" >&-")
    assert (closed.returncode, closed.stderr) == (0, "")
    plain = run("", PYTHONIOENCODING="ascii")
    assert (plain.returncode, plain.stderr) == (0, "") and plain.stdout.isascii() and plain.stdout


def test_a_run_whose_output_a_full_disk_takes_writes_its_row(command: Callable[..., list[str]], tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command(), stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1 and done.stderr.startswith("ldft: cannot write to standard output")
    assert results.read(tmp_path / "results")["status"].tolist() == ["ok"]


def test_with_a_reader_nothing_changes(capsys) -> None:
    @closed_pipe.work_on
    def works() -> int:
        print("text")
        return 3

    assert works() == 3 and closed_pipe.stop(works)() == 3
    assert capsys.readouterr().out == "text\ntext\n"
