"""The values among which a plan chooses. Imports no torch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from ldft.config import Config, Goal, NumaConfig, NumaScope, NumaStrategy, OffloadDevice
from ldft.config.checkpointing import CheckpointingMode, KeepAttention
from ldft.errors import CombinationError, ConfigError
from ldft.memory.topology import Topology
from ldft.preflight import sequence_parallel
from ldft.terminal import plural

# Offload options that a plan may choose, by stage and by device of parameters and optimizer, as in conf/offload.
OFFLOADS = {
    "none": (0, OffloadDevice.none, OffloadDevice.none),
    "zero3": (3, OffloadDevice.none, OffloadDevice.none),
    "optimizer": (2, OffloadDevice.none, OffloadDevice.cpu),
    "full": (3, OffloadDevice.cpu, OffloadDevice.cpu),
}
_EVERY_FOR_LONGEST = (1, 2, 3, 4)
_TILES = 16


@dataclass(frozen=True, slots=True)
class Choice:
    """One value for each knob."""

    offload: tuple[int, OffloadDevice, OffloadDevice]
    mode: CheckpointingMode
    layers: int
    every: int
    keep_attention: KeepAttention
    mlp_tiles: int | None
    micro_batch_size: int
    gradient_accumulation_steps: int
    sequence_parallel: int = 1

    @property
    def kind(self) -> tuple[object, ...]:
        """What it has in common with plans that differ only in numbers."""
        return self.offload, self.mode, self.keep_attention, self.sequence_parallel


def free(config: Config, key: str) -> bool:
    """Whether a plan may choose this key: it was not set. Choosing an option of the group checkpointing sets its mode only."""
    group = {"checkpointing.mode": "checkpointing"}.get(key, key)
    return not {key, group} & set(config.plan.keep)


def choices(config: Config) -> Iterator[Choice]:
    """Every combination of the free keys' values, valid or not. Raises ConfigError where none is possible: for a number of tokens,
    or for ranks that cannot share sequences."""
    sequence_parallel.check_whatever_is_planned(config)
    settings, count = config.checkpointing, config.model.num_layers
    modes = list(CheckpointingMode) if default(config, "checkpointing.mode") else [settings.mode]
    layers = list(range(1, count + 1)) if default(config, "checkpointing.layers") else [settings.layers]
    every = [settings.every]
    if config.plan.goal is Goal.longest and default(config, "checkpointing.every"):
        every = [k for k in _EVERY_FOR_LONGEST if k <= count]
    keeps = list(KeepAttention) if default(config, "checkpointing.keep_attention") else [settings.keep_attention]
    tiles = [None, _TILES] if default(config, "kernels.mlp_tiles") else [config.kernels.mlp_tiles]
    batches = [(*batch, ranks) for ranks in _shared(config) for batch in _batches(config, ranks)]
    if not batches:
        raise _no_batches(config)
    for offload, mode, (micro, accumulated, ranks) in itertools.product(_offloads(config), modes, batches):
        if mode is CheckpointingMode.none:
            # What was set stays, also where it makes this choice invalid.
            asked = settings.layers, settings.every, settings.keep_attention, config.kernels.mlp_tiles
            yield Choice(offload, mode, *asked, micro, accumulated, ranks)
            continue
        for number, k, keep, tile in itertools.product(layers, every, keeps, tiles):
            if tile and len(tiles) > 1 and number != count:
                continue  # only models whose layers are all recomputed have tiles
            # All layers are written as -1, as users do.
            recomputed = -1 if number == count else number
            yield Choice(offload, mode, recomputed, k, keep, tile, micro, accumulated, ranks)


def leanest(config: Config) -> Iterator[Choice]:
    """Of the choices, those that need least memory of each kind: all layers recomputed, as few outputs kept as possible."""
    found = list(choices(config))
    layers = {choice.layers for choice in found if choice.mode is not CheckpointingMode.none}
    keeps = {choice.keep_attention for choice in found if choice.mode is not CheckpointingMode.none}
    for choice in found:
        whole = choice.layers == -1 or len(layers) == 1
        least = choice.keep_attention is KeepAttention.none or len(keeps) == 1
        if choice.mode is CheckpointingMode.none or (whole and least):
            yield choice


def applied(config: Config, choice: Choice) -> Config:
    """The config with a choice. Raises CombinationError or ConfigError if its values cannot be combined."""
    stage, parameters, optimizer = choice.offload
    found = dataclasses.replace(
        config,
        offload=dataclasses.replace(config.offload, stage=stage, parameters=parameters, optimizer=optimizer),
        checkpointing=dataclasses.replace(
            config.checkpointing,
            mode=choice.mode,
            layers=choice.layers,
            every=choice.every,
            keep_attention=choice.keep_attention,
        ),
        kernels=dataclasses.replace(config.kernels, mlp_tiles=choice.mlp_tiles),
        train=dataclasses.replace(
            config.train,
            micro_batch_size=choice.micro_batch_size,
            gradient_accumulation_steps=choice.gradient_accumulation_steps,
        ),
        launch=dataclasses.replace(config.launch, sequence_parallel=choice.sequence_parallel),
    )
    found.offload.validate()
    found.checkpointing.validate(config.model.num_layers)
    if config.offload.gpu_share and optimizer is not OffloadDevice.cpu:
        raise CombinationError(
            "offload.gpu_share", f"{config.offload.gpu_share:g} needs the optimizer in host memory; leave it at null"
        )
    return found


def placed(config: Config, topology: Topology) -> Config:
    """The config with numa=optimal where several nodes have memory and no policy was set."""
    if (
        len(topology.memory_nodes) < 2
        or not free(config, "numa")
        or config.numa != NumaConfig(bandwidth=config.numa.bandwidth)
    ):
        return config
    if any(key.startswith("numa.") and key != "numa.bandwidth" for key in config.plan.keep):
        return config
    numa = dataclasses.replace(config.numa, name="optimal", scope=NumaScope.roles, strategy=NumaStrategy.optimal)
    return dataclasses.replace(config, numa=numa)


def default(config: Config, key: str) -> bool:
    """Whether a key is free and has its default value."""
    section, _, name = key.partition(".")
    value, default = getattr(getattr(config, section), name), getattr(getattr(Config(), section), name)
    return free(config, key) and value == default


def _offloads(config: Config) -> list[tuple[int, OffloadDevice, OffloadDevice]]:
    """What may be offloaded. A set gpu_share does not decide it; DeepSpeed's own keys do, since they fit one mode only."""
    given = config.offload
    now = given.stage, given.parameters, given.optimizer
    kept = [key for key in config.plan.keep if key.startswith("offload") and key != "offload.gpu_share"]
    if kept or now != OFFLOADS["full"] or given.deepspeed or given.deepspeed_file:
        return [now]
    several = config.launch.num_ranks > 1
    return [value for name, value in OFFLOADS.items() if several or name != "zero3"]


def _shared(config: Config) -> list[int]:
    """By how many ranks a sequence may be shared. Other numbers give other tokens an update, unless these are set; who asks for the
    longest sequence asks for that."""
    launch, plan = config.launch, config.plan
    if not default(config, "launch.sequence_parallel") or not (plan.tokens_per_update or plan.goal is Goal.longest):
        return [launch.sequence_parallel]
    numbers = [number for number in range(1, launch.num_ranks + 1) if launch.num_ranks % number == 0]
    return [number for number in numbers if why_not_shared(config, number) is None]


def why_not_shared(config: Config, ranks: int) -> CombinationError | None:
    """Why so many ranks cannot share a sequence, whatever else a plan chooses; None if they can, or if that was not left to it."""
    if not default(config, "launch.sequence_parallel"):
        return None
    launch = dataclasses.replace(config.launch, sequence_parallel=ranks)
    try:
        sequence_parallel.check_whatever_is_planned(dataclasses.replace(config, launch=launch))
    except CombinationError as error:
        return error
    return None


def _batches(config: Config, ranks: int) -> list[tuple[int, int]]:
    """Micro-batch sizes and accumulation steps, their product given, where `ranks` share a sequence; empty if none gives it."""
    train, plan = config.train, config.plan
    micro, steps = train.micro_batch_size, train.gradient_accumulation_steps
    if not plan.tokens_per_update:
        return [(micro, steps)]
    sequences, rest = divmod(plan.tokens_per_update, _unit(config, ranks))
    if rest:
        return []
    found = [(size, sequences // size) for size in range(1, sequences + 1) if sequences % size == 0]
    if not free(config, "train.micro_batch_size"):
        found = [pair for pair in found if pair[0] == micro]
    if not free(config, "train.gradient_accumulation_steps"):
        found = [pair for pair in found if pair[1] == steps]
    return found


def _unit(config: Config, ranks: int) -> int:
    """Tokens of one sequence for each group of ranks."""
    return config.seq_len.tokens * (config.launch.num_ranks // ranks)


def _no_batches(config: Config) -> ConfigError:
    """Why plan.tokens_per_update is not possible."""
    train, asked = config.train, config.plan.tokens_per_update
    everyone = config.launch.num_ranks
    if (why := why_not_shared(config, everyone)) and _batches(config, everyone):
        return why
    unit = min(_unit(config, ranks) for ranks in _shared(config))
    sequences, rest = divmod(asked, unit)
    if rest or not sequences:
        return ConfigError(
            "plan.tokens_per_update",
            f"{asked} is no multiple of {unit}, the tokens of one sequence for each rank or group of ranks; use e.g. "
            f"{max(1, sequences) * unit}",
        )
    return CombinationError(
        "plan.tokens_per_update",
        f"{asked} are {plural(sequences, 'sequence')} a rank, which train.micro_batch_size={train.micro_batch_size} and "
        f"train.gradient_accumulation_steps={train.gradient_accumulation_steps} do not give; leave one of them out",
    )
