"""Host memory by formula: against the parameters that transformers and peft make, and against what DeepSpeed holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ldft.config import to_dict
from ldft.errors import ConfigError
from ldft.preflight import host_estimate, parameter_counts
from ldft.preflight.resolved import resolve
from ldft.preflight.selection import select
from ldft.training import lora
from ldft.training.architecture import hf_config
from tests.conftest import IN_CI, compose, long

MIXTURE = ["model.num_experts=4", "model.num_experts_per_token=2"]
ADAPTED = {
    "every linear": [],
    "two": ["lora.target_modules=[q_proj,down_proj]"],
    "the head": ["lora.target_modules=[v_proj,lm_head]"],
    "attention of a mixture": ["model.family=mixtral", *MIXTURE],
    "one dense layer of three": ["model.family=qwen3_moe", *MIXTURE, "+model.extra.mlp_only_layers=[1]"],
    "a shared expert": ["model.family=qwen2_moe", *MIXTURE, "+model.extra.shared_expert_intermediate_size=24"],
    "fused": ["model.family=phi3"],
}


@pytest.mark.parametrize("case", ADAPTED)
def test_every_adapters_size_is_pefts_own(case: str) -> None:
    config = compose("model=nano", "model.num_layers=3", "model.vocab_size=50", "model.tie_word_embeddings=false", "lora=r8",
                     *ADAPTED[case], "launch.device=cpu")  # fmt: skip
    parameter_counts.check_adapted(config)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(hf_config(config.model), attn_implementation="eager")
        lora.inject(built, config.lora)
    trained = Counter(parameter.numel() for parameter in built.parameters() if parameter.requires_grad)
    frozen = Counter(parameter.numel() for parameter in built.parameters() if not parameter.requires_grad)
    assert parameter_counts.trained_sizes(config) == trained and parameter_counts.frozen_sizes(config) == frozen


def test_an_adapter_on_experts_is_refused() -> None:
    config = compose("model=nano", "model.family=mixtral", *MIXTURE, "lora=r8", "lora.target_modules=[gate_up_proj]")
    with pytest.raises(ConfigError) as refused:
        parameter_counts.check_adapted(config)
    assert str(refused.value) == (
        "lora.target_modules: 'gate_up_proj' is not a linear layer of nano; use q_proj, k_proj, v_proj, o_proj, lm_head; the "
        "weights of experts have no adapters"
    )


# Odd sizes, so that two ranks need padding everywhere.
ODD = ("model=nano", "model.vocab_size=101", "model.hidden_size=33", "model.intermediate_size=55", "model.num_attention_heads=3",
       "model.num_key_value_heads=1", "model.head_dim=6", "seq_len.tokens=8", "launch.device=cpu", "launch.num_ranks=2",
       "memory.pinning=none", "train.iterations=1", "train.warmup_iterations=0", "checkpointing=none",
       "optimizer.fused_step=false")  # fmt: skip
CASES = {
    "full": (),
    "sub_groups": ("offload.deepspeed.zero_optimization.sub_group_size=500", "train.gradient_accumulation_steps=2"),
    "optimizer": ("offload=optimizer",),
    "accumulated": ("offload=optimizer", "train.gradient_accumulation_steps=2"),
    "stage1": ("offload=optimizer", "offload.stage=1"),
    "stage3_optimizer": ("offload=optimizer", "offload.stage=3"),
    "adapters": ("lora=r8",),
    "fp32": ("train.precision=fp32",),
} | ({"lion": ("optimizer=lion",)} if IN_CI else {})  # its CPULion takes a minute to compile


@long
def test_host_bytes_are_what_two_ranks_of_deepspeed_hold(tmp_path: Path) -> None:
    configs = {name: compose(*ODD, *more) for name, more in CASES.items()}
    for name, config in configs.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(to_dict(config)))
    line = [sys.executable, str(Path(__file__).with_name("held_by_deepspeed.py")), str(tmp_path)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja of this environment
    env = os.environ | {
        "PATH": path,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "OMP_NUM_THREADS": "1",
    }
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [subprocess.Popen(line, env=env | {"RANK": rank, "LOCAL_RANK": rank}, **pipes) for rank in "01"]
    try:
        said = [process.communicate(timeout=560)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], said[0][-3000:] + said[1][-3000:]
    held: dict[str, dict[str, int]] = {}
    for text in said[0].splitlines():
        if text.startswith("HELD "):
            held |= json.loads(text.removeprefix("HELD "))
    expected = {name: host_estimate.host_bytes(select(config)) for name, config in configs.items()}
    for name, roles in held.items():
        found = {role: size for role, size in roles.items() if size}
        if name == "lion":  # DeepSpeed makes a second moment, and never touches its pages
            found.pop("variance", None)
        if (
            name == "accumulated"
        ):  # which parameters a rank has a part of hangs on their order, which the estimate leaves out
            bound = expected[name].pop("compute_gradients")
            assert 0 <= bound - found.pop("compute_gradients") <= 2 * max(parameter_counts.trained_sizes(configs[name]))
        assert found == expected[name], name
    assert held.keys() == configs.keys()


def test_layer_inputs_wait_on_the_host_for_all_groups_but_the_last() -> None:
    config = compose(
        "model=llama3_3b", "seq_len=32k", "checkpointing=cpu", "checkpointing.every=3", "launch.device=cpu"
    )
    assert host_estimate.host_bytes(select(config))["activations"] == 9 * 2 * 32768 * 3072  # 28 layers make ten groups


def test_torchs_pinned_allocator_is_counted_where_it_pins() -> None:
    """Peaks of stock DeepSpeed on an H200, GB, file pages included (about 0.5 GB a rank)."""
    for line, measured in (
        (("model=llama3_1b", "seq_len=8k", "train.micro_batch_size=4"), 34.0),
        (("model=llama3_3b", "seq_len=32k"), 80.9),
        (("model=llama3_8b", "seq_len=32k", "launch.num_ranks=4"), 4 * 47.9),
    ):
        stock = ("memory.pinning=torch", "optimizer.fused_step=false")
        config = compose(*line, "checkpointing=gpu", "launch.device=cuda", *stock)
        files = 0.5 * config.launch.num_ranks
        assert resolve(config).estimate.host_bytes / 1e9 + files == pytest.approx(measured, rel=0.03)
        exact = compose(*line, "checkpointing=gpu", "launch.device=cuda", "optimizer.fused_step=false")
        assert resolve(exact).estimate.host_bytes < 0.97 * resolve(config).estimate.host_bytes


def test_swap_files_leave_only_buffers_on_the_host(tmp_path: Path) -> None:
    line = ("model=llama3_8b", "launch.device=cuda", f"offload.nvme_path={tmp_path}", "checkpointing=gpu")
    config = compose(*line, "offload=nvme")
    assert host_estimate.host_bytes(select(config)) == {
        "compute_gradients": 2 * parameter_counts.num_parameters(config.model)
    }
    # Four buffers of the largest sub-group, the embedding, and a gradient, in fp32; five of a weight in 16 bits.
    embedding = 128256 * 4096
    assert resolve(config).estimate.others["swap buffers"] == pytest.approx((5 * 4 + 5 * 2) * embedding, rel=0.001)
    assert resolve(config).estimate.host_bytes < 0.3 * resolve(compose(*line[:2])).estimate.host_bytes


def test_gradients_wait_in_host_memory_while_they_accumulate() -> None:
    """ZeRO-2 offload: the largest gradient on its way; and with accumulation this rank's share, with one more beside it."""

    def gradients(steps: int, ranks: int) -> int:
        line = ("model=llama3_1b", "offload=optimizer", "launch.device=cuda", "train.precision=bf16")
        config = compose(*line, f"train.gradient_accumulation_steps={steps}", f"launch.num_ranks={ranks}")
        return host_estimate.host_bytes(select(config))["compute_gradients"]

    sizes = parameter_counts.trained_sizes(compose("model=llama3_1b"))
    whole, largest = parameter_counts.total(sizes), max(sizes)
    assert gradients(1, 4) == 2 * largest
    assert gradients(2, 4) == 2 * (largest + -(-whole // 8) * 2 + largest)
    assert gradients(2, 1) == 2 * (largest + whole)
