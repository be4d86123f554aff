"""Model FLOPs by formula."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ldft.config import ModelConfig
from ldft.training.deepspeed import layout


def columns(model: PreTrainedModel, config: ModelConfig, tokens: int, seq_len: int) -> dict[str, Any]:
    """model_tflop as columns of the row: null, and why, if it is not known."""
    try:
        dense, attention = model_tflop(model, config, tokens, seq_len)
    except UnknownError as error:
        return {"model_tflop_dense": None, "model_tflop_attention": None, "model_tflop_unknown": str(error)}
    return {"model_tflop_dense": dense, "model_tflop_attention": attention}


class UnknownError(Exception):
    """The model does something whose FLOPs this module cannot tell. One phrase: what it is."""


def model_tflop(model: PreTrainedModel, config: ModelConfig, tokens: int, seq_len: int) -> tuple[float, float]:
    """TFLOP of one iteration on `tokens` tokens in sequences of `seq_len`: (dense, attention).

    Dense: 6 FLOPs per token and weight of each linear layer, forward and backward; 4 if the weight is frozen, since its gradient is
    not computed. Of the weights of experts, those that compute the token. Attention: 6 x seq_len x heads x head_dim per layer and
    token, i.e. the causal half of two products of 2 FLOPs, times three for forward and backward (PaLM, appendix B, halved for
    causality). In a layer with a window W below seq_len, a token attends to W (1 - W / (2 seq_len)) others, not half of seq_len.
    Recomputation by gradient checkpointing is not counted. Raises UnknownError.
    """
    per_token = sum(
        (6 if weight.requires_grad else 4) * used
        for module in model.modules()
        for name, weight in module.named_parameters(recurse=False)
        if (used := _used(model, module, name, weight, config))
    )
    windowed = _windowed_layers(model)
    window = min(model.config.sliding_window, seq_len) if windowed else seq_len
    seen = (config.num_layers - windowed) * seq_len / 2 + windowed * window * (1 - window / (2 * seq_len))
    return 1e-12 * tokens * per_token, 12e-12 * tokens * seen * config.num_attention_heads * _head_width(model, config)


def _used(model: PreTrainedModel, module: nn.Module, name: str, weight: nn.Parameter, config: ModelConfig) -> float:
    """Elements of a weight that one token is multiplied with."""
    shape = layout.whole_shape(weight)
    lookup = isinstance(module, nn.Embedding) and (not config.num_experts or module is model.get_input_embeddings())
    if len(shape) < 2 or lookup or "bias" in name:
        return 0
    experts = config.num_experts
    router = name == "weight" and shape == (experts, config.hidden_size)
    if isinstance(module, nn.Linear | Conv1D) or router:
        return math.prod(shape)
    if experts and len(shape) == 3 and shape[0] == experts:
        return math.prod(shape) * config.num_experts_per_token / experts
    raise UnknownError(f"{type(module).__name__}.{name}, of shape {'x'.join(map(str, shape))}")


def _head_width(model: PreTrainedModel, config: ModelConfig) -> float:
    """Mean width of the heads in the two products of attention: queries with keys, and scores with values."""
    kinds = set(getattr(model.config, "layer_types", None) or ())
    if strange := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise UnknownError(f"layers of type {', '.join(strange)}")
    # Latent attention has keys of two parts, and values of another width.
    parts = [int(getattr(model.config, f"{part}_head_dim", None) or 0) for part in ("qk_nope", "qk_rope", "v")]
    return sum(parts) / 2 if all(parts) else config.head_dim


def _windowed_layers(model: PreTrainedModel) -> int:
    """Number of layers whose attention has a window. Families that mix layer types list them; in others, all layers have one or
    none."""
    if not getattr(model.config, "sliding_window", None):
        return 0
    kinds = getattr(model.config, "layer_types", None)
    return kinds.count("sliding_attention") if kinds else int(model.config.num_hidden_layers)
