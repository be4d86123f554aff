"""One cell of a sweep: whether it is to run, decided where it runs and from what is on disk, and then running it."""

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
    """run it; keep the row it has; leave it to the process that has claimed it; skip it with a row."""

    run = "run"
    keep = "keep"
    leave = "leave"
    skip = "skip"


@dataclass(slots=True)
class Decision:
    do: Do
    number: int
    """The attempt that the decision is about: the one to claim, or the newest there is."""
    reason: str = ""


@dataclass(slots=True)
class Done:
    """What became of a cell in this sweep."""

    do: Do
    row: Row | None
    """Its newest row; None for one that runs elsewhere."""


def _stays(row: Row, config: Config) -> bool:
    """Whether a row answers the cell, so that it is not to run again."""
    status = row["status"]
    if status == "interrupted":
        return False
    if row["error_type"] in (BACKSTOP, DOES_NOT_FIT):
        return False  # judged anew, which is quick
    if config.rerun is Rerun.missing:
        return True
    # What another sweep ran since this one began is as new as what we would run ourselves.
    if row["started_at"].timestamp() >= config.sweep.started_at:
        return True
    return config.rerun is Rerun.failed and status not in _FAILED


def _still_does_not_fit(config: Config) -> bool:
    """Whether a run that was refused for memory would be refused again; not so with `force`, or once others have freed theirs."""
    try:
        fit.check(resolve(config))
    except ConfigError as error:
        return isinstance(error, fit.DoesNotFitError)
    return False


def has_row(config: Config, history: History) -> bool:
    """Whether a cell is answered by what `history` last saw; if so, it need not be launched at all."""
    row = history.row(run_id(config), history.latest_number(run_id(config)))
    return row is not None and _stays(row, config)


def decide(config: Config, history: History) -> Decision:
    """What to do with a cell. Reads the results folder, changes nothing."""
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
            f"({shorter['run_id']}/attempt-{shorter['attempt']}); sweep.oom_backstop=false runs it all the same",
        )
    return Decision(Do.run, number + 1)


def run(config: Config, history: History, show: Callable[[dict[str, Any]], None] | None = None) -> Done:
    """Decide about a cell and do it. Returns what became of it; raises as runner.run does."""
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
