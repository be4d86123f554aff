"""The kernel's own weights for weighted interleave: one set for the whole machine, changed only by root, so borrowed with care.

While a run needs other weights than the machine has, it holds a lock; what was there before is in a journal next to it, written
first. A run that dies leaves the journal, and the next start puts the weights back.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldft.memory.policy import (
    MOST_KERNEL_WEIGHT,
    Placement,
    PlacementError,
    kernel_has_weights,
    require_kernel_weights,
)
from ldft.memory.topology import STATUS, SYSFS, WEIGHTS_FOLDER, Topology, auto_file, read_topology, read_weights

STATE = Path("/run/ldft")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@contextlib.contextmanager
def kernel_weights(
    placement: Placement, key: str = "numa", *, sysfs: Path = SYSFS, state: Path = STATE, status: Path = STATUS
) -> Iterator[None]:
    """Have the kernel's weights be those of `placement` while the block runs. Other kinds than weighted_interleave: nothing.

    Raises PlacementError when the kernel cannot do it, when we may not (the line has the commands for root), and when another
    run holds the weights.
    """
    if placement.kind != "weighted_interleave":
        yield
        return
    restore_kernel_weights(sysfs=sysfs, state=state)
    topology = read_topology(sysfs, status)
    placement = placement.resolve(topology, key)
    require_kernel_weights(placement, topology, key, ratio=not _writable(placement, sysfs))
    if kernel_has_weights(placement, topology):
        # As they should be; nobody may change them under us. Without a lock file nobody of us ever has.
        with _lock(state, exclusive=False):
            yield
        return
    with _lock(state, exclusive=True):
        before, auto = read_weights(sysfs)
        journal = {"pid": os.getpid(), "boot": _boot(), "weights": before, "auto": auto}
        # On disk before the first weight changes, whole or not at all.
        temporary = state / f".journal.{os.getpid()}"
        temporary.write_text(json.dumps(journal))
        temporary.replace(state / "journal.json")
        try:
            for node, weight in zip(placement.nodes, placement.weights, strict=True):
                (sysfs / WEIGHTS_FOLDER / f"node{node}").write_text(f"{weight}\n")
            yield
        finally:
            _put_back(sysfs, state)


def can_weight(placement: Placement, topology: Topology, *, sysfs: Path = SYSFS) -> bool:
    """Whether the kernel can weight a whole process by a resolved placement, now or once we have written its weights."""
    if not topology.has_weighted_interleave or max(placement.weights) > MOST_KERNEL_WEIGHT:
        return False
    return kernel_has_weights(placement, topology) or _writable(placement, sysfs)


def restore_kernel_weights(*, sysfs: Path = SYSFS, state: Path = STATE) -> bool:
    """Put back what a run that died had changed. True when there was something. For the start of every run; never raises for lack
    of rights, or because a run that lives holds the weights."""
    if not (state / "journal.json").exists():
        return False
    try:
        with _lock(state, exclusive=True):
            return _put_back(sysfs, state)
    except (PlacementError, OSError):
        return False


def _put_back(sysfs: Path, state: Path) -> bool:
    path = state / "journal.json"
    try:
        journal: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return False
    # A reboot has reset the weights; what the journal knows is of another time.
    if journal["boot"] == _boot():
        for node, weight in journal["weights"].items():
            (sysfs / WEIGHTS_FOLDER / f"node{node}").write_text(f"{weight}\n")
        auto = auto_file(sysfs)
        if journal["auto"] and auto is not None:  # writing a weight has switched it off
            auto.write_text("1\n")
    path.unlink()
    return True


@contextlib.contextmanager
def _lock(state: Path, *, exclusive: bool) -> Iterator[None]:
    """Hold the lock, or raise PlacementError that names its holder. It goes with the process, however that ends."""
    path = state / "lock"
    try:
        if os.access(state.parent, os.W_OK):
            state.mkdir(exist_ok=True)
        file = path.open("a+" if os.access(state, os.W_OK) else "r")
    except OSError as error:
        if not exclusive and isinstance(error, FileNotFoundError):  # root has never changed the weights for anyone
            yield
            return
        raise PlacementError(
            "numa.weights", f"cannot use {path} ({error.strerror}); root must be able to write it"
        ) from error
    with file:
        try:
            fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(state)
            raise PlacementError(
                "numa.weights",
                f"the kernel's weights are in use by another run{holder}; there is one set a machine, wait for it",
            ) from error
        yield


def _holder(state: Path) -> str:
    try:
        return f" (process {json.loads((state / 'journal.json').read_text())['pid']})"
    except (OSError, ValueError, KeyError):
        return ""


def _writable(placement: Placement, sysfs: Path) -> bool:
    return all(os.access(sysfs / WEIGHTS_FOLDER / f"node{node}", os.W_OK) for node in placement.nodes)


def _boot() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
