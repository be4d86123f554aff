"""A sweep: run the cells of a plan one after the other; a failed cell does not stop the rest.

Progress is stored only in the rows, so that the same command resumes a sweep that died, and two sweeps can share one results
folder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ldft.errors import LdftError, ResultsError
from ldft.results import store
from ldft.results.history import History, Row
from ldft.runner import parent, signals
from ldft.sweep import cell, jobs, slurm
from ldft.sweep.plan import Cell, Plan
from ldft.sweep.view import View
from ldft.terminal import plural

# Reading a loose row takes milliseconds: if there are more than this many, merge them.
_COMPACT_AT = 200


class Sweep:
    """Runs a plan: cell by cell from this process, which starts each cell's processes, or through a launcher on other machines."""

    def __init__(
        self,
        plan: Plan,
        launch_elsewhere: Callable[[list[list[str]]], None] | None = None,
        *,
        queue: jobs.Launcher | None = None,
    ) -> None:
        self._plan = plan
        self._launch_elsewhere = launch_elsewhere
        self._queue = queue
        self._results_dir = parent.results_dir(plan.configs[plan.cells[0].run_id])
        self._history = History(self._results_dir)
        self._view = View(plan, self._results_dir)
        self._bugs: list[BaseException] = []
        self._sources: tuple[Any, ...] | None = None
        self._can_compact = True

    def run(self) -> int:
        """Run every cell that needs it. Returns the exit code: 0 all ok or skipped, 1 otherwise, 130 interrupted.

        Raises ResultsError if a row cannot be written, since no later cell could write one either.
        """
        if self._plan.configs[self._plan.cells[0].run_id].dry_run:
            return self._dry_run()
        parent.check_results(self._plan.configs[self._plan.cells[0].run_id])
        self._plan.save(self._results_dir)
        self._history.refresh()
        todo = [
            (index, one)
            for index, one in enumerate(self._plan.cells)
            if not cell.has_row(self._plan.configs[one.run_id], self._history)
        ]
        self._view.start(self._history, len(todo), elsewhere=bool(self._launch_elsewhere or self._queue))
        if self._queue:
            with signals.noting(), self._view.live():
                if not self._as_jobs(self._queue, todo):
                    return 0
        elif self._launch_elsewhere and todo:
            self._launch_elsewhere([one.overrides for _, one in todo])
        else:
            with signals.noting(), self._view.live():
                left = [(index, one) for index, one in todo if self._cell(index, one) is cell.Do.leave]
                for index, one in left:  # their owners may have died since
                    self._cell(index, one)
        self._history.refresh()
        self._compact()
        if self._bugs:
            raise self._bugs[0]
        return self._view.end(self._history, signals.noted())

    def _as_jobs(self, launcher: jobs.Launcher, todo: list[tuple[int, Cell]]) -> bool:
        """Submit the cells that neither ran nor run, and follow all. False if that is left to ldft.status."""
        number = {one.run_id: index for index, one in todo}
        cells = [one for _, one in todo]
        mine = jobs.Jobs(self._results_dir, self._plan.configs, self._history)
        busy, new = mine.sort(cells)
        if busy:
            self._view.say(f"ldft: waiting or running as jobs already: {plural(len(busy), 'cell')}")
        if new:
            self._view.say(f"ldft: submitted {slurm.ranges(mine.submit(new, launcher))}")
        where = f"python -m ldft.status {self._results_dir}"
        if launcher.detach:
            self._view.say(f"ldft: see {where}; the same command again submits only what neither ran nor runs")
            return False
        mine.follow([*busy, *new], signals.noted, lambda one, done: self._view.finish(number[one.run_id], one, done))
        if signals.noted() and (left := mine.left(cells)):
            self._view.say(
                f"ldft: jobs {slurm.ranges(left)} run on; see squeue --me or {where}; stop them with scancel {slurm.arrays(left)}"
            )
        return True

    def _dry_run(self) -> int:
        """Print one line per cell: its estimated memory, or why it would not run, and whether it already has a row."""
        from ldft.runner import dry_run

        if self._results_dir.is_dir():
            self._history.refresh()
        total, counts = len(self._plan.cells), Counter[str]()
        print(f"ldft: dry run: {plural(total, 'cell')} of {self._plan.name}, nothing is started or written")
        for index, one in enumerate(self._plan.cells, 1):
            config = self._plan.configs[one.run_id]
            what, line = dry_run.summarize(config)
            counts[what] += 1
            if cell.has_row(config, self._history):
                counts["has a row"] += 1
                line += "; already has a row"
            print(f"[{index}/{total}] {one.label}: {line}", flush=True)
        print("ldft: " + ", ".join(f"{what} {count}" for what, count in counts.items()))
        return 2 if counts["invalid"] else 0

    def _cell(self, index: int, one: Cell) -> cell.Do | None:
        """Do what the cell needs. None if the sweep was told to stop, or a bug in ldft stopped the cell."""
        if signals.noted():
            return None
        self._view.begin(index, one)
        done = None
        with self._bug_kept(one):
            done = cell.run(self._plan.configs[one.run_id], self._history, self._view.show)
        if done is None:
            return None
        self._view.finish(index, one, done)
        if done.row and done.do is cell.Do.run:
            self._warn_of_changes(done.row)
        self._compact()
        return done.do

    @contextmanager
    def _bug_kept(self, one: Cell) -> Iterator[None]:
        """Keep a bug in ldft that one cell hits (its row is written) from stopping the other cells; `run` raises it at the end."""
        try:
            yield
        except LdftError:  # about the results folder: no cell could write a row
            raise
        except Exception as error:
            self._view.say(f"ldft: internal error in {one.label}: {type(error).__name__}: {error}")
            self._bugs.append(error)

    def _compact(self) -> None:
        if not self._can_compact or self._history.num_loose() < _COMPACT_AT:
            return
        try:
            store.compact(self._results_dir)
        except (ResultsError, OSError) as error:  # separate files per row work as well
            self._can_compact = False
            self._view.say(f"ldft: warning: {error}")

    def _warn_of_changes(self, row: Row) -> None:
        sources = (row.get("git_commit"), row.get("source_hash"))
        if self._sources and sources != self._sources:
            (commit, source), (new_commit, new_source) = self._sources, sources
            what = (
                f"commit {commit} -> {new_commit}" if commit != new_commit else f"source hash {source} -> {new_source}"
            )
            self._view.say(
                f"ldft: warning: code or config changed during the sweep ({what}): cells before and after may not be comparable"
            )
        self._sources = sources
