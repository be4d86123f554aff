"""Refuses a model that is not the one asked for: transformers ignores keys that a family does not read, without a word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ldft.config import AttentionKind, Config, ModelConfig, rope
from ldft.errors import ConfigError
from ldft.preflight import decoder_layers, parameter_counts, windows
from ldft.terminal import plural
from ldft.training import observation
from ldft.training.architecture import REFUSED, parameters_by_layer_type, reads
from ldft.training.checkpointing import checkpointing
from ldft.training.observation import AttentionCall, Observed, Rotation, looks_at_values, watch


def outline(architecture: PretrainedConfig, model: ModelConfig) -> PreTrainedModel:
    """The model on the meta device, for `check`. Raises ConfigError if transformers cannot build it."""
    try:
        return observation.build(architecture)
    except (*REFUSED, RuntimeError) as error:  # torch's, of a size beyond its largest
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(
            "model",
            f"transformers cannot build this {model.family} ({reason}); correct it, or set what it needs under model.extra",
        ) from error


def check(network: PreTrainedModel, config: Config, kind: AttentionKind) -> None:
    """Compare a model of observation.build with the config. kind: the run's attention, never auto.

    Raises ConfigError, naming the key, for each value that did not arrive in the model.
    """
    model = config.model
    _check_sizes(network, model)
    _check_window_exists(network.config, model)
    seen = watch(network, config.seq_len.tokens)
    _check_heads(seen.attention, model)
    if seen.failure is not None and not seen.rotations:
        _explain(seen.failure, model)
    _check_rotations(seen.rotations, network, config)
    if seen.failure is not None:
        _explain(seen.failure, model)
    _check_attention(seen, model, kind)
    if seen.failure is None and seen.logit_softcap != model.logit_softcap:
        raise ConfigError("model.logit_softcap", _differs(model, model.logit_softcap, seen.logit_softcap))
    _check_count(network, model)


def _differs(model: ModelConfig, asked: Any, found: Any) -> str:
    def text(value: Any) -> str:
        return f"{value:g}" if isinstance(value, float) else str(value)

    return f"{text(asked)} does not arrive: transformers' {model.family} has {text(found)}; use that, or another model.family"


def _check_sizes(network: PreTrainedModel, model: ModelConfig) -> None:
    layers = checkpointing.decoder_layers(network)
    if layers and len(layers) != model.num_layers:
        raise ConfigError("model.num_layers", _differs(model, model.num_layers, len(layers)))
    embedding, output = network.get_input_embeddings(), network.get_output_embeddings()
    if embedding is not None:
        rows, width = embedding.weight.shape
        if rows != model.vocab_size:
            raise ConfigError("model.vocab_size", _differs(model, model.vocab_size, rows))
        if width != model.hidden_size:
            raise ConfigError("model.hidden_size", _differs(model, model.hidden_size, width))
        tied = output is not None and output.weight is embedding.weight
        if output is not None and tied != model.tie_word_embeddings:
            raise ConfigError("model.tie_word_embeddings", _differs(model, model.tie_word_embeddings, tied))
    _check_experts(layers, model)
    if layers and not model.num_experts:
        # The MLP's halves may be one matrix.
        sizes = {size for parameter in layers[-1].parameters() for size in parameter.shape}
        if not sizes & {model.intermediate_size, 2 * model.intermediate_size}:
            raise ConfigError(
                "model.intermediate_size",
                f"{model.intermediate_size} does not arrive: no weight of transformers' {model.family} is as wide; it has "
                f"{', '.join(map(str, sorted(sizes)))}",
            )


def _check_experts(layers: Sequence[nn.Module], model: ModelConfig) -> None:
    """Experts are slices of one parameter or modules of a list. At a reduced depth, all layers may be dense."""
    built = set()
    for layer in layers:
        built |= {one.shape[0] for name, one in layer.named_parameters() if "expert" in name and one.ndim == 3}
        built |= {
            len(one)
            for name, one in layer.named_modules()
            if name.endswith("experts") and isinstance(one, nn.ModuleList)
        }
    if built and model.num_experts not in built:
        raise ConfigError("model.num_experts", _differs(model, model.num_experts, max(built)))


def _check_count(network: PreTrainedModel, model: ModelConfig) -> None:
    """Estimates are made of ldft's count: by formula, or of a family without one by building it (built_parts.py)."""
    if model.family not in decoder_layers.FAMILIES:
        return
    built, counted = sum(one.numel() for one in network.parameters()), parameter_counts.num_parameters(model)
    if built != counted:
        raise ConfigError(
            "model",
            f"transformers builds {built:,} parameters of this {model.family}, ldft counts {counted:,}, and estimates would be "
            "wrong; leave out the keys of model.extra that change the layers",
        )


def _check_window_exists(architecture: PretrainedConfig, model: ModelConfig) -> None:
    """transformers fails in a layer that has a window if its length is not set."""
    kinds = getattr(architecture, "layer_types", None) or []
    if not model.sliding_window and windows.WINDOWED in kinds:
        raise windows.without_length(model, kinds)


def _explain(failure: Exception, model: ModelConfig) -> None:
    """Raise ConfigError if the model cannot run. Return if only the meta device cannot run it, which has no values to look at."""
    if looks_at_values(failure):
        return
    reason = " ".join(f"{type(failure).__name__}: {failure}".split())[:200]
    shares = [parameters.get(rope.PARTIAL, 1.0) for parameters in model.rope_parameters().values()]
    if isinstance(failure, RuntimeError) and any(share != 1 for share in shares):
        raise ConfigError(
            "model.rope_scaling.partial_rotary_factor",
            f"{min(shares)}: transformers' {model.family} rotates whole heads with this rope_type ({reason}); leave it out",
        ) from failure
    raise ConfigError(
        "model.family",
        f"transformers' {model.family} cannot run with these values ({reason}); correct them, or set what it needs under "
        "model.extra",
    ) from failure


def _check_heads(calls: list[AttentionCall], model: ModelConfig) -> None:
    for call in calls:
        for key, found in (
            ("num_attention_heads", call.heads),
            ("num_key_value_heads", call.key_value_heads),
            ("head_dim", call.head_dim),
        ):
            if found != getattr(model, key):
                raise ConfigError(f"model.{key}", _differs(model, getattr(model, key), found))


def _check_attention(seen: Observed, model: ModelConfig, kind: AttentionKind) -> None:
    if not seen.attention:
        _check_unseen(model)
        return
    for call in seen.attention:
        if (call.softcap or 0) != model.attention_softcap:
            raise ConfigError("model.attention_softcap", _differs(model, model.attention_softcap, call.softcap or 0))
    flash = kind.name.startswith("flash")
    _check_layer_types(seen.attention, model, flash)
    lengths = {_window(call, flash) for call in seen.attention}
    asked = model.sliding_window
    if lengths - {asked, 0}:
        raise ConfigError("model.sliding_window", _differs(model, asked, max(lengths - {asked})))
    if asked and asked not in lengths and seen.failure is None:
        if asked in {_window(call, not flash) for call in seen.attention}:
            fix = (
                f"{kind.name} attention is not given it; use attention.kind={'sdpa' if flash else 'flash_attention_2'}"
            )
        else:
            fix = windows.fix_of_layers(reads(model.family, "max_window_layers"))
        raise windows.reaches_no_layer(model, fix)


def _check_layer_types(calls: list[AttentionCall], model: ModelConfig, flash: bool) -> None:
    """Of layers whose type is asked for by name, each has the window of its type, or none."""
    named = model.extra.get("layer_types")
    if not model.sliding_window or not isinstance(named, list):
        return
    wanted = {windows.WINDOWED: True, windows.WHOLE: False}
    for call in calls:
        name = named[call.layer] if call.layer is not None and call.layer < len(named) else None
        if name in wanted and wanted[name] is not bool(_window(call, flash)):
            there = "none" if wanted[name] else "one"
            raise ConfigError(
                "model.extra.layer_types",
                f"{name} of layer {call.layer} does not arrive: that layer should have {'a' if wanted[name] else 'no'} window, but "
                f"transformers' {model.family} gives it {there}; use the names that this family reads",
            )


def _window(call: AttentionCall, flash: bool) -> int:
    return (call.argument_window if flash else call.mask_window) or 0


def _check_unseen(model: ModelConfig) -> None:
    """Where attention cannot be watched, refuse what transformers might ignore."""
    for key in ("sliding_window", "attention_softcap", "logit_softcap"):
        if getattr(model, key):
            raise ConfigError(
                f"model.{key}",
                f"{getattr(model, key):g}: ldft cannot see whether transformers' {model.family} follows it; use 0",
            )


def _check_rotations(rotations: list[Rotation], network: PreTrainedModel, config: Config) -> None:
    model = config.model
    by_type = parameters_by_layer_type(network.config)
    asked = model.rope_parameters()
    if not rotations:
        if model.rope_scaling:
            raise ConfigError(
                "model.rope_scaling",
                f"{model.rope_scaling}: ldft sees no rotary embedding in transformers' {model.family}; leave it out",
            )
        if model.rope_theta != ModelConfig().rope_theta:
            raise ConfigError(
                "model.rope_theta",
                f"{model.rope_theta:g}: ldft sees no rotary embedding in transformers' {model.family}; leave it out",
            )
        return
    for rotation in rotations:
        name = rotation.layer_type or ""
        built = by_type.get(name) or (getattr(network.config, "rope_parameters", None) or {})
        # Where nothing was asked for, the family's own share is rotated, and layers with a window have the family's embedding.
        parameters = (
            asked.get(name) or (asked.get("") if name in ("", "full_attention") or not by_type else built) or built
        )
        own = {"rope_theta": model.rope_theta} | {
            key: built[key] for key in ("rope_theta", rope.PARTIAL) if key in built
        }
        _check_rotation(rotation, own | parameters, network, config)
    if by_type and "" in asked and model.rope_scaling and all(one.layer_type != "full_attention" for one in rotations):
        raise ConfigError(
            "model.rope_scaling",
            f"{model.rope_scaling} reaches no layer: transformers' {model.family} with {plural(model.num_layers, 'layer')} has "
            "none of type full_attention; use more layers, or give parameters for each layer type",
        )


def _check_rotation(rotation: Rotation, parameters: dict[str, Any], network: PreTrainedModel, config: Config) -> None:
    model = config.model
    rotated = getattr(network.config, "qk_rope_head_dim", None) or model.head_dim
    inv_freq, factor = rotary_embedding(parameters, rotated, model.max_position_embeddings, config.seq_len.tokens)
    at = (
        f"model.rope_scaling.{rotation.layer_type}"
        if rotation.layer_type in model.rope_scaling
        else "model.rope_scaling"
    )
    layers = f" in layers of type {rotation.layer_type}" if rotation.layer_type else ""
    pairs = len(inv_freq)
    if len(rotation.inv_freq) not in (pairs, 2 * pairs):
        share = parameters.get(rope.PARTIAL, 1.0)
        raise ConfigError(
            f"{at}.partial_rotary_factor",
            f"{share:g} does not arrive: transformers' {model.family} rotates another share{layers} with "
            f"rope_type={parameters['rope_type']}; use that of the family, or another rope_type",
        )
    layouts = (inv_freq, torch.cat((inv_freq, inv_freq)), inv_freq.repeat_interleave(2))
    if not any(_alike(rotation.inv_freq, layout) for layout in layouts):
        key, value = at, str(parameters)
        if parameters["rope_type"] == "default" and parameters.get(rope.PARTIAL, 1.0) == 1:
            key, value = "model.rope_theta", f"{parameters['rope_theta']:g}"
        raise ConfigError(
            key,
            f"{value} does not arrive: transformers' {model.family} rotates by other angles{layers}; use another rope_type "
            "or model.family",
        )
    if not _alike(rotation.factor, torch.full_like(rotation.factor, factor)):
        raise ConfigError(
            at,
            f"{parameters} does not arrive: transformers' {model.family} scales by {float(rotation.factor[0]):g}{layers}, "
            f"not by {factor:g}; use another rope_type or model.family",
        )


def rotary_embedding(
    parameters: dict[str, Any], head_dim: int, max_position_embeddings: int, seq_len: int
) -> tuple[torch.Tensor, float]:
    """Angle per position of each rotated pair, and the scale, in a sequence of seq_len tokens.

    parameters: of one layer type, as from rope.normalised. By transformers' functions, but not through the family's code.
    """
    if parameters["rope_type"] == "default":
        dim = int(head_dim * parameters.get(rope.PARTIAL, 1.0))
        return parameters["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim), 1.0
    if "alpha" in parameters:  # HunYuan's: a larger base, whatever its rope_type is called
        base = parameters["rope_theta"] * parameters["alpha"] ** (head_dim / (head_dim - 2))
        return base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim), 1.0
    carrier = LlamaConfig(
        head_dim=head_dim, max_position_embeddings=max_position_embeddings, rope_parameters=dict(parameters)
    )
    inv_freq, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](carrier, torch.device("cpu"), seq_len=seq_len)
    if "short_mscale" in parameters:  # Phi-3.5-MoE's, in place of the factor that the formula gives
        factor = parameters["short_mscale" if seq_len <= parameters[rope.ORIGINAL] else "long_mscale"]
    return inv_freq.double(), factor


def _alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """To the precision of fp32 angles."""
    return found.shape == expected.shape and torch.allclose(found.double(), expected.double(), rtol=1e-4, atol=1e-12)
