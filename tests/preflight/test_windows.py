"""Windows that would not arrive are refused by the parent, with the line of the ranks, before transformers is imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ldft.errors import ConfigError
from ldft.preflight import families, windows
from ldft.training.architecture import hf_config, reads
from tests.conftest import Done
from tests.training.test_the_model_that_runs import config_of, verified

FAMILIES = sorted(windows._RULES)


# What the configs of some families cannot be without.
NEEDED: dict[str, dict[str, Any]] = {
    "gemma3n_text": {"logit_softcap": 30.0},
    "mimo_v2_flash": {"head_dim": 192},
    "vaultgemma": {"logit_softcap": 30.0, "attention_softcap": 50.0},
}


@pytest.mark.parametrize("length", [0, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_rule_of_a_family_is_that_of_transformers(family: str, length: int) -> None:
    keys: dict[str, list[Any]] = {
        "max_window_layers": [0, 3, 28, 29],
        "global_attn_every_n_layers": [3],
        "sliding_window_pattern": [2, 7],
        "no_rope_layer_interval": [3],
        "no_rope_layers": [[1, 0] * 15],
    }
    extras = [{}, *({key: value} for key, found in keys.items() if reads(family, key) for value in found)]
    for extra in extras:
        model = config_of(family, sliding_window=length, num_layers=30, extra=extra, **NEEDED.get(family, {})).model
        ours = windows._kinds(model, switched="use_sliding_window" in families.config_keys(family))
        assert ours is not None
        try:
            built = hf_config(model).layer_types
        except ConfigError:
            assert length == 0, "with a window it can be built"
            continue  # transformers refuses this family without one
        assert [kind == windows.WINDOWED for kind in ours] == [kind == windows.WINDOWED for kind in built], extra


# Families of each rule; the others would only repeat them, and each takes seconds.
USUAL = ("qwen2", "qwen2_moe", "smollm3", "gemma2", "gemma3_text", "gpt_oss", "olmo3", "granite_swa")
FULL, SLIDING = "full_attention", windows.WINDOWED
CASES: list[tuple[str, dict[str, Any]]] = [
    (family, {"sliding_window": length, "extra": extra})
    for family in (*USUAL, "qwen3_moe", "mistral", "llama", "phi3", "granite")
    for length in (0, 8)
    for extra in (
        {},
        {"use_sliding_window": True},
        {"use_sliding_window": False},
        {"max_window_layers": 1},
        {"layer_types": [FULL, FULL]},
        {"layer_types": [SLIDING, FULL]},
        {"layer_types": [FULL]},
    )
    if all(reads(family, key) for key in extra)
]


@pytest.mark.parametrize(("family", "values"), CASES, ids=lambda value: str(value))
def test_the_parent_refuses_what_the_ranks_refuse(family: str, values: dict[str, Any]) -> None:
    said = []
    for refuses in (lambda config: windows.check(config.model), verified):
        try:
            refuses(config_of(family, **values))
            said.append("")
        except ConfigError as error:
            said.append(str(error))
    by_parent, by_ranks = said
    if len(values["extra"].get("layer_types", (0, 0))) != 2:  # here the line of the ranks is transformers'
        assert by_parent == "model.extra.layer_types: 1 types for 2 layers; give a list with one for each layer"
        assert "must be equal to the number of `layer_types`" in by_ranks
    else:
        assert by_parent == by_ranks


@pytest.mark.parametrize("key", ["attention_softcap", "logit_softcap"])
def test_soft_caps_that_a_family_does_not_read_are_refused(key: str) -> None:
    model = config_of("qwen3", **{key: 5.0}).model
    with pytest.raises(ConfigError, match=f"^model.{key}: 5: transformers' qwen3 does not support it; use 0$"):
        windows.check(model)
    windows.check(config_of("gemma2", sliding_window=8, **{key: 5.0}).model)


def test_a_dry_run_refuses_a_window_that_no_layer_has(ldft: Callable[..., Done]) -> None:
    done = ldft("model=qwen2_5_7b", "model.sliding_window=4096", "launch.device=cpu", "dry_run=true")
    assert done.exit_code == 2
    assert done.stderr == (
        "ldft: model.sliding_window: 4096 reaches no layer of transformers' qwen2 with 28 layers: the first layers have none; set "
        "model.extra.max_window_layers to their number, 0 for a window in all\n"
    )
