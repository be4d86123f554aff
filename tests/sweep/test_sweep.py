"""A sweep survives what its cells and its user do to it. Failures come from outside: signals, a memory cgroup, a time limit."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest

from ldft import results
from ldft.results import schema
from tests.conftest import long
from tests.runner.test_failures import memory_group

# Nothing that a cell need not have: two iterations of sixteen tokens, no operators to load.
SHORT = ("model=nano", "offload=none", "train.iterations=2", "train.warmup_iterations=1")
# Refused by the cell itself: a row without ranks, in a tenth of a second.
INVALID = ("model=nano", "train.iterations=0")


class Sweep:
    """A `python -m ldft -m` and what it does."""

    def __init__(self, folder: Path, *overrides: str, before: Callable[[], object] | None = None) -> None:
        self.results_dir = folder / "results"
        line = [sys.executable, "-m", "ldft", "-m", *overrides, "launch.device=cpu", f"results.dir={self.results_dir}"]
        self.process = subprocess.Popen(
            line, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=before
        )

    def end(self, timeout_s: float = 600) -> tuple[int, str]:
        out = self.process.communicate(timeout=timeout_s)[0]
        return self.process.returncode, out

    def workers(self) -> Iterator[tuple[Path, psutil.Process]]:
        """Attempt folder and process of the ranks at work."""
        for child in psutil.Process(self.process.pid).children():
            try:
                line = child.cmdline()
            except psutil.NoSuchProcess:
                continue
            if "ldft.worker" in line:
                yield Path(line[-1]), child

    def wait_for_worker(self, iterations: int = 0) -> tuple[Path, psutil.Process]:
        deadline = time.monotonic() + 240
        while self.process.poll() is None and time.monotonic() < deadline:
            for folder, worker in self.workers():
                report = folder / "rank-0.json"
                if not iterations or (
                    report.exists() and len(json.loads(report.read_text()).get("iteration_s", [])) >= iterations
                ):
                    return folder, worker
            time.sleep(0.02)
        raise AssertionError(self.end(1))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Sweep]]:
    begun: list[Sweep] = []

    def begin(*overrides: str, before: Callable[[], object] | None = None) -> Sweep:
        begun.append(Sweep(tmp_path, *overrides, before=before))
        return begun[-1]

    yield begin
    for sweep in begun:
        sweep.process.kill()


def nothing_torn(folder: Path) -> None:
    for path in folder.rglob("*"):
        assert not path.name.endswith(".tmp") and not path.name.startswith(".claim"), path
        if path.suffix == ".json":
            json.loads(path.read_text())
        if path.suffix == ".parquet":
            pq.read_table(path)


def by_seed(folder: Path) -> pd.DataFrame:
    """The newest row of each seed."""
    frame = results.read(folder).sort_values("attempt")
    return frame.groupby(["cfg.train.seed", "cfg.seq_len.tokens"]).last()


class Assassin(threading.Thread):
    """Does to the worker of each seed what the test has in store for it, once."""

    def __init__(self, sweep: Sweep, deeds: dict[int, Callable[[psutil.Process], object]]) -> None:
        super().__init__(daemon=True)
        self.sweep, self.deeds = sweep, deeds
        self.start()

    def run(self) -> None:
        while self.deeds and self.sweep.process.poll() is None:
            for folder, worker in self.sweep.workers():
                seed = json.loads((folder / "config.json").read_text())["train"]["seed"]
                if seed in self.deeds:
                    self.deeds.pop(seed)(worker)
            time.sleep(0.02)


def _rendezvous_is_a_file(worker: psutil.Process) -> None:
    folder = Path(worker.environ()["LDFT_RENDEZVOUS_DIR"])
    shutil.rmtree(folder)
    folder.write_text("")


SWEEP_OF_TWELVE = """\
# @package _global_
hydra:
  sweeper:
    params: {model: nano, offload: none, launch.device: cpu}
    points:
      - {train.seed: 0, seq_len.tokens: 16, launch.timeout_s: 4}
      - {train.seed: "range(1,11)", seq_len.tokens: 16}
      - {train.seed: 2, seq_len.tokens: 32}
sweep: {name: twelve}
train: {iterations: 2, warmup_iterations: 1}
"""


@long
def test_twelve_cells_of_which_five_fail_give_twelve_rows_and_are_resumed(tmp_path, start) -> None:
    group = memory_group()
    if group is None:
        pytest.skip("needs a memory cgroup that this user may make (run as root, outside a locked-down container)")
    limit = next(p for p in (group / "memory.limit_in_bytes", group / "memory.max") if p.exists())
    no_limit = limit.read_text() if limit.name == "memory.max" else "-1"

    def anonymous() -> int:
        """Memory of the group that the kernel cannot reclaim, bytes; files that were read count for nothing."""
        fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(fields["total_rss"] if "total_rss" in fields else fields["anon"])

    def starve(worker: psutil.Process) -> None:
        # Of the group, which holds the parent too, the kernel is to choose the worker: once it is the bigger one.
        Path(f"/proc/{worker.pid}/oom_score_adj").write_text("1000")
        status = Path(f"/proc/{worker.pid}/status")
        while int(status.read_text().partition("RssAnon:")[2].split()[0]) < 150 << 10:
            time.sleep(0.02)
        for spare_mib in range(20, 200, 20):
            with contextlib.suppress(OSError):  # v1 refuses a limit below what it can reclaim at once
                limit.write_text(str(anonymous() + (spare_mib << 20)))
                break
        psutil.wait_procs([worker], timeout=120)
        limit.write_text(no_limit)

    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "twelve.yaml").write_text(SWEEP_OF_TWELVE)
    line = ("--config-dir", str(tmp_path), "+sweep=twelve")
    try:
        sweep = start(*line, before=lambda: (group / "cgroup.procs").write_text(str(os.getpid())))
        Assassin(
            sweep,
            {
                0: lambda worker: worker.suspend(),  # until launch.timeout_s
                1: _rendezvous_is_a_file,
                2: starve,
                3: lambda worker: worker.send_signal(signal.SIGSEGV),
                4: lambda worker: worker.terminate(),
            },
        )
        exit_code, out = sweep.end()
    finally:
        limit.write_text(no_limit)
        group.rmdir()
    assert exit_code == 1, out
    rows = by_seed(sweep.results_dir)
    assert len(rows) == 12 and set(rows["attempt"]) == {1}
    status = {seed: rows.loc[(seed, 16), "status"] for seed in range(11)}
    assert status == dict.fromkeys(range(5, 11), "ok") | {
        0: "timeout", 1: "error", 2: "oom_host", 3: "error", 4: "interrupted"
    }, out  # fmt: skip
    assert (rows.loc[(1, 16), "exit_code"], rows.loc[(3, 16), "signal"]) == (1, "SIGSEGV")
    skipped = rows.loc[(2, 32)]
    assert skipped["status"] == "skipped" and f"{rows.loc[(2, 16), 'run_id']}/attempt-1" in skipped["error_message"]
    assert set(rows["sweep"]) == {"twelve"} and set(rows["repeat"]) == {1}
    # Beside its ranks, a cell costs little.
    assert rows["parent_s"].median() < 0.5
    progress = [text for text in out.splitlines() if re.match(r"\[\d+/12\] nano 16 ", text)]
    assert len(progress) == 11
    assert re.search(
        r"^\[\d+/12\] nano 16 default train.seed=9 ok [\d.]+s \d+ tok/s (host|node0) [\d.]+ GiB( ETA \S+)?$", out, re.M
    )
    assert str(sweep.results_dir / rows.loc[(3, 16), "log_path"]) in out, "the summary names the logs of what failed"

    ended = len(results.read(sweep.results_dir))
    exit_code, out = start(*line, "launch.timeout_s=0").end()
    rows = by_seed(sweep.results_dir)
    assert (exit_code, len(results.read(sweep.results_dir))) == (1, ended + 1), out
    assert rows.loc[(4, 16), ["status", "attempt"]].tolist() == ["ok", 2]

    exit_code, out = start(*line, "launch.timeout_s=0", "rerun=failed").end()
    rows = by_seed(sweep.results_dir)
    assert exit_code == 0 and set(rows["status"]) == {"ok"}, out
    again = rows[rows["attempt"] == 2].index.tolist()
    # The failed ones, what was interrupted above, and the skip, whose reason is gone.
    assert again == [(0, 16), (1, 16), (2, 16), (2, 32), (3, 16), (4, 16)]
    status_now = subprocess.run(
        [sys.executable, "-m", "ldft.status", sweep.results_dir], capture_output=True, text=True, check=True
    )
    assert "12 cells: 12 ok" in status_now.stdout
    nothing_torn(sweep.results_dir)


def test_killed_in_the_middle_and_continued_by_two_at_once_every_cell_is_run_once(start) -> None:
    line = (*SHORT, "seq_len.tokens=16,17,18")
    killed = start(*line)
    first, _ = killed.wait_for_worker()
    deadline = time.monotonic() + 240
    while not (first / schema.ROW_FILE).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    second, _ = killed.wait_for_worker()
    family = psutil.Process(killed.process.pid).children(recursive=True)
    killed.process.kill()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive, "orphans"
    nothing_torn(killed.results_dir)
    assert second != first and len(results.read(killed.results_dir)) == 1
    # Nobody has waited for the killed one yet: it is a zombie, and dead all the same.
    both = [start(*line), start(*line)]
    ended = [sweep.end() for sweep in both]
    rows = results.read(killed.results_dir)
    assert rows["status"].tolist() == ["ok"] * 3, ended
    assert rows.set_index("cfg.seq_len.tokens")["attempt"].to_dict() == {16: 1, 17: 2, 18: 1}
    assert [code for code, _ in ended] == [0, 0], ended
    nothing_torn(killed.results_dir)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_is_told_to_stop_ends_its_cell_with_a_row_and_begins_no_other(start, number) -> None:
    sweep = start(*SHORT, "seq_len.tokens=16,17")
    _, worker = sweep.wait_for_worker()
    sweep.process.send_signal(number)
    exit_code, out = sweep.end()
    rows = results.read(sweep.results_dir)
    assert (exit_code, rows["status"].tolist(), rows["signal"].tolist()) == (130, ["interrupted"], [number.name]), out
    assert not worker.is_running() and "Traceback" not in out


def test_two_sweeps_with_different_cells_share_a_folder_and_a_cell_costs_the_parent_little(start) -> None:
    seeds = [",".join(map(str, range(first, first + 8))) for first in (0, 4)]
    sweeps = [start(*INVALID, f"train.seed={those}") for those in seeds]
    assert [sweep.end()[0] for sweep in sweeps] == [1, 1]
    rows = results.read(sweeps[0].results_dir)
    assert sorted(rows["cfg.train.seed"]) == list(range(12)) and set(rows["status"]) == {"invalid"}
    assert rows["parent_s"].median() < 0.5


def test_a_full_disk_ends_the_sweep_with_one_line_and_leaves_earlier_rows_alone(tmp_path, start) -> None:
    disk = tmp_path / "results"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs to mount a small file system (root)")
    try:
        exit_code, out = start(*INVALID, "train.seed=range(12)").end()
        rows = results.read(disk)
        assert exit_code in (1, 2) and 1 < len(rows) < 12, out
        assert re.search(r"^ldft: .*(No space left on device).*; ?\S+", out, re.M) and "Traceback" not in out
        assert [path for path in disk.rglob("*") if path.name.endswith(".tmp")] == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_code_that_is_edited_during_a_sweep_is_noticed(tmp_path, monkeypatch, capsys) -> None:
    from ldft import environment
    from ldft.config import run_id
    from ldft.sweep import loop, plan
    from tests.synthetic import config

    hashes = iter(["aaa", "aaa", "bbb"])
    monkeypatch.setattr(environment, "source_hash", lambda: next(hashes))
    cells, configs = [], {}
    for seed in range(3):
        one = config(train__seed=seed, train__iterations=0, results__dir=str(tmp_path), sweep__started_at=time.time())
        configs[run_id(one)] = one
        cells.append(plan.Cell(run_id(one), f"seed {seed}", "tiny", 1024, 1, 1024, []))
    assert loop.Sweep(plan.Plan("edited", time.time(), "here", cells, configs)).run() == 1
    out = capsys.readouterr().out
    assert out.count("changed during the sweep") == 1 and "(source hash aaa -> bbb)" in out
    assert "rows of different code or config" in out
