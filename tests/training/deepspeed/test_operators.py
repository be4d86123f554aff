"""The folder in which DeepSpeed's operators are compiled, shared with programs that are not ldft."""

import subprocess
import sys

from ldft.training.deepspeed import operators

HOLD = """
import sys, time
from torch.utils.file_baton import FileBaton
print(FileBaton(sys.argv[1]).try_acquire(), flush=True)
time.sleep(600)
"""


def test_the_lock_of_a_killed_builder_is_removed_and_that_of_a_working_one_is_not(tmp_path) -> None:
    lock = tmp_path / "real" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    folder = tmp_path / "link"  # home folders are often links
    folder.symlink_to(tmp_path / "real")
    builder = subprocess.Popen([sys.executable, "-c", HOLD, lock], stdout=subprocess.PIPE, text=True)
    try:
        assert builder.stdout and builder.stdout.readline() == "True\n"
        operators.remove_stale_locks(folder)
        assert lock.is_file()
    finally:
        builder.kill()
        builder.wait()
    assert lock.is_file()
    operators.remove_stale_locks(folder)
    assert not lock.exists()
