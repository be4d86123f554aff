"""Peak rates of devices, from the vendors' datasheets. Imports no torch."""

from __future__ import annotations

from ldft.config import Precision

# Dense bf16 tensor-core peaks in TFLOP/s (without sparsity), by a part of CUDA's device name. The first match counts, so more
# specific names come first. A device that is not listed has no MFU.
_PEAK_BF16_TFLOPS_PER_S = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("GH200", 989.0),
    ("H100", 989.0),
    ("H200", 989.0),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("RTX A6000", 154.8),
    ("RTX 6000 Ada", 364.2),
    ("RTX 4090", 165.2),
    ("L40S", 362.0),
)


def peak_tflops_per_s(device_name: str, precision: Precision) -> float | None:
    """Dense peak of a device in the given precision, TFLOP/s; None if unknown."""
    if precision is not Precision.bf16:
        return None
    return next((peak for part, peak in _PEAK_BF16_TFLOPS_PER_S if part in device_name), None)
