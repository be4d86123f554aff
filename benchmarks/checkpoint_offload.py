"""What it costs to keep layer inputs in host memory: forward and backward of one model, modes in turns, no optimizer.

    python benchmarks/checkpoint_offload.py OUT.parquet llama3_3b:28:32768 llama3_8b:8:65536 [--modes gpu cpu seed] [--rounds 5]

A shape is model:layers:tokens, micro-batch 1, bf16, random weights and tokens, the whole model in device memory. Modes:
    gpu        torch's non-reentrant checkpoint: inputs stay on the device. The base of all ratios.
    cpu        ours: ldft/training/checkpointing/checkpointing.py.
    gpu+attention, cpu+attention    ours, and attention is not computed again: its output waits beside the layer inputs.
    seed       the seed's way: benchmarks/seed_checkpointing.py.
    deepspeed  DeepSpeed's get_checkpoint_hidden_states_offloading_ctx_manager (0.19.6 and later).
Each round runs every mode once, the first round is unmeasured. Prints medians of time and of peak VRAM in layer inputs beside what
copies could cost at most: a copy that is shorter than what it runs beside can be hidden wholly, so the limit is 1.000.
Raw samples go into OUT.parquet. Needs a GPU; `--device cpu` runs the same code on tiny shapes, for tests.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import seed_checkpointing
import torch
from hydra import compose, initialize_config_dir
from torch.utils.checkpoint import checkpoint

from ldft import environment
from ldft.cli import composition
from ldft.config import Config, from_dict
from ldft.preflight import host_estimate, liger
from ldft.preflight.selection import select
from ldft.runner import checks
from ldft.training import loop, model
from ldft.training.checkpointing.attention_outputs import HostOutputs
from ldft.training.checkpointing.checkpointing import Checkpointing, DeviceInputs, decoder_layers
from ldft.training.checkpointing.keep_attention import DeviceOutputs, KeptAttention
from ldft.training.checkpointing.layer_inputs import HostInputs

MODES = ("gpu", "cpu", "gpu+attention", "cpu+attention", "seed", "deepspeed")
_CHUNK = 4096


def config_of(shape: str, device: str) -> Config:
    """model:layers:tokens as a config that offloads nothing."""
    name, layers, tokens = shape.split(":")
    composition.register()
    overrides = [f"model={name}", f"model.num_layers={layers}", f"seq_len.tokens={tokens}", f"launch.device={device}"]
    with initialize_config_dir(version_base="1.3", config_dir=str(environment.CONF_DIR)):
        config = from_dict(compose("config", overrides=[*overrides, "offload=none", "checkpointing=none"]))
    checks.resolve(config)  # train.precision=auto
    return config


class Subject:
    """A model, one batch and the modes that take turns on it."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.network = model.build(select(config), device)
        # Liger's loss comes without logits of all tokens.
        self.fused = liger.wanted(config)
        self.layers = decoder_layers(self.network)
        vocabulary = config.model.vocab_size
        self.tokens = torch.randint(vocabulary, (1, config.seq_len.tokens), device=device)
        self.input_bytes = host_estimate.layer_input_bytes(config)
        self._kept: dict[str, Any] = {}

    def loss(self) -> torch.Tensor:
        if self.fused:
            loss: torch.Tensor = self.network(input_ids=self.tokens, labels=self.tokens).loss
            return loss
        states = self.network.model(input_ids=self.tokens).last_hidden_state[0, :-1]
        labels = self.tokens[0, 1:]
        total: torch.Tensor = states.new_zeros((), dtype=torch.float32)
        for first in range(0, len(labels), _CHUNK):
            part = slice(first, first + _CHUNK)
            total = total + checkpoint(self._chunk, states[part], labels[part], use_reentrant=False)
        return total / len(labels)

    def _chunk(self, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.network.lm_head(states).float(), labels, reduction="sum")

    @contextmanager
    def mode(self, name: str) -> Iterator[None]:
        """Checkpointing in one mode; what it keeps in host memory is made at its first turn and stays."""
        around: AbstractContextManager[Any] = nullcontext()
        if name in ("cpu", "gpu+attention", "cpu+attention"):
            keeper = self._inputs() if name.startswith("cpu") else DeviceInputs()
            store = self._outputs() if name == "cpu+attention" else DeviceOutputs()
            Checkpointing(self.network, keeper, attention=KeptAttention(store) if "+" in name else None)
        elif name == "seed":
            buffers = self._kept.get(name)
            dtype = next(self.network.parameters()).dtype
            self._kept[name] = seed_checkpointing.install(self.network, self.tokens.numel(), dtype, buffers)
        else:
            for layer in self.layers:
                layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
                layer.gradient_checkpointing = True
            if name == "deepspeed":
                around = self._once(name, _deepspeed)
        try:
            with around:
                yield
        finally:
            seed_checkpointing.uninstall(self.network)

    def _inputs(self) -> HostInputs:
        pin = self.device.type == "cuda"
        kept: HostInputs = self._once(
            "cpu", lambda: HostInputs(len(self.layers), self.input_bytes, self.device, pin=pin)
        )
        return kept

    def _outputs(self) -> HostOutputs:
        size, pin = host_estimate.attention_output_bytes(self.config), self.device.type == "cuda"
        kept: HostOutputs = self._once(
            "cpu+attention", lambda: HostOutputs(len(self.layers), 1, size, self.device, pin=pin)
        )
        return kept

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def measure(self, name: str) -> dict[str, Any]:
        """One forward and backward pass; seconds by the device's clock, and its peak of allocated bytes."""
        clock = _Clock(self.device)
        with self.mode(name):
            clock.mark()
            loss = self.loss()
            clock.mark()
            loss.backward()
            clock.mark()
        forward_s, backward_s = clock.differences_s()
        return {
            "mode": name,
            "forward_s": forward_s,
            "backward_s": backward_s,
            "total_s": forward_s + backward_s,
            "loss": loss.item(),
            "peak_bytes": torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0,
        }

    def copies_s(self) -> tuple[float, float]:
        """Seconds that one layer input takes to the host and back, alone."""
        store = self._kept.get("cpu")
        if store is None or not store.host_tensors() or self.device.type != "cuda":
            return float("nan"), float("nan")
        host = store.host_tensors()[0][0]
        device = torch.empty_like(host, device=self.device)
        seconds = []
        for to, source in ((host, device), (device, host)):
            samples = []
            for _ in range(4):
                clock = _Clock(self.device)
                clock.mark()
                to.copy_(source, non_blocking=True)
                clock.mark()
                samples += clock.differences_s()
            seconds.append(statistics.median(samples[1:]))
        return seconds[0], seconds[1]


def _deepspeed() -> Any:
    from deepspeed.runtime.activation_checkpointing.offload_activations import (
        get_checkpoint_hidden_states_offloading_ctx_manager,
    )

    return get_checkpoint_hidden_states_offloading_ctx_manager(max_cpu_buffer_pool_count=256)


class _Clock(loop.Clock):
    """The loop's, waiting for the device before the first mark and after the last."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def differences_s(self) -> list[float]:
        if self._cuda:
            torch.cuda.synchronize()
        return super().differences_s()


def run(shape: str, modes: list[str], rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """All samples of one shape, printed and returned."""
    began = time.perf_counter()
    subject = Subject(config_of(shape, device.type), device)
    common = {
        "shape": shape,
        "attention": subject.network.config._attn_implementation,
        "fused_loss": subject.fused,
        "layers": len(subject.layers),
        "layer_input_bytes": subject.input_bytes,
    }
    print(
        f"\n{shape}: {common['attention']} attention, {'fused' if subject.fused else 'chunked'} loss, "
        f"model in {time.perf_counter() - began:.0f} s",
        flush=True,
    )
    samples = []
    for number in range(rounds + 1):
        for name in modes[number % len(modes) :] + modes[: number % len(modes)]:
            samples.append(common | subject.measure(name) | {"round": number, "warmup": number == 0})
    to_host_s, to_device_s = subject.copies_s()
    for sample in samples:
        sample |= {"copy_to_host_s": to_host_s, "copy_to_device_s": to_device_s}
    report(samples, modes)
    print(f"  {time.perf_counter() - began:.0f} s in all", flush=True)
    return samples


def report(samples: list[dict[str, Any]], modes: list[str]) -> None:
    def median(name: str, key: str) -> float:
        return float(statistics.median(s[key] for s in samples if s["mode"] == name and not s["warmup"]))

    first = samples[0]
    layers, size = first["layers"], first["layer_input_bytes"]
    for name in modes:
        totals = [s["total_s"] for s in samples if s["mode"] == name and not s["warmup"]]
        line = (
            f"  {name:<14}{median(name, 'forward_s'):8.3f} + {median(name, 'backward_s'):.3f} = {median(name, 'total_s'):.3f} s "
            f"(n={len(totals)}, {min(totals):.3f} to {max(totals):.3f}), peak {median(name, 'peak_bytes') / 2**30:.2f} GiB, "
            f"loss {median(name, 'loss'):.5f}"
        )
        if "gpu" in modes and name != "gpu":
            ratio = median(name, "total_s") / median("gpu", "total_s")
            less = (median("gpu", "peak_bytes") - median(name, "peak_bytes")) / size
            line += f"; {ratio:.4f} of gpu's time, VRAM less by {less:.2f} of {layers} layer inputs"
        print(line)
    if "gpu" in modes and "cpu" in modes:
        gpu, cpu = median("gpu", "total_s"), median("cpu", "total_s")
        out, back = first["copy_to_host_s"], first["copy_to_device_s"]
        forward, backward = median("gpu", "forward_s") / layers, median("gpu", "backward_s") / layers
        print(
            f"  limit 1.000 (an input of {size / 2**20:.0f} MiB goes out in {out * 1e3:.1f} ms beside {forward * 1e3:.1f} ms of "
            f"forward, comes back in {back * 1e3:.1f} ms beside {backward * 1e3:.1f} ms of backward; "
            f"unhidden: {1 + (layers - 1) * (out + back) / gpu:.4f})"
        )
        less = (median("gpu", "peak_bytes") - median("cpu", "peak_bytes")) / size
        print(
            f"  targets: time at most 1.015: {'met' if cpu / gpu <= 1.015 else 'MISSED'}; VRAM less by at least {layers - 3}: "
            f"{'met' if less >= layers - 3 else 'MISSED'}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("shapes", nargs="+", help="model:layers:tokens")
    parser.add_argument("--modes", nargs="+", default=["gpu", "cpu", "seed"], choices=MODES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    arguments = parser.parse_args()
    device = torch.device("cuda", 0) if arguments.device == "cuda" else torch.device("cpu")
    torch.manual_seed(0)
    commit, dirty = environment.source_commit()
    machine = {
        "git_commit": commit,
        "git_dirty": dirty,
        "gpu": torch.cuda.get_device_name() if arguments.device == "cuda" else None,
        "driver": environment.driver(),
        "versions": json.dumps(environment.describe()["versions"], default=str),
    }
    samples = []
    for shape in arguments.shapes:
        samples += run(shape, arguments.modes, arguments.rounds, device)
        gc.collect()
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
            getattr(torch.accelerator, "empty_host_cache", lambda: None)()
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([machine | sample for sample in samples]), arguments.out)


if __name__ == "__main__":
    main()
