"""ZeRO-3's sizes: how much of the model it keeps on the device at once, and how many gradients it reduces together. Imports no
torch.

Source: DeepSpeed 0.19.8 (runtime/zero: stage3.py, partitioned_param_coordinator.py, parameter_offload.py). With parameters in host
memory and long sequences, computing a layer takes ten times as long as copying its weights, so most weights that DeepSpeed's
defaults prefetch waste device memory:

- stage3_max_live_parameters: each module that starts fetches up to stage3_prefetch_bucket_size more parameters, until this many are
  on the device. They take memory (DeepSpeed's 1e9: 2 GB) but save little time, since Python runs ahead of the device and starts
  the next copy as early as a prefetch would. Here: two layers, the current one and the next.
- stage3_max_reuse_distance: a weight that is used again within this many parameters is not released. Two layers cover the distance
  between a layer's recomputation and its backward pass, so nothing is fetched twice there; a larger value would keep the last
  layers during the loss, when the device is fullest.
- leaf_module: the weights of a decoder layer are fetched together, one layer ahead, and its gradients are reduced at its end. By
  default DeepSpeed runs Python before and after each of a layer's dozen modules, in both passes and in the recomputation, and
  handles each gradient by itself. Of a 3B model at 8192 tokens that was 26 ms a layer of the backward pass; it is 13 ms now (H100).
- reduce_bucket_size: gradients are collected until the bucket is full, then copied together, reduced, and sent to the host.
  A bucket with one gradient is not copied, and a gradient larger than the bucket gets its own. So the bucket is as large as the
  largest matrix of a layer, or as a small layer, and the embedding, the largest gradient, is sent alone. Messages between GPUs are
  then tens of MB.
- contiguous_gradients: gradients are collected in a buffer of the bucket's size, which stays allocated. ZeRO-3 copies again to
  reduce (reduce_scatter), so the buffer saves nothing; stages 1 and 2 reduce from it directly.
- stage3_param_persistence_threshold: smaller weights stay on the device (norms and biases: well below 0.1% of the bytes), which
  avoids fetching a few KB each and waiting for it.
- With parameters in swap files, each weight on the device occupies one of a few read buffers, so only weights in use are kept. A
  sub-group's fp32 states pass through host memory as a whole.
- sub_group_size: the update processes the groups one after the other, without overlap. More groups mean more calls, and a group
  never splits a weight, so groups cannot be made to fit a cache (measured: one group per weight, 1.28 s against 1.20 s for 3B).
"""

from __future__ import annotations

from ldft.config import Config, OffloadDevice
from ldft.preflight import decoder_layers
from ldft.preflight.parameter_counts import adapted, layer_parameters, layer_sizes

# DeepSpeed's own defaults, written out. All in elements.
DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "sub_group_size": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
}
# How many weights are on the device besides those in use.
_HELD = ("stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance")
# A layer's gradients are collected up to this size: fewer calls, and still little memory.
_BUCKET = 64_000_000
# Below this (10 MB in 16 bits) memory does not matter, and small models are limited by calls, not by copies.
_LEAST = 5_000_000


def whole_layers(config: Config) -> bool:
    """Whether a layer's weights are fetched, and its gradients reduced, together: as what DeepSpeed calls a leaf module.

    Not if two of them are more than DeepSpeed would keep, nor if the user chose sizes, which are then meant for single matrices.
    """
    offload = config.offload
    chosen = offload.deepspeed.get("zero_optimization", {}).keys() & {*_HELD, "reduce_bucket_size", "leaf_module"}
    fetched = offload.stage == 3 and offload.parameters is OffloadDevice.cpu
    fits = 2 * layer_parameters(config.model) <= DEFAULTS["stage3_max_live_parameters"]
    return fetched and fits and not chosen and not offload.deepspeed_file and not config.model.num_experts


def leaf_modules(config: Config) -> dict[str, list[str]]:
    """Values of `zero_optimization.leaf_module`: the decoder layers, whose names end like this.

    With adapters, of the first only its MLP: the layer's input, of frozen weights, needs no gradient, and then torch calls the hook
    in which DeepSpeed reduces a leaf module's gradients before they are computed. And not that, if it may read the same input: if
    attention has no adapter, or runs beside the MLP, as in some of the families that have no formula.
    """
    if not whole_layers(config):
        return {"classes": []}
    known = config.model.family in decoder_layers.FAMILIES
    outer = "model" if known else ""  # gpt_neox.layers.0
    layers = [f"{outer}.layers.{number}" for number in range(config.model.num_layers)]
    if config.lora.rank:
        first = decoder_layers.largest(config.model)
        behind = {*[*first.linears][: first.of_attention]} & adapted(config, first).keys()
        # Nor the layers that are recomputed together with the first: their adapters would be used after they were released.
        layers[: config.checkpointing.every] = [f"{layers[0]}.mlp"] if behind and known else []
    return {"classes": [], "name_suffixes": layers}


def frees_weights_early(config: Config) -> bool:
    """Value of `zero_optimization.memory_efficient_linear`: whether a linear layer must not keep its weight for the backward pass.

    By default DeepSpeed runs each in a Python function that saves this memory, but saves its inputs only when it has computed its
    output: so a recomputation, which stops at the last tensor that it needs, computes a layer's last product in vain. Where every
    layer is recomputed right before its backward pass, its weights are on the device from the one to the other anyway.
    """
    checkpointing, count = config.checkpointing, config.model.num_layers
    recomputed = checkpointing.recomputed(count) == count and checkpointing.every == 1
    return not (whole_layers(config) and recomputed)


def sizes(config: Config) -> dict[str, int | bool]:
    """Keys of `zero_optimization` for stage 3.

    DeepSpeed's defaults if parameters stay on the device or a DeepSpeed file is given, whose author relied on them.
    """
    if config.offload.parameters is OffloadDevice.none or config.offload.deepspeed_file:
        return {**DEFAULTS, "contiguous_gradients": True}
    layer, matrix = layer_parameters(config.model), max(layer_sizes(config.model))
    together = whole_layers(config)
    fitted = {
        "reduce_bucket_size": max(matrix, min(layer, _BUCKET)) if together else matrix,
        "stage3_prefetch_bucket_size": layer if together else matrix,
        "stage3_max_live_parameters": 2 * layer,
        "stage3_max_reuse_distance": 2 * layer,
    }
    most = DEFAULTS | ({"stage3_prefetch_bucket_size": layer} if together else {})
    chosen = DEFAULTS | {name: max(_LEAST, min(value, most[name])) for name, value in fitted.items()}
    if config.offload.parameters is OffloadDevice.nvme:
        chosen |= dict.fromkeys(_HELD, 0) | {"sub_group_size": 100_000_000}
    return {**chosen, "contiguous_gradients": False}
