"""A run that ldft's own kernel updates compiles nothing, and loads neither torch's compiler nor peft."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Done

# Each Python that starts leaves the names of its modules when it ends.
AT_EXIT = """
import atexit, json, os, pathlib, sys
folder = pathlib.Path(os.environ["MODULES_DIR"])
atexit.register(lambda: (folder / f"{os.getpid()}.json").write_text(json.dumps(sorted(sys.modules))))
"""


def test_a_run_compiles_nothing_and_loads_no_compiler(ldft: Callable[..., Done], tmp_path: Path) -> None:
    modules, operators = tmp_path / "modules", tmp_path / "operators"
    modules.mkdir()
    (modules / "sitecustomize.py").write_text(AT_EXIT)
    path = os.pathsep.join(filter(None, (str(modules), os.environ.get("PYTHONPATH"))))
    variables = {"TORCH_EXTENSIONS_DIR": str(operators), "PYTHONPATH": path, "MODULES_DIR": str(modules)}
    done = ldft("launch.num_ranks=2", env=variables)
    assert done.exit_code == 0 and done.row.fused_step, done.stdout + done.stderr
    assert not operators.exists(), "an operator of DeepSpeed's was compiled"
    ranks = [
        names for names in map(json.loads, (f.read_text() for f in modules.glob("*.json"))) if "deepspeed" in names
    ]
    assert len(ranks) == 2
    for names in ranks:
        assert {"torch", "deepspeed.runtime.zero.muon.original_muon"} <= set(names), "the list was not read"
        assert not {"torch._inductor.compile_fx", "peft"} & set(names)
