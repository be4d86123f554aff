"""Every part of the estimate of host memory, to the byte, for Llama 3.2 1B; and what of both memories is left or lacks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ldft import environment
from ldft.memory import limits
from ldft.preflight import device_estimate, device_inputs, fit, host_estimate, room
from ldft.preflight.resolved import resolve
from ldft.preflight.selection import Selection, select
from tests.conftest import compose
from tests.preflight.test_device_parts import ALL, EMBEDDING, INPUT, LINE, Q, T

GIB = 2**30


def run(*more: str) -> Selection:
    return select(compose(*LINE, "checkpointing=gpu", *more))


def others(*more: str) -> dict[str, int]:
    return host_estimate.other_bytes(run(*more), {})


def test_roles_with_everything_on_the_host() -> None:
    four = dict.fromkeys(("master_weights", "momentum", "variance"), 4 * ALL)
    half = {"compute_gradients": 2 * ALL, "compute_weights": 2 * ALL}
    assert host_estimate.host_bytes(run("offload=full")) == half | four
    stock = host_estimate.host_bytes(run("offload=full", "optimizer.fused_step=false"))
    assert stock == half | four | {"master_gradients": 4 * ALL}
    two = host_estimate.host_bytes(run("offload=full", "launch.num_ranks=2"))
    assert two == {role: size // 2 for role, size in (half | four).items()}
    lion = host_estimate.host_bytes(run("offload=full", "optimizer=lion"))
    assert "variance" not in lion and lion["momentum"] == 4 * ALL
    share = host_estimate.host_bytes(replace(run("offload=full"), gpu_share=1000))
    assert share == half | dict.fromkeys(four, 4 * (ALL - 1000))


def test_roles_with_the_optimizer_on_the_host() -> None:
    """Three ranks: all parameters together are padded to a multiple of six."""
    share = -(-ALL // 6) * 2
    assert ALL % 6
    states = dict.fromkeys(("master_weights", "master_gradients", "momentum", "variance"), 4 * share)
    found = host_estimate.host_bytes(run("offload=optimizer", "launch.num_ranks=3"))
    assert found == states | {"compute_gradients": 2 * EMBEDDING, "compute_weights": 2 * share}
    assert host_estimate.host_bytes(run("offload=none")) == {}


def test_inputs_and_outputs_of_layers_that_wait() -> None:
    def waiting(inputs: int, *more: str) -> int:
        return host_estimate.checkpoint_bytes(compose(*LINE, *more), inputs)

    output = 2 * T * Q + 4 * 32 * T
    assert waiting(1, "checkpointing=cpu") == 15 * INPUT and waiting(4, "checkpointing=cpu") == 12 * INPUT
    assert waiting(99, "checkpointing=cpu") == waiting(1, "checkpointing=gpu") == 0
    host = ("checkpointing=cpu", "checkpointing.keep_attention=host", "checkpointing.every=3")
    assert waiting(1, *host) == 5 * INPUT + 5 * 3 * output  # six groups
    assert waiting(1, *host, "checkpointing.layers=0") == 0
    assert host_estimate.layer_input_bytes(compose(*LINE)) == INPUT
    assert host_estimate.attention_output_bytes(compose(*LINE)) == output


def test_what_is_in_host_memory_besides() -> None:
    assert others("offload=full") == {"process": 3 * GIB // 2}
    assert others("offload=full", "train.precision=fp16", "optimizer.fused_step=false")["overflow check"] == 3 * ALL
    for fine in (("train.precision=fp16",), ("optimizer.fused_step=false",)):
        assert "overflow check" not in others("offload=full", *fine)
    assert "overflow check" not in others("offload=optimizer", "train.precision=fp16", "optimizer.fused_step=false")
    # All master weights are built on the host, before the moments of what stays there, and before the process has its full size.
    early = GIB // 2
    for share, more in ((ALL, 4 * ALL - early), (ALL - 1000, 4 * (ALL - 1000) - 8 * 1000 - early), (1000, 0)):
        found = host_estimate.other_bytes(replace(run("offload=full"), gpu_share=share), {})
        assert found["the share's master weights at the start"] == more
    cpu = select(compose("model=nano", "launch.device=cpu"))
    found = host_estimate.other_bytes(cpu, {"weights": 5, "logits": 7})
    assert found["device part"] == 12 and found["process"] == int(0.36 * GIB)


def test_swap_buffers(tmp_path: Path) -> None:
    def swapped(size: int, *more: str) -> int:
        zero = f"offload.deepspeed.zero_optimization.sub_group_size={size}"
        return others("offload=nvme", f"offload.nvme_path={tmp_path}", zero, *more)["swap buffers"]

    def weights(*more: str) -> int:
        zero = run("offload=nvme", f"offload.nvme_path={tmp_path}", *more).zero["offload_param"]
        return 2 * int(zero["buffer_count"]) * int(zero["buffer_size"])

    # Four buffers and a gradient, in fp32: of the largest sub-group, which holds at least one parameter.
    assert swapped(400_000_000) == weights() + 4 * 5 * 400_000_000
    assert swapped(1000) == swapped(0) == weights() + 4 * 5 * EMBEDDING
    assert swapped(0, "launch.num_ranks=2") == weights("launch.num_ranks=2") + 4 * 5 * EMBEDDING // 2
    assert swapped(10**10) == weights() + 4 * 5 * ALL


def test_sub_groups_take_all_elements() -> None:
    config = compose(*LINE, "offload=full")
    assert host_estimate._sub_groups(config, 10**9) == [10**9, ALL - 10**9]
    assert host_estimate._sub_groups(config, ALL // 2) == [ALL // 2] * 2
    assert host_estimate._sub_groups(config, ALL) == host_estimate._sub_groups(config, ALL + 1) == [ALL]
    one_by_one = host_estimate._sub_groups(config, 0)
    assert sum(one_by_one) == ALL and max(one_by_one) == EMBEDDING and len(one_by_one) == 1 + 16 * 9 + 1
    assert host_estimate._sub_groups(compose(*LINE, "offload=optimizer"), 1000) == [ALL]
    assert [host_estimate._power_of_two(size) for size in (0, 1, 2, 3, 4, 5)] == [0, 1, 2, 4, 4, 8]


def test_room_and_shortage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates are a few percent off: 8% of the GPU's memory stays free, and host memory is counted 2% larger."""
    here = run("offload=full")
    peak = sum(device_estimate.peak_of(device_estimate.moments(here)).values())
    assert room.device_room(here, 40.0) == pytest.approx(0.92 * 40 * GIB - 1.05 * peak - 0.7 * GIB, abs=2)
    need = 1.02 * (16 * ALL + 1.5 * GIB)
    two = run("offload=full", "launch.num_ranks=2")
    for capacity_gib, size in ((20, need), (500, 0)):
        monkeypatch.setattr(limits, "machine_memory", lambda capacity: capacity)
        of_one, of_two = (
            replace(each, config=compose(*LINE, "checkpointing=gpu", "offload=full", ranks, f"memory.capacity_gib={capacity_gib}"))
            for each, ranks in ((here, "launch.num_ranks=1"), (two, "launch.num_ranks=2"))
        )  # fmt: skip
        assert room.host_shortage(of_one) == pytest.approx(max(0, size - capacity_gib * GIB), abs=2)
        assert room.host_shortage(of_two) == pytest.approx(max(0, size + 1.02 * 1.5 * GIB - capacity_gib * GIB), abs=2)
    monkeypatch.setattr(limits, "machine_memory", lambda capacity: GIB if capacity is None else 0)
    assert room.host_shortage(here) == pytest.approx(need - GIB, abs=2), "the machine's own, where nothing is said"
    monkeypatch.setattr(environment, "gpus_are_assumed", lambda: True)
    assert room.host_shortage(here) == 0, "of another machine nothing is known"


def test_inputs_wait_on_the_host_only_where_layers_are_recomputed_from_there() -> None:
    for more, waits in ((), True), (("checkpointing.layers=0",), False), (("checkpointing=gpu",), False):
        assert device_inputs.waits(compose(*LINE, "checkpointing=cpu", *more)) is waits
    asked = select(compose(*LINE, "checkpointing=cpu", "checkpointing.device_inputs=0"))
    assert device_inputs.settle(asked, lambda _: None).device_inputs == 0
    assert device_inputs.settle(run("checkpointing.device_inputs=5"), lambda _: None).device_inputs == 1


def test_as_few_inputs_as_are_needed_stay_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    start = select(compose(*LINE, "offload=full", "checkpointing=cpu"))

    def settled(enough: int, vram: int = 99, size: float | None = 80.0) -> int:
        monkeypatch.setattr(room, "host_shortage", lambda run: max(0, enough - run.device_inputs))
        monkeypatch.setattr(room, "device_room", lambda run, _: vram - run.device_inputs)
        return device_inputs.settle(start, lambda _: size).device_inputs

    assert [settled(enough) for enough in (0, 1, 2, 7, 16, 17)] == [1, 1, 2, 7, 16, 16]
    assert settled(7, vram=5) == 5 and settled(7, vram=1) == 1
    assert settled(7, size=None) == 1


def test_host_memory_that_is_just_enough_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    line = (*LINE, "checkpointing=gpu", "offload=full", "launch.num_ranks=2")
    need = 16 * ALL + 2 * 3 * GIB // 2
    resolved = resolve(compose(*line, "offload.gpu_share=0", "memory.vram_gib=80"))
    assert resolved.estimate.host_bytes == need
    for free, fits in ((need, True), (need - 1, False)):
        monkeypatch.setattr(
            fit, "free_memory", lambda capacity, free=free: limits.Free(bytes=free, limit="MemAvailable")
        )
        if fits:
            fit.examine(resolved)
        else:
            with pytest.raises(fit.DoesNotFitError, match=r"21\.4 GiB expected, 21\.4 GiB free by MemAvailable"):
                fit.examine(resolved)


def test_capacity_limits_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "free_memory", lambda capacity: limits.Free(bytes=10 * GIB, limit="MemAvailable"))

    def available(gib: float) -> tuple[int, str]:
        free = fit.available(compose(*LINE, f"memory.capacity_gib={gib}"))
        return free.bytes, free.limit

    assert available(0) == available(10) == available(11) == (10 * GIB, "MemAvailable")
    assert available(9) == (9 * GIB, "memory.capacity_gib")
