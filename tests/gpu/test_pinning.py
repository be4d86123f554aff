"""Pinned memory with a real GPU: registered by us, recognised by torch, asynchronous, and given back."""

import gc
import os
from pathlib import Path

import pytest
import torch

from ldft import _native
from ldft.memory import allocator
from ldft.memory.allocator import allocate, pages_by_node, report_of
from ldft.memory.policy import HostMemoryError, Placement
from ldft.memory.topology import read_topology

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
HERE = Placement(kind="bind", nodes=(read_topology().memory_nodes[0],))
SIZE = 64 << 20


@pytest.fixture(autouse=True)
def nothing_is_left():
    gc.collect()
    before = _native.usage()
    yield
    gc.collect()
    assert _native.usage() == before and not allocator._registered


def test_torch_sees_it_as_pinned_and_copies_are_right_both_ways():
    tensor = allocate(SIZE // 4, torch.float32, HERE, pin=True)
    assert tensor.is_pinned() and report_of(tensor).pinned
    assert tensor.pin_memory().data_ptr() == tensor.data_ptr()
    assert tensor[100:200].is_pinned()
    device = tensor.to("cuda", non_blocking=True) + torch.arange(SIZE // 4, device="cuda")
    tensor.copy_(device, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(tensor, torch.arange(SIZE // 4, dtype=torch.float32))
    assert pages_by_node(tensor) == report_of(tensor).pages


def test_copies_do_not_block_the_host():
    tensor = allocate(1 << 30, torch.uint8, HERE, pin=True)
    device = torch.empty_like(tensor, device="cuda")
    torch.cuda.synchronize()
    for _ in range(8):
        device.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    assert not done.query()  # 8 GiB take 0.15 s on PCIe 5; issuing them takes microseconds
    torch.cuda.synchronize()


def test_several_registrations_are_one_pinned_tensor_copied_piece_by_piece(monkeypatch):
    chunk = 16 << 20
    monkeypatch.setattr(allocator, "REGISTER_CHUNK", chunk)
    tensor = allocate(SIZE + 4096, torch.uint8, HERE, pin=True)
    assert len(allocator._registered[tensor.data_ptr()]) == 5
    tensor.random_()
    for first in range(0, tensor.numel(), chunk):
        piece = tensor[first : first + chunk]
        assert piece.is_pinned()
        assert torch.equal(piece.to("cuda", non_blocking=True).cpu(), piece)


def test_release_unregisters_so_that_the_address_can_be_registered_again():
    for _ in range(50):
        tensor = allocate(SIZE, torch.uint8, HERE, pin=True)
        assert tensor.is_pinned()
        del tensor
    plain = allocate(SIZE, torch.uint8, HERE)
    assert not plain.is_pinned()


def test_a_registration_that_fails_keeps_nothing(monkeypatch):
    monkeypatch.setattr(allocator, "REGISTER_CHUNK", 16 << 20)
    real = torch.cuda.cudart()

    class Failing:
        """The third registration is of memory that is not there: a real error of the real library."""

        calls = 0

        def cudaHostRegister(self, address, size, flags):
            self.calls += 1
            return real.cudaHostRegister(8 if self.calls == 3 else address, size, flags)

        def __getattr__(self, name):
            return getattr(real, name)

    failing = Failing()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: failing)
    before = _native.usage()
    with pytest.raises(HostMemoryError, match=r"cudaHostRegister: .* could not be pinned"):
        allocate(SIZE, torch.uint8, HERE, pin=True)
    assert _native.usage() == before
    assert float(torch.ones(4, device="cuda").sum()) == 4  # the error is not left for the next kernel


def test_a_forked_child_neither_sees_nor_unregisters_it():
    tensor = allocate(SIZE, torch.uint8, HERE, pin=True)
    address = tensor.data_ptr()
    child = os.fork()
    if child == 0:
        del tensor
        maps = Path("/proc/self/maps").read_text().splitlines()
        ranges = [[int(x, 16) for x in line.split()[0].split("-")] for line in maps]
        os._exit(1 if any(start <= address < end for start, end in ranges) else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert tensor.is_pinned()
    assert int(tensor.to("cuda").count_nonzero()) == 0
