"""The folder for a run's swap files (offload=nvme): created by the parent under offload.nvme_path, removed when the run ends."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldft import files
from ldft.config import Config
from ldft.errors import ConfigError
from ldft.preflight import deepspeed_managed

VARIABLE = "LDFT_SWAP_DIR"
_PREFIX = "ldft-swap-"
# The lock is beside the folder, so that an interrupted removal can be resumed. It is a file, since many network file systems lock
# folders only within one host.
_LOCK = ".lock"
_SHARED_MEMORY = Path("/dev/shm")


def prepare(config: Config, settings: dict[str, Any]) -> None:
    """Create offload.nvme_path and remove what dead runs left in it, before `check` looks at its free space. Raises ConfigError."""
    if deepspeed_managed.moved_by(settings) != "nvme":
        return
    base = _base(config)
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            "offload.nvme_path", f"cannot create {base} ({error.strerror}); name a folder on a local disk"
        ) from None
    _remove_left(base)


def check(config: Config, settings: dict[str, Any], shared_memory: Path = _SHARED_MEMORY) -> None:
    """Raise ConfigError if the disk or shared memory lacks room for what DeepSpeed will write there. Changes nothing."""
    needed = deepspeed_managed.shared_memory_bytes(config, settings)
    if needed and (left := shutil.disk_usage(shared_memory).free) < needed:
        raise ConfigError(
            "offload",
            f"{deepspeed_managed.moved_by(settings)} shares {needed / 2**30:.1f} GiB between processes, {shared_memory} has "
            f"{left / 2**30:.1f} GiB left; enlarge it (mount -o remount,size=...) or use full",
        )
    if deepspeed_managed.moved_by(settings) != "nvme":
        return
    key, needed = "offload.nvme_path", deepspeed_managed.swap_bytes(config, settings)
    # A dry run creates no folder: check the existing folder that would contain it.
    folder = next(path for path in (_base(config), *_base(config).parents) if path.is_dir())
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(key, f"cannot write in {folder}; name a folder on a local disk")
    if (left := shutil.disk_usage(folder).free) < needed:
        raise ConfigError(
            key,
            f"swap files take {needed / 2**30:.2f} GiB, {folder} has {left / 2**30:.2f} GiB left; free space or name another",
        )


@contextmanager
def folder(config: Config, settings: dict[str, Any]) -> Iterator[None]:
    """Create this run's folder, pass its path to the ranks in the environment, and remove it at the end.

    Meanwhile this process holds its lock, which the kernel releases however the process ends.
    """
    if deepspeed_managed.moved_by(settings) != "nvme":
        yield
        return
    descriptor, name = tempfile.mkstemp(prefix=_PREFIX, suffix=_LOCK, dir=_base(config))
    lock = Path(name)
    made = lock.with_suffix("")
    os.environ[VARIABLE] = str(made)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: no other run may remove this folder
            lock.unlink()
        made.mkdir()
        yield
    finally:
        del os.environ[VARIABLE]
        shutil.rmtree(made, ignore_errors=True)
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def placed(settings: dict[str, Any]) -> dict[str, Any]:
    """In a rank: the DeepSpeed config with the folder that the parent created."""
    settings = copy.deepcopy(settings)
    for name in ("offload_param", "offload_optimizer"):
        section = settings["zero_optimization"][name]
        if section.get("device") == "nvme":
            section["nvme_path"] = os.environ[VARIABLE]
    return settings


def _base(config: Config) -> Path:
    return files.named(config.offload.nvme_path, "offload.nvme_path").absolute()


def _remove_left(base: Path) -> None:
    """Remove folders whose lock is free: kill -9 leaves them behind, and they are large. Pids would not work across containers."""
    for lock in base.glob(f"{_PREFIX}*{_LOCK}"):
        # Held by a live run, owned by another user, or on a file system without locks: leave it.
        with contextlib.suppress(OSError), lock.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.with_suffix("").exists():
                shutil.rmtree(lock.with_suffix(""))
            lock.unlink()
