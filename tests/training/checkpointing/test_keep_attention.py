"""Kept outputs of attention change only what is computed again: gradients are those without checkpointing, to the last bit."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldft.errors import ConfigError
from ldft.memory.policy import HostMemoryError
from ldft.preflight import host_estimate
from ldft.training.checkpointing import checkpointing
from ldft.training.checkpointing.attention_outputs import HostOutputs
from ldft.training.checkpointing.checkpointing import Checkpointing, DeviceInputs
from ldft.training.checkpointing.copies import Lane
from ldft.training.checkpointing.keep_attention import OPERATORS, DeviceOutputs, KeptAttention, Store
from tests.conftest import compose
from tests.training.checkpointing.lazy_lanes import POISON, Copy, LazyLanes
from tests.training.checkpointing.small_models import (
    CPU,
    HIDDEN,
    LAYERS,
    TOKENS,
    Output,
    TupleLayer,
    TupleModel,
    alive,
    batch,
    build,
    equal,
    keeper,
    loss_of,
    train,
)

OUTPUT = 2 * TOKENS * (HIDDEN + 4) * 4 + 1024  # fp32, with the log-sum-exp of 4 heads, its sequences rounded up


class Counting(TorchDispatchMode):
    """Calls of attention that reach the kernels, in the forward pass and in the recomputation."""

    def __init__(self, operators: frozenset[str] = OPERATORS) -> None:
        super().__init__()
        self.operators, self.calls = operators, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func.name() in self.operators
        return func(*args, **(kwargs or {}))


def host(layers: int = LAYERS, every: int = 1, *, lanes: LazyLanes | None = None, size: int = OUTPUT) -> HostOutputs:
    return HostOutputs(-(-layers // every), every, size, CPU, lanes=lanes)


STORES: dict[str, Callable[[int, int], Store]] = {
    "device": lambda layers, every: DeviceOutputs(),
    "host": host,
    "host, copies as late as may be": lambda layers, every: host(layers, every, lanes=LazyLanes()),
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_gradients_equal_those_without_checkpointing_and_attention_runs_once(family: str) -> None:
    """Two accumulated micro-batches of different lengths; windows of qwen2 and mistral, which are masks."""
    network = build(family)
    batches = [batch(1), batch(2, tokens=TOKENS - 5)]
    expected = train(network, batches)
    for layers in (LAYERS, 1, 2):
        for every in (1, 2):
            for name, make in STORES.items():
                kept = KeptAttention(make(layers, every))
                installed = Checkpointing(network, keeper(every), every, attention=kept, layers=layers)
                with Counting() as counting:
                    assert equal(train(network, batches), expected), (name, every, layers)
                assert counting.calls == len(batches) * LAYERS
                installed.remove()
        installed = Checkpointing(network, DeviceInputs(), layers=layers)
        with Counting() as counting:
            assert equal(train(network, batches), expected)
        installed.remove()
        assert counting.calls == len(batches) * (LAYERS + layers)


def test_what_waits_on_the_host_is_what_backward_uses() -> None:
    network = build()
    store = host()
    Checkpointing(network, DeviceInputs(), attention=KeptAttention(store))
    for poisoned in (False, True):
        network.zero_grad()
        loss = loss_of(network, batch(1))
        for arena in store.host_tensors():
            assert arena.shape[0] == LAYERS - 1
            for row in arena:
                assert bool(row.any())
                if poisoned:
                    row.fill_(POISON)
        loss.backward()
        assert bool(network.model.layers[0].self_attn.q_proj.weight.grad.isnan().any()) == poisoned


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("name", STORES)
def test_under_autocast_and_with_lora(name: str, every: int) -> None:
    """Frozen base weights, and dropout of the adapters before and after attention."""
    network = build()
    torch.manual_seed(0)
    network = get_peft_model(network, LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "down_proj"]))
    for parameter_name, parameter in network.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter)  # zero as peft makes it, and then A would get no gradient
    expected = train(network, [batch(1), batch(2)], autocast=True)
    Checkpointing(network, keeper(every), every, attention=KeptAttention(STORES[name](LAYERS, every)))
    with Counting() as counting:
        assert equal(train(network, [batch(1), batch(2)], autocast=True), expected)
    assert counting.calls == 2 * LAYERS


@torch.library.custom_op("ldft_tests::attention", mutates_args=())
def _attention(q: torch.Tensor, dropout_p: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The shape of flash-attn's operators: output, log-sum-exp and what dropout drew; it is no attention, but as hard to repeat."""
    mask = (torch.rand_like(q) > dropout_p).float()
    return torch.tanh(q) * mask, q.logsumexp(-1), mask


class Attention(torch.autograd.Function):
    """As flash-attn does: its own node around operators without one."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor) -> torch.Tensor:
        out, lse, mask = torch.ops.ldft_tests.attention(q, 0.3)
        ctx.save_for_backward(out, lse, mask)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        out, lse, mask = ctx.saved_tensors
        return gradient * (mask - out.square()) * lse.sigmoid().unsqueeze(-1)


class AttentionLayer(TupleLayer):
    """Dropout inside attention, and behind it."""

    calls = 1

    def forward(self, hidden_states: torch.Tensor, scale: float, shift: torch.Tensor) -> Output:
        states = self.linear(hidden_states * scale + shift)
        for _ in range(self.calls):
            # Permuted, as kernels return it.
            states = self.touch(Attention.apply(states.transpose(0, 1)).transpose(0, 1))
        states = hidden_states + self.dropout(states)
        return states, states.mean(), None

    def touch(self, states: torch.Tensor) -> torch.Tensor:
        return states


def attention_model(layer: type[AttentionLayer] = AttentionLayer) -> nn.Module:
    torch.manual_seed(0)
    network = TupleModel()
    network.layers = nn.ModuleList(layer() for _ in range(LAYERS))
    return network


CUSTOM = frozenset({"ldft_tests::attention"})


@pytest.mark.parametrize("name", STORES)
def test_operators_of_other_packages_and_dropout_that_follows_attention(name: str) -> None:
    network = attention_model()
    expected = train(network, [batch(1), batch(2)])
    store = host(size=3 * OUTPUT) if name == "host" else STORES[name](LAYERS, 1)
    if name.startswith("host,"):
        store = host(size=3 * OUTPUT, lanes=LazyLanes())
    Checkpointing(network, keeper(), attention=KeptAttention(store, CUSTOM))
    with Counting(CUSTOM) as counting:
        assert equal(train(network, [batch(1), batch(2)]), expected)
    assert counting.calls == 2 * LAYERS


@pytest.mark.parametrize("name", ["device", "host"])
def test_a_layer_that_writes_into_the_output_is_an_error(name: str) -> None:
    class Writing(AttentionLayer):
        def touch(self, states: torch.Tensor) -> torch.Tensor:
            states.detach().mul_(2)
            return states

    network = attention_model(Writing)
    store = host(size=3 * OUTPUT) if name == "host" else DeviceOutputs()
    Checkpointing(network, keeper(), attention=KeptAttention(store, CUSTOM))
    with pytest.raises(RuntimeError, match="changes the output of its attention in place"):
        train(network, [batch(1)])


def test_two_calls_in_a_layer_are_an_error_on_the_host() -> None:
    class Twice(AttentionLayer):
        calls = 2

    network = attention_model(Twice)
    expected = train(network, [batch(1)])
    Checkpointing(network, keeper(), attention=KeptAttention(DeviceOutputs(), CUSTOM))
    assert equal(train(network, [batch(1)]), expected)
    Checkpointing(network, keeper(), attention=KeptAttention(host(size=3 * OUTPUT), CUSTOM))
    with pytest.raises(RuntimeError, match="calls attention twice"):
        train(network, [batch(1)])


def test_attention_that_is_no_known_operator_is_an_error() -> None:
    network = build("llama", "attention=eager")
    Checkpointing(network, keeper(), attention=KeptAttention(DeviceOutputs()))
    with pytest.raises(ConfigError, match=r"checkpointing.keep_attention: .* no operator whose output can be kept"):
        train(network, [batch(1)])


def test_at_most_two_outputs_come_back_at_any_time_and_the_next_sets_out_before_it_is_asked_for() -> None:
    class Watching(LazyLanes):
        def copy(self, lane: Lane, target: torch.Tensor, source: torch.Tensor) -> Copy:
            if lane is Lane.to_device:
                back.append(weakref.ref(target.untyped_storage()))
            seen.append(f"{lane.name} {alive(back)}")
            return super().copy(lane, target, source)

    back: list[weakref.ref] = []
    seen: list[str] = []
    network, lanes = build(), Watching()
    Checkpointing(network, DeviceInputs(), attention=KeptAttention(host(lanes=lanes)))
    for number, layer in enumerate(network.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(lambda *_, number=number: seen.append(f"used {number}"))
    gc.disable()
    try:
        loss = loss_of(network, batch())
        seen.append("loss")
        loss.backward()
        assert alive(back) == 0, "an output outlives the backward pass"
    finally:
        gc.enable()
    assert "; ".join(seen) == (
        "to_host 0; used 0; to_host 0; used 1; to_host 0; used 2; to_host 0; used 3; used 4; loss; "
        "to_device 1; used 4; to_device 2; used 3; to_device 2; used 2; to_device 2; used 1; used 0"
    )


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("name", STORES)
def test_after_an_exception_the_next_pass_is_right(name: str, every: int, failing: Any) -> None:
    network = build()
    expected = train(network, [batch(1)])
    Checkpointing(network, keeper(every), every, attention=KeptAttention(STORES[name](LAYERS, every)))
    for number in (0, 2, LAYERS - 1):
        failing(network.model.layers[number].mlp)  # in the forward pass
        with pytest.raises(ZeroDivisionError, match="planted"):
            train(network, [batch(5)])
        assert equal(train(network, [batch(1)]), expected)
        loss = loss_of(network, batch(5))
        failing(network.model.layers[number].mlp)  # in the recomputation: a copy may be on its way
        with pytest.raises(ZeroDivisionError, match="planted"):
            loss.backward()
        assert equal(train(network, [batch(1)]), expected)


@pytest.mark.parametrize("name", STORES)
def test_backward_twice_over_one_graph_and_late(name: str) -> None:
    network = build()
    once = train(network, [batch(1)])
    Checkpointing(network, DeviceInputs(), attention=KeptAttention(STORES[name](LAYERS, 1)))
    network.zero_grad()
    loss = loss_of(network, batch(1))
    loss.backward(retain_graph=True)
    loss.backward()
    assert equal(
        [p.grad for p in network.parameters()], [None if gradient is None else 2 * gradient for gradient in once]
    )
    loss = loss_of(network, batch(2))
    assert equal(train(network, [batch(1)]), once)
    if name == "device":
        loss.backward()
    else:
        with pytest.raises(RuntimeError, match=r"of an earlier forward pass, whose attention outputs"):
            loss.backward()
    assert equal(train(network, [batch(1)]), once)


def test_a_batch_longer_than_expected_is_an_error() -> None:
    network = build()
    Checkpointing(network, keeper(), attention=KeptAttention(host(size=1024)))
    with pytest.raises(RuntimeError, match=r"attention returned 12288 bytes, 1024 were expected"):
        loss_of(network, batch())


def test_the_estimate_is_what_is_allocated_and_too_little_of_it_is_one_line() -> None:
    for line in (
        ("checkpointing=cpu",),
        ("checkpointing=gpu", "checkpointing.every=2"),
        ("checkpointing=cpu", "checkpointing.layers=3", "checkpointing.every=2"),
        ("checkpointing=cpu", "checkpointing.layers=1"),
        ("checkpointing=cpu", "checkpointing.device_inputs=4"),
    ):
        config = compose("model=nano", "model.num_layers=5", "seq_len.tokens=64", "launch.device=cpu", *line)
        config.checkpointing.keep_attention = type(config.checkpointing.keep_attention).host
        layers = nn.ModuleList(TupleLayer() for _ in range(5))
        stay = config.checkpointing.device_inputs or 1
        installed = checkpointing.install(config, layers, CPU, device_inputs=stay)
        assert installed is not None
        held = sum(tensor.nbytes for tensor in installed.host_tensors())
        assert held == host_estimate.checkpoint_bytes(config, stay), line
    config = compose("model=llama3_8b", "seq_len=1m", "checkpointing=gpu", "launch.device=cpu", "model.num_layers=2")
    config.checkpointing.keep_attention = type(config.checkpointing.keep_attention).host
    config.train.micro_batch_size = 1 << 10
    with torch.device("meta"):
        network = nn.ModuleList(TupleLayer() for _ in range(2))
    with pytest.raises(HostMemoryError) as told:
        checkpointing.install(config, network, CPU)
    text = str(told.value)
    assert "\n" not in text
    assert text.startswith(
        "checkpointing.keep_attention: host keeps 1 attention outputs, 8320.00 GiB, in host memory: "
    )
    assert text.endswith("a shorter seq_len or checkpointing.keep_attention=none takes less")
