"""`python -m ldft.status [RESULTS_DIR]`: progress of a sweep, even one that runs elsewhere or has ended. Only reads files."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from ldft import closed_pipe, files
from ldft.errors import ConfigError, LdftError
from ldft.results import attempt, places
from ldft.results.history import History
from ldft.sweep import slurm
from ldft.sweep.jobs import submitted
from ldft.sweep.plan import Cell, Plan, load_plans
from ldft.sweep.view import Clock, at_work, columns, measured, report_lines
from ldft.terminal import Parser


def _queue(plan: Plan, history: History) -> tuple[dict[str, str], dict[str, slurm.Job]]:
    """Job by run_id, of cells without a row that were submitted to SLURM; and those of the jobs that wait or run."""
    jobs = {}
    for one in plan.cells:
        if not history.latest_number(one.run_id) and (job := submitted(history.results_dir, one.run_id)):
            jobs[one.run_id] = job
    try:
        return jobs, slurm.queued(jobs.values())
    except LdftError:  # not a machine of the cluster
        return jobs, {}


def _line(one: Cell, history: History, job: str | None, queued: slurm.Job | None) -> tuple[list[str], bool]:
    """Label, status and figures of a cell; and whether it is pending or running. job: its job, if it has no row yet."""
    number = max([history.latest_number(one.run_id), *attempt.numbers(history.results_dir, one.run_id)])
    row = history.row(one.run_id, number)
    if row:
        words = measured(row)
        return [one.label, row["status"], " ".join(words)], False
    folder = attempt.folder_of(history.results_dir, one.run_id, number)
    if not number:
        if queued:
            why = "" if queued.nodes == "(None)" else f" {queued.nodes}"  # SLURM has not looked at it yet
            return [one.label, "queued", f"job {job} {queued.state.lower()}{why}"], True
        return [one.label, "pending", f"job {job} is not in the queue here" if job else ""], True
    if not attempt.is_alive(folder):
        return [one.label, "abandoned", "its process is gone; rerun the sweep's command to run it again"], True
    started = attempt.read_json(folder / "started.json")
    doing = at_work(attempt.rank_report(folder, 0), one.tokens_per_iteration)
    on = f", job {job}, {queued.left} left" if queued else ""
    return [one.label, "running", f"{doing}, on {started['host']} pid {started['pid']}{on}"], True


def lines(plan: Plan, history: History) -> list[str]:
    """The plan, cell by cell, then the sweep's summary and the time left."""
    clock = Clock()
    table, to_come = [], []
    jobs, queue = _queue(plan, history)
    for index, one in enumerate(plan.cells):
        clock.add(one, history.row(one.run_id, history.latest_number(one.run_id)))
        job = jobs.get(one.run_id)
        line, open_ = _line(one, history, job, queue.get(job or ""))
        table.append([f"[{index + 1}/{len(plan.cells)}]", *line])
        if open_:
            to_come.append(one)
    began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(plan.started_at))
    text = [f"sweep {plan.name}, started {began} on {plan.host}", *columns(table), *report_lines(plan, history)]
    left = clock.left(to_come)
    return [*text, f"ldft: {left}"] if left else text


def _no_sweep(folder: Path, name: str | None) -> str:
    """The line for a results folder without a sweep, or without the one of that name."""
    line = f"{folder} contains no sweep{f' {name}' if name else ''}"
    further = places.further_down(folder)
    return f"{line}; rows {further}" if further else line


@closed_pipe.stop
def main() -> int:
    """Returns the exit code: 0, or 2 if the folder or the sweep does not exist, or 1 if it cannot be read."""
    parser = Parser(prog="python -m ldft.status", description="Show the progress of a sweep.")
    parser.add_argument("results_dir", nargs="?", default="results", help="default: results")
    parser.add_argument("--sweep", help="name of the sweep; default: the one started last")
    parser.add_argument("--watch", action="store_true", help="refresh every two seconds until Ctrl-C")
    arguments = parser.parse_args()
    try:
        folder = files.named(arguments.results_dir, "results folder")
    except ConfigError as error:
        print(f"ldft: {error}", file=sys.stderr)
        return 2
    if not folder.exists():
        print(f"ldft: {folder} is not a folder; name the results.dir of a sweep", file=sys.stderr)
        return 2
    if places.of_one_run(folder) is not None:
        folder = places.results_dir(folder)
    history = History(folder)
    try:
        while True:
            history.refresh()
            plans = [plan for plan in load_plans(folder) if arguments.sweep in (None, plan.name)]
            if not plans:
                print(f"ldft: {_no_sweep(folder, arguments.sweep)}", file=sys.stderr)
                return 2
            text = lines(plans[0], history)
            if arguments.watch:
                print("\x1b[2J\x1b[H", end="")
            print("\n".join(text))
            for path, problem in history.unreadable.items():
                print(f"ldft: skipped unreadable {path}: {problem}")
            others = [plan.name for plan in plans[1:]]
            if others:
                print(f"ldft: other sweeps here (use --sweep): {', '.join(dict.fromkeys(others))}")
            if not arguments.watch:
                return 0
            sys.stdout.flush()
            time.sleep(2)
    except LdftError as error:
        print(f"ldft: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
