"""Layer inputs in host memory with a real GPU: the same gradients, the memory that it is for, and copies beside the computation."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ldft import results
from ldft.preflight.selection import select
from ldft.training import model
from ldft.training.checkpointing.checkpointing import Checkpointing, DeviceInputs
from ldft.training.checkpointing.copies import CudaLanes
from ldft.training.checkpointing.layer_inputs import HostInputs
from tests.conftest import compose
from tests.gpu.late_copies import POISON, SLEEP, SlowLanes, difference, gradients, tolerance
from tests.gpu.machine import allocated

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
LAYERS, TOKENS, HIDDEN = 6, 2048, 256


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def build(precision: str, dropout: float = 0.0) -> PreTrainedModel:
    config = compose(
        *("model=nano", f"model.num_layers={LAYERS}", f"model.hidden_size={HIDDEN}", "model.vocab_size=512"),
        *("offload=none", "checkpointing=none", f"train.precision={precision}", "launch.device=cuda"),
    )
    network = model.build(select(config), device())
    if dropout:
        for layer in network.model.layers:
            layer.mlp.register_forward_hook(lambda _, __, output: nn.functional.dropout(output, dropout))
    return network


def store(every: int = 1, *, lanes: CudaLanes | None = None, width: int = 2) -> HostInputs:
    return HostInputs(-(-LAYERS // every), TOKENS * HIDDEN * width, device(), pin=True, lanes=lanes)


@pytest.mark.parametrize("slow", ["copies", "computation"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_gradients_are_those_of_inputs_on_the_device(precision: str, slow: str) -> None:
    """With dropout, whose random state is the device's; several passes without a synchronisation between them."""
    network = build(precision, dropout=0.2)
    if slow == "computation":
        for layer in network.model.layers:
            layer.self_attn.register_forward_pre_hook(lambda *_: torch.cuda._sleep(SLEEP))
    width = 2 if precision == "bf16" else 4
    for every in (1, 4):
        Checkpointing(network, DeviceInputs(), every)
        expected = [gradients(network, TOKENS, seed) for seed in range(3)]
        allowed = tolerance(network, TOKENS, expected)
        kept = store(every, lanes=SlowLanes(device()) if slow == "copies" else None, width=width)
        Checkpointing(network, kept, every)
        torch.cuda.synchronize()
        for tensor in kept.host_tensors():
            tensor.fill_(POISON)
        found = [gradients(network, TOKENS, seed) for seed in range(3)]
        assert max(difference(found[seed], expected[seed]) for seed in range(3)) <= allowed


class Layer(GradientCheckpointingLayer):
    """Little memory beside its input and output, and a known time."""

    def __init__(self, cycles: int) -> None:
        super().__init__()
        self.scale, self.cycles = nn.Parameter(torch.ones((), device="cuda")), cycles

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.cycles:
            torch.cuda._sleep(self.cycles)
        return hidden_states * self.scale


class Stack(nn.Module):
    def __init__(self, layers: int, cycles: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(cycles) for _ in range(layers))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        states = states * 1.0
        for layer in self.layers:
            states = layer(states)
        return states.mean()


def test_peak_memory_is_lower_by_all_but_three_inputs_and_does_not_grow() -> None:
    layers, size = 12, 64 << 20
    network = Stack(layers)
    states = torch.ones(size // 4, device="cuda")
    peaks = {}
    for name, keeper in (("gpu", DeviceInputs()), ("cpu", HostInputs(layers, size, device(), pin=True))):
        Checkpointing(network, keeper)
        network(states).backward()
        before, reserved = allocated(), []
        torch.cuda.empty_cache()
        for _ in range(4):
            torch.cuda.reset_peak_memory_stats()
            network(states).backward()
            peaks[name] = torch.cuda.max_memory_allocated()
            assert allocated() == before
            reserved.append(torch.cuda.memory_reserved())
        assert len(set(reserved)) == 1
    assert peaks["gpu"] - peaks["cpu"] >= (layers - 3) * size


def test_every_slot_is_pinned_and_serves_every_pass() -> None:
    kept = store()
    assert [tuple(tensor.shape) for tensor in kept.host_tensors()] == [(LAYERS - 1, TOKENS * HIDDEN * 2)]
    assert all(row.is_pinned() for tensor in kept.host_tensors() for row in tensor)
    network = build("bf16")
    Checkpointing(network, kept)
    contents = []
    for seed in range(2):
        gradients(network, TOKENS, seed)
        torch.cuda.synchronize()
        contents.append([row.view(torch.bfloat16).clone() for tensor in kept.host_tensors() for row in tensor])
    assert all(bool(row.any()) and not bool(row.isnan().any()) for rows in contents for row in rows)
    assert not any(torch.equal(a, b) for a, b in zip(*contents, strict=True))


def seconds(run: Callable[[], None]) -> float:
    times = []
    for _ in range(4):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def test_copies_run_beside_the_computation() -> None:
    layers, size = 6, 256 << 20
    states = torch.ones(size // 4, device="cuda")
    kept = HostInputs(layers, size, device(), pin=True)
    slot = kept.host_tensors()[0][0]
    bytes_ = states.view(torch.uint8)

    def there_and_back() -> None:
        slot.copy_(bytes_, non_blocking=True)
        bytes_.copy_(slot, non_blocking=True)

    copies_s = (layers - 1) * seconds(there_and_back)
    states.fill_(1)
    network = Stack(layers, cycles=24_000_000)  # over 10 ms, a copy takes 5
    times = {}
    for name, keeper in (("gpu", DeviceInputs()), ("cpu", kept)):
        Checkpointing(network, keeper)
        times[name] = seconds(lambda: network(states).backward())
    assert times["cpu"] < times["gpu"] + 0.2 * copies_s, f"{times}, copies alone {copies_s:.3f} s"


def test_under_zero_3_with_everything_offloaded(tmp_path: Path) -> None:
    base = ["model=nano", "model.num_layers=4", "data=repeat", "seq_len.tokens=512", "optimizer.learning_rate=2e-3"]
    base += ["launch.device=cuda", "offload=full", "train.iterations=6", "train.gradient_accumulation_steps=2"]
    command = [sys.executable, "-m", "ldft", "-m", *base, f"results.dir={tmp_path}", "checkpointing=cpu,gpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = results.read(tmp_path).set_index("cfg.checkpointing.mode")
    cpu, gpu = rows.loc["cpu"], rows.loc["gpu"]
    assert gpu.loss[-1] < 0.95 * gpu.loss[0]
    assert list(cpu.loss) == pytest.approx(list(gpu.loss), rel=2e-3)
    assert cpu.checkpoint_host_gib * 2**30 == 3 * 512 * 64 * 2 and gpu.checkpoint_host_gib == 0
