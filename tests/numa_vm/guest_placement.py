"""Cases: tensors of every kind of placement, against the witness in reader.py. Runs in the emulated machine.

What must come out is computed here from the request alone; nothing that ldft says of itself is believed, except that
`pages_by_node` has to say the same.
"""

import functools
import os
from pathlib import Path

from .reader import Reader
from .suite import Cases, check

CASES = Cases()
WEIGHTS = Path("/sys/kernel/mm/mempolicy/weighted_interleave")
PAGE, HUGE = 4096, 512  # bytes of a page; pages of a huge page
STRIPE = 512  # pages of the smallest stripe
ALL = (0, 1, 2, 3)
KINDS = {
    # name: kind, nodes, weights, method
    "bind_0": ("bind", (0,), (), "auto"),
    "bind_3": ("bind", (3,), (), "auto"),
    "preferred_2": ("preferred", (2,), (), "auto"),
    "interleave_0_3": ("interleave", (0, 3), (), "kernel"),
    "interleave_all": ("interleave", ALL, (), "auto"),
    "interleave_striped_0_2_3": ("interleave", (0, 2, 3), (), "stripes"),
    "weighted_kernel_1_2": ("weighted_interleave", (0, 3), (1, 2), "kernel"),
    "weighted_kernel_255_1": ("weighted_interleave", (0, 3), (255, 1), "kernel"),
    "weighted_kernel_1_2_3": ("weighted_interleave", (0, 2, 3), (1, 2, 3), "kernel"),
    "weighted_striped_5_2": ("weighted_interleave", (0, 3), (5, 2), "stripes"),
    "weighted_striped_1_2_3": ("weighted_interleave", (0, 2, 3), (1, 2, 3), "stripes"),
    "weighted_striped_255_1": ("weighted_interleave", (1, 2), (255, 1), "stripes"),
}


@functools.cache
def reader() -> Reader:
    return Reader()


def set_kernel_weights(nodes: tuple[int, ...], weights: tuple[int, ...]) -> None:
    for node, weight in zip(nodes, weights, strict=True):
        (WEIGHTS / f"node{node}").write_text(str(weight))


def placement(kind: str, nodes: tuple[int, ...], weights: tuple[int, ...], method: str):
    from ldft.memory.policy import Placement

    return Placement(kind=kind, nodes=nodes, weights=weights, method=method)


def allocate(spec: tuple, size: int, huge: bool, strict: bool = True):
    import torch

    from ldft.memory.allocator import allocate

    return allocate(size, torch.uint8, placement(*spec), huge_pages=huge, strict=strict)


def allowed_error(method: str, weight: int, cycle: int, pages: int, huge: bool) -> float:
    """Pages that a node may be off its exact share: none where the share is whole pages, or whole units of the kernel.

    Huge pages are dealt out as units, and what they do not cover at the ends is dealt out page by page: one cut cycle of each.
    """
    if method == "stripes":
        return 0.999
    unit = HUGE if huge else 1
    units = HUGE + 1 if huge else 1
    return 0 if pages % (cycle * unit) == 0 else weight * (1 - weight / cycle) * units + 1e-6


def check_shares(found: dict[int, int], spec: tuple, pages: int, huge: bool) -> None:
    kind, nodes, weights, method = spec
    check(sum(found.values()) == pages, f"{found} are not {pages} pages")
    check(set(found) <= set(nodes), f"pages outside nodes {nodes}: {found}")
    if kind in ("bind", "preferred"):
        return
    weights = weights or (1,) * len(nodes)
    for node, weight in zip(nodes, weights, strict=True):
        off = found.get(node, 0) - pages * weight / sum(weights)
        most = allowed_error("kernel" if method == "auto" else method, weight, sum(weights), pages, huge)
        check(abs(off) <= most, f"node {node} is {off:+.2f} pages off its share (at most {most:.2f}): {found}")


def check_tensor(tensor, spec: tuple, huge: bool, *, alone: bool = True) -> dict:
    """The witness finds the tensor's pages where `spec` wants them, and pages_by_node agrees. `alone`: its mappings are its own."""
    from ldft.memory.allocator import pages_by_node

    kind, nodes, weights, method = spec
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // PAGE)
    mixed = dict(zip(nodes, weights or (1,) * len(nodes), strict=True))
    seen = reader()(os.getpid(), [(tensor.data_ptr(), size)], mixed)
    exact = seen["exact_nodes"][0]
    check(tensor.data_ptr() % PAGE == 0, f"address {tensor.data_ptr():#x} is not on a page's boundary")
    check_shares(exact, spec, pages, huge)
    check(pages_by_node(tensor) == exact, f"pages_by_node says {pages_by_node(tensor)}, the witness {exact}")
    if alone:
        check(seen["outside_bytes"] == 0, f"{seen['outside_bytes']} bytes were reserved beside the tensor")
        check(seen["nodes"] == exact, f"numa_maps says {seen['nodes']}, move_pages {exact}")
        check(seen["huge_kib"] == 0 or huge, f"{seen['huge_kib']} KiB in huge pages, none were asked for")
        # Each piece smaller than a huge page, at most one a node and the end of the tensor, stays in base pages.
        small = 2048 * (len(nodes) + 1) if method == "stripes" else 2048
        check(not huge or seen["huge_kib"] > size // 1024 - small, f"only {seen['huge_kib']} KiB in huge pages")
        if kind.endswith("interleave"):
            by_kernel = [p for p in seen["policies"] if "interleave" in p]
            check(bool(by_kernel) == (method != "stripes"), f"asked for {method}, numa_maps has {seen['policies']}")
    if kind.endswith("interleave"):
        most = 2 * STRIPE if method == "stripes" else sum(mixed.values()) * (HUGE if huge else 1)
        check(seen["worst_prefix"] <= most, f"badly mixed: a beginning of it is {seen['worst_prefix']:.0f} pages off")
    return seen


@CASES.add("auto_uses_the_kernel_where_its_weights_are_those_asked_for")
def auto_chooses() -> None:
    """The first case: the weights are there before the first allocation, as in a run (ldft reads the machine once a process)."""
    set_kernel_weights((0, 3), (1, 2))
    for weights, method in (((1, 2), "kernel"), ((2, 4), "kernel"), ((5, 2), "stripes")):
        tensor = allocate(("weighted_interleave", (0, 3), weights, "auto"), 64 << 20, False)
        check_tensor(tensor, ("weighted_interleave", (0, 3), weights, method), False)


def one_tensor(name: str, mib: int, huge: bool) -> dict:
    spec = KINDS[name]
    if spec[0] == "weighted_interleave" and spec[3] == "kernel":
        set_kernel_weights(spec[1], spec[2])
    tensor = allocate(spec, mib << 20, huge)
    seen = check_tensor(tensor, spec, huge)
    check(not tensor.any(), "not zero")
    tensor[:: 1 << 20] = 7  # writing moves nothing
    check(reader()(os.getpid(), [(tensor.data_ptr(), mib << 20)])["exact_nodes"] == seen["exact_nodes"], "pages moved")
    return {"pages": seen["exact_nodes"][0], "mappings": seen["mappings"], "policies": seen["policies"]}


for _name in KINDS:
    for _mib in (16, 64, 256):
        for _huge in (False, True):
            # 255 huge pages are more than the largest tensor here: the kernel's pattern cannot show its shares.
            if not (_name == "weighted_kernel_255_1" and _huge):
                _label = f"{_name}-{_mib}MiB-{'huge' if _huge else '4KiB'}"
                CASES.add(_label, _name, _mib, _huge)(one_tensor)


@CASES.add("odd_sizes")
def odd_sizes() -> None:
    """Sizes that are no multiple of anything: shares are exact to one page still."""
    for name in (
        "bind_3",
        "interleave_striped_0_2_3",
        "weighted_striped_5_2",
        "weighted_striped_1_2_3",
        "weighted_striped_255_1",
    ):
        for size in (1, PAGE, PAGE + 1, 3 * PAGE, 7 * PAGE - 1, (2 << 20) + 5, (33 << 20) + 12345):
            for huge in (False, True):
                tensor = allocate(KINDS[name], size, huge)
                exact = reader()(os.getpid(), [(tensor.data_ptr(), size)])["exact_nodes"][0]
                try:
                    check_shares(exact, KINDS[name], -(-size // PAGE), huge)
                except AssertionError as error:
                    raise AssertionError(f"{name}, {size} bytes, huge={huge}: {error}") from None


@CASES.add("auto_after_the_kernels_weights_changed")
def weights_change_under_us() -> None:
    """Someone else (another run, numactl's user) changes the machine's weights between two of our allocations."""
    for kernel in ((1, 2), (3, 1), (1, 1), (1, 2)):
        set_kernel_weights((0, 3), kernel)
        tensor = allocate(("weighted_interleave", (0, 3), (1, 2), "auto"), 32 << 20, False)
        exact = reader()(os.getpid(), [(tensor.data_ptr(), 32 << 20)])["exact_nodes"][0]
        off = abs(exact[3] - (32 << 20) / PAGE * 2 / 3)
        check(off <= 1, f"the kernel's weights are {kernel}: {off:.0f} pages off: {exact}")


@CASES.add("many_tensors_with_weights_of_their_own")
def many_tensors() -> dict:
    """Twelve live tensors; every second one is freed and allocated anew with other weights; none disturbs another."""
    set_kernel_weights((0, 3), (1, 2))
    names = [name for name in KINDS if not (name.startswith("weighted_kernel") and name != "weighted_kernel_1_2")]
    live: dict[int, tuple] = {}
    for turn in range(2):
        for place, mib in enumerate((16, 24, 40, 17, 33, 64, 16, 20, 48, 31, 16, 24)):
            if turn and place % 2:
                continue
            live.pop(place, None)
            huge = (place + turn) % 3 != 0
            spec = KINDS[names[(place + 5 * turn) % len(names)]]
            live[place] = (allocate(spec, (mib << 20) + PAGE * place, huge), spec, huge)
        for tensor, spec, huge in live.values():
            check_tensor(tensor, spec, huge, alone=False)
        # Neighbours share mappings, so numa_maps is compared over all of them.
        ranges = [(tensor.data_ptr(), tensor.numel()) for tensor, _, _ in live.values()]
        seen = reader()(os.getpid(), ranges)
        total: dict[int, int] = {}
        for counts in seen["exact_nodes"]:
            for node, found in counts.items():
                total[node] = total.get(node, 0) + found
        check(seen["outside_bytes"] == 0, f"{seen['outside_bytes']} bytes reserved beside the tensors")
        check(seen["nodes"] == total, f"numa_maps says {seen['nodes']}, move_pages {total}")
    return {"pages": total, "mappings": seen["mappings"]}


@CASES.add("views_and_dtypes")
def views_and_dtypes() -> None:
    """pages_by_node of a view counts the pages of the view."""
    import torch

    from ldft.memory.allocator import allocate, pages_by_node

    tensor = allocate((4, 1024, 1024), torch.float32, placement("interleave", (1, 3), (), "kernel"), huge_pages=False)
    for view in (tensor[1], tensor[2:, 512:], tensor.view(-1)[1000:3000], tensor[3, 5]):
        strides = zip(view.shape, view.stride(), strict=True)
        size = (sum((n - 1) * step for n, step in strides) + 1) * view.element_size()
        exact = reader()(os.getpid(), [(view.data_ptr(), size)])["exact_nodes"][0]
        check(pages_by_node(view) == exact, f"pages_by_node says {pages_by_node(view)}, the witness {exact}")
