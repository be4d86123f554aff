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
INSIDE = 2 * T * (H + W)
FORWARD = 2 * T * (3 * H + 3 * W)
MATRICES = (H * Q, H * K, H * K, Q * H, H * W, H * W, W * H)  # of a layer, in the model's order
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
    two = {"layer inputs": 2 * INPUT}
    assert moments(*line, "checkpointing=gpu") == start | {
        "forward of the last layers": state | {"layer inputs": 16 * INPUT, "inside a layer": FORWARD},
        "loss": state | {"layer inputs": 16 * INPUT, LOGITS: 2 * (2 + 4) * T * V},
        "backward of the last layer": state | {"layer inputs": 16 * INPUT, GRADIENT: 2 * EMBEDDING} | inside,
        "backward of the first layers": state | two | {"gradients": gradients} | inside,
        "step": state | {"gradients": gradients, "fp32 gradients": fp32},
        "largest gradient": state,
    }


def test_with_the_optimizer_on_the_host() -> None:
    found = moments("offload=optimizer", "checkpointing=cpu", "kernels.liger=true")
    state = {"weights": 2 * ALL, "reduce bucket": 10**9, "gradients": 2 * EMBEDDING}
    # The input in use and the one on its way.
    assert found["loss"] == state | {"layer inputs": 2 * INPUT} | CHUNK
    assert found["step"] == state
    assert found["largest gradient"] == state | {"norm of the gradient": 8 * EMBEDDING}
    assert found["backward of the first layers"] == state | {
        "layer inputs": 2 * INPUT,
        "inside a layer": INSIDE + KEPT,
    }
    two = moments("offload=optimizer", "launch.num_ranks=8")["largest gradient"]
    assert two["norm of the gradient"] == 8 * -(-ALL // 8)  # this rank's part of it


@pytest.mark.parametrize("fused", [True, False], ids=["ldft's update", "DeepSpeed's"])
def test_with_everything_on_the_host(fused: bool) -> None:
    """Two ranks; ten layers are recomputed, two at a time, and six keep all."""
    found = moments(
        "offload=full", "checkpointing=gpu", "launch.num_ranks=2", "checkpointing.layers=10", "checkpointing.every=2",
        "kernels.liger=true", f"optimizer.fused_step={str(fused).lower()}",
    )  # fmt: skip
    waiting = {"layer inputs": (5 + 6) * INPUT, "activations": 6 * KEPT}
    bucket = {"reduce bucket": 2 * LAYER}
    tied = {GRADIENT: 2 * EMBEDDING}
    # The tied embedding stays, which leaves no room for other weights than those of the layer under way. What arrives in a block
    # is copied out of it before the layer begins.
    weights = {"gathered weights": 2 * (EMBEDDING + sum(MATRICES))}
    # The end of a layer needs most at so few tokens: all its gradients, and one flat copy of them. With DeepSpeed's own step, the
    # share and a copy that is read back, and the norm's in fp64.
    leaving = {"gradient": 2 * LAYER} if fused else {"gradient": 2 * 2 * LAYER, "norm of the gradient": 8 * LAYER // 2}
    of_layer = {"a layer's gradients": 2 * LAYER} | leaving
    last, pair = ({"inside a layer": 2 * INPUT + more} | of_layer for more in (0, KEPT + INPUT))
    largest = {"gradient": 2 * EMBEDDING} | tied
    if not fused:
        largest = {"gradient": 2 * EMBEDDING * 3 // 2, "norm of the gradient": 8 * EMBEDDING // 2}
    assert found == {
        "forward of the last layers": waiting | weights,
        "loss": waiting | {"gathered weights": 2 * EMBEDDING} | CHUNK,
        "backward of the last layer": bucket | waiting | weights | last | tied,
        "backward of the first layers": bucket | {"layer inputs": 2 * INPUT} | weights | pair | tied,
        "step": bucket,
        "largest gradient": bucket | {"gathered weights": 2 * EMBEDDING} | largest,
        "backward of the last checkpointed layer": bucket | {"layer inputs": 5 * INPUT} | weights | pair,
    }  # fmt: skip


def test_gradients_of_a_layer_pile_up_as_its_backward_pass_goes_on() -> None:
    """Fetched as a whole, it lets them go together at its end."""

    def beside(tokens: int, *more: str) -> Parts:
        line = (*LINE, f"seq_len.tokens={tokens}", "offload=full", "checkpointing=gpu", *more)
        found = device_estimate.moments(select(compose(*line)))["backward of the first layers"]
        return {name: found[name] for name in ("inside a layer", "a layer's gradients") if name in found}

    many = 64 * T
    in_mlp = 2 * many * (4 * H + 2 * Q + 2 * K + 4 * W)
    assert beside(many, "kernels.mlp_tiles=1") == {"inside a layer": in_mlp, "a layer's gradients": 2 * H * W}
    # In tiles, the MLP has sums of its own; then attention needs most, beside the gradients of all that follows it.
    in_attention = 2 * many * (3 * H + 4 * Q + 4 * K) + 4 * many * Q + 2 * 2 * many * Q
    behind = 2 * (3 * H * W + Q * H)
    assert beside(many, "kernels.mlp_tiles=64") == {"inside a layer": in_attention, "a layer's gradients": behind}
    assert beside(T)["a layer's gradients"] == 2 * LAYER
    assert "a layer's gradients" not in beside(T, "lora=r8")


def test_the_norm_takes_at_most_250_million_elements_at_a_time() -> None:
    found = moments("offload=full", "optimizer.fused_step=false")["largest gradient"]
    assert EMBEDDING > 250_000_000 and found["norm of the gradient"] == 8 * 250_000_000
    assert found["gradient"] == 2 * 2 * EMBEDDING


def test_kept_attention_outputs() -> None:
    output = 2 * T * Q + 4 * 32 * T
    of_all = moments("offload=full", "checkpointing=gpu", "checkpointing.keep_attention=device")
    assert of_all["loss"]["attention outputs"] == 16 * output
    assert (
        of_all["backward of the last layer"]["attention outputs"] == 15 * output
    )  # the last one's counts as inside it
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
    inside = {name: found[f"backward of the {name}"]["inside a layer"] for name in ("first layers", "last layer")}
    assert inside == {"first layers": first, "last layer": last}


def test_an_mlp_in_tiles_has_the_arrays_of_one() -> None:
    """2048 tokens in three tiles: 683 in the largest; the weights' gradients in fp32 and, rounded, in bf16."""
    line = ("offload=full", "checkpointing=gpu", "train.micro_batch_size=2")
    attention = 2 * 2 * T * H + 2 * 2 * T * (3 * H + 2 * Q + 2 * K)
    tile = 2 * 683 * (8 * W + 2 * H)
    first = "backward of the first layers"
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


def test_a_bucket_too_small_for_a_layer_leaves_gradients_beside_it() -> None:
    def beside(elements: int, *more: str) -> Parts:
        size = f"offload.deepspeed.zero_optimization.reduce_bucket_size={elements}"
        found = moments(size, *more)["backward of the first layers"]
        return {name: found[name] for name in ("a layer's gradients", "gradient") if name in found}

    assert beside(LAYER - 1, "offload=optimizer") == {"a layer's gradients": 2 * LAYER}
    assert beside(LAYER, "offload=optimizer") == beside(LAYER - 1, "offload=optimizer", "lora=r8") == {}
    # Under ZeRO-3 each leaves by itself.
    assert beside(1, "offload=full") == {"gradient": 2 * H * W}


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
