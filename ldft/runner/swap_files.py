"""The folder of a run's swap files (offload=nvme): made by the parent under offload.nvme_path, gone when the run has ended."""

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

from ldft.config import Config
from ldft.errors import ConfigError
from ldft.preflight import deepspeed_managed

VARIABLE = "LDFT_SWAP_DIR"
_PREFIX = "ldft-swap-"
# Beside its folder, so that a removal that is cut short can be taken up again. A file, since many file systems lock folders for
# their own host only.
_LOCK = ".lock"
_SHARED_MEMORY = Path("/dev/shm")


def prepare(config: Config, settings: dict[str, Any]) -> None:
    """Make offload.nvme_path and free it of what dead runs left, before `check` looks at its space. Raises ConfigError."""
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
    """Raise ConfigError where the disk, or shared memory, cannot take what DeepSpeed will put there. Only looks."""
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
    # A dry run makes no folder: the one that it would be made in counts.
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
    """Make the folder of this run, name it in the environment that the ranks inherit, and remove it in the end.

    Its lock is held meanwhile, by this process alone, and goes with it however it ends.
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
        except OSError:  # a file system without locks: nobody is to judge this folder
            lock.unlink()
        made.mkdir()
        yield
    finally:
        del os.environ[VARIABLE]
        shutil.rmtree(made, ignore_errors=True)
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def placed(settings: dict[str, Any]) -> dict[str, Any]:
    """In a rank: the DeepSpeed config with the folder that the parent has made."""
    settings = copy.deepcopy(settings)
    for name in ("offload_param", "offload_optimizer"):
        section = settings["zero_optimization"][name]
        if section.get("device") == "nvme":
            section["nvme_path"] = os.environ[VARIABLE]
    return settings


def _base(config: Config) -> Path:
    return Path(config.offload.nvme_path).expanduser().absolute()


def _remove_left(base: Path) -> None:
    """Folders whose lock nobody holds: a kill -9 leaves them, and they are large. A pid would say nothing of another container."""
    for lock in base.glob(f"{_PREFIX}*{_LOCK}"):
        # Held by a run that lives, of another user, or where locks do not work: not ours to remove.
        with contextlib.suppress(OSError), lock.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.with_suffix("").exists():
                shutil.rmtree(lock.with_suffix(""))
            lock.unlink()
