"""Liger Kernel on a GPU: losses and gradients as without it, no logits of tokens x vocabulary, alone and under DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ldft.preflight import liger
from ldft.preflight.resolved import resolve
from ldft.preflight.selection import select
from ldft.training import data, liger_kernels, model
from ldft.training.deepspeed import engine, role_memory
from tests.gpu.machine import allocated, cuda_config, process_group

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

SMALL = ("model.num_layers=2", "model.num_attention_heads=4", "model.num_key_value_heads=2", "model.head_dim=64",
         "model.hidden_size=256", "model.intermediate_size=512", "model.vocab_size=4096", "seq_len.tokens=301",
         "train.micro_batch_size=2", "checkpointing=none")  # fmt: skip
CUDA = torch.device("cuda", 0)


def results(*overrides: str, untrained: int = 0) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss, gradients by name and patched modules. untrained: leading tokens of each sequence that are not trained on."""
    config = cuda_config("model=nano", *SMALL, "offload=none", *overrides)
    network = model.build(select(config), CUDA)
    tokens = data.batch(config, 0, 0, 0).to(CUDA)
    labels = tokens.clone()
    labels[:, :untrained] = data.IGNORED
    output = network(input_ids=tokens, labels=labels)
    output.loss.backward()
    assert (output.logits is None) == (config.kernels.liger is True)
    gradients = {name: p.grad.float() for name, p in network.named_parameters()}
    return output.loss.item(), gradients, liger_kernels.count_modules(network)


@pytest.mark.parametrize("family", liger.FAMILIES)
@pytest.mark.parametrize("tied", ["true", "false"])
def test_loss_and_gradients_are_those_of_the_stock_model(family: str, tied: str) -> None:
    beside = [f"model.family={family}", f"model.tie_word_embeddings={tied}"]
    if family == "gemma2":
        beside += ["model.sliding_window=100", "model.attention_softcap=50", "model.logit_softcap=0.5"]
    exact, true, _ = results(*beside, "kernels.liger=false", "train.precision=fp32")
    stock, expected, none = results(*beside, "kernels.liger=false")
    loss, got, patched = results(*beside, "kernels.liger=true")
    assert none == 0 and patched >= 10
    assert abs(loss - exact) < 2 * abs(stock - exact) + 2e-3 * exact, (loss, stock, exact)
    for name, gradient in true.items():
        size = gradient.norm().clamp(min=1e-8)
        ours, theirs = ((side[name] - gradient).norm() / size for side in (got, expected))
        # Liger adds up the gradient of the output projection in bf16, chunk by chunk.
        assert ours < 2 * theirs + 5e-3, (name, ours.item(), theirs.item())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_tokens_that_are_not_trained_on_count_as_little_as_in_the_stock_model(family: str) -> None:
    beside = [f"model.family={family}", "train.precision=fp32"]
    beside += ["model.sliding_window=100"] if family == "gemma2" else []
    expected, gradients, _ = results(*beside, "kernels.liger=false", untrained=290)
    loss, got, _ = results(*beside, "kernels.liger=true", untrained=290)
    whole, _, _ = results(*beside, "kernels.liger=true")
    assert abs(loss - expected) < 2e-3 * expected and abs(whole - expected) > 10 * abs(loss - expected)
    for name, gradient in gradients.items():
        assert (got[name] - gradient).norm() < 2e-2 * gradient.norm().clamp(min=1e-8), name


def test_no_logits_are_stored() -> None:
    beside = ("model.vocab_size=131072", "seq_len.tokens=8192", "train.micro_batch_size=1")
    logits_bytes = 131072 * 8192 * 2
    peaks = []
    for used in ("true", "false"):
        before = allocated()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        results(*beside, f"kernels.liger={used}")
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] < logits_bytes < peaks[1] - peaks[0], peaks


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with process_group(tmp_path_factory.mktemp("group")):
        yield


@pytest.mark.parametrize(
    "overrides",
    [
        ("offload=full",),
        ("offload=full", "model.tie_word_embeddings=false", "train.gradient_accumulation_steps=2"),
        ("offload=none", "model.tie_word_embeddings=false"),
        ("offload=full", "lora=r8"),
    ],
)
def test_trains_under_deepspeed_as_the_stock_model(group: None, overrides: tuple[str, ...]) -> None:
    losses: list[list[float]] = []
    for used in ("false", "true"):
        rate = 2e-2 if "lora=r8" in overrides else 2e-3
        beside = (f"optimizer.learning_rate={rate}", "data=repeat", "memory.pinning=none", f"kernels.liger={used}")
        config = cuda_config("model=nano", *SMALL, *overrides, *beside)
        run = resolve(config)
        arenas = role_memory.arenas_of(run, 0)
        network = model.build(run, CUDA, arenas)
        built = engine.build(run, network, arenas)
        losses.append([])
        for iteration in range(5):
            for step in range(config.train.gradient_accumulation_steps):
                tokens = data.batch(config, iteration, step, 0).to(CUDA)
                loss = built(input_ids=tokens, labels=tokens).loss
                built.backward(loss)
                built.step()
                losses[-1].append(loss.item())
        built.destroy()
    assert losses[1][-1] < losses[1][0] - 0.02, losses
    assert all(abs(a - b) < 1e-2 * a for a, b in zip(*losses, strict=True)), losses
