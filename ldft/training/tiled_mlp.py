"""The MLP of a decoder layer in tiles of tokens: its activations, several times as wide as the residual stream, exist for one tile
at a time.

Only for layers that the backward pass recomputes. Per layer and iteration an MLP then runs once in the forward pass and once, tile
by tile, in its backward pass; in the recomputation it is skipped, because nothing reads its output there. torch's checkpoint itself
recomputes all but the last product. So tiles cost no further arithmetic, where DeepSpeed's TiledMLP and Liger's, which compute a
whole forward pass of each tile again, take one MLP more.

The gradient of a weight is the sum over the tiles, added up in fp32 and rounded once at the end.

The module's own forward runs, with its last projection replaced by nothing; so every family with a `down_proj` at the end works,
with adapters and with Liger's kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ldft.training.checkpointing import recomputation
from ldft.training.checkpointing.checkpointing import decoder_layers

_LAST = "down_proj"


def install(model: nn.Module, tiles: int, *, skips: bool) -> int:
    """Let each MLP of the model's decoder layers run in this many tiles. skips: whether a layer adds the MLP's output to the
    residual stream as it is, so that its recomputation does not need it. Returns the number of MLPs."""
    count = 0
    for layer in decoder_layers(model):
        mlp = getattr(layer, "mlp", None)
        if isinstance(mlp, nn.Module) and hasattr(mlp, _LAST):
            mlp.forward = _Tiles(mlp, tiles, skips)
            count += 1
    return count


class _Tiles:
    """The forward of one MLP in tiles."""

    def __init__(self, mlp: nn.Module, tiles: int, skips: bool) -> None:
        self._stock: Callable[[torch.Tensor], torch.Tensor] = mlp.forward
        self.mlp, self.tiles, self._skips = mlp, tiles, skips
        self.last = getattr(mlp, _LAST)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return self.whole(states)
        trained = [parameter for parameter in self.mlp.parameters() if parameter.requires_grad]
        result: torch.Tensor = _Function.apply(states, self, *trained)
        return result

    @property
    def skipped(self) -> bool:
        return self._skips and recomputation.is_last_layer()

    def cut(self, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Tiles of tensors of T tokens, (..., T, width) each, as (1, t, width); the last may be shorter."""
        flat = [tensor.reshape(1, -1, tensor.shape[-1]) for tensor in tensors]
        size = -(-flat[0].shape[1] // self.tiles)
        for begin in range(0, flat[0].shape[1], size):
            yield tuple(tensor[:, begin : begin + size] for tensor in flat)

    def whole(self, states: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(states, memory_format=torch.contiguous_format)
        for tile, into in self.cut(states, output):
            into.copy_(self._stock(tile))
        return output

    def hidden(self, tile: torch.Tensor) -> torch.Tensor:
        """What the last projection reads."""
        modules: dict[str, Any] = self.mlp._modules
        modules[_LAST] = _NOTHING
        try:
            return self._stock(tile)
        finally:
            modules[_LAST] = self.last


_NOTHING = nn.Identity()


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, tiles: _Tiles, *trained: nn.Parameter) -> torch.Tensor:
        ctx.tiles, ctx.trained = tiles, trained
        ctx.save_for_backward(states)
        return torch.empty_like(states) if tiles.skipped else tiles.whole(states)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (states,) = ctx.saved_tensors
        tiles: _Tiles = ctx.tiles
        sums = _Sums(ctx.trained)
        last = {id(parameter) for parameter in tiles.last.parameters()}
        before = [parameter for parameter in ctx.trained if id(parameter) not in last]
        of_states = torch.empty_like(states, memory_format=torch.contiguous_format)
        for tile, outer, into in tiles.cut(states, gradient, of_states):
            tile = tile.detach().requires_grad_()
            with torch.enable_grad():
                hidden = tiles.hidden(tile)
            inner = _through(tiles.last, hidden.detach(), outer, sums)
            first, *others = torch.autograd.grad(hidden, [tile, *before], inner)
            into.copy_(first)
            for parameter, part in zip(before, others, strict=True):
                sums.add(parameter, part)
        return of_states if ctx.needs_input_grad[0] else None, None, *sums.rounded()


class _Sums:
    """Gradients of parameters, added up in fp32."""

    def __init__(self, parameters: tuple[nn.Parameter, ...]) -> None:
        self._parameters = parameters
        self._sums = {id(p): torch.zeros(p.shape, dtype=torch.float32, device=p.device) for p in parameters}

    def add(self, parameter: nn.Parameter, part: torch.Tensor) -> None:
        if parameter.requires_grad:
            self._sums[id(parameter)].add_(part)

    def rounded(self) -> list[torch.Tensor]:
        return [self._sums[id(parameter)].to(parameter.dtype) for parameter in self._parameters]


def _through(module: Any, inputs: torch.Tensor, gradient: torch.Tensor, sums: _Sums) -> torch.Tensor:
    """The gradient of a linear module's inputs, (1, t, width) like them; those of its parameters go to sums. Its output is not
    computed. With adapters (peft) the output of these alone is, which is small."""
    base = getattr(module, "base_layer", module)
    flat = gradient.reshape(-1, gradient.shape[-1])
    if base.weight.requires_grad:
        sums.add(base.weight, flat.t() @ inputs.reshape(-1, inputs.shape[-1]))
    if base.bias is not None and base.bias.requires_grad:
        sums.add(base.bias, flat.sum(0, dtype=torch.float32))
    found: torch.Tensor = gradient @ base.weight
    if base is module:
        return found
    for name in module.active_adapters:
        down, up = module.lora_A[name].weight, module.lora_B[name].weight
        with torch.enable_grad():
            leaf = inputs.detach().requires_grad_()
            output = nn.functional.linear(nn.functional.linear(leaf, down), up) * module.scaling[name]
        parts = torch.autograd.grad(output, [leaf, down, up], gradient)
        found = found + parts[0]
        sums.add(down, parts[1])
        sums.add(up, parts[2])
    return found
