"""TensorBoard: one folder of event files per record. Needs ldft[tensorboard]."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from multirun_analysis.trackers.record import Record


def log(record: Record, where: str) -> str:
    """Write a record below the log folder `where`, in place of what was there of the same attempt. Returns its folder."""
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    name = re.sub(r"[^\w.=+-]+", "_", record.name)[:_LONGEST]
    folder = Path(where).expanduser() / f"{name}-{record.identity}"
    with tempfile.TemporaryDirectory() as unfinished:  # elsewhere: TensorBoard shows what it finds below the log folder
        with SummaryWriter(unfinished) as writer:
            end = record.ended_at.timestamp()
            for key, values in record.series.items():
                for step, (value, time) in enumerate(zip(values, record.times, strict=False)):
                    writer.add_scalar(f"iterations/{key}", value, step, walltime=time.timestamp())
            for key, value in record.metrics.items():
                writer.add_scalar(key, value, 0, walltime=end)
            tags = "\n".join(f"| {key} | {_cell(text)} |" for key, text in record.tags.items())
            writer.add_text("row", f"| column | value |\n|---|---|\n{tags}", walltime=end)
            for key, figure in record.figures.items():
                writer.add_figure(f"figures/{key}", figure, walltime=end)
            # The table of configs. Without the summary of the experiment, which the first run would write for all that follow,
            # TensorBoard finds out itself in which keys the runs differ.
            _, begun, ended = hparams({**record.config, "status": record.status}, {})
            for summary in (begun, ended):
                writer.file_writer.add_summary(summary, 0, walltime=end)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(unfinished, folder)
    return str(folder)


# Of a run's name this much goes into the name of its folder; file systems take 255 bytes.
_LONGEST = 150


def _cell(text: str) -> str:
    """A text in a table of Markdown."""
    return " ".join(text.replace("|", r"\|").split())
