"""Samples such as machines with several nodes and GPUs give, without such a machine."""

from __future__ import annotations

import random
from dataclasses import replace

from ldft.monitor.samples import DeviceUse, NodeUse, RankUse, RoleUse, RunUse, Sample

GIB = 1 << 30
PREPARING = ("start", "imports", "operators", "model", "engine")


def machine(noise: random.Random, number: int, ranks: int = 2, num_nodes: int = 4) -> Sample:
    """A sample such as a machine with four nodes and two GPUs gives: everything that varies there varies here."""
    sizes = {"compute_weights": 2, "compute_gradients": 2, "activations": 3}
    names = ("master_weights", "master_gradients", "momentum", "variance", *sizes)
    used = []
    for rank in range(ranks):
        roles = [
            RoleUse(role=name, node=node, size=sizes.get(name, 4) * GIB + 4096 * rank + node)
            for name in names
            for node in range(num_nodes)
        ]
        device = DeviceUse(
            vram_used=60 * GIB + noise.randrange(8 * GIB),
            vram_total=80 * GIB,
            utilisation_percent=noise.randrange(101),
            pcie_rx_kb_per_s=noise.randrange(55_000_000),
            pcie_tx_kb_per_s=noise.randrange(55_000_000),
        )
        memory = tuple((node, 40 * GIB + noise.randrange(64 << 20)) for node in range(num_nodes))
        used.append(
            RankUse(
                rank=rank,
                pid=1000 + rank,
                phase="train",
                cores_busy=8 * noise.random(),
                memory=memory,
                memory_age_s=5 * noise.random(),
                roles=tuple(roles),
                pinned=100 * GIB,
                device=device,
            )
        )
    nodes = [
        NodeUse(
            node=node,
            total=256 * GIB,
            free=100 * GIB - number * 100_000 + noise.randrange(64 << 20),
            page_cache=20 * GIB + number * 100_000 + noise.randrange(16 << 20),
            huge_total=0,
            huge_free=0,
        )
        for node in range(num_nodes)
    ]
    run = RunUse(
        folder="results/0123456789ab/attempt-1",
        user="somebody",
        title="",
        phase="train",
        phase_text="training",
        iteration=number // 30,
        iterations=1000,
        update_s=number / 100,
        tokens_per_s=1000.0,
        ranks=tuple(used),
        forbidden=False,
    )
    return Sample(time=1.7e9 + number + 0.01 * noise.random(), nodes=tuple(nodes), runs=(run,))


def whole_run(noise: random.Random, samples: int = 120) -> list[Sample]:
    """A run of two ranks on four nodes: a phase every eight samples, then training; memory grows until then."""
    found = []
    for number in range(samples):
        at = number // 8
        phase = PREPARING[at] if at < len(PREPARING) else "train"
        grown = min(1.0, (number + 1) / (8 * len(PREPARING)))
        plain = machine(noise, number)
        (run,) = plain.runs
        ranks = []
        for rank in run.ranks:
            roles = rank.roles if phase in ("engine", "train") else ()
            memory = tuple((node, int(grown * size)) for node, size in rank.memory or ())
            ranks.append(replace(rank, roles=roles, memory=memory, memory_age_s=float(number % 2), phase=phase))
        iteration = max(0, number - 8 * len(PREPARING)) // 10
        found.append(replace(plain, runs=(replace(run, phase=phase, iteration=iteration, ranks=tuple(ranks)),)))
    return found
