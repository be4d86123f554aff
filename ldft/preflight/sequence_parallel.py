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
# Families in whose layers tokens meet in attention alone, which is told each token's position. In others, layers with a state or a
# convolution would start anew on each rank, without a word. A test holds each of these against whole sequences.
FAMILIES = (
    *("apertus", "arcee", "bitnet", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma3_text", "glm", "glm4"),
    *("gpt_neox", "granite", "helium", "hunyuan_v1_dense", "hyperclovax", "internlm3", "iquestcoder", "jais2", "llama"),
    *("ministral", "mistral", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen3"),
    *("seed_oss", "smollm3", "stablelm", "starcoder2"),
)
# Types of layers that are attention alone; one with a window that is longer than the sequence is as without.
_LAYER_TYPES = ("full_attention", "sliding_attention")
_NOT_CAUSAL = ("use_bidirectional_attention", "is_encoder_decoder")
# Families that drop numbers in training unless model.extra says otherwise.
_DROPS = {"seed_oss": ("attention_dropout", "residual_dropout")}


def check(config: Config, settings: dict[str, Any], kind: AttentionKind) -> None:
    """Raise CombinationError for what cannot be shared. settings: the DeepSpeed config."""
    ranks = config.launch.sequence_parallel
    if ranks == 1:
        return
    check_whatever_is_planned(config)
    if config.offload.stage != 3:
        raise CombinationError(
            KEY,
            f"{ranks}: needs offload.stage=3: DeepSpeed makes gradients {ranks} times too large below it; use offload=full",
        )
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


def check_whatever_is_planned(config: Config) -> None:
    """Raise CombinationError if so many ranks cannot share this model's sequences, whatever a plan chooses besides."""
    ranks, tokens = config.launch.sequence_parallel, config.seq_len.tokens
    if ranks == 1:
        return
    _check_model(config)
    _check_heads(config)
    if tokens % ranks:
        near = [number for number in (tokens - tokens % ranks, tokens + ranks - tokens % ranks) if number]
        raise CombinationError(
            "seq_len.tokens", f"{tokens} is not divisible by {KEY}={ranks}; use {' or '.join(map(str, near))}"
        )


def _check_model(config: Config) -> None:
    ranks, model = config.launch.sequence_parallel, config.model
    if model.num_experts:
        raise CombinationError(KEY, f"{ranks}: models with experts are not shared; use 1")
    if model.sliding_window and attention.windowed(config):
        raise CombinationError(
            KEY, f"{ranks}: windows (model.sliding_window={model.sliding_window}) are not shared; use 1"
        )
    if model.attention_softcap:
        raise CombinationError(
            KEY, f"{ranks}: soft caps (model.attention_softcap={model.attention_softcap:g}) are not shared; use 1"
        )
    if model.family not in FAMILIES:
        raise CombinationError(
            KEY,
            f"{ranks}: transformers' {model.family} is not known to mix tokens in attention alone, or not as ranks can share it; "
            "use 1, or a model.family of docs/sequence_parallel.md",
        )
    named = model.extra.get("layer_types")
    for name in named if isinstance(named, list) else ():
        if name not in _LAYER_TYPES:
            raise CombinationError(
                KEY, f"{ranks}: layers of type {name} (model.extra.layer_types) are not shared; use 1"
            )
    for name in _NOT_CAUSAL:
        if model.extra.get(name):
            raise CombinationError(
                KEY, f"{ranks}: attention is causal where sequences are shared; use 1, or leave out model.extra.{name}"
            )


def _check_heads(config: Config) -> None:
    launch, heads, key_heads = config.launch, config.model.num_attention_heads, config.model.num_key_value_heads
    possible = [n for n in range(2, heads + 1) if heads % n == 0 and (key_heads % n == 0 or n % key_heads == 0)]
    if launch.sequence_parallel in possible:
        return
    fix = ", ".join(str(number) for number in possible if launch.num_ranks % number == 0)
    if not fix:
        other = f", or launch.num_ranks={possible[0]} with {KEY}={possible[0]}" if possible else ""
        fix = f"1{other}"
    raise CombinationError(
        KEY,
        f"{launch.sequence_parallel}: the model's {heads} heads over {key_heads} key heads cannot be shared by so many; "
        f"use {fix}",
    )


def notes(config: Config) -> list[str]:
    """What a reader of the row must know: where numbers are dropped at random, ranks that share a sequence drop others."""
    if config.launch.sequence_parallel == 1:
        return []
    extra = config.model.extra
    dropping = [f"lora.dropout={config.lora.dropout:g}"] if config.lora.rank and config.lora.dropout else []
    dropping += [f"model.extra.{name}={value:g}" for name, value in extra.items() if _drops(name) and value]
    dropping += [f"{config.model.family}'s {name}" for name in _DROPS.get(config.model.family, ()) if name not in extra]
    if not dropping:
        return []
    return [f"{KEY}: {', '.join(dropping)}: dropped at random, and not the same as on another number of ranks"]


def _drops(name: str) -> bool:
    return "dropout" in name or name.endswith("pdrop")


def attention_name(kernel: str, config: Config) -> str:
    """The name of attention around which ranks exchange, as the row has it. transformers looks for a kernel of its own behind every
    name with "flash" in it: ulysses_fa2."""
    if config.launch.sequence_parallel == 1:
        return kernel
    return f"ulysses_{kernel.replace('flash_attention_', 'fa')}"


def key_heads(config: Config) -> int:
    """Key heads; where more ranks share a sequence than there are, each rank has one, and some are repeated."""
    return max(config.model.num_key_value_heads, config.launch.sequence_parallel)


def exchanged(config: Config) -> int:
    """Elements per token of a rank, 2 Q + K, in copies that an exchange needs in attention's backward pass: those before and after
    it of the tensor under way, and the keys' that came before. 0 if no sequence is shared."""
    if config.launch.sequence_parallel == 1:
        return 0
    return (2 * config.model.num_attention_heads + key_heads(config)) * config.model.head_dim
