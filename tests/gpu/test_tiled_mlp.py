"""The MLP in tiles on a GPU: gradients as exact as without, beside Liger's kernels; memory as estimated; as fast."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from ldft.preflight import mlp_tiles
from ldft.preflight.selection import select
from ldft.training import data, model, tiled_mlp
from ldft.training.checkpointing import checkpointing
from tests.conftest import Done, compose

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
CUDA = torch.device("cuda")
LONG = ("model=llama3_1b", "model.num_layers=4", "seq_len=64k", "train.iterations=4", "train.warmup_iterations=1",
        "train.precision=bf16", "launch.device=cuda", "offload=full", "offload.gpu_share=0", "checkpointing=cpu")  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gemma", "phi3"])
def test_gradients_of_16_bits_are_as_exact_as_without_tiles(family: str) -> None:
    def gradients(*overrides: str, tiles: int = 1) -> dict[str, torch.Tensor]:
        config = compose(
            *("model=nano", f"model.family={family}", "model.hidden_size=256", "model.intermediate_size=1024"),
            *("seq_len.tokens=3001", "offload=none", "checkpointing=gpu", "launch.device=cuda", *overrides),
        )
        network = model.build(select(config), CUDA)
        checkpointing.install(config, network, CUDA, pin=True)
        if tiles > 1:
            assert tiled_mlp.install(network, tiles, skips=mlp_tiles.skips_in_recomputation(config)) == 2
        tokens = data.batch(config, 0, 0, 0).to(CUDA)
        network(input_ids=tokens, labels=tokens).loss.backward()
        return {name: p.grad.double() for name, p in network.named_parameters() if ".mlp." in name}

    exact = gradients("train.precision=fp32", "kernels.liger=false")

    def errors(found: dict[str, torch.Tensor]) -> dict[str, float]:
        return {name: float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact}

    whole = errors(gradients("train.precision=bf16", "kernels.liger=true"))
    for name, error in errors(gradients("train.precision=bf16", "kernels.liger=true", tiles=16)).items():
        assert error < 1.5 * whole[name], (name, error, whole[name])


def test_memory_is_as_estimated_and_time_as_without(ldft: Callable[..., Done]) -> None:
    whole, tiles = [
        ldft(f"kernels.mlp_tiles={tiles}", base=LONG).rows.set_index("mlp_tiles").loc[tiles] for tiles in (1, 16)
    ]
    for row in (whole, tiles):
        assert row.status == "ok", row.error_message
        assert row.predicted_vram_gib == pytest.approx(row.peak_vram_allocated_gib[0], rel=0.09), row.name
    assert tiles.peak_vram_allocated_gib[0] < 0.75 * whole.peak_vram_allocated_gib[0]
    assert list(tiles.loss) == pytest.approx(list(whole.loss), rel=5e-3)
    if os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") != "1":
        pytest.skip("all but the time is right; other tests share the GPU, so run it with -n 0 to compare that, too")
    assert min(tiles.iteration_s[1:]) < 1.05 * min(whole.iteration_s[1:])


def test_inputs_that_stay_on_the_device_are_in_its_estimate(ldft: Callable[..., Done]) -> None:
    few, all_of_them = (
        ldft(f"checkpointing.device_inputs={count}", base=LONG).rows.set_index("device_inputs").loc[count]
        for count in (1, 4)
    )
    assert (few.checkpoint_host_gib, all_of_them.checkpoint_host_gib) == (3 * 0.25, 0.0)
    for row in (few, all_of_them):
        assert row.predicted_vram_gib == pytest.approx(row.peak_vram_allocated_gib[0], rel=0.09), row.name
    # Where an input waits changes no bit of it; but attention and the embedding add up their gradients in varying order.
    assert all_of_them.loss[0] == few.loss[0]
    assert list(all_of_them.loss) == pytest.approx(list(few.loss), rel=1e-3)
