"""A process that is killed in a save, while its update is in progress, leaves the checkpoint before it whole and no half of this.

Whoever resumes takes the folder that DeepSpeed's file `latest` names, which is written last.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from ldft.config import to_dict
from tests import rank_processes
from tests.conftest import compose, long

SCRIPT = Path(__file__).with_name("saved_and_killed.py")
CONFIG = (
    "model=nano",
    "data=repeat",
    "seq_len.tokens=8",
    "checkpointing=gpu",
    "launch.device=cpu",
    "train.precision=bf16",
    # Fetches alone wait, and several sub-groups are saved.
    "offload.deepspeed={zero_optimization:{stage3_param_persistence_threshold:0,sub_group_size:400000}}",
)


def run(folder: Path, what: str) -> tuple[int, dict[str, Any]]:
    """Exit code and last line of the script."""
    command = [sys.executable, str(SCRIPT), str(folder / "config.json"), str(folder), what]
    done = subprocess.run(
        command, capture_output=True, text=True, env=rank_processes.environment_of(), check=False, timeout=240
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stdout + done.stderr
    return done.returncode, json.loads(lines[-1])


@long
def test_a_kill_during_an_update_leaves_the_last_whole_checkpoint(tmp_path: Path) -> None:
    config = compose(*CONFIG)
    config.validate()
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    code, said = run(tmp_path, "die")
    assert (code, said) == (-signal.SIGKILL, {"bytes_updated": 0})
    assert (tmp_path / "latest").read_text() == "one"
    assert not [path for path in (tmp_path / "two").rglob("*") if path.is_file()], (
        "it saves before the update has ended"
    )
    code, said = run(tmp_path, "compare")
    assert code == 0 and said["from"] == "one"
    assert said["loaded"] == said["within"], "the checkpoint has not the state after its update"
