"""How much of an offloaded model the GPU updates, and why."""

from __future__ import annotations

import dataclasses

import pytest

from ldft import environment
from ldft.config import Config
from ldft.errors import CombinationError, ConfigError
from ldft.preflight import device_estimate, device_inputs, gpu_share, host_estimate, parameter_counts, room
from ldft.preflight.selection import Selection, select
from tests.conftest import compose

THREE_B = ("model=llama3_3b", "launch.device=cuda", "attention=sdpa", "kernels.liger=true", "checkpointing=cpu")
MEASURED = "numa.bandwidth={node0:{cpu:140,h2d:54,d2h:54}}"
EMBEDDING, LAYER, ALL = 128256 * 3072, 3072 * (2 * 3072 + 2 * 1024 + 3 * 8192 + 2), 3_212_749_824


@pytest.fixture(autouse=True)
def an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "gpus", lambda: ("NVIDIA H100 80GB HBM3",))
    monkeypatch.setattr(environment, "compute_capability", lambda: (9, 0))


def settled(*overrides: str, vram_gib: float | None = 79.0) -> Selection:
    config = compose(*THREE_B, "memory.capacity_gib=125", *overrides)
    config.validate()

    def vram(_: Config) -> float | None:
        return vram_gib

    return gpu_share.relieve(device_inputs.settle(gpu_share.settle(select(config), vram), vram), vram)


def test_a_requested_share_is_the_embedding_and_whole_layers() -> None:
    run = settled("offload.gpu_share=0.5")
    layers, left = divmod(run.gpu_share - EMBEDDING, LAYER)
    assert left == 0 and abs(run.gpu_share / ALL - 0.5) < LAYER / ALL
    assert run.about_share == f"as requested: the embedding and {layers} layers"
    assert run.zero["sub_group_size"] == run.gpu_share, "DeepSpeed's first sub-group ends exactly there"
    assert settled("offload.gpu_share=0.01").gpu_share == EMBEDDING
    assert settled("offload.gpu_share=1").gpu_share == ALL
    assert settled("offload.gpu_share=0").gpu_share == 0
    # Of each rank, whose shards are padded.
    two = settled("offload.gpu_share=0.5", "launch.num_ranks=2").gpu_share
    assert (
        two
        == parameter_counts.split(parameter_counts.layer_sizes(compose(*THREE_B).model), 2) * layers + EMBEDDING // 2
    )


def waits(run: Selection, forward_s: float, update_s: float, fetch_s: float, layers: int) -> int:
    """How many layers after the share would wait for their update, played through layer by layer."""
    share = (run.gpu_share - EMBEDDING) // LAYER
    return sum((i + 1 - share) * update_s + fetch_s > i * forward_s for i in range(share, layers))


@pytest.mark.parametrize(("length", "rate"), [("32k", 140), ("16k", 140), ("8k", 140), ("32k", 400)])
def test_by_default_it_is_the_smallest_that_hides_the_rest(length: str, rate: int) -> None:
    """With memory of 140 GB/s the last layer is the one that would wait; with faster memory the first."""
    run = settled(f"seq_len={length}", MEASURED.replace("140", str(rate)))
    tokens = run.config.seq_len.tokens
    forward_s = tokens * (2 * LAYER + 2 * tokens * 24 * 128) / (0.55 * 989e12)
    update_s, fetch_s = 28 * LAYER / (0.8e9 * rate), 2 * LAYER / 54e9
    assert run.about_share.endswith("of 28 layers, so that the rest's update is hidden")
    assert waits(run, forward_s, update_s, fetch_s, 28) == 0
    fewer = dataclasses.replace(run, gpu_share=run.gpu_share - LAYER)
    assert waits(fewer, forward_s, update_s, fetch_s, 28) > 0


def test_it_grows_with_the_work_and_shrinks_with_the_time() -> None:
    long, middle, short = (settled(f"seq_len={length}", MEASURED).gpu_share for length in ("32k", "16k", "8k"))
    assert EMBEDDING < long < middle < short < ALL
    assert middle < settled("seq_len=16k", MEASURED.replace("140", "100")).gpu_share
    # An output projection of its own is updated last.
    assert long < settled("seq_len=32k", MEASURED, "model.tie_word_embeddings=false").gpu_share
    # Two ranks share the host, and each updates half.
    layers = (long - EMBEDDING) // LAYER
    halves = settled("seq_len=32k", MEASURED, "launch.num_ranks=2").gpu_share
    assert abs(halves - (EMBEDDING + layers * LAYER) / 2) < LAYER / 1000
    # On two hosts each has a host's bandwidth for its half.
    assert settled("seq_len=32k", MEASURED, "launch.num_ranks=2", "launch.num_hosts=2").gpu_share < halves


def test_it_takes_no_more_device_memory_than_there_is() -> None:
    tight = settled("seq_len=8k", MEASURED, vram_gib=24.0)
    assert 0 < tight.gpu_share < settled("seq_len=8k", MEASURED).gpu_share
    assert "as far as VRAM allows (" in tight.about_share
    assert sum(device_estimate.peak_of(device_estimate.moments(tight)).values()) < 24 * 2**30
    none = settled("seq_len=8k", MEASURED, vram_gib=8.0)
    assert (
        none.gpu_share == 0
        and none.about_share.startswith("none: ")
        and "the embedding's takes 5.9 GiB" in none.about_share
    )


def test_where_host_memory_lacks_inputs_stay_on_the_device_and_then_the_share_grows() -> None:
    at = ("seq_len=128k", MEASURED)
    roomy = settled(*at)
    need = sum(host_estimate.host_bytes(roomy).values()) + sum(host_estimate.other_bytes(roomy, {}).values())
    each = host_estimate.layer_input_bytes(roomy.config)
    assert roomy.device_inputs == 1 and room.host_shortage(roomy) == 0

    def short_of(gib: float, *more: str, vram_gib: float = 79.0) -> Selection:
        # The reserve and the spare are left too.
        have = (1.02 * need / 2**30 + 1) - gib
        return settled(*at, *more, f"memory.capacity_gib={have:g}", vram_gib=vram_gib)

    few = short_of(2.5 * each / 2**30)
    assert (few.device_inputs, few.gpu_share) == (4, roomy.gpu_share) and room.host_shortage(few) == 0
    one_less = dataclasses.replace(few, device_inputs=3)
    assert room.host_shortage(one_less) > 0, "as few as are needed"
    fixed = short_of(2.5 * each / 2**30, "checkpointing.device_inputs=1")
    assert fixed.device_inputs == 1 and fixed.gpu_share > roomy.gpu_share and room.host_shortage(fixed) == 0
    assert fixed.about_share.endswith("so that host memory suffices")

    much = short_of(30.0)
    assert (much.device_inputs, room.host_shortage(much)) == (28, 0)
    states = much.gpu_share - roomy.gpu_share
    assert 29 * 2**30 < 1.02 * (27 * each + 12 * states) < 30 * 2**30 + 1.02 * 12 * LAYER
    # With a share that is set, inputs alone; without VRAM, neither.
    assert short_of(30.0, "offload.gpu_share=0").gpu_share == 0
    tight = short_of(30.0, vram_gib=32.0)
    assert "as far as VRAM allows" in tight.about_share and room.host_shortage(tight) > 0
    assert room.device_room(tight, 32.0) > 0


def test_without_a_bandwidth_the_share_grows_for_host_memory_alone() -> None:
    run = settled("seq_len=32k", "memory.capacity_gib=40")
    assert run.about_share.endswith("so that host memory suffices") and room.host_shortage(run) == 0


def test_what_is_not_known_is_said() -> None:
    assert settled().about_share == (
        "none: the host's bandwidth is unknown (measure it with python -m ldft.bench nodes)"
    )
    unknown = settled(MEASURED, vram_gib=None)
    assert unknown.gpu_share == 0 and "its memory is unknown" in unknown.about_share


def test_an_unknown_gpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "gpus", lambda: ("Some GPU",))
    assert settled(MEASURED).about_share.startswith("none: the GPU's peak is unknown")


def test_memory_moves_from_host_to_device() -> None:
    none, half = settled("offload.gpu_share=0"), settled("offload.gpu_share=0.5")
    host = [host_estimate.host_bytes(run) for run in (none, half)]
    for role in ("master_weights", "momentum", "variance"):
        assert host[0][role] - host[1][role] == 4 * half.gpu_share
    device = [sum(device_estimate.moments(run)["step"].values()) for run in (none, half)]
    assert device[1] - device[0] == 16 * half.gpu_share


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("launch.device=cpu", "kernels.liger=null"), "there is no GPU to update on"),
        (("optimizer.overlap_step=false",), "needs an update beside the next forward pass"),
        (("lora=r8",), "needs an update beside the next forward pass"),
        (("offload=optimizer",), "needs an update beside the next forward pass"),
        (("offload.deepspeed={zero_optimization:{sub_group_size:1000}}",), "DeepSpeed's first sub-group"),
    ],
)
def test_a_share_that_is_not_possible_is_refused(overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(CombinationError, match=rf"^offload\.gpu_share: 0\.5: .*{words}.*; use 0, or leave it at null$"):
        settled("offload.gpu_share=0.5", *overrides)
    assert settled(*overrides).gpu_share == 0


def test_a_value_that_is_no_share_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^offload\.gpu_share: 1\.5 is not a share; use 0 to 1, or null$"):
        settled("offload.gpu_share=1.5")


def test_an_update_that_nothing_hides_is_all_on_the_gpu() -> None:
    run = settled("seq_len=8k", MEASURED.replace("140", "1"))
    assert run.gpu_share == ALL and run.about_share.startswith("the embedding and 28 of 28 layers")
    assert settled("offload.gpu_share=0.9999").gpu_share == EMBEDDING + 28 * LAYER


def test_an_embedding_that_just_fits_is_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 B an element; without host memory enough, and with it."""
    for more in ((MEASURED, "seq_len=8k"), ("checkpointing.device_inputs=1", "memory.capacity_gib=20")):
        monkeypatch.setattr(room, "device_room", lambda run, size: 16 * (EMBEDDING - run.gpu_share))
        run = settled(*more)
        assert run.gpu_share == EMBEDDING and run.about_share.startswith("the embedding and 0 of 28 layers, so that ")
        assert "as far as VRAM allows (" in run.about_share
        monkeypatch.setattr(room, "device_room", lambda run, size: 16 * EMBEDDING - 1)
        assert settled(*more).gpu_share == 0


@pytest.mark.parametrize(("room_bytes", "left"), [(3 * 2**30, "3.0"), (-(2**30), "0.0")])
def test_too_little_room_for_the_embedding_is_said(monkeypatch: pytest.MonkeyPatch, room_bytes: int, left: str) -> None:
    monkeypatch.setattr(room, "device_room", lambda run, size: room_bytes)
    about = settled(MEASURED, "seq_len=8k", "memory.capacity_gib=500").about_share
    assert about == f"none: {left} GiB of VRAM are left, the embedding's takes 5.9 GiB"


def test_what_is_short_by_little_moves_the_embedding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "host_shortage", lambda run: max(0, 12 * 1000 - 12 * run.gpu_share))
    run = settled("checkpointing.device_inputs=1")
    assert run.gpu_share == EMBEDDING
    assert run.about_share == "the embedding and 0 of 28 layers, so that host memory suffices"
    monkeypatch.setattr(room, "host_shortage", lambda run: max(0, 12 * (EMBEDDING + LAYER + 1) - 12 * run.gpu_share))
    assert settled("checkpointing.device_inputs=1").gpu_share == EMBEDDING + 2 * LAYER
    # A share that is there already counts.
    at = (MEASURED, "seq_len=32k", "checkpointing.device_inputs=1")
    monkeypatch.setattr(room, "host_shortage", lambda run: 0)
    before = settled(*at).gpu_share
    monkeypatch.setattr(room, "host_shortage", lambda run: max(0, 12 * (before + LAYER - run.gpu_share)))
    assert before > EMBEDDING and settled(*at).gpu_share == before + LAYER
    # Each of two ranks moves its half.
    monkeypatch.setattr(room, "host_shortage", lambda run: max(0, 12 * (EMBEDDING + LAYER) - 24 * run.gpu_share))
    two = settled("checkpointing.device_inputs=1", "launch.num_ranks=2")
    assert two.gpu_share == pytest.approx((EMBEDDING + LAYER) / 2, rel=1e-4)
