"""One cell of a sweep: decide whether it must run, on the machine where it would run and from the files there; then run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ldft.config import Config, Rerun, run_id, series_id
from ldft.errors import ConfigError
from ldft.preflight import fit
from ldft.preflight.resolved import resolve
from ldft.results import attempt
from ldft.results.history import OOM, History, Row
from ldft.runner import parent

BACKSTOP = "OomBackstop"
DOES_NOT_FIT = fit.DoesNotFitError.__name__
_FAILED = ("error", "timeout", "invalid", *OOM)


class Do(Enum):
    """run it; keep its existing row; leave it to the process that claimed it; write a row with status skipped."""

    run = "run"
    keep = "keep"
    leave = "leave"
    skip = "skip"


@dataclass(slots=True)
class Decision:
    do: Do
    number: int
    """The attempt that the decision concerns: the one to claim, or the newest existing one."""
    reason: str = ""


@dataclass(slots=True)
class Done:
    """The outcome of a cell in this sweep."""

    do: Do
    row: Row | None
    """Its newest row; None if another process runs it."""


def _stays(row: Row, config: Config) -> bool:
    """Whether a row is a valid result of the cell, so that the cell need not run again."""
    status = row["status"]
    if status == "interrupted":
        return False
    if row["error_type"] in (BACKSTOP, DOES_NOT_FIT):
        return False  # decide again, which is quick
    if config.rerun is Rerun.missing:
        return True
    # A row that another sweep wrote since this one began is as new as one from this sweep.
    if row["started_at"].timestamp() >= config.sweep.started_at:
        return True
    return config.rerun is Rerun.failed and status not in _FAILED


def _still_does_not_fit(config: Config) -> bool:
    """Whether a run refused for lack of memory would be refused again; False with `force`, or once enough memory is free."""
    try:
        fit.check(resolve(config))
    except ConfigError as error:
        return isinstance(error, fit.DoesNotFitError)
    return False


def has_row(config: Config, history: History) -> bool:
    """Whether `history`, as last read, has a valid row for the cell; if so, do not launch it."""
    row = history.row(run_id(config), history.latest_number(run_id(config)))
    return row is not None and _stays(row, config)


def decide(config: Config, history: History) -> Decision:
    """Decide what to do with a cell. Reads the results folder, changes nothing."""
    number, row, alive = history.newest(run_id(config))
    if alive:
        return Decision(Do.leave, number)
    if row and _stays(row, config):
        return Decision(Do.keep, number)
    if row and row["error_type"] == DOES_NOT_FIT and _still_does_not_fit(config):
        return Decision(Do.keep, number)
    shorter = None
    if config.sweep.oom_backstop:
        shorter = history.out_of_memory(series_id(config), config.seq_len.tokens)
    if shorter:
        if row and row["error_type"] == BACKSTOP:
            return Decision(Do.keep, number)
        return Decision(
            Do.skip,
            number + 1,
            f"the same at seq_len.tokens={shorter['cfg.seq_len.tokens']} ended as {shorter['status']} "
            f"({shorter['run_id']}/attempt-{shorter['attempt']}); set sweep.oom_backstop=false to run it anyway",
        )
    return Decision(Do.run, number + 1)


def run(config: Config, history: History, show: Callable[[dict[str, Any]], None] | None = None) -> Done:
    """Decide what to do with a cell and do it. Returns the outcome; raises as runner.run does."""
    results_dir = parent.prepare(config)
    while True:
        decision = decide(config, history)
        if decision.do is Do.leave:
            return Done(decision.do, None)
        if decision.do is Do.keep:
            return Done(decision.do, history.row(run_id(config), decision.number))
        folder = attempt.try_claim(results_dir, run_id(config), decision.number)
        if folder:
            break
    if decision.do is Do.skip:
        return Done(decision.do, parent.skip(config, (folder, decision.number), BACKSTOP, decision.reason).row)
    return Done(decision.do, parent.run(config, (folder, decision.number), show).row)
