"""The kernel's own weights for weighted interleave: one set for the whole machine, writable only by root, changed temporarily.

While a run needs weights other than the machine's, it holds a lock; the previous weights are saved in a journal beside the lock
before anything changes. If a run dies, the journal remains, and the next run restores the weights.
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
    """Set the kernel's weights to those of `placement` while the block runs. Does nothing for kinds other than weighted_interleave.

    Raises PlacementError if the kernel does not support weights, if this process may not write them (the message gives the
    commands for root), and if another run holds them.
    """
    if placement.kind != "weighted_interleave":
        yield
        return
    restore_kernel_weights(sysfs=sysfs, state=state)
    topology = read_topology(sysfs, status)
    placement = placement.resolve(topology, key)
    require_kernel_weights(placement, topology, key, ratio=not _writable(placement, sysfs))
    if kernel_has_weights(placement, topology):
        # The weights are right already; hold the lock so that no other run changes them. Without a lock file no run ever has.
        with _lock(state, exclusive=False):
            yield
        return
    with _lock(state, exclusive=True):
        before, auto = read_weights(sysfs)
        journal = {"pid": os.getpid(), "boot": _boot(), "weights": before, "auto": auto}
        # Written atomically, and on disk before the first weight changes.
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
    """Whether the kernel can apply a resolved placement's weights to a whole process, now or after ldft has written the weights."""
    if not topology.has_weighted_interleave or max(placement.weights) > MOST_KERNEL_WEIGHT:
        return False
    return kernel_has_weights(placement, topology) or _writable(placement, sysfs)


def restore_kernel_weights(*, sysfs: Path = SYSFS, state: Path = STATE) -> bool:
    """Restore weights that a dead run left changed; return True if there were any. Called at the start of every run. Never raises
    for lack of permission, or because a live run holds the weights."""
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
    # A reboot has reset the weights, so the journal is out of date.
    if journal["boot"] == _boot():
        for node, weight in journal["weights"].items():
            (sysfs / WEIGHTS_FOLDER / f"node{node}").write_text(f"{weight}\n")
        auto = auto_file(sysfs)
        if journal["auto"] and auto is not None:  # writing a weight switched auto off
            auto.write_text("1\n")
    path.unlink()
    return True


@contextlib.contextmanager
def _lock(state: Path, *, exclusive: bool) -> Iterator[None]:
    """Hold the lock, or raise PlacementError that names its holder. The kernel releases it however the process ends."""
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
                f"the kernel's weights are in use by another run{holder}; a machine has one set, so wait until that run ends",
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
