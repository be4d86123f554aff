"""Which attention runs: the one place of the choice. Without torch: the parent refuses with it, the worker builds with it."""

from __future__ import annotations

from importlib import metadata

from ldft import environment
from ldft.config import AttentionKind, Config, Device, Precision
from ldft.config.checkpointing import KeepAttention
from ldft.errors import CombinationError, ConfigError

Capability = tuple[int, int]

# Distributions that transformers looks for by name, how to get them, and the compute capability they start at (transformers,
# modeling_flash_attention_utils.py; flash-attn's README for version 2).
_PACKAGES: dict[AttentionKind, tuple[str, str, Capability]] = {
    AttentionKind.flash_attention_2: ("flash-attn", "pip install 'ldft[flash]' --no-build-isolation", (8, 0)),
    AttentionKind.flash_attention_3: ("flash-attn-3", "build hopper/ of github.com/Dao-AILab/flash-attention", (8, 0)),
    AttentionKind.flash_attention_4: ("flash-attn-4", "pip install --pre flash-attn-4", (9, 0)),
}
# Families of soft caps, for which transformers has no SDPA even where the caps are set to 0.
_CAPPED_FAMILIES = ("gemma2", "vaultgemma")
# Those that are one operator known to keep_attention.py.
_KEPT = (AttentionKind.sdpa, AttentionKind.sdpa_cudnn, AttentionKind.flash_attention_2)
_CUDNN_FROM: Capability = (8, 0)
# torch's flash kernel, which reads grouped heads, starts there (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
_GROUPED_FROM: Capability = (8, 0)
# cuDNN's kernels are the fastest on the data-centre generations Hopper and Blackwell. Wider heads than this run on Hopper only,
# and slower; torch's limits are in aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (check_cudnn_tensor_shapes).
_CUDNN_FASTEST_ON = (9, 10)
_CUDNN_HEAD_DIM = 128
_WIDEST_HEAD_DIM = 256


def _installed(kind: AttentionKind) -> bool:
    try:
        metadata.distribution(_PACKAGES[kind][0])
    except metadata.PackageNotFoundError:
        return False
    return True


def choose(config: Config) -> AttentionKind:
    """The implementation for this model on this machine: what attention.kind names, or the fastest that both support.

    Raises ConfigError where the one that is asked for cannot run here, or its output cannot be kept.
    """
    kind = _choice(config)
    keep = config.checkpointing.keep_attention
    if keep is not KeepAttention.none and kind not in _KEPT:
        raise CombinationError(
            "checkpointing.keep_attention",
            f"{keep.name}: the output of {kind.name} attention cannot be kept; use none, or an attention of "
            f"{', '.join(one.name for one in _KEPT)}",
        )
    return kind


def repeats_heads(config: Config, kind: AttentionKind) -> bool:
    """Whether keys and values are repeated for the queries of their group: where SDPA's fused kernel takes no grouped heads."""
    if kind is not AttentionKind.sdpa or config.launch.device is not Device.cuda:
        return False
    if config.model.num_attention_heads == config.model.num_key_value_heads:
        return False
    return (
        config.train.precision is Precision.fp32 or (environment.compute_capability() or _GROUPED_FROM) < _GROUPED_FROM
    )


def windowed(config: Config) -> bool:
    """Whether layers may have a window that counts. transformers makes SDPA a mask for one of just the whole sequence, too."""
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
    # SDPA knows no soft cap, and takes a window as a mask of all tokens with all tokens.
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
    if capability >= _PACKAGES[flash][2] and model.head_dim <= _WIDEST_HEAD_DIM and _installed(flash):
        return flash
    return plain


def _check(config: Config, kind: AttentionKind, capability: Capability | None) -> None:
    """Raise ConfigError where a kind that is asked for by name cannot run."""
    name, model = kind.name, config.model
    if model.attention_softcap and kind in (AttentionKind.sdpa, AttentionKind.sdpa_cudnn):
        raise CombinationError(
            "attention.kind",
            f"{name} knows no soft cap (model.attention_softcap={model.attention_softcap:g}); use eager or flash_attention_2",
        )
    if kind in (AttentionKind.sdpa, AttentionKind.eager):
        return
    if capability is None:
        raise CombinationError("attention.kind", f"{name} needs launch.device=cuda, not cpu; use sdpa or eager")
    if config.train.precision is Precision.fp32:
        raise CombinationError(
            "attention.kind", f"{name} needs train.precision=bf16 or fp16, not fp32; use sdpa or eager"
        )
    if model.head_dim > _WIDEST_HEAD_DIM or (kind is AttentionKind.sdpa_cudnn and model.head_dim % 8):
        raise CombinationError(
            "attention.kind",
            f"{name} cannot do model.head_dim={model.head_dim}; use sdpa, or heads of 8 to 256 by eights",
        )
    least = _CUDNN_FROM if kind is AttentionKind.sdpa_cudnn else _PACKAGES[kind][2]
    if capability < least:
        raise ConfigError(
            "attention.kind",
            f"{name} needs a GPU of compute capability {least[0]}.{least[1]} or newer, here is "
            f"{capability[0]}.{capability[1]}; use sdpa",
        )
    if kind in _PACKAGES and not _installed(kind):
        package, how, _ = _PACKAGES[kind]
        raise ConfigError(
            "attention.kind", f"{name} needs the package {package}, which is not installed; {how}, or use sdpa"
        )
