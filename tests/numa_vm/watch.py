"""Runs `python -m ldft` in the emulated machine and watches its worker from outside: `python -m numa_vm.watch FILE COMMAND...`.

What numa_maps of the worker says, read here and not by ldft, goes to FILE: the first and the last reading of its anonymous
memory by node. The row of the run is then compared with that.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from numa_vm.reader import Reader


def worker() -> int | None:
    """The process that trains, if there is one now."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and b"\0ldft.worker\0" in (entry / "cmdline").read_bytes():
                return int(entry.name)
        except OSError:
            continue
    return None


def main(path: Path, words: list[str]) -> int:
    ask = Reader()
    first: dict = {}
    last: dict = {}
    run = subprocess.Popen(words)
    while run.poll() is None:
        if (pid := worker()) is not None:
            try:
                reading = ask(pid, [])["anonymous_nodes"]
            except RuntimeError:  # it ended while it was read
                continue
            if sum(reading.values()) > sum(last.values()) / 2:  # not the remains of a process that is ending
                first, last = first or reading, reading
        time.sleep(0.2 if not first else 2)
    path.write_text(json.dumps({"status": run.returncode, "first": first, "last": last}))
    return run.returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
