"""One rank, in its own interpreter: `python -m ldft.worker ATTEMPT_DIR`, started by the parent with the rank variables set.

It rewrites rank-<r>.json after each phase and iteration, so that the results so far survive if it dies.
"""

from __future__ import annotations

import atexit
import dataclasses
import gc
import json
import logging
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from ldft import batch
from ldft.config import from_dict
from ldft.config.memory import Pinning
from ldft.errors import ConfigError
from ldft.hidden_packages import hidden
from ldft.memory.probe import MemoryTable
from ldft.preflight import device_estimate, device_inputs, device_rates, mlp_tiles
from ldft.preflight.resolved import complete
from ldft.preflight.selection import Selection, select
from ldft.results import attempt
from ldft.runner import node_memory, swap_files
from ldft.runner.final_status import OOM_DEVICE, OOM_HOST


class _Report:
    """This rank's results so far."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self._path = folder / f"rank-{rank}.json"
        self._values: dict[str, Any] = {"init": {}}
        self._phase_start: float | None = None
        self._phase_name = ""

    def put(self, **values: Any) -> None:
        self._values |= values
        attempt.write_json(self._path, self._values)

    def phase(self, name: str, text: str) -> None:
        """End the previous phase, whose duration becomes init_<name>_s in the row, and begin another."""
        now = time.monotonic()
        if self._phase_start is not None:
            self._values["init"][f"init_{self._phase_name}_s"] = now - self._phase_start
        self._phase_start, self._phase_name = now, name
        self.put(phase=name, phase_text=text)

    def train(self, interpreter_start: float, parts_s: dict[str, float]) -> None:
        self.phase("train", "training")
        self._phase_start = None
        self._values["init"] |= parts_s | {"init_s": time.time() - interpreter_start}
        self.put()


class _Warnings(logging.Handler):
    """Puts ldft's warnings in the report, whence they become notes of the row, and in the log."""

    def __init__(self, report: _Report) -> None:
        super().__init__(logging.WARNING)
        self._report = report
        self._texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._texts.append(record.getMessage())
        self._report.put(warnings=self._texts)
        print(f"ldft: warning: {self._texts[-1]}", file=sys.stderr)


def _kind_of(error: BaseException) -> str | None:
    """oom_device or oom_host if the exception shows it, else None."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return OOM_DEVICE
    # torch's CPU allocator raises a plain RuntimeError with the system's message.
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return OOM_HOST
    return None


def _peak_host_gib() -> float:
    """Peak resident memory, GiB, of this process without file pages, plus that of its child processes without shared pages."""
    kib = 0
    for tasks in Path("/proc/self/task").glob("*/children"):
        for child in tasks.read_text().split():
            kib += _peak_kib(Path("/proc", child, "status"), ("RssFile", "RssShmem"))
    return (kib + _peak_kib(Path("/proc/self/status"), ("RssFile",))) / 2**20


def _peak_kib(status: Path, without: tuple[str, ...]) -> int:
    try:
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    except OSError:  # a child that just ended
        return 0
    kib = {name: int(fields[name].split()[0]) for name in ("VmHWM", *without) if name in fields}
    return kib.pop("VmHWM", 0) - sum(kib.values())


def _train(selection: Selection, report: _Report, rank: int, interpreter_start: float, first: MemoryTable) -> None:
    config = selection.config
    report.phase("imports", "importing torch, transformers and DeepSpeed")
    gc.disable()  # a million objects that stay: to look through them again and again takes a fifth of this phase
    with hidden("mlflow"):  # 500 modules, a second, for DeepSpeed's autotuner, which nothing here uses
        import deepspeed
    import torch

    from ldft.training import cuda_build, data, flops, liger_kernels, loop, model, snapshot, tiled_mlp
    from ldft.training.checkpointing import checkpointing
    from ldft.training.deepspeed import engine as engines
    from ldft.training.deepspeed import fused_step, operators, role_memory

    gc.freeze()  # nor do later collections, which may come in the middle of an iteration
    atexit.register(gc.unfreeze)  # all is freed at the end, or nanobind reports leaks
    gc.enable()
    device_type = config.launch.device.name
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device_type == "cuda" else torch.device("cpu")
    if device_type == "cuda":
        torch.cuda.set_device(device)
        cuda_build.check(device)
        report.put(gpu_uuid=str(torch.cuda.get_device_properties(device).uuid))

    report.phase("operators", "loading DeepSpeed's operators")
    operators.load(selection, say=lambda text: report.put(phase_text=text))

    if config.data.reads_file:  # before the model is built: what the parent did not find in the file ends the run early
        report.phase("data", f"reading {config.data.path}")
        report.put(**data.read(config))

    report.phase("rendezvous", "waiting for all ranks")
    deepspeed.init_distributed(
        dist_backend="nccl" if device_type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        init_method=os.environ.get("LDFT_INIT_METHOD") or f"file://{os.environ['LDFT_RENDEZVOUS_DIR']}/store",
        rank=rank,
        world_size=config.launch.num_ranks,
        verbose=False,
    )

    report.phase("model", f"building {config.model.name}")
    run = complete(dataclasses.replace(selection, deepspeed=swap_files.placed(selection.deepspeed)), settled=True)
    engines.check(run.deepspeed)
    arenas = role_memory.arenas_of(run, rank)
    network = model.build(run, device, arenas)
    tokens = config.sequences_per_update * config.seq_len.tokens
    name = torch.cuda.get_device_name(device) if device_type == "cuda" else "cpu"
    report.put(
        deepspeed_config_json=json.dumps(run.deepspeed),
        parameters=model.num_parameters(network),
        trainable_parameters=model.num_parameters(network, trainable=True),
        attention=network.config._attn_implementation,
        liger_modules=liger_kernels.count_modules(network),
        fused_step=run.fused_step,
        overlap_step=run.overlap_step,
        mlp_tiles=run.mlp_tiles,
        device_inputs=run.device_inputs if device_inputs.waits(config) else None,
        gpu_share_gib=device_estimate.share_bytes(run) / 2**30,
        **flops.columns(network, config.model, tokens, config.seq_len.tokens),
        peak_tflops_per_s=device_rates.peak_tflops_per_s(name, config.train.precision),
        **role_memory.at_work(role_memory.so_far(arenas, [])),
    )

    report.phase("checkpoint_buffers", "allocating host memory for layer inputs")
    pin = device_type == "cuda" and config.memory.pinning is not Pinning.none
    placement = arenas.placement_of("activations") if arenas else None
    inputs = checkpointing.install(config, network, device, placement, pin=pin, device_inputs=run.device_inputs)
    if run.mlp_tiles > 1:
        tiled_mlp.install(network, run.mlp_tiles, skips=mlp_tiles.skips_in_recomputation(config))
    activations = inputs.host_tensors() if inputs else []
    report.put(
        checkpoint_host_gib=sum(t.nbytes for t in activations) / 2**30,
        **role_memory.at_work(role_memory.so_far(arenas, activations)),
    )

    report.phase("engine", "initialising DeepSpeed")
    engine = engines.build(run, network, arenas)
    if arenas is not None:
        arenas.of("activations").blocks = activations
    report.put(
        pinned=role_memory.pinned(run, arenas),
        role_addresses=role_memory.addresses(role_memory.tensors(engine, activations)),
        **role_memory.at_work(role_memory.tensors(engine, activations)),
    )

    def put(samples: loop.Samples) -> None:
        if len(samples.iteration_s) == 1:  # DeepSpeed allocates some buffers in its first iteration
            report.put(**role_memory.at_work(role_memory.tensors(engine, activations)))
        report.put(
            **{name: values for name, values in dataclasses.asdict(samples).items() if values}, **_memory(device)
        )

    report.train(interpreter_start, role_memory.seconds(arenas))
    loop.run(
        config,
        engine,
        device,
        put,
        lambda iteration: snapshot.recording(config, report.folder, iteration, rank),
        fused_step.updates_of(engine),
    )
    report.put(**node_memory.end(first), **role_memory.report(role_memory.tensors(engine, activations), arenas))
    report.phase("teardown", "ending")
    engine.destroy()
    torch.distributed.destroy_process_group()


def _memory(device: Any) -> dict[str, float]:
    import torch

    values = {"peak_host_gib": _peak_host_gib()}
    if device.type == "cuda":
        values["peak_vram_allocated_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        values["peak_vram_reserved_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
    return values


def main() -> int:
    interpreter_start = time.time()
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    config = from_dict(attempt.read_json(folder / "config.json"))
    report = _Report(folder, rank)
    logging.getLogger("ldft").addHandler(_Warnings(report))
    try:
        # Before anything imports numpy or torch: a policy applies to a thread and those it starts later, and only to new pages.
        selection = select(config, deepspeed=attempt.read_json(folder / attempt.DEEPSPEED) or None)
        selection = dataclasses.replace(selection, **attempt.read_json(folder / attempt.CHOICES))
        first, policy = node_memory.begin(selection)
        report.put(pid=os.getpid(), host=batch.host(), **policy)
        _train(selection, report, rank, interpreter_start, first)
    except BaseException as error:
        traceback.print_exc()
        kind = "invalid" if isinstance(error, ConfigError) else _kind_of(error)
        text = " ".join(str(error).split())[:500]
        report.put(error_type=type(error).__name__, error_message=text or type(error).__name__, error_kind=kind)
        return 1
    return 0
