"""A machine that is not here, for dry runs and plans, by its datasheets."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from ldft.errors import ConfigError

THIS = "this"
# Of one host, far above any: each is listed.
MOST_GPUS, MOST_CORES = 1024, 65_536


class HostLayout(Enum):
    """one_node: all cores and memory on one NUMA node. two_nodes: half of both on each. two_nodes_cxl: the same, and a CXL expander
    as a third node, without cores."""

    one_node = "one_node"
    two_nodes = "two_nodes"
    two_nodes_cxl = "two_nodes_cxl"


@dataclass(kw_only=True, slots=True)
class MachineConfig:
    name: str = THIS
    """this: the machine at hand. Others are for dry_run=true and `python -m ldft.plan`."""

    gpu: str = ""
    """GPU model, as the driver names it."""

    capability: list[int] = field(default_factory=list)
    """Its CUDA compute capability, e.g. [9,0]."""

    gpus: int = 0
    """Number of GPUs."""

    vram_gib: float = 0.0
    """Memory of each GPU, GiB."""

    memory_gb_per_s: float = 0.0
    """Bandwidth of a GPU's memory, GB/s."""

    link_gb_per_s: float = 0.0
    """Bandwidth between a GPU and the host in one direction, GB/s."""

    peer_gb_per_s: float = 0.0
    """Bandwidth between a GPU and the others in one direction, GB/s."""

    network_gb_per_s: float = 0.0
    """Bandwidth of a host's network in one direction, all adapters together, GB/s, for launch.num_hosts above 1. To be set for the
    machine at hand, too: it is not measured."""

    host: HostLayout = HostLayout.one_node
    """NUMA nodes of the host."""

    cores: int = 0
    """Cores of the host."""

    host_gib: float = 0.0
    """Memory of the host, GiB, without CXL."""

    host_gb_per_s: float = 0.0
    """Bandwidth of the host's memory, all channels together, GB/s, without CXL."""

    cxl_gib: float = 256.0
    """Memory of the CXL expander, GiB, with two_nodes_cxl."""

    cxl_gb_per_s: float = 64.0
    """Bandwidth of the expander, GB/s. 64: one direction of PCIe 5.0 x16, which carries CXL 2.0."""

    def validate(self) -> None:
        if self.network_gb_per_s < 0:
            raise ConfigError("machine.network_gb_per_s", f"{self.network_gb_per_s:g} is negative; use GB/s above 0")
        if self.name == THIS:
            return
        for key in (
            *("gpus", "vram_gib", "memory_gb_per_s", "link_gb_per_s", "peer_gb_per_s", "cores"),
            *("host_gib", "host_gb_per_s", "cxl_gib", "cxl_gb_per_s"),
        ):
            if not getattr(self, key) > 0:
                raise ConfigError(
                    f"machine.{key}", f"{getattr(self, key):g} is not positive; use the value of machine={self.name}"
                )
        for key, most in (("gpus", MOST_GPUS), ("cores", MOST_CORES)):
            if getattr(self, key) > most:
                raise ConfigError(f"machine.{key}", f"{getattr(self, key)} is too large; use at most {most}")
        if len(self.capability) != 2:
            raise ConfigError("machine.capability", f"{self.capability} is not a compute capability; write e.g. [9,0]")
