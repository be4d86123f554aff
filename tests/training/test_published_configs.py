"""Published config.json of 25 models, typed as facts with their sources, and what ldft makes of each: the same model.

transformers, from the file, is the reference: its parameters are the published ones, and what ldft reads from the file and then
builds has the same parameters, rotary embedding, windows, caps and ties. An option of ldft's is compared where there is one.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ldft.preflight import parameter_counts
from ldft.training import config_json, hf_import
from ldft.training.architecture import hf_config
from tests.conftest import compose, hub_ids

PUBLISHED: dict[str, Any] = json.loads((Path(__file__).parent / "published_configs.json").read_text())
LENGTHS = (1000, 10_000, 100_000)
"""Tokens: below and above the lengths at which scaled rotary embeddings change."""


def published(name: str) -> dict[str, Any]:
    """The values of a file. Without quantization_config, which concerns the weights alone, and which ldft refuses."""
    values = copy.deepcopy(PUBLISHED[name]["config"])
    values.pop("quantization_config", None)
    return values


def built(config: PretrainedConfig) -> PreTrainedModel:
    """The model on the meta device."""
    with torch.device("meta"), no_init_weights():
        network = AutoModelForCausalLM.from_config(config)
    network.tie_weights()
    return network


def rotations(network: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Cosines and sines of a few positions in sequences of each length, for each layer type that has its own."""
    for length in LENGTHS:
        rotary = type(network.base_model.rotary_emb)(
            config=network.config
        )  # with values: those of the model are on meta
        by_type = "layer_type" in inspect.signature(rotary.forward).parameters
        positions = torch.tensor([[1, 17, 500, length - 1]])
        for kind in sorted(set(network.config.layer_types)) if by_type else [None]:
            beside = {"layer_type": kind} if kind else {}
            for name, part in zip(("cos", "sin"), rotary(torch.zeros(1), positions, **beside), strict=True):
                yield f"{name} {length} {kind}", part


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_gives_the_published_model(name: str, tmp_path: Path) -> None:
    entry, values = PUBLISHED[name], published(name)
    assert entry["source"]
    kind = type(AutoConfig.for_model(values["model_type"]))
    reference = built(kind.from_dict(copy.deepcopy(values)).get_text_config())
    assert sum(parameter.numel() for parameter in reference.parameters()) == entry["parameters"]

    (tmp_path / "config.json").write_text(json.dumps(values))
    imported = hf_import.convert(config_json.read(str(tmp_path), ""))
    imported.model.validate()
    network = built(hf_config(imported.model))
    shapes = {key: parameter.shape for key, parameter in network.named_parameters()}
    assert shapes == {key: parameter.shape for key, parameter in reference.named_parameters()}
    for (label, ours), (_, theirs) in zip(rotations(network), rotations(reference), strict=True):
        assert torch.equal(ours, theirs), label
    for ours, theirs in zip(network.base_model.layers, reference.base_model.layers, strict=True):
        for key in (
            "sliding_window",
            "layer_type",
            "attn_logit_softcapping",
            "scaling",
            "use_rope",
            "attention_dropout",
        ):
            assert getattr(ours.self_attn, key, None) == getattr(theirs.self_attn, key, None), key
        assert str(ours) == str(theirs)  # modules, norms and activation functions
    for key in ("layer_types", "attn_logit_softcapping", "final_logit_softcapping", "no_rope_layers"):
        assert getattr(network.config, key, None) == getattr(reference.config, key, None), key
    tied = [one.lm_head.weight is one.base_model.embed_tokens.weight for one in (network, reference)]
    assert tied[0] == tied[1] == imported.model.tie_word_embeddings


@pytest.mark.parametrize("option", [name for name, hf_id in hub_ids().items() if hf_id in PUBLISHED])
def test_an_option_is_what_its_published_file_gives(option: str, tmp_path: Path) -> None:
    model = compose(f"model={option}").model
    (tmp_path / "config.json").write_text(json.dumps(published(model.hf_id)))
    imported = hf_import.convert(config_json.read(str(tmp_path), "")).model
    assert hf_config(model).to_dict() == hf_config(imported).to_dict()
    assert parameter_counts.num_parameters(model) == PUBLISHED[model.hf_id]["parameters"]
