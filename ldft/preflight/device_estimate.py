"""Expected bytes in device memory by formula: several moments of an iteration, each with its parts; the largest is the peak.

What is meant is torch's peak of allocated memory; measured ones are in tests/preflight/measured_vram.csv. CUDA's context and what
the allocator reserves beyond come on top (CONTEXT, FRAGMENTATION).

H hidden size, I the MLP's width, Q and K widths of all query and of all key heads, T tokens of a micro-batch, V vocabulary,
w bytes of the compute precision, P parameters, N ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

from ldft.config import Config, Device, OffloadDevice
from ldft.config.checkpointing import CheckpointingMode, KeepAttention
from ldft.preflight import attention, parameter_counts
from ldft.preflight.selection import Selection

Parts = dict[str, int]

# CUDA's context with its libraries on one GPU (0.5 to 0.7 GiB on an H200), and the share that the allocator needs on top of what
# is allocated: freed blocks that nothing fits into.
CONTEXT, FRAGMENTATION = int(0.7 * 2**30), 0.05


def peak_of(moments: Mapping[str, Parts]) -> Parts:
    """Bytes at the moment that needs most."""
    return max(moments.values(), key=lambda parts: sum(parts.values()))


def least_of(moments: Mapping[str, Parts]) -> Parts:
    """The same where memory is short: DeepSpeed then makes its flat copy of the weights in host memory."""
    return peak_of({name: parts for name, parts in moments.items() if name != "start"})


def moments(run: Selection) -> dict[str, Parts]:
    """Bytes of one rank in device memory at the moments of an iteration at which they may peak, by what they are for."""
    config = run.config
    base, gradients = _state(run), _gradients(config)
    model = config.model
    recomputed = config.checkpointing.recomputed(model.num_layers)
    checkpoints, whole = _checkpoints(config), model.num_layers - recomputed
    waiting = checkpoints.copy()
    if whole:
        waiting["layer inputs"] = waiting.get("layer inputs", 0) + whole * hidden_bytes(config)
        waiting["activations"] = whole * _kept(run)
    leaving = _layer_gradient(run) | _to_host(
        config, 0 if config.lora.rank else max(parameter_counts.layer_sizes(model))
    )
    inside = {"inside a layer": _inside(run, whole == 0)} | leaving
    first = {"inside a layer": _inside(run, recomputed > 0)} | leaving
    layer, output = parameter_counts.layer_parameters(model), parameter_counts.embedding_parameters(model)
    # The output projection stays where ZeRO-3 keeps what is used again so soon.
    kept = output if config.offload.stage == 3 and run.zero["stage3_max_reuse_distance"] >= output else 0
    found = {
        "loss": base | waiting | _gathered(run, output + layer) | _loss(run),
        # All inputs wait, and the last layer is computed again with the gradients of what is in it.
        "backward of the last layer": base | waiting | _gathered(run, layer + kept) | inside | _output_gradient(config),
        "backward of the first layer": base | gradients | _gathered(run, layer) | first,
        "step": base | gradients | _step(config),
        "largest gradient": base | _to_host(config, max(parameter_counts.trained_sizes(config), default=0)),
    }
    if whole and recomputed:
        again = {"inside a layer": _inside(run, True)} | leaving
        found["backward of the last checkpointed layer"] = base | checkpoints | _gathered(run, layer) | again
    if config.offload.stage in (1, 2):
        # Trained weights are copied into one block while the model still holds all (stage_1_and_2.py, flatten_on_accelerator).
        trained = parameter_counts.total(parameter_counts.trained_sizes(config))
        found["start"] = {"weights": base["weights"] + parameter_counts.width(config) * trained}
    return found


def tokens(config: Config) -> int:
    return config.train.micro_batch_size * config.seq_len.tokens


def hidden_bytes(config: Config) -> int:
    """One layer's input: w T H."""
    return parameter_counts.width(config) * tokens(config) * config.model.hidden_size


def attention_bytes(config: Config) -> int:
    """What attention returns in one layer: the output, w T Q, and the log-sum-exp, 4 B a head and token.

    Kernels widen heads to a multiple of 8, and sequences of the log-sum-exp to one of 32.
    """
    model, batch = config.model, config.train.micro_batch_size
    output = parameter_counts.width(config) * tokens(config) * model.num_attention_heads * _round_up(model.head_dim, 8)
    log_sum_exp = 4 * batch * model.num_attention_heads * _round_up(config.seq_len.tokens, 32)
    return _round_up(output, 64) + _round_up(log_sum_exp, 64)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _checkpoints(config: Config) -> Parts:
    """What waits on the device of layers that are checkpointed."""
    settings = config.checkpointing
    layers, groups = settings.recomputed(config.model.num_layers), settings.groups(config.model.num_layers)
    if groups == 0:
        return {}
    # From host memory come the input in use and the one on its way.
    inputs = min(groups, 2) if settings.mode is CheckpointingMode.cpu else groups
    parts = {"layer inputs": inputs * hidden_bytes(config)}
    if settings.keep_attention is not KeepAttention.none:
        # Of those in host memory the last group's stay; when that is under way, its own count as inside, and one is on its way.
        outputs = min(layers, settings.every) if settings.keep_attention is KeepAttention.host else layers
        parts["attention outputs"] = outputs * attention_bytes(config)
    return parts


def _state(run: Selection) -> Parts:
    """What is there all the time."""
    config = run.config
    offload, ranks, width = config.offload, config.launch.num_ranks, parameter_counts.width(config)
    trained = parameter_counts.trained_sizes(config)
    every = trained + parameter_counts.frozen_sizes(config)
    whole, share = parameter_counts.total(every), parameter_counts.split(trained, ranks)
    zero = run.zero
    parts: Parts = {}
    if offload.stage < 3:
        parts["weights"] = width * whole
    elif offload.parameters is OffloadDevice.none:
        parts["weights"] = width * parameter_counts.split(every, ranks)
    if offload.stage >= 2:
        # w x: a buffer in which gradients are made contiguous (on the CPU only what is used of it is there); without it, the copy
        # that is reduced.
        bucket = int(zero["reduce_bucket_size"])
        whole_bucket = zero["contiguous_gradients"] and config.launch.device is not Device.cpu
        parts["reduce bucket"] = width * (bucket if whole_bucket else min(bucket, parameter_counts.total(trained)))
    if offload.optimizer is OffloadDevice.none:
        # 4 B each: master weight and two moments, one with Lion.
        states = 8 if config.optimizer.name == "lion" else 12
        parts["optimizer"] = states * (parameter_counts.total(trained) if offload.stage == 0 else share)
        if offload.stage == 3:
            # fp32 gradients of one sub-group; gradients of all in compute precision.
            parts["gradients"] = width * share + 4 * min(share, int(zero["sub_group_size"]))
    elif offload.stage < 3:
        # w x: staging for the largest parameter's gradient.
        parts["gradients"] = width * max(trained)
    return parts | _mask(run)


def _mask(run: Selection) -> Parts:
    """S S (1 + w), S tokens of a sequence: the mask that SDPA gets for a window, as flags and, while in use, as numbers."""
    config = run.config
    if not attention.windowed(config) or not attention.SPECS[run.attention].masks_windows:
        return {}
    return {"attention mask": (1 + parameter_counts.width(config)) * config.seq_len.tokens**2}


def _gathered(run: Selection, least: int) -> Parts:
    """w x: whole parameters of ZeRO-3 at a time, the `least` of those at work, and as many as it may hold ahead.

    From several ranks a layer's come in one block, in the order of the ranks, and are put together beside it
    (partition_parameters.py, AllGatherCoalescedHandle).
    """
    config = run.config
    offload = config.offload
    if offload.stage < 3 or (config.launch.num_ranks == 1 and offload.parameters is OffloadDevice.none):
        return {}
    whole = parameter_counts.num_parameters(config.model)
    live = min(whole, max(least, int(run.zero["stage3_max_live_parameters"])))
    parts = {"gathered weights": parameter_counts.width(config) * live}
    if config.launch.num_ranks > 1:
        parts["weights on their way"] = parameter_counts.width(config) * parameter_counts.layer_parameters(config.model)
    return parts


def _gradients(config: Config) -> Parts:
    """Gradients that wait on the device at the end of the backward pass, w P or less, and are not there at its start."""
    offload, width = config.offload, parameter_counts.width(config)
    trained = parameter_counts.trained_sizes(config)
    if offload.stage < 2:
        return {"gradients": width * parameter_counts.total(trained)}
    if offload.stage == 2 and offload.optimizer is OffloadDevice.none:
        return {"gradients": width * parameter_counts.split(trained, config.launch.num_ranks)}
    return {}


def _output_gradient(config: Config) -> Parts:
    """w V H: a tied output projection's gradient waits for the embedding's; another one is reduced at once."""
    if not config.model.tie_word_embeddings or config.lora.rank:
        return {}
    return {
        "output projection's gradient": parameter_counts.width(config)
        * parameter_counts.embedding_parameters(config.model)
    }


def _step(config: Config) -> Parts:
    """4 P/N: the gradients in fp32, without offload and below stage 3."""
    if config.offload.optimizer is not OffloadDevice.none or config.offload.stage == 3:
        return {}
    whole, ranks = parameter_counts.total(parameter_counts.trained_sizes(config)), config.launch.num_ranks
    return {"fp32 gradients": 4 * (whole if config.offload.stage == 0 else whole // ranks)}


def _inside(run: Selection, recomputed: bool) -> int:
    """One layer in its backward pass: w T (5 H + 2 Q + 2 K + 4 I), less what is kept in any case.

    The outputs of both norms, the residual between them, and two gradients take 5 H; queries, keys, values and the attention's
    output 2 Q + 2 K; the MLP's two halves, their product and its gradient 4 I. Layers that are computed again together keep theirs.
    Beside an adapter of the last one, w T (I + 2 H): a second gradient of its input, and what the adapter gets of its output's.
    """
    config = run.config
    model = config.model
    inside = parameter_counts.width(config) * tokens(config) * (
        2 * model.hidden_size + model.intermediate_size
    ) + _scores(run, 2)
    if "down_proj" in parameter_counts.adapted(config):
        inside += parameter_counts.width(config) * tokens(config) * (model.intermediate_size + 2 * model.hidden_size)
    if not recomputed:
        return inside
    every = config.checkpointing.every
    return inside + every * _kept(run) + (every - 1) * hidden_bytes(config)


def _kept(run: Selection) -> int:
    """What a layer's forward pass keeps beside its input: w T (3 H + 2 Q + 2 K + 3 I).

    With dropout each adapter keeps its own input, and a mask of a byte an element.
    """
    config = run.config
    model = config.model
    repeats = run.repeats_heads
    queries = model.num_attention_heads * model.head_dim
    keys = queries if repeats else model.num_key_value_heads * model.head_dim
    elements = 3 * model.hidden_size + 2 * queries + 2 * keys + 3 * model.intermediate_size
    kept = parameter_counts.width(config) * tokens(config) * elements + _scores(run, 4)
    if config.lora.dropout:
        inputs = sum(inputs for inputs, _ in parameter_counts.adapted(config).values())
        kept += (parameter_counts.width(config) + 1) * tokens(config) * inputs
    return kept


def _layer_gradient(run: Selection) -> Parts:
    """w x parameters of a layer, where the bucket is too small to take them."""
    config = run.config
    size = parameter_counts.layer_parameters(config.model)
    if config.lora.rank or config.offload.stage < 2 or run.zero["reduce_bucket_size"] >= size:
        return {}
    return {"a layer's gradients": parameter_counts.width(config) * size}


def _to_host(config: Config, size: int) -> Parts:
    """A gradient of `size` elements on its way to the host under ZeRO-3 (stage3.py, partition_grads and _constant_buffered_norm2).

    w for each of itself, its reduced share and what has come back from the host; and the share in fp64, 250 million elements at a
    time, of which DeepSpeed takes the norm.
    """
    if config.offload.stage != 3 or config.offload.optimizer is OffloadDevice.none:
        return {}
    share = -(-size // config.launch.num_ranks)
    width = parameter_counts.width(config)
    return {"gradient": width * (size + 2 * share), "norm of the gradient": 8 * min(share, 250_000_000)}


def _scores(run: Selection, copies: int) -> int:
    """Attention that is computed in full: w T S heads for each copy of the scores, fp32 being two."""
    config = run.config
    if not attention.SPECS[run.attention].stores_scores:
        return 0
    return (
        copies
        * parameter_counts.width(config)
        * tokens(config)
        * config.seq_len.tokens
        * config.model.num_attention_heads
    )


def _loss(run: Selection) -> Parts:
    """Around the output projection.

    Stock: logits in w and fp32, and a gradient of each: 2 T V (w + 4). Liger: the gradient of the projection, w V H, and of its
    input, w T H, and the logits of a chunk, which has about T H / V tokens, rounded up to a power of two.
    """
    config = run.config
    model, width, all_tokens = config.model, parameter_counts.width(config), tokens(config)
    if not run.liger:
        return {"logits": 2 * (width + 4) * all_tokens * model.vocab_size}
    chunks = -(-model.vocab_size // model.hidden_size)
    chunk = 1 << (-(-all_tokens // chunks) - 1).bit_length()
    gradient = 0 if config.lora.rank else width * parameter_counts.embedding_parameters(model)
    return {
        "output projection's gradient": gradient,
        "logits": hidden_bytes(config) + width * min(chunk, all_tokens) * model.vocab_size,
    }
