"""Boots the emulated machine once for all cases, and once for all whole runs; see machine.py."""

import json
import os
import sys
from pathlib import Path

import pytest

from . import machine

ROOT = Path(__file__).resolve().parents[2]
# Twice and more what they take on two busy cores.
CASES_LIMIT_S = 2400


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
def guest_cases(numa_vm: Path, request: pytest.FixtureRequest) -> dict[str, dict]:
    """Runs the cases of the tests that were selected, in one boot; returns what each said, by name."""
    path = numa_vm / "cases.json"
    path.unlink(missing_ok=True)
    tests = [item for item in request.session.items if "check_case" in getattr(item, "fixturenames", ())]
    wanted = [item.callspec.params["name"] for item in tests if hasattr(item, "callspec")]
    words = ["env", f"PYTHONPATH={ROOT / 'tests'}", sys.executable, "-m", "numa_vm.suite", str(path), *wanted]
    try:
        status: int | str = boot(numa_vm, words, CASES_LIMIT_S)
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
        return result["saw"]

    return check


def outcomes(reporter: pytest.TerminalReporter) -> dict[str, int]:
    """How many tests of this folder passed, failed and so on."""

    def count(outcome: str) -> int:
        reports = reporter.stats.get(outcome, [])
        return sum("numa_vm/" in getattr(report, "nodeid", "") for report in reports)

    return {outcome: count(outcome) for outcome in ("passed", "failed", "error", "skipped")}


def pytest_sessionfinish(session: pytest.Session) -> None:
    """CI must not be green because a test here was skipped, whatever the reason."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("LDFT_REQUIRE_NUMA_VM") == "1" and reporter and outcomes(reporter)["skipped"]:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = outcomes(terminalreporter)
    if any(counts.values()):
        said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        terminalreporter.write_line(f"numa-vm: tests of the emulated four-node machine: {said}")
    if counts["skipped"] and os.environ.get("LDFT_REQUIRE_NUMA_VM") == "1":
        terminalreporter.write_line("numa-vm: LDFT_REQUIRE_NUMA_VM=1, so a skip is a failure", red=True)
