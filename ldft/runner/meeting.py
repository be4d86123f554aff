"""Where the hosts of a run meet if no SLURM starts its agents: a system such as Kubeflow or SkyPilot starts the same command on
every host, and tells each its number and the address of the first (batch.given).

The first host's parent runs the cell. It listens at that address, starts its own agent, and tells the others, who say their number
first, the attempt's folder, which all of them see. Each of the others runs its agent there until the connection ends.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from ldft import batch
from ldft.batch import Given
from ldft.config import Config, disagreements, from_dict
from ldft.errors import ConfigError
from ldft.results import attempt
from ldft.runner import agent, checks, launch, signals

_END_S = 20.0
# A file system that shows other hosts' files late.
_SEEN_S = 60.0
_ANSWER_S = 10.0
# To tell a first host that waits why this one does not come.
_TELL_S = 3.0


def _agent(folder: Path, log: IO[bytes] | None) -> subprocess.Popen[bytes]:
    """The agent of this host. Its signals come from whoever started it, not from the terminal."""
    return subprocess.Popen(
        [sys.executable, "-m", "ldft.runner.agent", str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        preexec_fn=launch.ends_with_parent(signal.SIGTERM),
    )


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
        self._folder, self._count = folder, given.count
        self._guests = dict[int, socket.socket]()
        self._left = set[int]()
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        try:
            self._server = socket.create_server(("", given.port), family=family, dualstack_ipv6=dual)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(
                "launch.num_hosts", f"port {given.port} ({given.port_name}) cannot be used: {reason}; choose another"
            ) from None
        self._own = _agent(folder, log)  # before there are threads, since it is forked
        threading.Thread(target=self._receive, name="ldft-meeting", daemon=True).start()

    def _receive(self) -> None:
        while True:
            try:
                guest, _ = self._server.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(guest,), name="ldft-guest", daemon=True).start()

    def _serve(self, guest: socket.socket) -> None:
        """Until the other host's agent has ended."""
        number = None
        try:
            with guest, guest.makefile("r") as lines:
                guest.settimeout(_ANSWER_S)
                said = json.loads(lines.readline(1024))
                number = self._admitted(int(said["host"]), int(said["hosts"]), guest)
                if number in self._left:
                    return  # the run is about to end; this one is for the next, and asks again
                folder = None if number is None else str(self._folder)
                _send(guest, hosts=self._count, folder=folder)
                guest.settimeout(None)
                for line in lines if folder else ():
                    self.refused = self.refused or json.loads(line)["refused"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # it is gone, or was none of ours; what its host says last is in its state
        finally:
            if number is not None:
                self._left.add(number)
                self._guests.pop(number, None)

    def _admitted(self, number: int, count: int, guest: socket.socket) -> int | None:
        """The number, if no other guest has it. Two agents of one number would write the same files."""
        return number if count == self._count and self._guests.setdefault(number, guest) is guest else None

    def _working(self) -> bool:
        """Whether an agent of another host runs. One whose state says that it has ended is not waited for: its command may stand
        still."""
        return any(not agent.of_host(self._folder, host).get("ended") for host in list(self._guests))

    @property
    def pids(self) -> list[int]:
        """The agent's, while it or another host's runs."""
        return [self._own.pid] if self._own.poll() is None or self._working() else []

    @property
    def ended_with(self) -> str:
        return f"the agent of this host ended with code {self._own.returncode}"

    def end(self) -> None:
        """End all agents. Those of other hosts write their last state before they close the connection."""
        for guest in list(self._guests.values()):
            try:
                guest.shutdown(socket.SHUT_WR)
            except OSError:
                continue
        _stop(self._own)
        end = time.monotonic() + _END_S
        while self._working() and time.monotonic() < end:
            time.sleep(0.05)
        self._server.close()


def join(given: Given, config: Config) -> int:
    """Run this host's ranks of the run that the first host starts. Returns the exit code. Raises ConfigError if it cannot be
    joined, or is of another command than this host's.

    config: as composed here, before ldft chooses what is left to it.
    """
    try:
        checks.check_joining(config)
    except ConfigError as error:  # the first host, if its command is the same, refuses it as well, and never answers
        with contextlib.suppress(ConfigError, OSError):
            connection, _ = _connect(given, _TELL_S)
            with connection:
                _send(connection, refused=f"{batch.host()}: {error}")
        raise
    connection, said = _connect(given, agent.MEET_S)
    with connection:
        there = f"{given.address}:{given.port}"
        if said["hosts"] != given.count:
            raise ConfigError(
                "launch.num_hosts",
                f"{given.count}, but {there} has a run on {said['hosts']} hosts; correct {given.count_name}, or choose another "
                f"{given.port_name} for each run",
            )
        if said["folder"] is None:
            raise ConfigError(
                "launch.num_hosts",
                f"{there} has host {given.number} ({given.number_name}) already; give each host a number, and each run a port "
                f"({given.port_name}), of its own",
            )
        folder = Path(said["folder"])
        print(f"ldft: host {given.number} of {given.count}: its ranks run in {folder}", flush=True)
        end = time.monotonic() + _SEEN_S
        while not (folder / "config.json").exists():
            if time.monotonic() > end:
                reason = f"{folder} is not there; the results folder must be on a file system that all hosts see"
                _send(connection, refused=f"{batch.host()}: {reason}")
                raise ConfigError("results.dir", reason)
            time.sleep(0.1)
        if differ := disagreements(config, from_dict(attempt.read_json(folder / "config.json"))):
            key, mine, first = differ[0]
            more = f" (and {len(differ) - 1} more keys differ)" if len(differ) > 1 else ""
            reason = f"{mine} here, but {first} on the first host{more}; start the same command on every host"
            _send(connection, refused=f"{batch.host()}: {key}: {reason}")
            raise ConfigError(key, reason)
        return _work(folder, connection)


def _send(connection: socket.socket, **values: Any) -> None:
    connection.sendall(json.dumps(values).encode() + b"\n")


def _connect(given: Given, within_s: float) -> tuple[socket.socket, dict[str, Any]]:
    """The connection, and what the first host answers."""
    end = time.monotonic() + within_s
    while True:
        try:
            found = socket.create_connection((given.address, given.port), timeout=_ANSWER_S)
            if line := _asked(found, given):
                return found, _understood(line, given)
            found.close()
            reason = "it closes the connection"
        except OSError as error:
            reason = str(error)
        if time.monotonic() > end:
            raise ConfigError(
                "launch.num_hosts",
                f"no answer from {given.address}:{given.port} within {within_s:.0f} s ({reason}); see that the first "
                "host runs the same command, and that its port is open",
            )
        time.sleep(0.5)


def _asked(connection: socket.socket, given: Given) -> str:
    """The first host's line; empty if it hangs up. If its machine is lost later, the connection ends within a minute."""
    for option, value in ((socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 4)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    _send(connection, host=given.number, hosts=given.count)
    with connection.makefile("r", errors="replace") as lines:
        line = lines.readline(65536)
    connection.settimeout(None)
    return line


def _understood(line: str, given: Given) -> dict[str, Any]:
    try:
        said = json.loads(line)
        return {"hosts": said["hosts"], "folder": said["folder"]}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            "launch.num_hosts", f"{given.address}:{given.port} ({given.port_name}) is not ldft's; choose another port"
        ) from None


def _work(folder: Path, connection: socket.socket) -> int:
    own = _agent(folder, None)

    def until_told() -> None:
        # An error is the end as well: the first host is lost.
        with contextlib.suppress(OSError):
            while connection.recv(1024):
                pass
        own.terminate()

    threading.Thread(target=until_told, name="ldft-host", daemon=True).start()
    try:
        with signals.noting(), signals.raising():
            code = own.wait()
        if code == agent.CANNOT_SAY:
            reason = f"cannot write in {folder}; all hosts must see it, have room there, and may write"
            with contextlib.suppress(OSError):
                _send(connection, refused=f"{batch.host()}: results.dir: {reason}")
        return code
    except signals.Stopped as told:
        print(f"ldft: {told.name}: the ranks of this host end", file=sys.stderr, flush=True)
        _stop(own)
        return 1
    finally:
        _stop(own)
