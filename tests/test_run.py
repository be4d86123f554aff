"""One command, one real run, one row."""

from __future__ import annotations

import duckdb


def test_a_run_leaves_one_ok_row(ldft) -> None:
    done = ldft()
    assert done.exit_code == 0, done.stdout + done.stderr
    row = done.row
    assert row.status == "ok"
    assert len(row.iteration_s) == 3 and len(row.loss) == 3
    assert row.tokens_per_iteration == 64
    files = str(done.results_dir / "*" / "attempt-*" / "row.parquet")
    found = duckdb.connect().execute(f"select status, tokens_per_s from read_parquet('{files}')").fetchall()
    assert found == [("ok", row.tokens_per_s)]
