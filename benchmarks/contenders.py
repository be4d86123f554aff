"""The contenders of a training benchmark, and how to run one: in its own processes, with a flat record as the result.

Ours is `python -m ldft`. A peer is a plain script, benchmarks/plain_deepspeed.py with its own DeepSpeed settings or
benchmarks/plain_fsdp2.py, with the same attention, Liger Kernel, precision, clipping and (torch's) pinning as ours, unless its name
says otherwise.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composed import resolved_config, without_plan

from ldft import environment, results
from ldft.config import Config, to_dict
from ldft.preflight import deepspeed_config
from ldft.runner.core_binding import cores_of_ranks
from ldft.runner.measured import tokens_per_iteration
from ldft.training.deepspeed import operators

FOLDER = Path(__file__).parent
Settings = dict[str, Any]


def stock(config: Config) -> Settings:
    """The settings that a DeepSpeed user must write: batch, precision, optimizer and offload; the rest is DeepSpeed's default."""
    ours = deepspeed_config.build(config)
    written = ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"]
    written += ["bf16", "fp16", "optimizer", "steps_per_print"]
    zero = {name: ours["zero_optimization"][name] for name in ("stage", "offload_param", "offload_optimizer")}
    shared = {"sequence_parallel_size": config.launch.sequence_parallel} if config.launch.sequence_parallel > 1 else {}
    return {name: ours[name] for name in written} | {"zero_optimization": zero} | shared


def async_checkpoints(config: Config) -> Settings:
    """The same with DeepSpeed's own offloading of layer inputs (pull request 8282 of deepspeedai/DeepSpeed, in 0.19.8)."""
    return stock(config) | {"activation_checkpointing": {"cpu_checkpointing": True}}


def seed(config: Config) -> Settings:
    """The seed repository's file (conf/offload/seed.yaml has its values)."""
    settings = stock(config)
    deepspeed_config.merge(settings, config.offload.deepspeed)
    return settings


@dataclass(frozen=True, slots=True)
class Contender:
    about: str
    overrides: tuple[str, ...]
    """Command-line overrides that define it; for a peer, they define the config from which its DeepSpeed settings are built."""
    settings: Callable[[Config], Settings] | None = None
    """DeepSpeed settings of a peer; None is ldft itself."""
    checkpointing: str = "gpu"
    """Checkpointing of a peer: gpu, seed, deepspeed, alst or none. ldft's is set by an override."""
    attention: str | None = None
    """None: the one given to the benchmark."""
    against: str | None = None
    """The ldft contender with which it is compared."""
    script: str = "plain_deepspeed.py"
    """What a peer runs."""


# What a peer is made from, and what ours is where it is to do the same.
AS_STOCK = ("memory.pinning=torch", "checkpointing=gpu", "optimizer.fused_step=false")
CONTENDERS = {
    "ours-in-gpu": Contender("ldft, nothing offloaded", ("offload=none", "checkpointing=gpu")),
    "ours-offload": Contender("ldft, all offloaded, layer inputs too", ("offload=full", "checkpointing=cpu")),
    "ours-in-gpu-recompute-less": Contender(
        "the same, with only the first 8 layers recomputed, where memory allows",
        ("offload=none", "checkpointing=gpu", "checkpointing.layers=8"),
    ),
    "ours-offload-keep-attention": Contender(
        "all offloaded, attention's outputs too",
        ("offload=full", "checkpointing=cpu", "checkpointing.keep_attention=host"),
    ),
    "ours-offload-keep-attention-on-device": Contender(
        "all offloaded, attention's outputs kept on the GPU",
        ("offload=full", "checkpointing=cpu", "checkpointing.keep_attention=device"),
    ),
    "ours-offload-no-share": Contender(
        "all offloaded, the optimizer's state too", ("offload=full", "checkpointing=cpu", "offload.gpu_share=0")
    ),
    "ours-offload-quarter-share": Contender(
        "all offloaded, a quarter of the optimizer's state on the GPU",
        ("offload=full", "checkpointing=cpu", "offload.gpu_share=0.25"),
    ),
    "ours-offload-update-within": Contender(
        "all offloaded, the update within the step",
        ("offload=full", "checkpointing=cpu", "optimizer.overlap_step=false"),
    ),
    "ours-offload-stock-memory": Contender(
        "all offloaded, into DeepSpeed's own tensors", ("offload=full", "checkpointing=cpu", "memory.pinning=torch")
    ),
    "ours-offload-stock-step": Contender(
        "all offloaded, updated by DeepSpeed", ("offload=full", "checkpointing=cpu", "optimizer.fused_step=false")
    ),
    "ours-as-plain": Contender("ldft set up as plain-same is", AS_STOCK),
    "plain-same": Contender(
        "plain script, DeepSpeed settings of ldft", (), deepspeed_config.build, against="ours-as-plain"
    ),
    "plain-in-gpu": Contender("plain script, nothing offloaded", ("offload=none",), stock, against="ours-in-gpu"),
    "plain-in-gpu-sdpa": Contender(
        "the same with torch's choice of attention", ("offload=none",), stock, attention="sdpa", against="ours-in-gpu"
    ),
    "plain-offload": Contender(
        "plain script, DeepSpeed's defaults", ("offload=full",), stock, against="ours-offload"
    ),
    "plain-offload-seed-checkpoints": Contender(
        "the same, layer inputs offloaded the seed's way", ("offload=full",), stock, "seed", against="ours-offload"
    ),
    "plain-offload-async-checkpoints": Contender(
        "the same, layer inputs offloaded by DeepSpeed", ("offload=full",), async_checkpoints, "deepspeed",
        against="ours-offload",
    ),
    "plain-offload-alst": Contender(
        "DeepSpeed's recipe for long sequences: layer inputs offloaded, TiledMLP", ("offload=full",), async_checkpoints,
        "alst", against="ours-offload",
    ),
    "fsdp2-offload": Contender(
        "torch's FSDP2, all but layer inputs offloaded", ("offload=full",), stock, against="ours-offload",
        script="plain_fsdp2.py",
    ),
    "seed": Contender("the seed's settings and checkpoints", ("offload=seed",), seed, "seed", against="ours-offload"),
    "seed-sdpa": Contender(
        "the same with torch's choice of attention", ("offload=seed",), seed, "seed", "sdpa", against="ours-offload"
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setting:
    """Settings shared by all contenders of a benchmark."""

    overrides: tuple[str, ...]
    """For ldft's command line, the same for all."""
    attention: str
    liger: bool
    timeout_s: float
    """Seconds after which a run is stopped."""


def config_of(contender: Contender, setting: Setting) -> Config:
    """The resolved config: of ldft's run, or what a peer's settings and CONFIG.json are made from."""
    peer = () if contender.settings is None else AS_STOCK
    return resolved_config([*setting.overrides, *contender.overrides, *peer])


def run(name: str, setting: Setting, folder: Path) -> dict[str, Any]:
    """The record of one run of a contender in an empty folder, successful or not: status, settings and raw samples."""
    contender = CONTENDERS[name]
    config = config_of(contender, setting)
    start = time.monotonic()
    folder.mkdir(parents=True)
    attention = contender.attention or setting.attention
    record = _ours(contender, setting, folder) if contender.settings is None else _peer(contender, setting, folder)
    return {
        "contender": name,
        "attention": attention,
        "liger": setting.liger,
        "ranks": config.launch.num_ranks,
        "warmup_iterations": config.train.warmup_iterations,
        "tokens_per_iteration": tokens_per_iteration(config),
        "device_type": config.launch.device.name,
        "duration_s": time.monotonic() - start,
    } | record


def surroundings(note: str) -> dict[str, Any]:
    """The columns about machine and source in every record."""
    found = environment.describe()
    return found | {"versions": json.dumps(dict(found["versions"])), "note": note}


SAMPLES = (
    "iteration_s",
    "forward_s",
    "backward_s",
    "step_s",
    "update_s",
    "update_wait_s",
    "loss",
    "init_s",
    "peak_host_gib",
    "peak_vram_allocated_gib",
)


def _ours(contender: Contender, setting: Setting, folder: Path) -> dict[str, Any]:
    overrides = without_plan([*setting.overrides, *contender.overrides, f"attention={setting.attention}"])
    overrides += [f"kernels.liger={str(setting.liger).lower()}", f"launch.timeout_s={setting.timeout_s}"]
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-m", "ldft", *overrides, f"results.dir={folder}"]
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
    rows = results.read_table(folder).to_pylist()
    if not rows:  # refused before a row was written: a mistake in the overrides
        raise SystemExit((folder / "log").read_text()[-3000:])
    row = rows[0]
    copied = (
        "status",
        "error_message",
        "config_json",
        "deepspeed_config_json",
        "model_tflop_dense",
        "model_tflop_attention",
    )
    record = {column: row[column] for column in (*SAMPLES, *copied)}
    settled = json.loads(record["config_json"])
    settled["results"]["dir"] = "results"  # not this benchmark's scratch folder
    return record | {"config_json": json.dumps(settled)}


def _peer(contender: Contender, setting: Setting, folder: Path) -> dict[str, Any]:
    assert contender.settings is not None
    config = config_of(contender, setting)
    texts = {"config.json": json.dumps(to_dict(config)), "deepspeed.json": json.dumps(contender.settings(config))}
    for file, text in texts.items():
        (folder / file).write_text(text)
    command = [sys.executable, str(FOLDER / contender.script), *(str(folder / file) for file in (*texts, "out.json"))]
    command += ["--attention", contender.attention or setting.attention, "--checkpointing", contender.checkpointing]
    command += ["--liger"] if setting.liger else []
    in_time, codes = _start(command, config, folder / "log", setting.timeout_s)
    log = (folder / "log").read_text(errors="replace")
    record: dict[str, Any] = dict.fromkeys(SAMPLES)
    record |= {"config_json": texts["config.json"], "deepspeed_config_json": texts["deepspeed.json"], "status": "ok"}
    if (folder / "out.json").is_file():
        out = json.loads((folder / "out.json").read_text())
        model, tokens = config.model, tokens_per_iteration(config)
        attention = config.seq_len.tokens * model.num_attention_heads * model.head_dim * model.num_layers
        # Counted as in ldft/training/flops.py: 6 FLOPs per token and linear weight, and the causal half of attention.
        record["model_tflop_dense"] = 6e-12 * tokens * out.pop("linear_weights")
        record["model_tflop_attention"] = 6e-12 * tokens * attention
        record |= out
    if not in_time:
        record |= {"status": "timeout", "error_message": f"ended after {setting.timeout_s:g} s"}
    elif any(codes):
        lines = [line for line in log.splitlines() if line.strip()] or ["no output"]
        message = next((line for line in reversed(lines) if "Error" in line), lines[-1])
        status = "oom_device" if "OutOfMemoryError" in log else "oom_host" if -signal.SIGKILL in codes else "error"
        record |= {"status": status, "error_message": f"exit codes {codes}: {message}"[:500]}
    return record


def _start(command: list[str], config: Config, log_path: Path, timeout_s: float) -> tuple[bool, list[int]]:
    """Start a peer's ranks as ldft starts its own: bound to their share of the cores. Returns (in time, exit codes)."""
    ranks = config.launch.num_ranks
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    # torch would wait forever for a peer that was killed as it compiled.
    operators.remove_stale_locks(operators.cache_dir())
    with log_path.open("w") as log:
        for rank, cores in enumerate(cores_of_ranks(ranks, config.launch.device.name)):
            environment = os.environ | {
                "PATH": str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"],
                "DS_ACCELERATOR": config.launch.device.name,
                "OMP_NUM_THREADS": str(len(cores)),
                "TORCH_EXTENSIONS_DIR": str(operators.cache_dir()),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_SIZE": str(ranks),  # as DeepSpeed's launcher sets it
                "MASTER_PORT": str(port),
            }

            def bind(cores: list[int] = cores) -> None:
                os.sched_setaffinity(0, cores)

            processes.append(
                subprocess.Popen(
                    command, env=environment, stdout=log, stderr=subprocess.STDOUT, preexec_fn=bind,
                    start_new_session=True,
                )
            )  # fmt: skip
    deadline = time.monotonic() + timeout_s
    try:
        # If a rank fails, the others wait in a collective: stop all at the first failure.
        while any(process.poll() is None for process in processes):
            if time.monotonic() > deadline or any(process.poll() for process in processes):
                break
            time.sleep(0.1)
        in_time = time.monotonic() <= deadline
    finally:
        codes = [process.poll() for process in processes]
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return in_time, [code for code in codes if code is not None]
