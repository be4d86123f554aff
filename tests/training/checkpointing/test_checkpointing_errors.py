"""Checkpointing where something goes wrong, or is not training: no stale input, and errors in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ldft.memory.policy import HostMemoryError
from ldft.training.checkpointing import checkpointing, copies
from ldft.training.checkpointing.checkpointing import Checkpointing
from ldft.training.checkpointing.layer_inputs import HostInputs
from tests.conftest import compose
from tests.training.checkpointing.lazy_lanes import LazyLanes
from tests.training.checkpointing.small_models import (
    CPU,
    KEEPERS,
    LAYERS,
    Output,
    TupleLayer,
    TupleModel,
    batch,
    build,
    equal,
    keeper,
    loss_of,
    train,
)


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
    assert equal(
        [p.grad for p in network.parameters()], [None if gradient is None else 2 * gradient for gradient in once]
    )


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
        def forward(self, hidden_states: torch.Tensor, scale: float, shift: torch.Tensor) -> Output:
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
