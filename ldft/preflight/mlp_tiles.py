"""Chooses in how many tiles the MLP of a layer runs. Imports no torch.

Tiles cost no arithmetic (training/tiled_mlp.py), but each is a product of its own and adds its part of the weights' gradients in
fp32. So by default short inputs have none, and long ones sixteen: more would save little, since by then other parts are larger.
"""

from __future__ import annotations

from ldft.config import Config
from ldft.errors import CombinationError, ConfigError
from ldft.preflight import decoder_layers, zero_buckets

KEY = "kernels.mlp_tiles"
_TILES, _LEAST_TOKENS = 16, 4096


def choose(config: Config) -> int:
    """Tiles of each MLP; 1: none. Raises ConfigError for a number that is not possible."""
    asked, obstacle = config.kernels.mlp_tiles, _obstacle(config)
    tokens = config.train.micro_batch_size * config.seq_len.tokens
    if asked is None:
        return _TILES if tokens >= _TILES * _LEAST_TOKENS and not obstacle else 1
    if not 1 <= asked <= tokens:
        raise ConfigError(KEY, f"{asked}: use 1 to {tokens}, the tokens of a micro-batch, or null")
    if asked > 1 and obstacle:
        raise CombinationError(KEY, f"{asked}: {obstacle}; use 1, or leave it at null")
    return asked


def skips_in_recomputation(config: Config) -> bool:
    """Whether a layer adds its MLP's output to the residual stream as it is, so that recomputing the layer does not need it."""
    return not decoder_layers.of(config.model).norm_after_mlp


def _obstacle(config: Config) -> str:
    checkpointing, count = config.checkpointing, config.model.num_layers
    if config.model.family not in decoder_layers.FAMILIES:
        return f"the MLP of model.family={config.model.family} is not known"
    if config.model.num_experts:
        return "experts compute their tokens by themselves"
    if checkpointing.recomputed(count) < count:
        return "only recomputed layers have tiles, and checkpointing leaves some"
    if config.lora.rank and config.lora.dropout:
        return "the dropout of adapters (lora.dropout) would draw other numbers"
    if config.offload.stage == 3 and not zero_buckets.whole_layers(config):
        return "under ZeRO-3 it needs the weights of whole layers, which are not fetched together here"
    return ""
