"""Every family of conf/model at small widths, with every attention of a CPU and every checkpointing mode: the same gradients."""

from __future__ import annotations

import inspect
from itertools import product

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface
from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX

from ldft.config import AttentionKind, Config, Device, OffloadDevice, Precision, SeqLenConfig
from ldft.config.checkpointing import CheckpointingMode
from ldft.errors import ConfigError
from ldft.preflight import attention
from ldft.preflight.selection import select
from ldft.training import data, model
from ldft.training.architecture import hf_config
from ldft.training.checkpointing import checkpointing
from tests.conftest import compose
from tests.training.test_models import reduced

CPU = torch.device("cpu")


def config_of(name: str, kind: AttentionKind, mode: CheckpointingMode) -> Config:
    config = Config(model=reduced(compose(f"model={name}").model), seq_len=SeqLenConfig(tokens=48))
    config.launch.device, config.train.precision, config.offload.stage = Device.cpu, Precision.fp32, 0
    config.offload.parameters = config.offload.optimizer = OffloadDevice.none
    config.attention.kind, config.checkpointing.mode = kind, mode
    return config


def gradients(config: Config) -> list[torch.Tensor]:
    """Loss and gradients."""
    network = model.build(select(config), CPU)
    checkpointing.install(config, network, CPU)
    tokens = data.batch(config, 0, 0, 0)
    loss = network(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in network.parameters())]


@pytest.mark.parametrize("name", ["llama3_1b", "qwen2_5_7b_1m", "mistral_nemo_12b", "gemma2_9b"])
def test_every_attention_and_checkpointing_gives_the_same(name: str) -> None:
    plain = gradients(config_of(name, AttentionKind.eager, CheckpointingMode.none))
    assert torch.isfinite(plain[0]) and all(bool(gradient.any()) for gradient in plain[1:])
    ran = set()
    for kind, mode in product(list(AttentionKind)[1:], CheckpointingMode):
        config = config_of(name, kind, mode)
        try:
            attention.choose(config)
        except ConfigError:
            continue
        ran.add(kind.name)
        for got, expected in zip(gradients(config), plain, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    on_cpu = {kind.name: spec for kind, spec in attention.SPECS.items() if spec.least_capability is None}
    assert ran == {kind for kind, spec in on_cpu.items() if spec.soft_cap or "gemma2" not in name}
    assert {"eager"} <= ran


def test_flash_attention_is_wired_as_transformers_wants_it() -> None:
    for kind, package, capability in (
        (kind, spec.package, spec.least_capability) for kind, spec in attention.SPECS.items() if spec.package
    ):
        assert kind.name in AttentionInterface().valid_keys()
        version = int(kind.name[-1])
        wanted = FLASH_ATTENTION_COMPATIBILITY_MATRIX[version]
        assert capability and capability[0] == wanted.get("cuda_min_major_version", 8)
        assert f'"{package}"' in inspect.getsource(inspect.unwrap(wanted["general_availability_check"]))
        config = config_of("tiny", kind, CheckpointingMode.none)
        network = MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config(config.model))]
        with pytest.raises(ImportError, match=f"FlashAttention{version} has been toggled on"):
            network._from_config(hf_config(config.model), attn_implementation=kind.name)
