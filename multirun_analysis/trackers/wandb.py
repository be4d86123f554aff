"""Weights & Biases: one run per record, online or, with WANDB_MODE=offline, in the folder WANDB_DIR. Needs ldft[wandb]."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from ldft.errors import ResultsError
from multirun_analysis import style
from multirun_analysis.trackers.record import Record


def log(record: Record, where: str) -> str:
    """Write a record to the project `where`, under the attempt's id. Returns the run's address, or its folder when offline.

    Raises ResultsError if W&B cannot be used: not logged in, no such entity, no network.
    """
    import wandb

    try:
        run = wandb.init(
            project=where,
            id=record.identity,
            name=record.name,
            config={**record.config, **{f"row.{key}": text for key, text in record.tags.items()}},
            tags=[record.status],
            job_type="cell",
            group=record.tags.get("sweep"),
            resume="allow",
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True, x_save_requirements=False),
        )
        for step in range(len(record.times)):
            run.log({key: values[step] for key, values in record.series.items() if step < len(values)}, step=step)
        run.summary.update({**record.metrics, "status": record.status})
        for path in record.files:
            shutil.copy(path, run.dir)  # run.save would link it, and the run may be uploaded when the results are gone
        with tempfile.TemporaryDirectory() as folder:
            for key, figure in record.figures.items():
                picture = style.save(figure, Path(folder), key)[0]
                run.log({f"figures/{key}": wandb.Image(str(picture))})
            run.finish(exit_code=0 if record.status == "ok" else 1)
    except wandb.errors.Error as error:
        said = " ".join(str(error).split())[:300]
        raise ResultsError(f"W&B: {said}; run wandb login, or set WANDB_MODE=offline") from error
    return str(run.dir) if run.offline else run.url or record.identity
