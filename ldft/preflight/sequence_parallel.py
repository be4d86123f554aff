"""What sequences can be shared by several ranks (launch.sequence_parallel). Imports no torch.

Each rank has a part of each sequence. Before attention, ranks exchange queries, keys and values, so that each has whole sequences
of some heads; after it, they exchange the outputs (DeepSpeed Ulysses, arXiv 2309.14509).
"""

from __future__ import annotations

from typing import Any

from ldft.config import AttentionKind, Config
from ldft.errors import CombinationError
from ldft.preflight import attention, deepspeed_managed

KEY = "launch.sequence_parallel"


def check(config: Config, settings: dict[str, Any], kind: AttentionKind) -> None:
    """Raise CombinationError for what cannot be shared. settings: the DeepSpeed config."""
    ranks, tokens, model = config.launch.sequence_parallel, config.seq_len.tokens, config.model
    if ranks == 1:
        return
    if config.offload.stage != 3:
        raise CombinationError(
            KEY,
            f"{ranks}: needs offload.stage=3: DeepSpeed makes gradients {ranks} times too large below it; use offload=full",
        )
    if tokens % ranks:
        near = [number for number in (tokens - tokens % ranks, tokens + ranks - tokens % ranks) if number]
        raise CombinationError(
            "seq_len.tokens", f"{tokens} is not divisible by {KEY}={ranks}; use {' or '.join(map(str, near))}"
        )
    heads, key_heads = model.num_attention_heads, model.num_key_value_heads
    if heads % ranks or (key_heads % ranks and ranks % key_heads):
        possible = [n for n in range(2, heads + 1) if heads % n == 0 and (key_heads % n == 0 or n % key_heads == 0)]
        raise CombinationError(
            KEY,
            f"{ranks}: the model's {heads} heads over {key_heads} key heads cannot be shared by so many; use "
            f"{', '.join(map(str, possible)) or '1'}",
        )
    if model.sliding_window and attention.windowed(config):
        raise CombinationError(
            KEY, f"{ranks}: windows (model.sliding_window={model.sliding_window}) are not shared; use 1"
        )
    if model.num_experts:
        raise CombinationError(KEY, f"{ranks}: models with experts are not shared; use 1")
    if not attention.SPECS[kind].output_can_be_kept:
        usable = ", ".join(one.name for one, spec in attention.SPECS.items() if spec.output_can_be_kept)
        raise CombinationError("attention.kind", f"{kind.name} does not work with {KEY}={ranks}; use one of {usable}")
    if not settings["zero_optimization"]["reduce_scatter"]:
        raise CombinationError(
            "offload.deepspeed.zero_optimization.reduce_scatter",
            f"false: gradients would be {ranks} times too large with {KEY}={ranks}; leave it out",
        )
    if moved := deepspeed_managed.moved_by(settings):
        raise CombinationError(KEY, f"{ranks} does not work with {moved}; use 1")


def key_heads(config: Config) -> int:
    """Key heads; where more ranks share a sequence than there are, each rank has one, and some are repeated."""
    return max(config.model.num_key_value_heads, config.launch.sequence_parallel)


def exchanged(config: Config) -> int:
    """Elements per token of a rank, 2 Q + K, in copies that an exchange needs in attention's backward pass: those before and after
    it of the tensor under way, and the keys' that came before. 0 if no sequence is shared."""
    if config.launch.sequence_parallel == 1:
        return 0
    return (2 * config.model.num_attention_heads + key_heads(config)) * config.model.head_dim
