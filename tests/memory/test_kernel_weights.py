"""The kernel's weights: borrowed under a lock, put back in the end, and after a crash by whoever starts next."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from ldft.memory.kernel_weights import kernel_weights, restore_kernel_weights
from ldft.memory.policy import Placement, PlacementError
from ldft.memory.topology import WEIGHTS_FOLDER, read_topology, read_weights

ORIGINAL = {0: 1, 1: 1, 2: 2, 5: 1}
WANTED = Placement(kind="weighted_interleave", nodes=(0, 2), weights=(3, 1))


@pytest.fixture
def state(sysfs, tmp_path):
    return {"sysfs": sysfs, "state": tmp_path / "state"}


@pytest.fixture
def places(state, status):
    return state | {"status": status}


def test_weights_are_set_for_the_block_and_put_back(places, state):
    with kernel_weights(WANTED, **places):
        assert read_weights(places["sysfs"])[0] == {0: 3, 1: 1, 2: 1, 5: 1}
    assert read_weights(places["sysfs"])[0] == ORIGINAL
    with pytest.raises(RuntimeError), kernel_weights(WANTED, **places):
        raise RuntimeError
    assert read_weights(places["sysfs"])[0] == ORIGINAL


def test_the_kernels_own_computing_is_switched_on_again(places, state, sysfs):
    auto = sysfs / WEIGHTS_FOLDER / "__auto_type"
    auto.write_text("1\n")
    with kernel_weights(WANTED, **places):
        auto.write_text("0\n")  # as the kernel does when a weight is written
    assert auto.read_text().strip() == "1"


def test_weights_that_fit_already_are_left_alone(places, state):
    with kernel_weights(Placement(kind="weighted_interleave", nodes=(0, 2), weights=(2, 4)), **places):
        assert read_weights(places["sysfs"])[0] == ORIGINAL
        assert not (places["state"] / "journal.json").exists()
    with kernel_weights(Placement(kind="interleave"), **places):
        assert not (places["state"] / "journal.json").exists()


def hold(places, then):
    """A process that holds the weights; `then` is what it does once it has them."""
    code = f"""
        import os, signal, sys
        from pathlib import Path
        from ldft.memory.policy import Placement
        from ldft.memory.kernel_weights import kernel_weights
        wanted = Placement(kind="weighted_interleave", nodes=(0, 2), weights=(3, 1))
        with kernel_weights(wanted, sysfs=Path({str(places["sysfs"])!r}), state=Path({str(places["state"])!r}),
                            status=Path({str(places["status"])!r})):
            print("held", flush=True)
            {then}
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_next_start_restores_after_a_crash(places, state):
    process = hold(places, "os.kill(os.getpid(), signal.SIGKILL)")
    assert process.wait() == -signal.SIGKILL
    assert read_weights(places["sysfs"])[0] == {0: 3, 1: 1, 2: 1, 5: 1}  # as the crash left them
    assert restore_kernel_weights(**state)
    assert read_weights(places["sysfs"])[0] == ORIGINAL
    assert not restore_kernel_weights(**state)


def test_a_new_run_after_a_crash_puts_back_the_original_not_the_crashed_ones(places, state):
    hold(places, "os.kill(os.getpid(), signal.SIGKILL)").wait()
    with kernel_weights(Placement(kind="weighted_interleave", nodes=(0, 1), weights=(7, 1)), **places):
        assert read_weights(places["sysfs"])[0] == {0: 7, 1: 1, 2: 2, 5: 1}
    assert read_weights(places["sysfs"])[0] == ORIGINAL


def test_two_runs_cannot_have_them_at_once(places, state):
    process = hold(places, "sys.stdin.read()")
    try:
        other = Placement(kind="weighted_interleave", nodes=(0, 2), weights=(1, 9))
        in_use = rf"in use by another run \(process {process.pid}\)"
        with pytest.raises(PlacementError, match=in_use), kernel_weights(other, **places):
            pass
        # Not even to look on while they happen to fit: the other run will put them back.
        with pytest.raises(PlacementError), kernel_weights(WANTED, **places):
            pass
        assert not restore_kernel_weights(**state)
        assert read_weights(places["sysfs"])[0] == {0: 3, 1: 1, 2: 1, 5: 1}
    finally:
        process.communicate("")
    assert read_weights(places["sysfs"])[0] == ORIGINAL


def test_a_journal_of_before_the_reboot_is_dropped(places, state):
    places["state"].mkdir()
    (places["state"] / "journal.json").write_text('{"pid": 1, "boot": "other", "weights": {"0": 99}, "auto": null}')
    assert restore_kernel_weights(**state)
    assert read_weights(places["sysfs"])[0] == ORIGINAL


def test_without_the_right_to_write_the_commands_are_printed(places, state, sysfs, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *a: False)
    with (
        pytest.raises(PlacementError, match=r"echo 3 > \S*/node0; echo 1 > \S*/node2"),
        kernel_weights(WANTED, **places),
    ):
        pass


def test_a_kernel_without_weighted_interleave_says_so(places, state, sysfs, monkeypatch):
    for path in (sysfs / WEIGHTS_FOLDER).iterdir():
        path.unlink()
    assert not read_topology(sysfs).has_weighted_interleave
    expected = r"numa.kind: weighted_interleave .* needs Linux 6.9"
    with pytest.raises(PlacementError, match=expected), kernel_weights(WANTED, **places):
        pass
