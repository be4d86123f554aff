"""The monitor's lines for machines that are not at hand: four nodes, GPUs, many ranks; and text that others choose."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from ldft.monitor import view
from ldft.monitor.processes import Parent
from ldft.monitor.samples import DeviceUse, NodeUse, RankUse, RoleUse, Sample
from tests.synthetic_samples import GIB, machine

NODES = range(4)


def shown(sample: Sample, width: int = 100, parents: tuple[Parent, ...] = ()) -> list[str]:
    history = view.History()
    history.add(sample)
    return view.lines(sample, parents, history, width)


def cells(lines: list[str], name: str) -> list[str]:
    """Of the last line that begins with the name."""
    line = [line.strip() for line in lines if line.strip().startswith(f"{name}  ")][-1]
    return line.removeprefix(name).split()


def role(name: str, *gib: float) -> list[RoleUse]:
    return [RoleUse(role=name, node=node, size=int(size * GIB)) for node, size in enumerate(gib)]


@pytest.fixture
def placed() -> Sample:
    """Two ranks, each role in other shares on other nodes."""
    plain = machine(random.Random(0), 1)
    (run,) = plain.runs
    memory = tuple((node, (10 * node + 20) * GIB) for node in NODES)
    roles = (*role("momentum", 1, 2, 3, 4), *role("variance", 8, 7, 6, 5))
    ranks = [replace(rank, memory=memory, memory_age_s=0.0, roles=roles) for rank in run.ranks]
    return replace(plain, runs=(replace(run, ranks=tuple(ranks)),))


def test_each_role_is_on_its_nodes_and_other_is_the_rest(placed: Sample) -> None:
    lines = shown(placed)
    assert cells(lines, "memory") == ["node", "0", "node", "1", "node", "2", "node", "3", "total"]
    assert cells(lines, "momentum") == ["2.000", "4.000", "6.000", "8.000", "20.0"]
    assert cells(lines, "variance") == ["16.0", "14.0", "12.0", "10.0", "52.0"]
    # Both ranks have 40, 60, 80 and 100 GiB on the nodes.
    assert cells(lines, "other") == ["22.0", "42.0", "62.0", "82.0", "208.0"]
    assert cells(lines, "rank 0") == cells(lines, "rank 1") == ["20.0", "30.0", "40.0", "50.0", "140.0"]


def test_a_role_whose_nodes_nobody_knows_has_a_total_alone(placed: Sample) -> None:
    (run,) = placed.runs
    ranks = [replace(rank, roles=(RoleUse(role="momentum", node=None, size=GIB),)) for rank in run.ranks]
    lines = shown(replace(placed, runs=(replace(run, ranks=tuple(ranks)),)))
    assert cells(lines, "momentum") == ["?", "?", "?", "?", "2.000"]
    assert cells(lines, "other") == ["?", "?", "?", "?", "278.0"]


def test_the_machines_nodes_are_in_order_with_their_use_over_time(placed: Sample) -> None:
    nodes = tuple(
        NodeUse(node=n, total=100 * GIB, free=(90 - 20 * n) * GIB, page_cache=n * GIB, huge_total=0, huge_free=0)
        for n in NODES
    )
    lines = shown(replace(placed, nodes=nodes))
    assert [line.split() for line in lines[2:6]] == [
        ["0", "100.0", "10.0", "90.0", "0.000", "▁"],
        ["1", "100.0", "30.0", "70.0", "1.000", "▃"],
        ["2", "100.0", "50.0", "50.0", "2.000", "▅"],
        ["3", "100.0", "70.0", "30.0", "3.000", "▆"],
    ]


def test_60_columns_hold_four_nodes_and_gpus(placed: Sample) -> None:
    (run,) = placed.runs
    device = DeviceUse(
        vram_used=140 * GIB,
        vram_total=141 * GIB,
        utilisation_percent=100,
        pcie_rx_kb_per_s=55_000_000,
        pcie_tx_kb_per_s=120_000_000,
    )
    roles = (*role("compute_gradients", 256, 256, 256, 256), *role("momentum", 1, 2, 3, 4))
    ranks: list[RankUse] = [
        replace(rank, pid=4194303, cores_busy=128.0, pinned=900 * GIB, device=device, memory_age_s=12.0, roles=roles)
        for rank in run.ranks
    ]
    lines = shown(replace(placed, runs=(replace(run, ranks=tuple(ranks)),)), width=60)
    assert max(map(len, lines)) <= 60 and not [line for line in lines if "…" in line]
    assert cells(lines, "compute_gradients") == ["512.0", "512.0", "512.0", "512.0", "2048"]
    assert cells(lines, "rank")[-2:] == ["PCIe", "GB/s"]
    assert cells(lines, "1")[-3:] == ["140.0/141.0", "100%", "55.0/120"]
    assert "PCIe rx/tx GB/s" in "\n".join(shown(replace(placed, runs=(replace(run, ranks=tuple(ranks)),)), width=80))


def test_nodes_for_which_there_is_no_room_are_counted_and_in_the_total() -> None:
    lines = shown(machine(random.Random(0), 1, num_nodes=8), width=60)
    assert max(map(len, lines)) <= 60
    assert "  4 more nodes in the total; widen the terminal to see them" in lines
    assert cells(lines, "momentum")[-1] == "64.0"
    lines = shown(machine(random.Random(0), 1, num_nodes=5), width=60)
    assert "  1 more node in the total; widen the terminal to see it" in lines


def test_rows_hold_what_matters_first() -> None:
    lines = [str(number) for number in range(36)]
    assert view.in_rows(lines, 36) == lines
    assert view.in_rows(lines, 24) == [*lines[:23], "13 more lines: enlarge the terminal, or use --once"]
    assert view.in_rows(lines, 1) == ["36 more lines: enlarge the terminal, or use --once"]
    text = shown(machine(random.Random(0), 1, ranks=8, num_nodes=8), width=80)
    assert len(text) > 24
    seen = view.in_rows(text, 24)
    assert [cells(seen, str(rank))[0] for rank in range(8)] and any("iteration" in line for line in seen)


def test_what_others_choose_reaches_no_terminal_as_a_command(placed: Sample) -> None:
    (run,) = placed.runs
    bad = "\x1b[31mred\nnext\x07\u202e"
    sample = replace(
        placed, runs=(replace(run, folder=f"/{bad}/{bad}/attempt-1", title=bad, phase="start", phase_text=bad),)
    )
    lines = shown(sample, parents=(Parent(7, "somebody", bad, None),))
    assert all(line.isprintable() for line in lines)
    assert "pid 7 of somebody: ldft ?[31mred?next??" in lines


def test_lines_for_an_encoding_without_bars() -> None:
    assert view.in_encoding(["▁▃█", "cut…"], "ascii") == ["138", "cut~"]
    assert view.in_encoding(["ü▁", ""], "latin-1") == ["ü1", ""]
    assert view.in_encoding(["▁"], "utf-8") == ["▁"]
