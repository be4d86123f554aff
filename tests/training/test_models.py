"""Every model of conf/model: its published architecture at full depth, and training at a reduced one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from ldft.config import Config, Device, ModelConfig, OffloadDevice, Precision, SeqLenConfig
from ldft.preflight import parameter_counts
from ldft.preflight.selection import select
from ldft.training import data, flops, model
from ldft.training.architecture import hf_config
from tests.conftest import compose, hub_ids, models

# Counts and config.json values as published on the hub, written down apart from conf/.
PUBLISHED = json.loads((Path(__file__).parents[1] / "config" / "published.json").read_text())
OURS = {"tiny": 4_000_000, "nano": 1_122_624}
# Options that test_published_configs.py compares with the whole published file.
FILES = json.loads((Path(__file__).parent / "published_configs.json").read_text())
FROM_FILES = [name for name, hf_id in hub_ids().items() if hf_id in FILES]


def meta_count(config) -> int:
    with torch.device("meta"), no_init_weights():
        built = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        built.tie_weights()
        return sum(parameter.numel() for parameter in built.parameters())


def test_every_model_is_known_here() -> None:
    assert set(models()) == {*PUBLISHED, *OURS, *FROM_FILES}


@pytest.mark.parametrize("name", [*PUBLISHED, *OURS])
def test_full_depth_has_the_published_count_and_architecture(name: str) -> None:
    config = compose(f"model={name}").model
    built = hf_config(config)
    count = meta_count(built)
    if name in OURS:
        assert count == OURS[name]
    else:
        published = dict(PUBLISHED[name])
        assert count == published.pop("parameters")
        independent = AutoConfig.for_model(published.pop("model_type"), **published)
        assert count == meta_count(independent)
        for key, value in published.items():
            assert getattr(built, key) == value, key
    assert parameter_counts.num_parameters(config) == count


def reduced(published: ModelConfig) -> ModelConfig:
    """The same family, ratios and switches, small enough for two cores."""
    ratio = published.num_attention_heads // published.num_key_value_heads
    published.num_layers, published.num_key_value_heads, published.num_attention_heads = 2, 2, 2 * ratio
    published.head_dim, published.hidden_size, published.intermediate_size = 16, 2 * ratio * 16, 64 * ratio
    published.vocab_size = 256
    published.sliding_window = min(published.sliding_window, 16)
    if published.num_experts:
        published.num_experts, published.num_experts_per_token = 4, 2
        published.expert_intermediate_size = min(published.expert_intermediate_size, 32)
    for name in {"short_factor", "long_factor"} & published.rope_scaling.keys():  # one number for a pair of dimensions
        published.rope_scaling[name] = published.rope_scaling[name][
            : int(8 * published.rope_scaling["partial_rotary_factor"])
        ]
    return published


@pytest.mark.parametrize("name", models())
def test_trains_at_reduced_depth(name: str) -> None:
    config = Config(model=reduced(compose(f"model={name}").model), seq_len=SeqLenConfig(tokens=48))
    config.launch.device, config.train.precision = Device.cpu, Precision.fp32  # the fast one, at this size
    config.offload.stage = 0
    config.offload.parameters = config.offload.optimizer = OffloadDevice.none
    network = model.build(select(config), torch.device("cpu"))
    assert parameter_counts.num_parameters(config.model) == model.num_parameters(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    tokens = data.batch(config, 0, 0, 0)
    losses = []
    for _ in range(3):
        loss = network(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05, losses


@pytest.mark.parametrize(
    ("name", "windowed"), [("gemma2_9b", 1), ("mistral_nemo_12b", 2), ("llama3_1b", 0), ("qwen2_5_0_5b", 0)]
)
def test_attention_flops_count_what_a_window_lets_a_token_see(name: str, windowed: int) -> None:
    tokens, window = 40, 7
    config = Config(model=reduced(compose(f"model={name}").model), seq_len=SeqLenConfig(tokens=tokens))
    config.train.precision = Precision.fp32
    config.launch.device, config.offload.stage = Device.cpu, 0
    config.model.num_layers = 2
    config.model.sliding_window = window if windowed else 0
    network = model.build(select(config), torch.device("cpu"))
    counted = flops.model_tflop(network, config.model, tokens, tokens)[1] * 1e12
    # Pairs of a token and one that it sees, itself counted as half, as the causal half of a square has it.
    whole = sum(t + 0.5 for t in range(tokens))
    seen = sum(min(t, window - 0.5) + 0.5 for t in range(tokens))
    pairs = (2 - windowed) * whole + windowed * seen
    assert counted == pytest.approx(
        12 * pairs * config.model.num_attention_heads * config.model.head_dim, rel=0.02 if windowed else 1e-9
    )


def test_window_and_soft_caps_change_what_gemma_computes() -> None:
    def logits(**changes: float) -> torch.Tensor:
        config = Config(model=reduced(compose("model=gemma2_9b").model), seq_len=SeqLenConfig(tokens=48))
        config.train.precision = Precision.bf16
        config.launch.device, config.offload.stage = Device.cpu, 0
        for key, value in changes.items():
            setattr(config.model, key, value)
        network = model.build(select(config), torch.device("cpu")).eval()
        # Random weights give small scores, which no cap would touch.
        with torch.no_grad():
            for layer in network.model.layers:
                layer.self_attn.q_proj.weight.mul_(200)
                layer.self_attn.k_proj.weight.mul_(200)
            return network(input_ids=data.batch(config, 0, 0, 0)).logits.float()

    published = logits()
    assert published.abs().max() <= 30
    for changes in ({"sliding_window": 4}, {"attention_softcap": 1.0}, {"logit_softcap": 0.001}):
        assert not torch.allclose(published, logits(**changes), atol=1e-3), changes
