"""One row per run: its columns (schema.py), its file (store.py), its attempt's folder (attempt.py). `read` returns all rows of a
folder.

    python -m ldft.results compact results/                   merge rows into larger files
    python -m ldft.results export --csv results/ > rows.csv

The rows are plain parquet. In duckdb, one view covers loose and merged files of every schema version (distinct, because a row is in
two files while a compaction runs):

    create view rows as select distinct on (run_id, attempt) * from read_parquet('results/**/row*.parquet', union_by_name=true);
    select "cfg.model.name", "cfg.seq_len.tokens", max(tokens_per_s) from rows where status = 'ok' group by all order by all;
    select run_id, status, error_message, log_path from rows where status not in ('ok', 'skipped');
    select run_id, unnest(nodes, recursive := true) from rows where status = 'ok';

pandas and polars write maps as lists, and DuckDB then casts no column of maps (`versions`) over all files. ldft itself reads such
files; `compact` gives them their types again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


def read_table(results_dir: str | Path, columns: list[str] | None = None) -> pa.Table:
    """All rows of a results folder, with the columns of every schema version. Unreadable files are named on stderr."""
    from ldft.results import store

    return store.read_table(results_dir, columns)


def read(results_dir: str | Path) -> pd.DataFrame:
    """All rows of a results folder as a pandas DataFrame, one row per attempt."""
    frame: pd.DataFrame = read_table(results_dir).to_pandas()
    return frame
