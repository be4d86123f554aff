"""A sweep whose cells are started by a launcher of Hydra's, on machines that this one cannot look into."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import FAST

# A launcher in a package of its own, as users install them: it writes down the cells that it was to start.
PLUGIN = """
import json, pathlib
from dataclasses import dataclass
from hydra.core.config_store import ConfigStore
from hydra.plugins.launcher import Launcher

@dataclass
class Away:
    _target_: str = "hydra_plugins.away.AwayLauncher"
    file: str = ""

ConfigStore.instance().store(group="hydra/launcher", name="away", node=Away)

class AwayLauncher(Launcher):
    def __init__(self, file):
        self.file = file
    def setup(self, *, hydra_context, task_function, config):
        pass
    def launch(self, job_overrides, initial_job_idx):
        pathlib.Path(self.file).write_text(json.dumps([list(cell) for cell in job_overrides]))
        return []
"""


@pytest.mark.parametrize("left", ["launch.device", "train.precision", "plan.goal", ""])
def test_a_launchers_cells_need_device_and_precision_by_name(tmp_path: Path, left: str) -> None:
    package = tmp_path / "site" / "hydra_plugins" / "away"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(PLUGIN)
    path = os.pathsep.join(filter(None, (str(package.parents[1]), os.environ.get("PYTHONPATH"))))
    words = ["-m", "hydra/launcher=away", f"hydra.launcher.file={tmp_path}/cells", f"results.dir={tmp_path}/results"]
    said = [f"{key}={value}" for key, value in (("launch.device", "cpu"), ("train.precision", "fp32")) if key != left]
    said += ["plan=fastest"] * (left == "plan.goal")
    done = subprocess.run(
        [sys.executable, "-m", "ldft", *words, *FAST, "train.seed=1,2", *said],
        capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": path}, check=False,
    )  # fmt: skip
    if left:
        assert done.returncode == 2 and not (tmp_path / "cells").exists(), done.stdout + done.stderr
        assert done.stderr.count("\n") == 1 and re.search(
            rf"{left}: (auto|fastest): the launcher may run cells", done.stderr
        )
    else:
        cells = (tmp_path / "cells").read_text()
        assert "train.seed=1" in cells and "train.seed=2" in cells, done.stdout + done.stderr
