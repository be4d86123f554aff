"""The NUMA nodes of this machine, read from sysfs: no libnuma, no root, milliseconds.

Every function takes the root of the sysfs tree, so that it can also read a tree recorded on another machine.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

SYSFS = Path("/sys")
STATUS = Path("/proc/self/status")
NVIDIA = "0x10de"
# Linux 6.9 added weighted interleave and this folder; 6.16 added a file that makes the kernel compute the weights. In some builds a
# macro turned that file's name into __auto_type.
WEIGHTS_FOLDER = Path("kernel/mm/mempolicy/weighted_interleave")
AUTO_FILES = ("auto", "__auto_type")


@dataclass(kw_only=True, slots=True, frozen=True)
class Node:
    """One online NUMA node."""

    id: int
    cpus: tuple[int, ...]
    """Its CPUs; empty for a memory-only node, such as a CXL expander."""
    total_bytes: int
    """Memory that the kernel manages on the node; 0 for a CPU-only node."""
    distances: dict[int, int]
    """Distance to each online node, as the firmware reports it; 10 is local."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Topology:
    """The machine's nodes, and its kernel's NUMA features."""

    nodes: tuple[Node, ...]
    gpus: dict[str, int]
    """PCI address of each NVIDIA GPU -> its node, ordered by address; -1 if the firmware does not report it."""
    weights: dict[int, int]
    """The kernel's weights for weighted interleave, node -> weight; empty before Linux 6.9, which has none."""
    weights_auto: bool | None
    """Whether the kernel computes those weights from bandwidths; None before Linux 6.16, which cannot."""
    allowed: tuple[int, ...] = field(default=())
    """Nodes that this process may use (its cpuset)."""

    @property
    def has_weighted_interleave(self) -> bool:
        return bool(self.weights)

    @property
    def memory_nodes(self) -> tuple[int, ...]:
        """Ids of the nodes that have memory and are allowed to this process."""
        return tuple(n.id for n in self.nodes if n.total_bytes > 0 and n.id in self.allowed)

    def node(self, id: int) -> Node:
        """The node with this id. Raises KeyError."""
        for node in self.nodes:
            if node.id == id:
                return node
        raise KeyError(id)

    def cpus_nearest(self, id: int, usable: frozenset[int] | None = None) -> tuple[int, ...]:
        """CPUs of the node; if it has none that is usable, those of the nearest node that has some.

        usable: the CPUs to choose from (default: all). Empty if none of them is on a known node.
        """
        distances = self.node(id).distances
        for other in sorted(self.nodes, key=lambda n: (n.id != id, distances.get(n.id, 255), n.id)):
            cpus = other.cpus if usable is None else tuple(c for c in other.cpus if c in usable)
            if cpus:
                return cpus
        return ()


def read_topology(sysfs: Path = SYSFS, status: Path = STATUS) -> Topology:
    """Read the machine. status: the file that lists the nodes allowed to this process (Mems_allowed_list)."""
    folder = sysfs / "devices/system/node"
    online = parse_list(_text(folder / "online")) if folder.is_dir() else ()
    if online:
        nodes = tuple(_node(folder / f"node{id}", id, online) for id in online)
    else:  # a kernel without NUMA: everything is node 0
        cpus = parse_list(_text(sysfs / "devices/system/cpu/online")) or tuple(range(os.cpu_count() or 1))
        nodes = (Node(id=0, cpus=cpus, total_bytes=_physical_bytes(), distances={0: 10}),)
    weights, auto = read_weights(sysfs)
    allowed = tuple(n.id for n in nodes)
    for line in _text(status).splitlines():
        if line.startswith("Mems_allowed_list:"):
            mems = parse_list(line.partition(":")[2])
            allowed = tuple(id for id in allowed if id in mems) or allowed
    return Topology(nodes=nodes, gpus=_gpus(sysfs), weights=weights, weights_auto=auto, allowed=allowed)


def read_weights(sysfs: Path = SYSFS) -> tuple[dict[int, int], bool | None]:
    """The kernel's weights (node -> weight; empty if it has none) and whether it computes them itself (None: it cannot)."""
    folder = sysfs / WEIGHTS_FOLDER
    weights = {}
    for path in folder.glob("node*"):
        text = _text(path).strip()
        if path.name[4:].isdigit() and text.isdigit():
            weights[int(path.name[4:])] = int(text)
    auto = auto_file(sysfs)
    computed = None if auto is None else _text(auto).strip().lower() in ("1", "y", "true")
    return dict(sorted(weights.items())), computed


def auto_file(sysfs: Path = SYSFS) -> Path | None:
    """The file that makes the kernel compute its weights, under either name; None before Linux 6.16."""
    found = (sysfs / WEIGHTS_FOLDER / name for name in AUTO_FILES)
    return next((path for path in found if path.exists()), None)


def read_meminfo(path: Path = Path("/proc/meminfo")) -> dict[str, int]:
    """A meminfo file (of the machine or of one node) as field -> bytes; counts without a unit stay counts."""
    fields = {}
    for line in _text(path).splitlines():
        name, _, value = line.removeprefix("Node ").lstrip("0123456789 ").partition(":")
        parts = value.split()
        if parts and parts[0].isdigit():
            fields[name] = int(parts[0]) * (1024 if parts[1:] == ["kB"] else 1)
    return fields


def node_meminfo(id: int, sysfs: Path = SYSFS) -> dict[str, int]:
    """meminfo of one node, field -> bytes; empty where the kernel has no nodes."""
    return read_meminfo(sysfs / f"devices/system/node/node{id}/meminfo")


def parse_list(text: str) -> tuple[int, ...]:
    """The kernel's list format: "0-2,7" -> (0, 1, 2, 7)."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            numbers.extend(range(int(first), int(last or first) + 1))
    return tuple(numbers)


def format_list(numbers: tuple[int, ...]) -> str:
    """The reverse of parse_list: (0, 1, 2, 7) -> "0-2,7"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _node(folder: Path, id: int, online: tuple[int, ...]) -> Node:
    numbers = [int(word) for word in _text(folder / "distance").split()]
    return Node(
        id=id,
        cpus=parse_list(_text(folder / "cpulist")),
        total_bytes=read_meminfo(folder / "meminfo").get("MemTotal", 0),
        # One number per online node, in order (node numbers may have gaps).
        distances=dict(zip(online, numbers, strict=False)) or {id: 10},
    )


def _gpus(sysfs: Path) -> dict[str, int]:
    gpus = {}
    for device in sorted((sysfs / "bus/pci/devices").glob("*")):
        # 0x0300: VGA controller; 0x0302: 3D controller, the class of data-centre cards.
        if _text(device / "vendor").strip() == NVIDIA and _text(device / "class").startswith(("0x0300", "0x0302")):
            node = _text(device / "numa_node").strip()
            gpus[device.name] = int(node) if node.lstrip("-").isdigit() else -1
    return gpus


def _physical_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
