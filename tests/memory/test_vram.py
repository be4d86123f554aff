"""Device memory by formula against measured peaks."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from ldft.memory import vram
from tests.conftest import compose

ROWS = list(csv.DictReader((Path(__file__).parent / "measured_vram.csv").read_text().splitlines()[1:]))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row.values()))
def test_the_formula_is_within_five_percent_of_the_measured_peak(
    row: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose(
        f"model={row['model']}", f"seq_len.tokens={row['tokens']}", f"train.micro_batch_size={row['batch']}",
        f"launch.num_ranks={row['ranks']}", f"offload={row['offload']}", f"train.precision={row['precision']}",
        f"checkpointing={row['checkpointing']}", "launch.device=cuda",
    )  # fmt: skip
    monkeypatch.setattr(vram, "fuses_loss", lambda config: row["liger"] == "true")
    peak_gb = sum(vram.device_bytes(config).values()) / 1e9
    assert peak_gb == pytest.approx(float(row["peak_gb"]), rel=0.05)


def test_what_is_sharded_shrinks_with_the_ranks() -> None:
    def peak(ranks: int, offload: str) -> int:
        line = ("model=llama3_8b", "launch.device=cuda", f"offload={offload}", f"launch.num_ranks={ranks}")
        return sum(vram.device_bytes(compose(*line)).values())

    assert peak(8, "zero3") < peak(4, "zero3") < peak(2, "zero3")
    assert peak(8, "none") == peak(1, "none")
