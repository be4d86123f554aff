"""Zeroed, pinned host memory: allocation speed, size overhead and copy speed, against every peer in the same run.

    python benchmarks/host_memory.py 8 32 --grow 40 --out host_memory.parquet

The allocators take turns, in an order rotated each round, so that machine drift affects all alike. Raw samples go into a parquet
file; the table has medians. Without CUDA nothing is pinned, and peers that need CUDA are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import host_memory_ways
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ldft import _native, environment
from ldft.memory import placing
from ldft.memory.probe import process_memory

GIB = 1 << 30
SEED = "seed: posix_memalign"
# Layers, hidden, intermediate, heads, key-value heads, head size, vocabulary, tied embeddings, biases on q, k and v: from
# the models' published configurations.
SHAPES = {
    "Llama-3.2-1B": (16, 2048, 8192, 32, 8, 64, 128256, True, False),
    "Llama-3.2-3B": (28, 3072, 8192, 24, 8, 128, 128256, True, False),
    "Llama-3.1-8B": (32, 4096, 14336, 32, 8, 128, 128256, False, False),
    "Qwen2.5-1.5B": (28, 1536, 8960, 12, 2, 128, 151936, True, True),
    "Qwen2.5-7B": (28, 3584, 18944, 28, 4, 128, 152064, False, True),
    "Qwen2.5-14B": (48, 5120, 13824, 40, 8, 128, 152064, False, True),
    "Mistral-Nemo-12B": (40, 5120, 14336, 32, 8, 128, 131072, False, False),
}


def grow(gib: float) -> float:
    """Touch and free `gib` GiB first: some virtual machines receive memory slowly, at the first touch only. Returns seconds."""
    start = time.perf_counter()
    cpus = sorted(os.sched_getaffinity(0))
    # One GiB at a time, keeping all, so that the virtual machine has to grow.
    held = []
    for _ in range(int(gib)):
        region = _native.Region(GIB, True)
        region.touch([([(0, GIB, -1)], cpus, len(cpus))])
        held.append(region)
    for region in held:
        region.release()
    return time.perf_counter() - start


def tensor_elements(shape: tuple[int, ...]) -> list[int]:
    """Elements of every weight of a model."""
    layers, hidden, wide, heads, kv_heads, head, vocabulary, tied, biases = shape
    query, key = heads * head, kv_heads * head
    layer = [hidden * query, hidden * key, hidden * key, query * hidden, *[hidden * wide] * 3, hidden, hidden]
    layer += [query, key, key] if biases else []
    return layer * layers + [vocabulary * hidden, hidden] + ([] if tied else [vocabulary * hidden])


def reserved_over_needed(shape: tuple[Any, ...]) -> dict[str, float]:
    """Bytes reserved / bytes needed for the 16-bit weights, one allocation per tensor: ours from ldft's allocator, the others by
    their rounding rules (torch: the next power of two; the seed: the next multiple of 4096)."""
    sizes = [2 * elements for elements in tensor_elements(shape)]
    exact = {}
    for size in set(sizes):
        region = _native.Region(size, True)
        exact[size] = region.bytes
        region.release()
    return {
        "ours": sum(exact[size] for size in sizes) / sum(sizes),
        "torch": sum(1 << (size - 1).bit_length() for size in sizes) / sum(sizes),
        "seed": sum(-(-size // 4096) * 4096 for size in sizes) / sum(sizes),
    }


def copy_gb_per_s(tensor: torch.Tensor) -> tuple[list[float], list[float]]:
    """Host to device and device to host, GB/s, of up to 1 GiB of the buffer, five times each, timed by the device."""
    part = tensor[: min(tensor.numel(), GIB)]
    device = torch.empty_like(part, device="cuda")
    results: tuple[list[float], list[float]] = ([], [])
    for samples, to, source in ((results[0], device, part), (results[1], part, device)):
        for repeat in range(6):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            to.copy_(source, non_blocking=True)
            end.record()
            end.synchronize()
            if repeat:
                samples.append(part.numel() / 1e6 / begin.elapsed_time(end))
    return results


def measure(name: str, way: Callable[..., host_memory_ways.Buffer], size: int, pin: bool) -> dict[str, Any]:
    """One allocation and its release, with the copies in between."""
    start = time.perf_counter()
    tensor, release, parts = way(size, pin)
    sample: dict[str, Any] = {"way": name, "gib": size / GIB, "allocate_s": time.perf_counter() - start, **parts}
    assert int(tensor[:: size // 1000 or 1].count_nonzero()) == 0
    sample["pinned"] = pin and tensor.is_pinned()
    if pin:
        sample["h2d_gb_per_s"], sample["d2h_gb_per_s"] = copy_gb_per_s(tensor)
    del tensor
    start = time.perf_counter()
    release()
    sample["release_s"] = time.perf_counter() - start
    return sample


def limits(gib: float) -> dict[str, float]:
    """The machine's limits, GB/s: writing existing memory, and the kernel clearing pages on all usable cores."""
    size = int(gib * GIB)
    cpus = sorted(os.sched_getaffinity(0))
    clear, write = [], []
    for _ in range(3):
        region = _native.Region(size, True)
        start = time.perf_counter()
        region.touch([([(0, size, -1)], cpus, len(cpus))])
        clear.append(size / 1e9 / (time.perf_counter() - start))
        memory = torch.from_dlpack(region.capsule(None))
        start = time.perf_counter()
        memory.fill_(1)
        write.append(size / 1e9 / (time.perf_counter() - start))
        del memory
    return {"page_clear_gb_per_s": max(clear), "dram_write_gb_per_s": max(write)}


def probe_s_per_gib() -> dict[str, float]:
    """Seconds to read a process's numa_maps per GiB of 4 KiB pages, and of huge pages."""
    seconds = {}
    for name, huge in (("4 KiB", False), ("huge", True)):
        region = _native.Region(GIB, huge)
        region.touch([([(0, GIB, -1)], [], len(os.sched_getaffinity(0)))])
        times = []
        for _ in range(3):
            start = time.perf_counter()
            process_memory(os.getpid())
            times.append(time.perf_counter() - start)
        region.release()
        seconds[name] = min(times)
    return seconds


def scheduling() -> dict[str, Any]:
    """How busy the machine was, and the scheduling policy: on a shared machine, prefix the command with `chrt -f 50` to keep the
    CPUs."""
    policies = {os.SCHED_OTHER: "other", os.SCHED_FIFO: "fifo", os.SCHED_RR: "rr"}
    policy = os.sched_getscheduler(0)
    return {"scheduler": policies.get(policy, str(policy)), "load_average": os.getloadavg()}


def report(samples: list[dict[str, Any]], limit: dict[str, float], pin: bool) -> None:
    def median(way: str, gib: float, key: str) -> float:
        values: list[float] = []
        for sample in samples:
            if sample["way"] == way and sample["gib"] == gib and key in sample:
                values += sample[key] if isinstance(sample[key], list) else [sample[key]]
        return statistics.median(values) if values else float("nan")

    clear, write = limit["page_clear_gb_per_s"], limit["dram_write_gb_per_s"]
    print(f"limits: kernel clears pages at {clear:.1f} GB/s, DRAM takes writes at {write:.1f} GB/s (all cores)")
    for gib in sorted({sample["gib"] for sample in samples}):
        bound = gib * GIB / 1e9 / clear
        print(f"\n{gib:g} GiB, zeroed{' and pinned' if pin else ''}; the limit is {bound:.3f} s (page clearing)")
        print(
            f"{'way':<28}{'n':>3}{'allocate s':>12}{'release s':>11}{'ours is':>9}{'release':>9}{'with it':>9}", end=""
        )
        print(f"{'H2D GB/s':>10}{'D2H GB/s':>10}" if pin else "")
        own = median("ours", gib, "allocate_s"), median("ours", gib, "release_s")
        for way in dict.fromkeys(sample["way"] for sample in samples if sample["gib"] == gib):
            count = sum(1 for sample in samples if sample["way"] == way and sample["gib"] == gib)
            got, back = median(way, gib, "allocate_s"), median(way, gib, "release_s")
            ratios = got / own[0], back / own[1], (got + back) / sum(own)
            print(
                f"{way:<28}{count:>3}{got:>12.3f}{back:>11.3f}" + "".join(f"{ratio:>8.2f}x" for ratio in ratios), end=""
            )
            print(f"{median(way, gib, 'h2d_gb_per_s'):>10.1f}{median(way, gib, 'd2h_gb_per_s'):>10.1f}" if pin else "")
        parts = {key: median("ours", gib, key) for key in ("place_s", "touch_s", "verify_s", "register_s")}
        print("ours, by part: " + ", ".join(f"{name[:-2]} {value:.3f} s" for name, value in parts.items()))
        ratio = median(SEED, gib, "touch_s") / parts["touch_s"]
        best = {w: min(x["touch_s"] for x in samples if x["way"] == w and x["gib"] == gib) for w in ("ours", SEED)}
        print(
            f"touching alone: {ratio:.1f}x faster than the seed's memset (medians), {best[SEED] / best['ours']:.1f}x at best"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gib", nargs="+", type=float, help="sizes, GiB")
    parser.add_argument(
        "--grow", type=float, default=0, help="GiB to touch and free first (for growing virtual machines)"
    )
    parser.add_argument(
        "--budget-s", type=float, default=170, help="start no further round that would exceed this (default 170)"
    )
    parser.add_argument(
        "--warm",
        action="store_true",
        help="run each way once unmeasured right before measuring it: for virtual machines that reclaim freed memory",
    )
    parser.add_argument("--max-rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("host_memory.parquet"))
    arguments = parser.parse_args()
    pin = torch.cuda.is_available()
    if arguments.grow:
        print(f"grew {arguments.grow:g} GiB in {grow(arguments.grow):.1f} s", flush=True)
    ways, missing = host_memory_ways.available(pin)
    for name, why in missing.items():
        print(f"left out: {name} ({why})")
    # Growing is what --grow is for; the machine's size as shown may lag behind.
    placing.settings.capacity_gib = arguments.grow or None

    limit = limits(min(8.0, *arguments.gib))
    # Unmeasured: the first registration of this size also builds page tables that later ones find.
    measure("ours", ways["ours"], int(max(arguments.gib) * GIB), pin)
    samples: list[dict[str, Any]] = []
    began, cost, rounds = time.perf_counter(), dict.fromkeys(arguments.gib, 0.0), dict.fromkeys(arguments.gib, 0)
    while True:
        # The size with the fewest rounds that still fits the budget; every size gets one.
        left = arguments.budget_s - (time.perf_counter() - began)
        ready = [g for g in arguments.gib if rounds[g] < arguments.max_rounds and (rounds[g] == 0 or cost[g] < left)]
        if not ready:
            break
        gib = min(ready, key=lambda g: (rounds[g], g))
        names = list(ways)
        turn = rounds[gib] % len(names)
        start = time.perf_counter()
        for name in names[turn:] + names[:turn]:
            if arguments.warm:
                measure(name, ways[name], int(gib * GIB), False)
            samples.append(measure(name, ways[name], int(gib * GIB), pin) | {"round": rounds[gib]})
        cost[gib] = time.perf_counter() - start
        rounds[gib] += 1
        print(f"{gib:g} GiB: round {rounds[gib]}, {cost[gib]:.1f} s", flush=True)
    # Again, so that a busy moment does not lower the limit.
    limit = {name: max(value, limit[name]) for name, value in limits(min(8.0, *arguments.gib)).items()}
    report(samples, limit, pin)

    print(f"\n{'bytes reserved / needed':<28}{'ours':>9}{'seed':>9}{'torch':>9}")
    for model, shape in SHAPES.items():
        ratios = reserved_over_needed(shape)
        print(f"{model:<28}" + "".join(f"{ratios[who]:>9.5f}" for who in ("ours", "seed", "torch")))
    probe = probe_s_per_gib()
    print(
        f"\nprobe: {probe['4 KiB'] * 1000:.1f} ms a GiB of 4 KiB pages, so {probe['4 KiB'] * 200:.1f} s for 200 GiB",
        end="",
    )
    print(f"; {probe['huge'] * 1000:.2f} ms a GiB of huge pages, so {probe['huge'] * 200:.2f} s")

    about = json.dumps(environment.describe() | limit | scheduling(), default=str)
    rows = [sample | {"environment_json": about} for sample in samples]
    pq.write_table(pa.Table.from_pylist(rows), arguments.out)
    print(f"{len(rows)} samples: {arguments.out}")


if __name__ == "__main__":
    main()
