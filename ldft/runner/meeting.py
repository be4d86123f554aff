"""Where the hosts of a run meet if no SLURM starts its agents: a system such as Kubeflow or SkyPilot starts the same command on
every host, and tells each its number and the address of the first (batch.given).

The first host's parent runs the cell. It listens at that address, starts its own agent, and tells the others the attempt's folder,
which all of them see. Each of the others runs its agent there until the connection ends.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

from ldft import batch
from ldft.batch import Given
from ldft.errors import ConfigError
from ldft.runner import agent, signals

_END_S = 20.0
# A file system that shows other hosts' files late.
_SEEN_S = 60.0


def _agent(folder: Path, log: IO[bytes] | None) -> subprocess.Popen[bytes]:
    """The agent of this host. Its signals come from whoever started it, not from the terminal."""
    command = [sys.executable, "-m", "ldft.runner.agent", str(folder)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Meeting:
    """This host's agent, and the connections of the others."""

    def __init__(self, folder: Path, given: Given, log: IO[bytes]) -> None:
        """Raises ConfigError if the port cannot be used."""
        self.refused: str | None = None
        self._folder, self._guests = folder, set[socket.socket]()
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        try:
            self._server = socket.create_server(("", given.port), family=family, dualstack_ipv6=dual)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(
                "launch.num_hosts", f"port {given.port} ({given.port_name}) cannot be used: {reason}; choose another"
            ) from None
        threading.Thread(target=self._receive, name="ldft-meeting", daemon=True).start()
        self._own = _agent(folder, log)

    def _receive(self) -> None:
        while True:
            try:
                guest, _ = self._server.accept()
            except OSError:  # closed
                return
            self._guests.add(guest)
            threading.Thread(target=self._serve, args=(guest,), name="ldft-guest", daemon=True).start()

    def _serve(self, guest: socket.socket) -> None:
        """Until the other host's agent has ended."""
        try:
            guest.sendall(json.dumps({"folder": str(self._folder)}).encode() + b"\n")
            for line in guest.makefile("r"):
                self.refused = self.refused or json.loads(line)["refused"]
        except (OSError, ValueError):
            pass  # it is gone, or was none of ours; what its host says last is in its state
        self._guests.discard(guest)
        guest.close()

    @property
    def pids(self) -> list[int]:
        """The agent's, while it or another host's runs."""
        return [self._own.pid] if self._own.poll() is None or self._guests else []

    @property
    def ended_with(self) -> str:
        return f"the agent of this host ended with code {self._own.returncode}"

    def end(self) -> None:
        """End all agents. Those of other hosts write their last state before they close the connection."""
        for guest in list(self._guests):
            try:
                guest.shutdown(socket.SHUT_WR)
            except OSError:
                continue
        _stop(self._own)
        end = time.monotonic() + _END_S
        while self._guests and time.monotonic() < end:
            time.sleep(0.05)
        self._server.close()


def join(given: Given) -> int:
    """Run this host's ranks of the run that the first host starts. Returns the exit code. Raises ConfigError if it cannot be
    joined."""
    connection = _connect(given)
    with connection, connection.makefile("r") as lines:
        try:
            folder = Path(json.loads(lines.readline())["folder"])
        except (OSError, ValueError, KeyError):
            raise ConfigError(
                "launch.num_hosts",
                f"{given.address}:{given.port} ({given.port_name}) is not ldft's; choose another port",
            ) from None
        print(f"ldft: host {given.number} of {given.count}: its ranks run in {folder}", flush=True)
        end = time.monotonic() + _SEEN_S
        while not (folder / "config.json").exists():
            if time.monotonic() > end:
                reason = f"{folder} is not there; the results folder must be on a file system that all hosts see"
                connection.sendall(json.dumps({"refused": f"{batch.host()}: {reason}"}).encode() + b"\n")
                raise ConfigError("results.dir", reason)
            time.sleep(0.1)
        return _work(folder, connection)


def _connect(given: Given) -> socket.socket:
    end = time.monotonic() + agent.MEET_S
    while True:
        try:
            found = socket.create_connection((given.address, given.port), timeout=10.0)
            found.settimeout(None)
            return found
        except OSError as error:
            if time.monotonic() > end:
                raise ConfigError(
                    "launch.num_hosts",
                    f"no answer from {given.address}:{given.port} within {agent.MEET_S:.0f} s ({error}); see that the first "
                    "host runs the same command, and that its port is open",
                ) from None
        time.sleep(0.5)


def _work(folder: Path, connection: socket.socket) -> int:
    own = _agent(folder, None)

    def until_told() -> None:
        while connection.recv(1024):
            pass
        own.terminate()

    threading.Thread(target=until_told, name="ldft-host", daemon=True).start()
    try:
        with signals.noting(), signals.raising():
            return own.wait()
    except signals.Stopped as told:
        print(f"ldft: {told.name}: the ranks of this host end", file=sys.stderr, flush=True)
        _stop(own)
        return 1
    finally:
        _stop(own)
