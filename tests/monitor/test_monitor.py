"""`python -m ldft.monitor` beside real runs: what it says is what rows and other tools say, in any terminal, for any user."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import FAST
from tests.monitor.test_sampler import HOLDS, numastat, start
from tests.runner.test_failures import ENDLESS, Running

_ = start  # a fixture
NOBODY = 65534


def monitor(*words: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ldft.monitor", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A run of two ranks in the middle of its training. It stands still: what is shown of it stays the same, and the other tests
    on this machine have its cores."""
    folder = tmp_path_factory.mktemp("monitored")
    words = [*FAST, *ENDLESS, "launch.num_ranks=2", f"results.dir={folder / 'results'}"]
    run = Running([sys.executable, "-m", "ldft", *words], folder)
    try:
        run.wait_for(iterations=2)
        ranks = run.ranks()
        for rank in ranks:
            rank.suspend()
        yield run
        for rank in filter(psutil.Process.is_running, ranks):
            rank.resume()
    finally:
        run.process.terminate()
        run.process.communicate(timeout=60)


def in_terminal(
    columns: int, seconds: float, *words: str, rows: int = 50, number: int = signal.SIGINT, **environment: str
) -> tuple[int, str]:
    """Exit code and output of the monitor in a terminal of that size, ended by Ctrl-C or another signal."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    command = [sys.executable, "-m", "ldft.monitor", "--interval", "0.2", *words]
    variables = os.environ | {"TERM": "xterm"} | environment
    process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, start_new_session=True, env=variables)
    os.close(its)
    out, end = b"", time.monotonic() + seconds
    while process.poll() is None:
        if time.monotonic() > end:
            process.send_signal(number)
            end = time.monotonic() + 60
        if select.select([ours], [], [], 0.1)[0]:
            try:
                out += os.read(ours, 1 << 16)
            except OSError:  # the other end is closed
                break
    os.close(ours)
    return process.wait(), out.decode()


def test_once_names_nodes_ranks_roles_and_speed(running) -> None:
    done = monitor("--once", "--results", str(running.results_dir))
    assert done.returncode == 0 and done.stderr == ""
    assert re.search(r"^node +total +used +free +cache", done.stdout, re.M)
    assert re.search(r"^run [0-9a-f]{12}/attempt-1 of \w+: nano, 64 tokens, numa=default$", done.stdout, re.M)
    assert re.search(r"^  iteration \d+/100000, \d+ tokens/s$", done.stdout, re.M)
    for name in ("master_weights", "momentum", "activations", "other", "rank 0", "rank 1"):
        assert re.search(rf"^  {name} .*\d$", done.stdout, re.M), name
    for rank in running.ranks():
        assert re.search(rf"^  [01] +{rank.pid} +\d+\.\d\d +0\.000$", done.stdout, re.M), done.stdout


def test_a_terminal_of_60_columns_holds_it_and_ctrl_c_is_quiet(running) -> None:
    exit_code, out = in_terminal(60, 4, "--results", str(running.results_dir))
    assert exit_code == 130 and "Traceback" not in out
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", out).replace("\r", "\n")
    assert max(map(len, text.split("\n"))) <= 60
    assert "rank 1" in text and "tokens/s" in text and re.search("[▁-█]", text)
    # In place: each sample goes over the one before.
    assert out.count("\x1b[1A") > 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_however_it_is_told_to_end_the_terminal_gets_its_cursor_back(running, number: int) -> None:
    exit_code, out = in_terminal(80, 2, "--results", str(running.results_dir), number=number)
    assert exit_code == 128 + number and "Traceback" not in out
    assert out.rfind("\x1b[?25h") > out.rfind("\x1b[?25l") >= 0


def test_a_terminal_with_too_few_rows_shows_the_ranks_and_says_how_many_lines_it_does_not(running) -> None:
    lines = monitor("--once", "--results", str(running.results_dir)).stdout.splitlines()
    (ends,) = [number for number, line in enumerate(lines, 1) if re.match(rf"  1 +{running.ranks()[1].pid} ", line)]
    # Variables that say otherwise are older than the window.
    words = ["--results", str(running.results_dir)]
    _, out = in_terminal(80, 2, *words, rows=ends + 1, LINES="40", COLUMNS="20")
    last = out[out.rindex("sizes in GiB") :].split("\x1b[?25h")[0].strip().splitlines()
    assert len(last) == ends + 1 and last[-1] == f"{len(lines) - ends} more lines: enlarge the terminal, or use --once"
    assert [line.split()[0] for line in last[-3:-1]] == ["0", "1"], last


def test_a_terminal_that_cannot_go_back_gets_blocks(running) -> None:
    _, out = in_terminal(80, 2, "--results", str(running.results_dir), TERM="dumb")
    assert out.count("sizes in GiB") >= 3 and "\x1b" not in out


def test_in_ascii_it_is_ascii(running) -> None:
    exit_code, out = in_terminal(80, 2, "--results", str(running.results_dir), PYTHONIOENCODING="ascii")
    assert exit_code == 130 and out.isascii() and re.search(r"^0 .*  [1-8]+\s*$", out, re.M), out


def test_in_a_pipe_it_is_plain_blocks(running) -> None:
    words = ["--interval", "0.3", "--results", str(running.results_dir)]
    command = [sys.executable, "-m", "ldft.monitor", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=30)[0]
    assert process.returncode == 130 and "\x1b" not in out and "\r" not in out
    assert len(re.findall(r"^\d\d:\d\d:\d\d  sizes in GiB$", out, re.M)) >= 3


def test_head_ends_it_without_a_word(running) -> None:
    words = f"{sys.executable} -m ldft.monitor --interval 0.1 --results {running.results_dir} | head -n 1"
    done = subprocess.run(["sh", "-c", words], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.count("\n") == 1 and done.stderr == ""


def test_another_user_sees_what_may_be_seen_and_that_the_rest_may_not(running) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs to become another user (root)")
    # Everything is imported before: what that user may read of this checkout does not matter.
    code = (
        "import contextlib, io, os, sys\nfrom ldft.monitor import live as monitor\nsys.argv[1:] = sys.argv[1].split()\n"
        "with contextlib.redirect_stdout(io.StringIO()): monitor.main()\n"
        f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\nsys.exit(monitor.main())"
    )

    def as_nobody(words: str) -> str:
        done = subprocess.run([sys.executable, "-c", code, words], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout

    pids = {rank.pid for rank in running.ranks()}
    (run,) = [r for r in json.loads(as_nobody("--json --once"))["runs"] if {k["pid"] for k in r["ranks"]} == pids]
    assert run["forbidden"] and run["user"] == "root"
    assert all(rank["memory"] is None and rank["cores_busy"] is not None for rank in run["ranks"])
    text = as_nobody("--once")
    assert "some figures are readable only by root" in text and "config not readable" in text


def test_numbers_of_any_process_are_numastats(start) -> None:
    pid = start(HOLDS, "64")
    done = monitor("--pid", str(pid), "--once", "--json")
    said = json.loads(done.stdout)
    assert {node["node"]: node["total"] / 2**20 for node in said["nodes"]} == pytest.approx(numastat(pid), abs=0.1)
    text = monitor("--pid", str(pid), "--once").stdout
    assert f"for PID {pid} (python" in text and re.search(r"^Heap +\d+", text, re.M)


def test_a_process_that_ends_ends_the_watching(start) -> None:
    pid = start("import time; print('ready', flush=True); time.sleep(2)")
    done = monitor("--pid", str(pid), "--interval", "0.1")
    assert done.returncode == 0 and done.stdout.count("Per-node process memory usage") >= 2 and done.stderr == ""
    assert monitor("--pid", "4194304").stderr == (
        "ldft: process 4194304 cannot be read: it ended, or belongs to another user\n"
    )


def test_a_folder_behind_a_closed_one_is_one_line(tmp_path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs to become another user (root)")
    (tmp_path / "closed" / "inside").mkdir(parents=True)
    (tmp_path / "closed").chmod(0o700)
    for path in (tmp_path, *tmp_path.parents[:-2]):
        path.chmod(path.stat().st_mode | 0o011)
    folder = tmp_path / "closed" / "inside"
    for module, begins in {
        "ldft.monitor.live": f"ldft: --results: cannot look at '{folder}' (Permission denied); name a path that you can read",
        "ldft.sweep.status": f"ldft: results folder: cannot look at '{folder}' (Permission denied); name a path that you can read",
        "ldft.results.__main__": f"ldft: results folder: cannot look at '{folder}' (Permission denied); name a path that you can",
    }.items():
        words = {"ldft.monitor.live": ["--once", "--results"], "ldft.sweep.status": []}.get(module, ["compact"])
        code = (
            f"import contextlib, io, os, sys, {module} as one\nsys.argv[1:] = {[*words, str(folder)]}\n"
            # What Python imports meanwhile must be there before.
            "with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()): one.main()\n"
            f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\nsys.exit(one.main())"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and done.stderr.startswith(begins) and done.stderr.count("\n") == 1, done.stderr


def test_without_a_run_nodes_are_shown_and_that_there_is_none(tmp_path) -> None:
    done = monitor("--once", "--results", str(tmp_path))
    assert done.returncode == 0 and "no run of ldft found" in done.stdout and re.search(r"^0 +\d", done.stdout, re.M)
    assert json.loads(monitor("--once", "--json", "--results", str(tmp_path)).stdout)["runs"] == []


def test_a_command_without_ranks_yet_is_named(command, tmp_path) -> None:
    (tmp_path / "results").mkdir()
    process = subprocess.Popen(command(*ENDLESS), cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        seen = ""
        while f"pid {process.pid} of" not in seen:
            assert process.poll() is None and "\nrun " not in seen, seen
            seen = monitor("--once", "--results", str(tmp_path / "results")).stdout
        assert "no ranks now" in seen
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--interval", "0"], "--interval: 0 is not possible; use 0.05 to 86400 seconds"),
        (["--interval", "1e300"], "--interval: 1e+300 is not possible; use 0.05 to 86400 seconds"),
        (["--interval", "nan"], "--interval: nan is not possible; use 0.05 to 86400 seconds"),
        (["--interval", "x"], "--interval: invalid float value: 'x'"),
        (["--results", "/nowhere"], "--results: /nowhere is not a folder; name the results.dir of a run"),
        (
            ["--results", "N" * 300],
            f"--results: cannot look at '{'N' * 300}' (File name too long); name a path that you can read",
        ),
        (["--pid", "x"], "--pid: invalid int value: 'x'"),
        (["--pid", "0"], "--pid: 0 is no process id; use 1 to 4194304, as ps shows them"),
        (["--pid", "-5"], "--pid: -5 is no process id; use 1 to 4194304, as ps shows them"),
        (["--pid", str(10**20)], f"--pid: {10**20} is no process id; use 1 to 4194304, as ps shows them"),
    ],
)
def test_wrong_arguments_are_one_line(words: list[str], line: str) -> None:
    done = monitor(*words)
    assert done.returncode == 2 and done.stderr == f"ldft: {line}; see python -m ldft.monitor --help\n"


def test_it_imports_only_what_is_light() -> None:
    heavy = ("torch", "pandas", "pyarrow", "hydra")
    code = f"import sys, ldft.monitor.live, rich.live; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_it_takes_less_than_a_hundredth_of_a_core(running) -> None:
    """Ten seconds at a sample a second beside two ranks; start-up apart, which is over after three."""
    command = [sys.executable, "-m", "ldft.monitor", "--results", str(running.results_dir)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def cpu_s() -> float:
        values = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")

    try:
        time.sleep(3)
        before, began = cpu_s(), time.monotonic()
        time.sleep(10)
        used = (cpu_s() - before) / (time.monotonic() - began)
    finally:
        process.kill()
        process.wait()
    # Two ticks of the clock that measures it are 0.2% here.
    assert used < 0.012, used


def test_a_rank_that_is_killed_is_gone_from_the_next_sample(running) -> None:
    """The last test of this module: it ends the run."""
    watching = subprocess.Popen(
        [sys.executable, "-m", "ldft.monitor", "--json", "--interval", "0.1", "--results", str(running.results_dir)],
        stdout=subprocess.PIPE,
        text=True,
    )
    out = watching.stdout
    assert out is not None

    def shown(line: str) -> set[int]:
        return {rank["pid"] for found in json.loads(line)["runs"] for rank in found["ranks"]}

    victim, other = running.ranks()
    assert shown(out.readline()) == {victim.pid, other.pid}
    victim.kill()
    # The other rank stands still: it is shown until its time to end has passed, and the first one never again.
    pids = [shown(out.readline())]
    while victim.pid in pids[-1]:
        pids.append(shown(out.readline()))
    assert pids[-1] == {other.pid}
    other.resume()
    running.process.wait(timeout=60)
    time.sleep(1)
    watching.send_signal(signal.SIGINT)
    after = [shown(line) for line in watching.communicate(timeout=30)[0].splitlines()]
    assert after[-1] == set() and not any(victim.pid in found for found in after)
