"""What is printed reads as a sentence also where there is one of a thing, or none."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from ldft import environment
from ldft.terminal import plural
from tests.conftest import Done


def test_one_thing_is_no_plural() -> None:
    assert [plural(count, "core") for count in (0, 1, 2, 1.0, 1.5)] == [
        "0 cores",
        "1 core",
        "2 cores",
        "1 core",
        "1.5 cores",
    ]
    assert plural(1234567, "row") == "1234567 rows"
    assert plural(1, "process", "processes") == "1 process" and plural(2, "process", "processes") == "2 processes"


def test_a_dry_run_of_one_of_each(ldft: Callable[..., Done]) -> None:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        done = ldft("dry_run=true", "model.num_layers=1", "train.iterations=1", "train.warmup_iterations=0")
    finally:
        os.sched_setaffinity(0, cores)
    assert done.exit_code == 0, done.stdout + done.stderr
    assert "nano, llama, 1 layer, " in done.stdout
    assert "iteration: 1 sequence of 64 tokens = 64 tokens, 1 iteration of which 0 warm-up" in done.stdout
    assert f"  rank 0: 1 core ({min(cores)}), OMP_NUM_THREADS=1" in done.stdout


def test_an_assumed_gpu_is_the_same_in_every_line(ldft: Callable[..., Done]) -> None:
    if environment.gpus():
        pytest.skip("GPUs are assumed only where there are none")
    done = ldft("dry_run=true", "launch.device=cuda", "offload=full")
    assert done.exit_code == 0, done.stdout + done.stderr
    assert (
        "no GPU here; it is assumed to be Hopper" in done.stdout
        and "assumed to be Hopper, of unknown size" in done.stdout
    )
    assert "; on the GPU: none, since " in done.stdout and "Ampere" not in done.stdout
