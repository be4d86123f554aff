"""How fast a machine is, as far as the time of an iteration depends on it: measured once, or derived from datasheets."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass

from ldft.memory.cost_model import Bandwidths

# Of a datasheet's values, what training sustains: matrix products 0.70 to 0.79 of the dense peak, cuDNN's causal attention with
# heads of 128 0.50 to 0.61 forward and 0.44 to 0.53 backward
# (benchmarks/results/attention-h200.parquet; less when it runs for seconds).
_PRODUCTS, _ATTENTION, _DEVICE_MEMORY = 0.72, (0.55, 0.49), 0.85
# Narrow heads do half of the work for each exponential. Of that, heads of 64 reach about this: chosen by rows of a 1B model
# (benchmarks/results/share-llama3_1b-16k-h200.parquet), not measured by themselves. Published for cuDNN, forward: 0.69
# (arXiv 2407.08608).
_NARROW = (0.73, 0.65)


@dataclass(frozen=True, slots=True)
class HostTime:
    """Seconds that Python and DeepSpeed need for one decoder layer; the device waits if it is done earlier."""

    forward: float
    backward: float
    again: float
    """For its recomputation."""
    checkpointed: float = 0.0
    """For the forward pass of a layer that is recomputed later, as measured; 0 if it was not."""

    @property
    def checkpointed_forward(self) -> float:
        """The same, but never less than `forward`: each tensor that the layer would keep is replaced."""
        return max(self.forward, self.checkpointed)


# As bench machine measured it beside an H200; slower cores need up to twice as long. How much slower Python is beside the update
# was derived from forward passes over 8192 tokens there, and the time of checkpointed layers from those over 4096 (sweep h200).
_LAUNCHES_BESIDE = 0.5
_FETCHED, _RESIDENT = HostTime(0.0029, 0.0030, 0.0030, 0.0044), HostTime(0.0017, 0.0017, 0.0017, 0.0029)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Sustained rates of one GPU and of the host."""

    products: float
    """Matrix products in compute precision, FLOP/s."""
    attention: Mapping[int, Mapping[int, tuple[float, float]]]
    """Width of a head -> tokens of a sequence -> causal attention, forward and backward, FLOP/s. The causal half counts: 2 S S
    elements of queries per product and pass; the backward pass has 2.5 times the products."""
    device_memory: float
    """Reads and writes of device memory, bytes/s."""
    host: Bandwidths
    """The host's update by node, and the link's copies, bytes/s."""
    launches_beside: float
    """Part of its speed that Python, which starts the device's work, keeps beside the host's update."""
    fetched: HostTime
    """With ZeRO-3, which fetches and releases each layer's weights."""
    resident: HostTime
    """With the weights in device memory."""
    peers: float
    """Between one GPU and the others, bytes/s; infinite for a single GPU."""
    measured: bool
    """Whether measured on the machine; otherwise derived from datasheets."""

    def attention_of(self, head_dim: int, tokens: int) -> tuple[float, float]:
        """Forward and backward rate for sequences of `tokens`: between measured lengths by interpolation, else the nearest's."""
        by_length = self.attention[min(self.attention, key=lambda width: (abs(width - head_dim), width))]
        lengths = sorted(by_length)
        above = bisect.bisect_left(lengths, tokens)
        if above in (0, len(lengths)):
            return by_length[lengths[min(above, len(lengths) - 1)]]
        low, high = lengths[above - 1], lengths[above]
        part = (math.log(tokens) - math.log(low)) / (math.log(high) - math.log(low))
        forward, backward = (a + part * (b - a) for a, b in zip(by_length[low], by_length[high], strict=True))
        return forward, backward


def from_datasheet(*, peak: float, device_memory: float, host: Bandwidths, peers: float = math.inf) -> Rates:
    """Rates from a datasheet's peaks: FLOP/s of dense products, bytes/s of device memory and between GPUs. host: what it
    sustains."""
    wide = _ATTENTION[0] * peak, _ATTENTION[1] * peak
    narrow = _NARROW[0] * wide[0], _NARROW[1] * wide[1]
    return Rates(
        products=_PRODUCTS * peak,
        attention={128: {32768: wide}, 64: {32768: narrow}},
        device_memory=_DEVICE_MEMORY * device_memory,
        host=host,
        launches_beside=_LAUNCHES_BESIDE,
        fetched=_FETCHED,
        resident=_RESIDENT,
        peers=peers,
        measured=False,
    )
