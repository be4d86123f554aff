"""What NVML says of GPUs while they work. It needs no root, and starts nothing on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Gpus:
    """GPUs, or slices of them (MIG), by UUID. Where there is no driver, or it does not know one, every figure is None."""

    def __init__(self) -> None:
        self._handles: dict[str, Any] = {}

    def memory(self, uuid: str) -> tuple[int | None, int | None]:
        """Bytes used and in all."""
        import pynvml

        info = self._ask(pynvml.nvmlDeviceGetMemoryInfo, uuid)
        return (None, None) if info is None else (int(info.used), int(info.total))

    def utilisation_percent(self, uuid: str) -> int | None:
        """The part of the last period in which some kernel ran."""
        import pynvml

        rates = self._ask(pynvml.nvmlDeviceGetUtilizationRates, uuid)
        return None if rates is None else int(rates.gpu)

    def pcie_kb_per_s(self, uuid: str) -> tuple[int | None, int | None]:
        """Received and sent by the GPU. Each is counted over 20 ms, in which the call does not return."""
        import pynvml

        kinds = (pynvml.NVML_PCIE_UTIL_RX_BYTES, pynvml.NVML_PCIE_UTIL_TX_BYTES)
        received, sent = (self._ask(pynvml.nvmlDeviceGetPcieThroughput, uuid, kind) for kind in kinds)
        return received, sent

    def _ask(self, call: Callable[..., Any], uuid: str, *arguments: int) -> Any:
        import pynvml

        if uuid not in self._handles:
            self._handles[uuid] = _handle(uuid)
        if self._handles[uuid] is None:
            return None
        try:
            return call(self._handles[uuid], *arguments)
        except pynvml.NVMLError:  # not counted on this GPU, or it is lost
            return None


def _handle(uuid: str) -> Any:
    """NVML's handle. CUDA writes a UUID without the word before it that NVML wants."""
    import pynvml

    names = [uuid] if uuid.startswith(("GPU-", "MIG-")) else [f"GPU-{uuid}", f"MIG-{uuid}"]
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    for name in names:
        try:
            return pynvml.nvmlDeviceGetHandleByUUID(name)
        except pynvml.NVMLError:
            continue
    return None
