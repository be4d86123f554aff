"""What the sampler reads agrees with the machine's own tools, costs little, and survives processes that come and go."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ldft import proc
from ldft.memory.probe import process_memory
from ldft.monitor import processes, sampler
from ldft.monitor.processes import Run
from ldft.monitor.sampler import SHARE, Pace, Sampler

HOLDS = "import sys, time; held = b'x' * (int(sys.argv[1]) << 20); print('ready', flush=True); time.sleep(600)"
WORKS = "print('ready', flush=True)\nwhile True: pass"


@pytest.fixture
def start() -> Iterator[Callable[..., int]]:
    """Start a Python process and wait until it says that it is ready."""
    started = []

    def begin(code: str, *arguments: str, **environment: str) -> int:
        words = [sys.executable, "-c", code, *arguments]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process.pid

    yield begin
    for process in started:
        process.kill()
        process.wait()


def numastat(pid: int) -> dict[int, float]:
    """MiB of a process by node, as numastat -p has it."""
    done = subprocess.run(["numastat", "-p", str(pid)], capture_output=True, text=True, check=True)
    nodes = [int(number) for number in re.findall(r"Node (\d+)", done.stdout)]
    total = next(line for line in done.stdout.splitlines() if line.startswith("Total"))
    return dict(zip(nodes, map(float, total.split()[1:]), strict=False))


def test_memory_by_node_is_numastats(start) -> None:
    if shutil.which("numastat") is None:
        assert os.environ.get("CI") != "true", "CI installs numactl, which has numastat"
        pytest.skip("needs numastat (Debian: numactl)")
    pid = start(HOLDS, "100")
    (run,) = Sampler().sample([Run(Path("/nowhere"), (pid,))]).runs
    memory = run.ranks[0].memory
    assert memory is not None
    mine = {node: size / 2**20 for node, size in memory}
    assert mine == pytest.approx(numastat(pid), abs=0.1) and sum(mine.values()) > 100


def test_nodes_are_those_of_meminfo() -> None:
    found = sampler.nodes()
    # All nodes, rather than all of /proc/meminfo: where memory was added to a virtual machine later, nodes may not count it.
    assert {node.node for node in found} == {
        int(path.name[4:]) for path in Path("/sys/devices/system/node").glob("node[0-9]*")
    }
    for node in found:
        text = Path(f"/sys/devices/system/node/node{node.node}/meminfo").read_text()
        fields = {name: int(size) << 10 for name, size in re.findall(r"(\w+): +(\d+) kB", text)}
        assert node.total == fields["MemTotal"] and 0 < node.used < node.total
        assert node.page_cache == pytest.approx(fields["FilePages"], abs=256 << 20)


def test_cpu_use_is_that_of_the_rank_and_of_what_it_started(start) -> None:
    parent = start(
        "import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', sys.argv[1]])\nchild.wait()", WORKS
    )
    (child,) = psutil.Process(parent).children()
    runs, one = [Run(Path("/nowhere"), (parent,))], Sampler()
    assert one.sample(runs).runs[0].ranks[0].cores_busy is None
    before, began = sum(child.cpu_times()[:2]), time.monotonic()
    time.sleep(1.5)
    expected = (sum(child.cpu_times()[:2]) - before) / (time.monotonic() - began)
    busy = one.sample(runs).runs[0].ranks[0].cores_busy
    assert expected > 0.05 and busy == pytest.approx(expected, abs=0.1)
    # A process that ends hands its time to the one that waited for it: it does not come twice.
    child.kill()
    time.sleep(0.5)
    after = [rank.cores_busy for run in one.sample(runs).runs for rank in run.ranks]
    assert all(busy is not None and busy < 1.1 for busy in after)


def test_memory_is_read_as_often_as_its_cost_allows(start, tmp_path) -> None:
    """400 MiB in base pages take the kernel several milliseconds: at ten samples a second that would be some percent."""
    pid = start(HOLDS, "400", RANK="0")
    write_reports(tmp_path, phase="train")
    before = time.thread_time()
    for _ in range(5):
        process_memory(pid)
    cost_s = (time.thread_time() - before) / 5
    one, began, ages = Sampler(), time.monotonic(), []
    while (passed := time.monotonic() - began) < 4:
        (run,) = one.sample([Run(tmp_path, (pid,))]).runs
        ages.append(run.ranks[0].memory_age_s)
        time.sleep(0.1)
    assert cost_s > 0.002
    assert 1 <= ages.count(0) <= 1 + 2 * passed * SHARE / cost_s
    assert max(ages) > 0, "an older value says its age"


def test_memory_is_read_once_more_after_the_first_iteration(start, tmp_path) -> None:
    pid = start(HOLDS, "100", RANK="0")
    one, run = Sampler(), Run(tmp_path, (pid,))

    def age_s(*times: float) -> float:
        write_reports(tmp_path, phase="train", iteration_s=list(times))
        time.sleep(0.02)
        return one.sample([run]).runs[0].ranks[0].memory_age_s

    assert age_s() == 0 and age_s() > 0
    assert age_s(0.5) == 0
    assert age_s(0.5, 0.5) > 0


def test_pace_follows_the_last_cost() -> None:
    pace = Pace()
    assert pace.is_due(0.01)
    with pace.reading():
        until = time.thread_time() + 0.02
        while time.thread_time() < until:
            pass
    assert not pace.is_due(0.01) and pace.is_due(1e9)


def write_reports(folder: Path, num_ranks: int = 1, **report: object) -> None:
    config = {
        "launch": {"num_ranks": num_ranks},
        "model": {"name": "nano"},
        "seq_len": {"tokens": 64},
        "numa": {"name": "default"},
        "train": {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "iterations": 5},
    }
    (folder / "config.json").write_text(json.dumps(config))
    for rank in range(num_ranks):
        (folder / f"rank-{rank}.json").write_text(json.dumps(report))


def test_ranks_that_end_between_two_samples_leave_no_stale_line(start, tmp_path) -> None:
    write_reports(tmp_path, 2, phase="train", iteration_s=[0.5, 0.25])
    pids = [start(HOLDS, "1", RANK=str(rank)) for rank in range(2)]
    one = Sampler()
    (run,) = one.sample([Run(tmp_path, tuple(pids))]).runs
    assert [rank.rank for rank in run.ranks] == [0, 1]
    assert (run.iteration, run.tokens_per_s, run.title) == (2, 2 * 64 / 0.25, "nano, 64 tokens, numa=default")
    os.kill(pids[0], 9)
    time.sleep(0.3)  # nobody has waited for it: it is a zombie now
    assert [rank.rank for rank in one.sample([Run(tmp_path, tuple(pids))]).runs[0].ranks] == [1]
    os.kill(pids[1], 9)
    time.sleep(0.3)
    assert one.sample([Run(tmp_path, tuple(pids))]).runs == ()


def test_role_bytes_whose_nodes_nobody_knows_are_on_none(start, tmp_path) -> None:
    memory = {"momentum": {"bytes": 12, "nodes": None}, "variance": {"bytes": 12, "nodes": {"0": 8, "3": 4}}}
    write_reports(tmp_path, phase="train", role_memory=memory, pinned_bytes=0)
    (run,) = Sampler().sample([Run(tmp_path, (start(HOLDS, "1", RANK="0"),))]).runs
    found = [(use.role, use.node, use.size) for use in run.ranks[0].roles]
    assert found == [("momentum", None, 12), ("variance", 0, 8), ("variance", 3, 4)] and run.ranks[0].pinned == 0


def test_a_process_that_is_gone_is_nothing() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert proc.stat(gone.pid) is None and processes.user_of(gone.pid) is None
    assert processes.rank_of(gone.pid) is None and processes.ticks_of_family(gone.pid) is None
