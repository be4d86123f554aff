"""Make DeepSpeed allocate directly in the arenas while it builds model and engine, so that nothing large exists twice.

Only inside a context, DeepSpeed's methods that allocate one role each run under a dispatch mode. It serves torch's allocations of
the expected sizes and dtypes, in the expected order, from slots of the arenas. The methods themselves are unchanged; their names
have been the same from 0.9.5 to 0.19.8. If one is missing or allocates differently, tensors come from torch as usual, and
`rebinding` moves them
afterwards: this is slower and has a higher peak, but the result is the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch.utils._python_dispatch import TorchDispatchMode

from ldft.memory.arenas import Arena, Arenas, Want, alias, piece, span
from ldft.training.deepspeed import roles

log = logging.getLogger(__name__)
_aten = torch.ops.aten


class _Serving(TorchDispatchMode):
    """Serves new host tensors from slots: the next slot of that size and dtype at the top of the stack."""

    def __init__(self) -> None:
        super().__init__()
        # For each method now running: slots not yet served, and addresses of served slots.
        self._stack: list[tuple[list[torch.Tensor], set[int]]] = []

    @contextmanager
    def serve(self, slots: Sequence[torch.Tensor]) -> Iterator[None]:
        self._stack.append((list(slots), set()))
        try:
            if len(self._stack) == 1:
                with self:
                    yield
            else:  # an inner method: serve its slots only; the mode is already active
                yield
        finally:
            self._stack.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = self._stack[-1][1]
        if func in (_aten.zeros.default, _aten.empty.memory_format):
            if not kwargs.get("pin_memory") and _on_host(kwargs.get("device")):
                numel = torch.Size(args[0]).numel()
                slot = self._take(numel, kwargs.get("dtype") or torch.get_default_dtype())
                if slot is not None:
                    return slot.view(args[0])
        elif func is _aten._to_copy.default:
            source = args[0]
            if source.data_ptr() in given:
                return source  # served on the device where it is to stay
            if _on_host(kwargs.get("device", source.device)):
                slot = self._take(source.numel(), kwargs.get("dtype") or source.dtype)
                if slot is not None:
                    return slot.view(source.shape).copy_(source)
        elif func is _aten.clone.default and args[0].data_ptr() in given:
            return args[0]  # a copy of a tensor that this method has just put into its slot
        elif func is _aten.clone.default and args[0].device.type == "cpu":
            slot = self._take(args[0].numel(), args[0].dtype)
            if slot is not None:
                return slot.view(args[0].shape).copy_(args[0])
        elif func is _aten._pin_memory.default and args[0].data_ptr() in given:
            return args[0]  # arenas are pinned as a whole, or deliberately not
        return func(*args, **kwargs)

    def _take(self, numel: int, dtype: torch.dtype) -> torch.Tensor | None:
        slots, given = self._stack[-1]
        for index, slot in enumerate(slots):
            if slot.numel() == numel > 0 and slot.dtype == dtype:
                del slots[: index + 1]
                given.add(slot.data_ptr())
                return alias(slot)
        return None


def _on_host(device: Any) -> bool:
    return device is None or torch.device(device).type == "cpu"


@contextmanager
def engine(arenas: Arenas | None, *, shared_gradients: bool, first_on: torch.device | None = None) -> Iterator[None]:
    """The context for `deepspeed.initialize`. arenas: None if DeepSpeed allocates its own tensors. shared_gradients: the fp32
    gradients get no memory, since the fused step will replace them by parts of the gradients in compute precision. first_on: the
    device of the first sub-group's master weights, if not the host."""
    serving = _Serving()
    methods = {} if arenas is None else dict(METHODS)
    if first_on is not None and "_create_fp32_partitions" in methods:
        methods["_create_fp32_partitions"] = lambda optimizer, arenas: _masters(optimizer, arenas, first_on)
    if shared_gradients:
        # Without arenas, the first sub-group's master weights are still in host memory at that time.
        first_on = None if arenas is None else first_on
        methods["initialize_optimizer_states"] = lambda optimizer, arenas: _without_memory(optimizer, first_on)
    with ExitStack() as stack:
        for name, slots_of in methods.items():
            stack.enter_context(_wrapped(DeepSpeedZeroOptimizer_Stage3, name, _served(serving, slots_of, arenas)))
        yield


@contextmanager
def weights(arenas: Arenas, numels: Sequence[int], dtype: torch.dtype) -> Iterator[None]:
    """The context for building a model under `deepspeed.zero.Init` with parameters on the host: each rank's shards go into one
    block, one after the other, in DeepSpeed's later layout.

    numels: elements of this rank's shard of each parameter, in the order of `model.parameters()`. Shards that come in another order
    are allocated by torch and moved later.
    """
    arena = arenas.of("compute_weights")
    block = arena.spare = arena.allocate(sum(numels) * dtype.itemsize)
    slots, offset = [], 0
    for numel in numels:
        slots.append(piece(block, offset, numel, dtype))
        offset += numel * dtype.itemsize
    serving = _Serving()

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def partition(self: Any, param: Any, *arguments: Any, **named: Any) -> Any:
            with serving.serve(slots[:1]):
                done = original(self, param, *arguments, **named)
            part = param.ds_tensor
            if slots and part is not None and span(part) == span(slots[0]):
                slots.pop(0)
            return done

        return partition

    with _wrapped(Init, "_partition_param", around):
        yield


@contextmanager
def _wrapped(owner: type, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    original = owner.__dict__.get(name)
    if original is None:
        log.warning(
            "DeepSpeed %s has no %s.%s: its allocations are moved into their arena afterwards, which takes more time and memory",
            deepspeed.__version__,
            owner.__name__,
            name,
        )
        yield
        return
    setattr(owner, name, around(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


Slots = Callable[[Any, Any], list[torch.Tensor]]


def _served(
    serving: _Serving, slots_of: Slots, arenas: Arenas | None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def method(optimizer: Any) -> Any:
            with serving.serve(slots_of(optimizer, arenas)):
                return original(optimizer)

        return method

    return around


def _weights(optimizer: Any, arenas: Arenas) -> list[torch.Tensor]:
    """The 16-bit weights: one flat tensor per parameter group."""
    if optimizer.params_in_nvme_and_cpu:
        return []
    arena, groups = arenas.of("compute_weights"), [group["params"] for group in optimizer.trainable_param_groups]
    wants = [
        Want(roles.flat_name(i), sum(parameter.partition_numel() for parameter in group), optimizer.dtype)
        for i, group in enumerate(groups)
    ]
    for want, group in zip(wants, groups, strict=True):
        _adopt_spare(arena, want, [parameter.ds_tensor for parameter in group])
    arena.lay_out(wants)
    return [arena.slots[want.name] for want in wants]


def _adopt_spare(arena: Arena, want: Want, parts: list[torch.Tensor]) -> None:
    """If a group's shards are already in the spare block in the layout of its flat tensor, use that memory for the flat tensor."""
    if arena.spare is None or not parts:
        return
    (first, last), (start, _) = span(arena.spare), span(parts[0])
    end = start
    for part in parts:
        if part.dtype != want.dtype or span(part)[0] != end:
            return
        end = span(part)[1]
    if first <= start and end <= last and end - start == want.numel * want.dtype.itemsize:
        arena.adopt(arena.spare, want.name, piece(arena.spare, start - first, want.numel, want.dtype))


def _masters(optimizer: Any, arenas: Arenas, first_on: torch.device | None = None) -> list[torch.Tensor]:
    """fp32 weights, one tensor per sub-group: converted into their slots; DeepSpeed's clone of them is skipped."""
    if not _all_on_host(optimizer):
        return []
    dtype, sizes = optimizer.master_weights_and_grads_dtype, optimizer.fp16_partitioned_groups_flat_numel
    wants = [Want(roles.master_name(i), n, dtype) for i, n in enumerate(sizes)]
    if first_on is None:
        return _slots(arenas.of("master_weights"), wants)
    return [torch.empty(sizes[0], dtype=dtype, device=first_on), *_slots(arenas.of("master_weights"), wants[1:])]


def _gradients(optimizer: Any, arenas: Arenas) -> list[torch.Tensor]:
    """fp32 gradients, one tensor per sub-group. DeepSpeed first allocates a scratch tensor as large as the largest, but does not
    use it here, so it may overlap the largest slot."""
    if not _all_on_host(optimizer):
        return []
    masters = optimizer.fp32_partitioned_groups_flat
    wants = [Want(roles.gradient_name(i), master.numel(), master.dtype) for i, master in enumerate(masters)]
    slots = _slots(arenas.of("master_gradients"), wants)
    return [max(slots, key=torch.Tensor.numel), *slots]


def _without_memory(optimizer: Any, first_on: torch.device | None) -> list[torch.Tensor]:
    """In the place of the scratch tensor and of the fp32 gradients: one zero, repeated, where their master weights are."""
    sizes = [master.numel() for master in optimizer.fp32_partitioned_groups_flat]
    zero = torch.zeros((), dtype=optimizer.master_weights_and_grads_dtype)
    first = zero if first_on is None else zero.to(first_on)
    return [zero.expand(max(sizes)), first.expand(sizes[0]), *(zero.expand(size) for size in sizes[1:])]


def _accumulated(optimizer: Any, arenas: Arenas) -> list[torch.Tensor]:
    """Gradients in compute precision."""
    if not _all_on_host(optimizer):
        return []
    numel = sum(parameter.partition_numel() for group in optimizer.fp16_groups for parameter in group)
    want = Want(roles.ACCUMULATED, numel, optimizer.gradient_accumulation_dtype)
    return _slots(arenas.of("compute_gradients"), [want])


def _all_on_host(optimizer: Any) -> bool:
    return optimizer.offload_optimizer and not optimizer.swap_optimizer and optimizer.partial_offload == 1.0


def _slots(arena: Arena, wants: list[Want]) -> list[torch.Tensor]:
    arena.lay_out(wants)
    return [arena.slots[want.name] for want in wants]


# Method -> the slots for its allocations. The last method calls the two before it.
METHODS: dict[str, Slots] = {
    "_create_param_groups_fp16_flat_cpu_memory": _weights,
    "_create_fp32_partitions": _masters,
    "initialize_optimizer_states": _gradients,
    "_setup_for_real_optimizer": _accumulated,
}
