"""Checks that torch was built for this machine's GPU: its builds contain code for different GPU generations."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ldft.errors import ConfigError


def check(device: torch.device) -> None:
    """Raise ConfigError if none of torch's kernels can run on the device; otherwise the first kernel would fail in mid-run."""
    capability, built = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    if built and not runs(capability, built):
        # Builds for CUDA 12.8 and later have no code for Volta (torch 2.11, RELEASE.md); those for 12.6 have none for newer GPUs.
        which = "12.6" if capability < (7, 5) else "13.0 or later"
        raise ConfigError(
            "launch.device",
            f"cuda: torch {torch.__version__} has no code for compute capability {capability[0]}.{capability[1]}, only for "
            f"{', '.join(built)}; install torch's build for CUDA {which}, or use cpu",
        )


def runs(capability: tuple[int, int], built: Iterable[str]) -> bool:
    """Whether code for one of the targets in `built` (torch's names) runs at this capability: machine code (sm_86, sm_90a) runs on
    GPUs of the same major version that are not older, PTX (compute_120) on every GPU that is not older."""
    for name in built:
        kind, _, version = name.partition("_")
        number = int("".join(filter(str.isdigit, version)))
        of = divmod(number, 10)
        if of <= capability and (kind == "compute" or of[0] == capability[0]):
            return True
    return False
