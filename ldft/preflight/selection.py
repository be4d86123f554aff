"""Choices of a run, made once: the machine's nodes, the DeepSpeed config, attention, Liger Kernel, and which kernel updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ldft.config import AttentionKind, Config
from ldft.memory.topology import Topology, read_topology
from ldft.preflight import (
    attention,
    deepspeed_config,
    liger,
    mlp_tiles,
    sequence_parallel,
    update_overlap,
    zero_buckets,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The config with these choices, passed to all code that needs more than the config's values."""

    config: Config
    topology: Topology
    deepspeed: dict[str, Any]
    """The effective DeepSpeed config, including the user's file and keys."""
    attention: AttentionKind
    """Never auto."""
    repeats_heads: bool
    """Whether keys and values are repeated for each query of their group."""
    liger: bool
    fused_step: bool
    """Whether ldft's own kernel updates the offloaded weights."""
    overlap_step: bool
    """Whether it does so beside the next forward pass."""
    no_overlap: str
    """Why it does not; empty if it does, or if no weights are updated in host memory."""

    gpu_share: int = 0
    """Parameters of one rank whose optimizer state is on the GPU, from the front of the model; chosen by gpu_share.py."""
    about_share: str = ""
    """Why so many, or why none; empty if the question does not arise."""
    mlp_tiles: int = 1
    """Tiles in which each MLP runs; 1: none."""
    device_inputs: int = 1
    """Kept layer inputs that stay on the device under checkpointing=cpu, from the last; chosen by device_inputs.py."""

    @property
    def choices(self) -> dict[str, Any]:
        """What resolved.py chose by the machine's memory: fields of this class, which the ranks take from the parent."""
        return {"gpu_share": self.gpu_share, "device_inputs": self.device_inputs}

    @property
    def zero(self) -> dict[str, Any]:
        """DeepSpeed's settings of ZeRO."""
        section: dict[str, Any] = self.deepspeed["zero_optimization"]
        return section

    @property
    def shares_gradients(self) -> bool:
        """Whether the update reads the gradients in the precision in which they are accumulated, so that none are kept in fp32."""
        return self.fused_step and self.config.offload.stage == 3

    @property
    def fetches_whole_layers(self) -> bool:
        """Whether ZeRO-3 fetches the weights of a layer together, and reduces its gradients together (zero_buckets.py)."""
        asked = self.zero.get("leaf_module", {}).get("name_suffixes")
        return bool(asked) and asked == zero_buckets.leaf_modules(self.config).get("name_suffixes")

    @property
    def uses_arenas(self) -> bool:
        """Whether offloaded tensors are in ldft's arenas."""
        return deepspeed_config.uses_arenas(self.config, self.deepspeed)


def select(config: Config, *, topology: Topology | None = None, deepspeed: dict[str, Any] | None = None) -> Selection:
    """Make the choices for a config whose device is resolved.

    topology: by default this machine's. deepspeed: the effective DeepSpeed config if already built; by default it is built here,
    which reads the user's file. Raises ConfigError if values cannot be combined or cannot run here. The share and the inputs on the
    GPU are chosen later (resolved.py).
    """
    settings = deepspeed_config.build(config) if deepspeed is None else deepspeed
    kind = attention.choose(config)
    sequence_parallel.check(config, settings, kind)
    fused = deepspeed_config.fuses_step(config, settings)
    overlaps, obstacle = update_overlap.choose(config, settings, fused=fused)
    return Selection(
        config=config,
        topology=topology or read_topology(),
        deepspeed=settings,
        attention=kind,
        repeats_heads=attention.repeats_heads(config, kind),
        liger=liger.wanted(config),
        fused_step=fused,
        overlap_step=overlaps,
        no_overlap=obstacle,
        mlp_tiles=mlp_tiles.choose(config),
    )
