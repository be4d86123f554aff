"""Which cells run: claims, resume and back-stop, decided from what lies on disk."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ldft import results
from ldft.config import Config, Rerun, run_id
from ldft.errors import CombinationError
from ldft.preflight import fit
from ldft.preflight.resolved import Resolved
from ldft.results import attempt, schema, store
from ldft.results.history import History
from ldft.runner import checks, final_status, measured, node_memory, parent, signals
from ldft.sweep import cell
from ldft.sweep.cell import Do
from tests.synthetic import config, leave, row

STATUSES = ("ok", "invalid", "skipped", "oom_device", "oom_host", "timeout", "interrupted", "error")


def in_a_sweep(**values: Any) -> Config:
    return config(sweep__started_at=time.time(), **values)


def decide(folder: Path, of: Config) -> cell.Decision:
    return cell.decide(of, History(folder))


def claim(folder: Path, of: Config, **values: Any) -> Path:
    """An attempt at work, of this process unless `values` say otherwise."""
    claimed, _ = attempt.claim(folder, run_id(of))
    attempt.write_json(claimed / "started.json", attempt.owner() | values)
    return claimed


# --- resume


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    ("rerun", "again"),
    [
        (Rerun.missing, {"interrupted"}),
        (Rerun.failed, {"interrupted", "error", "timeout", "oom_device", "oom_host", "invalid"}),
        (Rerun.all, set(STATUSES)),
    ],
)
def test_rerun_says_which_cells_run_again(tmp_path, rerun, again, merged) -> None:
    from ldft.results import store

    for seed, status in enumerate(STATUSES):
        leave(tmp_path, config(train__seed=seed), 1, status)
    if merged:
        store.compact(tmp_path)
    cells = [in_a_sweep(train__seed=seed, rerun=rerun) for seed in range(len(STATUSES))]
    decisions = [decide(tmp_path, one) for one in cells]
    ran = {status for status, decision in zip(STATUSES, decisions, strict=True) if decision.do is Do.run}
    assert ran == again
    assert {decision.number for decision in decisions if decision.do is Do.run} == {2}
    assert all(
        decision.do is Do.keep for status, decision in zip(STATUSES, decisions, strict=True) if status not in ran
    )


def test_a_refusal_for_memory_is_judged_anew_and_leaves_a_row_only_where_that_changes(tmp_path, monkeypatch) -> None:
    free_gib = 3

    def refuse(of: Resolved) -> None:
        if free_gib < 99 and not of.config.force:
            raise fit.DoesNotFitError(f"99 GiB expected, {free_gib} GiB free", "less")

    monkeypatch.setattr(fit, "check", refuse)
    monkeypatch.setattr(parent, "_run_ranks", lambda *given: ([], final_status.Verdict("timeout"), 0.0))
    monkeypatch.setattr(measured, "columns", lambda *given: {})
    monkeypatch.setattr(node_memory, "columns", lambda *given: {})

    def sweep(**values: Any) -> tuple[Do, str, int]:
        done = cell.run(in_a_sweep(results__dir=str(tmp_path), **values), History(tmp_path), lambda report: None)
        assert done.row is not None
        return done.do, done.row["status"], done.row["attempt"]

    assert sweep() == (Do.run, "invalid", 1)
    for rerun in Rerun:
        assert sweep(rerun=rerun) == (Do.keep, "invalid", 1)
    assert sweep(force=True) == (Do.run, "timeout", 2), "what the message advises"
    leave(tmp_path, in_a_sweep(results__dir=str(tmp_path)), 3, "invalid", error_type=cell.DOES_NOT_FIT)
    free_gib = 100
    assert sweep() == (Do.run, "timeout", 4), "somebody has freed theirs"


def test_a_cell_without_a_row_runs(tmp_path) -> None:
    assert decide(tmp_path, in_a_sweep()) == cell.Decision(Do.run, 1)


@pytest.mark.parametrize("rerun", [Rerun.failed, Rerun.all])
def test_what_another_sweep_ran_since_this_one_began_is_not_run_again(tmp_path, rerun) -> None:
    mine = in_a_sweep(rerun=rerun)
    leave(tmp_path, mine, 1, "error")
    assert decide(tmp_path, mine).do is Do.keep


# --- claims


def test_a_live_claim_is_left_alone_and_a_dead_one_taken_over(tmp_path) -> None:
    mine = in_a_sweep()
    folder = claim(tmp_path, mine)
    assert decide(tmp_path, mine) == cell.Decision(Do.leave, 1)
    owner = json.loads((folder / "started.json").read_text())
    # Its pid belongs to somebody else by now.
    attempt.write_json(folder / "started.json", owner | {"pid_start": "1"})
    assert decide(tmp_path, mine) == cell.Decision(Do.run, 2)


def test_a_process_that_was_killed_is_dead_also_while_nobody_has_waited_for_it(tmp_path) -> None:
    mine = in_a_sweep()
    script = (
        "import sys, time; from pathlib import Path; from ldft.results import attempt;"
        "attempt.claim(Path(sys.argv[1]), sys.argv[2]); print('claimed', flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", script, tmp_path, run_id(mine)], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"claimed\n"
        assert decide(tmp_path, mine).do is Do.leave
    finally:
        child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
    assert decide(tmp_path, mine).do is Do.run
    child.wait()


def test_a_claim_on_another_machine_lives_as_long_as_its_heart_beats(tmp_path) -> None:
    mine = in_a_sweep()
    folder = claim(tmp_path, mine, here="another boot of another kernel", host="elsewhere")
    assert decide(tmp_path, mine).do is Do.leave
    long_ago = time.time() - attempt.HEARTBEAT_DEAD_S - 1
    os.utime(folder / "started.json", (long_ago, long_ago))
    assert decide(tmp_path, mine).do is Do.run


def test_a_claim_is_judged_also_where_a_container_hides_the_boot_id(tmp_path, monkeypatch) -> None:
    read = Path.read_text

    def hidden(self: Path, *arguments: Any, **options: Any) -> str:
        if self.name == "boot_id":
            raise FileNotFoundError(2, "No such file or directory", str(self))
        return read(self, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", hidden)
    folder = claim(tmp_path, in_a_sweep())
    assert attempt.read_json(folder / "started.json")["here"].startswith(socket.gethostname())
    assert decide(tmp_path, in_a_sweep()).do is Do.leave


@pytest.mark.parametrize("in_sweep", [False, True])
def test_being_told_to_stop_while_weights_are_fetched_is_an_interrupted_row(tmp_path, monkeypatch, in_sweep) -> None:
    mine = (in_a_sweep if in_sweep else config)(results__dir=str(tmp_path))
    beats: list[bool | str] = []

    def fetch(config: Config, *, fetch: bool) -> None:
        folder = attempt.folder_of(tmp_path, run_id(mine), 1)
        os.utime(folder / "started.json", (0, 0))
        time.sleep(0.2)
        beats.append((folder / "started.json").stat().st_mtime > 0)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        beats.append("fetched to the end")

    monkeypatch.setattr(attempt, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(checks, "check_inputs", fetch)
    with signals.noting() if in_sweep else contextlib.nullcontext():
        ended = parent.run(mine)
        assert signals.noted() == "SIGINT", "a sweep ends by it"
    assert (ended.status, ended.row["signal"], ended.exit_code) == ("interrupted", "SIGINT", 130)
    assert beats == [True]
    assert decide(tmp_path, in_a_sweep()).do is Do.run
    beats.clear()
    assert parent.run(mine).status == "interrupted" and len(beats) == 1, "the next run begins afresh"


def test_the_heart_beats_while_the_ranks_run(tmp_path, monkeypatch) -> None:
    mine = config(results__dir=str(tmp_path))
    started = attempt.folder_of(tmp_path, run_id(mine), 1) / "started.json"
    beats = []

    def show(report: dict[str, Any]) -> None:
        beats.append(started.stat().st_mtime > 0)
        os.utime(started, (0, 0))

    monkeypatch.setattr(attempt, "HEARTBEAT_S", 0.02)
    assert parent.run(mine, show=show).status == "ok"
    assert sum(beats[1:]) > 0.8 * (len(beats) - 1) > 0


def test_a_row_that_appears_between_the_two_looks_counts(tmp_path, monkeypatch) -> None:
    mine = in_a_sweep()
    folder = claim(tmp_path, mine)

    def ends_just_now(of: Path) -> bool:
        store.write_row(row(mine), folder / schema.ROW_FILE)
        return False

    monkeypatch.setattr(attempt, "is_alive", ends_just_now)
    assert decide(tmp_path, mine).do is Do.keep


def _run_cells(folder: Path, sweep_started: float, start: Any) -> None:
    """What a sweep does, with an invalid value in place of ranks: a row at once."""
    history = History(folder)
    start.wait()
    for seed in range(40):
        one = config(
            train__seed=seed,
            train__iterations=0,
            results__dir=str(folder),
            sweep__started_at=sweep_started,
            sweep__name="x",
        )
        cell.run(one, history)


def test_sweeps_in_one_folder_run_every_cell_once(tmp_path) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(3)
    sweeps = [context.Process(target=_run_cells, args=(tmp_path, time.time(), start)) for _ in range(3)]
    for sweep in sweeps:
        sweep.start()
    for sweep in sweeps:
        sweep.join()
        assert sweep.exitcode == 0
    frame = results.read(tmp_path)
    assert sorted(frame["cfg.train.seed"]) == list(range(40))
    assert set(frame["attempt"]) == {1} and set(frame["status"]) == {"invalid"}
    assert [path for path in tmp_path.rglob(".*") if path.name.startswith(".claim")] == []


# --- back-stop


@pytest.mark.parametrize("status", ["oom_device", "oom_host"])
def test_longer_cells_are_skipped_after_an_oom_naming_the_cell_that_failed(tmp_path, status) -> None:
    leave(tmp_path, config(seq_len__tokens=2048), 1, "ok")
    failed = leave(tmp_path, config(seq_len__tokens=4096), 1, status)
    longer = in_a_sweep(seq_len__tokens=8192, results__dir=str(tmp_path))
    decision = decide(tmp_path, longer)
    assert decision.do is Do.skip and f"{failed.parent.name}/attempt-1" in decision.reason
    done = cell.run(longer, History(tmp_path))
    assert done.row is not None and done.row["status"] == "skipped"
    # Judged anew by the next sweep: no second row while nothing has changed, a run when the shorter one works.
    assert decide(tmp_path, in_a_sweep(seq_len__tokens=8192)) == cell.Decision(Do.keep, 1)
    leave(tmp_path, config(seq_len__tokens=4096), 2, "ok")
    assert decide(tmp_path, in_a_sweep(seq_len__tokens=8192)) == cell.Decision(Do.run, 2)


@pytest.mark.parametrize(
    "other",
    [
        {"seq_len__tokens": 2048},  # shorter
        {"seq_len__tokens": 8192, "train__micro_batch_size": 2},  # differs in something else
        {"seq_len__tokens": 8192, "sweep__oom_backstop": False},
        {"seq_len__tokens": 8192, "repeat": 2},
    ],
)
def test_other_cells_run_after_an_oom(tmp_path, other) -> None:
    leave(tmp_path, config(seq_len__tokens=4096), 1, "oom_device")
    assert decide(tmp_path, in_a_sweep(**other)).do is Do.run


def test_no_other_failure_stops_longer_cells(tmp_path) -> None:
    leave(tmp_path, config(seq_len__tokens=4096), 1, "error")
    assert decide(tmp_path, in_a_sweep(seq_len__tokens=8192)).do is Do.run


# --- combinations


def test_a_combination_that_makes_no_sense_is_skipped_in_a_sweep_and_invalid_alone(tmp_path) -> None:
    from ldft.runner import parent

    nonsense = in_a_sweep(offload__stage=0, results__dir=str(tmp_path))
    done = cell.run(nonsense, History(tmp_path))
    assert done.row is not None and (done.row["status"], done.row["error_type"]) == (
        "skipped",
        CombinationError.__name__,
    )
    alone = config(offload__stage=0, results__dir=str(tmp_path))
    assert parent.run(alone).status == "invalid"
    wrong = in_a_sweep(train__iterations=0, results__dir=str(tmp_path))
    done = cell.run(wrong, History(tmp_path))
    assert done.row is not None and done.row["status"] == "invalid"
