"""Mixtures of experts: their FLOPs are those of the experts that compute a token, and they train as a plain loop does.

Two ranks accumulate two micro-batches, with everything on the host and the router's loss in the loss.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from ldft.config import AttentionKind, Config, Device, ModelConfig, OffloadDevice, Precision, SeqLenConfig, from_dict
from ldft.config.checkpointing import CheckpointingMode
from ldft.preflight.selection import select
from ldft.runner import measured
from ldft.training import data, flops, model
from ldft.training.architecture import hf_config
from ldft.training.checkpointing import checkpointing
from tests.conftest import long
from tests.training.test_equality import run_once  # noqa: F401

CPU = torch.device("cpu")
E, K, H, INNER, TOKENS = 4, 2, 64, 48, 40


def config_of(family: str, **values: Any) -> Config:
    own = {"expert_intermediate_size": INNER} if family in ("qwen2_moe", "qwen3_moe") else {"intermediate_size": INNER}
    if family == "gpt_oss":  # needs a window
        own["sliding_window"] = 2 * TOKENS
    shape = ModelConfig(
        family=family, num_key_value_heads=2, **({"num_experts": E, "num_experts_per_token": K} | own | values)
    )
    config = Config(model=shape, seq_len=SeqLenConfig(tokens=TOKENS))
    config.launch.device, config.train.precision, config.attention.kind = (
        Device.cpu,
        Precision.fp32,
        AttentionKind.eager,
    )
    config.offload.stage = 0
    config.offload.parameters = config.offload.optimizer = OffloadDevice.none
    config.checkpointing.mode = CheckpointingMode.none
    config.validate()
    return config


def counted(config: Config) -> tuple[float, float]:
    """FLOPs of a token by ldft: (dense, attention)."""
    network = model.build(select(config), CPU)
    dense, attention = flops.model_tflop(network, config.model, TOKENS, TOKENS)
    return dense * 1e12, attention * 1e12


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe", "gpt_oss", "olmoe", "granitemoe"])
def test_flops_are_those_that_torch_counts(family: str) -> None:
    config = config_of(family)
    network = model.build(select(config), CPU)
    network.set_experts_implementation("eager")
    tokens = data.batch(config, 0, 0, 0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(input_ids=tokens)
    dense, attention = counted(config)
    # torch counts the forward pass, a third, and the square of which causal attention needs half.
    assert counter.get_total_flops() == pytest.approx((dense + 2 * attention) / 3, rel=1e-9)


def test_flops_by_hand() -> None:
    projections = H * (64 + 2 * 32) + 64 * H
    layer = projections + E * H + K * 3 * INNER * H
    config = config_of("mixtral")
    assert counted(config)[0] == pytest.approx(6 * TOKENS * (2 * layer + 256 * H))
    # More experts cost their router, more of them for each token all they have.
    assert counted(config_of("mixtral", num_experts=8))[0] - counted(config)[0] == pytest.approx(6 * TOKENS * 2 * 4 * H)
    more = counted(config_of("mixtral", num_experts_per_token=3))[0] - counted(config)[0]
    assert more == pytest.approx(6 * TOKENS * 2 * 3 * INNER * H)


def test_flops_that_cannot_be_told_are_null_with_a_note() -> None:
    """Qwen 3 Next mixes attention with a recurrent layer, whose convolution is a weight of three dimensions."""
    config = config_of("qwen3_next", intermediate_size=256, expert_intermediate_size=INNER)
    config.train.iterations, config.train.warmup_iterations = 2, 1
    with torch.device("meta"), no_init_weights():
        network = AutoModelForCausalLM.from_config(hf_config(config.model))
    report = flops.columns(network, config.model, TOKENS, TOKENS) | {
        "iteration_s": [1.0, 1.0],
        "peak_tflops_per_s": 9.0,
    }
    row = measured.columns(config, [], [report])
    assert row["model_tflop_dense"] is None and row["model_tflop_attention"] is None
    assert "model_tflops_per_s" not in row and "mfu" not in row and row["tokens_per_s"] == TOKENS
    (note,) = measured.notes({}, [report])
    assert note.startswith(
        "model_tflop_dense and what follows from it are null: ldft cannot count Conv1d.weight, of shape"
    )
    assert measured.notes({}, [{"model_tflop_dense": 1.0}]) == []


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe", "gpt_oss", "olmoe", "granitemoe"])
def test_one_module_holds_all_experts_of_a_layer(family: str) -> None:
    """Then every rank runs the same modules in the same order, as ZeRO-3 needs: no block of experts has to be fetched whole."""
    config = config_of(family, num_experts=7)
    with torch.device("meta"), no_init_weights():
        network = AutoModelForCausalLM.from_config(hf_config(config.model))
    lists = [module for module in network.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == 7]
    holders = [m for m in network.modules() if any(p.dim() == 3 and len(p) == 7 for p in m.parameters(recurse=False))]
    assert not lists and len(holders) == config.model.num_layers


AUX = 0.05
LINES = {
    "full": (
        "offload=full", "checkpointing=cpu", "launch.num_ranks=2", "train.gradient_accumulation_steps=2", "model.family=mixtral",
        # Not even the router's weight stays on the device.
        "offload.deepspeed={zero_optimization:{stage3_param_persistence_threshold:0}}",
    ),
    "optimizer": ("offload=optimizer", "checkpointing=gpu", "model.family=qwen3_moe", "model.expert_intermediate_size=48"),
}  # fmt: skip
MIXTURE = ("model.num_experts=4", "model.num_experts_per_token=2", f"model.router_aux_loss={AUX}", "train.precision=fp32",
           "model.vocab_size=512", "train.iterations=6")  # fmt: skip


def plain_loop(config_json: str, coefficient: float = AUX) -> list[float]:
    """Losses of torch's AdamW over all ranks' micro-batches one after the other; nothing of DeepSpeed."""
    config = from_dict(json.loads(config_json))
    config.offload.stage, config.model.router_aux_loss = 0, coefficient
    network = model.build(select(config), CPU)
    rates, steps, ranks = config.optimizer, config.train.gradient_accumulation_steps, config.launch.num_ranks
    optimizer = torch.optim.AdamW(network.parameters(), lr=rates.learning_rate, betas=(rates.betas[0], rates.betas[1]),
                                  eps=rates.eps, weight_decay=rates.weight_decay)  # fmt: skip
    losses = []
    for iteration in range(config.train.iterations):
        total = 0.0
        for rank in range(ranks):
            for step in range(steps):
                tokens = data.batch(config, iteration, step, rank)
                loss = network(input_ids=tokens, labels=tokens).loss / (steps * ranks)
                loss.backward()
                total += loss.item()
        torch.nn.utils.clip_grad_norm_(network.parameters(), rates.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@long
@pytest.mark.parametrize("name", LINES)
def test_offloaded_training_equals_a_plain_loop(run_once, name: str) -> None:  # noqa: F811
    row = run_once(*MIXTURE, *LINES[name])
    reference = plain_loop(row.config_json)
    assert reference[-1] < 0.95 * reference[0], "the loss must fall, else a missing update would not show"
    np.testing.assert_allclose(row.loss, reference, rtol=2e-5)
    # The comparison can fail: without the router's loss the losses are others.
    assert np.abs(np.array(plain_loop(row.config_json, 0.0)) / reference - 1).max() > 1e-3


@pytest.mark.parametrize("mode", [*CheckpointingMode])
def test_the_routers_loss_counts_with_its_coefficient_and_reaches_the_router(mode: CheckpointingMode) -> None:
    found = {}
    for coefficient in (0.0, AUX):
        config = config_of("mixtral", router_aux_loss=coefficient)
        config.checkpointing.mode = mode
        network = model.build(select(config), CPU)
        checkpointing.install(config, network, CPU)
        tokens = data.batch(config, 0, 0, 0)
        output = network(input_ids=tokens, labels=tokens)
        output.loss.backward()
        found[coefficient] = output, [layer.mlp.gate.weight.grad for layer in network.model.layers]
    (plain, without), (balanced, with_it) = found[0.0], found[AUX]
    assert plain.aux_loss is None and balanced.aux_loss > 0.5
    assert (balanced.loss - plain.loss).item() == pytest.approx(AUX * balanced.aux_loss.item(), rel=1e-4)
    # The first router's gradient by hand: that of the balancing loss alone, added.
    config = config_of("mixtral", router_aux_loss=AUX)
    network = model.build(select(config), CPU)
    (AUX * network(input_ids=tokens, output_router_logits=True).aux_loss).backward()
    for layer, before, after in zip(network.model.layers, without, with_it, strict=True):
        torch.testing.assert_close(after - before, layer.mlp.gate.weight.grad, rtol=1e-3, atol=1e-7)
        assert layer.mlp.gate.weight.grad.abs().max() > 1e-5
