"""The root of the config tree, its plain-data form, and the identity of a run."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf

from ldft.config.attention import AttentionConfig
from ldft.config.checkpointing import CheckpointingConfig
from ldft.config.data import DataConfig
from ldft.config.kernels import KernelsConfig
from ldft.config.launch import Device, LaunchConfig
from ldft.config.lora import LoraConfig
from ldft.config.machine import MachineConfig
from ldft.config.memory import MemoryConfig, Pinning
from ldft.config.model import ModelConfig
from ldft.config.monitor import MonitorConfig
from ldft.config.numa import NumaConfig
from ldft.config.offload import OffloadConfig
from ldft.config.optimizer import OptimizerConfig
from ldft.config.plan import PlanConfig
from ldft.config.results import ResultsConfig
from ldft.config.seq_len import SeqLenConfig
from ldft.config.sweep import Rerun, SweepConfig
from ldft.config.train import Precision, TrainConfig
from ldft.errors import CombinationError, ConfigError

# Keys that do not change what is measured: where results go, time limits, sampling intervals, what else runs.
_NOT_IDENTITY = (
    *("results", "launch.timeout_s", "memory.vram_gib", "monitor", "sweep", "rerun", "dry_run", "force", "asked"),
    "plan",  # the values that it chose are part of the identity
)
# Keys that were added later. With its default such a key is left out, so the runs from before it existed keep their identity.
_LATER = (
    "model.num_experts",
    "model.num_experts_per_token",
    "model.expert_intermediate_size",
    "model.router_aux_loss",
    "data.column",
    "data.loss",
    "optimizer.overlap_step",
    "offload.gpu_share",
    "checkpointing.device_inputs",
    "kernels.mlp_tiles",
    "launch.num_hosts",
    "launch.sequence_parallel",
    *(f"machine.{one.name}" for one in fields(MachineConfig)),
)
# Increased when a key's meaning changes, so that old and new results of the same command line stay apart.
_IDENTITY_VERSION = 1
# By the unit at the end of a key's name: the most that it takes, far above any machine and any run. Beyond, sums overflow.
_MOST = {"_gib": (2.0**20, "GiB"), "_gb_per_s": (1e6, "GB/s"), "_s": (366 * 86_400.0, "seconds (a year)")}
FROM_FILE = "${config_json}"
"""Value of a key of the model that is to be read from the model's config.json. An interpolation, since those fit any type."""


@dataclass(kw_only=True, slots=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    numa: NumaConfig = field(default_factory=NumaConfig)
    checkpointing: CheckpointingConfig = field(default_factory=CheckpointingConfig)
    seq_len: SeqLenConfig = field(default_factory=SeqLenConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    results: ResultsConfig = field(default_factory=ResultsConfig)

    sweep: SweepConfig = field(default_factory=SweepConfig)
    rerun: Rerun = Rerun.missing
    """Which cells of a sweep to run again; a single run always runs."""

    repeat: int = 1
    """Number of this repetition of the same measurement; a sweep counts from 1 to sweep.repeats."""

    system: str = ""
    """A free name for the machine, kept in the row (the seed's SYSTEM_TYPE)."""

    snapshot: bool = False
    """Write torch's CUDA memory history of one iteration per rank beside the row (snapshot-<rank>.pickle)."""

    dry_run: bool = False
    """Print what would run, then exit; nothing is started or written."""

    force: bool = False
    """Run even if the estimate says that the run does not fit this machine."""

    asked: dict[str, str] = field(default_factory=dict)
    """Filled in by ldft; do not set. Keys whose value was left to ldft (auto), with the value as given. The keys themselves hold
    ldft's choice on this machine, so that a run's identity says what it measured."""

    @property
    def sequences_per_update(self) -> int:
        """Of all ranks and accumulation steps."""
        train = self.train
        return train.micro_batch_size * train.gradient_accumulation_steps * self.launch.data_parallel

    def check_numbers(self) -> None:
        """Raises ConfigError for a number with which nothing can be computed."""
        for key, value in flatten(self).items():
            if not isinstance(value, float):
                continue
            if not math.isfinite(value):
                raise ConfigError(key, f"{value} is not finite; use a number")
            most, unit = next((limit for end, limit in _MOST.items() if key.endswith(end)), (math.inf, ""))
            if value > most:
                raise ConfigError(key, f"{value:g} is too large; use at most {most:.0f} {unit}")

    def validate(self) -> None:
        """Check values and combinations that do not depend on the machine. Raises ConfigError."""
        for key, value in self.asked.items():
            if value == FROM_FILE:
                raise ConfigError(key, f"{value} must be read from the model's config.json first")
        self.check_numbers()
        for part in (
            self.model,
            self.offload,
            self.numa,
            self.seq_len,
            self.optimizer,
            self.lora,
            self.data,
            self.train,
            self.launch,
            self.memory,
            self.monitor,
            self.plan,
            self.machine,
            self.results,
            self.sweep,
        ):
            part.validate()
        self.checkpointing.validate(self.model.num_layers)
        self._check_kept()
        if self.repeat < 1:
            raise ConfigError("repeat", f"{self.repeat} is too small; use 1 or more")
        if self.train.precision is Precision.fp16 and self.launch.device is Device.cpu:
            raise CombinationError("train.precision", "fp16 needs launch.device=cuda, not cpu; use bf16 or fp32")
        if self.numa.by_role and self.memory.pinning is Pinning.torch:
            raise CombinationError(
                "memory.pinning",
                "torch's allocator decides where tensors go, so roles cannot be placed; use exact or none",
            )
        if self.snapshot and self.launch.device is Device.cpu:
            raise CombinationError(
                "snapshot", "true needs launch.device=cuda, not cpu: torch records no history of host memory"
            )
        if self.launch.device is Device.auto:
            raise ConfigError("launch.device", "auto must be resolved to cuda or cpu first")
        if self.train.precision is Precision.auto:
            raise ConfigError("train.precision", "auto must be resolved to bf16, fp16 or fp32 first")

    def _check_kept(self) -> None:
        for name in self.plan.keep:
            if not name.startswith("hydra") and not any(
                f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for key in _keys()
            ):
                raise ConfigError(
                    "plan.keep", f"'{name}' is no group and no key; use one, such as checkpointing.layers"
                )


@functools.cache
def _schema() -> DictConfig:
    schema: DictConfig = OmegaConf.structured(Config)
    return schema


def typed_tree() -> DictConfig:
    """The config's defaults as a tree that checks types and refuses unknown keys; a copy of its own for each caller."""
    # Making one takes ten times as long as copying it, and a sweep needs one for each cell.
    return copy.deepcopy(_schema())


@functools.cache
def _defaults() -> Any:
    return OmegaConf.to_container(_schema(), enum_to_str=True)


def _difference(values: Any, defaults: Any) -> dict[str, Any]:
    """The keys of `values` that merging them into a tree with these defaults would change, or refuse."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        default = defaults.get(key)
        if key not in defaults or not isinstance(value, dict) or not isinstance(default, dict) or not default:
            if key not in defaults or repr(value) != repr(default):  # 1, 1.0 and True are equal
                found[key] = value
        elif below := _difference(value, default):
            found[key] = below
    return found


def refuse_missing(value: Any, key: str = "", where: str = "") -> None:
    """Raise ConfigError for OmegaConf's `???`, which merging would drop without a word. where: the file, for the message."""
    if value == MISSING:
        raise ConfigError(
            key,
            f"{MISSING}{where} is a mandatory value that nobody gave; give one, or leave the key out for its default",
        )
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in below:
        refuse_missing(inner, f"{key}[{name}]" if isinstance(value, list) else f"{key}.{name}".lstrip("."), where)


def from_dict(values: DictConfig | dict[str, Any]) -> Config:
    """The typed config from a composed or stored tree. Raises OmegaConf's errors on an unknown key or a wrong type."""
    plain: Any = values
    if isinstance(values, DictConfig):
        # Convert to plain data first: merging a typed tree would accept the keys that "+key=value" added to it.
        plain = OmegaConf.to_container(values, enum_to_str=True)
        if plain.get("asked"):
            raise ConfigError("asked", f"{plain['asked']}: ldft fills this key in; leave it out")
    refuse_missing(plain)
    model = plain.get("model", {})
    open_keys = [key for key, value in model.items() if value == FROM_FILE]
    plain = {**plain, "model": {key: value for key, value in model.items() if key not in open_keys}}
    tree = typed_tree()
    # Only what differs from the defaults: each key that is merged takes a tenth of a millisecond.
    tree.merge_with(_difference(plain, _defaults()))
    config = OmegaConf.to_object(tree)
    assert isinstance(config, Config)
    config.asked |= {f"model.{key}": FROM_FILE for key in open_keys}
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """Plain data that JSON can hold (dicts, lists, scalars; enums by name)."""
    return {f.name: _plain(getattr(config, f.name)) for f in fields(config)}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def columns(schema: Any = Config, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Every leaf key as (dotted key, Python type): enums and dicts are str (a dict as JSON), lists keep their type."""
    hints = get_type_hints(schema)
    for f in fields(schema):
        hint = hints[f.name]
        if get_origin(hint) in (Union, types.UnionType):
            hint = next(arg for arg in get_args(hint) if arg is not type(None))
        if is_dataclass(hint):
            yield from columns(hint, f"{prefix}{f.name}.")
        elif (isinstance(hint, type) and issubclass(hint, Enum)) or get_origin(hint) is dict:
            yield f"{prefix}{f.name}", str
        else:
            yield f"{prefix}{f.name}", hint


@functools.cache
def _keys() -> tuple[str, ...]:
    return tuple(key for key, _ in columns())


def flatten(config: Config) -> dict[str, Any]:
    """Every leaf value by dotted key, with the types that `columns` gives."""

    def value_of(key: str) -> Any:
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        value = _plain(value)
        return json.dumps(value, sort_keys=True) if isinstance(value, dict) else value

    return {key: value_of(key) for key in _keys()}


def text_of(value: Any) -> str:
    """A leaf value as `asked` and lines for people have it."""
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _measured(key: str, without: tuple[str, ...] = ()) -> bool:
    """Whether a key says what is measured."""
    return not any(key == name or key.startswith(name + ".") for name in _NOT_IDENTITY + without)


def disagreements(given: Config, run: Config) -> list[tuple[str, str, str]]:
    """Keys of what is measured that `given`, as composed from a command, has otherwise than the command that `run` is of, with both
    values. run: with ldft's choices in place of auto; `run.asked` says which these are."""
    asked = {key: value for key, value in run.asked.items() if key != "plan.goal" or value == "auto"}
    theirs = {key: text_of(value) for key, value in flatten(run).items()} | asked
    # What a config.json filled in, and what it is merged with, is compared by its name alone.
    open_keys = [key for key, value in given.asked.items() if value == FROM_FILE]
    filled = (*open_keys, "model.path", "model.extra", "model.rope_scaling") if open_keys else ()
    mine = {key: text_of(value) for key, value in flatten(given).items() if key not in filled}
    compared = (key for key in mine if _measured(key) or key == "plan.goal")
    return [(key, mine[key], theirs[key]) for key in compared if mine[key] != theirs[key]]


def missing_plan(asked: Mapping[str, str]) -> str:
    """Why there is no plan although one was asked for, as `key: problem`; empty if there is one, or none was asked for. asked: of a
    config that is resolved."""
    said = asked.get("plan.goal", "")
    return said if ": " in said else ""


def _identity(config: Config, without: tuple[str, ...] = ()) -> str:
    defaults = flatten(Config())
    identity = {
        key: value
        for key, value in flatten(config).items()
        if _measured(key, without) and not (key in _LATER and value == defaults[key])
    }
    if problem := missing_plan(config.asked):
        identity["plan.goal"] = problem  # not the run that the values would be
    text = json.dumps({"version": _IDENTITY_VERSION, **identity}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run_id(config: Config) -> str:
    """Twelve hex digits that identify what is measured: the same resolved config gives the same id."""
    return _identity(config)


def series_id(config: Config) -> str:
    """Like run_id, but without the sequence length: runs of one series differ in nothing else."""
    return _identity(config, without=("seq_len",))
