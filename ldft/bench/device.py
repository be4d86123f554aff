"""Sustained rates of the device that computes, for predicting the time of an iteration: `python -m ldft.bench.device cuda bf16`.

Prints one line of JSON, and what it measures on stderr. Each rate is work over time, of work that runs without a pause for some
seconds, since a GPU that has been busy for so long runs at a lower clock. On a CPU the shapes are small.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldft.memory.allocator import allocate
from ldft.memory.policy import Placement
from ldft.training.deepspeed.update_overlap import NICE, threads_beside
from ldft.training.optimizers.host_optimizer import HostAdamW, prepared

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Tokens, width and inner width of the products; tokens of the sequences; seconds that each piece of work runs; bytes of copies; and
# bytes of each array of the update.
_SHAPES = {
    "cuda": ((8192, 4096, 14336), (8192, 32768, 131072), 3.0, 1 << 30, 256 << 20),
    "cpu": ((512, 512, 2048), (256, 1024), 0.1, 64 << 20, 32 << 20),
}
_HEAD_DIMS, _HEADS, _KEY_HEADS = (64, 128), 32, 8
_UPDATES = 9


class Device:
    """The device, and how to time its work."""

    def __init__(self, kind: str, precision: str) -> None:
        self._kind, self._dtype = kind, _DTYPES[precision]
        self._tokens, self._lengths, self._least_s, self._copied, self._updated = _SHAPES[kind]
        torch.manual_seed(0)

    def _random(self, *shape: int, **options: Any) -> torch.Tensor:
        return torch.randn(*shape, dtype=self._dtype, device=self._kind, **options)

    def _wait(self) -> None:
        if self._kind == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any]) -> float:
        """Seconds of one call, of as many as take `least_s`, after two for warm-up."""
        for _ in range(2):
            work()
        self._wait()
        count, passed = 1, 0.0
        while passed < self._least_s:
            started = time.perf_counter()
            for _ in range(count):
                work()
            self._wait()
            passed = time.perf_counter() - started
            done, count = count, max(2 * count, int(1.2 * count * self._least_s / max(passed, 1e-6)))
        return passed / done

    def products_tflops_per_s(self) -> float:
        """The three products of an MLP's matrix in training: forward, gradient of the input, gradient of the weight."""
        tokens, width, inner = self._tokens
        inputs, weight, gradient = self._random(tokens, width), self._random(inner, width), self._random(tokens, inner)

        def work() -> None:
            torch.matmul(inputs, weight.T)
            torch.matmul(gradient, weight)
            torch.matmul(gradient.T, inputs)

        return 3 * 2 * tokens * width * inner / self.seconds(work) / 1e12

    def attention_tflops_per_s(self) -> dict[int, dict[int, tuple[float, float]]]:
        """By width of a head and by tokens: causal attention with grouped heads, forward and backward."""
        found: dict[int, dict[int, tuple[float, float]]] = {}
        for width in _HEAD_DIMS:
            for tokens in self._lengths:
                found.setdefault(width, {})[tokens] = self._attention(width, tokens)
        return found

    def _attention(self, width: int, tokens: int) -> tuple[float, float]:
        # Laid out as a model's projections leave them: heads within tokens.
        query, key, value = (
            self._random(1, tokens, heads, width).transpose(1, 2).requires_grad_()
            for heads in (_HEADS, _KEY_HEADS, _KEY_HEADS)
        )

        def attend() -> torch.Tensor:
            with self._kernel():
                return torch.nn.functional.scaled_dot_product_attention(
                    query, key, value, is_causal=True, enable_gqa=True
                )

        output = attend()
        gradient = torch.randn_like(output)
        forward_s = self.seconds(attend)
        backward_s = self.seconds(lambda: torch.autograd.grad(output, (query, key, value), gradient, retain_graph=True))
        flop = 2.0 * tokens * tokens * _HEADS * width
        return flop / forward_s / 1e12, 2.5 * flop / backward_s / 1e12

    def _kernel(self) -> AbstractContextManager[None]:
        """The kernel that attention=auto chooses on this device (preflight/attention.py)."""
        if (
            self._kind == "cuda"
            and torch.cuda.get_device_capability()[0] in (9, 10)
            and self._dtype is not torch.float32
        ):
            return sdpa_kernel(SDPBackend.CUDNN_ATTENTION)
        return nullcontext()

    def memory_gb_per_s(self) -> float:
        """Reads and writes of a copy within the device's memory."""
        source = torch.zeros(self._copied, dtype=torch.uint8, device=self._kind)
        target = torch.empty_like(source)
        return 2 * self._copied / self.seconds(lambda: target.copy_(source)) / 1e9

    def peer_gb_per_s(self) -> float | None:
        """Copies from the first GPU to the second; None with one."""
        if self._kind != "cuda" or torch.cuda.device_count() < 2:
            return None
        source = torch.zeros(self._copied, dtype=torch.uint8, device="cuda:0")
        target = torch.empty(self._copied, dtype=torch.uint8, device="cuda:1")
        return self._copied / self.seconds(lambda: target.copy_(source)) / 1e9

    def launches_beside(self) -> float:
        """The part of its speed that the thread which starts kernels keeps beside the host's update, by its own clock."""
        if self._kind != "cuda":
            return 1.0
        arrays = [allocate(self._updated // 4, torch.float32, Placement(), pin=True) for _ in range(4)]
        for number, array in enumerate(arrays):
            array.fill_(number + 1e-3)
        weight, weight.grad, mean, square = arrays
        optimizer = HostAdamW([weight], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01)
        optimizer.state[weight] = {"step": 0, "exp_avg": mean, "exp_avg_sq": square}
        layer = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(8))).to(self._kind, self._dtype)
        inputs = self._random(16, 16)
        moved = 7 * self._updated  # each of four arrays is read, three are written

        def layers_per_s(go_on: Callable[[], bool]) -> float:
            self._wait()
            count, began = 0, time.perf_counter()
            while go_on():
                layer(inputs)
                count += 1
            return count / (time.perf_counter() - began)

        alone, beside = [], []
        for _ in range(_UPDATES + 2):
            until = time.perf_counter() + 0.05
            alone.append(layers_per_s(lambda: time.perf_counter() < until))  # noqa: B023 - called at once
            job = prepared(optimizer.tasks(weight, optimizer.param_groups[0]))
            job.start(threads_beside(), NICE)
            beside.append(layers_per_s(lambda: job.progress[2] < moved))  # noqa: B023
            job.finish()
        return min(1.0, statistics.median(beside[2:]) / statistics.median(alone[2:]))


def main() -> int:
    kind, precision = sys.argv[1:3]
    device = Device(kind, precision)
    found: dict[str, Any] = {}
    for name in (
        "products_tflops_per_s",
        "attention_tflops_per_s",
        "memory_gb_per_s",
        "peer_gb_per_s",
        "launches_beside",
    ):
        print(
            f"ldft: {kind}, {precision}: {name.replace('_per_s', '/s').replace('_', ' ')}", file=sys.stderr, flush=True
        )
        found[name] = getattr(device, name)()
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
