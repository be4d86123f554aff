"""`python -m ldft` as a whole in the emulated machine: all runs of whole.py in one boot, a test each."""

import shutil
import sys
from pathlib import Path

import pytest

from ldft import results

from . import machine, whole
from .conftest import ROOT, boot

RUNS = whole.all_runs()
# More memory than the cases have: the file pages of Python's libraries take some, and a node that is full of them is passed over.
NODES = "cpu:2048 cpu:2048 mem:1536 mem:1536"


@pytest.fixture(scope="session")
def runs(numa_vm: Path, request: pytest.FixtureRequest) -> Path:
    """The folder with what the runs of the selected tests left, of this session alone."""
    tests = [item for item in request.session.items if item.path == Path(__file__) and hasattr(item, "callspec")]
    wanted = [item.callspec.params["name"] for item in tests]
    folder = numa_vm / "runs"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    words = ["env", f"PYTHONPATH={ROOT / 'tests'}", sys.executable, "-m", "numa_vm.whole", str(folder)]
    # Software emulation of several CPUs has been seen to stand still, once, on an overloaded host. So what came to no end at all
    # is started again, once, in a fresh machine. A run that ends is judged as it is.
    for _ in range(2):
        left = [name for name in wanted if not (folder / f"{name}.json").exists()]
        if not left:
            break
        for name in left:
            shutil.rmtree(folder / name, ignore_errors=True)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("LDFT_NUMA_VM_NODES", NODES)
                boot(numa_vm, [*words, *left], whole.LIMIT_S * len(left))
        except (machine.MachineError, TimeoutError) as error:
            (folder / "error").write_text(f"numa-vm: {error}")
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_run(runs: Path, name: str) -> None:
    """It ends with an ok row, and row and watcher say what the run's own check wants."""
    path, failed = runs / f"{name}.json", runs / "error"
    assert path.exists(), failed.read_text() if failed.exists() else "the guest never came to the end of this run"
    seen = whole.load(path)
    rows = results.read(runs / name)
    assert len(rows) == 1, seen
    row = rows.iloc[0]
    assert row["status"] == "ok", f"{row['error_type']}: {row['error_message']}"
    assert seen.status == 0, seen
    RUNS[name].check(row, seen)
