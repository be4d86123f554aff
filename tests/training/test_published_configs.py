"""Published config.json of 25 models, typed as facts with their sources. What transformers builds from each has the published size.

A model of ldft is compared with these where both exist: what its option says is what was published.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ldft.preflight import parameter_counts
from tests.conftest import compose, options

PUBLISHED: dict[str, Any] = json.loads((Path(__file__).parent / "published_configs.json").read_text())
OF_OPTIONS = {name: compose(f"model={name}").model for name in options("model")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_transformers_builds_has_the_published_count(name: str) -> None:
    entry = PUBLISHED[name]
    assert entry["source"]
    kind = type(AutoConfig.for_model(entry["config"]["model_type"]))
    config = kind.from_dict(copy.deepcopy(entry["config"])).get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == entry["parameters"]


@pytest.mark.parametrize("option", [name for name, model in OF_OPTIONS.items() if model.hf_id in PUBLISHED])
def test_an_option_of_the_same_model_has_as_many(option: str) -> None:
    model = OF_OPTIONS[option]
    assert parameter_counts.num_parameters(model) == PUBLISHED[model.hf_id]["parameters"]
