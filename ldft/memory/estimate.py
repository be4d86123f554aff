"""Expected bytes by formula, before anything runs. Without torch.

What stock DeepSpeed keeps per parameter with AdamW: 4 B master weight, 4 B master gradient and 4 + 4 B moments in fp32; in
compute precision the weight, and with ZeRO-3 offload a gradient that waits for accumulation (read in its source, 0.19.8).
"""

from __future__ import annotations

from dataclasses import dataclass

from ldft.config import Config, ModelConfig, OffloadDevice, Precision
from ldft.config.checkpointing import CheckpointingMode


@dataclass(frozen=True, slots=True)
class _Family:
    """What sets a family's parameter count apart from Llama's."""

    qkv_bias: bool = False
    norms_per_layer: int = 2


# Families whose count is exact, which a test compares with transformers' own. Others are counted as Llama.
FAMILIES = {
    "llama": _Family(),
    "mistral": _Family(),
    "phi3": _Family(),
    "qwen2": _Family(qkv_bias=True),
    "gemma2": _Family(norms_per_layer=4),
}


def layer_parameters(model: ModelConfig) -> int:
    """Parameters of one decoder layer."""
    family = FAMILIES.get(model.family, _Family())
    queries, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    attention = 2 * model.hidden_size * queries + 2 * model.hidden_size * keys
    biases = queries + 2 * keys if family.qkv_bias else 0
    norms = family.norms_per_layer * model.hidden_size
    return attention + biases + 3 * model.hidden_size * model.intermediate_size + norms


def num_parameters(model: ModelConfig) -> int:
    """Parameters of the model, a tied embedding counted once."""
    embeddings = (1 if model.tie_word_embeddings else 2) * model.vocab_size * model.hidden_size
    return embeddings + model.num_layers * layer_parameters(model) + model.hidden_size


def _compute_bytes(config: Config) -> int:
    return 4 if config.train.precision is Precision.fp32 else 2


def layer_input_bytes(config: Config) -> int:
    """Bytes of one decoder layer's input, of one micro-batch."""
    tokens = config.train.micro_batch_size * config.seq_len.tokens
    return _compute_bytes(config) * tokens * config.model.hidden_size


def checkpoint_bytes(config: Config) -> int:
    """Bytes of layer inputs that wait in one rank's host memory: those of all groups of layers but the last."""
    if config.checkpointing.mode is not CheckpointingMode.cpu:
        return 0
    return (config.checkpointing.groups(config.model.num_layers) - 1) * layer_input_bytes(config)


def host_bytes(config: Config) -> dict[str, int]:
    """Bytes of one rank in host memory by role; roles that stay on the device are missing."""
    share = num_parameters(config.model) // config.launch.num_ranks
    roles: dict[str, int] = {}
    if config.offload.optimizer is OffloadDevice.cpu:
        roles |= {name: 4 * share for name in ("master_weights", "master_gradients", "momentum", "variance")}
        roles["compute_gradients"] = _compute_bytes(config) * share
    if config.offload.parameters is OffloadDevice.cpu:
        roles["compute_weights"] = _compute_bytes(config) * share
    if checkpoint_bytes(config):
        roles["activations"] = checkpoint_bytes(config)
    return roles


def device_bytes(config: Config) -> dict[str, int]:
    """Bytes of one rank in device memory at their peak, by what they are for. Buckets and fragmentation are not in it."""
    model, offload, ranks = config.model, config.offload, config.launch.num_ranks
    parameters, width = num_parameters(model), _compute_bytes(config)
    share = parameters // ranks
    tokens = config.train.micro_batch_size * config.seq_len.tokens
    parts: dict[str, int] = {}
    if offload.stage < 3:
        parts["weights"] = width * parameters
    else:
        if offload.parameters is OffloadDevice.none:
            parts["weights"] = width * share
        # The module at work and the next one, whole: two layers, or embedding and output projection.
        parts["gathered weights"] = 2 * width * max(layer_parameters(model), model.vocab_size * model.hidden_size)
    if offload.optimizer is OffloadDevice.none:
        parts["gradients"] = width * (parameters if offload.stage < 2 else share)
        parts["optimizer"] = 12 * (parameters if offload.stage == 0 else share)
    elif offload.stage == 1:
        parts["gradients"] = width * parameters
    layer_input = layer_input_bytes(config)
    # Inside a layer: norms and residuals (6 hidden), queries, keys, values and output, three MLP products and their activation.
    heads = (2 * model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim
    inside = width * tokens * (6 * model.hidden_size + heads + 4 * model.intermediate_size)
    if config.checkpointing.mode is CheckpointingMode.none:
        parts["activations"] = model.num_layers * (layer_input + inside)
    else:
        waiting = config.checkpointing.groups(model.num_layers)
        if config.checkpointing.mode is CheckpointingMode.cpu:
            waiting = min(waiting, 2)  # the one in use and the one on its way
        every = config.checkpointing.every
        parts["activations"] = waiting * layer_input + every * inside + (every - 1) * layer_input
    # In compute precision and, for the loss, in fp32; and the gradient of each.
    parts["logits"] = 2 * (width + 4) * tokens * model.vocab_size
    return parts
