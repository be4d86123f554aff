"""Cases: a node that is full. Strict placement is refused with nothing left behind, relaxed placement says how much went elsewhere,
every time, and the kernel kills nobody (suite.py looks after every case). Runs in the emulated machine.
"""

import contextlib
import gc
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from .guest_placement import PAGE, allocate, check_shares, placement, reader
from .suite import Cases, check

CASES = Cases()
FULL, ROOM_MIB, TIMES = 3, 48, 100
SPECS = {
    "bind": ("bind", (FULL,), (), "auto"),
    "weighted": ("weighted_interleave", (0, FULL), (1, 3), "stripes"),
    "interleave": ("interleave", (1, FULL), (), "auto"),
    "interleave_kernel": ("interleave", (2, FULL), (), "kernel"),
}


def free_mib(node: int) -> float:
    lines = Path(f"/sys/devices/system/node/node{node}/meminfo").read_text().splitlines()
    return next(int(line.split()[-2]) / 1024 for line in lines if "MemFree" in line)


def drop_caches() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("3")


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20


@contextlib.contextmanager
def nearly_full(room_mib: float):
    """Fills the node up to `room_mib`, by a mapping that knows nothing of ldft's accounts: another process's, as it were."""
    drop_caches()
    script = (
        "import mmap, sys\n"
        "kept = []\n"
        "for line in sys.stdin:\n"
        "    kept.append(mmap.mmap(-1, int(line), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))\n"
        f"    for at in range(0, len(kept[-1]), {PAGE}): kept[-1][at] = 1\n"
        "    print('filled', flush=True)\n"
    )
    words = ["numactl", f"--preferred={FULL}", sys.executable, "-I", "-S", "-c", script]
    hog = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert hog.stdin and hog.stdout
        # Several times: pages on the CPUs' own lists are free, too, and are not counted as such until they are given back.
        for _ in range(20):
            size = int((free_mib(FULL) - room_mib) * 2**20) // PAGE * PAGE
            if size <= 4 << 20:
                break
            hog.stdin.write(f"{size}\n".encode())
            hog.stdin.flush()
            check(hog.stdout.readline() == b"filled\n", "the node could not be filled")
        check(free_mib(FULL) < room_mib + 8, f"{free_mib(FULL):.0f} MiB are free on node {FULL}")
        yield
    finally:
        hog.communicate()


def need_mib(spec: tuple, mib: float) -> float:
    """What of a tensor falls to the full node."""
    weights = dict(zip(spec[1], spec[2] or (1,) * len(spec[1]), strict=True))
    return mib * weights[FULL] / sum(weights.values())


@CASES.add("strict_is_refused_100_times")
def strict_is_refused() -> dict:
    """Sizes clearly too large: HostMemoryError that names the node, and neither memory nor address space is kept."""
    from ldft.memory.policy import HostMemoryError

    generator, refused = random.Random(4), 0
    allocate(SPECS["bind"], PAGE, False)  # whatever the first one loads is not to be counted below
    with nearly_full(ROOM_MIB):
        before, resident = [free_mib(node) for node in range(4)], resident_mib()
        for turn in range(TIMES):
            spec = list(SPECS.values())[turn % len(SPECS)]
            mib = 3 * ROOM_MIB + generator.uniform(0, 64)
            try:
                allocate(spec, int(mib * 2**20), bool(turn % 3))
            except HostMemoryError as error:
                refused += 1
                check("\n" not in str(error) and f"node {FULL}" in str(error), f"message: {error}")
            else:
                raise AssertionError(f"turn {turn}: {mib:.0f} MiB of {spec} were given")
        gc.collect()
        lost = [round(b - free_mib(node)) for node, b in enumerate(before)]
        # Between the nodes with CPUs the kernel's NUMA balancing moves this program's own pages meanwhile: only the sum is ours.
        check(max(sum(lost), lost[FULL]) <= 16, f"MiB that did not come back, by node: {lost}")
        check(resident_mib() - resident <= 8, f"resident memory grew by {resident_mib() - resident:.0f} MiB")
    return {"refused": refused, "mib_lost_by_node": lost}


@CASES.add("a_role_too_large_for_its_node_is_refused_before_anything_starts")
def role_is_refused() -> dict:
    """`python -m ldft` on a node with less room than the role needs: one line that names the node, exit code 2, no worker."""
    words = [
        sys.executable,
        "-m",
        "ldft",
        "model=nano",
        "model.vocab_size=500000",
        "seq_len.tokens=16",  # so that the logits are small, and the machine as a whole has room
        f"numa.roles.momentum.nodes=[{FULL}]",
    ]
    with nearly_full(ROOM_MIB), tempfile.TemporaryDirectory() as results:
        done = subprocess.run([*words, f"results.dir={results}"], capture_output=True, text=True, check=False)
        check(not list(Path(results).glob("*/*/worker-*.log")), "a worker was started")
    check(done.returncode == 2, f"exit code {done.returncode}: {done.stdout}{done.stderr}")
    check(f"not enough memory of node {FULL}" in done.stderr and "momentum" in done.stderr, done.stderr)
    check(done.stderr.count("\n") == 1, done.stderr)
    return {"said": done.stderr}


@CASES.add("strict_at_the_edge_is_exact_or_refused_100_times")
def strict_at_the_edge() -> dict:
    """Sizes about what is free, where the kernel's own figures promise a little more than it gives: exact, or refused."""
    from ldft.memory.policy import HostMemoryError

    generator, given = random.Random(5), 0
    with nearly_full(ROOM_MIB):
        for turn in range(TIMES):
            spec = list(SPECS.values())[turn % len(SPECS)]
            whole = need_mib(spec, 1)
            mib = max(4, (free_mib(FULL) + generator.uniform(-24, 4)) / whole)
            try:
                tensor = allocate(spec, int(mib * 2**20), bool(turn % 3))
            except HostMemoryError as error:
                check("\n" not in str(error), f"message: {error}")
                continue
            given += 1
            exact = reader()(os.getpid(), [(tensor.data_ptr(), tensor.numel())])["exact_nodes"][0]
            kept = spec if spec[3] != "auto" or spec[0] == "bind" else (*spec[:3], "kernel")
            check_shares(exact, kept, -(-tensor.numel() // PAGE), bool(turn % 3))
            del tensor
    check(0 < given < TIMES, f"{given} of {TIMES} were given: sizes do not straddle the edge")
    return {"given": given, "refused": TIMES - given}


@CASES.add("relaxed_reports_the_spill_100_times")
def relaxed_reports_the_spill() -> dict:
    """What report_of says went elsewhere is what the witness finds elsewhere."""
    from ldft.memory.allocator import report_of

    generator, spilled = random.Random(6), 0
    names = ["bind", "weighted"]  # where each page has one right node, the witness can count the wrong ones
    with nearly_full(ROOM_MIB):
        for turn in range(TIMES):
            spec = SPECS[names[turn % 2]]
            mib = (ROOM_MIB + generator.uniform(16, 64)) / need_mib(spec, 1)
            tensor = allocate(spec, int(mib * 2**20), bool(turn % 3), strict=False)
            exact = reader()(os.getpid(), [(tensor.data_ptr(), tensor.numel())])["exact_nodes"][0]
            pages = -(-tensor.numel() // PAGE)
            check(sum(exact.values()) == pages, f"{exact} are not {pages} pages")
            missing = round(need_mib(spec, pages)) - exact.get(FULL, 0)
            said = report_of(tensor).spilled_pages
            check(missing > 0, f"turn {turn}: nothing spilled: {exact}")
            check(
                abs(said - missing) <= 1,
                f"turn {turn}: the report says {said} pages, the witness finds {missing}: {exact}",
            )
            check(not tensor[::PAGE].any(), "not zero")
            spilled += said
            del tensor
    return {"spilled_pages": spilled}


@CASES.add("page_cache_on_the_node_makes_room")
def page_cache_makes_room() -> dict:
    """A node full of file pages that nobody needs is not full: strict placement gets it, exactly."""
    import torch

    drop_caches()
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"  # the largest file at hand
    with nearly_full(320):
        subprocess.run(["numactl", f"--membind={FULL}", "cat", library], stdout=subprocess.DEVNULL, check=True)
        free = free_mib(FULL)
        check(free < 200, f"the page cache left {free:.0f} MiB free")
        tensor = allocate(SPECS["bind"], 240 << 20, False)
        exact = reader()(os.getpid(), [(tensor.data_ptr(), tensor.numel())])["exact_nodes"][0]
        check(exact == {FULL: (240 << 20) // PAGE}, f"{exact}")
    return {"free_mib_before": free}


@CASES.add("preferred_goes_elsewhere_without_an_error")
def preferred_spills() -> None:
    with nearly_full(ROOM_MIB):
        tensor = allocate(("preferred", (FULL,), (), "auto"), 96 << 20, False)
        exact = reader()(os.getpid(), [(tensor.data_ptr(), tensor.numel())])["exact_nodes"][0]
        check(sum(exact.values()) == (96 << 20) // PAGE and len(exact) > 1, f"{exact}")


@CASES.add("more_than_the_machine_is_refused")
def more_than_the_machine() -> None:
    import torch

    from ldft.memory.allocator import allocate as real
    from ldft.memory.policy import HostMemoryError

    for kind, nodes in (("default", ()), ("bind", (0, 1, 2, 3)), ("interleave", ()), ("preferred", (2,))):
        for strict in (True, False):
            try:
                real(7 << 30, torch.uint8, placement(kind, nodes, (), "auto"), strict=strict)
            except HostMemoryError:
                continue
            raise AssertionError(f"7 GiB of {kind}, strict={strict}, were given on a machine of 5")


@CASES.add("most_of_the_machine_is_given_and_comes_back")
def most_of_the_machine() -> dict:
    """Interleaving over more than one node can give: strict refuses, relaxed takes what is free elsewhere; nobody is killed."""
    import torch

    from ldft.memory.allocator import allocate as real
    from ldft.memory.allocator import report_of
    from ldft.memory.policy import HostMemoryError

    drop_caches()
    wanted = placement("weighted_interleave", (2, 3), (1, 1), "auto")
    with contextlib.suppress(HostMemoryError):
        real(2560 << 20, torch.uint8, wanted)
        raise AssertionError("2560 MiB were given on two nodes that have 2048")
    tensor = real(2560 << 20, torch.uint8, wanted, strict=False)
    exact = reader()(os.getpid(), [(tensor.data_ptr(), tensor.numel())])["exact_nodes"][0]
    elsewhere = sum(count for node, count in exact.items() if node not in (2, 3))
    check(
        elsewhere > 0 and report_of(tensor).spilled_pages >= elsewhere,
        f"{exact}, said {report_of(tensor).spilled_pages}",
    )
    del tensor
    free = free_mib(2) + free_mib(3)
    check(free > 1800, f"only {free:.0f} MiB came back")
    return {"pages": exact}
