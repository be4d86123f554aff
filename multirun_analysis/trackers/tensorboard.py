"""TensorBoard: one folder of event files per record. Needs ldft[tensorboard]."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from multirun_analysis.trackers.record import Record


def log(record: Record, where: str) -> str:
    """Write a record below the log folder `where`, in place of what was there of the same attempt. Returns its folder."""
    from torch.utils.tensorboard import SummaryWriter

    name = re.sub(r"[^\w.=+-]+", "_", record.name)
    folder = Path(where) / f"{name}-{record.identity}"
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    with SummaryWriter(str(unfinished)) as writer:
        begin, end = record.started_at.timestamp(), record.ended_at.timestamp()
        for name, values in record.series.items():
            for step, (value, time) in enumerate(zip(values, record.times, strict=False)):
                writer.add_scalar(f"iterations/{name}", value, step, walltime=time.timestamp())
        for name, value in record.metrics.items():
            writer.add_scalar(name, value, 0, walltime=end)
        tags = "\n".join(f"| {name} | {_cell(text)} |" for name, text in record.tags.items())
        writer.add_text("row", f"| column | value |\n|---|---|\n{tags}", walltime=end)
        for name, figure in record.figures.items():
            writer.add_figure(f"figures/{name}", figure, walltime=end)
        # Shows the configs of all runs as one table. In this folder (run_name), not in one below it.
        metrics = {name: value for name, value in record.metrics.items() if name in _OF_THE_TABLE}
        config = {**record.config, "status": record.status}
        writer.add_hparams(config, metrics, run_name=".", global_step=0)
        writer.add_text("started", record.started_at.isoformat(timespec="seconds"), walltime=begin)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return str(folder)


# TensorBoard's table of configs shows each metric as a column.
_OF_THE_TABLE = ("tokens_per_s", "iteration_median_s", "mfu", "peak_host_gib", "peak_vram_allocated_gib")


def _cell(text: str) -> str:
    """A text in a table of Markdown."""
    return " ".join(text.replace("|", r"\|").split())
