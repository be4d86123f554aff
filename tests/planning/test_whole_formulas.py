"""The predicted times of an iteration, put together by hand from the terms."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ldft.config import OffloadDevice
from ldft.config.checkpointing import KeepAttention
from ldft.planning import iteration_time
from ldft.planning.iteration_time import Times
from ldft.planning.rates import HostTime
from ldft.preflight.selection import Selection
from tests.planning.small_machine import HOST, NO_TIME, RATES, near, offload, run_of


def predicted(run: Selection, **host: Any) -> Times:
    """With other bandwidths, or another time of the host for a layer."""
    layers = {name: host.pop(name) for name in ("fetched", "resident") if name in host}
    return iteration_time.predict(run, dataclasses.replace(RATES, host=dataclasses.replace(HOST, **host), **layers))


# Of the layer and the loss above, on an infinitely fast link.
FORWARD, BACKWARD, AGAIN, LOSS = 1240.32, 1712.64, 1230.72, 24.0
SOME_TIME = HostTime(100.0, 100.0, 100.0)
FAST: dict[str, Any] = {"link_h2d": 1e30, "link_d2h": 1e30}


def test_the_gpus_work_of_an_iteration() -> None:
    run = run_of()
    config = run.config
    config.train.gradient_accumulation_steps = 2
    offload(config, 0, OffloadDevice.none, OffloadDevice.none)
    forward = 3 * FORWARD + LOSS
    backward = 3 * BACKWARD + 3 * AGAIN + 2 * LOSS
    found = predicted(run)
    assert (found.forward_s, found.backward_s, found.step_s) == near((2 * forward, 2 * backward, 120 * 247.2))
    assert (found.update_s, found.exposed_s, found.link_s) == (0, 0, 0)
    assert found.arithmetic_s == near(2 * (forward + backward)) and found.bound == "arithmetic"
    assert found.iteration_s == near(2 * forward + 2 * backward + 120 * 247.2)
    # Liger computes the loss's gradients in the forward pass. One layer of three recomputed, its attention kept.
    config.checkpointing.layers, config.checkpointing.keep_attention = 1, KeepAttention.device
    found = predicted(dataclasses.replace(run, liger=True))
    assert found.forward_s == near(2 * (3 * FORWARD + 3 * LOSS))
    assert found.backward_s == near(2 * (3 * BACKWARD + AGAIN - 24))
    # Under ZeRO-3 the device waits at each layer for 0.14 of the host's time for it. A pass begins with an idle device.
    offload(config, 3, OffloadDevice.none, OffloadDevice.none)
    found = predicted(dataclasses.replace(run, liger=True), fetched=SOME_TIME)
    assert found.forward_s == near(2 * (100 + 3 * (FORWARD + 14) + 3 * LOSS))
    assert found.backward_s == near(2 * (3 * (BACKWARD + 14) + AGAIN + 14 - 24))


def test_exchanges_are_in_each_pass_of_a_layer() -> None:
    run = run_of()
    run.config.launch.num_ranks = run.config.launch.sequence_parallel = 2
    found = predicted(run, **FAST)
    forward, backward, again, exchange = FORWARD / 2, BACKWARD / 2, AGAIN / 2, 240.0
    assert found.forward_s == near(max(3 * (forward + exchange) + LOSS / 2, 2472 / 2))
    # Weights are gathered, and gradients reduced, between two GPUs of 2 B/s: 2 x 2472 bytes each, of which a half moves.
    assert found.backward_s == near(max(3 * (backward + again + 2 * exchange) + LOSS, 2472 * 2 / 2))
    over = dataclasses.replace(run, overlap_step=True)
    assert predicted(over, **FAST, cpu={0: 1e30}).exposed_s == 0


def test_copies_are_waited_for_where_they_take_longer() -> None:
    run = run_of()
    run.config.train.gradient_accumulation_steps = 2
    forward, backward = 3 * FORWARD + LOSS, 3 * BACKWARD + 3 * AGAIN + 2 * LOSS
    found = predicted(run, link_h2d=0.1, link_d2h=0.1)
    copies = 2 * 2472 / 0.1
    assert (found.forward_s, found.backward_s) == near((2 * copies, 2 * (copies + 8000)))
    assert found.link_s == near(2 * 2 * copies) and found.bound == "link"
    assert found.arithmetic_s == near(2 * (forward + backward))
    found = predicted(run, **FAST)
    assert (found.forward_s, found.backward_s) == near((2 * forward, 2 * backward))


def test_an_update_is_exposed_or_beside_the_first_forward_pass() -> None:
    run = run_of()
    run.config.train.gradient_accumulation_steps = 3
    forward = 3 * FORWARD + LOSS
    found = predicted(run, **FAST, cpu={0: 4.0})
    alone = 28 * 2472 / 4
    assert (found.update_s, found.exposed_s, found.step_s) == near((alone, alone, 0.015 + alone))
    assert found.forward_s == near(3 * forward)
    over = dataclasses.replace(run, overlap_step=True)
    # The pass's copies go through memory of 1000 B/s, that of the link's both directions. The last layer starts after 2464 of 2472.
    found = predicted(over, link_h2d=600.0, link_d2h=400.0, cpu={0: 4.0})
    slower = alone + 2 * 2472 / 1000
    first = slower * 2464 / 2472 + 2 * 688 / 600 + FORWARD + LOSS
    assert found.update_s == near(slower) and found.step_s == near(0.015)
    assert found.forward_s == near(first + 2 * forward) and found.exposed_s == near(first - forward)
    # Of a quick one all is hidden but the embedding's and the first layer's part; it meets as much of the copies as it takes of the
    # pass. Then the update's own rate is that of memory.
    found = predicted(over, link_h2d=600.0, link_d2h=400.0, cpu={0: 1e4})
    quick = 28 * 2472 / 1e4
    quick += 2 * 2472 * quick / forward / 1e4
    assert found.update_s == near(quick)
    assert found.exposed_s == pytest.approx(quick * 1088 / 2472 + 2 * 688 / 600, rel=1e-9)
    # Where copies take longer than that, nothing is exposed.
    found = predicted(over, link_h2d=0.5, link_d2h=0.5, cpu={0: 1e6})
    assert found.exposed_s == 0 and found.forward_s == near(3 * 2 * 2472 / 0.5)


def test_beside_an_update_python_is_slower() -> None:
    run = dataclasses.replace(run_of(), overlap_step=True)
    slow = HostTime(2e3, 0.0, 0.0)
    # 2000 s for a layer are 4000 beside the update, which ends 472 s after the first one began.
    found = predicted(run, **FAST, cpu={0: 28.0}, fetched=slow)
    assert found.update_s == near(2472) and found.exposed_s == near(472 / 2)
    assert predicted(run, **FAST, cpu={0: 1e30}, fetched=slow).exposed_s == 0


def test_a_layer_takes_as_long_as_python_needs_to_start_it() -> None:
    """Of three layers one is computed again; without ZeRO-3 the other host time counts."""
    run = run_of()
    run.config.checkpointing.layers = 1
    slow: dict[str, Any] = {
        "fetched": HostTime(1e5, 2e5, 3e5),
        "resident": HostTime(4e5, 5e5, 6e5),
        "link_h2d": 1e9,
        "link_d2h": 1e9,
    }
    found = predicted(run, **slow)
    assert found.forward_s == near(1e5 + 3e5 + LOSS) and found.backward_s == near(6e5 + 3e5 + 2 * LOSS)
    assert found.launch_s == 12e5 and found.bound == "Python"
    assert found.arithmetic_s == near(3 * (FORWARD + BACKWARD + 2 * 14e3) + AGAIN + 14e3 + 3 * LOSS)
    # The forward pass of the layer that is recomputed later may take Python longer; never less.
    for checkpointed, seconds in ((7e5, 7e5), (0.5e5, 1e5)):
        more = slow | {"fetched": HostTime(1e5, 2e5, 3e5, checkpointed)}
        found = predicted(run, **more)
        assert found.forward_s == near(1e5 + 2e5 + seconds + LOSS) and found.launch_s == near(11e5 + seconds)
    # If DeepSpeed fetches each matrix by itself: five times as long.
    run.config.offload.deepspeed = {"zero_optimization": {"stage3_prefetch_bucket_size": 0}}
    assert predicted(run, **slow).forward_s == near(5 * (1e5 + 3e5) + LOSS)
    more = slow | {"fetched": HostTime(1e5, 2e5, 3e5, 7e5)}
    assert predicted(run, **more).forward_s == near(5 * (1e5 + 3e5) + 6e5 + LOSS)
    run.config.offload.deepspeed = {}
    offload(run.config, 2, OffloadDevice.none, OffloadDevice.cpu)
    found = predicted(run, **slow)
    gradients = 4 * 2472 / 1e9  # which nothing hides
    assert found.forward_s == near(4e5 + 12e5 + LOSS)
    assert found.backward_s == near(15e5 + 6e5 + 2 * LOSS + gradients)
    # A layer of which Python is done earlier takes as long as its arithmetic.
    quick = predicted(run, fetched=NO_TIME, resident=HostTime(1e-6, 1e-6, 1e-6), link_h2d=1e9, link_d2h=1e9)
    assert quick.forward_s == near(1e-6 + 3 * FORWARD + LOSS) and quick.bound != "Python"
