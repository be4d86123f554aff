"""ldft against a plain script around stock DeepSpeed, same settings, in turns: what the tool itself costs.

    python benchmarks/against_plain.py OUT.parquet [--rounds N] [override ...]

Each round runs `python -m ldft` with the overrides and then benchmarks/plain_deepspeed.py with the DeepSpeed config of that row.
Prints tokens/s of both, the ratio and the model FLOP limit; keeps the raw samples of both in OUT.parquet.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ldft import results
from ldft.launch import cores_of_ranks

PEER = Path(__file__).with_name("plain_deepspeed.py")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    samples = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(options.rounds):
            folder = Path(scratch) / f"round-{number}"
            command = [sys.executable, "-m", "ldft", *options.overrides, f"results.dir={folder}"]
            subprocess.run(command, check=True)
            row = results.read(folder).iloc[0]
            config, settings, answer = (folder / name for name in ("config.json", "deepspeed.json", "plain.json"))
            config.write_text(row.config_json)
            settings.write_text(row.deepspeed_config_json)
            tools = str(Path(sys.executable).parent)
            cache = next(Path.home().glob(".cache/ldft/operators/*"), None)
            env = os.environ | {"PATH": tools + os.pathsep + os.environ["PATH"], "DS_ACCELERATOR": row.device_type}
            env["OMP_NUM_THREADS"] = str(len(cores_of_ranks(1)[0]))
            if cache:
                env["TORCH_EXTENSIONS_DIR"] = str(cache)
            print("plain DeepSpeed script ...", flush=True)
            done = subprocess.run(
                [sys.executable, str(PEER), str(config), str(settings), str(answer)],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            if done.returncode:
                print(done.stdout[-3000:])
                return 1
            plain = json.loads(answer.read_text())
            common = {
                "round": number,
                "config_json": row.config_json,
                "deepspeed_config_json": row.deepspeed_config_json,
                "tokens_per_iteration": int(row.tokens_per_iteration),
                "warmup_iterations": int(row.warmup_iterations),
                "model_tflop": row.model_tflop_dense + row.model_tflop_attention,
                "git_commit": row.git_commit,
                "git_dirty": row.git_dirty,
                "gpus": list(row.gpus),
                "cpu": row.cpu,
                "versions": dict(row.versions),
            }
            for who, iteration_s, init_s, vram, loss in (
                ("ldft", list(row.iteration_s), row.init_s, row.peak_vram_allocated_gib, list(row.loss)),
                ("plain", plain["iteration_s"], plain["init_s"], plain["peak_vram_allocated_gib"], plain["loss"]),
            ):
                peak = float(vram[0] if isinstance(vram, list) or hasattr(vram, "__len__") else vram or 0.0)
                samples.append(
                    common
                    | {"who": who, "iteration_s": iteration_s, "init_s": init_s, "peak_vram_gib": peak, "loss": loss}
                )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(samples), options.out)
    rates = {}
    for who in ("ldft", "plain"):
        mine = [s for s in samples if s["who"] == who]
        times = [t for s in mine for t in s["iteration_s"][s["warmup_iterations"] :]]
        rates[who] = mine[0]["tokens_per_iteration"] / statistics.median(times)
        tflops = mine[0]["model_tflop"] / statistics.median(times)
        init_s = statistics.median(s["init_s"] for s in mine)
        print(
            f"{who:6} {rates[who]:10.0f} tokens/s  median of {len(times)} iterations {statistics.median(times):.4f} s "
            f"(min {min(times):.4f}, max {max(times):.4f})  {tflops:.1f} model TFLOP/s  init {init_s:.1f} s  "
            f"peak VRAM {mine[0]['peak_vram_gib']:.2f} GiB"
        )
    print(f"ldft / plain = {rates['ldft'] / rates['plain']:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
