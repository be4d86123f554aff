"""Decides whether a run uses Liger Kernel. training/liger_kernels.py puts its kernels into the model."""

from __future__ import annotations

from importlib.util import find_spec

from ldft.config import Config, Device
from ldft.errors import CombinationError, ConfigError

# Dense decoders that Liger patches, with the cross-entropy of one linear layer, soft-capped or not, as the loss.
FAMILIES = ("gemma", "gemma2", "llama", "mistral", "phi3", "qwen2", "qwen3")
_HEAD = "lm_head"


def wanted(config: Config) -> bool:
    """Whether this run uses Liger. Raises ConfigError if it is requested but not possible."""
    asked, family = config.kernels.liger, config.model.family
    installed, cuda = find_spec("liger_kernel") is not None, config.launch.device is Device.cuda
    adapts_head = _HEAD in config.lora.target_modules
    if not asked:
        return asked is None and installed and cuda and family in FAMILIES and not adapts_head
    if not cuda:
        raise CombinationError(
            "kernels.liger", "true needs launch.device=cuda, not cpu: Triton compiles for GPUs; use false"
        )
    if family not in FAMILIES:
        raise CombinationError(
            "kernels.liger", f"true: no kernels for model.family={family}; use false, or one of {', '.join(FAMILIES)}"
        )
    if adapts_head:
        raise CombinationError(
            "kernels.liger",
            f"true: its loss needs an unmodified {_HEAD}, without lora.target_modules={_HEAD}; use false",
        )
    if not installed:
        raise ConfigError(
            "kernels.liger", "true needs the package liger-kernel; pip install liger-kernel, or use false"
        )
    return True
