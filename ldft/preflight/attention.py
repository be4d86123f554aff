"""Chooses the attention implementation. Imports no torch: the parent uses it to refuse runs, the worker to build the model."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

from ldft import environment
from ldft.config import AttentionKind, Config, Device, Precision
from ldft.config.checkpointing import KeepAttention
from ldft.errors import CombinationError, ConfigError

Capability = tuple[int, int]
REPEATED_HEADS = "sdpa_repeated_heads"
"""SDPA with keys and values repeated first, as the row has it."""


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Capabilities of an attention kind. Requests beyond them are refused."""

    least_capability: Capability | None = None
    """Lowest supported compute capability; None: also runs without a GPU, and in any precision."""
    widest_head: int | None = None
    """Largest head_dim, elements; None: any."""
    head_multiple: int = 1
    soft_cap: bool = False
    """Whether it supports soft caps on the scores (Gemma)."""
    masks_windows: bool = False
    """Whether a window needs a full mask of S x S elements."""
    stores_scores: bool = False
    """Whether it stores all S x S scores at once."""
    output_can_be_kept: bool = False
    """Whether it is a single operator that training/checkpointing/keep_attention.py supports."""
    family_flag: str = "_supports_sdpa"
    """Attribute of transformers' models that says whether a family works with it; empty: every family does."""
    package: str = ""
    """Package that provides it, by the name that transformers looks for; empty: part of torch or transformers."""
    install: str = ""
    """How to install that package."""


# Kinds by name, all but auto. Capabilities and widths: transformers, modeling_flash_attention_utils.py; flash-attn's README for
# version 2; torch, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (check_cudnn_tensor_shapes).
SPECS: dict[AttentionKind, AttentionSpec] = {
    AttentionKind.sdpa: AttentionSpec(masks_windows=True, output_can_be_kept=True),
    AttentionKind.sdpa_cudnn: AttentionSpec(
        least_capability=(8, 0), widest_head=256, head_multiple=8, masks_windows=True, output_can_be_kept=True
    ),
    AttentionKind.flash_attention_2: AttentionSpec(
        least_capability=(8, 0),
        widest_head=256,
        soft_cap=True,
        output_can_be_kept=True,
        family_flag="_supports_flash_attn",
        package="flash-attn",
        install="pip install 'ldft[flash]' --no-build-isolation",
    ),
    AttentionKind.flash_attention_3: AttentionSpec(
        least_capability=(8, 0),
        widest_head=256,
        soft_cap=True,
        family_flag="_supports_flash_attn",
        package="flash-attn-3",
        install="build hopper/ of github.com/Dao-AILab/flash-attention",
    ),
    AttentionKind.flash_attention_4: AttentionSpec(
        least_capability=(9, 0),
        widest_head=256,
        soft_cap=True,
        family_flag="_supports_flash_attn",
        package="flash-attn-4",
        install="pip install --pre flash-attn-4",
    ),
    AttentionKind.eager: AttentionSpec(soft_cap=True, stores_scores=True, family_flag=""),
}
# Families with soft caps: transformers has no SDPA for them, even if the caps are 0.
_CAPPED_FAMILIES = ("gemma2", "vaultgemma")
# Families whose attention has sinks, a learned logit for each head: of the kinds here, only eager computes them.
_SINK_FAMILIES = ("gpt_oss",)
# Lowest capability for torch's flash kernel, which reads grouped heads (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
_GROUPED_FROM: Capability = (8, 0)
# cuDNN's kernels are the fastest on the data-centre generations Hopper and Blackwell. Wider heads run on Hopper only, and more
# slowly.
_CUDNN_FASTEST_ON = (9, 10)
_CUDNN_HEAD_DIM = 128


def _installed(kind: AttentionKind) -> bool:
    try:
        metadata.distribution(SPECS[kind].package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _runs_on(kind: AttentionKind, capability: Capability) -> bool:
    least = SPECS[kind].least_capability
    return least is None or capability >= least


def choose(config: Config) -> AttentionKind:
    """The implementation for this model on this machine: attention.kind if set, else the fastest that both support.

    Raises ConfigError if the requested one cannot run here, or if its output cannot be kept.
    """
    kind = _choice(config)
    keep = config.checkpointing.keep_attention
    if keep is not KeepAttention.none and not SPECS[kind].output_can_be_kept:
        raise CombinationError(
            "checkpointing.keep_attention",
            f"{keep.name}: the output of {kind.name} attention cannot be kept; use none, or an attention of "
            f"{', '.join(one.name for one, spec in SPECS.items() if spec.output_can_be_kept)}",
        )
    return kind


def repeats_heads(config: Config, kind: AttentionKind) -> bool:
    """Whether keys and values are repeated for each query of their group, because SDPA's fused kernel takes no grouped heads."""
    if kind is not AttentionKind.sdpa or config.launch.device is not Device.cuda:
        return False
    if config.model.num_attention_heads == config.model.num_key_value_heads:
        return False
    return (
        config.train.precision is Precision.fp32 or (environment.compute_capability() or _GROUPED_FROM) < _GROUPED_FROM
    )


def windowed(config: Config) -> bool:
    """Whether layers have an effective window. transformers builds a mask for SDPA even if the window equals the sequence."""
    return 0 < config.model.sliding_window <= config.seq_len.tokens


def _choice(config: Config) -> AttentionKind:
    capability = (environment.compute_capability() or (0, 0)) if config.launch.device is Device.cuda else None
    if config.attention.kind is not AttentionKind.auto:
        _check(config, config.attention.kind, capability)
        return config.attention.kind
    return _fastest(config, capability)


def _fastest(config: Config, capability: Capability | None) -> AttentionKind:
    model = config.model
    half = config.train.precision is not Precision.fp32
    if model.family in _SINK_FAMILIES:
        return AttentionKind.eager
    # SDPA does not support soft caps, and needs a full S x S mask for a window.
    capped = model.attention_softcap > 0 or model.family in _CAPPED_FAMILIES
    plain = AttentionKind.eager if capped else AttentionKind.sdpa
    if capability is None or not half:
        return plain
    if (
        capability[0] in _CUDNN_FASTEST_ON
        and not (capped or windowed(config))
        and model.head_dim <= _CUDNN_HEAD_DIM
        and model.head_dim % 8 == 0
    ):
        return AttentionKind.sdpa_cudnn
    flash = AttentionKind.flash_attention_2
    if _runs_on(flash, capability) and model.head_dim <= (SPECS[flash].widest_head or 0) and _installed(flash):
        return flash
    return plain


def _check(config: Config, kind: AttentionKind, capability: Capability | None) -> None:
    """Raise ConfigError if a kind requested by name cannot run."""
    name, model, spec = kind.name, config.model, SPECS[kind]
    if model.family in _SINK_FAMILIES and kind is not AttentionKind.eager:
        raise CombinationError(
            "attention.kind", f"{name} does not compute the attention sinks of model.family={model.family}; use eager"
        )
    if model.attention_softcap and not spec.soft_cap:
        raise CombinationError(
            "attention.kind",
            f"{name} does not support soft caps (model.attention_softcap={model.attention_softcap:g}); use eager or "
            "flash_attention_2",
        )
    least = spec.least_capability
    if least is None:
        return
    if capability is None:
        raise CombinationError("attention.kind", f"{name} needs launch.device=cuda, not cpu; use sdpa or eager")
    if config.train.precision is Precision.fp32:
        raise CombinationError(
            "attention.kind", f"{name} needs train.precision=bf16 or fp16, not fp32; use sdpa or eager"
        )
    if (spec.widest_head and model.head_dim > spec.widest_head) or model.head_dim % spec.head_multiple:
        raise CombinationError(
            "attention.kind",
            f"{name} does not support model.head_dim={model.head_dim}; use sdpa, or a multiple of 8 from 8 to 256",
        )
    if capability < least:
        raise ConfigError(
            "attention.kind",
            f"{name} needs a GPU of compute capability {least[0]}.{least[1]} or higher, this one has "
            f"{capability[0]}.{capability[1]}; use sdpa",
        )
    if spec.package and not _installed(kind):
        raise ConfigError(
            "attention.kind",
            f"{name} needs the package {spec.package}, which is not installed; {spec.install}, or use sdpa",
        )
