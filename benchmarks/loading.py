"""What reading pretrained weights costs, and how much of it the search for NaN and infinity: `python -m benchmarks.loading`.

    python -m benchmarks.loading --device cuda model=llama3_8b
    python -m benchmarks.loading --rounds 9 model=smollm2_360m      # on a CPU

Saves a drawn model to --folder, then loads it in turn with the check and without, from the page cache and from the disk (the files'
pages are dropped before). Prints median seconds and GiB/s of each, and the check's share.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch

from ldft.config import Weights
from ldft.preflight.selection import select
from ldft.training import model, pretrained
from tests.conftest import compose


def drop_pages(files: list[Path]) -> None:
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", default=tempfile.gettempdir(), help="where the weights are saved; their disk is measured"
    )
    parser.add_argument("overrides", nargs="*")
    words = parser.parse_args()
    config = compose("model=smollm2_360m", "offload=none", f"launch.device={words.device}", *words.overrides)
    device = torch.device(words.device)
    network = model.build(select(config), device)
    with tempfile.TemporaryDirectory(dir=words.folder) as folder:
        network.save_pretrained(folder)
        os.sync()
        config.model.weights, config.model.path = Weights.pretrained, folder
        files = sorted(Path(folder).glob("*.safetensors"))
        gib = sum(file.stat().st_size for file in files) / 2**30
        seconds: dict[tuple[str, str], list[float]] = {}
        for _ in range(words.rounds):
            for source in ("page cache", "disk"):
                for check in ("checked", "unchecked"):
                    if source == "disk":
                        drop_pages(files)
                    start = time.perf_counter()
                    with patch.object(
                        pretrained, "is_finite", pretrained.is_finite if check == "checked" else lambda _: True
                    ):
                        pretrained.load(network, config.model, partitioned=False)
                    if words.device == "cuda":
                        torch.cuda.synchronize()
                    seconds.setdefault((source, check), []).append(time.perf_counter() - start)
    for source in ("page cache", "disk"):
        checked, unchecked = (statistics.median(seconds[source, check]) for check in ("checked", "unchecked"))
        print(
            f"{config.model.name} {gib:.2f} GiB on {words.device} from the {source}: {checked:.2f} s ({gib / checked:.2f} GiB/s), "
            f"without the check {unchecked:.2f} s: {100 * (checked / unchecked - 1):.0f}% more"
        )


if __name__ == "__main__":
    main()
