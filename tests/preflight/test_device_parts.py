"""Every part of the estimate of device memory, to the byte, for Llama 3.2 1B: peaks within some percent cannot tell parts apart."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ldft.preflight import device_estimate, fit
from ldft.preflight.device_estimate import Parts
from ldft.preflight.resolved import resolve
from ldft.preflight.selection import select
from tests.conftest import compose

# Tokens, hidden size, MLP width, widths of queries and of keys, vocabulary.
T, H, W, Q, K, V = 1024, 2048, 8192, 2048, 512, 128256
LAYER = 2 * H * Q + 2 * H * K + 3 * H * W + 2 * H
EMBEDDING = V * H
ALL = EMBEDDING + 16 * LAYER + H  # the output projection is tied
LINE = ("model=llama3_1b", "seq_len=1k", "launch.device=cuda", "train.precision=bf16", "attention=sdpa")
# In bf16.
INPUT = 2 * T * H
KEPT = 2 * T * (3 * H + 2 * Q + 2 * K + 3 * W)
INSIDE = 2 * T * (2 * H + W)
LOGITS, GRADIENT = "logits", "output projection's gradient"
CHUNK = {GRADIENT: 2 * EMBEDDING, LOGITS: INPUT + 2 * 32 * V}  # Liger: 1024 tokens in 63 parts, so 17, and so 32


def moments(*more: str) -> dict[str, Parts]:
    return device_estimate.moments(select(compose(*LINE, *more)))


@pytest.mark.parametrize(
    ("stage", "ranks", "bucket", "optimizer", "gradients", "fp32"),
    [
        (0, 1, {}, 12 * ALL, 2 * ALL, 4 * ALL),
        (0, 2, {}, 12 * ALL, 2 * ALL, 4 * ALL),
        (1, 2, {}, 12 * ALL // 2, 2 * ALL, 4 * ALL // 2),
        (2, 2, {"reduce bucket": 10**9}, 12 * ALL // 2, 2 * ALL // 2, 4 * ALL // 2),
    ],
)
def test_without_offload(stage: int, ranks: int, bucket: Parts, optimizer: int, gradients: int, fp32: int) -> None:
    line = ("offload=none", f"offload.stage={stage}", f"launch.num_ranks={ranks}", "kernels.liger=false")
    state = {"weights": 2 * ALL, **bucket, "optimizer": optimizer}
    inside = {"inside a layer": INSIDE + KEPT}
    start = {"start": {"weights": 4 * ALL}} if stage else {}
    assert moments(*line, "checkpointing=gpu") == start | {
        "loss": state | {"layer inputs": 16 * INPUT, LOGITS: 2 * (2 + 4) * T * V},
        "backward of the last layer": state | {"layer inputs": 16 * INPUT, GRADIENT: 2 * EMBEDDING} | inside,
        "backward of the first layer": state | {"gradients": gradients} | inside,
        "step": state | {"gradients": gradients, "fp32 gradients": fp32},
        "largest gradient": state,
    }


def test_with_the_optimizer_on_the_host() -> None:
    found = moments("offload=optimizer", "checkpointing=cpu", "kernels.liger=true")
    state = {"weights": 2 * ALL, "reduce bucket": 10**9, "gradients": 2 * EMBEDDING}
    # The input in use and the one on its way.
    assert found["loss"] == state | {"layer inputs": 2 * INPUT} | CHUNK
    assert found["step"] == found["largest gradient"] == state
    assert found["backward of the first layer"] == state | {"inside a layer": INSIDE + KEPT}


@pytest.mark.parametrize(
    ("fused", "own", "norm"), [("true", 0, 0), ("false", 1, 1)], ids=["ldft's update", "DeepSpeed's"]
)
def test_with_everything_on_the_host(fused: str, own: int, norm: int) -> None:
    """Two ranks; ten layers are recomputed, two at a time, and six keep all."""
    found = moments(
        "offload=full", "checkpointing=gpu", "launch.num_ranks=2", "checkpointing.layers=10", "checkpointing.every=2",
        "kernels.liger=true", f"optimizer.fused_step={fused}",
    )  # fmt: skip
    waiting = {"layer inputs": (5 + 6) * INPUT, "activations": 6 * KEPT}
    bucket, coming = {"reduce bucket": 2 * LAYER}, {"weights on their way": 2 * LAYER}
    two = coming | {"gathered weights": 2 * 2 * LAYER}
    pair = {"inside a layer": INSIDE + 2 * KEPT + INPUT}

    def leaving(size: int) -> Parts:
        # DeepSpeed's own step needs the reduced share, a copy that is read back, and the norm's in fp64.
        return {"gradient": 2 * size * (1 + own)} | ({"norm of the gradient": 8 * size // 2} if norm else {})

    assert found == {
        "loss": bucket | waiting | coming | {"gathered weights": 2 * (EMBEDDING + LAYER)} | CHUNK,
        "backward of the last layer": bucket | waiting | two | {"inside a layer": INSIDE} | leaving(H * W)
        | {GRADIENT: 2 * EMBEDDING},
        "backward of the first layer": bucket | two | pair | leaving(H * W),
        "step": bucket,
        "largest gradient": bucket | leaving(EMBEDDING),
        "backward of the last checkpointed layer": bucket | {"layer inputs": 5 * INPUT} | two | pair | leaving(H * W),
    }  # fmt: skip


def test_the_norm_takes_at_most_250_million_elements_at_a_time() -> None:
    found = moments("offload=full", "optimizer.fused_step=false")["largest gradient"]
    assert EMBEDDING > 250_000_000 and found["norm of the gradient"] == 8 * 250_000_000
    assert found["gradient"] == 2 * 3 * EMBEDDING


def test_kept_attention_outputs() -> None:
    output = 2 * T * Q + 4 * 32 * T
    of_all = moments("offload=full", "checkpointing=gpu", "checkpointing.keep_attention=device")
    assert of_all["loss"]["attention outputs"] == 16 * output
    on_host = ("offload=full", "checkpointing=cpu", "checkpointing.every=3", "checkpointing.keep_attention=host")
    found = moments(*on_host)["loss"]
    assert (found["attention outputs"], found["layer inputs"]) == (3 * output, 2 * INPUT)
    run = select(compose(*LINE, *on_host))
    for stay, there in ((1, 2), (4, 4), (9, 6)):  # of six groups
        found = device_estimate.moments(replace(run, device_inputs=stay))["loss"]
        assert found["layer inputs"] == there * INPUT


@pytest.mark.parametrize(("recomputed", "first", "last"), [(0, INSIDE, INSIDE), (8, INSIDE + KEPT, INSIDE)])
def test_a_layer_in_its_backward_pass_adds_what_it_did_not_keep(recomputed: int, first: int, last: int) -> None:
    """The first layers are recomputed, if any."""
    mode = ("checkpointing=gpu", f"checkpointing.layers={recomputed}") if recomputed else ("checkpointing=none",)
    found = moments("offload=none", *mode)
    inside = {name: found[f"backward of the {name} layer"]["inside a layer"] for name in ("first", "last")}
    assert inside == {"first": first, "last": last}


def test_an_mlp_in_tiles_has_the_arrays_of_one() -> None:
    """2048 tokens in three tiles: 683 in the largest; the weights' gradients in fp32 and, rounded, in bf16."""
    line = ("offload=full", "checkpointing=gpu", "train.micro_batch_size=2")
    attention = 2 * 2 * T * (2 * H) + 2 * 2 * T * (3 * H + 2 * Q + 2 * K)
    tile = 2 * 683 * (8 * W + 2 * H)
    first = "backward of the first layer"
    assert moments(*line, "kernels.mlp_tiles=3")[first]["inside a layer"] == attention + tile + 6 * 3 * H * W
    assert moments(*line, "kernels.mlp_tiles=3", "lora=r8")[first]["inside a layer"] == attention + tile
    two = moments(*line, "kernels.mlp_tiles=2", "lora=r8")[first]["inside a layer"]
    assert two == attention + 2 * T * (8 * W + 2 * H)
    # With a tile of one token, attention's backward pass is larger: the queries' gradient in fp32, and those of keys and values for
    # each query's head.
    many = moments(*line, "kernels.mlp_tiles=2048", "lora=r8")[first]["inside a layer"]
    assert many == 2 * T * (2 * (3 * H + 4 * Q + 4 * K) + 4 * Q + 2 * 2 * Q)


def test_a_chunk_of_the_logits_is_a_power_of_two() -> None:
    assert moments("offload=full", "kernels.liger=true", "train.micro_batch_size=2")["loss"][LOGITS] == (
        2 * INPUT + 2 * 64 * V
    )
    adapters = moments("offload=full", "kernels.liger=true", "lora=r8")
    assert adapters["loss"][GRADIENT] == 0 and GRADIENT not in adapters["backward of the last layer"]
    # Never more tokens than there are.
    few = device_estimate.moments(select(compose(*LINE, "seq_len.tokens=1", "offload=full", "kernels.liger=true")))
    assert few["loss"][LOGITS] == 2 * H + 2 * V


def test_a_bucket_too_small_for_a_layer_leaves_its_gradients_beside_it() -> None:
    def beside(elements: int, *more: str) -> int:
        size = f"offload.deepspeed.zero_optimization.reduce_bucket_size={elements}"
        return moments("offload=full", size, *more)["backward of the first layer"].get("a layer's gradients", 0)

    assert beside(LAYER - 1) == 2 * LAYER
    assert beside(LAYER) == beside(LAYER - 1, "lora=r8") == 0


def test_weights_that_are_reused_soon_stay() -> None:
    def gathered(distance: int) -> int:
        zero = f"{{stage3_max_reuse_distance:{distance},stage3_max_live_parameters:0}}"
        found = moments("offload=full", f"offload.deepspeed.zero_optimization={zero}")
        return found["backward of the last layer"]["gathered weights"]

    assert gathered(EMBEDDING) == 2 * (LAYER + EMBEDDING) and gathered(EMBEDDING - 1) == 2 * LAYER


def test_one_rank_with_its_weights_on_the_device_gathers_none() -> None:
    assert "gathered weights" not in moments("offload=zero3")["loss"]
    two = moments("offload=zero3", "launch.num_ranks=2")["loss"]
    assert two["gathered weights"] >= 2 * (EMBEDDING + LAYER) and two["weights on their way"] == 2 * LAYER
    assert two["weights"] == 2 * ALL // 2


def test_a_shard_without_offload_has_its_gradients_in_both_precisions() -> None:
    """They are kept in bf16 and, for all parameters at once, in fp32: the step adds none."""
    found = moments("offload=zero3", "launch.num_ranks=2")["step"]
    assert set(found) == {"weights", "reduce bucket", "optimizer", "gradients"}
    assert (found["optimizer"], found["gradients"]) == (12 * ALL // 2, (2 + 4) * ALL // 2)


def test_the_share_of_the_gpu_has_weights_gradients_and_states() -> None:
    run = select(compose(*LINE, "offload=full"))
    from dataclasses import replace

    assert device_estimate.share_bytes(replace(run, gpu_share=1000)) == 1000 * (12 + 2 + 2)
    assert device_estimate.moments(replace(run, gpu_share=1000))["step"]["share of the optimizer"] == 16_000


def test_a_gpu_needs_a_twentieth_more_and_cudas_context() -> None:
    line = ("model=llama3_1b", "seq_len=1k", "launch.device=cuda", "offload=none", "memory.capacity_gib=500")
    peak = sum(moments("offload=none")["step"].values())
    need_gib = 1.05 * peak / 2**30 + 0.7

    def examine(vram_gib: float) -> None:
        fit.examine(resolve(compose(*LINE, *line, f"memory.vram_gib={vram_gib}")))

    examine(need_gib + 0.001)
    with pytest.raises(fit.DoesNotFitError, match=rf"not enough VRAM: {need_gib:.1f} GiB expected, "):
        examine(need_gib - 0.001)
