"""A run waits for memory that is being given back, and for nothing else."""

from __future__ import annotations

import pytest

from ldft.memory.limits import Free
from ldft.preflight import fit
from ldft.preflight.resolved import resolve
from ldft.runner import memory_wait
from tests.conftest import compose

GIB = 1 << 30


@pytest.mark.parametrize(
    ("free_gib", "waits", "fits"),
    [
        ([9], 0, True),
        ([0.1, 0.3, 9], 2, True),  # given back by and by
        ([0.1, 0.1, 9], 1, False),  # nobody gives anything back
        ([0.1, 9], 1, True),  # at once
        ([0.1 + 0.1 * n for n in range(100)], 5, True),
        ([0.001 * n for n in range(100)], 1, False),
    ],
)
def test_it_waits_as_long_as_free_memory_grows(
    monkeypatch: pytest.MonkeyPatch, free_gib: list[float], waits: int, fits: bool
) -> None:
    run = resolve(compose("model=nano", "launch.device=cpu", "train.precision=fp32"))
    need = 0.55 * GIB
    monkeypatch.setattr(type(run.estimate), "host_bytes", property(lambda self: need))
    slept: list[float] = []
    monkeypatch.setattr(
        fit,
        "available",
        lambda config: Free(bytes=int(free_gib[min(len(slept), len(free_gib) - 1)] * GIB), limit="MemAvailable"),
    )
    if fits:
        note = memory_wait.until_it_fits(run, slept.append)
        assert (note is None) == (waits == 0) and (note is None or f"waited {waits} s" in note)
    else:
        with pytest.raises(fit.DoesNotFitError):
            memory_wait.until_it_fits(run, slept.append)
    assert len(slept) == waits


def test_it_does_not_wait_for_what_this_machine_never_has(monkeypatch: pytest.MonkeyPatch) -> None:
    run = resolve(compose("model=llama3_70b", "launch.device=cpu", "train.precision=fp32"))
    monkeypatch.setattr(memory_wait, "machine_memory", lambda capacity: GIB)
    with pytest.raises(fit.DoesNotFitError):
        memory_wait.until_it_fits(run, lambda seconds: pytest.fail("waited"))


def test_it_waits_a_minute_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    run = resolve(compose("model=nano", "launch.device=cpu", "train.precision=fp32"))
    monkeypatch.setattr(memory_wait, "machine_memory", lambda capacity: 1 << 60)
    monkeypatch.setattr(type(run.estimate), "host_bytes", property(lambda self: 1 << 50))
    slept: list[float] = []
    monkeypatch.setattr(fit, "available", lambda config: Free(bytes=len(slept) * GIB, limit="MemAvailable"))
    with pytest.raises(fit.DoesNotFitError):
        memory_wait.until_it_fits(run, slept.append)
    assert sum(slept) == memory_wait.LIMIT_S
