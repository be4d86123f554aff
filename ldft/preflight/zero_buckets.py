"""How much of the model ZeRO-3 keeps on the device at once, and how many gradients it sends off together. Without torch.

Read in DeepSpeed 0.19.8 (runtime/zero: stage3.py, partitioned_param_coordinator.py, parameter_offload.py). With parameters in host
memory and long sequences a layer computes for ten times as long as its weights travel, so most of what DeepSpeed's defaults hold
ahead is device memory for nothing:

- stage3_max_live_parameters: each module that starts fetches up to stage3_prefetch_bucket_size more, until so many are on the
  device. They cost their bytes; DeepSpeed's 1e9 are 2 GB. What they buy is short, since Python runs ahead of the device and
  starts the next copy as early as a prefetch would. Two layers here: the one at work and the next.
- stage3_max_reuse_distance: a weight that is used again within so many is not released. Two layers is what lies between the
  recomputation of a layer and its backward pass, so that nothing is fetched twice there; more keeps the last layers during the
  loss, when the device is fullest.
- reduce_bucket_size: gradients are collected until the bucket is full, then copied together, reduced, and sent to the host.
  A bucket of one gradient is not copied, and a gradient larger than the bucket makes one by itself: so the bucket is the largest
  matrix of a layer, and the embedding, the largest gradient of all, goes alone. Between GPUs that is tens of MB a message.
- contiguous_gradients: the collecting is done in a buffer of the bucket's size, which is allocated for good. ZeRO-3 copies
  again to reduce (reduce_scatter), so the buffer saves nothing; stages 1 and 2 do reduce out of it.
- stage3_param_persistence_threshold: weights below it stay on the device (norms and biases: well below 0.1% of the bytes), which
  spares a fetch of a few KB each, and its wait.
- with parameters in swap files, each weight that is on the device occupies one of a few buffers for reading: nothing is held
  then that is not being used. A sub-group's fp32 states pass through host memory whole.
- sub_group_size: the update runs over one group after the other, and nothing overlaps. More groups are more calls; a group
  never splits a weight, so none can be made to fit a cache (measured: one group a weight, 1.28 s against 1.20 s for 3B).
"""

from __future__ import annotations

from ldft.config import Config, ModelConfig, OffloadDevice
from ldft.preflight.parameter_counts import layer_parameters

# DeepSpeed's own defaults, written out. All in elements.
DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "sub_group_size": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
}
# Below this (10 MB in 16 bits) memory does not matter, and small models wait for calls, not for copies.
_LEAST = 5_000_000


def largest_matrix(model: ModelConfig) -> int:
    """Elements of the largest weight of a decoder layer."""
    return model.hidden_size * max(model.intermediate_size, model.num_attention_heads * model.head_dim)


def sizes(config: Config) -> dict[str, int | bool]:
    """Keys of `zero_optimization` for stage 3.

    DeepSpeed's defaults where parameters stay on the device, and under a DeepSpeed file: its author counted on them.
    """
    if config.offload.parameters is OffloadDevice.none or config.offload.deepspeed_file:
        return {**DEFAULTS, "contiguous_gradients": True}
    layer, matrix = layer_parameters(config.model), largest_matrix(config.model)
    fitted = {
        "reduce_bucket_size": matrix,
        "stage3_prefetch_bucket_size": matrix,
        "stage3_max_live_parameters": 2 * layer,
        "stage3_max_reuse_distance": 2 * layer,
    }
    chosen = DEFAULTS | {name: min(max(_LEAST, value), DEFAULTS[name]) for name, value in fitted.items()}
    if config.offload.parameters is OffloadDevice.nvme:
        held = ("stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance")
        chosen |= dict.fromkeys(held, 0) | {"sub_group_size": 100_000_000}
    return {**chosen, "contiguous_gradients": False}
