"""Boots the emulated machine once for all cases, and once more for the full runs; see machine.py."""

import json
import os
import sys
from pathlib import Path

import pytest

from numa_vm import build_ops, machine

ROOT = Path(__file__).resolve().parents[2]
CASES_LIMIT_S, RUNS_LIMIT_S = 900, 1100
ran: list[str] = []


@pytest.fixture(scope="session")
def numa_vm() -> Path:
    """The folder that is written through from the machine. Skips, saying how to set it up, where the machine cannot boot."""
    try:
        machine.require_ready()
    except machine.MachineError as missing:
        if os.environ.get("LDFT_REQUIRE_NUMA_VM") == "1":
            pytest.fail(f"LDFT_REQUIRE_NUMA_VM=1, and the emulated machine is not to be had: {missing}", pytrace=False)
        pytest.skip(f"needs the emulated four-node machine: {missing}")
    folder = ROOT / ".numa-vm"
    folder.mkdir(exist_ok=True)
    return folder


def boot(folder: Path, words: list[str], limit_s: float) -> int:
    print(f"\nnuma-vm: booting for: {' '.join(words)[:150]}", flush=True)
    return machine.run(words, folder, limit_s)


@pytest.fixture(scope="session")
def guest_cases(numa_vm: Path) -> dict[str, dict]:
    """Runs every case of suite.py in one boot; returns what each said, by name."""
    path = numa_vm / "cases.json"
    path.unlink(missing_ok=True)
    words = ["env", f"PYTHONPATH={ROOT / 'tests'}", sys.executable, "-m", "numa_vm.suite", str(path)]
    try:
        status = boot(numa_vm, words, CASES_LIMIT_S)
    except (machine.MachineError, TimeoutError) as error:
        if not path.exists():
            pytest.fail(f"numa-vm: {error}", pytrace=False)
        status = str(error)
    results = json.loads(path.read_text()) if path.exists() else {}
    return {**results, "status": {"error": None if status == 0 else status}}


@pytest.fixture
def check_case(guest_cases: dict[str, dict]):
    """Fails as the case of this name did in the guest."""

    def check(name: str) -> dict | None:
        result = guest_cases.get(name)
        if result is None:
            pytest.fail(
                f"the guest never came to this case; it ended with {guest_cases['status']['error']}", pytrace=False
            )
        if result["error"]:
            pytest.fail(
                result.get("traceback") or f"{result['error']} ({guest_cases['status']['error']})", pytrace=False
            )
        ran.append(name)
        return result["saw"]

    return check


@pytest.fixture(scope="session")
def portable_ops(numa_vm: Path) -> dict[str, str]:
    """Variables under which DeepSpeed's operators, built here for x86-64-v3, load in the guest."""
    folder = numa_vm / "ops"
    build_ops.build(folder)
    return build_ops.portable_environment(folder)


def pytest_terminal_summary(terminalreporter) -> None:
    here = "numa_vm/"
    counts = {
        outcome: sum(
            here in report.nodeid for report in terminalreporter.stats.get(outcome, []) if hasattr(report, "nodeid")
        )
        for outcome in ("passed", "failed", "error", "skipped")
    }
    if any(counts.values()):
        said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        terminalreporter.write_line(f"numa-vm: tests of the emulated four-node machine: {said}")
