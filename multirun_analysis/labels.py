"""Config values as labels."""

from __future__ import annotations

from typing import Any

import numpy as np


def text(value: Any) -> str:
    """A config value as a label. An unset value leaves the choice to ldft, e.g. `kernels.liger`."""
    if value is None:
        return "auto"
    if isinstance(value, list | tuple | np.ndarray):
        return "[" + ",".join(text(item) for item in value) + "]"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)
