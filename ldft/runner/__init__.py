"""Runs one config: checks, processes, status, row. The parent imports torch only for a model that must be built to be counted."""

from __future__ import annotations

from ldft.config import ModelConfig
from ldft.preflight import decoder_layers


def _built(model: ModelConfig) -> decoder_layers.Parts:
    from ldft.training import built_parts  # takes seconds, and most runs have a family with a formula

    return built_parts.of(model)


decoder_layers.builder = _built
