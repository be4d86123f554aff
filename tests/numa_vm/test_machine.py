"""The emulated machine itself: what is inside, its exit status, and one clear line when something is wrong."""

import os
import subprocess
import sys
from pathlib import Path

from . import machine

SCRIPT = Path(machine.__file__)
LOOK = """
for n in /sys/devices/system/node/node[0-9]*; do echo "$(basename $n) cpus=$(cat $n/cpulist)"; done
ls /sys/kernel/mm/mempolicy/weighted_interleave
echo through > "$1/through"
echo overlay > "$2"
exit 42
"""


def call(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    words = (sys.executable, SCRIPT, *words)
    return subprocess.run([str(w) for w in words], env={**os.environ, **environment}, capture_output=True, text=True)


def test_four_nodes_two_with_cpus_and_only_one_folder_is_written_through(numa_vm, tmp_path):
    kept = tmp_path / "host"
    kept.write_text("host")
    done = call("run", "-o", numa_vm, "sh", "-c", LOOK, "sh", numa_vm, kept)
    assert done.returncode == 42, done.stderr
    assert done.stdout.split()[:8] == ["node0", "cpus=0", "node1", "cpus=1", "node2", "cpus=", "node3", "cpus="]
    assert done.stdout.split()[8:12] == ["node0", "node1", "node2", "node3"], (
        "no weights for weighted interleave in sysfs"
    )
    assert (numa_vm / "through").read_text() == "through\n"
    assert kept.read_text() == "host"


def test_time_out_is_one_line_and_124(numa_vm):
    done = call("run", "-t", "2", "-o", numa_vm, "sleep", "60")
    assert done.returncode == 124
    assert done.stderr == "numa-vm: time-out: the guest was still running after 2 s\n"


def test_kernel_panic_is_one_line_and_125(numa_vm):
    done = call("run", "-o", numa_vm, "sh", "-c", "echo c > /proc/sysrq-trigger")
    assert done.returncode == 125
    assert "Kernel panic" in done.stderr and done.stderr.count("\n") == 1


def test_missing_set_up_is_one_line_that_says_how(numa_vm, tmp_path):
    done = call("run", "true", LDFT_NUMA_VM_CACHE=str(tmp_path))
    assert done.returncode == 125
    assert done.stderr == f"numa-vm: no kernel in {tmp_path}; set it up with `make numa-vm` (Debian 12 or later)\n"


def test_nodes_are_checked(numa_vm):
    done = call("run", "-o", numa_vm, "true", LDFT_NUMA_VM_NODES="cpu:1536 disk:5")
    assert done.returncode == 125
    assert "'disk:5' is not cpu:MIB or mem:MIB" in done.stderr
