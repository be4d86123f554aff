"""Where a key shows: each function gives what a config leads to in one part of ldft."""

from __future__ import annotations

import copy
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from ldft import environment
from ldft.config import Config, Device, run_id, series_id
from ldft.errors import ConfigError
from ldft.memory import placing
from ldft.memory.limits import Free
from ldft.memory.topology import Node, Topology
from ldft.monitor import trace
from ldft.planning import machine, settled
from ldft.preflight import assumed_machine, deepspeed_config, device_inputs, fit, gpu_share, layer_memory, liger
from ldft.preflight.resolved import resolve
from ldft.preflight.selection import select
from ldft.results import store
from ldft.results.history import History
from ldft.runner import checks, dry_run, launch, node_memory, parent, trackers
from ldft.runner.launch import RankExit
from ldft.sweep import cell, plan
from ldft.training import data, model, safetensors_index, schedule
from ldft.training.architecture import hf_config
from ldft.training.checkpointing import checkpointing
from tests.conftest import compose

SMALL = ("model=nano", "model.vocab_size=64", "seq_len.tokens=8", "launch.device=cpu")


def deepspeed(config: Config) -> Any:
    return deepspeed_config.build(config)


def deepspeed_on_cuda(config: Config) -> Any:
    config.launch.device = Device.cuda
    return deepspeed_config.build(config)


def architecture(config: Config) -> Any:
    return hf_config(config.model).to_dict()


def built_model(config: Config) -> Any:
    config.offload.stage = 0
    network = model.build(select(config), torch.device("cpu"))
    return next(network.parameters()).detach().sum().item(), network.dtype


def waiting_inputs(config: Config) -> Any:
    """Bytes that wait in host memory, and how often the first layer runs in one step."""
    config.offload.stage = 0
    network = model.build(select(config), torch.device("cpu"))
    stay = device_inputs.settle(select(config), lambda _: None).device_inputs
    installed = checkpointing.install(config, network, torch.device("cpu"), device_inputs=stay)
    runs: list[int] = []
    network.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    tokens = data.batch(config, 0, 0, 0)
    network(input_ids=tokens, labels=tokens).loss.backward()
    return sum(tensor.nbytes for tensor in installed.host_tensors()) if installed else None, len(runs)


def attention_that_runs(config: Config) -> Any:
    config.offload.stage = 0
    return model.build(select(config), torch.device("cpu")).config._attn_implementation


def ranks_of_a_host(config: Config) -> Any:
    return resolve(config).estimate.num_ranks


def tokens_of_a_rank(config: Config) -> Any:
    return layer_memory.tokens(config)


def mlp_in_tiles(config: Config) -> Any:
    return select(config).mlp_tiles


def uses_liger(config: Config) -> Any:
    config.launch.device = Device.cuda
    return liger.wanted(config)


def overlaps_update(config: Config) -> Any:
    return select(config).overlap_step


def gpu_share_of(config: Config) -> Any:
    return gpu_share.settle(select(config), lambda _: None).gpu_share


def adapters(config: Config) -> Any:
    """Trainable parameters by name, scales and dropout."""
    config.offload.stage = 0
    network = model.build(select(config), torch.device("cpu"))
    layers = [module for module in network.modules() if hasattr(module, "lora_A")]
    sizes = {name: parameter.shape for name, parameter in network.named_parameters() if parameter.requires_grad}
    return sizes, [(layer.scaling, str(layer.lora_dropout)) for layer in layers]


def batches(config: Config) -> Any:
    return [data.batch(config, iteration, 0, 0).tolist() for iteration in range(2)]


def labels(config: Config) -> Any:
    return [data.micro_batch(config, iteration, 0, 0).labels.tolist() for iteration in range(2)]


def learning_rates(config: Config) -> Any:
    return [schedule.factor(config, update) for update in range(config.train.iterations)]


def weights_folder(config: Config) -> Any:
    return str(safetensors_index.folder(config.model, fetch=True))


def loaded_weights(config: Config) -> Any:
    config.offload.stage = 0
    return next(model.build(select(config), torch.device("cpu")).parameters()).detach().sum().item()


class Fake(dict):
    """Stands for the rank processes: notes how they would be started, and ends them well."""

    def __call__(self, folder: Path, num_ranks: int, device: str) -> Fake:
        self.update(folder=str(folder.parents[1]), num_ranks=num_ranks, device=device)
        for rank in range(num_ranks):
            (folder / f"rank-{rank}.json").write_text('{"iteration_s": [1.0, 1.0, 1.0, 1.0, 2.0], "init": {}, '
                                                      '"model_tflop_dense": 1, "model_tflop_attention": 1}')  # fmt: skip
        self.exits = [RankExit(rank, 0, None, 0.0, False) for rank in range(num_ranks)]
        self.pids: list[int] = []
        self.by_rank: dict[int, int] = {}
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


def logged(config: Config) -> Any:
    """The command that hands a row to trackers."""
    commands: list[list[str]] = []

    def noted(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, b"", b"")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", noted)
        trackers.log(config, Path(config.results.dir) / "run" / "attempt-1")
    return commands


def traced(config: Config) -> Any:
    """Whether a run leaves a trace; this process stands for a rank."""
    folder = Path(config.results.dir) / "run" / "attempt-1"
    folder.mkdir(parents=True, exist_ok=True)
    recorder = trace.Recorder(folder, config.monitor.interval_s)
    with recorder.sampling([os.getpid()]):
        pass
    return recorder.write()[0] is not None


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
    return resolve(
        config, topology=Topology(nodes=nodes, gpus={}, weights={}, weights_auto=None, allowed=(0, 1))
    ).placements


def strategy(config: Config) -> Any:
    """Placement by role of two ranks on a machine with two nodes of local memory and two of CXL; or the line that refuses it."""
    config.launch.num_ranks = 2
    nodes = tuple(
        Node(id=id, cpus=(id,) * (id < 2), total_bytes=4 << 30, distances={n: 10 for n in range(4)}) for id in range(4)
    )
    machine = Topology(nodes=nodes, gpus={}, weights={}, weights_auto=None, allowed=(0, 1, 2, 3))
    return resolve(config, topology=machine).placements


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
            fit.check(resolve(config))
        except ConfigError as error:
            return str(error)
    return "runs"


def fitting_the_gpu(config: Config) -> Any:
    """What becomes of a run on GPUs of 80 GiB."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "gpu_memory_gib", lambda: 80.0)
        patch.setattr(fit, "free_memory", lambda capacity: Free(bytes=1 << 40, limit="MemAvailable"))
        try:
            fit.check(resolve(config))
        except ConfigError as error:
            return str(error)
    return "runs"


def machine_of(config: Config) -> Any:
    """Nodes, GPUs and rates of the machine that dry runs and plans see."""
    config.numa.bandwidth = config.numa.bandwidth or assumed_machine.bandwidth(config.machine)
    with assumed_machine.assumed(config):
        gpus = environment.gpus(), environment.compute_capability(), environment.gpu_memory_gib()
        return assumed_machine.topology(config), gpus, fit.available(config).limit, machine_rates(config)


def machine_rates(config: Config) -> Any:
    try:
        return machine.rates(config)
    except ConfigError as error:
        return str(error)


def plan_of(config: Config) -> Any:
    """What a plan chooses."""
    checks.resolve(config)
    return settled.overrides(config)


def printed(config: Config) -> Any:
    return config.dry_run and dry_run.describe(config)
