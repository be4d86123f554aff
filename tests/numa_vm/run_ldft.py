#!/usr/bin/env python3
"""`python -m ldft` in the emulated machine, with DeepSpeed's operators compiled ahead for its CPU.

    .venv/bin/python tests/numa_vm/run_ldft.py model=nano seq_len.tokens=16 train.iterations=3 numa=weighted_0_3

Results go to .numa-vm/results in the current folder, unless results.dir is given (it has to lie in .numa-vm).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from numa_vm import build_ops, machine

LIMIT_S = 900


def words(folder: Path, overrides: list[str]) -> list[str]:
    """The command line for the guest; results under `folder` unless `overrides` say where."""
    variables = build_ops.portable_environment(folder / "ops")
    if not any(word.startswith("results.dir=") for word in overrides):
        overrides = [*overrides, f"results.dir={folder / 'results'}"]
    return ["env", *(f"{name}={value}" for name, value in variables.items()), sys.executable, "-m", "ldft", *overrides]


def main() -> int:
    folder = Path(".numa-vm").absolute()
    try:
        machine.require_ready()
        print("numa-vm: building DeepSpeed's operators for x86-64-v3, once", flush=True)
        build_ops.build(folder / "ops")
        return machine.run(words(folder, sys.argv[1:]), folder, LIMIT_S)
    except (machine.MachineError, TimeoutError, RuntimeError) as error:
        print(f"numa-vm: {error}", file=sys.stderr)
        return machine.BROKEN


if __name__ == "__main__":
    sys.exit(main())
