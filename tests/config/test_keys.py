"""Every config key does something: changed from its default, it changes what the ranks are given or what the row says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hydra.errors import ConfigCompositionException

from ldft.config import Config, columns, from_dict, to_dict
from ldft.preflight.selection import select
from ldft.preflight.strategies import ROLES
from ldft.training import model
from tests.config.key_effects import (
    SMALL,
    adapters,
    allocations,
    architecture,
    assigned,
    attention_that_runs,
    batches,
    built_model,
    decision,
    deepspeed,
    deepspeed_on_cuda,
    fitting,
    fitting_the_gpu,
    gpu_share_of,
    labels,
    learning_rates,
    loaded_weights,
    logged,
    machine_of,
    mlp_in_tiles,
    overlaps_update,
    placement,
    plan_of,
    planned,
    printed,
    ranks_of_a_host,
    refusal,
    run,
    strategy,
    tokens_of_a_rank,
    traced,
    uses_liger,
    waiting_inputs,
    weights_folder,
)
from tests.conftest import compose

BANDWIDTH = "{node0:{cpu:200},node1:{cpu:200},node2:{cpu:50},node3:{cpu:50}}"
MIXTRAL = ["model.family=mixtral", "model.num_experts=4", "model.num_experts_per_token=2"]
H200 = ["model=llama3_1b", "launch.device=cuda", "machine=h200"]
# key -> (what it is changed to, where that must show, what else is set before and after). A new key without an entry fails the
# test; there are no exemptions.
CHANGES: dict[str, tuple[str, Callable[[Config], Any], list[str]]] = {
    "model.name": ("other", run, []),
    "model.hf_id": ("some/model", weights_folder, ["model.weights=pretrained"]),
    "model.family": ("mistral", architecture, []),
    "model.weights": ("pretrained", loaded_weights, ["model.path=$SAVED", "model.vocab_size=32"]),
    "model.path": ("$SAVED", weights_folder, ["model.weights=pretrained"]),
    "model.num_layers": ("3", architecture, []),
    "model.hidden_size": ("128", architecture, []),
    "model.intermediate_size": ("96", architecture, []),
    "model.num_attention_heads": ("8", architecture, []),
    "model.num_key_value_heads": ("4", architecture, []),
    "model.head_dim": ("32", architecture, []),
    "model.num_experts": ("6", architecture, MIXTRAL),
    "model.num_experts_per_token": ("3", architecture, MIXTRAL),
    "model.expert_intermediate_size": ("32", architecture, [*MIXTRAL, "model.family=qwen3_moe"]),
    "model.router_aux_loss": ("0.02", architecture, MIXTRAL),
    "model.vocab_size": ("32", architecture, []),
    "model.max_position_embeddings": ("4096", architecture, []),
    "model.rope_theta": ("5000", architecture, []),
    "model.rope_scaling": ("{rope_type:linear,factor:2.0}", architecture, []),
    "model.sliding_window": ("7", architecture, ["model.family=mistral"]),
    "model.attention_softcap": ("9", architecture, ["model.family=gemma2"]),
    "model.logit_softcap": ("9", architecture, ["model.family=gemma2"]),
    "model.tie_word_embeddings": ("false", architecture, []),
    "model.extra": ("{rms_norm_eps:0.5}", architecture, []),
    "offload.stage": ("2", deepspeed, ["offload.parameters=none"]),
    "offload.parameters": ("none", deepspeed, []),
    "offload.optimizer": ("none", deepspeed, []),
    "offload.nvme_path": ("$TMP/disk", deepspeed, ["offload.optimizer=nvme", "offload.nvme_path=$TMP"]),
    "offload.deepspeed": ("{zero_optimization:{sub_group_size:7}}", deepspeed, []),
    "offload.deepspeed_file": ("$JSON", deepspeed, []),
    "numa.name": ("other", run, []),
    "numa.scope": ("roles", refusal, ["memory.pinning=torch"]),
    "numa.kind": ("bind", placement, ["numa.nodes=[0]"]),
    "numa.nodes": ("[0]", placement, ["numa.kind=bind"]),
    "numa.weights": ("[2]", placement, ["numa.kind=weighted_interleave", "numa.nodes=[0]"]),
    "numa.strategy": ("local_only", strategy, []),
    "numa.local_nodes": ("[1]", strategy, ["numa=local_only"]),
    "numa.cxl_nodes": ("[3]", strategy, ["numa=naive_interleaving"]),
    "numa.local_budget_gib": ("0.001", strategy, ["numa=cxl_aware"]),
    "numa.cxl_budget_gib": ("0.0002", strategy, ["numa=optimal", f"numa.bandwidth={BANDWIDTH}"]),
    "numa.bandwidth": (
        BANDWIDTH.replace("{cpu:50}", "{cpu:9}"),
        strategy,
        ["numa=optimal", f"numa.bandwidth={BANDWIDTH}"],
    ),
    **{f"numa.roles.{role}.kind": ("preferred", assigned, [f"numa.roles.{role}.nodes=[0,1]"]) for role in ROLES},
    **{f"numa.roles.{role}.nodes": ("[0]", assigned, []) for role in ROLES},
    **{f"numa.roles.{role}.weights": ("[4,1]", assigned, [f"numa.roles.{role}.nodes=[0,1]"]) for role in ROLES},
    "checkpointing.mode": ("none", waiting_inputs, []),
    "checkpointing.every": ("2", waiting_inputs, []),
    "checkpointing.layers": ("0", waiting_inputs, []),
    "checkpointing.keep_attention": ("host", waiting_inputs, []),
    "checkpointing.device_inputs": ("2", waiting_inputs, []),
    "seq_len.tokens": ("9", batches, []),
    "attention.kind": ("eager", attention_that_runs, []),
    "kernels.liger": ("false", uses_liger, []),
    "kernels.mlp_tiles": ("4", mlp_in_tiles, []),
    "optimizer.name": ("lion", deepspeed, []),
    "optimizer.learning_rate": ("0.5", deepspeed, []),
    "optimizer.schedule": ("linear", learning_rates, []),
    "optimizer.schedule_warmup": ("2", learning_rates, []),
    "optimizer.weight_decay": ("0.5", deepspeed, []),
    "optimizer.betas": ("[0.1,0.2]", deepspeed, []),
    "optimizer.eps": ("0.5", deepspeed, []),
    "optimizer.gradient_clipping": ("0", deepspeed, []),
    "optimizer.fused_step": ("false", deepspeed, []),
    "optimizer.overlap_step": ("true", overlaps_update, []),
    "offload.gpu_share": ("0.5", gpu_share_of, ["launch.device=cuda"]),
    "lora.rank": ("4", adapters, []),
    "lora.alpha": ("3", adapters, ["lora.rank=4"]),
    "lora.dropout": ("0.5", adapters, ["lora.rank=4"]),
    "lora.target_modules": ("[q_proj]", adapters, ["lora.rank=4"]),
    "data.kind": ("zeros", batches, []),
    "data.path": ("$OTHER_TEXT", batches, ["data.kind=text", "data.path=$TEXT", "data.tokenizer=$TOKENIZER"]),
    "data.tokenizer": ("$OTHER_TOKENIZER", batches, ["data.kind=text", "data.path=$TEXT", "data.tokenizer=$TOKENIZER"]),
    "data.column": ("other", batches, ["data.kind=text", "data.path=$ROWS", "data.tokenizer=$TOKENIZER"]),
    "data.loss": ("assistant", labels, ["data.kind=chat", "data.path=$ROWS", "data.tokenizer=$TOKENIZER"]),
    "train.micro_batch_size": ("2", batches, []),
    "train.gradient_accumulation_steps": ("2", deepspeed, []),
    "train.iterations": ("7", learning_rates, []),
    "train.warmup_iterations": ("4", run, []),
    "train.precision": ("fp32", built_model, []),
    "train.loss_scale": ("8", deepspeed, ["train.precision=fp16"]),
    "train.seed": ("1", built_model, []),
    "launch.num_ranks": ("2", run, []),
    "launch.num_hosts": ("2", ranks_of_a_host, ["launch.num_ranks=2"]),
    "launch.sequence_parallel": ("2", tokens_of_a_rank, ["launch.num_ranks=2", "offload=full"]),
    "launch.device": ("auto", run, []),
    "launch.timeout_s": ("33", run, []),
    "memory.pinning": ("torch", deepspeed_on_cuda, []),
    "memory.huge_pages": ("false", allocations, []),
    "memory.capacity_gib": ("64", allocations, []),
    "memory.vram_gib": ("1", fitting_the_gpu, ["model=llama3_1b", "offload=none", "launch.device=cuda"]),
    "plan.goal": ("fastest", plan_of, H200),
    "plan.tokens_per_update": ("64", plan_of, [*H200, "plan=fastest"]),
    "plan.keep": ("[checkpointing]", plan_of, [*H200, "plan=fastest"]),
    "machine.name": ("other", refusal, []),
    "machine.gpu": ("NVIDIA A100", machine_of, H200),
    "machine.capability": ("[8,0]", machine_of, H200),
    "machine.gpus": ("3", machine_of, H200),
    "machine.vram_gib": ("3", machine_of, H200),
    "machine.memory_gb_per_s": ("3", machine_of, H200),
    "machine.link_gb_per_s": ("3", machine_of, H200),
    "machine.peer_gb_per_s": ("3", machine_of, [*H200, "launch.num_ranks=2"]),
    "machine.network_gb_per_s": ("3", machine_of, [*H200, "launch.num_ranks=2", "launch.num_hosts=2"]),
    "machine.host": ("two_nodes", machine_of, H200),
    "machine.cores": ("3", machine_of, H200),
    "machine.host_gib": ("3", machine_of, H200),
    "machine.host_gb_per_s": ("3", machine_of, H200),
    "machine.cxl_gib": ("3", machine_of, [*H200, "machine.host=two_nodes_cxl"]),
    "machine.cxl_gb_per_s": ("3", machine_of, [*H200, "machine.host=two_nodes_cxl"]),
    "monitor.interval_s": ("0", traced, []),
    "results.dir": ("$TMP/elsewhere", run, []),
    "results.log_to": ("[tensorboard]", logged, []),
    "system": ("rack7", run, []),
    "repeat": ("2", run, []),
    "rerun": ("failed", decision, ["sweep.started_at=2e9", "sweep.oom_backstop=false"]),
    "sweep.name": ("nightly", run, []),
    "sweep.repeats": ("2", planned, []),
    "sweep.budget": ("2", planned, []),
    "sweep.budget_seed": ("3", planned, ["sweep.budget=2"]),
    "sweep.oom_backstop": ("false", decision, ["sweep.started_at=2e9"]),
    "sweep.started_at": ("2e9", refusal, ["sweep.repeats=2"]),
    "snapshot": ("true", refusal, []),
    "dry_run": ("true", printed, []),
    "force": ("true", fitting, []),
    "asked": ("{train.seed:auto}", refusal, []),
}


def test_every_key_has_an_entry() -> None:
    assert sorted(CHANGES) == sorted(key for key, _ in columns())


@pytest.fixture
def places(tmp_path: Path, word_tokenizer: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Files that the changed keys name."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda hf_id, **options: f"hub:{hf_id}")
    (tmp_path / "text.txt").write_text("a b c d e f g h " * 20)
    (tmp_path / "other.txt").write_text("h g f e d c b a " * 20)
    (tmp_path / "file.json").write_text('{"zero_optimization": {"sub_group_size": 9}}')
    talk = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a b", "other": "c d", "messages": talk}))
    tokenizer = word_tokenizer("a b c d e f g h")
    (tokenizer / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content + ' ' }}{% endfor %}")
    return {
        "$TMP": str(tmp_path),
        "$JSON": str(tmp_path / "file.json"),
        "$TEXT": str(tmp_path / "text.txt"),
        "$ROWS": str(tmp_path / "rows.jsonl"),
        "$OTHER_TEXT": str(tmp_path / "other.txt"),
        "$TOKENIZER": str(tokenizer),
        "$OTHER_TOKENIZER": str(word_tokenizer("h a b c d e f g")),
        "$SAVED": str(tmp_path / "saved"),
    }


@pytest.mark.parametrize("key", CHANGES)
def test_changing_a_key_shows(key: str, places: dict[str, str], tmp_path: Path) -> None:
    value, observe, beside = CHANGES[key]

    def overrides(*more: str) -> list[str]:
        lines = [*SMALL, *beside, *more]
        for name in sorted(places, key=len, reverse=True):
            lines = [line.replace(name, places[name]) for line in lines]
        return lines

    if "$SAVED" in (value, *(line.partition("=")[2] for line in beside)):
        saved = compose(*overrides()[:4], "model.vocab_size=32", "train.seed=5", "offload.stage=0")
        model.build(select(saved), torch.device("cpu")).save_pretrained(tmp_path / "saved")
    before = compose(*overrides())
    before.results.dir = f"{tmp_path}/results"  # not an override: most tests begin with the same config, composed once
    try:
        after = compose(*overrides(f"{key}={value}"))
    except ConfigCompositionException as error:
        # A choice of one value so far: anything else is refused, by its type.
        assert observe is refusal and ("expected one of" in str(error.__cause__) or key == "asked")
        return
    if key != "results.dir":
        after.results.dir = before.results.dir
    assert from_dict(json.loads(json.dumps(to_dict(after)))) == after
    assert observe(before) != observe(after)


@pytest.mark.parametrize("observe", dict.fromkeys(entry[1] for entry in CHANGES.values()), ids=lambda o: o.__name__)
def test_nothing_shows_without_a_change(
    observe: Callable[[Config], Any], tmp_path: Path, places: dict[str, str]
) -> None:
    same = [compose(*SMALL) for _ in range(2)]
    for config in same:
        config.results.dir = f"{tmp_path}/results"
    assert observe(same[0]) == observe(same[1])
