"""What the parent takes from NVML is of the GPUs that CUDA would show, in its order. On recorded cards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pynvml
import pytest

from ldft import environment

# By PCI address: a card for the display, two for work, and a slice of the last one.
CARDS = {
    0x1A: ("NVIDIA T400 4GB", (7, 5), 4, "GPU-11aa-0"),
    0x1B: ("NVIDIA H100 80GB HBM3", (9, 0), 80, "GPU-22bb-0"),
    0x1C: ("NVIDIA A100-SXM4-40GB", (8, 0), 40, "GPU-22cc-0"),
}
SLICE, SLICE_UUID, SLICE_GIB = 99, "MIG-33dd", 10


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str | None], None]]:
    """Set CUDA_VISIBLE_DEVICES on this machine of three cards."""

    def of_uuid(uuid: str) -> int:
        if uuid != SLICE_UUID:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return SLICE

    def whole(gpu: int) -> int:
        if gpu != SLICE:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return 0x1C

    def forget() -> None:
        environment._visible.cache_clear()
        environment._models.cache_clear()

    def set_to(visible: str | None) -> None:
        forget()
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    gib = {card: values[2] for card, values in CARDS.items()} | {SLICE: SLICE_GIB}
    for name, value in {
        "Init": lambda: None,
        "DeviceGetCount": lambda: len(CARDS),
        "DeviceGetHandleByIndex": lambda index: list(CARDS)[index],
        "DeviceGetHandleByUUID": of_uuid,
        "DeviceGetDeviceHandleFromMigDeviceHandle": whole,
        "DeviceGetUUID": lambda gpu: CARDS[gpu][3],
        "DeviceGetName": lambda gpu: CARDS[gpu][0],
        "DeviceGetCudaComputeCapability": lambda gpu: list(CARDS[gpu][1]),
        "DeviceGetMemoryInfo": lambda gpu: SimpleNamespace(total=gib[gpu] * 2**30),
        "DeviceGetPciInfo_v3": lambda gpu: SimpleNamespace(busId=f"00000000:{gpu:02X}:00.0"),
    }.items():
        monkeypatch.setattr(pynvml, f"nvml{name}", value)
    yield set_to
    forget()


@pytest.mark.parametrize(
    ("visible", "cards", "capability", "gib"),
    [
        (None, [0x1A, 0x1B, 0x1C], (7, 5), 4),
        ("1", [0x1B], (9, 0), 80),  # the card for the display decides nothing
        ("2, 1", [0x1C, 0x1B], (8, 0), 40),
        ("GPU-22cc-0,0", [0x1C, 0x1A], (7, 5), 4),
        ("GPU-22", [0x1B], (9, 0), 80),  # cut short
        (SLICE_UUID, [0x1C], (8, 0), SLICE_GIB),
        ("1,7,2", [0x1B], (9, 0), 80),  # CUDA stops at what it does not know
        ("1,GPU-44,2", [0x1B], (9, 0), 80),
        ("-1", [], None, None),
        ("", [], None, None),
    ],
)
def test_hidden_cards_count_for_nothing(show, visible, cards, capability, gib) -> None:
    show(visible)
    assert environment.gpus() == tuple(CARDS[card][0] for card in cards)
    assert environment.compute_capability() == capability
    assert environment.gpu_memory_gib() == gib
    # As sysfs writes them.
    assert environment.gpu_addresses() == tuple(f"0000:{card:x}:00.0" for card in cards)


def test_a_machine_without_a_driver_has_none(show, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    show(None)
    assert environment.gpus() == environment.gpu_addresses() == ()
    assert environment.compute_capability() is None and environment.gpu_memory_gib() is None
