"""DeepSpeed compiles its C++ operators at first use. ldft triggers this early and once, and tells the user.

The cache is ldft's own, named after everything that the compiled code depends on: DeepSpeed compiles for the CPU it runs on, so a
cache in a home folder shared by several machines would crash the others with an illegal instruction.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import psutil

from ldft.config import OffloadDevice
from ldft.errors import ConfigError
from ldft.preflight.selection import Selection
from ldft.training.deepspeed import unused


def cache_dir() -> Path:
    """TORCH_EXTENSIONS_DIR if set, else ldft's folder for this CPU, environment, torch and DeepSpeed."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    if chosen:
        return Path(chosen)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = [line for line in lines if line.lower().startswith(("flags", "features", "model name"))][:2]
    # The build files contain the paths of torch and DeepSpeed: two virtual environments would rebuild each other's operators.
    key = hashlib.sha256("\n".join([*cpu, sys.prefix]).encode()).hexdigest()[:8]
    versions = f"py{platform.python_version()}-torch{metadata.version('torch')}-ds{metadata.version('deepspeed')}"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "ldft" / "operators" / f"{key}-{versions}"


def prepare_cache(run: Selection) -> None:
    """Create the folder for this run's operators. Raises ConfigError if it is not writable."""
    if not needed(run):
        return
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            "TORCH_EXTENSIONS_DIR",
            f"cannot write in {folder} ({error.strerror}), where DeepSpeed's operators are compiled; "
            "set this variable to a folder on a local disk that you can write",
        ) from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Allow one ldft to build per machine, beside other programs that compile in this folder under torch's own locks."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".ldft.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_stale_locks(folder)
        yield


def remove_stale_locks(folder: Path) -> None:
    """Remove the lock files of killed builders, for which torch would wait forever.

    torch keeps its lock file open while it builds (torch/utils/file_baton.py): one that no process has open is stale.
    """
    locks = set(folder.resolve().glob("*/lock"))
    if not locks:
        return
    in_use: set[Path] = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # another user's process, or one that has ended
            in_use.update(Path(opened.path) for opened in process.open_files())
    for stale in locks - in_use:
        stale.unlink(missing_ok=True)


def needed(run: Selection) -> list[str]:
    """DeepSpeed's names of the builders of the operators that this run will use."""
    config = run.config
    names = []
    if config.offload.optimizer is not OffloadDevice.none and not run.fused_step:
        names.append("CPULionBuilder" if config.optimizer.name == "lion" else "CPUAdamBuilder")
    if OffloadDevice.nvme in (config.offload.parameters, config.offload.optimizer):
        names += ["PinMemoryBuilder", "AsyncIOBuilder"]
    return names


def load(run: Selection, say: Callable[[str], None]) -> None:
    """Compile (minutes, once) or load (seconds) the operators that this run will use, and keep DeepSpeed from building others.

    Call it before `deepspeed.init_distributed`. Raises ConfigError if one cannot be compiled here.
    """
    from deepspeed.accelerator import get_accelerator

    unused.leave_out()
    folder = cache_dir()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    if needed(run):
        unused.ask_for_the_processor_once()
    for name in needed(run):
        builder = get_accelerator().get_op_builder(name)()
        if builder.name == "deepspeed_not_implemented":
            raise ConfigError(
                "optimizer.fused_step",
                f"false: DeepSpeed {metadata.version('deepspeed')} has no {name.removesuffix('Builder')} without a GPU; "
                "leave it at null",
            )
        if name == "AsyncIOBuilder" and not builder.is_compatible(verbose=False):
            raise ConfigError(
                "offload",
                "nvme: DeepSpeed reads and writes swap files with libaio, whose headers are missing here; "
                "apt-get install libaio-dev, or use full",
            )
        with _locked(folder):
            if not list((folder / builder.name).glob("*.so")):
                say(f"compiling DeepSpeed's {builder.name} (a minute or two, once on this machine)")
            else:
                say(f"loading DeepSpeed's {builder.name}")
            builder.load(verbose=False)
