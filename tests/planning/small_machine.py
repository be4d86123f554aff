"""A model of a few numbers on a machine with round rates, for which each term of the predicted times is worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from ldft.config import AttentionKind, Config, Device, OffloadDevice, Precision
from ldft.config.checkpointing import CheckpointingMode
from ldft.memory.cost_model import Bandwidths
from ldft.memory.topology import Topology
from ldft.planning.rates import HostTime, Rates
from ldft.preflight.selection import Selection

# Rates of about 1, so that each term is seen in the sum: 2 cores' nodes that update 10 B/s together, a link of 5 B/s to the device
# and 4 B/s from it, 2 B/s between GPUs, and a device memory of 10 B/s.
HOST = Bandwidths(cpu={0: 3.0, 1: 7.0}, h2d={0: 5.0}, d2h={0: 4.0}, link_h2d=5.0, link_d2h=4.0)
NO_TIME = HostTime(0.0, 0.0, 0.0)
RATES = Rates(
    products=1000.0,
    attention={4: {10: (200.0, 100.0)}},
    device_memory=10.0,
    host=HOST,
    launches_beside=0.5,
    fetched=NO_TIME,
    resident=NO_TIME,
    peers=2.0,
    measured=False,
)


def run_of(**more: Any) -> Selection:
    """Three layers with 64 + 32 + 32 + 64 weights in attention, 3 x 160 in the MLP and 16 in norms: 688; an embedding of 400, which
    is also the output, and a norm of 8. All: 2472. A micro-batch has 3 sequences of 10 tokens in bf16."""
    config = Config()
    model = config.model
    model.family, model.num_layers, model.hidden_size, model.intermediate_size = "llama", 3, 8, 20
    model.num_attention_heads, model.num_key_value_heads, model.head_dim = 2, 1, 4
    model.vocab_size, model.tie_word_embeddings = 50, True
    config.seq_len.tokens, config.train.micro_batch_size, config.train.precision = 10, 3, Precision.bf16
    config.launch.device = Device.cuda
    config.checkpointing.mode = CheckpointingMode.gpu
    offload(config, 3, OffloadDevice.cpu, OffloadDevice.cpu)
    values: dict[str, Any] = {
        "config": config,
        "topology": Topology(nodes=(), gpus={}, weights={}, weights_auto=None, allowed=()),
        "deepspeed": {"zero_optimization": {"sub_group_size": 688}},
        "attention": AttentionKind.sdpa,
        "repeats_heads": False,
        "liger": False,
        "fused_step": True,
        "overlap_step": False,
        "no_overlap": "",
    }
    return Selection(**values | more)


def offload(config: Config, stage: int, parameters: OffloadDevice, optimizer: OffloadDevice) -> None:
    config.offload.stage, config.offload.parameters, config.offload.optimizer = stage, parameters, optimizer


def near(value: Any) -> Any:
    return pytest.approx(value, rel=1e-12)
