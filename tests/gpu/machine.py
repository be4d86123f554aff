"""What this machine can run, and one rank's process group."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldft.config import AttentionKind, Config, Device
from ldft.errors import ConfigError
from ldft.preflight import attention
from ldft.preflight.selection import select
from tests.conftest import compose


def cuda_config(*overrides: str) -> Config:
    """The typed config of a command line, for the GPU."""
    config = compose(*overrides)
    config.launch.device = Device.cuda
    return config


def kinds(config: Config) -> list[str]:
    """Attention implementations that run here for this config; auto is one of them, and left out."""
    found, asked = [], config.attention.kind
    for kind in AttentionKind:
        config.attention.kind = kind
        try:
            attention.choose(config)
        except ConfigError:
            continue
        found.append(kind.name)
    config.attention.kind = asked
    return found[1:]


def allocated() -> int:
    """Bytes of device memory that live tensors take, without what only waits for Python's collector: leftovers of other tests would
    be freed at any moment later."""
    import torch

    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@contextmanager
def process_group(folder: Path) -> Iterator[None]:
    """DeepSpeed's, of this process alone, with its operators loaded."""
    import deepspeed
    import torch

    from ldft.training.deepspeed import operators

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    operators.load(select(cuda_config()), say=print)
    deepspeed.init_distributed(
        "nccl", auto_mpi_discovery=False, init_method=f"file://{folder}/store", rank=0, world_size=1, verbose=False
    )
    yield
    torch.distributed.destroy_process_group()
