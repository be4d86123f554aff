"""One command, one real run, one row."""

from __future__ import annotations

import duckdb

from ldft import runner


def test_a_run_leaves_one_ok_row(ldft) -> None:
    done = ldft()
    assert done.exit_code == 0, done.stdout + done.stderr
    row = done.row
    assert row.status == "ok"
    assert len(row.iteration_s) == 3 and len(row.loss) == 3
    assert row.tokens_per_iteration == 64
    counted = [round(float(time_s), 4) for time_s in row.iteration_s[1:]]
    assert f"[RESULT] Each Iteration Latency (rank0): {counted}\n" in done.stdout
    files = str(done.results_dir / "*" / "attempt-*" / "row.parquet")
    found = duckdb.connect().execute(f"select status, tokens_per_s from read_parquet('{files}')").fetchall()
    assert found == [("ok", row.tokens_per_s)]


def test_a_loss_that_is_no_number_is_said_and_kept(ldft) -> None:
    done = ldft("optimizer.learning_rate=1e39")
    assert done.exit_code == 0 and done.row.status == "ok", done.stdout + done.stderr
    warnings = [line for line in done.stdout.splitlines() if line.startswith("ldft: warning: the loss is ")]
    assert warnings == [f"ldft: warning: {note}" for note in done.row.notes] and len(warnings) == 1
    assert " in iteration 2: " in warnings[0] or " in iteration 3: " in warnings[0]
    assert runner._diverged({"loss": [1.0, 2.0]}) == []
