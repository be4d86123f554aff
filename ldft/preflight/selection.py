"""What a run is made of, decided once: the machine's nodes, the DeepSpeed config, the attention, Liger Kernel, and who updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ldft.config import AttentionKind, Config
from ldft.memory.topology import Topology, read_topology
from ldft.preflight import attention, deepspeed_config, liger


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Passed on in place of the config by all that depends on more than the config's own values."""

    config: Config
    topology: Topology
    deepspeed: dict[str, Any]
    """The effective DeepSpeed config, a user's file and keys included."""
    attention: AttentionKind
    """Never auto."""
    repeats_heads: bool
    """Whether keys and values are repeated for the queries of their group."""
    liger: bool
    fused_step: bool
    """Whether ldft's own kernel updates the offloaded weights."""

    @property
    def zero(self) -> dict[str, Any]:
        """DeepSpeed's settings of ZeRO."""
        section: dict[str, Any] = self.deepspeed["zero_optimization"]
        return section

    @property
    def uses_arenas(self) -> bool:
        """Whether offloaded tensors lie in arenas of ldft."""
        return deepspeed_config.uses_arenas(self.config, self.deepspeed)


def select(config: Config, *, topology: Topology | None = None, deepspeed: dict[str, Any] | None = None) -> Selection:
    """Decide for a config whose device is known.

    topology: by default this machine's. deepspeed: the effective DeepSpeed config where it was made before; by default it is made
    here, which reads the user's file. Raises ConfigError where values do not go together or cannot run here.
    """
    settings = deepspeed_config.build(config) if deepspeed is None else deepspeed
    kind = attention.choose(config)
    return Selection(
        config=config,
        topology=topology or read_topology(),
        deepspeed=settings,
        attention=kind,
        repeats_heads=attention.repeats_heads(config, kind),
        liger=liger.wanted(config),
        fused_step=deepspeed_config.fuses_step(config, settings),
    )
