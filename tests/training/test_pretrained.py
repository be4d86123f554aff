"""Pretrained weights: what is saved is what is loaded, with and without ZeRO-3, and never more than one parameter whole."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from safetensors.torch import load_file, save_file

from ldft.config import Config, Device
from ldft.errors import ConfigError
from ldft.preflight.selection import select
from ldft.training import model, safetensors_index
from ldft.training.architecture import hf_config
from ldft.training.deepspeed import operators
from tests.conftest import compose

CPU = torch.device("cpu")


def config_of(*overrides: str) -> Config:
    config = compose("model=nano", "model.vocab_size=512", "launch.device=cpu", *overrides)
    config.launch.device = Device.cpu
    return config


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder of several shards, and the weights in it."""
    network = model.build(select(config_of("train.seed=5", "offload=none")), CPU)
    network.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    return tmp_path / "saved", {name: tensor.detach().clone() for name, tensor in network.named_parameters()}


def test_loads_what_was_saved(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, weights = saved
    config = config_of("offload=none", "model.weights=pretrained", f"model.path={folder}", "train.seed=9")
    network = model.build(select(config), CPU)
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    with torch.no_grad():
        loss = network(input_ids=torch.arange(64)[None], labels=torch.arange(64)[None]).loss
    assert torch.isfinite(loss)  # buffers, which no file holds, are made


def test_fewer_layers_take_the_first_ones(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, weights = saved
    config = config_of("offload=none", "model.weights=pretrained", f"model.path={folder}", "model.num_layers=1")
    network = model.build(select(config), CPU)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in network.named_parameters())


@pytest.fixture
def process_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    # ninja lies beside Python; loading an operator sets the folder of extensions for good.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(operators.cache_dir()))
    operators.load(select(config_of("offload=none")), say=lambda text: None)
    deepspeed.init_distributed(
        dist_backend="gloo",
        auto_mpi_discovery=False,
        init_method=f"file://{tmp_path}/store",
        rank=0,
        world_size=1,
        verbose=False,
    )
    yield
    torch.distributed.destroy_process_group()


@contextmanager
def one_whole_at_a_time() -> Iterator[list[int]]:
    """Within it a parameter may be gathered only while no other is whole. The number of parameters of each gathering."""
    sizes: list[int] = []
    whole = 0
    stock: Any = deepspeed.zero.GatheredParameters

    class Noting(stock):
        def __enter__(self) -> None:
            nonlocal whole
            super().__enter__()
            whole += 1
            sizes.append(len(self.params))
            assert whole == 1, "gathered while another parameter is whole"

        def __exit__(self, *exc: object) -> None:
            nonlocal whole
            whole -= 1
            super().__exit__(*exc)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed.zero, "GatheredParameters", Noting)
        yield sizes


def test_under_zero_3_only_one_parameter_is_whole_at_a_time(
    saved: tuple[Path, dict[str, torch.Tensor]], process_group: None
) -> None:
    folder, weights = saved
    config = config_of("offload=full", "model.weights=pretrained", f"model.path={folder}")
    with one_whole_at_a_time() as sizes:
        network = model.build(select(config), CPU)
    assert sizes == [1] * len(weights)
    for name, parameter in network.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter):
            assert torch.equal(parameter, weights[name]), name
        assert parameter.ds_status.name == "NOT_AVAILABLE"


def test_what_does_not_fit_is_refused(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, _ = saved
    base = ("offload=none", "model.weights=pretrained", f"model.path={folder}")
    with pytest.raises(
        ConfigError, match=r"model.path: .* is \[512, 64\] in .*saved, \[256, 64\] in nano; choose the model="
    ):
        model.build(select(config_of(*base, "model.vocab_size=256")), CPU)
    with pytest.raises(ConfigError, match=r"has no tensor model.layers.2\.\S+, which nano needs; choose the model="):
        model.build(select(config_of(*base, "model.num_layers=3")), CPU)
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        if "model.norm.weight" in tensors:
            tensors.pop("model.norm.weight")
            save_file(tensors or {"other": torch.zeros(1)}, file)
    with pytest.raises(ConfigError, match=r"has no tensor model.norm.weight"):
        model.build(select(config_of(*base)), CPU)


def test_a_file_cut_short_is_refused_at_any_length(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, _ = saved
    file = min(folder.glob("*.safetensors"))
    content = file.read_bytes()
    safetensors_index.index(folder)
    for length in (0, 4, 8, 40, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(ConfigError, match=r"model.path: .*damaged or cut short"):
            safetensors_index.index(folder)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["model.family=lama"],
            r"model.family: transformers has no causal language model 'lama'; did you mean .*llama",
        ),
        (
            ["model.extra={rms_norm_epz:1.0}"],
            r"model.extra.rms_norm_epz: transformers' llama has no such key; did you mean rms_norm_eps",
        ),
        (["model.extra={hidden_size:1}"], r"model.extra.hidden_size: ldft sets this"),
        (
            ["model.rope_scaling={rope_type:yearn}"],
            r"model.rope_scaling.rope_type: 'yearn' does not exist; use one of .*yarn",
        ),
        (["model.sliding_window=9"], r"model.sliding_window: 9: transformers' llama does not support it; use 0"),
        (["model.extra={rms_norm_eps:wide}"], r"model: transformers refuses this llama: .*rms_norm_eps"),
    ],
)
def test_an_impossible_architecture_is_the_users_error(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        hf_config(config_of(*overrides).model)


def test_the_hub_is_asked_for_the_published_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(hf_id: str, **options: object) -> str:
        raise LocalEntryNotFoundError(f"no network for {hf_id}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    config = compose("model=llama3_8b", "model.weights=pretrained")
    with pytest.raises(ConfigError, match=r"model.weights: cannot fetch meta-llama/Llama-3.1-8B .*model.path"):
        safetensors_index.folder(config.model, fetch=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zero_3_draws_the_same_weights_in_the_precision_asked_for(process_group: None, precision: str) -> None:
    whole, split = (
        model.build(select(config), CPU)
        for config in (config_of(f"offload={offload}", f"train.precision={precision}") for offload in ("none", "full"))
    )
    for (name, expected), parameter in zip(whole.named_parameters(), split.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters(parameter):
            assert parameter.dtype == expected.dtype and torch.equal(parameter, expected), name
