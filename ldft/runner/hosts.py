"""The ranks of a run over several hosts: an agent on each (agent.py), started as one step of a SLURM job, or by the command that
another system runs on each host (meeting.py).

Has the interface of launch.Ranks, which runs those of a single host.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

from ldft import batch
from ldft.config import Config
from ldft.errors import ConfigError
from ldft.monitor.trace import TRACE_FILE
from ldft.runner import agent, final_status, launch
from ldft.runner.meeting import Meeting
from ldft.terminal import plural

# An agent that has not written for so long is gone, or cannot write.
SILENT_S = 60.0
_END_S = 20.0


def check(config: Config) -> None:
    """Raise ConfigError if this is not one of as many hosts."""
    hosts, have, given = config.launch.num_hosts, batch.hosts_of_job(), batch.given()
    if given and (hosts > 1 or given.number):
        if hosts != given.count:
            raise ConfigError(
                "launch.num_hosts",
                f"{hosts}, but this is host {given.number} of {given.count} ({given.number_name}, {given.count_name}); use "
                f"launch.num_hosts={given.count}, or start it on one host only",
            )
        return
    if hosts == 1:
        return
    if have is None:
        raise ConfigError(
            "launch.num_hosts",
            f"{hosts}: several hosts need an allocation of SLURM, or NODE_RANK, NNODES and MASTER_ADDR on each (docs/slurm.md); "
            "use -m hydra/launcher=slurm, or start it within salloc or sbatch",
        )
    if have < hosts:
        raise ConfigError(
            "launch.num_hosts", f"{hosts}: this job has {plural(have, 'node')}; use sbatch --nodes={hosts}"
        )


def states(folder: Path, config: Config) -> list[dict[str, Any]]:
    """Of each host, as its agent last wrote it; none on a single host, which has no agent."""
    count = config.launch.num_hosts
    return [agent.of_host(folder, host) for host in range(count)] if count > 1 else []


def columns(folder: Path, config: Config) -> dict[str, Any]:
    """The row's columns about several hosts."""
    found = [state for state in states(folder, config) if state]
    if not found:
        return {}
    environments = {state["host"]: state["environment"] for state in found if "environment" in state}
    return {
        "hosts": [state["host"] for state in found],
        "host_environments_json": json.dumps(environments) if environments else None,
    }


def trace(folder: Path, config: Config) -> tuple[Path | None, list[str]]:
    """The trace that the first host's agent has written, if there is one, and notes for the row."""
    if not config.monitor.interval_s:
        return None, []
    first = agent.of_host(folder, 0)
    notes = first.get("trace_notes", ["no trace: the first host's agent, which takes it, ran no rank or was killed"])
    if not (folder / TRACE_FILE).is_file():
        return None, notes
    return folder / TRACE_FILE, [f"the trace has the ranks of the first host alone, {first['host']}", *notes]


class _Step:
    """The agents as one step of a SLURM job."""

    refused: str | None = None

    def __init__(self, folder: Path, count: int, log: IO[bytes]) -> None:
        self._folder, self._count = folder, count
        self._srun = subprocess.Popen(
            self._command(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Or the step would run on, to no row, until its allocation ends.
            preexec_fn=launch.ends_with_parent(signal.SIGTERM),
        )

    def _command(self) -> list[str]:
        cores = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE", "1")
        shape = [f"--nodes={self._count}", f"--ntasks={self._count}", "--ntasks-per-node=1", f"--cpus-per-task={cores}"]
        # The agent binds its ranks itself. A host that has failed must not take the others' exit states with it.
        rest = ["--overlap", "--cpu-bind=none", "--kill-on-bad-exit=0", f"--wait={int(_END_S)}", "--unbuffered"]
        return ["srun", *shape, *rest, sys.executable, "-m", "ldft.runner.agent", str(self._folder)]

    @property
    def pids(self) -> list[int]:
        return [self._srun.pid] if self._srun.poll() is None else []

    @property
    def ended_with(self) -> str:
        return f"srun ended with code {self._srun.returncode}"

    def end(self) -> None:
        if self._srun.poll() is not None:
            return
        found = (agent.of_host(self._folder, host).get("step") for host in range(self._count))
        if step := next((one for one in found if one), None):
            # srun itself would answer SIGTERM by killing the agents, which then could not say how their ranks ended.
            subprocess.run(["scancel", "--signal=TERM", step], capture_output=True, timeout=_END_S, check=False)
        else:
            self._srun.send_signal(signal.SIGTERM)
        try:
            self._srun.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._srun.kill()
            self._srun.wait()


class Hosts:
    """A context manager: leaving it ends all agents, and with them their ranks."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.exits: list[launch.RankExit] = []
        self.refused: str | None = None
        """Why a host cannot run its ranks."""
        self.silent: str | None = None
        """The host that has not been heard of."""
        self._folder, self._config, self._count = folder, config, config.launch.num_hosts
        self._seen: dict[int, tuple[int, float]] = {}
        self._killed = False
        given = batch.given()
        with (folder / "hosts.log").open("wb") as log:
            self._agents = Meeting(folder, given, log) if given else _Step(folder, self._count, log)

    @property
    def pids(self) -> list[int]:
        """Of what runs the agents, while one runs."""
        return self._agents.pids

    @property
    def by_rank(self) -> dict[int, int]:
        """Empty: the ranks are processes of other hosts."""
        return {}

    def judged(self, decision: final_status.Verdict) -> final_status.Verdict:
        """The verdict with what only the agents know."""
        if self.refused:
            return final_status.Verdict("invalid", exit_code=None, error_type="ConfigError", error_message=self.refused)
        if self.silent:
            lost = (
                f"host {self.silent} was silent for {SILENT_S:.0f} s: it is gone, or cannot write to the results folder"
            )
            return final_status.Verdict("error", exit_code=None, error_type="SilentHost", error_message=lost)
        if decision.status == "error" and (host := self._lost()):
            # The others' ranks say mostly that they lost their connection; but theirs may have been the first failure.
            lost = f"host {host}: its agent ended before its ranks: it was killed, or the host failed"
            if decision.error_message:
                lost += f"; rank {decision.rank}: {decision.error_message}"
            return final_status.Verdict("error", exit_code=None, error_type="LostHost", error_message=lost)
        if decision.status == "ok" and len(self.exits) < self._config.launch.num_ranks:
            log = " ".join((self._folder / "hosts.log").read_text(errors="replace").split())[-300:]
            lost = f"{self._agents.ended_with} before all ranks had run: {log or 'it printed nothing'}"
            return final_status.Verdict("error", exit_code=None, error_type="AgentFailed", error_message=lost)
        return decision

    def _lost(self) -> str | None:
        """A host whose agent began, and is gone without having said how its ranks ended."""
        if self.pids:
            return None
        gone = (state for state in states(self._folder, self._config) if state.get("ready") and not state.get("ended"))
        return next((str(state["host"]) for state in gone), None)

    def poll(self) -> list[launch.RankExit]:
        """Ranks that have ended since the last call."""
        found, now = states(self._folder, self._config), time.monotonic()
        new = self._read(found)
        for host, state in enumerate(found):
            beats = state.get("beats", 0)
            if host not in self._seen or self._seen[host][0] != beats:
                self._seen[host] = beats, now
            why = f"{state['host']}: {state['refused']}" if state.get("refused") else self._agents.refused
            if why and not self.refused:
                self.refused = why
                self.end()
            quiet = now - self._seen[host][1] > (SILENT_S if state else agent.MEET_S)
            if quiet and not state.get("ended") and not self.silent and self.pids:
                self.silent = str(state.get("host") or f"number {host}")
                self.end()
        return new

    def _read(self, found: list[dict[str, Any]]) -> list[launch.RankExit]:
        """Add the exits that the hosts' states have and this does not know; returns them."""
        known = {ended.rank for ended in self.exits}
        new = [launch.RankExit(**one) for state in found for one in state.get("exits", ()) if one["rank"] not in known]
        for ended in new:
            ended.ended_by_us |= self._killed
        self.exits += new
        return new

    def end(self) -> None:
        """Tell every agent to end its ranks, and wait for them."""
        # What ended before was not ended by this: all agents may have ended since the last look.
        self._read(states(self._folder, self._config))
        self._killed = True
        self._agents.end()

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()
        self.poll()
