"""The summary printed at the end of a run."""

from __future__ import annotations

import statistics

from ldft.config import Config
from ldft.results import attempt
from ldft.runner import measured, node_memory
from ldft.runner.parent import Outcome
from ldft.terminal import seconds

# Iterations that are listed from both ends of a long run.
_ENDS = 5


def _listed(times: list[float]) -> str:
    """Seconds of each iteration; of a long run the first and last few and how many there are."""
    shown = [str(round(time_s, 4)) for time_s in times]
    if len(shown) <= 2 * _ENDS + 1:
        return f"[{', '.join(shown)}]"
    return f"[{', '.join([*shown[:_ENDS], '...', *shown[-_ENDS:]])}] ({len(shown)} iterations; the row has all)"


def summary(outcome: Outcome, config: Config) -> str:
    """The summary's text: the seed's [RESULT] lines (that of VRAM on GPUs only), then the row's main values and its path."""
    row = outcome.row
    lines = []
    times = row.get("iteration_s") or []
    counted = times[config.train.warmup_iterations :]
    if counted:
        if vram := row.get("peak_vram_allocated_gib"):
            lines.append(f"[RESULT] Peak VRAM Usage (per GPU): {max(vram) * 1024:.2f} MB")
        lines += [
            f"[RESULT] Avg Iteration Latency (total): {statistics.mean(counted):.2f} s",
            f"[RESULT] Each Iteration Latency (rank0): {_listed(counted)}",
            f"[RESULT] Tokens (total): {row['tokens_per_iteration']}",
            f"[RESULT] Throughput (total): {row['tokens_per_s']:.2f} (token/s)",
        ]
    reports = [attempt.rank_report(outcome.row_path.parent, rank) for rank in range(config.launch.num_ranks)]
    lines += node_memory.lines(row, reports)
    warnings, notes = measured.warnings(row), (row.get("notes") or [])[outcome.num_said :]
    lines += [f"ldft: {'warning' if note in warnings else 'note'}: {note}" for note in notes]
    what = f"{config.model.name} {config.seq_len.tokens} tokens {row['device_type']} x{config.launch.num_ranks}"
    lines.append(f"ldft: {what}: {outcome.status} in {seconds(row['duration_s'])}")
    if outcome.status != "ok":
        if outcome.status != "invalid":  # that line goes to stderr
            unexpected = outcome.status == "error" and row.get("error_type") not in (
                None,
                "AuditError",
                "UnknownLayoutError",
            )
            bug = f"internal error: {row['error_type']}: " if unexpected else ""
            lines.append(f"ldft: {bug}{row.get('error_message') or outcome.status}")
        if row.get("log_path"):
            lines.append(f"ldft: log: {outcome.row_path.parents[2] / row['log_path']}")
    elif row.get("loss"):
        expected = row.get("predicted_iteration_s")
        lines.append(
            f"ldft: median iteration {row['iteration_median_s']:.3f} s{f' ({expected:.3f} s expected)' if expected else ''}, "
            f"{row['tokens_per_s']:.0f} tokens/s, "
            f"loss {row['loss'][0]:.4f} -> {row['loss'][-1]:.4f}, "
            f"host peak {row['peak_host_gib']:.2f} GiB without mapped files, which the table above counts"
        )
    snapshots = sorted(path.name for path in outcome.row_path.parent.glob("snapshot-*.pickle"))
    if snapshots:
        names = ", ".join(snapshots)
        lines.append(
            f"ldft: memory snapshot: {outcome.row_path.parent}/{names}; open it at https://pytorch.org/memory_viz"
        )
    lines += outcome.logged
    lines.append(f"ldft: row: {outcome.row_path}")
    return "\n".join(lines)
