"""A trace on a GPU: VRAM, PCIe and utilisation of the very device that the rank uses."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def test_a_trace_has_the_ranks_gpu(ldft) -> None:
    done = ldft("launch.device=cuda", "seq_len.tokens=2048", "train.iterations=200", "monitor.interval_s=0.2")
    row = done.row
    assert row.status == "ok", done.stdout
    samples = pq.read_table(done.results_dir / row.trace_path).to_pylist()
    trained = [sample for sample in samples if sample["phase"] == "train"]
    devices = [device for sample in trained for device in sample["devices"]]
    assert len(devices) == len(trained) and {device["rank"] for device in devices} == {0}
    # NVML counts the CUDA context and torch's reserve, too.
    assert max(device["vram_used_mib"] for device in devices) >= 1024 * max(row.peak_vram_allocated_gib)
    assert all(0 < device["vram_used_mib"] < device["vram_total_mib"] for device in devices)
    assert any(device["utilisation_percent"] for device in devices)
    assert any(device["pcie_rx_mb_per_s"] for device in devices)
    assert any(device["pcie_tx_mb_per_s"] for device in devices)
    assert trained[-1]["ranks"][0]["pinned_bytes"] > 0
