"""Gradient checkpointing changes nothing but where inputs wait: gradients are those without it, to the last bit."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from ldft.memory.policy import HostMemoryError
from ldft.training import model
from ldft.training.checkpointing import checkpointing, copies
from ldft.training.checkpointing.checkpointing import Checkpointing, DeviceInputs
from ldft.training.checkpointing.copies import Lane
from ldft.training.checkpointing.layer_inputs import HostInputs
from tests.conftest import compose
from tests.training.checkpointing.lazy_lanes import LazyLanes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Operations this small lose time to more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def build(family: str = "llama", *overrides: str, dropout: float = 0.0, precision: str = "fp32") -> nn.Module:
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
    network = model.build(config, {}, CPU)
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


def keeper(every: int = 1, *, lanes: LazyLanes | None = None, size: int = 2 * TOKENS * HIDDEN * 4) -> HostInputs:
    return HostInputs(-(-LAYERS // every), size, CPU, lanes=lanes)


KEEPERS: dict[str, Callable[[int], checkpointing.Keeper]] = {
    "gpu": lambda every: DeviceInputs(),
    "cpu": keeper,
    "cpu, copies as late as may be": lambda every: keeper(every, lanes=LazyLanes()),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_without_checkpointing(family: str) -> None:
    """With dropout, two accumulated micro-batches of different lengths, and masks that differ from layer to layer."""
    network = build(family, dropout=0.2)
    batches = [batch(1), batch(2, tokens=TOKENS - 5)]
    expected = train(network, batches)
    assert not equal(expected, train(build(family), batches)), (
        "dropout must act, else its restored state would not show"
    )
    for name, make in KEEPERS.items():
        for every in (1, 2, 3, LAYERS):
            installed = Checkpointing(network, make(every), every)
            assert equal(train(network, batches), expected), (name, every)
            installed.remove()
    assert equal(train(network, batches), expected)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("name", KEEPERS)
def test_under_autocast_and_with_lora(name: str, every: int) -> None:
    """Frozen base weights: the first layer's input requires no gradient, and adapters of every layer get theirs."""
    network = build()
    torch.manual_seed(0)
    network = get_peft_model(network, LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "down_proj"]))
    for parameter_name, parameter in network.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter)  # zero as peft makes it, and then A would get no gradient
    expected = train(network, [batch(1), batch(2)], autocast=True)
    trained = [p for p in network.parameters() if p.requires_grad]
    assert len(trained) == 4 * LAYERS and all(bool(p.grad.any()) for p in trained)
    Checkpointing(network, KEEPERS[name](every), every)
    assert equal(train(network, [batch(1), batch(2)], autocast=True), expected)


class TupleLayer(checkpointing.GradientCheckpointingLayer):
    """Its input by keyword, a tensor and two other values out, dropout inside."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(HIDDEN, HIDDEN), nn.Dropout(0.5)

    def forward(self, hidden_states: torch.Tensor, scale: float, shift: torch.Tensor) -> tuple[torch.Tensor, ...]:
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


@pytest.mark.parametrize("name", KEEPERS)
def test_layers_that_return_tuples_and_take_keywords(name: str) -> None:
    torch.manual_seed(0)
    network = TupleModel()
    expected = train(network, [batch(1)])
    Checkpointing(network, KEEPERS[name](1))
    assert equal(train(network, [batch(1)]), expected)


def test_a_group_of_layers_that_return_tuples_is_refused() -> None:
    network = TupleModel()
    Checkpointing(network, DeviceInputs(), 2)
    with pytest.raises((RuntimeError, ValueError), match=r"checkpointing.every=2|unpack"):
        train(network, [batch(1)])


def test_one_slot_a_group_but_the_last_reused_by_every_micro_batch() -> None:
    for every, slots in ((1, 4), (2, 2), (3, 1), (LAYERS, 0)):
        network, lanes = build(), LazyLanes()
        store = keeper(every, lanes=lanes)
        Checkpointing(network, store, every)
        arenas = store.host_tensors()
        assert sum(arena.shape[0] for arena in arenas) == slots
        assert sum(arena.nbytes for arena in arenas) == slots * 2 * TOKENS * HIDDEN * 4
        begins = [row.data_ptr() for arena in arenas for row in arena]
        for number in range(3):
            lanes.log.clear()
            train(network, [batch(number), batch(number)])
            out = [target for lane, _, target in lanes.log if lane is Lane.to_host]
            back = [source for lane, source, _ in lanes.log if lane is Lane.to_device]
            assert out == begins * 2
            assert back == begins[::-1] * 2


def test_the_next_input_sets_out_before_the_group_is_recomputed_and_two_buffers_serve_all() -> None:
    network, lanes = build(), LazyLanes()
    store = keeper(lanes=lanes)
    Checkpointing(network, store)
    seen: list[str] = []
    begins = [row.data_ptr() for arena in store.host_tensors() for row in arena]
    for number, layer in enumerate(network.model.layers):
        layer.input_layernorm.register_forward_pre_hook(lambda *_, number=number: seen.append(f"run {number}"))
    copy, wait = lanes.copy, lanes.wait

    def noting_copy(lane: Lane, target: torch.Tensor, source: torch.Tensor) -> object:
        slot = begins.index((target if lane is Lane.to_host else source).data_ptr())
        seen.append(f"{'out' if lane is Lane.to_host else 'back'} {slot}")
        return copy(lane, target, source)

    def noting_wait(end: object) -> None:
        seen.append(f"wait {begins.index(end.slot)}")
        wait(end)

    lanes.copy, lanes.wait = noting_copy, noting_wait
    loss = loss_of(network, batch())
    seen.append("loss")
    loss.backward()
    assert " ".join(seen) == (
        "out 0 run 0 wait 0 out 1 run 1 wait 1 out 2 run 2 wait 2 out 3 run 3 wait 3 run 4 loss "
        "back 3 run 4 wait 3 back 2 run 3 wait 2 back 1 run 2 wait 1 back 0 run 1 wait 0 run 0"
    )
    targets = [target for lane, _, target in lanes.log if lane is Lane.to_device]
    assert targets[0] == targets[2] != targets[1] == targets[3]


def alive(references: list[weakref.ref]) -> int:
    return len({id(reference()) for reference in references if reference() is not None})


def test_at_most_two_inputs_are_on_the_device_at_any_time() -> None:
    class Watching(LazyLanes):
        most = 0

        def copy(self, lane: Lane, target: torch.Tensor, source: torch.Tensor) -> object:
            on_device = target if lane is Lane.to_device else source
            inputs.append(weakref.ref(on_device.untyped_storage()))
            self.most = max(self.most, alive(inputs))
            return super().copy(lane, target, source)

    inputs: list[weakref.ref] = []
    lanes = Watching()
    network = build()
    Checkpointing(network, keeper(lanes=lanes))
    gc.disable()
    try:
        loss_of(network, batch()).backward()
        assert alive(inputs) == 0, "a buffer outlives the backward pass"
    finally:
        gc.enable()
    assert lanes.most == 2


@pytest.fixture
def failing() -> Callable[[nn.Module], None]:
    """Make a module raise at its next call, and at none after it."""

    def arm(module: nn.Module) -> None:
        def fail(*_: object) -> None:
            handle.remove()
            raise ZeroDivisionError("planted")

        handle = module.register_forward_pre_hook(fail)

    return arm


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("name", KEEPERS)
def test_after_an_exception_the_next_pass_is_right(name: str, every: int, failing) -> None:
    network = build(dropout=0.2)
    expected = train(network, [batch(1)])
    Checkpointing(network, KEEPERS[name](every), every)
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
    failing(network.model.layers[1])  # between the layers of a group
    with pytest.raises(ZeroDivisionError, match="planted"):
        train(network, [batch(5)])
    assert equal(train(network, [batch(1)]), expected)


def test_passes_without_backward_take_nothing_and_a_late_backward_is_an_error() -> None:
    network = build(dropout=0.2)
    expected = train(network, [batch(1)])
    store = keeper()
    Checkpointing(network, store)
    for number in range(3):
        loss = loss_of(network, batch(number))  # the loss before it is still there: its inputs are forgotten
    assert equal(train(network, [batch(1)]), expected)
    with pytest.raises(RuntimeError, match="of an earlier forward pass"):
        loss.backward()
    assert equal(train(network, [batch(1)]), expected)


def test_backward_twice_over_one_graph() -> None:
    network = build(dropout=0.2)
    once = train(network, [batch(1)])
    Checkpointing(network, keeper(lanes=LazyLanes()))
    network.zero_grad()
    torch.manual_seed(3)
    loss = loss_of(network, batch(1))
    loss.backward(retain_graph=True)
    loss.backward()
    assert equal([p.grad for p in network.parameters()], [2 * gradient for gradient in once])


def test_nothing_is_kept_in_eval_mode_or_without_gradients() -> None:
    network, lanes = build(), LazyLanes()
    with torch.no_grad():
        expected = loss_of(network, batch(1))
    for every in (1, 2):
        installed = Checkpointing(network, keeper(every, lanes=lanes), every)
        with torch.no_grad():
            assert torch.equal(loss_of(network, batch(1)), expected)
        network.eval()
        assert torch.equal(loss_of(network, batch(1)), expected)
        network.train()
        installed.remove()
    assert not lanes.log


def test_a_batch_longer_than_expected_is_an_error() -> None:
    network = build()
    Checkpointing(network, keeper(size=1024))
    with pytest.raises(RuntimeError, match=r"an input of 12288 bytes came, 1024 were expected"):
        loss_of(network, batch())


@pytest.mark.parametrize("number", [1, LAYERS - 1])
def test_a_layer_that_writes_into_its_input_is_an_error(number: int) -> None:
    class Writing(TupleLayer):
        def forward(self, hidden_states: torch.Tensor, scale: float, shift: torch.Tensor) -> tuple[torch.Tensor, ...]:
            outputs = super().forward(hidden_states, scale, shift)
            hidden_states.detach().mul_(2)
            return outputs

    network = TupleModel()
    network.layers[number] = Writing()
    Checkpointing(network, keeper())
    with pytest.raises(RuntimeError, match=f"a layer of group {number} changes its input in place"):
        loss_of(network, batch()).backward()


def test_too_little_host_memory_is_one_line_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose("model=llama3_8b", "seq_len=1m", "checkpointing=cpu", "launch.device=cpu", "model.num_layers=2")
    config.train.micro_batch_size = 1 << 10
    with torch.device("meta"):
        network = nn.ModuleList(TupleLayer() for _ in range(2))
    with pytest.raises(HostMemoryError) as told:
        checkpointing.install(config, network, CPU)
    text = str(told.value)
    assert "\n" not in text
    assert text.startswith("checkpointing.mode: cpu keeps 1 layer inputs, 8192.00 GiB, in host memory: ")
    assert "checkpointing=gpu takes less" in text


def test_slots_of_one_registration_each_where_the_arena_would_span_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "REGISTER_CHUNK", 3 * 4096)
    monkeypatch.setattr("ldft.memory.allocator._warned", True)
    store = HostInputs(6, 4096, CPU, pin=True)
    assert [tuple(arena.shape) for arena in store.host_tensors()] == [(3, 4096), (2, 4096)]


def test_the_benchmark_takes_turns_with_every_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
    import checkpoint_offload

    samples = checkpoint_offload.run("nano:3:32", list(checkpoint_offload.MODES), 2, CPU)
    turns = [sample["mode"] for sample in samples if not sample["warmup"]]
    ours, peers = ["cpu", "gpu+attention", "cpu+attention"], ["seed", "deepspeed", "gpu"]
    assert turns == [*ours, *peers, *ours[1:], *peers, "cpu"]
    assert len({sample["loss"] for sample in samples}) == 1 and len(samples) == 18
    assert all(0 < sample["forward_s"] < sample["total_s"] for sample in samples)
