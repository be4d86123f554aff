"""Run rank processes without the parent, so that a test can put something in their way first.

    python tests/training/alone.py ATTEMPT_DIR stock|skip_step|local_gradients|liger|frozen

stock: stock DeepSpeed called directly, with the weights and tokens of the config and DeepSpeed's own sizes of buckets and
live parameters; writes rank-0.json as a worker does.
liger: the real worker with Liger's fused loss, which Triton's interpreter can run on a CPU.
frozen: the real worker, which afterwards compares the weights with those before, and counts what the optimizer holds.
skip_step, local_gradients: the real worker with a planted fault: the fourth update does nothing; gradients are not averaged.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def stock(folder: Path) -> None:
    import deepspeed
    import torch

    from ldft.config import from_dict
    from ldft.preflight import deepspeed_config, zero_buckets
    from ldft.preflight.selection import select
    from ldft.training import data, model
    from ldft.training.deepspeed import operators

    config = from_dict(json.loads((folder / "config.json").read_text()))
    config.optimizer.fused_step = False
    operators.load(select(config), say=print)
    settings = deepspeed_config.build(config)
    for name in zero_buckets.sizes(config):
        del settings["zero_optimization"][name]
    deepspeed.init_distributed(
        "gloo", auto_mpi_discovery=False, init_method=f"file://{folder}/store", rank=0, world_size=1
    )
    network = model.build(select(config, deepspeed=settings), torch.device("cpu"))
    engine, *_ = deepspeed.initialize(model=network, model_parameters=network.parameters(), config=settings)
    losses = []
    for iteration in range(config.train.iterations):
        tokens = data.batch(config, iteration, 0, 0)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    (folder / "rank-0.json").write_text(json.dumps({"loss": losses}))


def skip_step() -> None:
    from ldft.training.optimizers.host_optimizer import HostOptimizer

    real, calls = HostOptimizer.tasks, []

    def tasks(self: Any, *arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return [] if len(calls) == 4 else real(self, *arguments, **named)

    HostOptimizer.tasks = tasks  # type: ignore[method-assign]  # the planted fault


def local_gradients() -> None:
    import torch.distributed as dist

    def keep_mine(output: Any, entries: Any, *arguments: Any, **named: Any) -> None:
        output.copy_(entries.view(-1).chunk(dist.get_world_size())[dist.get_rank()].view_as(output))

    for name in ("reduce_scatter_tensor", "reduce_scatter_single"):
        if hasattr(dist, name):
            setattr(dist, name, keep_mine)


def use_liger() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    from ldft.training import liger_kernels, model

    real = model.build

    def build(*arguments: Any, **named: Any) -> Any:
        network = real(*arguments, **named)
        liger_kernels.bind_loss(network)
        return network

    model.build = build


def frozen() -> None:
    import deepspeed
    import torch

    from ldft.training import loop

    def weights(engine: Any) -> dict[str, torch.Tensor]:
        found = {}
        for name, parameter in engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters(parameter):
                found[name] = parameter.detach().clone()
        return found

    real = loop.run

    def run(config: Any, engine: Any, *others: Any, **named: Any) -> Any:
        before = weights(engine)
        samples = real(config, engine, *others, **named)
        after = weights(engine)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        trained = {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
        assert changed == trained and trained and all(".lora_" in name for name in trained), changed ^ trained
        numbers = sum(before[name].numel() for name in trained)
        optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
        states = [state["exp_avg"].numel() for state in optimizer.state.values() if "exp_avg" in state]
        assert numbers <= sum(states) < 1.01 * numbers + 1000, (numbers, states)  # ZeRO pads
        return samples

    loop.run = run


if __name__ == "__main__":
    if sys.argv[2] == "stock":
        stock(Path(sys.argv[1]))
    else:
        {"skip_step": skip_step, "local_gradients": local_gradients, "liger": use_liger, "frozen": frozen}[
            sys.argv[2]
        ]()
        from ldft.runner import worker

        os.environ["PYTHONUNBUFFERED"] = "1"
        sys.exit(worker.main())
