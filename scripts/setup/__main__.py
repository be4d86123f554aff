"""`python -m scripts.setup run|test`, by scripts/setup.sh: set up the virtual environment VENV unless it is up to date.

run: ldft, its native module and its dependencies, under constraints.txt. test: also the packages for the tests and `make check`.
Compiling the native module takes as long as downloading most packages, so both run concurrently.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from ldft.terminal import seconds
from scripts.setup import failure, needs
from scripts.setup.environment import ROOT, Environment, requirements
from scripts.setup.jobs import Bytecode, Creation, Job, Native, Packages
from scripts.setup.needs import SetupError
from scripts.setup.terminal import Terminal

LOG = ROOT / ".build" / "setup.log"


@contextmanager
def _log(terminal: Terminal) -> Iterator[TextIO]:
    """The emptied log file, locked by one set-up at a time: `make -j check test` starts two."""
    try:
        LOG.parent.mkdir(exist_ok=True)
        log = LOG.open("a")
    except OSError as error:
        raise SetupError(f"cannot write {LOG} ({error.strerror}); use a checkout that you can write") from None
    with log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            terminal.say("another set-up is running here; waiting for it")
            fcntl.flock(log, fcntl.LOCK_EX)
        log.truncate(0)
        yield log


def _finish(jobs: list[Job], terminal: Terminal, environment: Environment) -> Iterator[Job]:
    """Yield the jobs as they end, including jobs added meanwhile. Raises SetupError if one fails, and leaves none running."""
    try:
        while jobs:
            for job in [job for job in jobs if job.ended() is not None]:
                jobs.remove(job)
                job.tidy()
                if job.ended() != 0:
                    raise SetupError(failure.explain(job.title, job.tail, environment.folder, LOG))
                yield job
            if jobs:
                terminal.show("; ".join(filter(None, (job.progress() for job in jobs))))
                time.sleep(0.2)
    finally:
        for job in jobs:
            job.end()
            job.tidy()


def _shown(path: Path) -> str:
    """The shortest form of a path."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def set_up(environment: Environment, test: bool, wanted: str | None, log: TextIO, terminal: Terminal) -> None:
    """Run all steps. wanted: the Python version requested by name. Raises SetupError."""
    before, obstacle = environment.stamped(), environment.obstacle(wanted)
    test = test or bool(before.get("test"))
    # If only the tests' packages are missing, nothing is built.
    built = bool(before) and before | {"test": test} == environment.made_from(test)
    needs.check(environment.folder)
    terminal.say(f"setting up {_shown(environment.folder)}, once; the log is {_shown(LOG)}")
    if obstacle:
        terminal.say(f"{_shown(environment.folder)} is being recreated: {obstacle}")
    try:
        environment.folder.mkdir(parents=True, exist_ok=True)
        environment.unstamp()
    except OSError as error:
        raise SetupError(failure.cannot_write(environment.folder, error.strerror)) from None
    if obstacle or not environment.has_pip():
        [*_finish([Creation(environment.creation(anew=obstacle is not None), log)], terminal, environment)]
    steps = 3 if built and not obstacle else 4
    terminal.say(f"[1/{steps}] virtual environment: Python {environment.made_with()} [{seconds(terminal.elapsed_s)}]")
    environment.forget_unfinished()
    variables = needs.variables(environment.folder) if steps == 4 else {}
    packages = Packages(environment, requirements(test), ROOT / "constraints.txt", log)
    jobs: list[Job] = [packages]
    if steps == 4:
        jobs.append(Native(environment, ROOT, log, variables))
    for number, job in enumerate(_finish(jobs, terminal, environment), 2):
        terminal.say(f"[{number}/{steps}] {job.summary()} [{seconds(terminal.elapsed_s)}]")
        if job is packages:
            jobs.append(Bytecode(environment, test, log))
    environment.stamp(test)


def _wanted() -> str | None:
    """The version in PYTHON if the user named one; `python3` accepts any version."""
    return None if os.environ["PYTHON"] == "python3" else f"{sys.version_info.major}.{sys.version_info.minor}"


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Exit code 0: set up. 1: failed, with a message. 130: interrupted."""
    test = sys.argv[1] == "test"
    environment, terminal = Environment(Path(os.environ["VENV"]).absolute()), Terminal()
    if _wanted() in (None, environment.made_with()) and environment.up_to_date(test):
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        with _log(terminal) as log:
            if not environment.up_to_date(test) or _wanted() not in (None, environment.made_with()):
                set_up(environment, test, _wanted(), log, terminal)
    except SetupError as error:
        terminal.clear()
        print(f"ldft: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        terminal.clear()
        print("ldft: set-up was interrupted; rerun the same command to resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
