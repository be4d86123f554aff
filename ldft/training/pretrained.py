"""Loads pretrained weights into a built model, one parameter at a time."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from safetensors import safe_open
from transformers import PreTrainedModel

from ldft.config import ModelConfig
from ldft.errors import ConfigError
from ldft.training import safetensors_index
from ldft.training.deepspeed import layout


def check(model: PreTrainedModel, entries: dict[str, safetensors_index.Entry], path: Path, config: ModelConfig) -> None:
    """Raise ConfigError if the folder lacks a parameter of the model, or has it with another shape."""
    fix = f"choose the model= that {path} was saved from"
    for name, parameter in model.named_parameters():
        shape = layout.whole_shape(parameter)
        if name not in entries:
            raise ConfigError("model.path", f"{path} has no tensor {name}, which {config.name} needs; {fix}")
        if entries[name].shape != shape:
            found = list(entries[name].shape)
            raise ConfigError("model.path", f"{name} is {found} in {path}, {list(shape)} in {config.name}; {fix}")


@torch.no_grad()
def load(model: PreTrainedModel, config: ModelConfig, *, partitioned: bool) -> None:
    """Copy every parameter from its file, in the model's precision. Tensors that the model lacks are ignored.

    Under ZeRO-3 one parameter at a time is gathered: rank 0 reads it, and each rank keeps its shard.
    """
    path = safetensors_index.folder(config, fetch=False)
    entries = safetensors_index.index(path)
    check(model, entries, path, config)
    # In file order, for sequential reads; the same order on all ranks, since gathering is collective.
    ordered = sorted(model.named_parameters(), key=lambda item: str(entries[item[0]].file))
    with ExitStack() as stack:
        opened: tuple[Path, safe_open] | None = None
        for name, parameter in ordered:
            with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0) if partitioned else nullcontext():
                if partitioned and dist.get_rank() != 0:
                    continue
                file = entries[name].file
                if opened is None or opened[0] != file:
                    stack.close()
                    opened = (file, stack.enter_context(safe_open(file, framework="pt", device="cpu")))
                parameter.copy_(opened[1].get_tensor(name))
