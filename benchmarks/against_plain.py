"""ldft against a plain script around stock DeepSpeed, same settings, in turns: what the tool itself costs.

    python benchmarks/against_plain.py OUT.parquet [--rounds N] [override ...]

Each round runs `python -m ldft` with the overrides and benchmarks/plain_deepspeed.py with the DeepSpeed config of ldft's first row,
in alternating order. Prints both rates, their ratio and the model FLOP rate; keeps the raw samples of both in OUT.parquet.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ldft import results
from ldft.launch import cores_of_ranks
from ldft.training.operators import cache_dir

PEER = Path(__file__).with_name("plain_deepspeed.py")
COPIED = ("config_json", "deepspeed_config_json", "git_commit", "git_dirty", "cpu", "num_cores", "kernel", "driver")


def run_ldft(folder: Path, overrides: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """One run. Returns (settings and environment, samples)."""
    subprocess.run([sys.executable, "-m", "ldft", *overrides, f"results.dir={folder}"], check=True)
    row = results.read_table(folder).to_pylist()[0]
    common = {name: row[name] for name in COPIED} | {
        "tokens_per_iteration": row["tokens_per_iteration"],
        "warmup_iterations": row["warmup_iterations"],
        "model_tflop": row["model_tflop_dense"] + row["model_tflop_attention"],
        "device_type": row["device_type"],
        "gpus": row["gpus"],
        "versions": json.dumps(dict(row["versions"])),
    }
    vram = row["peak_vram_allocated_gib"]
    samples = {name: row[name] for name in ("iteration_s", "forward_s", "backward_s", "step_s", "loss", "init_s")}
    return common, samples | {"peak_vram_allocated_gib": vram[0] if vram else None}


def run_plain(folder: Path, common: dict[str, Any]) -> dict[str, Any]:
    """One run of the peer with the same settings, cores and compiled operators."""
    folder.mkdir()
    config, settings, answer = (folder / name for name in ("config.json", "deepspeed.json", "answer.json"))
    config.write_text(common["config_json"])
    settings.write_text(common["deepspeed_config_json"])
    print("plain DeepSpeed script ...", flush=True)
    environment = os.environ | {
        "PATH": str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"],
        "DS_ACCELERATOR": common["device_type"],
        "OMP_NUM_THREADS": str(len(cores_of_ranks(1)[0])),
        "TORCH_EXTENSIONS_DIR": str(cache_dir()),
    }
    log = folder / "log"
    with log.open("w") as out:
        command = [sys.executable, str(PEER), str(config), str(settings), str(answer)]
        done = subprocess.run(command, env=environment, stdout=out, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise SystemExit(log.read_text()[-3000:])
    samples: dict[str, Any] = json.loads(answer.read_text())
    return samples


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    samples = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for number in range(options.rounds):
            if number % 2 == 0:
                common, mine = run_ldft(scratch / f"ldft-{number}", options.overrides)
                theirs = run_plain(scratch / f"plain-{number}", common)
            else:
                theirs = run_plain(scratch / f"plain-{number}", common)
                common, mine = run_ldft(scratch / f"ldft-{number}", options.overrides)
            samples += [common | {"round": number, "who": who} | s for who, s in (("ldft", mine), ("plain", theirs))]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(samples), options.out)
    median = {}
    for who in ("ldft", "plain"):
        runs = [s for s in samples if s["who"] == who]
        times = [t for s in runs for t in s["iteration_s"][s["warmup_iterations"] :]]
        median[who] = statistics.median(times)
        print(
            f"{who:6} {common['tokens_per_iteration'] / median[who]:8.0f} tokens/s, median of {len(times)} iterations "
            f"{median[who]:.4f} s (min {min(times):.4f}, max {max(times):.4f}), {common['model_tflop'] / median[who]:.1f} model "
            f"TFLOP/s, init {statistics.median(s['init_s'] for s in runs):.1f} s"
        )
    print(f"tokens/s of ldft over plain: {median['plain'] / median['ldft']:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
