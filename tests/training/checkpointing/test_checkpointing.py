"""Gradient checkpointing changes nothing but where inputs wait: gradients are those without it, to the last bit."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from ldft.training.checkpointing.checkpointing import Checkpointing, DeviceInputs
from ldft.training.checkpointing.copies import Lane
from ldft.training.checkpointing.layer_inputs import HostInputs, KeptInput
from tests.training.checkpointing.lazy_lanes import Copy, LazyLanes
from tests.training.checkpointing.small_models import (
    FAMILIES,
    HIDDEN,
    KEEPERS,
    LAYERS,
    TOKENS,
    TupleModel,
    alive,
    batch,
    build,
    equal,
    keeper,
    loss_of,
    train,
)


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
    class Noting(LazyLanes):
        def copy(self, lane: Lane, target: torch.Tensor, source: torch.Tensor) -> Copy:
            slot = begins.index((target if lane is Lane.to_host else source).data_ptr())
            seen.append(f"{'out' if lane is Lane.to_host else 'back'} {slot}")
            return super().copy(lane, target, source)

        def wait(self, end: Copy) -> None:
            seen.append(f"wait {begins.index(end.slot)}")
            super().wait(end)

    network, lanes = build(), Noting()
    store = keeper(lanes=lanes)
    Checkpointing(network, store)
    seen: list[str] = []
    begins = [row.data_ptr() for arena in store.host_tensors() for row in arena]
    for number, layer in enumerate(network.model.layers):
        layer.input_layernorm.register_forward_pre_hook(lambda *_, number=number: seen.append(f"run {number}"))
    loss = loss_of(network, batch())
    seen.append("loss")
    loss.backward()
    assert " ".join(seen) == (
        "out 0 run 0 wait 0 out 1 run 1 wait 1 out 2 run 2 wait 2 out 3 run 3 wait 3 run 4 loss "
        "back 3 run 4 wait 3 back 2 run 3 wait 2 back 1 run 2 wait 1 back 0 run 1 wait 0 run 0"
    )
    targets = [target for lane, _, target in lanes.log if lane is Lane.to_device]
    assert targets[0] == targets[2] != targets[1] == targets[3]


@pytest.mark.parametrize(("stay", "most"), [(1, 2), (2, 2), (3, 3), (LAYERS, LAYERS - 1)])
def test_only_those_that_stay_or_two_are_on_the_device_at_any_time(stay: int, most: int) -> None:
    class Watching(LazyLanes):
        def copy(self, lane: Lane, target: torch.Tensor, source: torch.Tensor) -> Copy:
            if lane is Lane.to_device:
                note(target)
            return super().copy(lane, target, source)

    class Noting(HostInputs):
        def keep(self, group: int, hidden_states: torch.Tensor) -> KeptInput:
            kept = super().keep(group, hidden_states)
            if group:  # a variable of the model's forward function holds the first
                note(hidden_states)
            return kept

    def note(input: torch.Tensor) -> None:
        inputs.append(weakref.ref(input.untyped_storage()))
        counts.append(alive(inputs))

    inputs: list[weakref.ref] = []
    counts: list[int] = []
    network = build()
    size = 2 * TOKENS * HIDDEN * 4
    store = Noting(LAYERS, size, torch.device("cpu"), lanes=Watching(), on_device=stay)
    assert sum(tensor.nbytes for tensor in store.host_tensors()) == (LAYERS - stay) * size
    Checkpointing(network, store)
    gc.disable()
    try:
        loss_of(network, batch()).backward()
        assert alive(inputs) == 0, "an input outlives the backward pass"
    finally:
        gc.enable()
    assert max(counts) == most
