"""What is known of transformers' families without importing it is what transformers itself says."""

from __future__ import annotations

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ldft.config import ModelConfig
from ldft.errors import ConfigError
from ldft.preflight import families, liger, parameter_counts
from ldft.training import model


def test_the_names_are_transformers_own() -> None:
    assert families.causal() == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.parametrize("family", sorted({*parameter_counts.FAMILIES, *liger.FAMILIES}))
def test_a_width_is_refused_where_transformers_does(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = ModelConfig(family=family, hidden_size=66, num_attention_heads=4)
    monkeypatch.setattr(families, "check", lambda model, known: None)
    if family not in families.WHOLE_HEADS:
        assert model.hf_config(odd).hidden_size == 66
        return
    with pytest.raises(ConfigError, match="not a multiple of the number of attention"):
        model.hf_config(odd)
