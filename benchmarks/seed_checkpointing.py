"""The peer: gradient checkpoints in host memory as in the seed. Imports nothing from ldft.

    buffers = install(model, micro_batch_size * seq_len, dtype)

Written from the seed's description: one reentrant autograd function per layer. Its forward copies the layer's input into its own
pinned buffer, allocated once with torch's allocator; its backward copies it back into new device memory, reruns the whole layer,
and calls autograd on it. Both copies are `non_blocking` but on the compute stream, so the layer waits for them. As in the seed,
random state is not restored: no dropout.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


class _Checkpoint(torch.autograd.Function):
    """One layer, `run(hidden_states)`, with its input kept in `buffer`."""

    @staticmethod
    def forward(ctx: Any, run: Any, buffer: torch.Tensor, hidden_states: torch.Tensor) -> Any:
        ctx.run, ctx.shape, ctx.device = run, hidden_states.shape, hidden_states.device
        ctx.waiting = buffer[: hidden_states.numel()].view(hidden_states.shape)
        ctx.waiting.copy_(hidden_states, non_blocking=True)
        with torch.no_grad():
            return run(hidden_states)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        hidden_states = ctx.waiting.to(ctx.device, non_blocking=True, copy=True).requires_grad_(ctx.needs_input_grad[2])
        with torch.enable_grad():
            outputs = ctx.run(hidden_states)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [
            (output, gradient)
            for output, gradient in zip(outputs, gradients, strict=True)
            if isinstance(output, torch.Tensor) and output.requires_grad
        ]
        torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
        return None, None, hidden_states.grad


def install(
    model: PreTrainedModel, tokens: int, dtype: torch.dtype, buffers: list[torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """Install it in every decoder layer of a model in training mode.

    tokens: per micro-batch. buffers: those of an earlier call. Returns the buffers, one per layer, `tokens * hidden_size` elements
    each, pinned if CUDA is available. The input of the first layer must require a gradient: with frozen embeddings call
    `model.enable_input_require_grads()`.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    size = tokens * model.config.get_text_config().hidden_size
    if buffers is None:
        buffers = [torch.zeros(size, dtype=dtype, pin_memory=torch.cuda.is_available()) for _ in layers]
    for layer, buffer in zip(layers, buffers, strict=True):
        layer._gradient_checkpointing_func = partial(_call, buffer)
        layer.gradient_checkpointing = True
    return buffers


def uninstall(model: PreTrainedModel) -> None:
    """Uninstall: layers keep their activations again."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing = False


def _call(buffer: torch.Tensor, run: Any, hidden_states: torch.Tensor, *rest: Any) -> Any:
    return _Checkpoint.apply(lambda hidden: run(hidden, *rest), buffer, hidden_states)
