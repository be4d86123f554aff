"""Expected bytes in device memory by formula: several moments of an iteration, each with its parts; the largest is the peak.

This estimates torch's peak of allocated memory; tests/preflight/measured_vram.csv has measured peaks. CUDA's context and memory
that the allocator reserves but does not use are added (CONTEXT, FRAGMENTATION).

H: hidden size, I: MLP width, Q and K: total widths of query heads and of key heads, T: tokens per micro-batch, V: vocabulary size,
w: bytes per number in compute precision, P: parameters, N: ranks. In a layer with experts, k: experts that compute a token, E: all
experts, I: the width of one.
"""

from __future__ import annotations

from collections.abc import Mapping

from ldft.config import Config, Device, OffloadDevice
from ldft.config.checkpointing import CheckpointingMode, KeepAttention
from ldft.preflight import attention, decoder_layers, experts, parameter_counts, sequence_parallel
from ldft.preflight.selection import Selection

Parts = dict[str, int]

# CUDA's context with its libraries on one GPU (0.5 to 0.7 GiB on an H200), and the fraction that the allocator needs beyond
# allocated memory: freed blocks too small for any request.
CONTEXT, FRAGMENTATION = int(0.7 * 2**30), 0.05


def peak_of(moments: Mapping[str, Parts]) -> Parts:
    """Parts, in bytes, of the moment that needs most."""
    return max(moments.values(), key=lambda parts: sum(parts.values()))


def least_of(moments: Mapping[str, Parts]) -> Parts:
    """The same if memory is short: DeepSpeed then makes its flat copy of the weights in host memory."""
    return peak_of({name: parts for name, parts in moments.items() if name != "start"})


def moments(run: Selection) -> dict[str, Parts]:
    """Bytes of one rank in device memory, by moment of an iteration that may be the peak, then by purpose."""
    config = run.config
    base, gradients = _state(run), _gradients(config)
    model = config.model
    recomputed = config.checkpointing.recomputed(model.num_layers)
    checkpoints, whole = _checkpoints(run), model.num_layers - recomputed
    waiting = checkpoints.copy()
    if whole:
        waiting["layer inputs"] = waiting.get("layer inputs", 0) + whole * hidden_bytes(config)
        waiting["activations"] = whole * _kept(run)
    leaving = _layer_gradient(run) | _to_host(run, 0 if config.lora.rank else max(parameter_counts.layer_sizes(model)))
    inside = {"inside a layer": _inside(run, whole == 0)} | leaving
    first = {"inside a layer": _inside(run, recomputed > 0)} | leaving
    layer, output = parameter_counts.layer_parameters(model), parameter_counts.embedding_parameters(model)
    # The output projection stays if ZeRO-3 keeps weights that are reused so soon.
    kept = output if config.offload.stage == 3 and run.zero["stage3_max_reuse_distance"] >= output else 0
    found = {
        "loss": base | waiting | _gathered(run, output + layer) | _loss(run),
        # All layer inputs are kept, and the last layer is recomputed, with the gradients of its activations.
        "backward of the last layer": base | waiting | _gathered(run, layer + kept) | inside | _output_gradient(config),
        "backward of the first layer": base | gradients | _gathered(run, layer) | first,
        "step": base | gradients | _step(config),
        "largest gradient": base | _to_host(run, max(parameter_counts.trained_sizes(config), default=0)),
    }
    if whole and recomputed:
        again = {"inside a layer": _inside(run, True)} | leaving
        found["backward of the last checkpointed layer"] = base | checkpoints | _gathered(run, layer) | again
    if config.offload.stage in (1, 2):
        # Trained weights are copied into one block while the model still holds all of them (stage_1_and_2.py,
        # flatten_on_accelerator).
        trained = parameter_counts.total(parameter_counts.trained_sizes(config))
        found["start"] = {"weights": base["weights"] + parameter_counts.width(config) * trained}
    return found


def tokens(config: Config) -> int:
    """Of one micro-batch on one rank."""
    return config.train.micro_batch_size * config.seq_len.tokens // config.launch.sequence_parallel


def hidden_bytes(config: Config) -> int:
    """One layer's input: w T H."""
    return parameter_counts.width(config) * tokens(config) * config.model.hidden_size


def attention_bytes(config: Config) -> int:
    """Bytes that attention returns in one layer: the output, w T Q, and the log-sum-exp, 4 B per head and token.

    Kernels pad heads to a multiple of 8, and the log-sum-exp's sequences to a multiple of 32.
    """
    model, batch = config.model, config.train.micro_batch_size
    output = parameter_counts.width(config) * tokens(config) * model.num_attention_heads * _round_up(model.head_dim, 8)
    heads = model.num_attention_heads // config.launch.sequence_parallel
    log_sum_exp = 4 * batch * heads * _round_up(config.seq_len.tokens, 32)
    return _round_up(output, 64) + _round_up(log_sum_exp, 64)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _checkpoints(run: Selection) -> Parts:
    """Bytes of checkpointed layers kept on the device."""
    config = run.config
    settings = config.checkpointing
    layers, groups = settings.recomputed(config.model.num_layers), settings.groups(config.model.num_layers)
    if groups == 0:
        return {}
    # Those that stay; or, of the others, the input in use and the one on its way.
    inputs = min(groups, max(2, run.device_inputs)) if settings.mode is CheckpointingMode.cpu else groups
    parts = {"layer inputs": inputs * hidden_bytes(config)}
    if settings.keep_attention is not KeepAttention.none:
        # Of those in host memory the last group's stay; when that is under way, its own count as inside, and one is on its way.
        outputs = min(layers, settings.every) if settings.keep_attention is KeepAttention.host else layers
        parts["attention outputs"] = outputs * attention_bytes(config)
    return parts


def _state(run: Selection) -> Parts:
    """Bytes that are present during the whole iteration."""
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
        # w x: a buffer that makes gradients contiguous (on the CPU only its used part takes memory); without it, the copy
        # that is reduced.
        bucket = int(zero["reduce_bucket_size"])
        whole_bucket = zero["contiguous_gradients"] and config.launch.device is not Device.cpu
        parts["reduce bucket"] = width * (bucket if whole_bucket else min(bucket, parameter_counts.total(trained)))
    if offload.optimizer is OffloadDevice.none:
        states = parameter_counts.state_bytes(config)
        parts["optimizer"] = states * (parameter_counts.total(trained) if offload.stage == 0 else share)
        if offload.stage == 3:
            # fp32 gradients of one sub-group; all gradients in compute precision.
            parts["gradients"] = width * share + 4 * min(share, int(zero["sub_group_size"]))
    elif offload.stage < 3:
        # w x: staging for the largest parameter's gradient.
        parts["gradients"] = width * max(trained)
    if run.gpu_share:
        parts["share of the optimizer"] = share_bytes(run)
    return parts | _mask(run)


def share_bytes(run: Selection) -> int:
    """Bytes of the parameters that the GPU updates under full offload (gpu_share.py): master weights and moments, 4 B each, and
    weights and gradients in compute precision."""
    return run.gpu_share * (parameter_counts.state_bytes(run.config) + 2 * parameter_counts.width(run.config))


def _mask(run: Selection) -> Parts:
    """S S (1 + w), S tokens per sequence: SDPA's mask for a window, as flags and, while in use, as numbers."""
    config = run.config
    if not attention.windowed(config) or not attention.SPECS[run.attention].masks_windows:
        return {}
    return {"attention mask": (1 + parameter_counts.width(config)) * config.seq_len.tokens**2}


def _gathered(run: Selection, least: int) -> Parts:
    """w x: parameters that ZeRO-3 gathers at a time: at least `least`, those in use, and as many as it may prefetch.

    With several ranks, a layer's shards arrive in one block, ordered by rank, and are assembled in another
    (partition_parameters.py, AllGatherCoalescedHandle).
    """
    config = run.config
    offload = config.offload
    if offload.stage < 3 or (config.launch.num_ranks == 1 and offload.parameters is OffloadDevice.none):
        return {}
    whole = parameter_counts.num_parameters(config.model)
    live = min(whole, max(least, int(run.zero["stage3_max_live_parameters"])))
    parts = {"gathered weights": parameter_counts.width(config) * live}
    if config.launch.num_ranks > 1 or run.fetches_ahead:
        # With one rank, the layer that the host has fetched ahead (fetches.py).
        parts["weights on their way"] = parameter_counts.width(config) * parameter_counts.layer_parameters(config.model)
    return parts


def _gradients(config: Config) -> Parts:
    """Gradients kept on the device at the end of the backward pass but not at its start: w P or less."""
    offload, width = config.offload, parameter_counts.width(config)
    trained = parameter_counts.trained_sizes(config)
    if offload.stage < 2:
        return {"gradients": width * parameter_counts.total(trained)}
    if offload.stage == 2 and offload.optimizer is OffloadDevice.none:
        return {"gradients": width * parameter_counts.split(trained, config.launch.num_ranks)}
    return {}


def _output_gradient(config: Config) -> Parts:
    """w V H: a tied output projection's gradient is kept until the embedding's is added; an untied one is reduced at once."""
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
    """One layer in its backward pass, less what is kept in any case: in its MLP or, later, its attention, whichever takes more.

    The MLP: w T (5 H + 2 Q + 2 K + 4 I). The outputs of both norms, the residual between them, and two gradients take 5 H; queries,
    keys, values and the attention output 2 Q + 2 K; the MLP's two halves, their product and its gradient 4 I. Layers recomputed
    together each keep theirs. An adapter on the MLP's last module adds w T (I + 2 H): a second gradient of its input, and the
    adapter's copy of its output gradient. An MLP in tiles has the arrays of one tile, and its weights' gradients in fp32.
    """
    config = run.config
    model, width = config.model, parameter_counts.width(config)
    sparse = decoder_layers.largest(model)
    elements = 2 * model.hidden_size
    if run.mlp_tiles == 1:
        of_experts = model.num_experts_per_token * (model.hidden_size + experts.expert_width(model))
        elements += of_experts if sparse else model.intermediate_size
        if "down_proj" in parameter_counts.adapted(config, sparse):
            elements += decoder_layers.linears(model, sparse)["down_proj"][0] + 2 * model.hidden_size
    mlp = width * tokens(config) * elements + (_tile(run) if run.mlp_tiles > 1 else 0)
    inside = max(mlp, _attention(run) - _kept(run)) + _scores(run, 2)
    if not recomputed:
        return inside
    every = config.checkpointing.every
    return inside + every * _kept(run) + (every - 1) * hidden_bytes(config)


def _attention(run: Selection) -> int:
    """Attention's backward pass by a fused kernel: w T (3 H + 4 Q + 4 K), 4 T Q, and 2 w T Q if heads are grouped.

    The norm's output and two gradients of the residual stream take 3 H; queries, keys, values, the output, and a gradient of each
    4 Q + 4 K. The kernel sums up the queries' gradient in fp32, and computes the gradients of keys and values for each query's head
    (cuDNN: seen in a memory snapshot of an H200; flash-attn: flash_api.cpp, mha_bwd, dk_expanded). Ranks that share a sequence
    exchange these gradients after that, where the kernel's arrays were. Scores are counted elsewhere.
    """
    config, width = run.config, parameter_counts.width(run.config)
    queries, keys = _heads(run)
    kernel = 4 * queries + (2 * width * queries if keys < queries else 0)
    kernel = max(kernel, width * sequence_parallel.exchanged(config))
    return tokens(config) * (width * (3 * config.model.hidden_size + 4 * queries + 4 * keys) + kernel)


def _heads(run: Selection) -> tuple[int, int]:
    """Q and K: elements of a token's queries, and of its keys as attention reads them."""
    model = run.config.model
    queries = model.num_attention_heads * model.head_dim
    return queries, queries if run.repeats_heads else sequence_parallel.key_heads(run.config) * model.head_dim


def _kept(run: Selection) -> int:
    """Bytes that a layer's forward pass keeps besides its input: w T (3 H + 2 Q + 2 K + 3 I); no I if the MLP runs in tiles.

    With dropout, each adapter also keeps its own input, and a mask of one byte per element.
    """
    config = run.config
    model = config.model
    queries, keys = _heads(run)
    sparse = decoder_layers.largest(model)
    elements = 3 * model.hidden_size + 2 * queries + 2 * keys
    if run.mlp_tiles == 1:
        elements += _experts(config) if sparse else 3 * model.intermediate_size
    kept = parameter_counts.width(config) * tokens(config) * elements + _scores(run, 4)
    if config.lora.dropout:
        inputs = sum(inputs for inputs, _ in parameter_counts.adapted(config, sparse).values())
        kept += (parameter_counts.width(config) + 1) * tokens(config) * inputs
    return kept


def _tile(run: Selection) -> int:
    """w T (8 I + 2 H) / n for one of n tiles: both halves, the activation, the product, and a gradient of each; and of the weights'
    gradients the sums in fp32 and their rounded copies, 6 B each."""
    model = run.config.model
    size = -(-tokens(run.config) // run.mlp_tiles)
    arrays = parameter_counts.width(run.config) * size * (8 * model.intermediate_size + 2 * model.hidden_size)
    return arrays + (0 if run.config.lora.rank else 6 * 3 * model.intermediate_size * model.hidden_size)


def _experts(config: Config) -> int:
    """Elements a token that a layer's experts keep: k (2 H + 4 I) + 3 E, and H + 4 times its width if there is a shared expert.

    Each of the k experts gets a copy of the token, H, and returns H; it keeps both halves of its MLP, the activation of one, and
    their product, some families more. The router keeps its logits and probabilities, the latter in fp32.
    """
    model = config.model
    each = 2 * model.hidden_size + decoder_layers.of(model).kept_by_expert * experts.expert_width(model)
    shared = decoder_layers.shared_width(model)
    return (
        model.num_experts_per_token * each + 3 * model.num_experts + (model.hidden_size + 4 * shared if shared else 0)
    )


def _layer_gradient(run: Selection) -> Parts:
    """w x parameters of a layer, if the bucket is too small for them."""
    config = run.config
    size = parameter_counts.layer_parameters(config.model)
    if config.lora.rank or config.offload.stage < 2 or run.zero["reduce_bucket_size"] >= size:
        return {}
    return {"a layer's gradients": parameter_counts.width(config) * size}


def _to_host(run: Selection, size: int) -> Parts:
    """A gradient of `size` elements on its way to the host under ZeRO-3 (stage3.py, partition_grads and _constant_buffered_norm2).

    w per element for the gradient itself. With DeepSpeed's own step also for its reduced share and the copy that is read back; and
    the share in fp64, 250 million elements at a time, for its norm.
    """
    config = run.config
    if config.offload.stage != 3 or config.offload.optimizer is OffloadDevice.none:
        return {}
    share = -(-size // config.launch.num_ranks)
    width = parameter_counts.width(config)
    if run.shares_gradients:
        return {"gradient": width * size}
    return {"gradient": width * (size + 2 * share), "norm of the gradient": 8 * min(share, 250_000_000)}


def _scores(run: Selection, copies: int) -> int:
    """Attention that stores all scores: w T S heads for each copy of them; an fp32 copy counts as two."""
    config = run.config
    if not attention.SPECS[run.attention].stores_scores:
        return 0
    copy = parameter_counts.width(config) * tokens(config) * config.seq_len.tokens * config.model.num_attention_heads
    return copies * copy


def _loss(run: Selection) -> Parts:
    """Bytes around the output projection and the loss.

    Stock: logits in compute precision and fp32, and a gradient of each: 2 T V (w + 4). Liger: the gradients of the projection,
    w V H, and of its input, w T H, and the logits of a chunk of about T H / V tokens, rounded up to a power of two.
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
