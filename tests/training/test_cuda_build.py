"""A GPU that torch was not built for is refused before anything runs on it. Lists of architectures as torch's builds have them."""

from __future__ import annotations

import pytest
import torch

from ldft.errors import ConfigError
from ldft.training import cuda_build

CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
CUDA_12_6 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86"]


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((7, 0), CUDA_13, False),
        ((7, 0), CUDA_12_6, True),
        ((7, 5), CUDA_13, True),
        ((8, 9), CUDA_13, True),
        ((9, 0), CUDA_13, True),
        ((9, 0), CUDA_12_6, False),
        ((9, 0), [*CUDA_12_6, "sm_90a"], True),
        ((10, 3), CUDA_13, True),
        ((12, 1), CUDA_13, True),
        ((13, 0), CUDA_13, False),
        ((13, 0), [*CUDA_13, "compute_120"], True),
        ((7, 0), ["compute_75"], False),
    ],
)
def test_code_runs_on_its_own_generation_and_ptx_on_later_ones(capability, built, runs) -> None:
    assert cuda_build.runs(capability, built) is runs


@pytest.mark.parametrize(
    ("capability", "built", "says"),
    [((7, 0), CUDA_13, r"7\.0, only for sm_75, .*CUDA 12\.6"), ((9, 0), CUDA_12_6, r"9\.0, .*CUDA 13\.0 or later")],
)
def test_what_is_missing_is_said_with_the_build_that_has_it(monkeypatch, capability, built, says) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    with pytest.raises(ConfigError, match=f"launch.device: cuda: torch .* no code for compute capability {says}"):
        cuda_build.check(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CUDA_12_6 + CUDA_13)
    cuda_build.check(torch.device("cuda", 0))
