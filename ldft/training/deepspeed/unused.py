"""Skips what DeepSpeed and transformers prepare for every run but ldft never uses. This saves minutes and changes no result."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any


def leave_out() -> None:
    """Keep DeepSpeed from preparing them. Call it before `deepspeed.init_distributed`; repeated calls have no effect."""
    _shared_memory()
    _muon_kernels()


def ask_for_the_processor_once() -> None:
    """Each of DeepSpeed's CPU optimizers asks which processor this is, as does each operator that is compiled or loaded, and
    several processes answer, in a second. Only for who will ask: the import alone starts some."""
    import cpuinfo

    if not hasattr(cpuinfo.get_cpu_info, "cache_info"):
        cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)


def _shared_memory() -> None:
    """Skip the shared-memory all-reduce on CPUs: only inference calls it, and compiling it takes minutes on two cores."""
    backend: Any = importlib.import_module(
        "deepspeed.comm.torch"
    )  # as an attribute of the package, `torch` is torch itself
    if hasattr(backend, "build_shm_op"):
        backend.build_shm_op = lambda: None


def _muon_kernels() -> None:
    """Skip torch.compile for the Muon optimizer's functions: it loads torch's whole compiler, which takes seconds per rank."""
    compiler: Any = importlib.import_module("deepspeed.runtime.compiler")
    decorate = compiler.compile
    compiler.compile = _as_written
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    except ModuleNotFoundError:
        pass  # this release has moved it; let DeepSpeed load it
    finally:
        compiler.compile = decorate


def _as_written(*_: Any, **__: Any) -> Callable[[Any], Any]:
    return lambda function: function
