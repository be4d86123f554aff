"""Small models of several families, trained with and without checkpointing."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ldft.preflight.selection import select
from ldft.training import model
from ldft.training.checkpointing import checkpointing
from ldft.training.checkpointing.checkpointing import DeviceInputs
from ldft.training.checkpointing.layer_inputs import HostInputs
from tests.conftest import compose
from tests.training.checkpointing.lazy_lanes import LazyLanes

CPU = torch.device("cpu")
LAYERS, TOKENS, HIDDEN = 5, 24, 64


FAMILIES = {
    "llama": (),
    "mistral": ("model.sliding_window=8",),
    "qwen2": (
        "model.sliding_window=8",
        "model.extra={max_window_layers:2}",
    ),
    "gemma2": ("model.sliding_window=8", "model.attention_softcap=50", "model.logit_softcap=30"),
}


def build(family: str = "llama", *overrides: str, dropout: float = 0.0, precision: str = "fp32") -> PreTrainedModel:
    """A small model without checkpointing, in training mode; `dropout` of attention weights."""
    config = compose(
        "model=nano",
        f"model.family={family}",
        f"model.num_layers={LAYERS}",
        "model.vocab_size=97",
        "offload=none",
        "checkpointing=none",
        f"train.precision={precision}",
        "launch.device=cpu",
        *FAMILIES[family],
        *overrides,
    )
    network = model.build(select(config), CPU)
    for module in network.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    return network


def batch(seed: int = 0, sequences: int = 2, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(97, (sequences, tokens), generator=torch.Generator().manual_seed(seed))


def loss_of(network: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return network(input_ids=tokens, labels=tokens).loss


def train(network: nn.Module, batches: list[torch.Tensor], autocast: bool = False) -> list[torch.Tensor | None]:
    """Gradients after forward and backward of each batch; dropout draws from a fixed seed."""
    network.zero_grad()
    torch.manual_seed(3)
    for tokens in batches:
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss = loss_of(network, tokens)
        loss.backward()
    return [None if p.grad is None else p.grad.clone() for p in network.parameters()]


def equal(a: list[torch.Tensor | None], b: list[torch.Tensor | None]) -> bool:
    assert len(a) == len(b) and any(x is not None and bool(x.any()) for x in a)
    return all(
        (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y))
        for x, y in zip(a, b, strict=True)
    )


def keeper(
    every: int = 1, *, lanes: LazyLanes | None = None, size: int = 2 * TOKENS * HIDDEN * 4, on_device: int = 1
) -> HostInputs:
    return HostInputs(-(-LAYERS // every), size, CPU, lanes=lanes, on_device=on_device)


KEEPERS: dict[str, Callable[[int], checkpointing.Keeper]] = {
    "gpu": lambda every: DeviceInputs(),
    "cpu": keeper,
    "cpu, copies as late as may be": lambda every: keeper(every, lanes=LazyLanes()),
    "cpu, three stay": lambda every: keeper(every, lanes=LazyLanes(), on_device=3),
}


Output = tuple[torch.Tensor, torch.Tensor, None]


class TupleLayer(GradientCheckpointingLayer):
    """Its input by keyword, a tensor and two other values out, dropout inside."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(HIDDEN, HIDDEN), nn.Dropout(0.5)

    def forward(self, hidden_states: torch.Tensor, scale: float, shift: torch.Tensor) -> Output:
        states = hidden_states + self.dropout(torch.tanh(self.linear(hidden_states * scale + shift)))
        return states, states.mean(), None


class TupleModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TupleLayer() for _ in range(LAYERS))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        states = nn.functional.one_hot(input_ids, 97).float()[..., :HIDDEN]
        extra = torch.zeros(())
        for number, layer in enumerate(self.layers):
            states, mean, _ = layer(hidden_states=states, scale=1.0 + number, shift=torch.full((HIDDEN,), 0.5))
            extra = extra + mean
        return SimpleNamespace(loss=states.square().mean() + extra)


def alive(references: list[weakref.ref]) -> int:
    return len({id(reference()) for reference in references if reference() is not None})
