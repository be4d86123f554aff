"""LoRA: adapters alone are trained, from a start that depends on names only, and train as plain PyTorch and peft would."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch

from ldft.config import Config, Device, from_dict, to_dict
from ldft.config.checkpointing import CheckpointingMode
from ldft.errors import ConfigError
from ldft.preflight import parameter_counts, zero_buckets
from ldft.preflight.selection import select
from ldft.training import data, flops, model
from ldft.training.checkpointing import checkpointing
from tests.conftest import Done, compose, long
from tests.training.test_equality import BASE, alone, relative_error, run_once  # noqa: F401

LORA = ("lora=r8", "train.precision=fp32", "model.vocab_size=512", "seq_len.tokens=64", "optimizer.learning_rate=5e-3")
CPU = torch.device("cpu")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config_of(*overrides: str) -> Config:
    config = compose(*BASE, *LORA, *overrides)
    config.launch.device = Device.cpu
    return config


def plain_peft(config: Config) -> list[float]:
    """Losses of a plain loop over a model that peft wraps its own way, from the same start; nothing of DeepSpeed."""
    config = from_dict(json.loads(json.dumps(to_dict(config))))
    config.offload.stage = 0
    start = {
        name: p.detach().clone() for name, p in model.build(select(config), CPU).named_parameters() if ".lora_" in name
    }
    config.lora.rank = 0
    settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules=PROJECTIONS)
    network = peft.get_peft_model(model.build(select(config), CPU), settings)
    network.load_state_dict({f"base_model.model.{name}": value for name, value in start.items()}, strict=False)
    trained = [p for p in network.parameters() if p.requires_grad]
    assert len(trained) == len(start)
    rates = config.optimizer
    optimizer = torch.optim.AdamW(
        trained,
        lr=rates.learning_rate,
        betas=(rates.betas[0], rates.betas[1]),
        eps=rates.eps,
        weight_decay=rates.weight_decay,
    )
    losses = []
    for iteration in range(config.train.iterations):
        tokens = data.batch(config, iteration, 0, 0)
        loss = network(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, rates.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def reference() -> list[float]:
    losses = plain_peft(config_of())
    assert losses[-1] < 0.95 * losses[0], "the loss must fall, else a missing update would not show"
    return losses


@pytest.mark.parametrize("offload", ["full", pytest.param("optimizer", marks=long), pytest.param("none", marks=long)])
def test_trains_adapters_alone_and_as_plain_peft(reference: list[float], tmp_path: Path, offload: str) -> None:
    config_json = json.dumps(to_dict(config_of(f"offload={offload}")))
    assert relative_error(alone(config_json, tmp_path / offload, "frozen"), reference) < 1e-5


def test_the_row_counts_what_is_trained(run_once, reference: list[float]) -> None:  # noqa: F811
    row = run_once(*LORA, "checkpointing=gpu")
    network = model.build(select(config_of("offload=none")), CPU)
    frozen = sum(p.numel() for p in network.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert parameter_counts.total(parameter_counts.trained_sizes(config_of())) == trained
    assert (row.parameters, row.trainable_parameters) == (frozen + trained, trained)
    assert trained == 2 * 8 * (2 * 64 + 2 * (64 + 32) + 2 * 64 + 3 * (64 + config_of().model.intermediate_size))
    assert relative_error(row.loss, reference) < 1e-5


@pytest.mark.parametrize("modules", ["down_proj", "o_proj"])
def test_the_first_layer_may_have_an_mlp_whose_input_needs_no_gradient(modules: str, ldft: Callable[..., Done]) -> None:
    """Under offload=full whole layers are fetched, in the first layer less: torch would reduce its gradients too early."""
    done = ldft("lora=r8", f"lora.target_modules=[{modules}]", "offload=full", "launch.device=cpu")
    assert done.exit_code == 0, done.stderr
    read, written = {"down_proj": (128, 64), "o_proj": (64, 64)}[modules]
    assert done.row["trainable_parameters"] == 2 * 8 * (read + written)
    found = zero_buckets.leaf_modules(compose("model=nano", "lora=r8", f"lora.target_modules=[{modules}]"))
    assert ("model.layers.0.mlp" in found["name_suffixes"]) == (modules == "o_proj")


def test_layers_may_be_recomputed_together_with_the_first(run_once, reference: list[float]) -> None:  # noqa: F811
    assert relative_error(run_once(*LORA, "offload=full", "checkpointing.every=2").loss, reference) < 1e-5
    found = zero_buckets.leaf_modules(
        compose("model=nano", "model.num_layers=4", "lora=r8", "checkpointing.every=2", "launch.device=cpu")
    )
    assert found["name_suffixes"] == ["model.layers.0.mlp", "model.layers.2", "model.layers.3"]


def test_a_frozen_weight_costs_four_flops_a_token_and_a_trained_one_six() -> None:
    def dense(*overrides: str) -> float:
        config = config_of("offload=none", *overrides)
        return flops.model_tflop(model.build(select(config), CPU), config.model, 1, 64)[0] * 1e12

    base = dense("lora=none")
    adapters = dense() - base * 4 / 6
    network = model.build(select(config_of("offload=none")), CPU)
    assert adapters == pytest.approx(6 * sum(p.numel() for p in network.parameters() if p.requires_grad))


@pytest.mark.parametrize("mode", list(CheckpointingMode))
def test_gradients_reach_the_adapters_with_every_checkpointing_mode(mode: CheckpointingMode) -> None:
    gradients = []
    for chosen in (CheckpointingMode.none, mode):
        config = config_of("offload=none", f"checkpointing={chosen.name}", "lora.dropout=0.3")
        network = model.build(select(config), CPU)
        checkpointing.install(config, network, CPU)
        tokens = data.batch(config, 0, 0, 0)
        torch.manual_seed(3)  # of the dropout
        network(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.requires_grad})
        assert all(p.grad is None for p in network.parameters() if not p.requires_grad)
        # A's gradient is B's multiple, and B starts at zero.
        assert all(bool(g.any()) == ("lora_B" in name) for name, g in gradients[-1].items())
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_base_weights_and_adapters_depend_on_seed_and_name_only() -> None:
    def build(*overrides: str) -> dict[str, torch.Tensor]:
        network = model.build(select(config_of("offload=none", *overrides)), CPU)
        return {name.replace(".base_layer", ""): p.detach() for name, p in network.named_parameters()}

    whole, few, none, other = build(), build("lora.target_modules=[v_proj]"), build("lora=none"), build("train.seed=1")
    assert all(torch.equal(whole[name], value) for named in (few, none) for name, value in named.items())
    assert {name.split(".")[4] for name in few if ".lora_" in name} == {"v_proj"}
    downs = [name for name in whole if "lora_A" in name]
    assert not any(torch.equal(whole[name], other[name]) for name in downs)
    assert len({float(whole[name].sum()) for name in downs}) == len(downs)
    assert not any(whole[name].any() for name in whole if "lora_B" in name)


def test_layers_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^lora.target_modules: \['wq'\]: .*not found"):
        model.build(select(config_of("offload=none", "lora.target_modules=[wq]")), CPU)
