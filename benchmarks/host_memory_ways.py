"""The ways to allocate zeroed (and, with CUDA, pinned) host memory that host_memory.py compares: ours, and the peers.

Each way is a function of (bytes, pin) that returns (tensor over the memory, release, seconds of its parts by name). Peers
follow their authors' code; calls that need a C++ extension there are made by ctypes here, which costs microseconds.
"""

import ctypes
import ctypes.util
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ldft.memory import allocator
from ldft.memory.policy import Placement
from ldft.memory.topology import read_topology

Buffer = tuple[torch.Tensor, Callable[[], None], dict[str, float]]
Way = Callable[[int, bool], Buffer]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
_libc.memset.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long]
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.free.argtypes = [ctypes.c_void_p]
_libc.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
_SYS_MBIND = {"x86_64": 237, "aarch64": 235}
_MPOL_BIND = 2
NODE = read_topology().memory_nodes[0]


def _check(code: int, call: str) -> None:
    if code != 0:
        raise RuntimeError(f"{call} answered {code}")


def _tensor(address: int, size: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_ubyte * size).from_address(address), dtype=torch.uint8)


def _zero_and_register(address: int, size: int, pin: bool) -> dict[str, float]:
    """Single-threaded memset, then one registration, as in the seed's extensions."""
    start = time.perf_counter()
    _libc.memset(address, 0, size)
    zeroed = time.perf_counter()
    if pin:
        _check(int(torch.cuda.cudart().cudaHostRegister(address, size, 0)), "cudaHostRegister")
    return {"touch_s": zeroed - start, "register_s": time.perf_counter() - zeroed}


def _unregister(address: int, pin: bool) -> None:
    if pin:
        _check(int(torch.cuda.cudart().cudaHostUnregister(address)), "cudaHostUnregister")


def ours(huge: bool) -> Way:
    """ldft.memory.allocator.allocate: placed on one node, touched by all its cores, verified, registered."""

    def way(size: int, pin: bool) -> Buffer:
        tensor = allocator.allocate(size, torch.uint8, Placement(kind="bind", nodes=(NODE,)), pin=pin, huge_pages=huge)
        report = allocator.report_of(tensor)
        assert report.pages == {NODE: -(-size // mmap.PAGESIZE)}
        parts = {name: getattr(report, name) for name in ("place_s", "touch_s", "verify_s", "register_s")}
        holder = [tensor]
        del tensor
        return holder[0], holder.clear, parts

    return way


def seed_memalign(size: int, pin: bool) -> Buffer:
    """The seed's zero-overhead pinned memory: posix_memalign, memset, cudaHostRegister."""
    pointer = ctypes.c_void_p()
    _check(_libc.posix_memalign(ctypes.byref(pointer), 4096, size), "posix_memalign")
    address = pointer.value
    assert address is not None
    parts = _zero_and_register(address, size, pin)

    def release() -> None:
        _unregister(address, pin)
        _libc.free(address)

    return _tensor(address, size), release, parts


def seed_numa(size: int, pin: bool) -> Buffer:
    """The seed's NUMA allocation (zeros_numa_onnode): mmap, mbind to one node, memset, cudaHostRegister."""
    address = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    mask = ctypes.c_ulong(1 << NODE)
    number = _SYS_MBIND[os.uname().machine]
    _check(
        _libc.syscall(number, *map(ctypes.c_void_p, (address, size, _MPOL_BIND)), ctypes.byref(mask), 65, 0), "mbind"
    )
    parts = _zero_and_register(address, size, pin)

    def release() -> None:
        _unregister(address, pin)
        _libc.munmap(address, size)

    return _tensor(address, size), release, parts


def libnuma(library: ctypes.CDLL) -> Way:
    """libnuma's numa_alloc_onnode, then memset and registration."""
    library.numa_alloc_onnode.argtypes = [ctypes.c_size_t, ctypes.c_int]
    library.numa_alloc_onnode.restype = ctypes.c_void_p
    library.numa_free.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def way(size: int, pin: bool) -> Buffer:
        address = library.numa_alloc_onnode(size, NODE)
        parts = _zero_and_register(address, size, pin)

        def release() -> None:
            _unregister(address, pin)
            library.numa_free(address, size)

        return _tensor(address, size), release, parts

    return way


def cuda_host_alloc(runtime: ctypes.CDLL) -> Way:
    """The CUDA runtime's own pinned memory, then memset by one thread."""
    runtime.cudaHostAlloc.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_uint]
    runtime.cudaFreeHost.argtypes = [ctypes.c_void_p]

    def way(size: int, pin: bool) -> Buffer:
        pointer = ctypes.c_void_p()
        start = time.perf_counter()
        _check(runtime.cudaHostAlloc(ctypes.byref(pointer), size, 0), "cudaHostAlloc")
        got = time.perf_counter()
        address = pointer.value
        assert address is not None
        _libc.memset(address, 0, size)
        parts = {"register_s": got - start, "touch_s": time.perf_counter() - got}
        return _tensor(address, size), lambda: _check(runtime.cudaFreeHost(address), "cudaFreeHost"), parts

    return way


def torch_pinned(size: int, pin: bool) -> Buffer:
    """torch.zeros(pin_memory=True): its caching allocator over cudaHostAlloc, zeroed by all of torch's threads."""
    holder = [torch.zeros(size, dtype=torch.uint8, pin_memory=True)]

    def release() -> None:
        holder.clear()
        torch.cuda.synchronize()
        torch._C._host_emptyCache()

    return holder[0], release, {}


def torch_zeros(size: int, pin: bool) -> Buffer:
    """torch.zeros: not pinned, not placed; zeroed by all of torch's threads."""
    holder = [torch.zeros(size, dtype=torch.uint8)]
    return holder[0], holder.clear, {}


def available(pin: bool) -> tuple[dict[str, Way], dict[str, str]]:
    """The ways available on this machine, ours first, and why the others are not available."""
    ways: dict[str, Way] = {
        "ours": ours(huge=True),
        "ours, 4 KiB pages": ours(huge=False),
        "seed: posix_memalign": seed_memalign,
        "seed: mmap + mbind": seed_numa,
        "torch.zeros (not pinned)": torch_zeros,
    }
    missing = {}
    name = ctypes.util.find_library("numa")
    library = ctypes.CDLL(name) if name else None
    if library is not None and library.numa_available() == 0:
        ways["libnuma: numa_alloc_onnode"] = libnuma(library)
    else:
        missing["libnuma"] = "not installed" if library is None else "numa_available() says no"
    runtime = _cuda_runtime() if pin else None
    if runtime is not None:
        ways["cudaHostAlloc + memset"] = cuda_host_alloc(runtime)
        ways["torch pinned allocator"] = torch_pinned
    else:
        missing["cudaHostAlloc, torch pinned allocator"] = "no CUDA device" if not pin else "libcudart is not loaded"
    return ways, missing


def _cuda_runtime() -> ctypes.CDLL | None:
    """The same library that torch has loaded."""
    torch.cuda.init()
    maps = Path("/proc/self/maps").read_text()
    paths = {line.split()[-1] for line in maps.splitlines() if "libcudart" in line}
    return ctypes.CDLL(paths.pop()) if paths else None
