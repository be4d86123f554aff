"""Zeroed tensors in host memory on the requested NUMA nodes, pinned on request. Native code in csrc/ does the work.

Reserve whole pages (no more), set the policy, touch with many threads, verify with move_pages(2), then register with CUDA: the
order matters, since registered pages can no longer move. Zeros cost nothing extra: the kernel clears each page before handing it
out, so touching needs only one write per page.

After fork, a child sees unpinned tensors copy-on-write; pinned ones are not mapped in the child, and reading one crashes it. At
interpreter exit, memory that is still registered is left to the kernel.
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

# A copy across two registrations fails (cudaErrorInvalidValue, seen on an H200 with driver 580), so register a region in one call
# where the driver allows it: 512 GiB or more fails (the page table passes 2^31 bytes). A region above this size takes several
# registrations, and no single copy may cross a multiple of this size.
REGISTER_CHUNK = 256 << 30

_reports: dict[int, Report] = {}
_registered: dict[int, list[int]] = {}
_machine: list[Topology] = []
_warned = False
# Exit handlers run before the interpreter is torn down, and this one before torch's (imported above).
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
    """A contiguous CPU tensor of zeros in its own memory, placed by `policy`.

    pin: register it with CUDA (in the current device's context); without CUDA, warn once and leave it unpinned.
    strict: if a page is misplaced, free everything and raise HostMemoryError. If False, log one warning and count misplaced pages
        in `report_of(tensor).spilled_pages`. Kind preferred always allows them; kind default requests no nodes. The kernel's
        interleave is exact to one page, or to one huge page.
    huge_pages: overrides settings.huge_pages.

    The memory lives as long as any view of the tensor. Raises PlacementError if the placement does not fit the machine or needs
    a forbidden system call (NumaCallError), and HostMemoryError if memory is short: before touching it, where the kernel's own
    figures show the shortage.
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
    # From here on the capsule owns the memory; it passes ownership to the tensor's storage.
    address = region.address
    flat = torch.from_dlpack(region.capsule(_unregister if pin else None))
    _remember(address, report)
    # Give the strides explicitly: torch does not derive them for quantised dtypes.
    strides = [math.prod(size[i + 1 :]) for i in range(len(size))]
    # Give the device explicitly: this is called while models are built under another default device.
    return torch.empty(0, dtype=dtype, device="cpu").set_(flat.untyped_storage(), 0, size, strides)


def report_of(tensor: torch.Tensor) -> Report:
    """The report on the memory that holds a tensor or a view of one. Raises KeyError for memory that `allocate` did not make."""
    address = tensor.untyped_storage().data_ptr()
    if not _native.is_live(address):
        raise KeyError(f"ldft allocated no memory at {address:#x}")
    return _reports[address]


def can_pin() -> bool:
    """Whether memory can be pinned: torch sees a CUDA device. Warns once per process if it does not."""
    if torch.cuda.is_available():
        return True
    global _warned
    if not _warned:
        warnings.warn("no CUDA device: host memory stays unpinned", RuntimeWarning, stacklevel=3)
        _warned = True
    return False


def pages_by_node(tensor: torch.Tensor) -> dict[int, int]:
    """Node -> number of the tensor's base pages on it, as move_pages(2) reports now. Pages not yet backed by memory count under -1.

    Works for any CPU tensor. A view that skips elements counts from its first byte to its last. Raises NumaCallError if there
    are several nodes and the kernel forbids the query.
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
    """The topology, read once per process: nodes do not change during a run, and thousands of small tensors are allocated."""
    if not _machine:
        _machine.append(read_topology())
    return _machine[0]


def _remember(address: int, report: Report) -> None:
    # Memory is freed without Python being told, so stale reports are removed once they are the majority.
    if len(_reports) > 64 + 2 * _native.usage()[0]:
        for dead in [a for a in _reports if not _native.is_live(a)]:
            del _reports[dead]
    _reports[address] = report


def _register(region: _native.Region, report: Report) -> None:
    """Pin the whole region, or nothing, through torch's own binding of the CUDA runtime."""
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
    """Called when the last user of pinned memory is gone, before it is returned to the kernel. Raising here keeps it mapped."""
    cudart: Any = torch.cuda.cudart()
    for start in _registered.pop(address):
        code = int(cudart.cudaHostUnregister(start))
        if code != 0:
            raise RuntimeError(f"cudaHostUnregister: {cudart.cudaGetErrorString(cudart.cudaError(code))}")


def _clear_cuda_error() -> None:
    """Launch a kernel that consumes the error of a failed call, so that the caller's next launch does not report it."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
