"""Model FLOPs by formula, and the peak rates for MFU."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ldft.config import ModelConfig, Precision

# Dense bf16 tensor-core peaks in TFLOP/s from the vendor's datasheets (without sparsity), by a part of CUDA's device
# name. The first match counts, so more specific names come first. A device that is not listed has no MFU.
_PEAK_BF16_TFLOPS_PER_S = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("GH200", 989.0),
    ("H100", 989.0),
    ("H200", 989.0),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("RTX A6000", 154.8),
    ("L40S", 362.0),
)


def peak_tflops_per_s(device_name: str, precision: Precision) -> float | None:
    """Dense peak of a device in the given precision, TFLOP/s; None if unknown."""
    if precision is not Precision.bf16:
        return None
    return next((peak for part, peak in _PEAK_BF16_TFLOPS_PER_S if part in device_name), None)


def model_tflop(model: PreTrainedModel, config: ModelConfig, tokens: int, seq_len: int) -> tuple[float, float]:
    """TFLOP of one iteration on `tokens` tokens in sequences of `seq_len`: (dense, attention).

    Dense: 6 FLOPs per token and weight of each linear layer, forward and backward; 4 if the weight is frozen, since its gradient is
    not computed. Attention: 6 x seq_len x heads x head_dim per layer and token, i.e. the causal half of two products of 2 FLOPs,
    times three for forward and backward (PaLM, appendix B, halved for causality). In a layer with a window W below seq_len, a token
    attends to W (1 - W / (2 seq_len)) others, not half of seq_len. Recomputation by gradient checkpointing is not counted.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    per_token = sum((6 if m.weight.requires_grad else 4) * m.in_features * m.out_features for m in linear)
    windowed = _windowed_layers(model)
    window = min(model.config.sliding_window, seq_len) if windowed else seq_len
    seen = (config.num_layers - windowed) * seq_len / 2 + windowed * window * (1 - window / (2 * seq_len))
    return 1e-12 * tokens * per_token, 12e-12 * tokens * seen * config.num_attention_heads * config.head_dim


def _windowed_layers(model: PreTrainedModel) -> int:
    """Number of layers whose attention has a window. Families that mix layer types list them; in others, all layers have one or
    none."""
    if not getattr(model.config, "sliding_window", None):
        return 0
    kinds = getattr(model.config, "layer_types", None)
    return kinds.count("sliding_attention") if kinds else int(model.config.num_hidden_layers)
