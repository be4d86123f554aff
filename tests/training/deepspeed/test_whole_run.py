"""A whole run of two ranks: its row has every role on every rank. As ldft's own kernel updates it, it compiles nothing, and loads
neither torch's compiler nor peft, nor MLflow, which DeepSpeed's autotuner would load. Its ranks start no process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldft.memory.topology import read_topology
from ldft.preflight.strategies import ROLES
from tests.conftest import FAST, Done
from tests.training.deepspeed.test_roles import PARAMETERS

NODE = read_topology().memory_nodes[0]

# Each Python that starts leaves the names of its modules when it ends, and what it has started.
AT_EXIT = """
import atexit, json, os, pathlib, sys
folder = pathlib.Path(os.environ["MODULES_DIR"])
started = []
sys.addaudithook(lambda event, about: started.append(str(about[1])) if event == "subprocess.Popen" else None)
atexit.register(lambda: (folder / f"{os.getpid()}.json").write_text(json.dumps([sorted(sys.modules), started])))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two ranks")


@pytest.fixture(scope="module")
def done(folder: Path) -> Done:
    """The run. It leaves the modules of each process in folder/modules."""
    modules = folder / "modules"
    modules.mkdir()
    (modules / "sitecustomize.py").write_text(AT_EXIT)
    path = os.pathsep.join(filter(None, (str(modules), os.environ.get("PYTHONPATH"))))
    variables = {
        "TORCH_EXTENSIONS_DIR": str(folder / "operators"),
        "PYTHONPATH": path,
        "MODULES_DIR": str(modules),
    }
    weighted = (f"numa.roles.momentum.nodes=[{NODE}]", "numa.roles.momentum.weights=[3]")
    words = [*FAST, f"results.dir={folder / 'results'}", "checkpointing=cpu", "launch.num_ranks=2", *weighted]
    run = subprocess.run(
        [sys.executable, "-m", "ldft", *words],
        capture_output=True, text=True, timeout=300, cwd=folder, env=os.environ | variables, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return Done(run.returncode, run.stdout, run.stderr, folder / "results")


def test_a_run_compiles_nothing_and_loads_no_compiler(done: Done, folder: Path) -> None:
    assert done.row.fused_step, done.stdout + done.stderr
    assert not (folder / "operators").exists(), "an operator of DeepSpeed's was compiled"
    files = (folder / "modules").glob("*.json")
    ranks = [found for found in map(json.loads, (f.read_text() for f in files)) if "deepspeed" in found[0]]
    assert len(ranks) == 2
    for names, started in ranks:
        assert started == []  # DeepSpeed would ask numactl in each iteration how many NUMA nodes there are
        assert {"torch", "deepspeed.runtime.zero.muon.original_muon"} <= set(names), "the list was not read"
        assert not {"torch._inductor.compile_fx", "peft", "mlflow"} & set(names)


def test_a_row_has_every_role_on_every_rank_and_says_who_placed_it(done: Done) -> None:
    row = done.row
    entries = {(entry["rank"], entry["role"]): entry for entry in row["roles"]}
    roles = [role for role in ROLES if role != "master_gradients"]  # the update reads those in compute precision
    assert set(entries) == {(rank, role) for rank in (0, 1) for role in roles}
    assert entries[0, "momentum"]["bytes"] == entries[1, "momentum"]["bytes"] == 4 * PARAMETERS // 2
    assert 2 * entries[0, "activations"]["bytes"] == row.checkpoint_host_gib * 2**30 > 0
    assert entries[0, "momentum"]["requested_share"] == entries[0, "momentum"]["share"] == 1.0
    assert entries[0, "variance"]["requested_share"] is None
    assert row.numa_mechanism in ("kernel", "stripes") and not row.pinned
    assert 0 < row.init_placement_s + row.init_first_touch_s < row.init_s
    assert "ldft: momentum              0.004  " in done.stdout and "100.0% -> 100.0%" in done.stdout
