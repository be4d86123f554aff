"""Every family, at two small layers, with every attention and every checkpointing mode: loss and gradients of eager, in bf16."""

from __future__ import annotations

import gc

import pytest
import torch

from ldft.config import Config
from ldft.config.checkpointing import CheckpointingMode
from ldft.preflight.selection import select
from ldft.training import data, model
from ldft.training.checkpointing import checkpointing
from tests.gpu.machine import cuda_config, kinds

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

MODELS = ("llama3_1b", "qwen2_5_7b_1m", "mistral_nemo_12b", "gemma2_9b")
SMALL = ("model.num_layers=2", "model.num_attention_heads=4", "model.num_key_value_heads=2", "model.head_dim=64",
         "model.hidden_size=256", "model.intermediate_size=512", "model.vocab_size=2048", "seq_len.tokens=300",
         "offload=none", "train.micro_batch_size=2")  # fmt: skip
CUDA = torch.device("cuda", 0)


def config_of(name: str, *overrides: str) -> Config:
    config = cuda_config(f"model={name}", *SMALL, *overrides)
    config.model.sliding_window = min(config.model.sliding_window, 100)
    return config


def loss_and_gradients(config: Config) -> tuple[float, torch.Tensor]:
    network = model.build(select(config), CUDA)
    held = checkpointing.install(config, network, CUDA, pin=True)
    tokens = data.batch(config, 0, 0, 0).to(CUDA)
    loss = network(input_ids=tokens, labels=tokens).loss
    loss.backward()
    gradients = torch.cat([p.grad.float().flatten() for p in network.parameters()])
    del held
    return loss.item(), gradients


@pytest.mark.parametrize("name", MODELS)
def test_every_attention_and_checkpointing_agrees_with_eager(name: str) -> None:
    liger = "kernels.liger=false"
    wanted, direction = loss_and_gradients(config_of(name, "attention=eager", "checkpointing=none", liger))
    exact, true = loss_and_gradients(
        config_of(name, "attention=eager", "checkpointing=none", liger, "train.precision=fp32")
    )
    noise = ((direction - true).norm() / true.norm()).item()
    ran = []
    for kind in kinds(config_of(name)):
        for mode in CheckpointingMode:
            loss, gradients = loss_and_gradients(
                config_of(name, f"attention={kind}", f"checkpointing={mode.name}", liger)
            )
            error = ((gradients - true).norm() / true.norm()).item()
            assert abs(loss - exact) < 2 * abs(wanted - exact) + 2e-3 * exact, (kind, mode, loss, exact)
            assert error < 1.5 * noise + 2e-3, (kind, mode, error, noise)
            ran.append((kind, mode.name))
            gc.collect()
    print(name, ran)
    assert len({kind for kind, _ in ran}) > 1 or name == "gemma2_9b"


def test_fp16_gives_finite_gradients() -> None:
    loss, gradients = loss_and_gradients(config_of("llama3_1b", "train.precision=fp16", "kernels.liger=false"))
    assert torch.isfinite(gradients).all() and 0 < loss < 20
