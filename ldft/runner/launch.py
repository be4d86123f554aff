"""Start the rank processes, bind them to cores, watch them, stop them.

Not torchrun: killing its agent orphans the ranks, and it reports a segfault as exit code 1. Each rank is a fresh interpreter in its
own session, so that one signal to its process group also ends the processes it started (compilers, for example).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ldft.runner import cpu_limits
from ldft.runner.core_binding import cores_of_ranks

_PR_SET_PDEATHSIG = 1


@dataclass(slots=True)
class RankExit:
    """How a rank ended, as wait4 reports it."""

    rank: int
    exit_code: int | None
    """None if a signal ended the rank."""
    signal: str | None
    peak_rss_gib: float
    ended_by_us: bool
    """ldft sent SIGKILL to its group before its end was seen."""


def _headers() -> dict[str, str]:
    """Environment with Python's C headers, which DeepSpeed compiles against and `make` unpacks if the machine lacks them."""
    include = Path(sys.prefix) / "headers" / "usr" / "include"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return {"CPATH": f"{include / version}:{include}"} if include.is_dir() else {}


def ends_with_parent(number: signal.Signals) -> Callable[[], None]:
    """To be called in a new process, which gets this signal when its parent, however it ended, is gone."""
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def set_up() -> None:
        # Nothing later clears the death signal; but if the parent has died already, the signal never comes.
        libc.prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os._exit(1)

    return set_up


class Ranks:
    """The rank processes of one run on this host. A context manager: leaving it ends all remaining processes and removes the
    rendezvous.

    first, world: number of the first rank here, and of all ranks, if there are other hosts; init_method: where the ranks meet then.
    """

    def __init__(
        self,
        attempt_dir: Path,
        num_ranks: int,
        device: str,
        *,
        first: int = 0,
        world: int | None = None,
        init_method: str | None = None,
    ) -> None:
        self._first, self._world, self._init_method = first, world or num_ranks, init_method
        self.exits: list[RankExit] = []
        self._processes: dict[int, tuple[int, subprocess.Popen[bytes]]] = {}
        self._killed = False
        # A file store needs a file system with working locks, which a results folder on a network file system may lack.
        self._rendezvous_dir = tempfile.mkdtemp(prefix="ldft-rendezvous-")
        end_with_parent = ends_with_parent(signal.SIGKILL)
        quota = cpu_limits.quota()
        try:
            for rank, cores in enumerate(cores_of_ranks(num_ranks, device)):

                def bind(cores: list[int] = cores) -> None:
                    end_with_parent()
                    os.sched_setaffinity(0, cores)
                    # SLURM sends it to every process of a job; the parent decides.
                    signal.signal(signal.SIGUSR2, signal.SIG_IGN)

                with (attempt_dir / f"worker-{first + rank}.log").open("wb") as log:
                    process = subprocess.Popen(
                        [sys.executable, "-m", "ldft.worker", str(attempt_dir)],
                        env=self._environment(rank, num_ranks, cpu_limits.threads(cores, num_ranks, quota), device),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                        preexec_fn=bind,
                    )
                self._processes[process.pid] = (first + rank, process)
            self._guard = self._start_guard()
        except BaseException:
            self._kill()
            self._collect(block=True)
            shutil.rmtree(self._rendezvous_dir, ignore_errors=True)
            raise

    def _environment(self, rank: int, num_ranks: int, num_threads: int, device: str) -> dict[str, str]:
        tools = str(Path(sys.executable).parent)  # ninja is beside Python, even if the environment is not activated
        return (
            os.environ
            | _headers()
            | {
                "RANK": str(self._first + rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self._world),
                "LOCAL_WORLD_SIZE": str(num_ranks),
                # As DeepSpeed's launcher sets it. Without it, each reduction of gradients on CPUs starts `numactl --hardware`.
                "LOCAL_SIZE": str(num_ranks),
                "LDFT_RENDEZVOUS_DIR": self._rendezvous_dir,
                "LDFT_INIT_METHOD": self._init_method or f"file://{self._rendezvous_dir}/store",
                "OMP_NUM_THREADS": str(num_threads),
                # OpenMP would bind the main thread to one core, and with it all threads that ldft starts.
                "OMP_PROC_BIND": "false",
                "DS_ACCELERATOR": device,
                "PATH": tools + os.pathsep + os.environ.get("PATH", os.defpath),
                "PYTHONUNBUFFERED": "1",
            }
        )

    def _start_guard(self) -> subprocess.Popen[bytes]:
        """Start a shell that outlives this process: if this process is killed, the shell's input closes and it kills all ranks'
        groups.

        The ranks' death signal alone would leave behind processes that they started, such as compilers.
        """
        groups = [f"-{pid}" for pid in self._processes]
        script = 'read -r _; dir=$1; shift; kill -KILL -- "$@" 2>/dev/null; rm -rf -- "$dir"'
        return subprocess.Popen(
            ["/bin/sh", "-c", script, "ldft-guard", self._rendezvous_dir, *groups],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def pids(self) -> list[int]:
        """Pids of the ranks that are still running."""
        return list(self._processes)

    @property
    def by_rank(self) -> dict[int, int]:
        """Rank -> pid, of the ranks that are still running."""
        return {rank: pid for pid, (rank, _) in self._processes.items()}

    def poll(self) -> list[RankExit]:
        """Reap ranks that have ended; returns the newly ended ones."""
        return self._collect(block=False)

    def _collect(self, *, block: bool) -> list[RankExit]:
        ended = []
        for pid, (rank, process) in list(self._processes.items()):
            done, status, usage = os.wait4(pid, 0 if block else os.WNOHANG)
            if done == 0:
                continue
            code = os.waitstatus_to_exitcode(status)
            process.returncode = code  # Popen must not wait for a process that was reaped
            del self._processes[pid]
            # Kill everything that the rank started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            ended.append(
                RankExit(
                    rank=rank,
                    exit_code=code if code >= 0 else None,
                    signal=signal.Signals(-code).name if code < 0 else None,
                    peak_rss_gib=usage.ru_maxrss / 2**20,
                    ended_by_us=self._killed,
                )
            )
        self.exits += ended
        return ended

    def _kill(self) -> None:
        self._killed = True
        for pid in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill every rank now, with everything it started, and reap it."""
        self._kill()
        self._collect(block=True)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()
        self._guard.kill()
        self._guard.communicate()
        shutil.rmtree(self._rendezvous_dir, ignore_errors=True)


class Processes(Protocol):
    """What `wait` needs of a run's ranks."""

    @property
    def pids(self) -> list[int]: ...

    def poll(self) -> list[RankExit]: ...

    def end(self) -> None: ...


def wait(
    ranks: Processes, timeout_s: float, on_tick: Callable[[], None], grace_s: float = 5.0, interval_s: float = 0.1
) -> bool:
    """Wait until every rank has ended, calling `on_tick()` about every `interval_s`.

    After the first failure, the other ranks, which may hang in a collective forever, get `grace_s` seconds to exit.
    Returns False if `timeout_s` (0: none) passed first; the caller must then end the ranks.
    """
    start = time.monotonic()
    first_failure = None
    while ranks.pids:
        for ended in ranks.poll():
            if ended.exit_code != 0 and first_failure is None:
                first_failure = time.monotonic()
        on_tick()
        now = time.monotonic()
        if timeout_s and now - start > timeout_s:
            return False
        if first_failure is not None and now - first_failure > grace_s:
            ranks.end()
        time.sleep(interval_s if ranks.pids else 0)
    return True
