"""Families without a formula: their parameters are those of the model that transformers builds, whatever the family.

Published config.json of such models are typed as facts with their sources.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from ldft.config import ModelConfig
from ldft.errors import ConfigError
from ldft.planning import iteration_time
from ldft.preflight import decoder_layers, device_estimate, families, host_estimate, parameter_counts, zero_buckets
from ldft.preflight.selection import select
from ldft.runner import checks
from ldft.training import config_json, hf_import, lora, model_option, verification
from ldft.training.architecture import hf_config
from tests.conftest import Done, compose

PUBLISHED: dict[str, Any] = json.loads((Path(__file__).parent / "published_other_families.json").read_text())
TINY = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": 512,
}
PHI_2 = 2 * 51200 * 2560 + 51200 + 2 * 2560  # outside its layers: untied, a bias of the output, a norm with a bias
PHI_2_LAYER = 4 * (2560**2 + 2560) + 2 * 2560 * 10240 + 10240 + 2560 + 2 * 2560


def write(folder: Path, name: str, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(PUBLISHED[name]["config"] | changes))
    return folder


def built(model: ModelConfig) -> PreTrainedModel:
    with torch.device("meta"), no_init_weights():
        network = AutoModelForCausalLM.from_config(hf_config(model), attn_implementation="eager")
    network.tie_weights()
    return network


def sizes(network: PreTrainedModel, *, trained: bool = False) -> Counter[int]:
    return Counter(one.numel() for one in network.parameters() if one.requires_grad or not trained)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_has_the_published_number(name: str, tmp_path: Path, here: Callable[..., Done]) -> None:
    entry, folder = PUBLISHED[name], write(tmp_path / "model", name)
    assert entry["source"] and entry["parameters_source"]
    model = hf_import.convert(config_json.read(str(folder), "")).model
    assert model.family not in decoder_layers.FAMILIES
    assert parameter_counts.num_parameters(model) == entry["parameters"]
    assert parameter_counts.parameter_sizes(model) == sizes(built(model))
    done = here("model=from_hf", f"model.path={folder}", "launch.device=cpu", "dry_run=true")
    assert f", {model.num_layers} layers, {entry['parameters']:,} parameters\n" in done.stdout and done.stderr == ""


def reduced(family: str) -> ModelConfig:
    """The family's default model at four layers. Raises ConfigError for a family that ldft refuses."""
    values = json.loads(CONFIG_MAPPING[family]().to_json_string(use_diff=False))
    del values["architectures"]
    model = hf_import.convert(config_json.ConfigJson("model.path", family, family, "", values)).model
    return replace(model, num_layers=4, extra=config_json.shortened(model.extra, model.num_layers, 4))


def test_every_parameter_and_adapter_of_every_family_is_counted() -> None:
    counted, wrong = [], []
    config = compose("lora=r8", "launch.device=cpu")
    # gemma4_assistant has no config without values.
    for family in sorted(families.causal() - decoder_layers.FAMILIES.keys() - {"gemma4_assistant"}):
        try:
            config.model = reduced(family)
            network = built(config.model)
        except ConfigError:
            continue
        counted.append(family)
        whole = parameter_counts.parameter_sizes(config.model) == sizes(network)
        lora.inject(network, config.lora)
        if not whole or parameter_counts.trained_sizes(config) != sizes(network, trained=True):
            wrong.append(family)
    assert wrong == [] and len(counted) >= 60


@pytest.mark.parametrize("family", ["gpt_neox_japanese", "ctrl", "xlm"])
def test_layers_that_cannot_be_recomputed_are_counted(family: str) -> None:
    model = ModelConfig(family=family, num_layers=3)
    assert parameter_counts.parameter_sizes(model) == sizes(built(model))
    assert decoder_layers.kinds(model).total() == 3 and parameter_counts.layer_parameters(model) > 10_000


def test_a_layer_is_read_in_the_order_in_which_it_computes() -> None:
    model = replace(reduced("deepseek_v3"), num_layers=5)
    dense, sparse = decoder_layers.kinds(model)
    assert decoder_layers.kinds(model) == {dense: 3, sparse: 2} and decoder_layers.largest(model) is sparse
    assert [*sparse.linears][: sparse.of_attention][-1] == "self_attn.o_proj"
    assert decoder_layers.last_product(model, dense) == "mlp.down_proj"
    square = compose("model=nano", "model.intermediate_size=64").model  # as wide as the residual stream
    assert decoder_layers.last_product(square, decoder_layers.largest(square)) == "down_proj"
    width = model.num_experts * model.expert_intermediate_size * model.hidden_size
    assert sparse.experts == (2 * width, width) and not dense.experts


def test_what_is_changed_on_the_command_line_is_counted(tmp_path: Path, here: Callable[..., Done]) -> None:
    folder = write(tmp_path / "model", "microsoft/phi-2")
    words = ("model=from_hf", f"model.path={folder}", "launch.device=cpu", "offload=full", "lora=none")
    for layers in (32, 4):
        config = compose(*words, f"model.num_layers={layers}", "train.precision=bf16", "checkpointing=gpu")
        checks.resolve(config)
        roles = host_estimate.host_bytes(select(config))
        assert roles["master_weights"] == 4 * (PHI_2 + layers * PHI_2_LAYER)
    source = config_json.read(str(folder), "")
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text(model_option.option(hf_import.convert(source).model, []))
    done = here(
        "--config-dir", str(tmp_path / "conf"), "model=mine", "model.num_layers=4", "launch.device=cpu", "dry_run=true"
    )
    assert f"phi, 4 layers, {PHI_2 + 4 * PHI_2_LAYER:,} parameters\n" in done.stdout


def test_estimates_follow_the_layers_that_are_built(tmp_path: Path) -> None:
    """No formula knows phi's MLP: two matrices, not three."""
    config = compose(
        "model=from_hf", f"model.path={write(tmp_path, 'microsoft/phi-2')}", "launch.device=cuda", "seq_len=2k"
    )
    checks.resolve(config)
    run = select(config)
    attention, mlp = 4 * 2560**2, 2 * 2560 * 10240
    assert iteration_time._products(config.model, decoder_layers.largest(config.model)) == attention + mlp
    moments = device_estimate.moments(run)
    # Whole layers are fetched, the current one and the next; only biases and norms stay on the device.
    assert moments["backward of the last layer"]["gathered weights"] >= 2 * (attention + mlp)
    assert moments["backward of the first layers"]["gathered weights"] >= 2 * 2 * (attention + mlp)
    assert moments["backward of the first layers"]["a layer's gradients"] == 2 * PHI_2_LAYER


def test_what_cannot_be_built_is_one_line(tmp_path: Path, here: Callable[..., Done]) -> None:
    folder = write(tmp_path / "model", "microsoft/phi-2")
    words = ("model=from_hf", f"model.path={folder}", "launch.device=cpu", "dry_run=true")
    done = here(*words, "model.extra.hidden_act=gelo")
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("ldft: model: transformers cannot build this phi (KeyError: ")
    done = here(*words, "lora=r8", "lora.target_modules=[fc1,down_proj]")
    assert done.stderr == (
        "ldft: lora.target_modules: 'down_proj' is not a linear layer of model; use q_proj, k_proj, v_proj, dense, fc1, fc2, "
        "lm_head\n"
    )


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("microsoft/phi-2", ("lora=r8",)),  # its MLP runs beside attention
        ("EleutherAI/pythia-1b", ("launch.num_ranks=2",)),
    ],
)
def test_a_run_trains_what_was_counted(
    name: str, more: tuple[str, ...], tmp_path: Path, ldft: Callable[..., Done]
) -> None:
    heads = {} if "num_key_value_heads" not in PUBLISHED[name]["config"] else {"num_key_value_heads": 4}
    share = {"partial_rotary_factor": 0.5} if "phi" in name else {}
    folder = write(tmp_path / "tiny", name, **TINY, **heads, **share)
    words = ("model=from_hf", f"model.path={folder}", "model.num_layers=2", "launch.device=cpu", *more)
    done = ldft(*words, base=("seq_len.tokens=64", "train.iterations=3", "train.warmup_iterations=1"))
    assert done.exit_code == 0, done.stderr
    config = compose(*words)
    checks.resolve(config)
    counted = parameter_counts.total(parameter_counts.trained_sizes(config))
    assert done.row["trainable_parameters"] == counted
    assert done.row["parameters"] == parameter_counts.num_parameters(config.model) + (
        counted if config.lora.rank else 0
    )
    # Layers are fetched whole: each name is one module's.
    modules = [module for module, _ in verification.outline(hf_config(config.model), config.model).named_modules()]
    leaves = zero_buckets.leaf_modules(config)["name_suffixes"]
    assert len(leaves) == (1 if config.lora.rank else 2)
    assert all(sum(module.endswith(leaf) for module in modules) == 1 for leaf in leaves)
    of_all_ranks = json.loads(done.row["predicted_host_json"])["master_weights"] * config.launch.num_ranks
    assert of_all_ranks == pytest.approx(4 * counted / 2**30, rel=0.01)
