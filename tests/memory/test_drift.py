"""Counters of what the kernel does against placements: read, subtracted, put into words."""

from pathlib import Path

from ldft.memory.drift import Counters, read_counters


def machine(root: Path, foreign: dict[int, int], collapsed: int) -> Counters:
    """What is read from the files of a machine with these counters, written as Linux 6.12 does."""
    nodes = root / "sys/devices/system/node"
    for node, count in foreign.items():
        folder = nodes / f"node{node}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "numastat").write_text(f"numa_hit 366681\nnuma_miss 31\nnuma_foreign {count}\ninterleave_hit 837\n")
    (nodes / "online").write_text(",".join(map(str, foreign)) + "\n")
    huge = root / "sys/kernel/mm/transparent_hugepage"
    huge.mkdir(parents=True, exist_ok=True)
    (huge / "hpage_pmd_size").write_text("2097152\n")
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/vmstat").write_text(
        f"thp_fault_alloc 23\nthp_collapse_alloc_failed 7\nthp_collapse_alloc {collapsed}\n"
    )
    return read_counters(root / "sys", root / "proc")


def test_a_run_is_the_difference_of_two_readings(tmp_path):
    before = machine(tmp_path, {0: 100, 2: 7, 3: 5}, 10)
    drift = machine(tmp_path, {0: 160, 2: 9, 3: 5}, 266).since(before)
    assert drift.passed_over == {0: 60, 2: 2, 3: 0}
    assert drift.merged_bytes == 256 * 2**21


def test_causes_are_about_the_nodes_asked_for(tmp_path):
    drift = Counters(passed_over={0: 60, 2: 2, 3: 0}, merged_bytes=0)
    (said,) = drift.explain({0, 3})
    assert "passed over node 0 60 times" in said and "node 2" not in said and "drop_caches" in said
    assert drift.explain({3}) == []
    (said,) = Counters(passed_over={0: 60}, merged_bytes=2**29).explain({3})
    assert "khugepaged merged 0.50 GiB" in said


def test_this_machine_has_counters_and_a_kernel_without_them_has_zeros(tmp_path):
    here = read_counters()
    assert here.passed_over and all(count >= 0 for count in here.passed_over.values())
    assert read_counters(tmp_path, tmp_path) == Counters(passed_over={0: 0}, merged_bytes=0)
