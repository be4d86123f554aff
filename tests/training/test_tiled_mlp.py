"""The MLP in tiles: gradients are those without, arithmetic too, in every family that has one, with adapters and in groups."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ldft.config import Config
from ldft.preflight import mlp_tiles
from ldft.preflight.selection import select
from ldft.training import data, model, tiled_mlp
from ldft.training.checkpointing import checkpointing
from tests.conftest import compose, long
from tests.training.test_equality import relative_error, run_once  # noqa: F401

CPU = torch.device("cpu")
FAMILIES = [
    "llama",
    "mistral",
    "phi3",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "olmo3",
    "glm4",
    "smollm3",
]
FAMILIES += ["granite"]
PROJECTIONS = ["q_proj", "gate_proj", "up_proj", "down_proj"]


def config_of(*overrides: str) -> Config:
    config = compose(
        *("model=nano", "model.vocab_size=64", "model.num_layers=3", "seq_len.tokens=37", "train.micro_batch_size=2"),
        *("offload=none", "launch.device=cpu", "train.precision=fp32", "checkpointing=gpu", *overrides),
    )
    config.validate()
    return config


def family(name: str, *overrides: str) -> Config:
    window = ["model.sliding_window=16"] if name in ("gemma2", "gemma3_text", "olmo3") else []
    return config_of(f"model.family={name}", *window, *overrides)


def gradients(
    network: nn.Module, config: Config, dtype: torch.dtype = torch.float64
) -> tuple[float, dict[str, torch.Tensor]]:
    network.zero_grad()
    tokens = data.batch(config, 0, 0, 0)
    loss = network(input_ids=tokens, labels=tokens).loss
    loss.backward()
    found = {name: p.grad.to(dtype) for name, p in network.named_parameters() if p.grad is not None}
    return loss.item(), found


def tiled(network: nn.Module, config: Config, tiles: int) -> None:
    assert tiled_mlp.install(network, tiles, skips=mlp_tiles.skips_in_recomputation(config)) == config.model.num_layers


def error(got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    assert got.keys() == exact.keys() and all(bool(value.any()) for value in exact.values())
    return max(float((got[name] - exact[name]).norm() / exact[name].norm()) for name in exact)


def flops(network: nn.Module, config: Config) -> int:
    """Of all products of one step."""

    class Counting(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if formula := flop_registry.get(func._overloadpacket):
                self.total += formula(*args, **(kwargs or {}), out_val=result)
            return result

    with Counting() as counter:
        gradients(network, config)
    assert counter.total > 0
    return counter.total


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_without_tiles(name: str) -> None:
    config = family(name)
    network = model.build(select(config), CPU).double()
    loss, exact = gradients(network, config)
    network.float()
    _, untiled = gradients(network, config)
    for every, numbers in ((1, (2, 5, 74)), (2, (5,))):  # of 74 tokens: 37 and 37, the last of 14, single ones
        config.checkpointing.every = every
        checkpointing.install(config, network, CPU)
        for tiles in numbers:
            tiled(network, config, tiles)
            got_loss, got = gradients(network, config)
            assert got_loss == pytest.approx(loss, rel=1e-6)
            assert error(got, exact) < max(1e-6, 1.5 * error(untiled, exact)), (name, every, tiles)
            for layer in checkpointing.decoder_layers(network):
                del layer.mlp.forward


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_tiles_take_no_more_arithmetic(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skipping the MLP in the recomputation saves what its own backward pass computes again. Where a norm reads its output, the
    recomputation needs it."""
    # DeepSpeed may have put its own in this place (zero_buckets.frees_weights_early).
    monkeypatch.setattr(nn.functional, "linear", torch._C._nn.linear)
    config = family(name)
    network = model.build(select(config), CPU)
    checkpointing.install(config, network, CPU)
    counts = []
    for tiles in (1, 4):
        if tiles > 1:
            tiled(network, config, tiles)
        counts.append(flops(network, config))
    tokens, width = 2 * 37, config.model.intermediate_size * config.model.hidden_size
    more = 3 * 2 * tokens * 2 * width * (name == "gemma2")  # gate and up again, in three layers
    assert counts[1] == counts[0] + more


def test_adapters_and_their_frozen_weights() -> None:
    config = family("llama")
    plain = model.build(select(config), CPU).double()
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=PROJECTIONS)
    network = get_peft_model(plain, settings)
    generator = torch.Generator().manual_seed(5)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.1
    checkpointing.install(config, network, CPU)
    network.enable_input_require_grads()
    loss, exact = gradients(network, config)
    network.float()
    _, untiled = gradients(network, config)
    tiled(network, config, 5)
    got_loss, got = gradients(network, config)
    assert len(got) == 2 * len(PROJECTIONS) * 3
    assert got_loss == pytest.approx(loss, rel=1e-6)
    assert error(got, exact) < max(1e-6, 1.5 * error(untiled, exact))
    with_tiles = flops(network, config)
    for layer in checkpointing.decoder_layers(network):
        del layer.mlp.forward
    assert with_tiles <= 1.01 * flops(network, config)


def test_in_16_bits_the_error_of_a_gradient_does_not_grow_with_the_tiles() -> None:
    config = config_of("seq_len.tokens=1024", "train.micro_batch_size=1", "model.num_layers=1")
    network = model.build(select(config), CPU)
    checkpointing.install(config, network, CPU)
    rounded = copy.deepcopy(network).bfloat16()
    start = {name: p.detach().double() for name, p in rounded.named_parameters()}
    exactly = network.double()
    exactly.load_state_dict(start, strict=False)
    checkpointing.install(config, rounded, CPU)
    _, exact = gradients(exactly, config)

    def errors() -> dict[str, float]:
        _, got = gradients(rounded, config)
        return {n: float((got[n] - exact[n]).norm() / exact[n].norm()) for n in exact if ".mlp." in n}

    untiled = errors()
    for tiles in (4, 16, 64):
        tiled(rounded, config, tiles)
        for name, found in errors().items():
            assert found < 1.5 * untiled[name], (name, tiles, found, untiled[name])
        for layer in checkpointing.decoder_layers(rounded):
            del layer.mlp.forward


def test_no_activation_of_all_tokens_is_as_wide_as_the_mlp() -> None:
    class Widest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape[-1:] == (width,):
                self.most = max(self.most, result.numel() // width)
            return result

    config = family("llama")
    width, tokens = config.model.intermediate_size, 2 * 37
    network = model.build(select(config), CPU)
    checkpointing.install(config, network, CPU)
    for tiles, most in ((1, tokens), (4, 19)):
        if tiles > 1:
            tiled(network, config, tiles)
        with Widest() as seen:
            gradients(network, config)
        weights = config.model.hidden_size  # a weight's transpose is as wide, too
        assert max(seen.most, weights) == max(most, weights), (tiles, seen.most)


@long
def test_training_under_zero_3_is_that_without_tiles(run_once) -> None:  # noqa: F811
    """With everything offloaded, and with adapters, of whose first layer DeepSpeed fetches the MLP alone."""
    for base in ((), ("lora=r8", "optimizer.learning_rate=5e-3")):
        line = ("train.precision=fp32", "model.vocab_size=512", *base)
        whole, tiles = run_once(*line, "kernels.mlp_tiles=1"), run_once(*line, "kernels.mlp_tiles=5")
        assert (whole.mlp_tiles, tiles.mlp_tiles) == (1, 5)
        assert whole.loss[-1] < 0.95 * whole.loss[0], "the loss must fall, else a missing update would not show"
        assert relative_error(tiles.loss, whole.loss) < 1e-5
