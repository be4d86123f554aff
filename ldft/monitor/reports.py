"""What runs say of themselves, in files that any user of the machine can have written: anything that ldft would not write there is
not readable, and never an error of the monitor."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldft.monitor.samples import RoleUse

# Far above what ldft writes: a file beyond would only keep the monitor busy.
_LARGEST_BYTES = 64 << 20
_MOST_RANKS = 1 << 14
_MOST_NODES = 1 << 15
_LARGEST = 1 << 60


@dataclass(frozen=True, slots=True)
class About:
    """What is shown of a run's config."""

    title: str = ""
    """Model, length and policy; empty if the config is not readable."""
    num_ranks: int = 0
    iterations: int | None = None
    tokens: int = 0
    """Of an iteration, over all ranks."""


@dataclass(frozen=True, slots=True)
class Report:
    """What is shown of a rank's report."""

    pid: int | None = None
    phase: str = "start"
    phase_text: str = "starting Python"
    times: tuple[float, ...] = ()
    """Seconds of each iteration."""
    update_s: float | None = None
    roles: tuple[RoleUse, ...] = ()
    pinned: int | None = None
    gpu_uuid: str | None = None


class Reports:
    """JSON files of attempts, read again only after a change."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, int, int], Any]] = {}
        self.forbidden: set[Path] = set()
        """Files that may not be read."""
        self.unreadable: set[Path] = set()
        """Files that ldft has not written so."""

    def about(self, folder: Path) -> About:
        """Of an attempt; empty if its config is not there yet or not readable."""
        return self._read(folder / "config.json", _about) or About()

    def rank(self, folder: Path, rank: int) -> Report:
        """The last report of a rank; as at its start if there is none yet or it is not readable."""
        return self._read(folder / f"rank-{rank}.json", _report) or Report()

    def _read(self, path: Path, parse: Callable[[Any], Any]) -> Any:
        try:
            found = path.stat()
            key = (found.st_ino, found.st_mtime_ns, found.st_size)
            known = self._known.get(path)
            if known is None or known[0] != key:
                # Opening a pipe would wait for whoever writes into it.
                regular = stat.S_ISREG(found.st_mode) and found.st_size <= _LARGEST_BYTES
                text = path.read_text(encoding="utf-8") if regular else ""
                known = self._known[path] = (key, _parsed(text, parse))
        except FileNotFoundError:
            return None
        except PermissionError:
            self.forbidden.add(path)
            return None
        except (OSError, UnicodeDecodeError):
            self.unreadable.add(path)
            return None
        (self.unreadable.add if known[1] is None else self.unreadable.discard)(path)
        return known[1]

    def forget_others(self, folders: set[Path]) -> None:
        """Keep only the files in these folders."""
        self._known = {path: known for path, known in self._known.items() if path.parent in folders}
        self.forbidden = {path for path in self.forbidden if path.parent in folders}
        self.unreadable = {path for path in self.unreadable if path.parent in folders}


class _NotOursError(ValueError):
    """A value that ldft does not write."""


def _parsed(text: str, parse: Callable[[Any], Any]) -> Any:
    """None if it is not what ldft writes."""
    try:
        return parse(json.loads(text))
    except (ValueError, RecursionError):  # no JSON, or so deeply nested that Python gives up
        return None


def _of(value: Any, kind: type, default: Any = None) -> Any:
    """The value, if it is of this type, or the default for None. Raises _NotOursError."""
    if value is None and default is not None:
        return default
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _NotOursError
    return value


def _number(value: Any, kind: Any = int | float) -> Any:
    """A number from 0 with which everything below can count. Raises _NotOursError."""
    if not isinstance(value, kind) or isinstance(value, bool) or not (math.isfinite(value) and 0 <= value <= _LARGEST):
        raise _NotOursError
    return value


def _about(said: Any) -> About:
    """Raises _NotOursError."""
    model, length, numa, train, launch = (
        _of(_of(said, dict).get(part), dict) for part in ("model", "seq_len", "numa", "train", "launch")
    )
    tokens, ranks = _number(length.get("tokens"), int), _number(launch.get("num_ranks"), int)
    # Files from before these keys existed lack them.
    sharing = _number(launch.get("sequence_parallel", 1), int)
    if ranks > _MOST_RANKS or not sharing:
        raise _NotOursError
    sequences = _number(train.get("micro_batch_size"), int) * _number(train.get("gradient_accumulation_steps"), int)
    return About(
        title=f"{_of(model.get('name'), str)}, {tokens} tokens, numa={_of(numa.get('name'), str)}",
        num_ranks=ranks,
        iterations=_number(train.get("iterations"), int),
        tokens=_number(sequences * (ranks // sharing) * tokens, int),
    )


def _report(said: Any) -> Report:
    """Raises _NotOursError."""
    said, at_first = _of(said, dict), Report()
    times = tuple(_number(time_s) for time_s in _of(said.get("iteration_s"), list, []))
    uuid = _of(said.get("gpu_uuid"), str, "")
    if 0 in times[-1:] or not (uuid.isascii() and uuid.isprintable()):
        raise _NotOursError
    return Report(
        pid=_number(said["pid"], int) if "pid" in said else None,
        phase=_of(said.get("phase"), str, at_first.phase),
        phase_text=_of(said.get("phase_text"), str, at_first.phase_text),
        times=times,
        update_s=sum(map(_number, _of(said["update_s"], list))) if "update_s" in said else None,
        roles=_roles(_of(said.get("role_memory"), dict, {})),
        pinned=_number(said["pinned_bytes"], int) if said.get("pinned_bytes") is not None else None,
        gpu_uuid=uuid or None,
    )


def _roles(memory: dict[str, Any]) -> tuple[RoleUse, ...]:
    """A rank's tensors by role."""
    found = []
    for role, about in memory.items():
        # -1: pages without memory, e.g. swapped out
        by_node = _of(_of(about, dict).get("nodes"), dict, {}) or {"-1": about.get("bytes")}
        for node, size in by_node.items():
            number = int(node)
            if not -1 <= number < _MOST_NODES:
                raise _NotOursError
            found.append(RoleUse(role=role, node=number if number >= 0 else None, size=_number(size, int)))
    return tuple(found)
