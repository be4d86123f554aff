"""`python -m ldft.bench nodes` with a GPU: copies are measured, and are those of pinned memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_copies_are_in_the_rows_and_in_the_profile(tmp_path: Path) -> None:
    file, profile = tmp_path / "rows.parquet", tmp_path / "profile.json"
    line = [sys.executable, "-m", "ldft.bench", "nodes", "--sizes", "256M", "--processes", "1", "--rows", str(file),
            "--profile", str(profile)]  # fmt: skip
    done = subprocess.run(line, capture_output=True, text=True, timeout=240, env=os.environ, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    frame = pd.read_parquet(file).set_index("kernel")["gb_per_s"]
    for way in ("h2d", "d2h"):
        assert frame.loc[[way]].max() > 10  # PCIe of any data-centre GPU; pageable copies reach half of that
    bandwidth = json.loads(profile.read_text())["bandwidth"]
    assert bandwidth["link"].keys() == {"h2d", "d2h"} and bandwidth["node0"].keys() == {"cpu", "h2d", "d2h"}
