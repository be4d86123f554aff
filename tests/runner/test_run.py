"""One command, one real run, one row."""

from __future__ import annotations

import re
import subprocess
import sys

import duckdb
import pytest

from ldft import results
from ldft.results.schema import MEASURED
from tests.conftest import FAST, Done

# Null in an ok run of one command on a machine without GPUs, and why.
NULL = {
    "sweep": "a single run",
    "signal": "no rank was ended by one",
    "error_type": "nothing failed",
    "error_message": "nothing failed",
    "mfu": "a CPU's peak is not known",
    "peak_vram_allocated_gib": "no device memory",
    "peak_vram_reserved_gib": "no device memory",
    "predicted_vram_gib": "no device memory",
    "predicted_vram_json": "no device memory",
    "gpu_share_choice": "no device memory",
    **dict.fromkeys((f"predicted_{name}_s" for name in ("iteration", "forward", "backward", "step")), "no GPU"),
    "predicted_bound": "no GPU",
    "job_id": "no job",
    "host_environments_json": "one host",
    "numa_mechanism": "numa=default",
    "documents_read": "data=random",
    "documents_skipped": "data=random",
    "sequences_skipped": "data=random",
    "init_data_s": "data=random",
}
# What the machine decides.
EITHER = {
    "driver": "there may be a GPU",
    "modelled_traffic_s": "this machine may have a profile",
    "numa_kernel_weights_json": "since Linux 6.9",
    "git_commit": "this may be a checkout, or not",
    "git_dirty": "likewise",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The run of one command. Its standard error lists what the parent imports."""
    folder = tmp_path_factory.mktemp("plain")
    python = [sys.executable, "-X", "importtime", "-m", "ldft"]
    done = subprocess.run(
        [*python, *FAST, "launch.device=cpu", f"results.dir={folder / 'results'}"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr, folder / "results")


def test_a_run_leaves_one_ok_row(plain: Done) -> None:
    assert plain.exit_code == 0, plain.stdout + plain.stderr
    row = plain.row
    assert row.status == "ok"
    assert len(row.iteration_s) == 3 and len(row.loss) == 3
    assert row.tokens_per_iteration == 64
    counted = [round(float(time_s), 4) for time_s in row.iteration_s[1:]]
    assert f"[RESULT] Each Iteration Latency (rank0): {counted}\n" in plain.stdout
    files = str(plain.results_dir / "*" / "attempt-*" / "row.parquet")
    found = duckdb.connect().execute(f"select status, tokens_per_s from read_parquet('{files}')").fetchall()
    assert found == [("ok", row.tokens_per_s)]


def test_every_column_of_a_run_has_a_producer(plain: Done) -> None:
    (row,) = results.read_table(plain.results_dir).to_pylist()
    empty = {column.name for column in MEASURED if row[column.name] is None}
    assert empty - EITHER.keys() == NULL.keys()


def test_the_parent_never_imports_torch_or_pandas(plain: Done) -> None:
    imported = set(re.findall(r"\|\s+([\w.]+)$", plain.stderr, re.MULTILINE))
    assert {"hydra", "ldft.runner.parent", "pyarrow.parquet"} <= imported, "the list of imports was not read"
    assert not imported & {"torch", "deepspeed", "transformers", "pandas.core"}


def test_a_rank_ends_without_a_word(plain: Done) -> None:
    """Its log has nothing after the run: what was kept from garbage collection is freed, and no library reports a leak."""
    log = (plain.results_dir / plain.row.log_path).read_text()
    assert "leak" not in log, log


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
