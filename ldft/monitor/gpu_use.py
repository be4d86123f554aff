"""GPU use as NVML reports it. Needs no root, and starts nothing on the GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Gpus:
    """GPUs or MIG slices, by UUID. All values are None if there is no driver or it does not know the UUID."""

    def __init__(self) -> None:
        self._handles: dict[str, Any] = {}

    def memory(self, uuid: str) -> tuple[int | None, int | None]:
        """Bytes used, and total bytes."""
        import pynvml

        info = self._ask(pynvml.nvmlDeviceGetMemoryInfo, uuid)
        return (None, None) if info is None else (int(info.used), int(info.total))

    def utilisation_percent(self, uuid: str) -> int | None:
        """Percentage of NVML's last sample period during which a kernel ran."""
        import pynvml

        rates = self._ask(pynvml.nvmlDeviceGetUtilizationRates, uuid)
        return None if rates is None else int(rates.gpu)

    def pcie_kb_per_s(self, uuid: str) -> tuple[int | None, int | None]:
        """KB/s received and sent by the GPU. Each is counted over 20 ms, during which the call blocks."""
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
        except pynvml.NVMLError:  # not supported on this GPU, or the GPU is lost
            return None


def _handle(uuid: str) -> Any:
    """NVML's handle. CUDA's UUIDs lack the prefix that NVML needs."""
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
