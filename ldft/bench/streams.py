"""One process of `python -m ldft.bench`: holds memory on given nodes and times streams over it.

    python -m ldft.bench.streams INDEX    commands as JSON lines on stdin, one answer per line on stdout

Commands: {"do": "place", "placement": {...}, "bytes": n} allocates four arrays of n bytes; {"do": "time", "kernel": k, "bytes": n,
"repeats": n} times kernel k over n bytes of each array that it needs. The process ends when stdin ends.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from ldft.memory.allocator import allocate
from ldft.memory.policy import NumaCallError, Placement
from ldft.training.optimizers.host_optimizer import HostAdamW

# Number of arrays that each kernel uses; TRAFFIC in nodes.py gives the resulting traffic.
ARRAYS = {"read": 1, "write": 1, "triad": 3, "adam": 4, "h2d": 1, "d2h": 1}


class Streams:
    """The arrays, and the kernels that run over them."""

    def __init__(self, index: int) -> None:
        self._gpu = torch.device("cuda", index) if torch.cuda.is_available() else None
        self._arrays: list[torch.Tensor] = []
        self._on_gpu: torch.Tensor | None = None

    def place(self, placement: Placement, size: int) -> None:
        """Allocate four arrays of `size` bytes. Raises HostMemoryError and PlacementError."""
        self._arrays = []  # first, so that old memory is freed before more is allocated
        # One mapping per array, so that each is spread over the nodes in the same way.
        pin = self._gpu is not None
        self._arrays = [allocate(size // 4, torch.float32, placement, pin=pin) for _ in range(max(ARRAYS.values()))]
        for number, array in enumerate(self._arrays):
            array.fill_(number + 1e-3)
        if self._gpu:
            self._on_gpu = torch.empty(size // 4, dtype=torch.float32, device=self._gpu)

    def time(self, kernel: str, size: int, repeats: int) -> list[float]:
        """Seconds of each repetition, after warm-up."""
        arrays = [array[: size // 4] for array in self._arrays[: ARRAYS[kernel]]]
        if kernel in ("h2d", "d2h"):
            return self._copies(kernel, arrays[0], repeats)
        run = self._cpu(kernel, arrays)
        seconds = []
        for repeat in range(repeats + 2):
            started = time.perf_counter()
            run()
            if repeat >= 2:
                seconds.append(time.perf_counter() - started)
        return seconds

    def _cpu(self, kernel: str, arrays: list[torch.Tensor]) -> Callable[[], Any]:
        if kernel == "read":
            return arrays[0].sum
        if kernel == "write":
            return lambda: arrays[0].fill_(1.0)
        if kernel == "triad":
            return lambda: torch.add(arrays[0], arrays[1], alpha=3.0, out=arrays[2])
        return lambda: self._adam(arrays)

    def _adam(self, arrays: list[torch.Tensor]) -> None:
        """One AdamW step over weight, gradient and two moments, as in training."""
        weight, gradient, mean, square = arrays
        optimizer = HostAdamW([weight], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01)
        optimizer.state[weight] = {"step": 0, "exp_avg": mean, "exp_avg_sq": square}
        weight.grad = gradient
        optimizer.step()

    def _copies(self, kernel: str, host: torch.Tensor, repeats: int) -> list[float]:
        assert self._on_gpu is not None
        device = self._on_gpu[: host.numel()]
        source, target = (host, device) if kernel == "h2d" else (device, host)
        seconds = []
        for repeat in range(repeats + 2):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            target.copy_(source, non_blocking=True)
            end.record()
            end.synchronize()
            if repeat >= 2:
                seconds.append(start.elapsed_time(end) / 1e3)
        return seconds


def main() -> int:
    streams = Streams(int(sys.argv[1]))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    print(json.dumps({"gpus": gpus}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if asked["do"] == "place":
                streams.place(Placement(**asked["placement"]), asked["bytes"])
                answer: dict[str, Any] = {}
            else:
                answer = {"seconds": streams.time(asked["kernel"], asked["bytes"], asked["repeats"])}
        except (MemoryError, NumaCallError) as error:  # includes HostMemoryError: this node set is left out
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
