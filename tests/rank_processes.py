"""Rank processes of a script, started by hand as the launcher would start them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ldft.training.deepspeed.operators import cache_dir


def environment_of(rank: int = 0, ranks: int = 1, device: str = "cpu") -> dict[str, str]:
    """This process's environment with a rank's variables; each has its share of the cores, and ldft's folder of operators."""
    return os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks)),
        "DS_ACCELERATOR": device,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "TORCH_EXTENSIONS_DIR": str(cache_dir()),
    }


def start_and_wait(
    script: Path,
    words: list[str],
    folder: Path,
    *,
    ranks: int = 1,
    device: str = "cpu",
    timeout_s: float = 900,
    **more: str,
) -> str:
    """Run `script WORDS` on every rank, with RANK and WORLD_SIZE in its environment, and fail if one fails. Returns what rank 0
    printed; rank r prints to folder/log-r. more: further environment variables."""
    processes = []
    for rank in range(ranks):
        environment = environment_of(rank, ranks, device) | more
        with (folder / f"log-{rank}").open("w") as log:
            command = [sys.executable, str(script), *words]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    codes = [process.wait(timeout=timeout_s) for process in processes]
    said = (folder / "log-0").read_text()
    assert codes == [0] * ranks, said[-3000:]
    return said
