"""Two GPUs through NCCL: the training of one, whatever is offloaded; two runs at once do not meet; one run on two hosts.

In fp32 on one repeated batch: rounding stays far below what gradients that were not averaged would do
(tests/training/test_equality.py).
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ldft import results
from tests.conftest import Done

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
BASE = ("model=nano", "data=repeat", "seq_len.tokens=96", "train.iterations=8", "train.warmup_iterations=1",
        "optimizer.learning_rate=2e-3", "launch.device=cuda")  # fmt: skip
WAYS = {
    "full offload": ("offload=full", "checkpointing=cpu"),
    "full offload, attention kept": ("offload=full", "checkpointing=cpu", "checkpointing.keep_attention=host"),
    "full offload, DeepSpeed's update": ("offload=full", "checkpointing=cpu", "optimizer.fused_step=false"),
    "full offload, torch's memory": ("offload=full", "checkpointing=gpu", "memory.pinning=torch"),
    "optimizer offload": ("offload=optimizer", "checkpointing=cpu"),
    "stage 3 in GPU memory": ("offload=zero3", "checkpointing=gpu"),
    "in GPU memory": ("offload=none", "checkpointing=none"),
    "adapters": ("offload=full", "checkpointing=cpu", "lora=r8", "optimizer.learning_rate=2e-2"),
    "accumulation": ("offload=full", "checkpointing=cpu", "train.gradient_accumulation_steps=2"),
}


@pytest.mark.parametrize("way", WAYS)
def test_two_gpus_train_as_one_does(way: str, tmp_path: Path, ldft: Callable[..., Done]) -> None:
    words = (*WAYS[way], "train.precision=fp32")
    one = results.read(_ok(ldft, *words, "train.micro_batch_size=2", f"results.dir={tmp_path}/one")).iloc[0]
    two = results.read(_ok(ldft, *words, "launch.num_ranks=2", f"results.dir={tmp_path}/two")).iloc[0]
    assert one.tokens_per_iteration == two.tokens_per_iteration
    assert two.loss[-1] < 0.97 * two.loss[0]
    assert np.max(np.abs(two.loss / one.loss - 1)) < 5e-4, (list(one.loss), list(two.loss))
    assert len(two.peak_vram_allocated_gib) == 2 and min(two.peak_vram_allocated_gib) > 0


def test_bf16_through_the_kernels_of_the_gpu(tmp_path: Path, ldft: Callable[..., Done]) -> None:
    words = ("offload=full", "checkpointing=cpu")
    one = results.read(_ok(ldft, *words, "train.micro_batch_size=2", f"results.dir={tmp_path}/one")).iloc[0]
    two = results.read(_ok(ldft, *words, "launch.num_ranks=2", f"results.dir={tmp_path}/two")).iloc[0]
    assert two.loss[-1] < 0.97 * two.loss[0]
    assert np.max(np.abs(two.loss / one.loss - 1)) < 1e-2, (list(one.loss), list(two.loss))


@pytest.mark.parametrize(
    ("attention", "shared"),
    [("sdpa_cudnn", "ulysses_sdpa_cudnn"), ("flash_attention_2", "ulysses_fa2"), ("sdpa", "ulysses_sdpa")],
)
def test_two_gpus_share_a_sequence(attention: str, shared: str, tmp_path: Path, ldft: Callable[..., Done]) -> None:
    """In bf16, since cuDNN and flash-attn compute no fp32; tests/training/test_sequence_parallel.py has the exact comparison."""
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    words = ("offload=full", "checkpointing=cpu", "checkpointing.keep_attention=host", f"attention={attention}")
    one = results.read(_ok(ldft, *words, f"results.dir={tmp_path}/one")).iloc[0]
    ranks = ("launch.num_ranks=2", "launch.sequence_parallel=2")
    two = results.read(_ok(ldft, *words, *ranks, f"results.dir={tmp_path}/two")).iloc[0]
    assert one.tokens_per_iteration == two.tokens_per_iteration == 96
    assert two.attention == shared and two.loss[-1] < 0.97 * two.loss[0]
    assert np.max(np.abs(two.loss / one.loss - 1)) < 1e-2, (list(one.loss), list(two.loss))


def test_two_runs_on_the_same_gpus_at_once_do_not_meet(tmp_path: Path, command: Callable[..., list[str]]) -> None:
    def start(seed: int, name: str) -> subprocess.Popen:
        words = ("offload=full", "checkpointing=cpu", "launch.num_ranks=2", f"train.seed={seed}")
        line = command(*words, f"results.dir={tmp_path}/{name}", base=BASE)
        return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def losses(name: str) -> list[float]:
        return list(results.read(tmp_path / name).iloc[0].loss)

    pair = [start(1, "first"), start(2, "second")]
    said = [process.communicate(timeout=300)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    alone = start(1, "alone")
    assert alone.wait(timeout=300) == 0, alone.communicate()[0]
    assert losses("first")[0] != losses("second")[0]
    assert np.allclose(losses("first"), losses("alone"), rtol=1e-3), (losses("first"), losses("alone"))


@pytest.mark.parametrize("way", ["full offload", "stage 3 in GPU memory"])
def test_two_hosts_train_as_two_gpus_of_one(
    way: str, tmp_path: Path, ldft: Callable[..., Done], command: Callable[..., list[str]]
) -> None:
    """Each host is a command that sees one GPU. NCCL takes them for two machines, too, so that all goes through sockets."""
    words = (*WAYS[way], "train.precision=fp32", "launch.num_ranks=2")
    one = results.read(_ok(ldft, *words, f"results.dir={tmp_path}/one")).iloc[0]
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]

    def start(number: int) -> subprocess.Popen:
        meeting = {"NODE_RANK": str(number), "NNODES": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        apart = {"CUDA_VISIBLE_DEVICES": str(number), "NCCL_HOSTID": f"host-{number}", "NCCL_SOCKET_IFNAME": "lo"}
        log = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": f"{tmp_path}/nccl-{number}-%p"}
        line = command(*words, "launch.num_hosts=2", f"results.dir={tmp_path}/two", base=BASE)
        environment = os.environ | meeting | apart | log
        return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    hosts = [start(0), start(1)]
    said = [host.communicate(timeout=300)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    two = results.read(tmp_path / "two").iloc[0]
    assert len(two.hosts) == 2 and two.tokens_per_iteration == one.tokens_per_iteration
    assert len(two.peak_vram_allocated_gib) == 2 and min(two.peak_vram_allocated_gib) > 0
    assert two.loss[-1] < 0.97 * two.loss[0]
    assert np.array_equal(two.loss, one.loss), (list(one.loss), list(two.loss))
    talk = [path.read_text(errors="replace") for path in tmp_path.glob("nccl-*")]
    assert len(talk) == 2 and all("via NET/Socket" in log for log in talk), talk
    assert not any("via P2P" in log or "via SHM" in log for log in talk)


def _ok(ldft: Callable[..., Done], *overrides: str) -> str:
    """Run it; the folder of its results, the last override."""
    done = ldft(*overrides, base=BASE)
    assert done.exit_code == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return overrides[-1].partition("=")[2]
