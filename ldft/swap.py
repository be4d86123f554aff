"""The folder of a run's swap files (offload=nvme): made by the parent under offload.nvme_path, gone when the run has ended."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldft.config import Config
from ldft.errors import ConfigError
from ldft.training import moved

VARIABLE = "LDFT_SWAP_DIR"
_PREFIX = "ldft-swap-"
_SHARED_MEMORY = Path("/dev/shm")


def check(config: Config, settings: dict[str, Any], shared_memory: Path = _SHARED_MEMORY) -> None:
    """Raise ConfigError where the disk, or shared memory, cannot take what DeepSpeed will put there."""
    needed = moved.shared_memory_bytes(config, settings)
    if needed and (left := shutil.disk_usage(shared_memory).free) < needed:
        raise ConfigError(
            "offload",
            f"{moved.moved_by(settings)} shares {needed / 2**30:.1f} GiB between processes, {shared_memory} has "
            f"{left / 2**30:.1f} GiB left; enlarge it (mount -o remount,size=...) or use full",
        )
    if moved.moved_by(settings) != "nvme":
        return
    key, folder, needed = "offload.nvme_path", _base(config), moved.swap_bytes(config, settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(key, f"cannot create {folder} ({error.strerror}); name a folder on a local disk") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(key, f"cannot write in {folder}; name a folder on a local disk")
    if (left := shutil.disk_usage(folder).free) < needed:
        raise ConfigError(
            key,
            f"swap files take {needed / 2**30:.2f} GiB, {folder} has {left / 2**30:.2f} GiB left; free space or name another",
        )


@contextmanager
def folder(config: Config, settings: dict[str, Any]) -> Iterator[None]:
    """Make the folder of this run and name it in the environment that the ranks inherit; remove it, and what dead runs left."""
    if moved.moved_by(settings) != "nvme":
        yield
        return
    _remove_left(_base(config))
    made = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_base(config))
    os.environ[VARIABLE] = made
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        shutil.rmtree(made, ignore_errors=True)


def place(settings: dict[str, Any]) -> None:
    """In a rank: the folder that the parent has made becomes DeepSpeed's."""
    for name in ("offload_param", "offload_optimizer"):
        section = settings["zero_optimization"][name]
        if section.get("device") == "nvme":
            section["nvme_path"] = os.environ[VARIABLE]


def _base(config: Config) -> Path:
    return Path(config.offload.nvme_path).expanduser().absolute()


def _remove_left(base: Path) -> None:
    """Folders of parents that are gone: a kill -9 leaves them, and they are large."""
    for path in base.glob(f"{_PREFIX}*"):
        number = path.name.removeprefix(_PREFIX).split("-")[0]
        if number.isdigit() and not Path("/proc", number).exists():
            with contextlib.suppress(OSError):
                shutil.rmtree(path)
