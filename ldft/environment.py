"""The environment of a run: source, versions, CPU, GPU, kernel, NUMA nodes. Read by the parent, without torch."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE_DIR = Path(__file__).resolve().parent
# A wheel has the config tree inside the package; a checkout has it beside the package.
CONF_DIR = PACKAGE_DIR / "conf" if (PACKAGE_DIR / "conf").is_dir() else PACKAGE_DIR.parent / "conf"

# The packages whose versions are recorded, besides ldft.
_SOURCES = ("conf", "csrc", "hydra_plugins", "benchmarks")
_PACKAGES = ("ldft", "torch", "deepspeed", "transformers", "hydra-core", "omegaconf", "pyarrow", "numpy",
             "liger-kernel", "peft", "triton", "flash-attn", "flash-attn-3", "flash-attn-4")  # fmt: skip

# CPU flags for native bf16 matrix products, on x86 and Arm.
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
# Values of ONEDNN_MAX_CPU_ISA below the first instruction set with bf16 products.
_WITHOUT_BF16 = frozenset({"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"})


@dataclass(frozen=True, slots=True)
class Assumed:
    """GPUs, and their host's memory, that are assumed, not present."""

    count: int
    memory_gib: float | None
    """Of each GPU; None: unknown."""
    model: str = "assumed Hopper GPU"
    capability: tuple[int, int] = (9, 0)
    host_gib: float | None = None
    """None: unknown."""


_assumed: ContextVar[Assumed | None] = ContextVar("_assumed", default=None)


@contextmanager
def assumed(machine: Assumed) -> Iterator[None]:
    """Within the context, report this machine's GPUs. For dry runs and plans for another machine."""
    token = _assumed.set(machine)
    try:
        yield
    finally:
        _assumed.reset(token)


def gpus_are_assumed() -> bool:
    """Whether the reported GPUs are assumed, not present."""
    return _assumed.get() is not None


def assumed_host_gib() -> float | None:
    """Host memory of the assumed machine, GiB; None if unknown, or if none is assumed."""
    machine = _assumed.get()
    return machine.host_gib if machine else None


def compute_capability() -> tuple[int, int] | None:
    """The lowest CUDA compute capability among the GPUs visible to CUDA; None without a GPU."""
    if machine := _assumed.get():
        return machine.capability
    import pynvml

    return min((tuple(pynvml.nvmlDeviceGetCudaComputeCapability(_whole(gpu))) for gpu in _visible()), default=None)


def native_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether torch computes bf16 matrix products with native instructions on this CPU. Without them, torch converts the numbers
    one by one: benchmarks/cpu_precision.py measures the cost.

    ONEDNN_MAX_CPU_ISA can keep oneDNN, which computes the products, from using instructions: those do not count.
    """
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    if limit.upper() in _WITHOUT_BF16:
        return False
    with cpuinfo.open() as lines:
        for line in lines:
            name, _, words = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return not _BF16_FLAGS.isdisjoint(words.split())
    return False


def gpu_memory_gib() -> float | None:
    """Memory of the smallest GPU visible to CUDA, GiB; None without a GPU."""
    if machine := _assumed.get():
        return machine.memory_gib
    import pynvml

    return min((float(pynvml.nvmlDeviceGetMemoryInfo(gpu).total) / 2**30 for gpu in _visible()), default=None)


def gpus() -> tuple[str, ...]:
    """Models of the GPUs visible to CUDA, in CUDA's order; empty without a driver."""
    if machine := _assumed.get():
        return (machine.model,) * machine.count
    return _models()


@cache
def _models() -> tuple[str, ...]:
    import pynvml

    return tuple(pynvml.nvmlDeviceGetName(_whole(gpu)) for gpu in _visible())


def gpu_addresses() -> tuple[str, ...]:
    """PCI addresses, in sysfs's form, of the GPUs visible to CUDA, in CUDA's order."""
    import pynvml

    found = []
    for gpu in _visible():
        domain, rest = str(pynvml.nvmlDeviceGetPciInfo_v3(_whole(gpu)).busId).lower().split(":", 1)
        found.append(f"{domain[-4:]}:{rest}")
    return tuple(found)


@cache
def _visible() -> tuple[Any, ...]:
    """NVML handles of the GPUs or MIG slices visible to CUDA, according to CUDA_VISIBLE_DEVICES."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    every = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(every)
    chosen: list[Any] = []
    for entry in (part.strip() for part in visible.split(",")):
        found = [every[int(entry)]] if entry.isdigit() and int(entry) < len(every) else _of_uuid(entry, every)
        if not found:  # CUDA stops at the first entry that it cannot resolve
            break
        chosen += found
    return tuple(chosen)


def _of_uuid(uuid: str, every: list[Any]) -> list[Any]:
    """The GPU or MIG slice with this UUID (for a GPU, a unique prefix is enough); empty if there is none."""
    import pynvml

    if uuid.startswith("GPU-"):
        return [gpu for gpu in every if pynvml.nvmlDeviceGetUUID(gpu).startswith(uuid)][:1]
    try:
        return [pynvml.nvmlDeviceGetHandleByUUID(uuid)] if uuid.startswith("MIG-") else []
    except pynvml.NVMLError:
        return []


def _whole(gpu: Any) -> Any:
    """The GPU to which a MIG slice belongs; a whole GPU is returned unchanged."""
    import pynvml

    try:
        return pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(gpu)
    except pynvml.NVMLError:
        return gpu


def driver() -> str | None:
    """Version of the NVIDIA driver."""
    if not gpus():
        return None
    import pynvml

    return str(pynvml.nvmlSystemGetDriverVersion())


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(PACKAGE_DIR), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def source_commit() -> tuple[str | None, bool | None]:
    """Commit of the package's source and whether the source was edited since; (None, None) if unknown. Other files in the
    checkout, such as results, are ignored.

    A copy without git history (a wheel, a folder sent to another machine) may have them in `ldft/commit.json`, written by
    `python -m ldft.environment`: the commit, and the hash of the source at that commit.
    """
    # A package installed inside another project's checkout is not part of that checkout.
    if _git("ls-files", "--error-unmatch", __file__) is not None and (commit := _git("rev-parse", "HEAD")):
        return commit, bool(_git("status", "--porcelain", "--", ".", *(f"../{folder}" for folder in _SOURCES)))
    stamp = PACKAGE_DIR / "commit.json"
    if not stamp.is_file():
        return None, None
    known = json.loads(stamp.read_text())
    return known["commit"], known["source_hash"] != source_hash() or known["dirty"]


def source_hash() -> str:
    """Twelve hex digits, a hash of the package's Python files and the config tree: distinguishes rows of edited code."""
    digest = hashlib.sha256()
    for root, pattern in ((PACKAGE_DIR, "*.py"), (CONF_DIR, "*.yaml")):
        for path in sorted(root.rglob(pattern)):
            name = path.relative_to(root)
            if name.parts[0] != "local":  # this machine's own defaults; the config columns have them
                digest.update(str(name).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.lower().startswith(("model name", "cpu model")):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def host_memory_gib() -> float:
    """MemTotal, GiB. Some virtual machines report little at first and grow as memory is touched."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) / 2**20
    raise AssertionError("/proc/meminfo has no MemTotal")


def topology() -> list[dict[str, Any]]:
    """NUMA nodes with their cores, memory and distances; one node 0 where the kernel has no NUMA support."""
    nodes = []
    for folder in Path("/sys/devices/system/node").glob("node[0-9]*"):
        meminfo = (folder / "meminfo").read_text().split()
        nodes.append(
            {
                "node": int(folder.name[4:]),
                "cpus": (folder / "cpulist").read_text().strip(),
                "memory_gib": int(meminfo[meminfo.index("MemTotal:") + 1]) / 2**20,
                "distances": [int(d) for d in (folder / "distance").read_text().split()],
            }
        )
    whole = {"node": 0, "cpus": f"0-{(os.cpu_count() or 1) - 1}", "memory_gib": host_memory_gib(), "distances": [10]}
    return sorted(nodes, key=lambda node: node["node"]) or [whole]


def describe() -> dict[str, Any]:
    """The environment columns of a row."""
    commit, dirty = source_commit()
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "git_commit": commit,
        "git_dirty": dirty,
        "source_hash": source_hash(),
        "versions": list(versions.items()),
        "kernel": platform.release(),
        "cpu": _cpu_model(),
        "num_cores": len(os.sched_getaffinity(0)),
        "host_memory_gib": host_memory_gib(),
        "gpus": list(gpus()),
        "driver": driver(),
        "topology_json": json.dumps(topology()),
    }


if __name__ == "__main__":
    commit, dirty = source_commit()
    stamp = {"commit": commit, "dirty": dirty, "source_hash": source_hash()}
    (PACKAGE_DIR / "commit.json").write_text(json.dumps(stamp))
    print(stamp)
