"""What is known of transformers' families without importing it is what transformers itself says."""

from __future__ import annotations

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ldft.config import ModelConfig
from ldft.errors import ConfigError
from ldft.preflight import decoder_layers, families, liger
from ldft.training.architecture import hf_config
from tests.preflight.test_parameter_counts import MIXTURES


def test_the_names_are_transformers_own() -> None:
    assert families.causal() == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.parametrize("family", sorted({*decoder_layers.FAMILIES, *liger.FAMILIES}))
def test_a_width_is_refused_where_transformers_does(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = ModelConfig(family=family, hidden_size=66, num_attention_heads=4)
    if family in MIXTURES:
        odd.num_experts, odd.num_experts_per_token = 4, 2
    monkeypatch.setattr(families, "check", lambda model, known: None)
    if family not in families.WHOLE_HEADS:
        assert hf_config(odd).hidden_size == 66
        return
    with pytest.raises(ConfigError, match="not a multiple of the number of attention"):
        hf_config(odd)
