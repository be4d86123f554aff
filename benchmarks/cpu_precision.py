"""The cost of train.precision=bf16 on a CPU without bf16 instructions: one matrix product of the tiny model's size, in bf16 and
fp32, with limits on the instructions that oneDNN may use. On a CPU that lacks the instructions, the wider limits have no effect.

    python benchmarks/cpu_precision.py [ROWS.parquet]
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys

import pandas as pd

from ldft import environment

LIMITS = ("AVX2", "AVX512_CORE", "AVX512_CORE_BF16", "ALL")
SHAPE = (1024, 256, 8192)  # rows, inner, columns
REPEATS = 5
CHILD = """
import json, sys, time, torch
rows, inner, columns, repeats = json.loads(sys.argv[1])
for dtype in (torch.float32, torch.bfloat16):
    a, b = torch.randn(rows, inner, dtype=dtype), torch.randn(inner, columns, dtype=dtype)
    a @ b
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        print(json.dumps([str(dtype).removeprefix("torch."), time.perf_counter() - start]))
"""


def main() -> int:
    rows = []
    for limit in LIMITS:
        # ATen's own code would use wider registers than the imitated CPU has.
        env = os.environ | {"ONEDNN_MAX_CPU_ISA": limit} | ({"ATEN_CPU_CAPABILITY": "avx2"} if limit == "AVX2" else {})
        words = [sys.executable, "-c", CHILD, json.dumps([*SHAPE, REPEATS])]
        done = subprocess.run(words, env=env, stdout=subprocess.PIPE, text=True, check=True)
        samples: dict[str, list[float]] = {}
        for line in done.stdout.splitlines():
            name, seconds = json.loads(line)
            samples.setdefault(name, []).append(seconds)
        medians = {name: statistics.median(values) for name, values in samples.items()}
        ratio = medians["bfloat16"] / medians["float32"]
        print(
            f"{limit:<17} fp32 {medians['float32']:.4f} s  bf16 {medians['bfloat16']:.4f} s  {ratio:.2f} times",
            flush=True,
        )
        rows += [
            {"onednn_max_cpu_isa": limit, "dtype": name, "shape": list(SHAPE), "seconds": values}
            for name, values in samples.items()
        ]
    if sys.argv[1:]:
        table = pd.DataFrame(rows)
        about = environment.describe()
        for name in ("git_commit", "git_dirty", "cpu", "num_cores", "kernel"):
            table[name] = about[name]
        table["torch"] = dict(about["versions"])["torch"]
        table.to_parquet(sys.argv[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
