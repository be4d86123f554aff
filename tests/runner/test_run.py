"""One command, one real run, one row."""

from __future__ import annotations

import re

import duckdb
import pytest

from ldft.runner import measured


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
    warnings = [line for line in done.stdout.splitlines() if line.startswith("ldft: warning: ")]
    assert warnings == [f"ldft: warning: {note}" for note in done.row.notes] and len(warnings) == 2
    assert warnings[0].startswith("ldft: warning: the loss is ")
    assert " in iteration 2: " in warnings[0] or " in iteration 3: " in warnings[0]
    # An update whose gradients are no numbers is left out, in which case an iteration takes less time.
    assert warnings[1].endswith(
        "iterations after warm-up made no update because gradients overflowed: they are too short"
    )


@pytest.mark.parametrize(
    ("skipped", "says"),
    [
        ([1, 1, 0, 0], None),
        (None, None),
        (
            [1, 1, 1, 0],
            "1 of 2 iterations .* too short; use more train.warmup_iterations, or a smaller train.loss_scale$",
        ),
    ],
)
def test_updates_left_out_after_warm_up_are_said(skipped: list[int] | None, says: str | None) -> None:
    found = measured.warnings({"loss": [1.0, 2.0, 1.0, 1.0], "skipped_updates": skipped, "warmup_iterations": 2})
    assert len(found) == bool(says) and all(re.match(says or "", one) for one in found)
