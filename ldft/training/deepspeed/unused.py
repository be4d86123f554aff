"""What DeepSpeed makes ready for every run and no run of ldft calls. Leaving it out saves minutes, and changes no result."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def leave_out() -> None:
    """Keep DeepSpeed from making them. To be called before `deepspeed.init_distributed`; again has no effect."""
    _shared_memory()
    _muon_kernels()


def _shared_memory() -> None:
    """The all-reduce through shared memory on a CPU: only inference calls it, and two cores compile it for minutes."""
    backend: Any = importlib.import_module(
        "deepspeed.comm.torch"
    )  # as an attribute of the package, `torch` is torch itself
    if hasattr(backend, "build_shm_op"):
        backend.build_shm_op = lambda: None


def _muon_kernels() -> None:
    """torch.compile around the Muon optimizer's functions: it loads torch's whole compiler, seconds a rank."""
    compiler: Any = importlib.import_module("deepspeed.runtime.compiler")
    decorate = compiler.compile
    compiler.compile = _as_written
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    except ModuleNotFoundError:
        pass  # DeepSpeed has moved it, and loads it in its own way
    finally:
        compiler.compile = decorate


def _as_written(*_: Any, **__: Any) -> Callable[[Any], Any]:
    return lambda function: function
