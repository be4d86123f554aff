"""Every config key does something: changed from its default, it changes what the ranks are given or what the row says."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from ldft import environment
from ldft.config import Config, Device, columns, from_dict, run_id, series_id, to_dict
from ldft.errors import ConfigError
from ldft.memory import placing
from ldft.memory.limits import Free
from ldft.memory.topology import Node, Topology
from ldft.preflight import deepspeed_config, fit, role_placement
from ldft.preflight.role_placement import ROLES
from ldft.results import store
from ldft.results.history import History
from ldft.runner import dry_run, launch, node_memory, parent
from ldft.runner.launch import RankExit
from ldft.sweep import cell, plan
from ldft.training import data, liger, model, safetensors_index, schedule
from ldft.training.checkpointing import checkpointing
from tests.conftest import compose

SMALL = ("model=nano", "model.vocab_size=64", "seq_len.tokens=8", "launch.device=cpu")


def deepspeed(config: Config) -> Any:
    return deepspeed_config.build(config)


def deepspeed_on_cuda(config: Config) -> Any:
    config.launch.device = Device.cuda
    return deepspeed_config.build(config)


def architecture(config: Config) -> Any:
    return model.hf_config(config.model).to_dict()


def built_model(config: Config) -> Any:
    config.offload.stage = 0
    network = model.build(config, {}, torch.device("cpu"))
    return next(network.parameters()).detach().sum().item(), network.dtype


def waiting_inputs(config: Config) -> Any:
    """Bytes that wait in host memory, and how often the first layer runs in one step."""
    config.offload.stage = 0
    network = model.build(config, {}, torch.device("cpu"))
    installed = checkpointing.install(config, network, torch.device("cpu"))
    runs: list[int] = []
    network.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    tokens = data.batch(config, 0, 0, 0)
    network(input_ids=tokens, labels=tokens).loss.backward()
    return sum(tensor.nbytes for tensor in installed.host_tensors()) if installed else None, len(runs)


def attention_that_runs(config: Config) -> Any:
    config.offload.stage = 0
    return model.build(config, {}, torch.device("cpu")).config._attn_implementation


def uses_liger(config: Config) -> Any:
    config.launch.device = Device.cuda
    return liger.wanted(config)


def adapters(config: Config) -> Any:
    """Trainable parameters by name, scales and dropout."""
    config.offload.stage = 0
    network = model.build(config, {}, torch.device("cpu"))
    layers = [module for module in network.modules() if hasattr(module, "lora_A")]
    sizes = {name: parameter.shape for name, parameter in network.named_parameters() if parameter.requires_grad}
    return sizes, [(layer.scaling, str(layer.lora_dropout)) for layer in layers]


def batches(config: Config) -> Any:
    return [data.batch(config, iteration, 0, 0).tolist() for iteration in range(2)]


def learning_rates(config: Config) -> Any:
    return [schedule.factor(config, update) for update in range(config.train.iterations)]


def weights_folder(config: Config) -> Any:
    return str(safetensors_index.folder(config.model, fetch=True))


def loaded_weights(config: Config) -> Any:
    config.offload.stage = 0
    return next(model.build(config, {}, torch.device("cpu")).parameters()).detach().sum().item()


class Fake(dict):
    """Stands for the rank processes: notes how they would be started, and ends them well."""

    def __call__(self, folder: Path, num_ranks: int, device: str) -> Fake:
        self.update(folder=str(folder.parents[1]), num_ranks=num_ranks, device=device)
        for rank in range(num_ranks):
            (folder / f"rank-{rank}.json").write_text('{"iteration_s": [1.0, 1.0, 1.0, 1.0, 2.0], "init": {}, '
                                                      '"model_tflop_dense": 1, "model_tflop_attention": 1}')  # fmt: skip
        self.exits, self.pids = [RankExit(rank, 0, None, 0.0, False) for rank in range(num_ranks)], []
        return self

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def end(self) -> None:
        pass


def run(config: Config) -> Any:
    """What a run gives its ranks and says in its row, without them."""
    with pytest.MonkeyPatch.context() as patch:
        fake = Fake()
        patch.setattr(launch, "Ranks", fake)
        patch.setattr(environment, "gpus", lambda: ("a GPU", "a GPU"))
        patch.setattr(environment, "driver", lambda: None)
        patch.setattr(environment, "gpu_memory_gib", lambda: 80.0)
        patch.setattr(environment, "compute_capability", lambda: (9, 0))
        patch.setattr(launch, "wait", lambda ranks, timeout_s, tick: fake.update(timeout_s=timeout_s) or True)
        row = parent.run(config).row
    names = (
        "system",
        "repeat",
        "sweep",
        "warmup_iterations",
        "tokens_per_iteration",
        "iteration_median_s",
        "cfg.numa.name",
        "cfg.model.name",
    )
    return dict(fake) | {name: row[name] for name in names}


def refusal(config: Config) -> Any:
    try:
        config.validate()
    except ConfigError as error:
        return str(error)
    return "valid"


def placement(config: Config) -> Any:
    return config.numa.placement


def assigned(config: Config) -> Any:
    """Placement by role on a machine of two nodes."""
    nodes = tuple(Node(id=id, cpus=(0,), total_bytes=1 << 30, distances={0: 10, 1: 20}) for id in (0, 1))
    return role_placement.assign(config, Topology(nodes=nodes, gpus={}, weights={}, weights_auto=None, allowed=(0, 1)))


def strategy(config: Config) -> Any:
    """Placement by role of two ranks on a machine with two nodes of local memory and two of CXL; or the line that refuses it."""
    config.launch.num_ranks = 2
    nodes = tuple(
        Node(id=id, cpus=(id,) * (id < 2), total_bytes=4 << 30, distances={n: 10 for n in range(4)}) for id in range(4)
    )
    machine = Topology(nodes=nodes, gpus={}, weights={}, weights_auto=None, allowed=(0, 1, 2, 3))
    return role_placement.assign(config, machine)


def allocations(config: Config) -> Any:
    """What every allocation of a rank follows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placing, "settings", placing.Settings())
        node_memory.settle(config)
        return placing.settings


def planned(config: Config) -> Any:
    """Seeds and repetitions of the cells that a sweep over three seeds would run with this config."""
    cells = [[f"train.seed={seed}"] for seed in range(3)]
    own = [f"sweep.{name}={getattr(config.sweep, name)}" for name in ("repeats", "budget", "budget_seed")]
    of = plan.make(cells, lambda overrides: OmegaConf.structured(compose(*SMALL, *own, *overrides)), set(), 1.0)
    return [(of.configs[one.run_id].train.seed, one.repeat) for one in of.cells]


def decision(config: Config) -> Any:
    """What becomes of a cell that a row answers, or whose shorter sister ran out of memory, both of an earlier sweep."""
    folder = Path(config.results.dir)
    shorter = copy.deepcopy(config)
    shorter.seq_len.tokens -= 1
    for one, status in ((config, "error"), (shorter, "oom_host")):
        name = run_id(one)
        (folder / name / "attempt-1").mkdir(parents=True, exist_ok=True)
        times = {"started_at": datetime(2026, 1, 1, tzinfo=UTC), "series_id": series_id(one)}
        row = {"run_id": name, "attempt": 1, "status": status, "cfg.seq_len.tokens": one.seq_len.tokens, **times}
        store.write_row(row, folder / name / "attempt-1" / "row.parquet")
    longer = copy.deepcopy(config)
    longer.seq_len.tokens += 1
    return [cell.decide(one, History(folder)).do for one in (config, longer)]


def fitting(config: Config) -> Any:
    """What becomes of a run that has a KiB of free memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "free_memory", lambda capacity: Free(bytes=1024, limit="MemAvailable"))
        try:
            fit.check(config)
        except ConfigError as error:
            return str(error)
    return "runs"


def printed(config: Config) -> Any:
    return config.dry_run and dry_run.describe(config)


BANDWIDTH = "{node0:{cpu:200},node1:{cpu:200},node2:{cpu:50},node3:{cpu:50}}"
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
    "seq_len.tokens": ("9", batches, []),
    "attention.kind": ("eager", attention_that_runs, []),
    "kernels.liger": ("false", uses_liger, []),
    "optimizer.name": ("lion", deepspeed, []),
    "optimizer.learning_rate": ("0.5", deepspeed, []),
    "optimizer.schedule": ("linear", learning_rates, []),
    "optimizer.schedule_warmup": ("2", learning_rates, []),
    "optimizer.weight_decay": ("0.5", deepspeed, []),
    "optimizer.betas": ("[0.1,0.2]", deepspeed, []),
    "optimizer.eps": ("0.5", deepspeed, []),
    "optimizer.gradient_clipping": ("0", deepspeed, []),
    "optimizer.fused_step": ("false", deepspeed, []),
    "lora.rank": ("4", adapters, []),
    "lora.alpha": ("3", adapters, ["lora.rank=4"]),
    "lora.dropout": ("0.5", adapters, ["lora.rank=4"]),
    "lora.target_modules": ("[q_proj]", adapters, ["lora.rank=4"]),
    "data.kind": ("zeros", batches, []),
    "data.path": ("$OTHER_TEXT", batches, ["data.kind=text", "data.path=$TEXT", "data.tokenizer=$TOKENIZER"]),
    "data.tokenizer": ("$OTHER_TOKENIZER", batches, ["data.kind=text", "data.path=$TEXT", "data.tokenizer=$TOKENIZER"]),
    "train.micro_batch_size": ("2", batches, []),
    "train.gradient_accumulation_steps": ("2", deepspeed, []),
    "train.iterations": ("7", learning_rates, []),
    "train.warmup_iterations": ("4", run, []),
    "train.precision": ("fp32", built_model, []),
    "train.loss_scale": ("8", deepspeed, ["train.precision=fp16"]),
    "train.seed": ("1", built_model, []),
    "launch.num_ranks": ("2", run, []),
    "launch.device": ("auto", run, []),
    "launch.timeout_s": ("33", run, []),
    "memory.pinning": ("torch", deepspeed_on_cuda, []),
    "memory.huge_pages": ("false", allocations, []),
    "memory.capacity_gib": ("64", allocations, []),
    "results.dir": ("$TMP/elsewhere", run, []),
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
    return {
        "$TMP": str(tmp_path),
        "$JSON": str(tmp_path / "file.json"),
        "$TEXT": str(tmp_path / "text.txt"),
        "$OTHER_TEXT": str(tmp_path / "other.txt"),
        "$TOKENIZER": str(word_tokenizer("a b c d e f g h")),
        "$OTHER_TOKENIZER": str(word_tokenizer("h a b c d e f g")),
        "$SAVED": str(tmp_path / "saved"),
    }


@pytest.mark.parametrize("key", CHANGES)
def test_changing_a_key_shows(key: str, places: dict[str, str], tmp_path: Path) -> None:
    value, observe, beside = CHANGES[key]

    def overrides(*more: str) -> list[str]:
        lines = [*SMALL, f"results.dir={tmp_path}/results", *beside, *more]
        for name in sorted(places, key=len, reverse=True):
            lines = [line.replace(name, places[name]) for line in lines]
        return lines

    if "$SAVED" in (value, *(line.partition("=")[2] for line in beside)):
        saved = compose(*overrides()[:4], "model.vocab_size=32", "train.seed=5", "offload.stage=0")
        model.build(saved, {}, torch.device("cpu")).save_pretrained(tmp_path / "saved")
    before = compose(*overrides())
    try:
        after = compose(*overrides(f"{key}={value}"))
    except ConfigCompositionException as error:
        # A choice of one value so far: anything else is refused, by its type.
        assert observe is refusal and "expected one of" in str(error.__cause__)
        return
    assert from_dict(json.loads(json.dumps(to_dict(after)))) == after
    assert observe(before) != observe(after)


@pytest.mark.parametrize("observe", dict.fromkeys(entry[1] for entry in CHANGES.values()), ids=lambda o: o.__name__)
def test_nothing_shows_without_a_change(
    observe: Callable[[Config], Any], tmp_path: Path, places: dict[str, str]
) -> None:
    same = [compose(*SMALL, f"results.dir={tmp_path}/results") for _ in range(2)]
    assert observe(same[0]) == observe(same[1])
