"""snapshot=true on a GPU: a file a rank that torch's viewer can read, of one iteration, named on the terminal."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from ldft.environment import PACKAGE_DIR
from ldft.training import snapshot
from tests.gpu.machine import cuda_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def test_a_run_leaves_its_snapshot_beside_the_row(ldft) -> None:
    done = ldft("snapshot=true", "launch.device=cuda", "offload=none")
    assert done.exit_code == 0, done.stdout + done.stderr
    files = list(done.results_dir.glob("*/attempt-1/snapshot-*.pickle"))
    assert [file.name for file in files] == ["snapshot-0.pickle"]
    assert f"memory snapshot: {files[0]}; open it at https://pytorch.org/memory_viz" in done.stdout
    history = pickle.loads(files[0].read_bytes())
    events = [event for device in history["device_traces"] for event in device]
    assert 100 < len(events) <= snapshot.MAX_EVENTS
    functions = {frame["name"] for event in events for frame in event.get("frames", [])}
    assert "run" in functions  # ldft's loop is on the stacks


def test_a_recomputation_that_stops_early_is_recorded_like_any_other(ldft) -> None:
    """An MLP in tiles ends it within an autograd function."""
    words = ("checkpointing=gpu", "kernels.mlp_tiles=4", "train.precision=bf16")
    done = ldft("snapshot=true", "launch.device=cuda", "offload=none", *words)
    assert done.exit_code == 0, done.stdout + done.stderr
    assert done.row.status == "ok" and done.row.mlp_tiles == 4
    assert len(list(done.results_dir.glob("*/attempt-1/snapshot-0.pickle"))) == 1


@pytest.mark.parametrize(("warmup", "chosen"), [(2, 1), (0, 4)])
def test_one_iteration_is_recorded_that_counts_in_no_median(tmp_path: Path, warmup: int, chosen: int) -> None:
    config = cuda_config("snapshot=true", f"train.warmup_iterations={warmup}")
    for iteration in range(config.train.iterations):
        with snapshot.recording(config, tmp_path, iteration, 3):
            held = torch.empty(iteration + 1, 1 << 20, device="cuda")
            del held
    history = pickle.loads((tmp_path / "snapshot-3.pickle").read_bytes())
    sizes = {event["size"] for device in history["device_traces"] for event in device if event["action"] == "alloc"}
    assert sizes == {(chosen + 1) * 4 << 20}


def test_the_number_of_events_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "MAX_EVENTS", 50)
    config = cuda_config("snapshot=true")
    with snapshot.recording(config, tmp_path, 1, 0):
        for _ in range(500):
            torch.empty(1 << 20, device="cuda")
    history = pickle.loads((tmp_path / "snapshot-0.pickle").read_bytes())
    assert 0 < sum(len(device) for device in history["device_traces"]) <= 50


def test_the_blocks_of_its_peak_add_up_to_torchs_own_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PACKAGE_DIR.parent / "benchmarks"))
    import snapshot_peak

    config = cuda_config("snapshot=true", "train.warmup_iterations=0", "train.iterations=1")
    before = [torch.empty(size << 20, dtype=torch.uint8, device="cuda") for size in (3, 11)]
    torch.cuda.reset_peak_memory_stats()
    with snapshot.recording(config, tmp_path, 0, 0):
        before.pop()
        held = torch.empty(5 << 20, dtype=torch.uint8, device="cuda")
        torch.empty(13 << 20, dtype=torch.uint8, device="cuda")
        more = held.clone()
    found = snapshot_peak.peak(pickle.loads((tmp_path / "snapshot-0.pickle").read_bytes()))
    assert sum(size for size, _ in found) == torch.cuda.max_memory_allocated()
    assert {5 << 20, 13 << 20} <= {size for size, where in found if where != snapshot_peak.BEFORE}
    assert more.numel() == held.numel()
