"""Recorded machines: small sysfs trees, as the kernel writes them."""

from pathlib import Path

import pytest

MIB = 1 << 20


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.fixture(name="write")
def write_fixture():
    """write(root, {path: text}): make a tree of files."""
    return write


def meminfo(node: int, total_kb: int, free_kb: int, cache_kb: int = 0) -> str:
    prefix = f"Node {node} "
    return (
        f"{prefix}MemTotal:       {total_kb} kB\n{prefix}MemFree:        {free_kb} kB\n"
        f"{prefix}Active(file):   {cache_kb} kB\n{prefix}Inactive(file): 0 kB\n{prefix}HugePages_Total:     3"
    )


@pytest.fixture
def sysfs(tmp_path):
    """Two sockets and two expanders without CPUs, of which the second has number 5 and one GPU is near socket 1."""
    node, pci = "devices/system/node", "bus/pci/devices"
    weights = "kernel/mm/mempolicy/weighted_interleave"
    return write(
        tmp_path / "sys",
        {
            f"{node}/online": "0-2,5",
            f"{node}/node0/cpulist": "0-1,4",
            f"{node}/node1/cpulist": "2-3",
            f"{node}/node2/cpulist": "",
            f"{node}/node5/cpulist": "",
            f"{node}/node0/distance": "10 21 14 24",
            f"{node}/node1/distance": "21 10 24 14",
            f"{node}/node2/distance": "14 24 10 26",
            f"{node}/node5/distance": "24 14 26 10",
            f"{node}/node0/meminfo": meminfo(0, 4096, 1024, 512),
            f"{node}/node1/meminfo": meminfo(1, 4096, 2048),
            f"{node}/node2/meminfo": meminfo(2, 8192, 8000),
            f"{node}/node5/meminfo": meminfo(5, 0, 0),
            f"{pci}/0000:17:00.0/vendor": "0x10de",
            f"{pci}/0000:17:00.0/class": "0x030200",
            f"{pci}/0000:17:00.0/numa_node": "1",
            f"{pci}/0000:18:00.0/vendor": "0x8086",
            f"{pci}/0000:18:00.0/class": "0x030000",
            f"{pci}/0000:18:00.0/numa_node": "0",
            f"{weights}/node0": "1",
            f"{weights}/node1": "1",
            f"{weights}/node2": "2",
            f"{weights}/node5": "1",
        },
    )


@pytest.fixture
def status(tmp_path):
    return (
        write(tmp_path / "self", {"status": "Name:\tpython\nMems_allowed:\t27\nMems_allowed_list:\t0-2,5"}) / "status"
    )
