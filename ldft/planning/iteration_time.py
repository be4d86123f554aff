"""Expected seconds of an iteration by formula. Imports no torch.

Of each layer: its matrix products, attention's, and what norms, rotary embedding, activation and residuals read and write; or the
time that Python needs to start them, if that is longer. What moves meanwhile, weights and layer inputs over the link, gradients,
hides behind that or is waited for. An update beside the forward pass is followed layer by layer: no layer starts before its weights
are updated and fetched.

H: hidden size, I: MLP width, Q and K: total widths of query heads and of key heads, T: tokens per micro-batch, V: vocabulary size,
w: bytes per number in compute precision.
"""

from __future__ import annotations

from dataclasses import dataclass

from ldft.config import Config, Device, ModelConfig, OffloadDevice
from ldft.config.checkpointing import CheckpointingMode, KeepAttention
from ldft.planning.rates import HostTime, Rates
from ldft.preflight import (
    attention,
    decoder_layers,
    experts,
    layer_memory,
    parameter_counts,
    sequence_parallel,
    windows,
    zero_buckets,
)
from ldft.preflight.decoder_layers import Layer
from ldft.preflight.selection import Selection

# Without offload, DeepSpeed (0.19) spends as much as this traffic to device memory for each parameter: copies of weights and
# gradients to fp32 and back, norms, and the update itself. Besides, Python takes as long as for so many layers. Derived from
# 0.042 s for 1.24e9 and 0.097 s for 3.21e9 parameters on an H200
# (benchmarks/results/fp16-llama3_1b-2k-h200.parquet, training-llama3_3b-32k-in-gpu-h200.parquet).
_STEP_BYTES, _STEP_LAYERS = 120.0, 5
# Python's part of a step with offload, seconds; and how long the device waits at each fetched layer even if the host is ahead, as a
# part of the host's time for the layer.
_STEP_S, _HOOKS = 0.015, 0.14
# Where DeepSpeed fetches each matrix by itself, Python takes so many times as long for a layer. So many bytes a parameter more does
# an update move: DeepSpeed's, if each matrix is a group; ldft's within stages 1 and 2, which scale gradients before and round
# weights after. From the cells offload=seed and offload=optimizer of two models on an H200 (multirun_analysis/data).
_MATRICES, _SINGLE_BYTES, _STAGE_2_BYTES = 5.0, 24, 28
# Of the rate that bench measures with a few arrays, ldft's update reaches this in training: 0.75 to 0.89 in 16 of those rows.
_REACHED = 0.83


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds of one iteration."""

    forward_s: float
    backward_s: float
    step_s: float
    update_s: float
    """The host's update; 0 without one."""
    exposed_s: float
    """Part of the iteration in which the GPU waits for that update."""
    arithmetic_s: float
    """The GPU's own work."""
    launch_s: float
    """Python and DeepSpeed, layer by layer: until then the GPU has no more work."""
    link_s: float
    """Copies in the direction that has more of them."""

    @property
    def iteration_s(self) -> float:
        return self.forward_s + self.backward_s + self.step_s

    @property
    def bound(self) -> str:
        """What takes most of the time: the GPU's arithmetic, the host's Python, the link, or the host's update."""
        parts = {
            "arithmetic": self.arithmetic_s,
            "Python": self.launch_s,
            "link": self.link_s,
            "host update": self.update_s,
        }
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True, slots=True)
class _Layer:
    """Seconds of the GPU's work in one decoder layer."""

    forward: float
    backward: float
    again: float
    """Of the recomputation, with its attention."""
    attention: float
    """Of the forward pass, attention alone."""


def predict(run: Selection, rates: Rates) -> Times:
    """Expected times of a run whose share, inputs and tiles are chosen."""
    config = run.config
    layer, count = _layer(run, rates), config.model.num_layers
    checkpointing = config.checkpointing
    recomputed = checkpointing.recomputed(count)
    again = layer.again - (layer.attention if checkpointing.keep_attention is not KeepAttention.none else 0.0)
    loss = _loss(run, rates)
    host = _host(config, rates)
    hooks = _HOOKS * rates.fetched.forward if config.offload.stage == 3 else 0.0
    exchange = _exchange(run, rates)
    work = layer.forward + hooks + exchange

    def mean_forward(speed: float) -> float:  # of a layer, if Python keeps this part of its speed
        kept, checkpointed = (max(work, seconds / speed) for seconds in (host.forward, host.checkpointed_forward))
        return ((count - recomputed) * kept + recomputed * checkpointed) / count

    ahead = mean_forward(1.0)
    back = max(layer.backward + hooks + exchange, host.backward)
    back_again = max(layer.backward + again + 2 * (hooks + exchange), host.backward + host.again)
    losses = loss, 0.0 if run.liger else 2 * loss
    # A pass begins with an idle device.
    forward_s = host.forward + count * ahead + losses[0]
    backward_s = (count - recomputed) * back + recomputed * back_again + losses[1]
    arithmetic = count * (layer.forward + layer.backward + 2 * hooks) + recomputed * (again + hooks) + sum(losses)
    launches = recomputed * (host.checkpointed_forward + host.again) + (count - recomputed) * host.forward
    launches += count * host.backward
    link = _link(run, rates)
    micro_batches = config.train.gradient_accumulation_steps
    later_forward = max(forward_s, *link.forward)
    backward = max(backward_s, *link.backward) + link.tail
    update_s, step_s = _update(run, rates), _step(run, rates)
    if run.overlap_step:
        # The pass's own copies go through the same host memory, which gives at least what each of both was seen to reach.
        memory = max(sum(rates.host.cpu.values()), rates.host.link_h2d + rates.host.link_d2h)
        update_s += link.moved * min(1.0, update_s / later_forward) / memory
        slowed = mean_forward(rates.launches_beside)
        first_forward = _beside(run, host.forward, (ahead, slowed), loss, update_s, link.fetch)
        first_forward = max(first_forward, later_forward)
        exposed = first_forward - later_forward
    else:
        first_forward, exposed = later_forward, update_s
        step_s += update_s
    return Times(
        forward_s=first_forward + (micro_batches - 1) * later_forward,
        backward_s=micro_batches * backward,
        step_s=step_s,
        update_s=update_s,
        exposed_s=exposed,
        arithmetic_s=micro_batches * arithmetic,
        launch_s=micro_batches * launches,
        link_s=micro_batches * (max(link.forward) + max(link.backward)),
    )


def _host(config: Config, rates: Rates) -> HostTime:
    """Python's time for a layer. What a checkpointed one takes longer is no work of DeepSpeed's."""
    if config.offload.stage < 3:
        return rates.resident
    found = rates.fetched
    if config.offload.parameters is not OffloadDevice.cpu or zero_buckets.whole_layers(config):
        return found
    forward, backward, again = (_MATRICES * part for part in (found.forward, found.backward, found.again))
    return HostTime(forward, backward, again, forward + found.checkpointed_forward - found.forward)


def _seen(run: Selection) -> float:
    """Tokens with which a token's query is multiplied, on average: in layers with a window those within it, or, where the window is
    a mask, all."""
    config = run.config
    length, window = config.seq_len.tokens, config.model.sliding_window
    if not attention.windowed(config):
        return length / 2
    part = windows.number(config.model) / config.model.num_layers
    seen = length if attention.SPECS[run.attention].masks_windows else window * (1 - window / (2 * length))
    return part * seen + (1 - part) * length / 2


def _products(model: ModelConfig, layer: Layer) -> float:
    """Weights of a layer that one token is multiplied with."""
    found = float(sum(inputs * outputs for inputs, outputs in layer.linears.values()))
    if layer.experts:
        found += model.num_experts * model.hidden_size
        found += sum(layer.experts) * model.num_experts_per_token / model.num_experts
    return found


def _layer(run: Selection, rates: Rates) -> _Layer:
    """The mean layer."""
    config = run.config
    model, tokens, width = config.model, layer_memory.tokens(config), parameter_counts.width(config)
    kinds = decoder_layers.kinds(model)
    weights = sum(count * _products(model, layer) for layer, count in kinds.items()) / model.num_layers
    queries, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    hidden, inner = model.hidden_size, model.intermediate_size
    if model.num_experts:
        inner = model.num_experts_per_token * experts.expert_width(model) + decoder_layers.shared_width(model)
    per_byte = width * tokens / rates.device_memory
    # Two norms 4 H, two residuals 6 H, rotary embedding and layout 4 Q + 6 K, activation and product 3 I; and their gradients.
    passes = per_byte * (10 * hidden + 4 * queries + 6 * keys + 3 * inner)
    passes_back = per_byte * (12 * hidden + 4 * queries + 6 * keys + 5 * inner)
    # An adapter reads its input; its output is written, scaled (2) and added to the module's (3). Backward, the gradient is scaled
    # (2) and read twice, the input read once, and its gradient written and added to the module's (4).
    sizes = [one for layer in kinds for one in kinds[layer] * [*parameter_counts.adapted(config, layer).values()]]
    read, written = (sum(column) / model.num_layers for column in zip(*sizes, strict=True)) if sizes else (0.0, 0.0)
    passes += per_byte * (read + 6 * written)
    passes_back += per_byte * (5 * read + 4 * written)
    # Each tile's gradient of a weight is written, and read to be added to the sum, which is read and written in fp32.
    summed = run.mlp_tiles * (2 * width + 8) * 3 * hidden * inner if run.mlp_tiles > 1 and not config.lora.rank else 0
    passes_back += summed / rates.device_memory
    products = 2.0 * tokens * weights / rates.products
    of_down = 2.0 * tokens * inner * hidden / rates.products
    ahead, back = rates.attention_of(model.head_dim, config.seq_len.tokens)
    attends = 4.0 * tokens * _seen(run) * queries
    return _Layer(
        forward=products + attends / ahead + passes,
        # A frozen weight has no gradient of its own.
        backward=products * (1 if config.lora.rank else 2) + 2.5 * attends / back + passes_back,
        # The last product is not needed again.
        again=products - of_down + attends / ahead + passes,
        attention=attends / ahead,
    )


def _exchange(run: Selection, rates: Rates) -> float:
    """Seconds in which ranks that share sequences exchange queries, keys, values and outputs of a layer, in one pass."""
    config = run.config
    model, ranks = config.model, config.launch.sequence_parallel
    if ranks == 1:
        return 0.0
    heads = 2 * model.num_attention_heads + 2 * sequence_parallel.key_heads(config)
    size = parameter_counts.width(config) * layer_memory.tokens(config) * heads * model.head_dim
    return size * (ranks - 1) / ranks / rates.peers


def _loss(run: Selection, rates: Rates) -> float:
    """Seconds of the output projection and the loss in the forward pass; Liger computes its gradients there, too."""
    config = run.config
    once = 2.0 * layer_memory.tokens(config) * parameter_counts.embedding_parameters(config.model) / rates.products
    return once * (2 if config.lora.rank else 3) if run.liger else once


@dataclass(frozen=True, slots=True)
class _Link:
    """Seconds of copies."""

    forward: tuple[float, ...]
    """To the device, from it, and between GPUs."""
    backward: tuple[float, ...]
    moved: float
    """Bytes that leave or enter a host's memory in the forward pass, of all its ranks."""
    fetch: float
    """One layer's weights, to the device."""
    tail: float
    """What nothing hides: the embedding's gradient after the last layer's; in stages 1 and 2 all gradients."""


def _link(run: Selection, rates: Rates) -> _Link:
    config = run.config
    if config.launch.device is Device.cpu:
        return _Link((0.0,), (0.0,), 0.0, 0.0, 0.0)
    model, width, ranks = config.model, parameter_counts.width(config), config.launch.num_ranks
    down, up = rates.host.link_h2d, rates.host.link_d2h
    whole = parameter_counts.num_parameters(model)
    trained = parameter_counts.total(parameter_counts.trained_sizes(config))
    share = min(1.0, run.gpu_share * ranks / whole)
    offloads = config.offload.parameters is not OffloadDevice.none
    weights = width * whole * (1 - share) / ranks if offloads else 0.0
    gathered = width * whole * (ranks - 1) / ranks / rates.peers if config.offload.stage == 3 else 0.0
    waiting = _waiting_bytes(run)
    leaves = config.offload.optimizer is not OffloadDevice.none
    gradients = width * trained * (1 - share) / ranks / up if leaves else 0.0
    embedding = width * parameter_counts.embedding_parameters(model) / ranks / up
    tail = embedding if leaves and not share and not config.lora.rank else 0.0
    if leaves and config.offload.stage < 3:
        # In fp32, and the device waits for each (stage_1_and_2.py, async_inplace_copy_grad_to_fp32_buffer_from_gpu).
        gradients, tail = 0.0, 4 * trained / ranks / up
    reduced = width * trained * (ranks - 1) / ranks / rates.peers
    return _Link(
        forward=(weights / down, waiting / up, gathered),
        backward=((weights + waiting) / down, gradients, gathered + reduced),
        moved=config.launch.ranks_per_host * (weights + waiting),
        fetch=width * parameter_counts.layer_parameters(model) / ranks / down if offloads else 0.0,
        tail=tail,
    )


def _waiting_bytes(run: Selection) -> int:
    """Bytes of layer inputs and attention outputs of one micro-batch that wait in one rank's host memory."""
    config, settings = run.config, run.config.checkpointing
    groups = settings.groups(config.model.num_layers)
    found = 0
    if settings.mode is CheckpointingMode.cpu:
        found += max(groups - run.device_inputs, 0) * layer_memory.hidden_bytes(config)
    if settings.keep_attention is KeepAttention.host:
        found += max(groups - 1, 0) * settings.every * layer_memory.attention_bytes(config)
    return found


def _update(run: Selection, rates: Rates) -> float:
    """Seconds of the host's update alone."""
    config = run.config
    if config.offload.optimizer is not OffloadDevice.cpu:
        return 0.0
    trained = parameter_counts.total(parameter_counts.trained_sizes(config)) - run.gpu_share * config.launch.num_ranks
    # Each state is read and written, the gradient read, the weight written. Stock DeepSpeed also unscales, and copies twice.
    traffic = 2 * (parameter_counts.state_bytes(config) + parameter_counts.width(config))
    if not run.fused_step:
        single = 0 < run.zero.get("sub_group_size", 0) < parameter_counts.layer_parameters(config.model)
        traffic += 3 * 4 + 2 * (4 + parameter_counts.width(config)) + single * _SINGLE_BYTES
    elif config.offload.stage < 3:
        traffic += _STAGE_2_BYTES
    reached = _REACHED if rates.measured and run.fused_step and config.offload.stage == 3 else 1.0
    return traffic * trained / config.launch.num_hosts / (reached * sum(rates.host.cpu.values()))


def _step(run: Selection, rates: Rates) -> float:
    """Seconds of the optimizer's part besides the host's update."""
    config = run.config
    ranks, model = config.launch.num_ranks, config.model
    trained = parameter_counts.total(parameter_counts.trained_sizes(config))
    if config.offload.optimizer is OffloadDevice.none:
        # Stages 1 and above update a shard each.
        updated = trained / (1 if config.offload.stage == 0 else ranks)
        return _STEP_LAYERS * rates.resident.forward + _STEP_BYTES * updated / rates.device_memory
    seconds = _STEP_S + 28 * run.gpu_share / rates.device_memory
    if config.offload.parameters is OffloadDevice.none and config.launch.device is Device.cuda:
        seconds += parameter_counts.width(config) * parameter_counts.num_parameters(model) / ranks / rates.host.link_h2d
    return seconds


def _beside(
    run: Selection, start_s: float, layer_s: tuple[float, float], loss_s: float, update_s: float, fetch_s: float
) -> float:
    """Seconds of a forward pass that waits, layer by layer, for the update and the fetch of its weights. start_s: until the device
    has work. layer_s: of a layer after the update, and beside it."""
    config = run.config
    model, ranks = config.model, config.launch.num_ranks
    layer = parameter_counts.split(parameter_counts.layer_sizes(model), ranks)
    embedding = -(-parameter_counts.embedding_parameters(model) // ranks)
    whole = parameter_counts.split(parameter_counts.parameter_sizes(model), ranks)
    per_element = update_s / max(1, whole - run.gpu_share)
    embedding_s = fetch_s * embedding / layer

    def ready(end: int, fetched_s: float) -> float:
        """When the weights up to this element are updated and fetched. The GPU updates those of its share, at the front, itself."""
        return max(0, end - run.gpu_share) * per_element + (fetched_s if end > run.gpu_share else 0.0)

    at = max(start_s, ready(embedding, embedding_s))
    for index in range(model.num_layers):
        at = max(at, ready(embedding + (index + 1) * layer, fetch_s))
        # The part of the layer that is done when the update ends.
        part = min(1.0, max(0.0, update_s - at) / layer_s[1])
        at += part * layer_s[1] + (1 - part) * layer_s[0]
    if not model.tie_word_embeddings:
        at = max(at, ready(whole, embedding_s))
    return at + loss_s
