"""Builds, on the host, the operators of DeepSpeed that a CPU run loads, for x86-64-v3, so that they run in the emulated machine.

    python build_ops.py FOLDER    build what is not up to date there; afterwards TORCH_EXTENSIONS_DIR=FOLDER picks it up

By default DeepSpeed compiles for the CPU that it finds (-march=native): such code dies with an illegal instruction in the
emulated machine. Compiling in there would take the better part of an hour.
"""

import os
import subprocess
import sys
from pathlib import Path

OPERATORS = {"deepspeed_shm_comm": "ShareMemCommBuilder"}
PORTABLE = Path(__file__).resolve().parent / "portable_ops"
LOAD = "from deepspeed.ops.op_builder.cpu import {0}; {0}().load(verbose=False)"


def portable_environment(folder: Path) -> dict[str, str]:
    """Variables under which a Python process loads (or builds) the portable operators of `folder`."""
    return {
        "TORCH_EXTENSIONS_DIR": str(folder),
        "PYTHONPATH": str(PORTABLE),
        # torch's loader calls ninja even when there is nothing to do; it lies beside this Python.
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu",
    }


def build(folder: Path) -> None:
    """Builds into `folder`; raises RuntimeError with the compiler's last lines when that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, builder in OPERATORS.items():
        # A lock that a killed build left behind would make torch's loader wait for ever.
        (folder / name / "lock").unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, "-c", LOAD.format(builder)],
            env={**os.environ, **portable_environment(folder)},
            capture_output=True,
            text=True,
        )
        if done.returncode or not (folder / name / f"{name}.so").exists():
            said = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            raise RuntimeError(f"cannot build DeepSpeed's {name} for x86-64-v3:\n{said}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        build(Path(sys.argv[1]).absolute())
    except RuntimeError as failure:
        sys.exit(str(failure))
