"""Where DeepSpeed keeps things on parameters and optimizers."""

from __future__ import annotations

import torch


def whole_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter, also where ZeRO-3 has split it over the ranks."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def whole_numel(parameter: torch.nn.Parameter) -> int:
    """Elements of a parameter, also where ZeRO-3 has split it over the ranks."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
