"""The part of one host in a run over several: `python -m ldft.runner.agent ATTEMPT_DIR`, which the parent's srun starts on each.

It checks what this host must have, waits for the others, and runs this host's ranks as the parent does on a single host: bound to
its cores, ended with it. Its state is in host-<h>.json, rewritten every few seconds: the parent ends a run whose hosts are silent.
"""

from __future__ import annotations

import dataclasses
import socket
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ldft import batch, environment
from ldft.config import Config, from_dict
from ldft.errors import ConfigError
from ldft.memory.kernel_weights import kernel_weights, restore_kernel_weights
from ldft.monitor.trace import Recorder
from ldft.preflight import fit
from ldft.results import attempt
from ldft.runner import checks, final_status, launch, signals, swap_files
from ldft.training.deepspeed import operators

BEAT_S = 5.0
# The other hosts may still be importing Python from a slow file system.
MEET_S = 300.0
CANNOT_SAY = 2
# What may differ between hosts, by the row's column names.
SHOWN = ("kernel", "cpu", "num_cores", "host_memory_gib", "gpus", "driver")


class HostState:
    """host-<h>.json."""

    def __init__(self, folder: Path, host: int) -> None:
        self._path = folder / f"host-{host}.json"
        self._values: dict[str, Any] = {"host": batch.host(), "exits": [], "beats": 0}
        self._last = 0.0

    def put(self, **values: Any) -> None:
        """Raises ConfigError if the results folder takes no files from here."""
        self._values |= values
        self._values["beats"] += 1
        self._last = time.monotonic()
        try:
            attempt.write_json(self._path, self._values)
        except OSError as error:
            raise ConfigError(
                "results.dir",
                f"cannot write in {self._path.parent} ({error.strerror}); all hosts must see it, have room there, and may write",
            ) from None

    def beat(self) -> None:
        if time.monotonic() - self._last > BEAT_S:
            self.put()


def of_host(folder: Path, host: int) -> dict[str, Any]:
    """The last state of a host; empty if its agent has not begun."""
    return attempt.read_json(folder / f"host-{host}.json")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("", 0))
        return int(one.getsockname()[1])


def _until(ready: Callable[[], bool], state: HostState, what: str) -> None:
    """Raises ConfigError if it does not become true in time."""
    end = time.monotonic() + MEET_S
    while not ready():
        if time.monotonic() > end:
            raise ConfigError(
                "launch.num_hosts", f"{what} within {MEET_S:.0f} s; see that all hosts see the results folder"
            )
        state.beat()
        time.sleep(0.1)


def _run(folder: Path, config: Config, host: int, state: HostState) -> int:
    hosts, local = config.launch.num_hosts, config.launch.ranks_per_host
    ready = checks.check_machine(config)
    swap_files.prepare(config, ready.deepspeed)
    fit.check(ready)
    restore_kernel_weights()
    operators.prepare_cache(ready)
    own: dict[str, Any] = {"environment": {name: environment.describe()[name] for name in SHOWN}}
    if host == 0:
        own |= {"init_method": f"tcp://{batch.address()}:{_free_port()}"}
    state.put(ready=True, **own)
    _until(lambda: all(of_host(folder, one).get("ready") for one in range(hosts)), state, "not all hosts were ready")
    init_method = of_host(folder, 0)["init_method"]
    kills = final_status.oom_kills()

    def tick() -> None:
        found = [dataclasses.asdict(one) for one in ranks.exits]
        if len(found) != seen[0]:
            seen[0] = len(found)
            state.put(exits=found, oom_kills=final_status.oom_kills() - kills)
        state.beat()

    seen = [0]
    exits: list[launch.RankExit] = []
    # One trace, of one host, whose clock and nodes it has.
    recorder = Recorder(folder, config.monitor.interval_s if host == 0 else 0.0)
    signals.note()
    try:
        with (
            nullcontext() if ready.stripes else kernel_weights(config.numa.placement),
            swap_files.folder(config, ready.deepspeed),
            launch.Ranks(
                folder,
                local,
                config.launch.device.name,
                first=host * local,
                world=config.launch.num_ranks,
                init_method=init_method,
            ) as ranks,
        ):
            exits = ranks.exits
            with recorder.sampling(ranks.by_rank.values()), signals.raising():
                launch.wait(ranks, 0.0, tick)
    except signals.Stopped:
        pass
    # Whoever reads that it has ended may tell it to end, which must not become its exit code.
    signals.ignore()
    said: dict[str, Any] = {"trace_notes": recorder.write()[1]} if host == 0 else {}
    kills = final_status.oom_kills() - kills
    state.put(exits=[dataclasses.asdict(one) for one in exits], oom_kills=kills, ended=True, **said)
    return 0


def main() -> int:
    """Returns 0 if its ranks ran, whatever became of them; the parent judges. CANNOT_SAY if its state does not tell why not."""
    folder, host = Path(sys.argv[1]), batch.host_number()
    state = HostState(folder, host)
    config = from_dict(attempt.read_json(folder / "config.json"))
    try:
        state.put(step=batch.step())
        return _run(folder, config, host, state)
    except ConfigError as error:
        signals.ignore()
        try:
            state.put(refused=str(error), ended=True)
        except ConfigError:
            print(f"ldft: {error}", file=sys.stderr)
            return CANNOT_SAY
        return 1


if __name__ == "__main__":
    sys.exit(main())
