"""In how many tiles the MLP runs by default, and where tiles are refused."""

from __future__ import annotations

import pytest

from ldft.errors import CombinationError, ConfigError
from ldft.preflight import mlp_tiles
from tests.conftest import compose


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("model.family=stablelm",), "the MLP of model.family=stablelm is not known"),
        (("checkpointing=none",), "only recomputed layers have tiles"),
        (("checkpointing.layers=1",), "only recomputed layers have tiles"),
        (("lora=r8", "lora.dropout=0.1"), "would draw other numbers"),
        (("offload=full", "offload.deepspeed={zero_optimization:{stage3_max_live_parameters:5}}"), "whole layers"),
        (("model.num_experts=4", "model.family=mixtral", "model.num_experts_per_token=2"), "experts compute"),
    ],
)
def test_where_tiles_are_not_possible_they_are_refused_and_never_chosen(overrides: tuple[str, ...], words: str) -> None:
    line = ("model=nano", "launch.device=cpu", "seq_len=64k", *overrides)
    assert mlp_tiles.choose(compose(*line)) == 1
    with pytest.raises(CombinationError, match=rf"^kernels\.mlp_tiles: 4: .*{words}.*; use 1, or leave it at null$"):
        mlp_tiles.choose(compose(*line, "kernels.mlp_tiles=4"))


def test_long_inputs_have_sixteen_by_default_and_a_number_of_none_is_refused() -> None:
    assert mlp_tiles.choose(compose("seq_len=64k")) == 16
    assert mlp_tiles.choose(compose("seq_len=32k", "train.micro_batch_size=2")) == 16
    assert mlp_tiles.choose(compose("seq_len=32k")) == 1
    for asked in (0, 32769):
        with pytest.raises(ConfigError, match=rf"^kernels\.mlp_tiles: {asked}: use 1 to 32768, "):
            mlp_tiles.choose(compose("seq_len=32k", f"kernels.mlp_tiles={asked}"))


def test_a_number_of_ones_own_is_taken() -> None:
    assert mlp_tiles.choose(compose("seq_len=64k", "kernels.mlp_tiles=1")) == 1
    assert mlp_tiles.choose(compose("seq_len=32k", "kernels.mlp_tiles=3")) == 3
    # One tile is the whole: it is possible even where several are not.
    assert mlp_tiles.choose(compose("checkpointing=none", "kernels.mlp_tiles=1")) == 1
    assert mlp_tiles.choose(compose("seq_len.tokens=2", "kernels.mlp_tiles=2")) == 2
    assert mlp_tiles.choose(compose("lora=r8", "kernels.mlp_tiles=2")) == 2


def test_an_output_that_is_not_normalized_is_skipped_in_recomputation() -> None:
    assert mlp_tiles.skips_in_recomputation(compose("model=nano"))
    assert not mlp_tiles.skips_in_recomputation(compose("model=nano", "model.family=gemma3_text"))
