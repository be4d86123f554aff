"""What the cases of guest_*.py found in the emulated machine, one test each. All of them run in one boot, at the first test."""

import pytest

from . import guest_drift, guest_full, guest_placement, guest_process


@pytest.mark.parametrize("name", guest_placement.CASES)
def test_placement(check_case, name):
    """Pages of a tensor are where its placement says, by numa_maps and move_pages of another process."""
    check_case(name)


@pytest.mark.parametrize("name", guest_full.CASES)
def test_full_node(check_case, name):
    """Strict placement on a full node is refused, relaxed placement reports what went elsewhere, and nobody is killed."""
    check_case(name)


@pytest.mark.parametrize("name", guest_process.CASES)
def test_process(check_case, name):
    """The policy of a process is that of all its memory, and the machine's weights come back."""
    check_case(name)


@pytest.mark.parametrize("name", guest_drift.CASES)
def test_drift(check_case, name):
    """What the kernel moves or places elsewhere on its own account is counted, and a placed tensor stays where it is."""
    check_case(name)


def test_the_guest_came_to_its_end(guest_cases):
    assert guest_cases["status"]["error"] is None
    assert "complete" in guest_cases
