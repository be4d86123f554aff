#!/usr/bin/env python3
"""`python -m ldft` in the emulated machine. Nothing is compiled in there: ldft's own kernel makes the update.

    .venv/bin/python tests/numa_vm/run_ldft.py model=nano seq_len.tokens=16 train.iterations=3 numa=weighted_0_3

Results go to .numa-vm/results in the current folder, unless results.dir is given (it has to lie in .numa-vm). In the guest
that folder is a copy in RAM, which is copied back at the end; whole.py says why.
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.numa_vm import machine

LIMIT_S = 900


def words(folder: Path, overrides: list[str]) -> list[str]:
    """The command line for the guest; results under `folder` unless `overrides` say where."""
    given = [word.removeprefix("results.dir=") for word in overrides if word.startswith("results.dir=")]
    kept = Path(given[-1]).absolute() if given else folder / "results"
    if not kept.is_relative_to(folder):
        raise machine.MachineError(f"results.dir={given[-1]} is lost with the machine; choose a folder in {folder}")
    kept.mkdir(parents=True, exist_ok=True)
    ldft = shlex.join([sys.executable, "-m", "ldft", *overrides, f"results.dir={kept}"])
    folder_in_ram = (
        f'host=$(mktemp -d); here={shlex.quote(str(kept))}; mount --bind "$here" "$host" && '
        'mount -t tmpfs results "$here" && cp -a "$host/." "$here"'
    )
    script = f'{folder_in_ram} || exit 1; {ldft}; status=$?; cp -a "$here/." "$host"; exit $status'
    return ["sh", "-c", script]


def main() -> int:
    folder = Path(".numa-vm").absolute()
    try:
        machine.require_ready()
        return machine.run(words(folder, sys.argv[1:]), folder, LIMIT_S)
    except (machine.MachineError, TimeoutError) as error:
        print(f"numa-vm: {error}", file=sys.stderr)
        return machine.BROKEN


if __name__ == "__main__":
    sys.exit(main())
