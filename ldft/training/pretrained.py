"""Loads pretrained weights into a built model, one group of tensors at a time (weight_conversion.py)."""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Self

import deepspeed
import torch
import torch.distributed as dist
from safetensors import safe_open
from transformers import PreTrainedModel

from ldft.config import ModelConfig
from ldft.errors import ConfigError
from ldft.training import checkpoint_faults, foreign_names, safetensors_index, weight_conversion
from ldft.training.deepspeed import layout
from ldft.training.weight_conversion import Group, Plan

log = logging.getLogger(__name__)


@torch.no_grad()
def load(model: PreTrainedModel, config: ModelConfig, *, partitioned: bool) -> None:
    """Copy every parameter and saved buffer from its file, in the model's precision, as transformers' from_pretrained would.

    Raises ConfigError if the files do not fit the model, or a value is not finite. Tensors of other parts than the model's are
    ignored, and named in the log. Under ZeRO-3 one parameter at a time is gathered: rank 0 reads it, and each rank keeps its
    shard.
    """
    path = safetensors_index.folder(config, fetch=False)
    entries = safetensors_index.index(path)
    checkpoint_faults.check(path, entries)
    plan = weight_conversion.plan(model, entries)
    check(model, plan, path, config)
    if ignored := foreign_names.ignored(model, plan, entries, path, config):
        log.warning("%s", ignored)
    targets = model.state_dict(keep_vars=True)
    twins = {id(owner): group for group, owner in plan.tied}
    # In file order, for sequential reads; the same order on all ranks, since gathering is collective.
    ordered = sorted(plan.groups, key=lambda group: str(entries[group.sources[0][0]].file))
    with _Reader(entries) as read:
        for group in ordered:
            # ZeRO-3 shards parameters and leaves buffers whole on every rank.
            gathers = partitioned and isinstance(targets[group.first], torch.nn.Parameter)
            reads = not gathers or dist.get_rank() == 0
            values = group.convert(model, read) if reads else {}
            for name in group.shapes:
                finite = True
                gathered = (
                    deepspeed.zero.GatheredParameters(targets[name], modifier_rank=0) if gathers else nullcontext()
                )
                with gathered:
                    if reads:
                        targets[name].copy_(values.pop(name))
                        finite = is_finite(targets[name])
                if not finite:
                    raise _not_finite(group, read, entries)
            if reads and id(group) in twins:
                _check_tied(group, twins[id(group)], read, path)


def check(model: PreTrainedModel, plan: Plan, path: Path, config: ModelConfig) -> None:
    """Raise ConfigError if the folder lacks a tensor of the model, or has it with another shape."""
    made = {name: (group, shape) for group in plan.groups for name, shape in group.shapes.items()}
    named = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items() if name in made}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in named:
            fix = foreign_names.explained(name, plan, config) or f"choose the model= that {path} was saved from"
            raise ConfigError("model.path", f"{path} has no tensor {name}, which {config.name} needs; {fix}")
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in made and made[name][1] != layout.whole_shape(tensor):
            found, shape = list(made[name][1]), list(layout.whole_shape(tensor))
            raise ConfigError(
                "model.path",
                f"{name} is {found} in {path}, {shape} in {config.name}; choose the model= that {path} was saved from",
            )


class _Reader:
    """Reads tensors by name. A group's sources may lie in two files, so two stay open."""

    def __init__(self, entries: dict[str, safetensors_index.Entry]) -> None:
        self._entries = entries
        self._open: dict[Path, safe_open] = {}

    def __call__(self, name: str) -> torch.Tensor:
        file = self._entries[name].file
        if file not in self._open:
            if len(self._open) == 2:
                self._open.pop(next(iter(self._open))).__exit__(None, None, None)
            self._open[file] = safe_open(file, framework="pt", device="cpu").__enter__()
        tensor: torch.Tensor = self._open[file].get_tensor(name)
        return tensor

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for opened in self._open.values():
            opened.__exit__(kind, error, trace)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite.

    A sum tells in most cases, and is the fastest pass over memory that torch has on a CPU: isfinite takes twenty times as long for
    bf16. The sum of finite numbers may overflow; only then the extremes decide.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return math.isfinite(tensor.sum()) or all(math.isfinite(extreme) for extreme in torch.aminmax(tensor))


def _not_finite(group: Group, read: _Reader, entries: dict[str, safetensors_index.Entry]) -> ConfigError:
    for name, _ in group.sources:
        if not is_finite(value := read(name)):
            kind = "NaN" if bool(torch.isnan(value).any()) else "infinity"
            return ConfigError(
                "model.path",
                f"{name} in {entries[name].file} contains {kind}: the training that saved it diverged, or the file is damaged; "
                "use another checkpoint",
            )
    most = max(float(read(name).abs().max()) for name, _ in group.sources)
    precision = str(group.dtype).removeprefix("torch.")
    wider = "bf16 or fp32" if group.dtype is torch.float16 and most <= torch.finfo(torch.bfloat16).max else "fp32"
    return ConfigError(
        "train.precision",
        f"{precision} cannot hold {group.first}, which has values up to {most:g}; use train.precision={wider}",
    )


def _check_tied(group: Group, twin: Group, read: _Reader, path: Path) -> None:
    """Raise ConfigError if two tensors that the model ties differ in the files."""
    one, other = group.sources[0][0], twin.sources[0][0]
    if not torch.equal(read(one).to(group.dtype), read(other).to(group.dtype)):
        raise ConfigError(
            "model.tie_word_embeddings",
            f"true, but {other} and {one} differ in {path}; use model.tie_word_embeddings=false",
        )
