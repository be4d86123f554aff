"""Cases: what the kernel does against placements, and that ldft's counters tell. Runs in the emulated machine."""

import contextlib
import os
import time
from pathlib import Path

from .guest_full import FULL, ROOM_MIB, nearly_full
from .guest_placement import PAGE, allocate, check_shares, reader, set_kernel_weights
from .guest_process import ALL, Child
from .suite import Cases, check

CASES = Cases()
KHUGEPAGED = Path("/sys/kernel/mm/transparent_hugepage/khugepaged")
WEIGHTED = {"kind": "weighted_interleave", "nodes": [0, 3], "weights": [1, 2]}
TENSORS = {
    # spec, MiB, huge pages
    "base pages by the kernel": (("weighted_interleave", (0, 3), (1, 2), "kernel"), 48, False),
    "huge pages by the kernel": (("interleave", (0, 3), (), "kernel"), 48, True),
    "base pages in stripes": (("weighted_interleave", (0, 3), (5, 2), "stripes"), 42, False),
    "huge pages in stripes": (("weighted_interleave", (0, 3), (5, 2), "stripes"), 42, True),
    "base pages of one node": (("bind", (2,), (), "auto"), 17, False),
}


@contextlib.contextmanager
def busy_khugepaged():
    """khugepaged at full speed: it looks at all memory again and again, without a pause."""
    files = [KHUGEPAGED / name for name in ("pages_to_scan", "scan_sleep_millisecs", "alloc_sleep_millisecs")]
    before = [file.read_text() for file in files]
    try:
        for file, value in zip(files, (str(1 << 20), "0", "0"), strict=True):
            file.write_text(value)
        yield
    finally:
        for file, value in zip(files, before, strict=True):
            file.write_text(value)


def scans() -> int:
    return int((KHUGEPAGED / "full_scans").read_text())


def wait_for(holds, what: str, limit_s: float = 120) -> None:
    end = time.monotonic() + limit_s
    while not holds():
        check(time.monotonic() < end, f"{what}: not in {limit_s} s")
        time.sleep(0.2)


def shares_of(child: Child) -> dict[int, int]:
    return reader()(child.process.pid, child.said["ranges"])["exact_nodes"][0]


@CASES.add("khugepaged_moves_a_processs_memory_but_no_tensor_of_ours")
def khugepaged_moves() -> dict:
    """Base pages that a process took under its own policy are merged onto one node, and drift.py counts it; what allocate() has
    placed stays where it is, to the page."""
    from ldft.memory.drift import read_counters

    set_kernel_weights(ALL, (1, 1, 1, 1))
    with Child("mergeable", WEIGHTED) as child:
        tensors = {name: allocate(spec, mib << 20, huge) for name, (spec, mib, huge) in TENSORS.items()}
        taken = shares_of(child)
        total = sum(taken.values())
        check(abs(taken[0] / total - 1 / 3) < 0.01, f"before: {taken}")
        before = read_counters()
        with busy_khugepaged():
            wait_for(lambda: shares_of(child).get(0, 0) < 0.1 * total, "khugepaged has not merged what it should")
            seen = scans()
            wait_for(lambda: scans() >= seen + 3, "khugepaged has not looked at everything again")
        drift = read_counters().since(before)
        merged = drift.merged_bytes
        check(
            merged >= total * PAGE * 0.8,
            f"khugepaged merged {total * PAGE} bytes of the child, the counter says {merged}",
        )
        check(any("khugepaged" in said for said in drift.explain({0, 3})), drift)
        after = shares_of(child)
        for name, (spec, mib, huge) in TENSORS.items():
            tensor = tensors[name]
            found = reader()(os.getpid(), [(tensor.data_ptr(), tensor.numel())])["exact_nodes"][0]
            try:
                check_shares(found, spec, (mib << 20) // PAGE, huge)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
    set_kernel_weights(ALL, (1, 1, 1, 1))
    return {"before": taken, "after": after}


@CASES.add("a_full_node_is_passed_over_and_counted")
def passed_over() -> dict:
    """An interleave over a node that fills up goes on elsewhere, and drift.py names that node and no other."""
    from ldft.memory.drift import read_counters

    with nearly_full(ROOM_MIB):
        before = read_counters()
        with Child("plain", {"kind": "interleave", "nodes": [1, FULL]}) as child:
            found = shares_of(child)
            pages = sum(found.values())
            missing = pages // 2 - found.get(FULL, 0)
            check(missing > 1000, f"the node was not full: {found}")
        drift = read_counters().since(before)
        counted = drift.passed_over[FULL]
        # The counter is the machine's: other processes may have been passed over as well.
        check(
            0.9 * missing <= counted <= 1.5 * missing + 500, f"{missing} pages went elsewhere, {counted} were counted"
        )
        said = drift.explain({1, FULL})
        check(any(f"node {FULL} {counted} times" in text and "node 1" not in text for text in said), said)
    return {"found": found, "passed_over": counted}
