"""Gradient checkpointing: of each group of `checkpointing.every` decoder layers only the input is kept, on the device or in host
memory, and the backward pass runs the group again. The attention output can be kept as well (keep_attention.py). Only the first
`checkpointing.layers` layers are checkpointed, because the activations of the last layers live shortest.

When checkpointing is on, transformers calls a layer through `layer._gradient_checkpointing_func(run, hidden_states)`, with
everything else (masks, position embeddings, ...) bound to `run`. ldft sets this attribute of each layer, so it works for every
layer signature without replacing code of torch, transformers or the model. Its function calls torch's non-reentrant checkpoint
around a closure, which gets its input from the forward pass the first time and from the kept copy the second time.

Why not an autograd function that runs the layer without a graph and calls backward inside (reentrant checkpointing):
  - torch's non-reentrant checkpoint stops the recomputation at the last tensor that is needed, which saves the layer's last matrix
    product: 2.6% of the FLOPs of a step of a 3B model at 32k tokens.
  - The layer's nodes are in the graph, so DeepSpeed's hooks on modules and parameters run as usual, inputs need not require a
    gradient (LoRA), and outputs may be tuples. torch handles random states of CPU and device, autocast and errors.
Why not hooks on saved tensors to move the input: the closure needs only torch's documented `checkpoint`.

A group of several layers is one checkpoint: each layer but the last returns its input unchanged and records what to run, and the
last runs all of them. So between the layers of a group the model sees the group's input, as `output_hidden_states` shows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, noop_context_fn
from transformers.modeling_layers import GradientCheckpointingLayer

from ldft.config import Config
from ldft.config.checkpointing import CheckpointingMode, KeepAttention
from ldft.memory.policy import Placement
from ldft.preflight import host_estimate
from ldft.training.checkpointing import recomputation
from ldft.training.checkpointing.attention_outputs import HostOutputs
from ldft.training.checkpointing.copies import lanes_of
from ldft.training.checkpointing.keep_attention import DeviceOutputs, KeptAttention
from ldft.training.checkpointing.layer_inputs import HostInputs


class WaitingInput(Protocol):
    """One input, kept for its backward pass."""

    def restore(self) -> torch.Tensor:
        """The input on the device, detached; it requires a gradient if it did before."""


class Keeper(Protocol):
    """Keeps the inputs of groups."""

    def keep(self, group: int, hidden_states: torch.Tensor) -> WaitingInput:
        """Take the input of a group in the forward pass; groups come in order, and 0 begins a new forward pass."""

    def host_tensors(self) -> list[torch.Tensor]:
        """The host memory that holds inputs, allocated before training; empty if none."""


class DeviceInputs:
    """Keeps inputs on the device."""

    class _Held:
        def __init__(self, hidden_states: torch.Tensor) -> None:
            self._states, self._requires_grad = hidden_states.detach(), hidden_states.requires_grad

        def restore(self) -> torch.Tensor:
            return self._states.detach().requires_grad_(self._requires_grad)

    def keep(self, group: int, hidden_states: torch.Tensor) -> WaitingInput:
        return self._Held(hidden_states)

    def host_tensors(self) -> list[torch.Tensor]:
        return []


class Checkpointing:
    """Installed on a model's decoder layers from construction to `remove()`; active in training mode with gradients enabled.

    A group has `every` layers; the last group may be shorter. Each forward pass must be followed by its backward pass before the
    next. attention: keeps the attention outputs; None: the backward pass recomputes them. layers: how many layers, from the first;
    None: all.
    """

    def __init__(
        self,
        model: nn.Module,
        keeper: Keeper,
        every: int = 1,
        *,
        attention: KeptAttention | None = None,
        layers: int | None = None,
    ) -> None:
        self._layers = decoder_layers(model)[:layers]
        self._keeper, self._every, self._attention = keeper, every, attention
        self._runs: list[Callable[[torch.Tensor], Any]] = []
        self._passed_on: tuple[int, torch.Size] | None = None
        for index, layer in enumerate(self._layers):
            layer._gradient_checkpointing_func = partial(self._call, index)
            layer.gradient_checkpointing = True

    def remove(self) -> None:
        """Uninstall: layers keep their activations again."""
        for layer in self._layers:
            layer.gradient_checkpointing = False

    def host_tensors(self) -> list[torch.Tensor]:
        """The host memory for layer inputs and attention outputs; empty if they stay on the device."""
        return self._keeper.host_tensors() + (self._attention.store.host_tensors() if self._attention else [])

    def _call(self, index: int, run: Callable[..., Any], *inputs: torch.Tensor) -> Any:
        if not inputs:  # some models pass everything by keyword
            assert isinstance(run, partial)
            keywords = dict(run.keywords)
            inputs, run = (keywords.pop("hidden_states"),), partial(run.func, *run.args, **keywords)
        hidden_states, *rest = inputs
        if not torch.is_grad_enabled():
            return run(hidden_states, *rest)
        group, position = divmod(index, self._every)
        if position == 0:
            self._runs = []  # left over if a forward pass failed
        elif len(self._runs) != position or self._passed_on != (hidden_states.data_ptr(), hidden_states.shape):
            raise RuntimeError(
                f"checkpointing.every={self._every}: layer {index} did not get what layer {index - 1} returned; this model needs "
                "every=1"
            )
        self._runs.append((lambda states: run(states, *rest)) if rest else run)
        if position < self._every - 1 and index < len(self._layers) - 1:
            self._passed_on = hidden_states.data_ptr(), hidden_states.shape
            return hidden_states
        runs, self._runs = self._runs, []
        return self._group(group, runs, hidden_states)

    def _group(self, group: int, runs: list[Callable[[torch.Tensor], Any]], hidden_states: torch.Tensor) -> Any:
        waiting = self._keeper.keep(group, hidden_states)
        # Emptied in the forward pass, because the closure lives until backward and would keep the input alive.
        fresh = [hidden_states]

        def body(_: torch.Tensor) -> Any:
            again = not fresh
            states: Any = waiting.restore() if again else fresh.pop()
            for run in runs[:-1]:
                states = run(states)
            with recomputation.last_layer() if again else nullcontext():
                return runs[-1](states)

        # The empty tensor tells torch which device's random state to keep.
        contexts = partial(self._attention.contexts, group) if self._attention else noop_context_fn
        return checkpoint(body, hidden_states.new_empty(0), use_reentrant=False, context_fn=contexts)


def decoder_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that transformers can checkpoint, in execution order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def install(
    config: Config,
    model: nn.Module,
    device: torch.device,
    placement: Placement | None = None,
    *,
    pin: bool = False,
    device_inputs: int = 1,
) -> Checkpointing | None:
    """Install checkpointing as configured; returns None if no layer is checkpointed.

    Host memory is allocated here, by `placement` and pinned if `pin`, so that HostMemoryError is raised now and not in training.
    device_inputs: inputs that stay on the device with mode cpu.
    """
    settings = config.checkpointing
    layers = settings.recomputed(len(decoder_layers(model)))
    if layers == 0:
        return None
    groups, lanes = -(-layers // settings.every), lanes_of(device)
    keeper: Keeper = DeviceInputs()
    if settings.mode is CheckpointingMode.cpu:
        size = host_estimate.layer_input_bytes(config)
        keeper = HostInputs(groups, size, device, placement, pin=pin, lanes=lanes, on_device=device_inputs)
    attention = None
    if settings.keep_attention is KeepAttention.device:
        attention = KeptAttention(DeviceOutputs())
    elif settings.keep_attention is KeepAttention.host:
        size = host_estimate.attention_output_bytes(config)
        attention = KeptAttention(HostOutputs(groups, settings.every, size, device, placement, pin=pin, lanes=lanes))
    return Checkpointing(model, keeper, settings.every, attention=attention, layers=layers)
