"""Weights that ZeRO-3 has on the device at once. Imports no torch.

This follows DeepSpeed's bookkeeping in the order in which the host allocates and frees, which is what torch's peak of allocated
memory counts. Source: DeepSpeed 0.19.8, partitioned_param_coordinator.py and partition_parameters.py, and traces of both. What
formulas would miss:

- Each module fetches what it needs, then more, in the order of the last iteration, up to stage3_prefetch_bucket_size and as long as
  less than stage3_max_live_parameters is there. The parameter that passes the limit is fetched whole, so an output projection or an
  embedding comes together with the layer before it.
- A parameter stays if it is used again within stage3_max_reuse_distance. After a module that is no whole layer, whole layers count
  as nothing in this distance: so a tied embedding stays from the beginning of an iteration to its end, and being larger than the
  limit, keeps everything else from being fetched early.
- In a run's first pass the order is not known yet: nothing is fetched early, and nothing stays.
- Several ranks receive the parts of parameters that are fetched together in one block, and copy each parameter out of it. The block
  stays until the last of them is used.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import deque
from dataclasses import dataclass

from ldft.preflight import decoder_layers, parameter_counts
from ldft.preflight.selection import Selection

# Layers that are enough to see all that can happen, besides those that fit at once.
_LAYERS = 8


@dataclass(frozen=True, slots=True)
class Gathered:
    """Elements on the device while something is computed."""

    forward: int
    """The most in any layer's forward pass."""
    loss: int
    last_layer: int
    """In its backward pass."""
    other_layers: int
    """The most in any other layer's backward pass."""
    embedding: int
    """In its backward pass, which ends the iteration."""


@dataclass(frozen=True, slots=True)
class _Parameter:
    name: str
    size: int
    copied: int
    """Elements that fetching it takes: none for one rank whose shard is on the device."""


@dataclass(frozen=True, slots=True)
class _Module:
    parameters: tuple[_Parameter, ...] = ()
    small: int = 0
    """Elements of parameters that always stay on the device."""
    whole: bool = False
    """Whether it is a whole layer, which DeepSpeed calls a leaf module."""
    around: bool = False
    """Whether it contains all layers."""
    held: bool = False
    """Whether it is not done before it is computed once more."""


def of(run: Selection) -> Gathered:
    """For a run of stage 3 that copies weights to the device, from host memory or from other ranks."""
    config, zero = run.config, run.zero
    model = config.model
    largest = decoder_layers.largest(model)
    matrices: list[tuple[int, ...]] = [(inputs * outputs,) for inputs, outputs in largest.linears.values()]
    if largest.experts:
        matrices.append(largest.experts)
    # Adapters that are too large to stay are fetched like other weights; they were added after all of the model.
    rank, least = config.lora.rank, int(zero["stage3_param_persistence_threshold"])
    adapters = [rank * width for shape in parameter_counts.adapted(config, largest).values() for width in shape]
    matrices += [(size,) for size in adapters if size >= least]
    layer = parameter_counts.layer_parameters(model) + sum(adapters)
    return _simulated(
        (tuple(size for module in matrices for size in module),) if run.fetches_whole_layers else tuple(matrices),
        largest.of_attention,
        layer,
        model.num_layers,
        parameter_counts.embedding_parameters(model),
        model.tie_word_embeddings,
        config.lora.rank == 0,
        config.checkpointing.recomputed(model.num_layers) > 0,
        config.launch.num_ranks,
        run.gpu_share,
        tuple(
            int(zero[f"stage3_{name}"])
            for name in ("max_live_parameters", "prefetch_bucket_size", "max_reuse_distance")
        ),
        config.train.iterations * config.train.gradient_accumulation_steps > 1,
    )


@functools.cache
def _simulated(
    modules: tuple[tuple[int, ...], ...],
    of_attention: int,
    layer: int,
    count: int,
    embedding: int,
    tied: bool,
    trained: bool,
    recomputed: bool,
    ranks: int,
    share: int,
    limits: tuple[int, ...],
    order_known: bool,
) -> Gathered:
    """modules: elements of the matrices of each module of a layer, one module if it is fetched as a whole, in the model's order,
    the first of_attention in attention; layer: elements of all its parameters. trained: whether the embedding is, and so has a
    backward pass. share: elements at the model's front whose shard is on the device."""

    def parameter(name: str, size: int, end: int) -> _Parameter:
        return _Parameter(name, size, 0 if ranks == 1 and end <= share else size)

    def layer_of(number: int) -> list[_Module]:
        end = embedding + (number + 1) * layer
        if len(modules) == 1:
            [sizes] = modules
            mine = tuple(parameter(f"{number} {index}", size, end) for index, size in enumerate(sizes))
            return [_Module(mine, layer - sum(sizes), whole=True)]
        inner = [
            _Module(tuple(parameter(f"{number} {name} {index}", size, end) for index, size in enumerate(sizes)))
            for name, sizes in enumerate(modules)
        ]
        # With the layer itself, its norms, attention, the MLP and its activation.
        nothing = _Module()
        after = of_attention + 1
        mlp = [nothing, nothing, *inner[of_attention:after], nothing, *inner[after:]]
        return [nothing, nothing, nothing, *inner[:of_attention], *mlp]

    some = min(count, _LAYERS + limits[0] // layer)  # the first and the last; those between are like their neighbours
    layers = [layer_of(number) for number in (*range(some // 2), *range(count - some + some // 2, count))]
    front = parameter("embedding", embedding, embedding)
    first = _Module((front,))
    head = first if tied else _Module((parameter("head", embedding, 2 * embedding + count * layer),))
    # These fetch ahead, but need nothing: the model itself, and its last norm or rotary embedding.
    model, other = _Module(around=True), _Module()
    order = [model, model, first, other, *(module for one in layers for module in one), other, head]
    loss, before = len(order) - 1, 4
    order += [model, head, model, other]
    ends = [len(order)]
    for one in reversed(layers):
        order += _backward(one, other, recomputed)
        ends.append(len(order))
    order.append(first if trained else other)
    at = _Coordinator(order, ranks, *(limits if order_known else (0, 0, 0))).iteration()
    of_layers = [max(at[begin:end]) for begin, end in itertools.pairwise(ends)]
    return Gathered(
        forward=max(at[before : loss - 1]),
        loss=max(at[loss], at[loss + 2]),
        last_layer=of_layers[0],
        other_layers=max(of_layers[1:], default=of_layers[0]),
        embedding=at[-1],
    )


def _backward(layer: list[_Module], other: _Module, recomputed: bool) -> list[_Module]:
    """The modules of a layer in its backward pass: a whole one only once; else, from the last module on, whose backward pass needs
    the recomputation of all."""
    if len(layer) == 1:
        return layer
    begun = [dataclasses.replace(layer[-1], held=True), *layer[1:]] if recomputed else layer[-1:]
    return [other, other, *begun, *layer[-2:0:-1]]


class _Coordinator:
    """DeepSpeed's choices in one iteration, with the order of the modules known from the one before."""

    def __init__(self, order: list[_Module], ranks: int, live: int, prefetch: int, reuse: int) -> None:
        self._order, self._ranks, self._live, self._prefetch, self._reuse = order, ranks, live, prefetch, reuse
        self._queue = deque((one, step) for step, module in enumerate(order) for one in module.parameters)
        self._queued_for: dict[_Parameter, int] = {}
        """The latest step for which a parameter was taken from the queue."""
        self._here: dict[_Parameter, bool] = {}
        """Parameters that were fetched -> whether their memory is their own, no part of a block."""
        self._under_way: list[tuple[set[_Parameter], int]] = []
        """Of each fetch of several ranks: those that were not used yet, and the elements that it holds until all are."""

    def iteration(self) -> list[int]:
        """Elements on the device while each module computes."""
        found = []
        for step, module in enumerate(self._order):
            self._fetch([one for one in module.parameters if one not in self._here])
            self._use(module.parameters)
            self._fetch_ahead(step, module.parameters)
            own = sum(one.copied for one, own in self._here.items() if own)
            found.append(own + sum(size for unused, size in self._under_way if unused))
            for one in () if module.held else module.parameters:
                if self._frees(one, module, step + 1):
                    del self._here[one]
        return found

    def _fetch(self, parameters: list[_Parameter]) -> None:
        alone = self._ranks == 1 or len(parameters) == 1
        self._here |= dict.fromkeys(parameters, alone)
        if parameters and self._ranks > 1:
            whole = sum(one.size for one in parameters)
            # A parameter by itself arrives where it stays; beside it, this rank's shard.
            self._under_way.append((set(parameters), -(-whole // self._ranks) if alone else whole))

    def _use(self, parameters: tuple[_Parameter, ...]) -> None:
        """Wait for them: all of a block are copied out of it."""
        for unused, _ in self._under_way:
            if not unused.isdisjoint(parameters):
                self._here |= {one: True for one in unused if one in self._here}
                unused.difference_update(parameters)

    def _fetch_ahead(self, step: int, parameters: tuple[_Parameter, ...]) -> None:
        missing = {one for one in parameters if self._queued_for.get(one, -1) < step}
        taken: set[_Parameter] = set()
        while self._queue and len(taken) < len(missing):
            one, self._queued_for[one] = self._queue.popleft()
            taken.add(one)
        room = min(self._live - sum(one.size for one in self._here), self._prefetch)
        ahead: dict[_Parameter, None] = {}
        while self._queue and sum(one.size for one in ahead) < room:
            one, when = self._queue.popleft()
            self._queued_for[one] = max(self._queued_for.get(one, -1), when)
            if one not in self._here:
                ahead[one] = None
        self._fetch([*ahead])

    def _frees(self, one: _Parameter, module: _Module, step: int) -> bool:
        """Whether DeepSpeed frees a module's parameter after it: not if it is used again soon, or was passed over in the queue."""
        if self._queued_for.get(one, -1) > step:
            return False
        passed = 0
        for later in self._order[step:]:
            if passed >= self._reuse:
                break
            if later.around and module.whole:
                return False  # DeepSpeed looks into what is inside
            seen = later.parameters if module.whole or not later.whole else ()
            if one in seen:
                return False
            passed += sum(other.size for other in seen) + (later.small if seen else 0)
        return True
