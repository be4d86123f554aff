"""Memory of a mixture of experts: all experts in it, and of activations those of the experts that compute a token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldft.config import Config
from ldft.preflight import (
    decoder_layers,
    deepspeed_config,
    device_estimate,
    host_estimate,
    layer_memory,
    parameter_counts,
    zero_buckets,
)
from ldft.preflight.selection import select
from ldft.training import model
from tests.conftest import compose
from tests.training.test_mixtures import config_of

CPU = torch.device("cpu")
MIXTRAL = ("model=llama3_8b", "model.family=mixtral", "model.vocab_size=32000", "launch.device=cuda", "seq_len=4k")
EXPERTS = 8
WITH = (f"model.num_experts={EXPERTS}", "model.num_experts_per_token=2")
# Elements of Mixtral 8x7B, whose other sizes are those of Llama 3 8B: 32 layers, width 4096, experts 14336 wide.
GATE_UP, DOWN, OTHERS = (
    EXPERTS * 2 * 14336 * 4096,
    EXPERTS * 14336 * 4096,
    2 * 4096 * (4096 + 1024) + 8 * 4096 + 2 * 4096,
)


def mixtral(*more: str) -> Config:
    return compose(*MIXTRAL, *WITH, *more)


def test_all_experts_are_in_host_memory() -> None:
    parameters = 32 * (GATE_UP + DOWN + OTHERS) + 2 * 32000 * 4096 + 4096
    assert parameters == 46_702_792_704  # as published
    roles = host_estimate.host_bytes(select(mixtral("checkpointing=gpu")))
    assert roles["compute_weights"] == roles["compute_gradients"] == 2 * parameters
    assert roles["master_weights"] == roles["variance"] == 4 * parameters
    assert host_estimate.host_bytes(select(mixtral("offload=optimizer")))["compute_gradients"] == 2 * GATE_UP
    assert parameter_counts.total(parameter_counts.trained_sizes(mixtral("lora=r8"))) == 32 * 8 * (
        2 * (4096 + 4096) + 2 * (4096 + 1024)
    )


def test_a_whole_layer_of_experts_is_on_the_device_at_once() -> None:
    run = select(mixtral("offload=full"))
    layer = GATE_UP + DOWN + OTHERS
    moments = device_estimate.moments(run)
    assert all(parts["gathered weights"] >= 2 * layer for name, parts in moments.items() if name.startswith("backward"))
    inside = moments["backward of the first layers"]
    assert inside["a layer's gradients"] == 2 * layer
    # Two ranks gather the experts in one block, and copy them out of it: half of the block is their own shards.
    two = device_estimate.moments(select(mixtral("offload=full", "launch.num_ranks=2")))["backward of the first layers"]
    assert two["gathered weights"] >= inside["gathered weights"] + 2 * DOWN
    # More tokens for each expert, more memory inside a layer.
    more = device_estimate.moments(select(compose(*MIXTRAL, "model.num_experts=8", "model.num_experts_per_token=4")))
    added = more["loss"]["logits"] - moments["loss"]["logits"]
    grown = more["backward of the first layers"]["inside a layer"] - inside["inside a layer"]
    assert added == 0 and grown == 2 * 4096 * 2 * (3 * 4096 + 5 * 14336)


def test_buckets_and_swap_buffers_hold_the_largest_weight() -> None:
    small = ("model.intermediate_size=1024", "model.num_experts=16", "model.num_experts_per_token=2")
    config = compose(*MIXTRAL, *small, "offload=full")
    largest = 16 * 2 * 1024 * 4096
    chosen = zero_buckets.sizes(config)
    assert chosen["reduce_bucket_size"] == chosen["stage3_prefetch_bucket_size"] * largest // 50_000_000 == largest
    swapped = compose(*MIXTRAL, *WITH, "offload=nvme", "offload.nvme_path=/tmp", "launch.num_ranks=2")
    zero: dict[str, Any] = deepspeed_config.build(swapped)["zero_optimization"]
    assert zero["offload_param"]["buffer_size"] >= GATE_UP / 2
    # Written out, since DeepSpeed's default names Mixtral: nothing of a mixture is fetched as a whole block.
    assert zero["leaf_module"] == {"classes": []}
    assert "leaf_module" not in deepspeed_config.build(compose("model=nano", "offload=none"))["zero_optimization"]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe", "gpt_oss", "granitemoe"])
def test_activations_are_those_that_autograd_keeps(family: str) -> None:
    config = config_of(family, num_experts=8, num_experts_per_token=3)
    if family == "qwen2_moe":
        config.model.extra = {"shared_expert_intermediate_size": 96}
    config.seq_len.tokens = 512
    network = model.build(select(config), CPU)
    name = "block_sparse_moe" if family == "granitemoe" else "mlp"
    block = getattr(network.model.layers[0], name)
    states = torch.randn(1, 512, config.model.hidden_size, requires_grad=True)
    known = {tensor.untyped_storage().data_ptr() for tensor in [*block.parameters(), states]}
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        block(states)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert [(bool(layer.experts), count) for layer, count in decoder_layers.kinds(config.model).items()] == [(True, 2)]
    assert 4 * 512 * layer_memory.of_experts(config) == pytest.approx(measured, rel=0.03)
