"""Tensors in host memory that is where it was asked for, zero, and pinned on request. Native code in csrc/ does the
work.

Reserve (whole pages, nothing more), set the policy, touch with many threads, verify with move_pages(2), then register with CUDA:
registered pages can no longer move, so the order matters. Zeros cost nothing extra: the kernel clears a page before it
hands it out, hence one write a page is the whole of touching.

After fork a child sees ordinary tensors copied on write; pinned ones are left out of it, and reading one there ends the
child. At the end of the interpreter memory that is still registered is left to the kernel.
"""

import atexit
import contextlib
import math
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from ldft import _native
from ldft.memory.placing import Report, place, settings
from ldft.memory.policy import HostMemoryError, Placement, is_harmless, refused
from ldft.memory.topology import Topology, read_topology

# A copy that crosses from one registration into the next fails (cudaErrorInvalidValue, seen on an H200 with driver 580), so a
# region is one registration wherever the driver can do it: one of 512 GiB or more fails (its page table passes 2^31 bytes).
# Above this size a region is several, and a single copy must not cross a multiple of it.
REGISTER_CHUNK = 256 << 30

_reports: dict[int, Report] = {}
_registered: dict[int, list[int]] = {}
_machine: list[Topology] = []
_warned = False
# Exit handlers run before the interpreter takes anything apart, this one before torch's (imported above).
atexit.register(_native.note_exit)


def allocate(
    shape: int | Sequence[int],
    dtype: torch.dtype,
    policy: Placement,
    *,
    pin: bool = False,
    strict: bool = True,
    huge_pages: bool | None = None,
) -> torch.Tensor:
    """A tensor of zeros on the CPU, contiguous, in memory of its own that is placed by `policy`.

    pin: register it with CUDA (the current device's context); without CUDA warn once and go on unpinned.
    strict: raise HostMemoryError, with nothing left allocated, when a page is not where it was asked for. Not strict: such pages
        are logged as one warning and counted in `report_of(tensor).spilled_pages`. Kind preferred always allows them,
        default asks for nothing. An interleave by the kernel is exact to one page, with huge pages to one of those.
    huge_pages: overrides settings.huge_pages.

    The memory lives as long as any view of the tensor. Raises PlacementError when the placement does not suit the
    machine or what it needs is forbidden (NumaCallError), and HostMemoryError when memory is short: before touching it, as far as
    the kernel's own figures can tell.
    """
    size = (shape,) if isinstance(shape, int) else tuple(shape)
    if any(length < 0 for length in size):
        raise ValueError(f"allocate: the shape {size} has a negative length")
    needed = math.prod(size) * dtype.itemsize
    topology = _topology()
    placement = policy.resolve(topology, "placement")
    if needed == 0:
        return torch.empty(size, dtype=dtype, device="cpu")
    huge = settings.huge_pages if huge_pages is None else huge_pages
    pin = pin and can_pin()
    region, report = place(placement, topology, needed, huge, strict)
    if pin:
        _register(region, report)
    # From here on the capsule owns the memory, and after it the tensor's storage.
    address = region.address
    flat = torch.from_dlpack(region.capsule(_unregister if pin else None))
    _remember(address, report)
    # Strides spelt out: quantised dtypes do not work them out themselves.
    strides = [math.prod(size[i + 1 :]) for i in range(len(size))]
    # The device spelt out: models are built under a default device, and this is called meanwhile.
    return torch.empty(0, dtype=dtype, device="cpu").set_(flat.untyped_storage(), 0, size, strides)


def report_of(tensor: torch.Tensor) -> Report:
    """The report on the memory that a tensor, or a view of one, lives in. Raises KeyError for memory that is not
    ours."""
    address = tensor.untyped_storage().data_ptr()
    if not _native.is_live(address):
        raise KeyError(f"no memory of ours at {address:#x}")
    return _reports[address]


def can_pin() -> bool:
    """Whether memory can be pinned: torch sees a CUDA device. Warns, once a process, when it does not."""
    if torch.cuda.is_available():
        return True
    global _warned
    if not _warned:
        warnings.warn("no CUDA device: host memory stays unpinned", RuntimeWarning, stacklevel=3)
        _warned = True
    return False


def pages_by_node(tensor: torch.Tensor) -> dict[int, int]:
    """Node -> base pages of it that the tensor lies in, as move_pages(2) says now. Pages without memory yet are under
    -1.

    Works for any CPU tensor. A view that skips elements counts from its first byte to its last. Raises NumaCallError where there
    are several nodes and the kernel does not let us look.
    """
    if tensor.device.type != "cpu":
        raise ValueError(f"pages_by_node: the tensor is on {tensor.device}, not in host memory")
    if tensor.numel() == 0:
        return {}
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    start, length = tensor.data_ptr(), (last + 1) * tensor.element_size()
    page = _native.page_size()
    first = start // page * page
    count = -(-(start + length - first) // page)
    counts: dict[int, int] = {}
    batch = 1 << 18
    for done in range(0, count, batch):
        here = min(batch, count - done) * page
        try:
            nodes = _native.nodes_of_pages(first + done * page, here)
        except OSError as error:
            topology = _topology()
            if not is_harmless(error, Placement(), topology):
                raise refused(error, "move_pages", "finding the nodes of a tensor") from error
            return {topology.nodes[0].id: count}
        for node in set(nodes):
            counts[node] = counts.get(node, 0) + nodes.count(node)
    return dict(sorted(counts.items()))


def _topology() -> Topology:
    """Read once a process: nodes do not come and go under a run, and small tensors are allocated by the thousand."""
    if not _machine:
        _machine.append(read_topology())
    return _machine[0]


def _remember(address: int, report: Report) -> None:
    # Memory goes back without Python being told, so reports of the dead are swept out when they are the majority.
    if len(_reports) > 64 + 2 * _native.usage()[0]:
        for dead in [a for a in _reports if not _native.is_live(a)]:
            del _reports[dead]
    _reports[address] = report


def _register(region: _native.Region, report: Report) -> None:
    """Pin all of the region through torch's own binding of the CUDA runtime, or none of it."""
    started = time.perf_counter()
    cudart: Any = torch.cuda.cudart()
    region.hide_from_children()
    done: list[int] = []
    for offset in range(0, region.bytes, REGISTER_CHUNK):
        size = min(REGISTER_CHUNK, region.bytes - offset)
        code = int(cudart.cudaHostRegister(region.address + offset, size, 0))
        if code != 0:
            for address in done:
                cudart.cudaHostUnregister(address)
            text = cudart.cudaGetErrorString(cudart.cudaError(code))
            region.release()
            _clear_cuda_error()
            raise HostMemoryError(
                f"cudaHostRegister: {size / 2**30:.2f} GiB for {report.placement.describe()} could not be pinned: {text}; nothing "
                "was kept. Set memory.pinning=none, or raise the memory limit of the machine or container"
            )
        done.append(region.address + offset)
    _registered[region.address] = done
    report.pinned = True
    report.register_s = time.perf_counter() - started


def _unregister(address: int) -> None:
    """Called when the last user of pinned memory is gone, before it goes back to the kernel. Raising here keeps it
    mapped."""
    cudart: Any = torch.cuda.cudart()
    for start in _registered.pop(address):
        code = int(cudart.cudaHostUnregister(start))
        if code != 0:
            raise RuntimeError(f"cudaHostUnregister: {cudart.cudaGetErrorString(cudart.cudaError(code))}")


def _clear_cuda_error() -> None:
    """A failed call leaves its error for the next kernel launch to report; let a launch of ours take it."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
