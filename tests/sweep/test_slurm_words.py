"""What ldft asks SLURM, and what it makes of the answers, by commands that answer as SLURM's do. tests/slurm has a real cluster."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ldft.errors import LdftError
from ldft.sweep import jobs, slurm
from tests.conftest import compose


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a command that prints this and ends with this code; its arguments are written to a file."""
    slurm.cores.cache_clear()
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def command(name: str, text: str, code: int = 0, error: str = "") -> Path:
        asked = tmp_path / f"{name}.asked"
        script = f'#!/bin/sh\necho "$@" > {asked}\n' + (f"cat <<'A'\n{text}\nA\n" if text else "")
        (tmp_path / name).write_text(script + (f"echo '{error}' >&2\n" if error else "") + f"exit {code}\n")
        (tmp_path / name).chmod(0o755)
        return asked

    return command


def test_the_queue_is_asked_for_whole_arrays_and_answers_by_element(answers: Callable[..., Path]) -> None:
    asked = answers("squeue", "7_0|RUNNING|n3|58:01\n7_1|PENDING|(Resources)|1:00:00\n12|COMPLETING|n4|0:00")
    found = slurm.queued(["12", "7_1", "7_0"])
    assert found == {
        "7_0": slurm.Job("RUNNING", "n3", "58:01"),
        "7_1": slurm.Job("PENDING", "(Resources)", "1:00:00"),
        "12": slurm.Job("COMPLETING", "n4", "0:00"),
    }
    assert "--array" in asked.read_text() and "--jobs=12,7" in asked.read_text()
    asked.unlink()
    assert slurm.queued([]) == {} and not asked.exists()


def test_jobs_that_the_queue_has_forgotten_are_not_in_it_and_other_errors_are_said(
    answers: Callable[..., Path],
) -> None:
    answers("squeue", "", 1, "slurm_load_jobs error: Invalid job id specified")
    assert slurm.queued(["7"]) == {}
    answers("squeue", "", 1, "slurm_load_jobs error: Unable to contact slurm controller")
    with pytest.raises(LdftError, match="Unable to contact slurm controller; try again"):
        slurm.queued(["7"])


@pytest.mark.parametrize(
    ("scontrol", "sacct", "found"),
    [
        ("JobId=7 JobState=OUT_OF_MEMORY Reason=x", "", ("oom_host", "OUT_OF_MEMORY")),
        ("JobId=7 JobState=TIMEOUT Reason=x", "", ("timeout", "TIMEOUT")),
        ("JobId=7 JobState=NODE_FAIL Reason=x", "", ("interrupted", "NODE_FAIL")),
        ("JobId=7 JobState=FAILED Reason=x", "", ("error", "FAILED")),
        ("", "CANCELLED by 0", ("interrupted", "CANCELLED")),  # scontrol has forgotten it
        ("", "", ("error", "")),  # no accounting either
    ],
)
def test_how_a_job_ended(answers: Callable[..., Path], scontrol: str, sacct: str, found: tuple[str, str]) -> None:
    answers("scontrol", scontrol, 0 if scontrol else 1)
    answers("sacct", sacct, 0 if sacct else 1)
    assert slurm.ended_as("7_1") == found


@pytest.mark.parametrize(
    ("nodes", "gpus", "cores"),
    [
        ("64|gpu:h200:8(S:0-1)\n96|gpu:h200:8(S:0-1)", 2, 16),
        ("64|gpu:h200:8(S:0-1)", 8, 64),
        ("64|gpu:8\n32|(null)", 1, 8),  # a node without GPUs does not count for one that needs them
        ("64|gpu:a100:2,gpu:h200:2", 1, 16),
        ("64|(null)\n48|(null)", 0, 48),
        ("4|gpu:8", 1, 1),
        ("64|(null)", 1, None),
        ("", 0, None),
    ],
)
def test_a_job_gets_as_large_a_part_of_the_cores_as_of_the_gpus(
    answers: Callable[..., Path], nodes: str, gpus: int, cores: int | None
) -> None:
    asked = answers("sinfo", nodes)
    assert slurm.cores("big", gpus) == cores
    assert "--partition=big" in asked.read_text() and "--Node" in asked.read_text()


def test_job_numbers_are_written_short() -> None:
    assert slurm.ranges(["12_0", "12_2", "12_1", "9", "12_5", "110_3"]) == "9, 12_[0-2,5], 110_[3]"
    assert slurm.arrays(["12_0", "9", "12_1", "110_3"]) == "9 12 110"


def test_a_job_asks_for_its_cells_estimate_and_a_margin(answers: Callable[..., Path]) -> None:
    answers("sinfo", "64|gpu:h200:8")
    common = ("model=llama3_3b", "seq_len=32k", "launch.device=cuda", "train.precision=bf16", "attention=sdpa")
    one, two = (jobs.needs(compose(*common, f"launch.num_ranks={ranks}"), None) for ranks in (1, 2))
    # 16 bytes for each of 3.21e9 parameters: 47.9 GiB; 27 layer inputs of 0.19 GiB; a process.
    assert (one.gpus_per_node, one.cpus_per_task) == (1, 8) and 58 <= one.mem_gb <= 63, one
    assert (two.gpus_per_node, two.cpus_per_task) == (2, 16) and one.mem_gb < two.mem_gb <= one.mem_gb + 12, two
    cpu = jobs.needs(compose("model=nano", "launch.device=cpu", "train.precision=fp32"), None)
    assert (cpu.gpus_per_node, cpu.cpus_per_task, cpu.mem_gb) == (None, 64, 3)
    # Refused: its job writes the row.
    refused = compose("model=nano", "launch.device=cpu", "train.precision=fp32", "attention=flash_attention_2")
    assert jobs.needs(refused, None).mem_gb == 2


def test_the_nodes_of_a_partition_are_those_of_all_states(answers: Callable[..., Path]) -> None:
    asked = answers("sinfo", "test*|3\ntest*|1\nhigh|7")
    assert slurm.nodes(None) == 4 and "--partition" not in asked.read_text()
    answers("sinfo", "high|7\nhigh|2")
    assert slurm.nodes("high") == 9
    answers("sinfo", "", 1)
    assert slurm.nodes("high") is None


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (
            "sbatch: error: resolve_ctls_from_dns_srv: Unknown host\nsbatch: error: fetch_config: DNS SRV lookup failed",
            "hydra.launcher: no SLURM cluster answers here: resolve_ctls_from_dns_srv: Unknown host; fetch_config: DNS SRV lookup "
            "failed; start it on one of its machines",
        ),
        (
            "sbatch: error: invalid partition specified: nope",
            "hydra.launcher: SLURM takes no job like this: invalid partition specified: nope; correct partition, account, time, "
            "memory or GPUs",
        ),
    ],
)
def test_what_sbatch_said_is_one_line_with_what_to_do(said: str, line: str) -> None:
    assert str(jobs.refused(RuntimeError(said))) == line
