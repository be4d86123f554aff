"""The parent: one config -> one run in fresh processes -> a status and one row. Never imports torch."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ldft import batch, environment, files
from ldft.config import THIS, Config, run_id, series_id, to_dict
from ldft.config.root import flatten
from ldft.errors import CombinationError, ConfigError, InternalError, ResultsError
from ldft.memory.kernel_weights import kernel_weights, restore_kernel_weights
from ldft.monitor.trace import TRACE_FILE, Recorder
from ldft.planning import settled
from ldft.preflight import fit
from ldft.preflight.resolved import Resolved
from ldft.results import attempt, schema, store
from ldft.runner import (
    checks,
    final_status,
    hosts,
    launch,
    measured,
    memory_wait,
    node_memory,
    signals,
    swap_files,
    trackers,
)
from ldft.terminal import Progress
from ldft.training.deepspeed import operators


@dataclass(slots=True)
class Outcome:
    """The outcome of a run."""

    status: str
    row: dict[str, Any]
    row_path: Path
    num_said: int = 0
    """The row's notes that were printed before the ranks started."""
    logged: list[str] = field(default_factory=list)
    """A line per experiment tracker that has the row."""

    @property
    def exit_code(self) -> int:
        """0 ok or skipped, 2 invalid input, 130 interrupted, 1 everything else."""
        return {"ok": 0, "skipped": 0, "invalid": 2, "interrupted": 130}.get(self.status, 1)


def run(
    config: Config,
    claimed: tuple[Path, int] | None = None,
    show: Callable[[dict[str, Any]], None] | None = None,
) -> Outcome:
    """Run one config and return the outcome, success or failure. Raises ConfigError only if the results folder cannot be used,
    ResultsError if the row cannot be written, and exceptions that are bugs.

    claimed: the attempt's folder and number, if the caller has claimed it. show: called about ten times per second with rank 0's
    partial results; if None, a line of progress is printed.
    """
    results_dir = prepare(config)
    folder, number = claimed or attempt.claim(results_dir, run_id(config))
    num_said = 0
    with signals.noting(), _row(config, folder, number) as row:
        row |= environment.describe()
        with signals.raising(), attempt.beating(folder):  # fetching weights may take long
            ready, warnings = _prepare(config, row)
        if show is None:
            num_said = _announce(config, warnings, row["notes"])
        with _trace(config, folder, row) as recorder:
            if show:
                exits, decision, waited_s = _run_ranks(ready, folder, show, recorder)
            else:
                train = config.train
                with Progress(
                    train.iterations, train.warmup_iterations, measured.tokens_per_iteration(config)
                ) as progress:
                    exits, decision, waited_s = _run_ranks(ready, folder, progress.show, recorder)
        reports = [attempt.rank_report(folder, rank) for rank in range(config.launch.num_ranks)]
        row |= hosts.columns(folder, config)
        row |= node_memory.columns(reports, row["hosts"][0])
        row |= measured.columns(config, exits, reports) | _judged(decision, folder, results_dir)
        row["notes"] += [*reports[0].get("warnings", []), *measured.warnings(row)]
        row["notes"] += [*measured.notes(row, reports), *node_memory.notes(row)]
        row["parent_s"] = -waited_s  # _row adds the total duration
    return _finished(config, row, folder, num_said)


def _announce(config: Config, warnings: list[str], notes: list[str]) -> int:
    """Print what the user should know before waiting: resolved auto values and notes. Returns the number of notes printed."""
    for line in checks.resolutions(config):
        print(f"ldft: {line}")
    for note in notes:
        print(f"ldft: {'warning' if note in warnings else 'note'}: {note}")
    sys.stdout.flush()
    return len(notes)


def _prepare(config: Config, row: dict[str, Any]) -> tuple[Resolved, list[str]]:
    """Everything before the ranks start: fill the row with predictions. Returns the resolved run, and the row's notes that are
    warnings. Raises ConfigError if the ranks must not start."""
    if config.machine.name != THIS:
        raise ConfigError(
            "machine",
            f"{config.machine.name} is not this machine; add dry_run=true, use python -m ldft.plan, or leave it out",
        )
    config.validate()
    hosts.check(config)
    ready = checks.check_machine(config)
    swap_files.prepare(config, ready.deepspeed)
    inputs = checks.check_inputs(ready, fetch=True)
    operators.prepare_cache(ready)
    row |= {"gpu_share_choice": ready.about_share or None, **fit.predictions(ready), **settled.columns(ready)}
    waited = memory_wait.until_it_fits(ready)
    restore_kernel_weights()  # a run that died may have left them changed
    warnings = checks.warnings(ready)
    row["notes"] = [*warnings, *checks.notes(ready), *inputs, *([waited] if waited else [])]
    return ready, warnings


def skip(config: Config, claimed: tuple[Path, int], error_type: str, reason: str) -> Outcome:
    """Write a row that says why this cell of a sweep was not run."""
    folder, number = claimed
    with _row(config, folder, number) as row:
        row |= environment.describe() | {"status": "skipped", "error_type": error_type, "error_message": reason}
    return _finished(config, row, folder)


def lost(
    config: Config, claimed: tuple[Path, int], status: str, reason: str, *, job: str | None, log: str | None
) -> Outcome:
    """Write the row of an attempt whose job ended without one, on another machine, with what its ranks had reported.

    job, log: columns of the row.
    """
    folder, number = claimed
    started = attempt.read_json(folder / "started.json")
    with _row(config, folder, number, started["time"]) as row:
        reports = [attempt.rank_report(folder, rank) for rank in range(config.launch.num_ranks)]
        row |= measured.columns(config, [], reports) if any(reports) else {}
        row |= {
            "status": status,
            "error_message": reason,
            "job_id": job,
            "hosts": [started["host"]] if any(reports) else [],
        }
        row["log_path"] = log
    return _finished(config, row, folder)


def _finished(config: Config, row: dict[str, Any], folder: Path, num_said: int = 0) -> Outcome:
    """The outcome of an attempt whose row is written."""
    return Outcome(row["status"], row, folder / schema.ROW_FILE, num_said, trackers.log(config, folder))


def prepare(config: Config) -> Path:
    """Resolve the values that the run's identity needs from this machine. Returns the results folder, created and writable."""
    check_results(config)
    checks.resolve(config)
    return results_dir(config)


def check_results(config: Config) -> None:
    """Create the results folder. Raises ConfigError if it cannot be used, or a tracker cannot: neither leaves a row, since neither
    says anything about the run."""
    config.results.validate()
    checks.check_results_dir(results_dir(config))


def results_dir(config: Config) -> Path:
    """The results folder, which need not exist yet. Raises ConfigError if results.dir is empty."""
    if not config.results.dir.strip():
        raise ConfigError("results.dir", "empty; name a folder, e.g. results")
    return files.named(config.results.dir, "results.dir").absolute()


@contextmanager
def _row(config: Config, folder: Path, number: int, started: float | None = None) -> Iterator[dict[str, Any]]:
    """The row of an attempt, to be filled inside the context. It is always written, even after a refusal or a bug.

    started: when it began, seconds since the epoch, if not now.
    """
    started = started or time.time()
    row: dict[str, Any] = {
        "run_id": run_id(config),
        "attempt": number,
        "series_id": series_id(config),
        "sweep": config.sweep.name or None,
        "repeat": config.repeat,
        "system": config.system,
        "started_at": datetime.fromtimestamp(started, UTC),
        "hosts": [batch.host()],
        "job_id": batch.job_id(),
        "device_type": config.launch.device.name,
        "status": "error",
        "warmup_iterations": config.train.warmup_iterations,
        "tokens_per_iteration": measured.tokens_per_iteration(config),
    }
    try:
        row["config_json"] = json.dumps(to_dict(config))
        row |= {f"cfg.{key}": value for key, value in flatten(config).items()}
        attempt.write_json(folder / "config.json", to_dict(config))
        yield row
    except ConfigError as error:
        status = "skipped" if isinstance(error, CombinationError) and config.sweep.started_at else "invalid"
        row |= {"status": status, "error_type": type(error).__name__, "error_message": str(error)}
    except signals.Stopped as told:
        found = final_status.stopped(told.name)
        row |= {"status": found.status, "signal": found.signal, "error_message": found.error_message}
    except Exception as error:
        log = folder / "internal-error.log"
        log.write_text(traceback.format_exc())
        row |= {"error_type": type(error).__name__, "error_message": f"internal error: {error}"}
        row["log_path"] = str(log.relative_to(folder.parents[1]))
        raise InternalError(log) from error
    except BaseException as error:
        row |= {"error_type": type(error).__name__, "error_message": f"ended by {type(error).__name__}"}
        raise
    finally:
        row["duration_s"] = time.time() - started
        row["parent_s"] = row["duration_s"] + row.get("parent_s", 0.0)
        _write(row, folder)


def _write(row: dict[str, Any], folder: Path) -> None:
    """Write the row. If the disk is full, remove the trace to make room. Raises ResultsError."""
    try:
        store.write_row(row, folder / schema.ROW_FILE)
    except ResultsError:
        if not row.get("trace_path"):
            raise
        (folder / TRACE_FILE).unlink()
        row["trace_path"] = None
        row["notes"] = [*(row.get("notes") or []), "no trace: it was removed to make room for the row"]
        store.write_row(row, folder / schema.ROW_FILE)


@contextmanager
def _trace(config: Config, folder: Path, row: dict[str, Any]) -> Iterator[Recorder]:
    """A recorder of the run's samples; of several hosts, the first one's agent has it. The trace is always written; the row has its
    path, or a note why there is none."""
    several = config.launch.num_hosts > 1
    recorder = Recorder(folder, 0.0 if several else config.monitor.interval_s)
    try:
        yield recorder
    finally:
        path, notes = hosts.trace(folder, config) if several else recorder.write()
        row["trace_path"] = str(path.relative_to(folder.parents[1])) if path else None
        row["notes"] = [*row["notes"], *notes]


def _run_ranks(
    ready: Resolved, folder: Path, show: Callable[[dict[str, Any]], None], recorder: Recorder
) -> tuple[list[launch.RankExit], final_status.Verdict, float]:
    """Start the ranks and wait for them. Returns the verdict and the seconds waited."""
    config = ready.config
    # The ranks use the parent's decisions: they read neither the user's DeepSpeed file nor the machine's memory again.
    attempt.write_json(folder / attempt.DEEPSPEED, ready.deepspeed)
    attempt.write_json(folder / attempt.CHOICES, ready.choices)
    kills_before = final_status.oom_kills()
    exits: list[launch.RankExit] = []
    interrupted, in_time = None, True
    last_beat = wait_start = time.monotonic()

    def tick() -> None:
        nonlocal last_beat
        show(attempt.rank_report(folder, 0))
        if time.monotonic() - last_beat > attempt.HEARTBEAT_S:
            last_beat = time.monotonic()
            attempt.beat(folder)

    try:
        with (
            signals.noting(),
            _ranks(ready, folder) as ranks,
        ):
            exits = ranks.exits
            wait_start = time.monotonic()
            with recorder.sampling(ranks.by_rank.values()), signals.raising():
                in_time = launch.wait(ranks, config.launch.timeout_s, tick)
    except signals.Stopped as told:
        interrupted = told.name
    waited_s = time.monotonic() - wait_start
    for left_over in folder.glob(".rank-*.tmp"):  # of a rank that was killed while it wrote its report
        left_over.unlink(missing_ok=True)
    reports = [attempt.rank_report(folder, rank) for rank in range(config.launch.num_ranks)]
    states = hosts.states(folder, config)
    kills = final_status.oom_kills() - kills_before + sum(state.get("oom_kills", 0) for state in states)
    passed_s = 0.0 if in_time else config.launch.timeout_s
    decision = final_status.judge(exits, reports, timed_out_s=passed_s, interrupted=interrupted, new_oom_kills=kills)
    if isinstance(ranks, hosts.Hosts) and not interrupted:
        decision = ranks.judged(decision)
    return exits, decision, waited_s


@contextmanager
def _ranks(ready: Resolved, folder: Path) -> Iterator[launch.Ranks | hosts.Hosts]:
    """The ranks at work: here, or by agents on several hosts, which prepare their machines themselves."""
    config = ready.config
    if config.launch.num_hosts > 1:
        with hosts.Hosts(folder, config) as several:
            yield several
        return
    with (
        nullcontext() if ready.stripes else kernel_weights(config.numa.placement),
        swap_files.folder(config, ready.deepspeed),
        launch.Ranks(folder, config.launch.num_ranks, config.launch.device.name) as ranks,
    ):
        yield ranks


def _judged(decision: final_status.Verdict, folder: Path, results_dir: Path) -> dict[str, Any]:
    return {
        "status": decision.status,
        "exit_code": decision.exit_code,
        "signal": decision.signal,
        "error_type": decision.error_type,
        "error_message": decision.error_message,
        "log_path": str((folder / f"worker-{decision.rank}.log").relative_to(results_dir)),
    }
