"""The parent: one config -> one run in fresh processes -> a status and one row. Never imports torch."""

from __future__ import annotations

import os
import signal
import socket
import statistics
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from ldft import attempt, checks, environment, launch, nodes, results, verdict
from ldft.config import Config, run_id, to_dict
from ldft.config.root import flatten
from ldft.errors import ConfigError, InternalError
from ldft.memory.weights import kernel_weights, restore_kernel_weights
from ldft.progress import Progress, seconds

_HEARTBEAT_S = 10.0


@dataclass(slots=True)
class Outcome:
    """What became of a run."""

    status: str
    row: dict[str, Any]
    row_path: Path

    @property
    def exit_code(self) -> int:
        """0 ok or skipped, 2 invalid input, 130 interrupted, 1 everything else."""
        return {"ok": 0, "skipped": 0, "invalid": 2, "interrupted": 130}.get(self.status, 1)


class _Interrupted(BaseException):
    def __init__(self, name: str) -> None:
        self.name = name


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise _Interrupted, once: what follows (ending ranks, the row) is not to be cut short."""

    def handle(number: int, frame: FrameType | None) -> None:
        for other in handlers:
            signal.signal(other, signal.SIG_IGN)
        raise _Interrupted(signal.Signals(number).name)

    handlers = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, previous in handlers.items():
            signal.signal(number, previous)


def tokens_per_iteration(config: Config) -> int:
    """Tokens of one update, over all ranks and accumulation steps."""
    train = config.train
    sequences = train.micro_batch_size * train.gradient_accumulation_steps * config.launch.num_ranks
    return sequences * config.seq_len.tokens


def run(config: Config) -> Outcome:
    """Run one config. Returns the outcome, whatever it is; raises only ConfigError for a results folder that cannot be
    used, ResultsError for a row that cannot be written, and bugs."""
    started = time.time()
    results_dir = Path(config.results.dir).expanduser().absolute()
    checks.check_results_dir(results_dir)
    checks.resolve_device(config)
    folder, number = attempt.claim(results_dir, run_id(config))
    row: dict[str, Any] = {
        "run_id": run_id(config),
        "attempt": number,
        "system": config.system,
        "started_at": datetime.fromtimestamp(started, UTC),
        "hosts": [socket.gethostname()],
        "device_type": config.launch.device.name,
        "status": "error",
        "warmup_iterations": config.train.warmup_iterations,
        "tokens_per_iteration": tokens_per_iteration(config),
    }
    waited_s = 0.0
    try:
        attempt.write_json(folder / "config.json", to_dict(config))
        row["config_json"] = (folder / "config.json").read_text()
        row |= {f"cfg.{key}": value for key, value in flatten(config).items()}
        row |= environment.describe()
        config.validate()
        checks.check_machine(config)
        checks.check_inputs(config, fetch=True)
        restore_kernel_weights()  # what a run that died may have left
        with _signals_raise(), kernel_weights(config.numa.placement):
            exits, decision, waited_s = _run_ranks(config, folder)
        reports = [attempt.rank_report(folder, rank) for rank in range(config.launch.num_ranks)]
        row |= nodes.columns(reports, row["hosts"][0])
        row |= _measured(config, exits, reports) | _judged(decision, folder, results_dir)
    except ConfigError as error:
        row |= {"status": "invalid", "error_type": "ConfigError", "error_message": str(error)}
    except Exception as error:
        log = folder / "internal-error.log"
        log.write_text(traceback.format_exc())
        row |= {"error_type": type(error).__name__, "error_message": f"internal error: {error}"}
        row["log_path"] = str(log.relative_to(results_dir))
        raise InternalError(log) from error
    except BaseException as error:
        row |= {"error_type": type(error).__name__, "error_message": f"ended by {type(error).__name__}"}
        raise
    finally:
        row["duration_s"] = time.time() - started
        row["parent_s"] = row["duration_s"] - waited_s
        results.write_row(row, folder / results.ROW_FILE)
    return Outcome(row["status"], row, folder / results.ROW_FILE)


def _run_ranks(config: Config, folder: Path) -> tuple[list[launch.RankExit], verdict.Verdict, float]:
    """Start the ranks, wait for them, and say how it went."""
    kills_before = verdict.oom_kills()
    interrupted, in_time = None, True
    last_beat = time.monotonic()
    train = config.train
    ranks = launch.Ranks(folder, config.launch.num_ranks, config.launch.device.name)
    wait_start = time.monotonic()
    with ranks, Progress(train.iterations, train.warmup_iterations, tokens_per_iteration(config)) as progress:

        def tick() -> None:
            nonlocal last_beat
            progress.show(attempt.rank_report(folder, 0))
            if time.monotonic() - last_beat > _HEARTBEAT_S:
                last_beat = time.monotonic()
                os.utime(folder / "started.json")

        try:
            in_time = launch.wait(ranks, config.launch.timeout_s, tick)
        except _Interrupted as stop:
            interrupted = stop.name
        waited_s = time.monotonic() - wait_start
        ranks.end()
    reports = [attempt.rank_report(folder, rank) for rank in range(config.launch.num_ranks)]
    kills = verdict.oom_kills() - kills_before
    decision = verdict.judge(ranks.exits, reports, timed_out=not in_time, interrupted=interrupted, new_oom_kills=kills)
    return ranks.exits, decision, waited_s


def _judged(decision: verdict.Verdict, folder: Path, results_dir: Path) -> dict[str, Any]:
    return {
        "status": decision.status,
        "exit_code": decision.exit_code,
        "signal": decision.signal,
        "error_type": decision.error_type,
        "error_message": decision.error_message,
        "log_path": str((folder / f"worker-{decision.rank}.log").relative_to(results_dir)),
    }


def _measured(config: Config, exits: list[launch.RankExit], reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The measured columns, from what the ranks reported before they ended (all of it, when they ended well)."""
    first = reports[0]
    copied = {name: first.get(name) for name in _FROM_RANK_0 if name in first}
    row: dict[str, Any] = copied | first.get("init", {})
    for name in ("peak_vram_allocated_gib", "peak_vram_reserved_gib"):
        if all(name in report for report in reports):
            row[name] = [report[name] for report in reports]
    if all("peak_host_gib" in report for report in reports):
        row["peak_host_gib"] = sum(report["peak_host_gib"] for report in reports)
    row["peak_rss_gib"] = [ended.peak_rss_gib for ended in sorted(exits, key=lambda ended: ended.rank)]
    counted = first.get("iteration_s", [])[config.train.warmup_iterations :]
    if counted:
        median_s = statistics.median(counted)
        row["iteration_median_s"] = median_s
        row["tokens_per_s"] = tokens_per_iteration(config) / median_s
        tflop = (first["model_tflop_dense"] + first["model_tflop_attention"]) / config.launch.num_ranks
        row["model_tflops_per_s"] = tflop / median_s
        if first.get("peak_tflops_per_s"):
            row["mfu"] = row["model_tflops_per_s"] / first["peak_tflops_per_s"]
    return row


_FROM_RANK_0 = (
    "deepspeed_config_json",
    "parameters",
    "trainable_parameters",
    "iteration_s",
    "forward_s",
    "backward_s",
    "step_s",
    "loss",
    "learning_rate",
    "model_tflop_dense",
    "model_tflop_attention",
    "pinned",
)


def summary(outcome: Outcome, config: Config) -> str:
    """What the terminal shows at the end: the seed's [RESULT] lines, then the row in a few words and its path."""
    row = outcome.row
    lines = []
    times = row.get("iteration_s") or []
    counted = times[config.train.warmup_iterations :]
    if counted:
        vram = max(row.get("peak_vram_allocated_gib") or [0.0]) * 1024
        lines += [
            f"[RESULT] Peak VRAM Usage (per GPU): {vram:.2f} MB",
            f"[RESULT] Avg Iteration Latency (total): {statistics.mean(counted):.2f} s",
            f"[RESULT] Each Iteration Latency (rank0): {counted}",
            f"[RESULT] Tokens (total): {row['tokens_per_iteration']}",
            f"[RESULT] Throughput (total): {row['tokens_per_s']:.2f} (token/s)",
        ]
    reports = [attempt.rank_report(outcome.row_path.parent, rank) for rank in range(config.launch.num_ranks)]
    lines += nodes.lines(row, reports)
    what = f"{config.model.name} {config.seq_len.tokens} tokens {row['device_type']} x{config.launch.num_ranks}"
    lines.append(f"ldft: {what}: {outcome.status} in {seconds(row['duration_s'])}")
    if outcome.status != "ok":
        if outcome.status != "invalid":  # that line goes to stderr
            bug = (
                f"internal error: {row['error_type']}: " if outcome.status == "error" and row.get("error_type") else ""
            )
            lines.append(f"ldft: {bug}{row.get('error_message') or outcome.status}")
        if row.get("log_path"):
            lines.append(f"ldft: log: {outcome.row_path.parents[2] / row['log_path']}")
    elif row.get("loss"):
        lines.append(
            f"ldft: median iteration {row['iteration_median_s']:.3f} s, {row['tokens_per_s']:.0f} tokens/s, "
            f"loss {row['loss'][0]:.4f} -> {row['loss'][-1]:.4f}, host peak {row['peak_host_gib']:.2f} GiB"
        )
    lines.append(f"ldft: row: {outcome.row_path}")
    return "\n".join(lines)
