"""Causal attention forward and backward: TFLOP/s of every implementation that runs here, next to the rate of a matrix product.

    python benchmarks/attention.py --out attention.parquet                  # 8k, 32k and 64k tokens, 32 heads of 128, and 32 over 8

Every implementation is called as transformers' models call it. They take turns within a round, so that clock drift affects all
alike. A GPU at its power limit runs faster after a kernel that draws less power, so each turn begins with an untimed pass, and the
order varies: each of three runs about equally often after each other one (`after` in the rows). Times are from CUDA events; the
first round is not counted. FLOPs: the causal half of two products forward and of five backward.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AttentionInterface

from ldft import environment
from ldft.config import AttentionKind, Config, Device
from ldft.errors import ConfigError
from ldft.preflight import attention
from ldft.training import attention_kernels

HEADS, HEAD_DIM = 32, 128


def kinds() -> dict[str, str]:
    """Every kind except eager, which stores all scores -> why it cannot run here; empty if it can."""
    found = {}
    for kind in AttentionKind:
        if kind in (AttentionKind.auto, AttentionKind.eager):
            continue
        config = Config()
        config.launch.device, config.attention.kind, config.model.head_dim = Device.cuda, kind, HEAD_DIM
        try:
            attention.choose(config)
            found[kind.name] = ""
        except ConfigError as refused:
            found[kind.name] = str(refused)
    return found


def tflop(tokens: int) -> tuple[float, float]:
    """TFLOP of one causal forward and one backward pass over a sequence."""
    product = 2e-12 * tokens * tokens * HEADS * HEAD_DIM / 2
    return 2 * product, 5 * product


def timed_ms(work: Any) -> tuple[Any, float]:
    """The result of `work`, and the GPU's time in milliseconds."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    result = work()
    end.record()
    end.synchronize()
    return result, begin.elapsed_time(end)


def order(kinds: list[str], number: int) -> list[str]:
    """Kinds in the order of a round: shifted by one every two rounds, every other round backwards. Of three, all six orders."""
    shift = number // 2 % len(kinds)
    shifted = kinds[shift:] + kinds[:shift]
    return shifted[::-1] if number % 2 else shifted


def sample(kind: str, tensors: list[torch.Tensor], gradient: torch.Tensor) -> dict[str, float]:
    """Times of one forward and backward pass."""
    module = SimpleNamespace(
        num_key_value_groups=tensors[0].shape[1] // tensors[1].shape[1],
        is_causal=True,
        training=True,
        config=SimpleNamespace(_attn_implementation=kind),
    )
    function = AttentionInterface()[kind]
    output, forward_ms = timed_ms(lambda: function(module, *tensors, None, scaling=HEAD_DIM**-0.5)[0])
    _, backward_ms = timed_ms(lambda: torch.autograd.grad(output, tensors, gradient))
    return {"forward_ms": forward_ms, "backward_ms": backward_ms}


def matmul_tflops_per_s(size: int = 8192) -> float:
    """TFLOP/s of a bf16 matrix product of random numbers: the limit."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = [timed_ms(lambda: a @ b)[1] for _ in range(15)][5:]
    return 2e-9 * size**3 / statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 65536])
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[HEADS, 8])
    parser.add_argument("--rounds", type=int, default=7, help="the first is warm-up (default 7)")
    parser.add_argument("--out", type=Path, default=Path("attention.parquet"))
    arguments = parser.parse_args()
    available = kinds()
    for why in available.values():
        if why:
            print(f"left out: {why}")
    running = [kind for kind, why in available.items() if not why]
    for kind in running:
        attention_kernels.register(kind)

    limit = matmul_tflops_per_s()
    rows: list[dict[str, Any]] = []
    for kv_heads in arguments.kv_heads:
        for tokens in arguments.tokens:
            shapes = [(1, tokens, heads, HEAD_DIM) for heads in (HEADS, kv_heads, kv_heads)]
            made = [torch.randn(*shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for shape in shapes]
            tensors = [tensor.requires_grad_() for tensor in made]
            gradient = torch.randn(1, tokens, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
            for number in range(arguments.rounds):
                for kind in order(running, number):
                    about = {"kind": kind, "tokens": tokens, "kv_heads": kv_heads, "round": number}
                    about["after"] = rows[-1]["kind"] if rows else None
                    sample(kind, tensors, gradient)
                    rows.append(about | sample(kind, tensors, gradient))
    limit = max(limit, matmul_tflops_per_s())  # again, so that a busy moment does not lower the limit

    print(
        f"{torch.cuda.get_device_name()}, bf16, batch 1, {HEADS} heads of {HEAD_DIM}; a matrix product: {limit:.0f} TFLOP/s"
    )
    print(f"{'kind':<20}{'kv heads':>9}{'tokens':>8}{'n':>3}{'forward TFLOP/s':>17}{'backward':>10}{'of limit':>14}")
    for kv_heads in arguments.kv_heads:
        for tokens in arguments.tokens:
            for kind in running:
                mine = [
                    r
                    for r in rows
                    if (r["kind"], r["tokens"], r["kv_heads"]) == (kind, tokens, kv_heads) and r["round"]
                ]
                rates = [
                    work * 1e3 / statistics.median(row[key] for row in mine)
                    for work, key in zip(tflop(tokens), ("forward_ms", "backward_ms"), strict=True)
                ]
                shares = " / ".join(f"{rate / limit:.2f}" for rate in rates)
                print(f"{kind:<20}{kv_heads:>9}{tokens:>8}{len(mine):>3}{rates[0]:>17.0f}{rates[1]:>10.0f}{shares:>14}")

    about = {
        "environment_json": json.dumps(environment.describe() | {"cudnn": torch.backends.cudnn.version()}, default=str),
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "matmul_tflops_per_s": limit,
    }
    pq.write_table(pa.Table.from_pylist([row | about for row in rows]), arguments.out)
    print(f"{len(rows)} samples: {arguments.out}")


if __name__ == "__main__":
    main()
