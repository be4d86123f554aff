"""Attention kernels that transformers does not include, one file per kernel, with its NAME and a function `register`."""

from __future__ import annotations

from ldft.training.attention_kernels import cudnn, repeated_heads

_REGISTER = {module.NAME: module.register for module in (cudnn, repeated_heads)}
NAMES = frozenset(_REGISTER)


def register(name: str) -> None:
    """Make transformers know an attention by name, if it is one of these; others it knows already."""
    if name in _REGISTER:
        _REGISTER[name]()
