"""Kept outputs of attention with a real GPU: the same gradients, half the attention kernels, and the memory that it may take."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ldft.config import Config
from ldft.errors import ConfigError
from ldft.preflight import host_estimate
from ldft.preflight.selection import select
from ldft.training import model
from ldft.training.checkpointing.attention_outputs import HostOutputs
from ldft.training.checkpointing.checkpointing import Checkpointing, DeviceInputs
from ldft.training.checkpointing.copies import CudaLanes
from ldft.training.checkpointing.keep_attention import DeviceOutputs, KeptAttention
from ldft.training.checkpointing.layer_inputs import HostInputs
from tests.gpu.late_copies import POISON, SlowLanes, difference, gradients, tolerance
from tests.gpu.machine import allocated, cuda_config, kinds

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
LAYERS, TOKENS = 6, 4096
# Parts of the names of forward kernels: flash-attn's and torch's copy of it, cuDNN's.
KERNELS = ("flash_fwd", "fprop")
KINDS = ("sdpa", "sdpa_cudnn", "flash_attention_2")


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def config_of(kind: str, *overrides: str) -> Config:
    config = cuda_config(
        *(
            "model=nano",
            f"model.num_layers={LAYERS}",
            "model.hidden_size=512",
            "model.head_dim=64",
            "model.vocab_size=512",
        ),
        *("model.num_attention_heads=8", f"seq_len.tokens={TOKENS}", "offload=none", "checkpointing=none"),
        *overrides,
    )
    if kind not in kinds(config):
        pytest.skip(f"{kind} does not run here")
    config.attention.kind = type(config.attention.kind)[kind]
    return config


def inputs(config: Config, every: int, lanes: CudaLanes | None) -> HostInputs:
    size = host_estimate.layer_input_bytes(config)
    return HostInputs(-(-LAYERS // every), size, device(), pin=True, lanes=lanes)


def outputs(config: Config, every: int, lanes: CudaLanes | None) -> HostOutputs:
    size = host_estimate.attention_output_bytes(config)
    return HostOutputs(-(-LAYERS // every), every, size, device(), pin=True, lanes=lanes)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_with_attention_computed_again(kind: str, dropout: float) -> None:
    """Dropout of attention and, drawn after it in the same layer, of the MLP. No synchronisation between passes."""
    config = config_of(kind)
    network = model.build(select(config), device())
    for layer in network.model.layers:
        layer.self_attn.attention_dropout = dropout
        if dropout:
            layer.mlp.register_forward_hook(lambda _, __, output: nn.functional.dropout(output, dropout))
    try:
        gradients(network, TOKENS)
    except ConfigError as error:
        pytest.skip(str(error))  # cuDNN's versions differ in what they take
    for every in (1, 4):
        Checkpointing(network, DeviceInputs(), every)
        expected = [gradients(network, TOKENS, seed) for seed in range(3)]
        allowed = tolerance(network, TOKENS, expected)
        for slow in (False, True):
            lanes = SlowLanes(device()) if slow else CudaLanes(device())
            for store in (DeviceOutputs(), outputs(config, every, lanes)):
                Checkpointing(network, inputs(config, every, lanes), every, attention=KeptAttention(store))
                torch.cuda.synchronize()
                for tensor in store.host_tensors():
                    tensor.fill_(POISON)
                found = [gradients(network, TOKENS, seed) for seed in range(3)]
                worst = max(difference(found[seed], expected[seed]) for seed in range(3))
                assert worst <= allowed, (type(store).__name__, every, slow, worst, allowed)
                if isinstance(store, HostOutputs):
                    rows = [row for tensor in store.host_tensors() for row in tensor]
                    assert len(rows) == (-(-LAYERS // every) - 1) * every and all(row.is_pinned() for row in rows)
                    used = TOKENS * 512 * 2
                    assert not any(bool(row[:used].view(torch.bfloat16).isnan().any()) for row in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_runs_once_a_layer(kind: str) -> None:
    config = config_of(kind)
    network = model.build(select(config), device())

    def calls() -> int:
        gradients(network, TOKENS)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            gradients(network, TOKENS)
        counts = {event.key: event.count for event in profiler.key_averages() if event.device_type == DeviceType.CUDA}
        found = {key: count for key, count in counts.items() if any(part in key for part in KERNELS)}
        assert found, f"no kernel of attention among {sorted(counts)}"
        return sum(found.values())

    Checkpointing(network, DeviceInputs())
    assert calls() == 2 * LAYERS
    for store in (DeviceOutputs(), outputs(config, 1, None)):
        Checkpointing(network, DeviceInputs(), attention=KeptAttention(store))
        assert calls() == LAYERS


def test_memory_beyond_that_of_inputs_in_host_memory() -> None:
    """In host memory: at most two outputs and one input more on the device; and nothing stays there."""
    config = config_of("sdpa_cudnn", "seq_len.tokens=32768")
    network = model.build(select(config), device())
    tokens = torch.randint(512, (1, 32768), device="cuda")
    out, size = host_estimate.attention_output_bytes(config), host_estimate.layer_input_bytes(config)
    peaks = {}
    for name, store in (("cpu", None), ("host", outputs(config, 1, None)), ("device", DeviceOutputs())):
        Checkpointing(network, inputs(config, 1, None), attention=KeptAttention(store) if store else None)
        network(input_ids=tokens, labels=tokens).loss.backward()
        before = allocated()
        torch.cuda.empty_cache()
        for _ in range(3):
            torch.cuda.reset_peak_memory_stats()
            network(input_ids=tokens, labels=tokens).loss.backward()
            torch.cuda.synchronize()
            peaks[name] = torch.cuda.max_memory_allocated() - before
            assert allocated() == before
    assert peaks["host"] - peaks["cpu"] <= 2 * out + size, peaks
    assert peaks["device"] - peaks["host"] >= (LAYERS - 3) * out, peaks
