"""A run whose ranks share sequences, from the command to the row, and what is said of one before it runs."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from ldft.training import flops, verification
from ldft.training.architecture import hf_config
from tests.conftest import FAST, Done, compose

SHARED = ("launch.device=cpu", "train.precision=fp32", "launch.num_ranks=2", "launch.sequence_parallel=2")


def test_a_row_counts_the_tokens_and_flops_of_whole_sequences(ldft: Callable[..., Done]) -> None:
    done = ldft(*SHARED, "train.micro_batch_size=2")
    row = done.row
    assert row["status"] == "ok" and row["attention"] == "ulysses_sdpa", done.stderr
    model = compose(*FAST).model
    wanted = flops.columns(verification.outline(hf_config(model), model), model, 2 * 64, 64)
    assert {name: row[name] for name in wanted} == pytest.approx(wanted)
    assert row["tokens_per_iteration"] == 2 * 64
    assert row["tokens_per_s"] == pytest.approx(2 * 64 / row["iteration_median_s"])
    each = (row["model_tflop_dense"] + row["model_tflop_attention"]) / 2
    assert row["model_tflops_per_s"] == pytest.approx(each / row["iteration_median_s"])


def test_a_dry_run_says_that_sequences_are_shared_and_by_which_attention(here: Callable[..., Done]) -> None:
    out = here(*FAST, *SHARED, "lora=r16", "lora.dropout=0.1", "dry_run=true").stdout
    assert re.search(r"^attention: ulysses_sdpa; ", out, re.MULTILINE)
    assert "\nsequences: each is shared by 2 ranks, 32 tokens on each\n" in out
    assert "\nnote: launch.sequence_parallel: lora.dropout=0.1: dropped at random, " in out
    alone = here(*FAST, *SHARED[:2], "dry_run=true").stdout
    assert re.search(r"^attention: sdpa; ", alone, re.MULTILINE) and "shared by" not in alone


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("launch.sequence_parallel=0",), "launch.sequence_parallel: 0 is too small; use 1 or more"),
        (("launch.sequence_parallel=-2",), "launch.sequence_parallel: -2 is too small; use 1 or more"),
        (
            ("launch.sequence_parallel=2",),
            "launch.sequence_parallel: 2 does not divide launch.num_ranks=1; use a divisor, or launch.num_ranks=2",
        ),
        (
            ("launch.num_ranks=4", "launch.sequence_parallel=3"),
            "launch.sequence_parallel: 3 does not divide launch.num_ranks=4; use a divisor, or launch.num_ranks=6",
        ),
        (("launch.num_hosts=0",), "launch.num_hosts: 0 does not divide launch.num_ranks=1; use a divisor"),
        (("launch.num_ranks=0",), "launch.num_ranks: 0 is too small; use 1 or more"),
    ],
)
def test_a_number_of_ranks_that_is_not_possible_is_one_line_and_a_row(
    here: Callable[..., Done], words: tuple[str, ...], said: str
) -> None:
    done = here(*FAST, *SHARED[:2], *words)
    assert done.exit_code == 2 and done.stderr == f"ldft: {said}\n" and done.row["error_message"] == said


@pytest.mark.parametrize("family", ["falcon", "doge", "diffllama", "persimmon"])
def test_a_family_whose_attention_does_not_fit_is_refused_before_ranks_start(
    here: Callable[..., Done], family: str
) -> None:
    done = here(*FAST, *SHARED, f"model.family={family}")
    assert done.exit_code == 2 and done.row["status"] == "invalid"
    assert done.stderr.startswith(f"ldft: launch.sequence_parallel: 2: transformers' {family} is not known to mix ")


def test_a_sweep_goes_on_after_a_number_that_is_not_possible(here: Callable[..., Done]) -> None:
    out = here("-m", *FAST, *SHARED[:2], "launch.sequence_parallel=0,1", "dry_run=true").stdout
    assert "invalid: launch.sequence_parallel: 0 is too small; use 1 or more" in out and "fits: host" in out
