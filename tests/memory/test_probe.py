"""The per-node table: numastat's categories and layout, from numa_maps as kernels write it and from live processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldft import _native
from ldft.memory.probe import GIB, MIB, process_memory

NUMA_MAPS = """\
55d0c0000000 default file=/usr/bin/python3.11 mapped=600 mapmax=2 N0=500 N1=100 kernelpagesize_kB=4
55d0c1000000 weighted interleave:0,3 heap anon=183296 dirty=183296 active=0 N0=61184 N3=122112 kernelpagesize_kB=4
7f0000000000 bind:3 anon=512 dirty=512 N3=512 kernelpagesize_kB=4
7f0040000000 prefer (many):0,3 file=/dev/hugepages/x\\040(deleted) huge anon=3 dirty=3 N1=3 kernelpagesize_kB=2048
7f00a0000000 default file=/lib/libc.so.6 anon=4 dirty=4 mapped=4 N0=4 kernelpagesize_kB=4
7f00b0000000 default file=/lib/libtorch.so
7ffd00000000 default stack anon=256 dirty=256 N2=256 kernelpagesize_kB=4
7ffd10000000 default
"""

SEED_TABLE = """\
Per-node process memory usage (in MBs) for PID 22460 (python3)
        Node 0 Node 1 Node 2 Node 3  Total
        ------ ------ ------ ------ ------
Huge         0      0      0      0      0
Heap       239      0      0    477    716
Stack        0      0      0      0      0
Private  67812      6      4 135455 203277
-------  ------ ------ ------ ------ ------
Total    68051      6      4 135932 203993"""


@pytest.fixture
def machine(tmp_path, write):
    """Four nodes and one process; a function that sets what its numa_maps says."""

    def make(numa_maps, pid=22460):
        write(
            tmp_path / "proc",
            {f"{pid}/numa_maps": numa_maps.rstrip("\n"), f"{pid}/comm": "python3", "self/numa_maps": ""},
        )
        write(tmp_path / "sys", {"devices/system/node/online": "0-3"})
        return {"proc": tmp_path / "proc", "sysfs": tmp_path / "sys"}

    return make


def test_categories_and_page_sizes(machine):
    table = process_memory(22460, **machine(NUMA_MAPS))
    nodes = table.nodes
    assert sorted(nodes) == [0, 1, 2, 3]
    assert nodes[0].heap == 61184 * 4096 and nodes[3].heap == 122112 * 4096
    assert nodes[1].huge == 3 * 2048 * 1024 and nodes[1].private == 100 * 4096
    assert nodes[2].stack == 256 * 4096
    assert nodes[3].private == 512 * 4096
    assert nodes[0].private == 504 * 4096 and nodes[0].file == 500 * 4096  # libc's written pages are the process's own
    assert nodes[0].anonymous == (61184 + 4) * 4096


def test_the_table_is_the_seeds_table(machine):
    """The seed's own output, from the pages that lead to it."""
    page = 256  # pages of 4 KiB in a MiB
    lines = [
        f"1000 default heap anon=1 N0={239 * page} N3={477 * page} kernelpagesize_kB=4",
        f"2000 default anon=1 N0={67812 * page} N1={6 * page} N2={4 * page} N3={135455 * page} kernelpagesize_kB=4",
    ]
    assert process_memory(22460, **machine("\n".join(lines))).render() == SEED_TABLE


def test_columns_grow_with_the_numbers(machine):
    table = process_memory(22460, **machine(f"1000 default anon=1 N0={12345678 * 256} kernelpagesize_kB=4"))
    lines = table.render().splitlines()
    assert "12345678" in lines[6] and len({len(line) for line in lines[1:3] + lines[3:7]}) == 1
    assert "GBs" in table.render(GIB) and " 12056 " in table.render(GIB)


def test_several_processes_are_summed_and_the_dead_are_named(machine):
    places = machine(NUMA_MAPS)
    machine(NUMA_MAPS, pid=7)
    one, two = process_memory(7, **places), process_memory([7, 22460, 99999], **places)
    assert two.total == 2 * one.total and two.pids == [7, 22460] and two.missing == [99999]
    assert two.rows()[3]["total_gib"] == two.nodes[3].total / GIB


def test_shares_of_what_was_added_leave_files_out(machine):
    before = process_memory(22460, **machine("1000 default anon=1 N0=100 kernelpagesize_kB=4"))
    text = "1000 default anon=1 N0=1100 N3=2000 kernelpagesize_kB=4\n2000 default file=/x N1=9999 kernelpagesize_kB=4"
    after = process_memory(22460, **machine(text))
    assert after.shares_since(before) == pytest.approx({0: 1 / 3, 1: 0, 2: 0, 3: 2 / 3})
    assert before.shares_since(before) == {}


def test_without_numa_maps_smaps_serve(tmp_path, write):
    smaps = """\
55d0c0000000-55d0c0100000 r-xp 00000000 08:01 131 /usr/bin/python3
Rss:                 100 kB
55d0c1000000-55d0c2000000 rw-p 00000000 00:00 0 [heap]
Rss:                2048 kB
7f0000000000-7f0040000000 rw-p 00000000 00:00 0
Rss:             1048576 kB
Private_Hugetlb:    4096 kB
7ffd00000000-7ffd00100000 rw-p 00000000 00:00 0 [stack]
Rss:                 132 kB"""
    root = write(tmp_path / "proc", {"5/smaps": smaps, "5/comm": "x"})
    table = process_memory(5, proc=root, sysfs=tmp_path / "none")
    node = table.nodes[0]
    assert table.source == "smaps"
    assert (node.heap, node.stack, node.huge) == (2 * MIB, 132 * 1024, 4 * MIB)
    assert (node.private, node.file) == (GIB + 100 * 1024, 100 * 1024)


@pytest.mark.parametrize("huge", [False, True])
def test_a_live_process_agrees_with_the_kernels_own_sums(huge):
    size = 64 << 20
    region = _native.Region(size, huge)
    before = process_memory(os.getpid())
    region.touch([([(0, size, -1)], [], 2)])
    after = process_memory(os.getpid())
    grown = sum(node.anonymous for node in after.nodes.values()) - sum(node.anonymous for node in before.nodes.values())
    # What threads and Python take for themselves meanwhile is another MiB or two; a page counted twice would be 64.
    assert grown == pytest.approx(size, abs=4 << 20)
    smaps = Path("/proc/self/smaps").read_text()
    rss = sum(int(line.split()[1]) * 1024 for line in smaps.splitlines() if line.startswith("Rss:"))
    assert after.total == pytest.approx(rss, rel=0.02, abs=2 << 20)
    region.release()
    gone = process_memory(os.getpid())
    assert gone.total <= after.total - size + (8 << 20)  # reading tables takes some itself


def test_the_command_prints_the_table_and_names_a_dead_process():
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    ended.wait()
    command = [sys.executable, "-m", "ldft.memory.probe", str(os.getpid()), str(ended.pid)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and f"process {ended.pid} cannot be read" in done.stderr
    assert f"for PID {os.getpid()} (" in done.stdout and "Private" in done.stdout
