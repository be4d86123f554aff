"""Expected bytes in device memory by formula: several moments of an iteration, each with its parts; the largest is the peak.

This estimates torch's peak of allocated memory; tests/preflight/measured_vram.csv has measured peaks. CUDA's context and memory
that the allocator reserves but does not use are added (CONTEXT, FRAGMENTATION).

H: hidden size, T: tokens per micro-batch, V: vocabulary size, w: bytes per number in compute precision, P: parameters, N: ranks.
layer_memory.py has what lies in a layer, deepspeed_gathering.py which weights are there.
"""

from __future__ import annotations

from collections.abc import Mapping

from ldft.config import Config, Device, OffloadDevice
from ldft.config.checkpointing import CheckpointingMode, KeepAttention
from ldft.preflight import attention, decoder_layers, deepspeed_gathering, layer_memory, parameter_counts
from ldft.preflight.layer_memory import hidden_bytes
from ldft.preflight.selection import Selection

Parts = dict[str, int]

# CUDA's context with its libraries on one GPU (0.5 to 0.7 GiB on an H200), and the fraction that the allocator needs beyond
# allocated memory: freed blocks too small for any request.
CONTEXT, FRAGMENTATION = int(0.7 * 2**30), 0.05


def peak_of(moments: Mapping[str, Parts]) -> Parts:
    """Parts, in bytes, of the moment that needs most."""
    return max(moments.values(), key=_size)


def _size(parts: Parts) -> int:
    return sum(parts.values())


def least_of(moments: Mapping[str, Parts]) -> Parts:
    """The same if memory is short: DeepSpeed then makes its flat copy of the weights in host memory."""
    return peak_of({name: parts for name, parts in moments.items() if name != "start"})


def moments(run: Selection) -> dict[str, Parts]:
    """Bytes of one rank in device memory, by moment of an iteration that may be the peak, then by purpose."""
    config = run.config
    base, gradients = _state(run), _gradients(config)
    model = config.model
    recomputed = config.checkpointing.recomputed(model.num_layers)
    whole = model.num_layers - recomputed
    kept_whole = {"activations": whole * layer_memory.kept(run)} if whole else {}
    weights = _gathered(run)
    # Of the layer under way and of the one below it, whose weights may come together with the embedding's.
    inputs = {"layer inputs": min(2, model.num_layers) * hidden_bytes(config)}
    # Gradients that are no part of a buffer leave in the backward pass.
    before = base.copy()
    if config.offload.stage >= 2 and not run.zero["contiguous_gradients"]:
        del before["reduce bucket"]
    found = {
        # The weights of the last layers may be there together with the output projection's.
        "forward of the last layers": before
        | _waiting(run, under_way=whole == 0)
        | kept_whole
        | weights["forward"]
        | ({} if whole else {"inside a layer": layer_memory.forward(run)}),
        "loss": before | _waiting(run) | kept_whole | weights["loss"] | _loss(run),
        # All layer inputs are kept, and the last layer is recomputed, with the gradients of its activations.
        "backward of the last layer": base
        | _waiting(run, under_way=whole == 0)
        | kept_whole
        | weights["last layer"]
        | _inside(run, whole == 0)
        | _output_gradient(config),
        "backward of the first layers": base
        | inputs
        | gradients
        | weights["other layers"]
        | _inside(run, recomputed > 0)
        | (_output_gradient(config) if config.offload.stage == 3 else {}),
        "step": base | gradients | _step(config),
        "largest gradient": base | weights["embedding"] | _largest_gradient(run),
    }
    if whole and recomputed:
        again = base | _waiting(run, whole=False, under_way=True) | weights["other layers"] | _inside(run, True)
        found["backward of the last checkpointed layer"] = again
    if config.offload.stage in (1, 2):
        # Trained weights are copied into one block while the model still holds all of them (stage_1_and_2.py,
        # flatten_on_accelerator).
        trained = parameter_counts.total(parameter_counts.trained_sizes(config))
        found["start"] = {"weights": base["weights"] + parameter_counts.width(config) * trained}
    return found


def _waiting(run: Selection, *, whole: bool = True, under_way: bool = False) -> Parts:
    """Layer inputs and attention outputs kept on the device for the backward pass.

    whole: with the inputs of layers that are not recomputed. under_way: while the last checkpointed group is recomputed, so that
    its own outputs count as inside it.
    """
    config = run.config
    settings, count = config.checkpointing, config.model.num_layers
    layers, groups = settings.recomputed(count), settings.groups(count)
    # Those that stay; or, of the others, the input in use and the one on its way.
    inputs = min(groups, max(2, run.device_inputs)) if settings.mode is CheckpointingMode.cpu else groups
    parts = {"layer inputs": (inputs + (count - layers if whole else 0)) * hidden_bytes(config)}
    if groups and settings.keep_attention is not KeepAttention.none:
        # Of those in host memory the last group's stay, and when that is under way, one is on its way.
        group = min(layers, settings.every)
        outputs = group if settings.keep_attention is KeepAttention.host else layers - (group if under_way else 0)
        parts["attention outputs"] = outputs * layer_memory.attention_bytes(config)
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


def _gathered(run: Selection) -> dict[str, Parts]:
    """w x parameters that ZeRO-3 has copied to the device, by what is computed then."""
    config = run.config
    if config.offload.stage < 3 or (config.launch.num_ranks == 1 and config.offload.parameters is OffloadDevice.none):
        return {name: {} for name in ("forward", "loss", "last layer", "other layers", "embedding")}
    found, width = deepspeed_gathering.of(run), parameter_counts.width(config)
    return {
        "forward": {"gathered weights": width * found.forward},
        "loss": {"gathered weights": width * found.loss},
        "last layer": {"gathered weights": width * found.last_layer},
        "other layers": {"gathered weights": width * found.other_layers},
        "embedding": {"gathered weights": width * found.embedding},
    }


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


def _inside(run: Selection, recomputed: bool) -> Parts:
    """A layer's backward pass at the moment that needs most, with the gradients of its weights that are there then.

    Where whole layers are fetched, their gradients leave together at the layer's end; until then those of the MLP's last matrix lie
    beside the MLP's backward pass, and those of all matrices behind attention beside attention's.
    """
    config = run.config
    width, hidden = parameter_counts.width(config), hidden_bytes(config)
    mlp, of_attention = layer_memory.backward(run, recomputed)
    if config.lora.rank or not run.fetches_whole_layers:
        return {"inside a layer": max(mlp, of_attention)} | _gradients_of_a_layer(run)
    largest = decoder_layers.largest(config.model)
    sizes = {name: inputs * outputs for name, (inputs, outputs) in largest.linears.items()}
    behind = sum([*sizes.values()][max(0, largest.of_attention - 1) :])
    # Tiles have their own sums.
    last = sizes.get(decoder_layers.last_product(config.model, largest), 0) if run.mlp_tiles == 1 else 0
    layer = parameter_counts.layer_parameters(config.model)
    together = config.checkpointing.every - 1 if recomputed else 0
    end = 2 * hidden + together * (layer_memory.kept(run) + hidden)
    leaving = _to_host(run, min(layer, int(run.zero["reduce_bucket_size"])))
    return max(
        {"inside a layer": mlp, "a layer's gradients": width * last},
        {"inside a layer": of_attention, "a layer's gradients": width * behind},
        {"inside a layer": end, "a layer's gradients": width * layer} | leaving,
        key=_size,
    )


def _largest_gradient(run: Selection) -> Parts:
    """The embedding's gradient, or the largest of the adapters', at the end of the backward pass.

    Under ZeRO-3 a tied output projection's is there until both are added. DeepSpeed's own step then reads this rank's share back to
    the device, for its norm. Offload in stages 1 and 2 takes the norm of a parameter's part on this rank at once, in fp64
    (stage_1_and_2.py, set_norm_for_param_grad_in_gpu).
    """
    config = run.config
    trained, width, ranks = (
        parameter_counts.trained_sizes(config),
        parameter_counts.width(config),
        config.launch.num_ranks,
    )
    largest, offloaded = max(trained, default=0), config.offload.optimizer is not OffloadDevice.none
    if config.offload.stage < 3:
        part = -(-parameter_counts.total(trained) // ranks)
        return {"norm of the gradient": 8 * min(largest, part)} if offloaded else {}
    both = {"gradient": width * largest} | _output_gradient(config)
    if run.shares_gradients or not offloaded:
        return both
    share = -(-largest // ranks)
    norm = {"gradient": width * (largest + share), "norm of the gradient": 8 * min(share, 250_000_000)}
    return max(both, norm, key=_size)


def _gradients_of_a_layer(run: Selection) -> Parts:
    """w x parameters of a layer, if the bucket is too small for them. Under ZeRO-3 each leaves by itself, so only the largest lies
    beside the bucket; not so a layer's experts, which are computed together."""
    config = run.config
    if config.lora.rank or config.offload.stage < 2:
        return {}
    model, width = config.model, parameter_counts.width(config)
    if config.offload.stage == 3 and config.offload.optimizer is not OffloadDevice.none and not model.num_experts:
        return {"gradient": width * max(parameter_counts.layer_sizes(model))}
    size = parameter_counts.layer_parameters(model)
    return {} if run.zero["reduce_bucket_size"] >= size else {"a layer's gradients": width * size}


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


def _loss(run: Selection) -> Parts:
    """Bytes around the output projection and the loss.

    Stock: logits in compute precision and fp32, and a gradient of each: 2 T V (w + 4). Liger: the gradients of the projection,
    w V H, and of its input, w T H, and the logits of a chunk of about T H / V tokens, rounded up to a power of two.
    """
    config = run.config
    model, width, all_tokens = config.model, parameter_counts.width(config), layer_memory.tokens(config)
    if not run.liger:
        return {"logits": 2 * (width + 4) * all_tokens * model.vocab_size}
    chunks = -(-model.vocab_size // model.hidden_size)
    chunk = 1 << (-(-all_tokens // chunks) - 1).bit_length()
    gradient = 0 if config.lora.rank else width * parameter_counts.embedding_parameters(model)
    return {
        "output projection's gradient": gradient,
        "logits": hidden_bytes(config) + width * min(chunk, all_tokens) * model.vocab_size,
    }
