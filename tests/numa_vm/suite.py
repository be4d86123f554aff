"""Runs many cases in one process of the emulated machine and leaves one JSON file: booting and `import torch` are paid once.

A case is a function that raises when it finds something wrong, and may return a dictionary of what it saw. The modules that
define cases import nothing heavy at their top: the host imports them for the names, one pytest test each.
"""

import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

MODULES = ["guest_placement", "guest_full", "guest_process", "guest_drift"]


class Cases(dict[str, Callable[[], dict | None]]):
    """Cases by name, in the order in which they run."""

    def add(self, name: str, *arguments: object, **named: object) -> Callable:
        """Decorator: a case of this name that calls the function with these arguments. May be repeated."""

        def register(function: Callable) -> Callable:
            assert name not in self, name
            self[name] = lambda: function(*arguments, **named)
            return function

        return register


def cases_of(module: str) -> Cases:
    return importlib.import_module(f"{__package__}.{module}").CASES


def check(holds: object, *what: object) -> None:
    """An assertion that keeps its message without pytest's help, since there is no pytest in the guest's runs."""
    if not holds:
        raise AssertionError(" ".join(map(str, what)))


def oom_kills() -> int:
    """Processes that the kernel killed for want of memory since boot."""
    lines = Path("/proc/vmstat").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def save(path: Path, results: dict) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(results, indent=1))
    fresh.replace(path)


def main(path: Path, wanted: list[str]) -> None:
    """Runs the cases of these names, all when there are none; the file is written before each, so a crash names its case."""
    results: dict[str, dict] = {}
    for module in MODULES:
        for name, case in cases_of(module).items():
            if wanted and name not in wanted:
                continue
            results[name] = {"error": "the guest died in this case"}
            save(path, results)
            began, killed = time.monotonic(), oom_kills()
            try:
                results[name] = {"error": None, "saw": case()}
                check(oom_kills() == killed, "the kernel killed a process for want of memory")
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
                results[name] = {"error": text, "traceback": traceback.format_exc()}
            results[name]["seconds"] = round(time.monotonic() - began, 2)
            print(f"{results[name]['seconds']:7.2f} s  {name}: {results[name]['error'] or 'passed'}", flush=True)
    save(path, {**results, "complete": {"error": None}})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
