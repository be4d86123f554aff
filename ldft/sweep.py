"""A sweep: runs the cells of a plan one after the other, whatever becomes of each.

What has been done is told by the rows alone, so that a sweep that died is continued by the same command, and two may work in
one results folder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ldft import cell, rows, runner, stop
from ldft.config import from_dict, run_id
from ldft.errors import LdftError, ResultsError
from ldft.history import History, Row
from ldft.plan import Cell, Plan
from ldft.sweep_view import View

# Reading a loose row costs milliseconds: more than this many are merged.
_COMPACT_AT = 200


class Sweep:
    """Runs a plan. `launch` hands cells to the launcher, which composes each and calls `task`, or its like elsewhere."""

    def __init__(self, plan: Plan, launch: Callable[[list[list[str]], int], None]) -> None:
        self._plan = plan
        self._launch = launch
        self._results_dir = runner.prepare(plan.configs[plan.cells[0].run_id])
        self._history = History(self._results_dir)
        self._view = View(plan, self._results_dir)
        self._now = plan.cells[0]
        self._done: cell.Done | None = None
        self._error: BaseException | None = None
        self._bug: BaseException | None = None
        self._sources: tuple[Any, ...] | None = None

    def task(self, tree: DictConfig) -> None:
        """One cell, called by the launcher. What it raises Hydra swallows, or prints in its own way: it is kept for `run`."""
        try:
            config = from_dict(tree)
            self._done = cell.run(config, self._history, self._view.show)
            if run_id(config) != self._now.run_id:
                # A yaml file was edited since the plan was made. The source hash tells, and warns; onlookers need the new id.
                self._plan.configs[run_id(config)] = config
                self._now.run_id = run_id(config)
                self._plan.save(self._results_dir)
        finally:
            self._error = sys.exc_info()[1]

    def run(self, *, elsewhere: bool = False) -> int:
        """Run every cell that needs it. Returns the exit code: 0 all ok or skipped, 1 not so, 130 interrupted.

        elsewhere: the launcher takes all cells at once, to other machines, and returns when they have ended.
        """
        self._plan.save(self._results_dir)
        self._history.refresh()
        todo = [
            (index, one)
            for index, one in enumerate(self._plan.cells)
            if not cell.has_row(self._plan.configs[one.run_id], self._history)
        ]
        self._view.start(self._history, len(todo))
        if elsewhere:
            if todo:
                self._launch([one.overrides for _, one in todo], 0)
        else:
            with stop.noting(), self._view.live():
                left = [(index, one) for index, one in todo if self._cell(index, one) is cell.Do.leave]
                for index, one in left:  # whoever had them may have died since
                    self._cell(index, one)
        self._history.refresh()
        if self._history.num_loose() >= _COMPACT_AT:
            self._compact()
        if self._bug:
            raise self._bug
        return self._view.end(self._history, stop.noted())

    def _cell(self, index: int, one: Cell) -> cell.Do | None:
        if stop.noted():
            return None
        self._now = one
        self._view.begin(index, one)
        self._error = self._done = None
        try:
            self._launch([one.overrides], index)
        except (HydraException, OmegaConfBaseException) as error:  # a yaml file was edited since the plan was made
            self._error = error
        if isinstance(self._error, LdftError):  # of the results folder: no cell could leave a row
            raise self._error
        if self._done is None:
            # A bug in ldft. Its row says so; the other cells need not suffer from it.
            self._view.say(f"ldft: internal error in {one.label}: {self._error}")
            self._bug = self._bug or self._error
            return None
        self._view.finish(index, one, self._done)
        if self._done.row and self._done.do is cell.Do.run:
            self._warn_of_changes(self._done.row)
        if self._history.num_loose() >= _COMPACT_AT:
            self._compact()
        return self._done.do

    def _compact(self) -> None:
        try:
            rows.compact(self._results_dir)
        except ResultsError as error:
            self._view.say(f"ldft: warning: {error}")

    def _warn_of_changes(self, row: Row) -> None:
        sources = (row.get("git_commit"), row.get("git_dirty"), row.get("source_hash"))
        if self._sources and sources != self._sources:
            self._view.say(
                "ldft: warning: code or config changed during the sweep, cells before and after may not compare: "
                f"commit, dirty, source hash {self._sources} -> {sources}"
            )
        self._sources = sources
