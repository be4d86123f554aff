"""How much may be touched: recorded meminfo and cgroup files of version 1 and 2."""

import pytest

from ldft.memory.limits import cgroup_left, free_memory, free_on_node, machine_memory

GIB = 1 << 30


@pytest.fixture
def proc(tmp_path, write):
    def make(cgroup, available_gib=20, total_gib=64):
        meminfo = f"MemTotal: {total_gib << 20} kB\nMemFree: 5 kB\nMemAvailable: {available_gib << 20} kB"
        return write(tmp_path / "proc", {"meminfo": meminfo, "self/cgroup": cgroup})

    return make


def test_without_a_cgroup_it_is_what_is_available_less_a_reserve(tmp_path, proc):
    free = free_memory(proc=proc("0::/"), cgroups=tmp_path / "none")
    assert free.bytes == 20 * GIB - GIB and free.limit == "MemAvailable"


def test_a_machine_that_grows_is_as_large_as_the_user_says(tmp_path, proc):
    folder = proc("0::/", available_gib=20, total_gib=31)
    grown = free_memory(125 * GIB, proc=folder, cgroups=tmp_path / "none")
    assert (grown.bytes, grown.limit) == ((20 + 94) * GIB - GIB, "memory.capacity_gib")
    assert free_memory(8 * GIB, proc=folder, cgroups=tmp_path / "none").bytes > 18 * GIB  # what is there counts


def test_a_capacity_of_what_is_there_changes_nothing(tmp_path, proc):
    folder = proc("0::/", available_gib=20, total_gib=31)
    as_it_is = free_memory(proc=folder, cgroups=tmp_path / "none")
    assert free_memory(31 * GIB, proc=folder, cgroups=tmp_path / "none") == as_it_is
    small = proc("0::/", available_gib=6, total_gib=8)  # of less than 64 GiB, a 64th is left
    assert free_memory(proc=small, cgroups=tmp_path / "none").bytes == 6 * GIB - GIB // 8


def test_what_a_kernel_does_not_say_counts_as_nothing(tmp_path, write):
    for meminfo, free in (("MemTotal: 9 kB", 0), ("MemTotal: 9 kB\nMemFree: 5 kB", 5 * 1024)):
        folder = write(tmp_path / "proc", {"meminfo": meminfo, "self/cgroup": "0::/"})
        assert free_memory(proc=folder, cgroups=tmp_path / "none").bytes == max(0, free - 9 * 1024 // 64)
        node = "\n".join(f"Node 0 {line}" for line in meminfo.splitlines())
        sysfs = write(tmp_path / "sys", {"devices/system/node/node0/meminfo": node})
        assert free_on_node(0, sysfs) == free


def test_the_machines_memory_does_not_change_with_its_use(tmp_path, proc, write):
    empty, full = (proc("0::/", available_gib=gib) for gib in (60, 2))
    assert machine_memory(proc=empty, cgroups=tmp_path / "none") == 63 * GIB
    assert machine_memory(proc=full, cgroups=tmp_path / "none") == 63 * GIB
    assert machine_memory(32 * GIB, proc=full, cgroups=tmp_path / "none") == 32 * GIB - GIB // 2
    assert machine_memory(proc=tmp_path / "none", cgroups=tmp_path / "none") == 0  # unknown
    limited = {"cgroup.controllers": "memory", "job/memory.max": str(10 * GIB), "job/rank/memory.max": "max"}
    root = write(tmp_path / "cgroup", limited)
    assert machine_memory(proc=proc("0::/job/rank"), cgroups=root) == 10 * GIB


@pytest.mark.parametrize("path", ["/job/rank", "/host/only/job/rank"])
def test_the_tightest_ancestor_of_cgroup_v2_counts(tmp_path, proc, write, path):
    root = write(
        tmp_path / "cgroup",
        {
            "cgroup.controllers": "memory",
            "job/memory.max": str(10 * GIB),
            "job/memory.current": str(7 * GIB),
            "job/memory.stat": f"anon 1\ninactive_file {GIB}\nactive_file {2 * GIB}",
            "job/rank/memory.max": "max",
            "job/rank/memory.current": str(7 * GIB),
            "job/rank/memory.stat": "anon 1",
        },
    )
    folder = proc(f"0::{path}")
    if path == "/job/rank":
        assert cgroup_left(folder, root) == 6 * GIB  # 3 left, and 3 of page cache that give way
        free = free_memory(proc=folder, cgroups=root)
        assert free.bytes == 6 * GIB and "cgroup" in free.limit
    else:  # a path of the host's that is not visible here limits nothing that we can read
        assert cgroup_left(folder, root) is None


@pytest.mark.parametrize(
    ("own", "parent", "left", "limit"),
    [
        (("max", "12"), ("20", "max"), 5, "memory.high of /job/rank"),
        (("10", "12"), ("max", "max"), 3, "memory.max of /job/rank"),
        (("max", "max"), ("20", "11"), 1, "memory.high of /job"),  # an ancestor's counts too
        (("11", "8"), ("max", "max"), 1, "memory.high of /job/rank"),
        (("max", "6"), ("max", "max"), 0, "memory.high of /job/rank"),  # used up: never negative
    ],
)
def test_memory_high_counts_as_memory_max_does(tmp_path, proc, write, own, parent, left, limit):
    files = {"cgroup.controllers": "memory"}
    for place, limits, used in (("job/rank", own, 7), ("job", parent, 10)):
        for name, gib in zip(("memory.max", "memory.high"), limits, strict=True):
            files[f"{place}/{name}"] = gib if gib == "max" else str(int(gib) * GIB)
        files |= {f"{place}/memory.current": str(used * GIB), f"{place}/memory.stat": "anon 1"}
    folder, root = proc("0::/job/rank"), write(tmp_path / "cgroup", files)
    free = free_memory(proc=folder, cgroups=root)
    assert (free.bytes, free.limit) == (left * GIB, f"the cgroup's memory limit ({limit})")
    assert cgroup_left(folder, root) == left * GIB


def test_cgroup_v1(tmp_path, proc, write):
    root = write(
        tmp_path / "cgroup",
        {
            "memory/memory.limit_in_bytes": "9223372036854771712",
            "memory/memory.usage_in_bytes": "5",
            "memory/memory.stat": "total_inactive_file 0",
            "memory/job/memory.limit_in_bytes": str(6 * GIB),
            "memory/job/memory.usage_in_bytes": str(5 * GIB),
            "memory/job/memory.stat": f"active_file 9\ntotal_inactive_file {GIB // 2}\ntotal_active_file {GIB}",
        },
    )
    folder = proc("9:name=systemd:/\n4:memory:/job\n3:cpuset:/\n0::/")
    assert cgroup_left(folder, root) == 2 * GIB + GIB // 2


@pytest.mark.parametrize(("limit", "left"), [(2**60, None), (2**60 - 1, 2**60 - 6)])
def test_a_limit_near_2_to_the_63_is_none(tmp_path, proc, write, limit, left):
    files = {"memory.limit_in_bytes": str(limit), "memory.usage_in_bytes": "5", "memory.stat": "total_active_file 0"}
    root = write(tmp_path / "cgroup", {f"memory/{name}": text for name, text in files.items()})
    assert cgroup_left(proc("4:memory:/"), root) == left


def test_a_node_gives_its_free_pages_and_its_page_cache(sysfs):
    assert free_on_node(0, sysfs) == (1024 + 512) * 1024
    assert free_on_node(9, sysfs) is None


def test_this_machine():
    assert 0 < free_memory().bytes < 1 << 50
