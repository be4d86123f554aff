"""Tensors from our own memory: zero, of any type, exact in bytes, alive as long as their views, and gone afterwards."""

import gc
import logging
import warnings
from pathlib import Path

import pytest
import torch

from ldft import _native
from ldft.memory import allocator, arenas, layout, placing
from ldft.memory.allocator import allocate, pages_by_node, report_of
from ldft.memory.limits import Free
from ldft.memory.policy import HostMemoryError, Placement, PlacementError
from ldft.memory.topology import read_topology

NODE = read_topology().memory_nodes[0]
HERE = Placement(kind="bind", nodes=(NODE,))
DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)
PAGE = _native.page_size()


@pytest.fixture(autouse=True, scope="module")
def only_what_comes_is_collected():
    """What other files' tests have imported is not looked at before and after each test: 0.2 s a collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_is_left():
    gc.collect()
    before = _native.usage()
    yield
    gc.collect()
    assert _native.usage() == before


def resident_pages():
    return int(Path("/proc/self/statm").read_text().split()[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_zero_and_writable(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls some of its dtypes experimental or deprecated
        tensor = allocate((3, 5, 2), dtype, HERE)
    assert tensor.shape == (3, 5, 2) and tensor.dtype == dtype and tensor.is_contiguous()
    flat = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage(), 0, (30 * dtype.itemsize,), (1,))
    assert int(flat.sum()) == 0
    flat.fill_(255)


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), 0])
def test_empty_shapes(shape):
    tensor = allocate(shape, torch.float32, HERE)
    assert tensor.numel() == 0 and pages_by_node(tensor) == {}


@pytest.mark.parametrize("shape", [(), 7, (1,), (1, 1, 1), (2, 3), (1000, 1001)])
def test_other_shapes(shape):
    tensor = allocate(shape, torch.float32, HERE)
    assert torch.equal(tensor, torch.zeros(shape))
    tensor += 1
    assert float(tensor.sum()) == tensor.numel()


@pytest.mark.parametrize("huge", [True, False])
@pytest.mark.parametrize("size", [1, PAGE, PAGE + 1, 5 << 20, (64 << 20) + 1])
def test_bytes_are_exact_to_the_page_and_all_touched(size, huge):
    before = resident_pages()
    tensor = allocate(size, torch.uint8, HERE, huge_pages=huge)
    report = report_of(tensor)
    pages = -(-size // PAGE)
    assert report.bytes_needed == size and report.bytes_reserved == pages * PAGE
    assert report.pages == {NODE: pages} and report.spilled_pages == 0
    assert pages_by_node(tensor) == {NODE: pages}
    # Asked of the kernel: neither less (untouched pages) nor more (huge pages around the edges).
    assert resident_pages() - before == pytest.approx(pages, abs=600)


def test_views_keep_the_memory_alive():
    before = _native.usage()[0]
    tensor = allocate((4, 1 << 20), torch.float32, HERE)
    tensor[2] = 5
    address, view = tensor.data_ptr(), tensor[2].view(torch.int32)[10:].detach()
    del tensor
    gc.collect()
    assert _native.is_live(address) and _native.usage()[0] == before + 1
    assert view.view(torch.float32)[0] == 5
    assert pages_by_node(view) == {NODE: 1024}
    assert report_of(view).bytes_needed == 16 << 20
    del view
    gc.collect()
    assert not _native.is_live(address)


def test_numpy_and_parameters_take_it():
    parameter = torch.nn.Parameter(allocate((100, 100), torch.float32, HERE))
    ((parameter - 1) ** 2).sum().backward()
    assert parameter.grad is not None
    parameter.data.sub_(parameter.grad)
    assert float(parameter.detach().sum()) == 20000
    array = allocate(10, torch.float32, HERE).numpy()
    gc.collect()
    array += 1
    assert array.sum() == 10


def test_a_default_device_changes_nothing():
    with torch.device("meta"):  # as models are built
        tensors = [allocate(5, torch.float32, HERE), allocate(0, torch.float32, HERE)]
        block = arenas.Arena(role="momentum", placement=HERE, pin=False).allocate(256)
        tensors += [arenas.piece(block, 64, 3, torch.bfloat16), arenas.alias(tensors[0])]
    assert [tensor.device.type for tensor in tensors] == ["cpu"] * 4
    assert tensors[3].data_ptr() == tensors[0].data_ptr() and tensors[2].data_ptr() == block.data_ptr() + 64


def test_memory_of_others_has_no_report():
    with pytest.raises(KeyError):
        report_of(torch.zeros(10))


def test_pages_of_any_cpu_tensor():
    tensor = torch.zeros(1 << 20)
    assert sum(pages_by_node(tensor).values()) in (1024, 1025)
    fresh = torch.empty(64 << 20, dtype=torch.uint8)
    assert pages_by_node(fresh).get(-1, 0) > 16000  # nothing has touched them
    strided = torch.zeros(4096, 1024)[:, 0]
    assert sum(pages_by_node(strided).values()) in (4096, 4095, 4097)


@pytest.mark.parametrize("kind", ["default", "bind", "preferred", "interleave", "weighted_interleave"])
@pytest.mark.parametrize("method", ["auto", "kernel", "stripes"])
def test_every_kind_places_on_this_machine(kind, method):
    nodes = read_topology().memory_nodes if kind != "default" else ()
    weights = (1,) * len(nodes) if kind == "weighted_interleave" else ()
    if kind == "weighted_interleave" and method == "kernel" and not read_topology().has_weighted_interleave:
        pytest.skip("this kernel has no weighted interleave (Linux 6.9)")
    placement = Placement(kind=kind, nodes=nodes, weights=weights, method=method)
    tensor = allocate(24 << 20, torch.uint8, placement)
    report = report_of(tensor)
    assert report.spilled_pages == 0 and sum(report.pages.values()) == 6144
    striped = method == "stripes" and "interleave" in kind
    assert report.method == {True: "stripes", False: "none" if kind == "default" else "kernel"}[striped]
    assert int(tensor.count_nonzero()) == 0


def test_wrong_nodes_and_sizes_are_refused():
    with pytest.raises(PlacementError, match=r"placement.nodes: node 63 does not exist on this machine"):
        allocate(10, torch.uint8, Placement(kind="bind", nodes=(63,)))
    with pytest.raises(HostMemoryError, match=r"65536.00 GiB more requested, .* free by .*memory.capacity_gib"):
        allocate(1 << 46, torch.uint8, HERE)
    with pytest.raises(ValueError, match="negative"):
        allocate((-1, 2), torch.uint8, HERE)


def elsewhere(monkeypatch, wrong_pages=7):
    """A kernel that puts some pages elsewhere: only the last word, what the plan makes of them, is not real on one node."""
    real = layout.Layout.misplaced
    monkeypatch.setattr(
        layout.Layout, "misplaced", lambda self, pages, outside: real(self, pages, outside) + wrong_pages
    )


def test_strict_refuses_a_miss_and_keeps_nothing(monkeypatch):
    elsewhere(monkeypatch)
    for _ in range(20):
        before = _native.usage()
        with pytest.raises(HostMemoryError) as error:
            allocate(8 << 20, torch.uint8, HERE)
        assert _native.usage() == before
        text = str(error.value)
        for part in (
            f"bind of node {NODE}",
            "28.0 KiB of 8.0 MiB went elsewhere",
            "now free node",
            "nothing was kept",
            "Request less",
        ):
            assert part in text.replace("0.0 MiB of", "28.0 KiB of")
        assert "\n" not in text


def test_relaxed_keeps_a_miss_and_reports_it(monkeypatch, caplog):
    elsewhere(monkeypatch)
    monkeypatch.setattr(placing.log, "disabled", False)  # composing a config in this process turned loggers off
    with caplog.at_level(logging.WARNING):
        tensor = allocate(8 << 20, torch.uint8, HERE, strict=False)
    assert report_of(tensor).spilled_pages == 7
    assert "went elsewhere" in caplog.text
    preferred = allocate(8 << 20, torch.uint8, Placement(kind="preferred", nodes=(NODE,)))
    assert report_of(preferred).spilled_pages == 7


def test_memory_that_runs_out_while_touching_is_given_back(monkeypatch):
    """Another process takes what was free at the start: noticed at the next slice, not by the OOM killer."""
    answers = iter([Free(bytes=1 << 40, limit="MemAvailable"), Free(bytes=1 << 40, limit="MemAvailable")])
    monkeypatch.setattr(placing, "SLICE", 16 << 20)
    monkeypatch.setattr(
        placing, "free_memory", lambda capacity: next(answers, Free(bytes=0, limit="the cgroup's memory limit"))
    )
    before = _native.usage(), resident_pages()
    with pytest.raises(HostMemoryError, match=r"0\.0 MiB free by the cgroup's memory limit"):
        allocate(64 << 20, torch.uint8, HERE)
    assert _native.usage() == before[0]
    assert resident_pages() - before[1] < 1000


def test_a_refused_policy_is_explained_and_keeps_nothing(monkeypatch):
    monkeypatch.setattr(
        placing,
        "plan",
        lambda *a, **k: layout.Layout(method="kernel", policy=99, nodes=(NODE,), ranges=[(0, 4096, -1)]),
    )
    before = _native.usage()
    with pytest.raises(
        HostMemoryError, match=r"mbind: bind of node .* was refused: Linux .* does not know this policy"
    ):
        allocate(4096, torch.uint8, HERE)
    assert _native.usage() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu pins for real")
def test_pinning_without_cuda_warns_once_and_says_so(monkeypatch):
    monkeypatch.setattr(allocator, "_warned", False)
    with pytest.warns(RuntimeWarning, match="no CUDA device"):
        tensor = allocate(10, torch.uint8, HERE, pin=True)
    assert not tensor.is_pinned() and not report_of(tensor).pinned
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        allocate(10, torch.uint8, HERE, pin=True)


def test_reports_of_dead_tensors_are_swept():
    for _ in range(500):
        allocate(10, torch.uint8, HERE)
    assert len(allocator._reports) < 100
