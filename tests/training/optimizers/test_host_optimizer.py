"""The update of offloaded weights: AdamW and Lion in fp64 as reference, and DeepSpeed's own optimizers, bit for bit."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldft.training.deepspeed.operators import cache_dir
from ldft.training.optimizers.host_optimizer import HostAdamW, HostLion, HostOptimizer, run
from tests.conftest import deepspeed_has_cpu_lion, long

RATE, BETAS, EPS, DECAY = 1e-2, (0.9, 0.95), 1e-8, 0.1
# Around the widths of vectors, of blocks (1,024) and of what a thread takes at a time (131,072).
SIZES = (1, 5, 16, 17, 1023, 1024, 1025, 131_071, 300_007)


def optimizer_of(rule: str, weights: torch.Tensor) -> HostOptimizer:
    if rule == "lion":
        return HostLion([weights], lr=RATE, betas=BETAS, weight_decay=DECAY)
    return HostAdamW([weights], lr=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY)


def reference(rule: str, weights: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """The papers' rules in fp64."""
    w, m, v = weights.double(), torch.zeros_like(weights).double(), torch.zeros_like(weights).double()
    (beta1, beta2), decayed = BETAS, 1 - RATE * DECAY
    for step, gradient in enumerate(gradients, start=1):
        g = gradient.double()
        if rule == "lion":
            w = decayed * w - RATE * torch.sign(beta1 * m + (1 - beta1) * g)
            m = beta2 * m + (1 - beta2) * g
            continue
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        mean, square = m / (1 - beta1**step), v / (1 - beta2**step)
        w = decayed * w - RATE * mean / (square.sqrt() + EPS)
    return w


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_updates_are_those_of_the_papers(rule: str, numel: int) -> None:
    torch.manual_seed(numel)
    # One element into its memory, as a view would be: nothing may rely on alignment.
    weights = torch.nn.Parameter(torch.randn(numel + 1)[1:])
    start = weights.detach().clone()
    gradients = [torch.randn(numel) * 10 ** torch.randn(numel) for _ in range(12)]
    # Of changing size: AdamW does not see one that all gradients have in common.
    factors = [0.3, 3.0, 0.1] * 4
    optimizer = optimizer_of(rule, weights)
    rounded = torch.empty(numel, dtype=torch.bfloat16)
    for gradient, factor in zip(gradients, factors, strict=True):
        weights.grad = gradient.clone()
        run(optimizer.tasks(weights, optimizer.param_groups[0], factor, rounded))
        assert torch.equal(weights.grad, gradient)
        assert torch.equal(rounded, weights.detach().bfloat16())
    scaled = [factor * gradient.double() for gradient, factor in zip(gradients, factors, strict=True)]
    expected = reference(rule, start, scaled)
    torch.testing.assert_close(weights.detach().double(), expected, rtol=2e-5, atol=2e-6)
    # Each of these alone would show: one step less, no factor (to Lion, in many elements only).
    others = [scaled[:-1], gradients] if numel > 1000 or rule == "adamw" else [scaled[:-1]]
    for other in others:
        assert not torch.allclose(weights.detach().double(), reference(rule, start, other), rtol=1e-4, atol=1e-5)


def test_one_thread_and_many_give_the_same() -> None:
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 7):
            torch.set_num_threads(threads)
            torch.manual_seed(1)
            weights = torch.nn.Parameter(torch.randn(1_000_003))
            optimizer = optimizer_of("adamw", weights)
            for _ in range(3):
                weights.grad = torch.randn(1_000_003)
                optimizer.step()
            results.append(weights.detach())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_what_is_no_number_stays_so_and_what_is_large_is_not_made_infinite_early() -> None:
    # Rounded like a number, the first of these would be -0.
    full = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    values = torch.tensor([math.nan, math.inf, -math.inf, 3.3895e38, -0.0, 1e-45, 1.00390625, 1.01171875])
    values = torch.cat([full, values])
    weights = torch.nn.Parameter(values.clone())
    weights.grad = torch.zeros_like(weights)
    rounded = torch.empty(len(values), dtype=torch.bfloat16)
    optimizer = HostAdamW([weights], lr=RATE)
    run(optimizer.tasks(weights, optimizer.param_groups[0], copy=rounded))
    expected = weights.detach().bfloat16()
    assert torch.equal(rounded.isnan(), expected.isnan()) and bool(rounded.isnan()[:2].all())
    assert torch.equal(rounded[4:], expected[4:])
    assert rounded[7] == 1.0 and rounded[8] == 1.015625  # ties go to the even neighbour


def test_a_weight_without_a_gradient_is_left_alone() -> None:
    weights, unused = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = HostAdamW([weights, unused], lr=RATE)
    weights.grad = torch.ones(3)
    optimizer.step()
    assert bool((weights < 1).all()) and bool((unused == 1).all()) and unused not in optimizer.state


DEEPSPEED = """
import copy, json, sys, torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.lion import DeepSpeedCPULion
from ldft.preflight.selection import select
from ldft.training.deepspeed import operators
from ldft.training.optimizers.host_optimizer import run
from tests.conftest import compose
from tests.training.optimizers.test_host_optimizer import BETAS, DECAY, EPS, RATE, optimizer_of
said, rule = [], sys.argv[2]
operators.load(select(compose(f"optimizer={rule}", "optimizer.fused_step=false", "launch.device=cpu")), print)
for numel in (16, 4096, 262_160, 262_167):
    torch.manual_seed(numel)
    ours = torch.nn.Parameter(torch.randn(numel))
    theirs = torch.nn.Parameter(ours.detach().clone())
    mine = optimizer_of(rule, ours)
    kind, more = (DeepSpeedCPULion, {}) if rule == "lion" else (DeepSpeedCPUAdam, {"eps": EPS})
    deepspeed = kind([theirs], lr=RATE, betas=BETAS, weight_decay=DECAY, **more)
    for step in range(20):
        gradient = torch.randn(numel) * 10 ** torch.randn(numel)
        ours.grad, theirs.grad = gradient, gradient * torch.tensor(0.37)
        if step == 10:  # as after a checkpoint: a step that does not follow
            for optimizer, weights in ((mine, ours), (deepspeed, theirs)):
                optimizer.state[weights]["step"] = 100
        if step == 15:  # each goes on from the other's checkpoint
            states = deepspeed.state_dict(), copy.deepcopy(mine.state_dict())
            mine.load_state_dict(states[0])
            deepspeed.load_state_dict(states[1])
        run(mine.tasks(ours, mine.param_groups[0], 0.37))
        deepspeed.step()
    pairs = [(ours, theirs), *((mine.state[ours][n], deepspeed.state[theirs][n]) for n in mine.moments)]
    whole = numel // 16 * 16
    equal = all(torch.equal(a[:whole], b[:whole]) for a, b in pairs)
    near = all(torch.allclose(a[whole:], b[whole:], rtol=1e-5, atol=1e-6) for a, b in pairs)
    said.append([numel, equal, near, bool((theirs != 0).any())])
json.dump(said, open(sys.argv[1], "w"))
"""


@pytest.mark.parametrize("rule", ["adamw", pytest.param("lion", marks=long)])  # its CPULion takes a minute to compile
def test_results_are_deepspeeds_bit_for_bit(rule: str, tmp_path: Path) -> None:
    """Of the up to 15 elements that fill no vector, DeepSpeed leaves the order of roundings to its compiler."""
    if not {"avx2", "fma"} <= set(Path("/proc/cpuinfo").read_text().split()):
        pytest.skip("DeepSpeed rounds otherwise on a CPU without AVX2 and FMA")
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(cache_dir()),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [sys.executable, "-c", DEEPSPEED, str(tmp_path / "said.json"), rule]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    if rule == "lion" and not deepspeed_has_cpu_lion():
        assert "has no CPULion without a GPU; leave it at null" in done.stderr
        pytest.skip("this DeepSpeed has no CPULion on CPUs")
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads((tmp_path / "said.json").read_text())
    assert len(said) == 4
    assert all(equal and near and any_ for *_, equal, near, any_ in said), said
