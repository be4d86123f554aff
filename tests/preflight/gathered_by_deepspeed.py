"""One rank that trains one config after the other and prints how many elements of weights DeepSpeed has on the device, and when.

    python tests/preflight/gathered_by_deepspeed.py FOLDER    configs: FOLDER/*.json; rank variables as for a worker

A JSON line a config: file name -> moment -> elements in the third iteration, read from the parameters' own state. The moments are
those of ldft.preflight.deepspeed_gathering.Gathered.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from ldft.config import from_dict
from ldft.preflight.selection import select
from ldft.training import data, model
from ldft.training.checkpointing import checkpointing
from ldft.training.deepspeed import operators


class Watch:
    """What is on the device each time that DeepSpeed has fetched what a module needs."""

    def __init__(self, engine: Any, layers: int) -> None:
        self._parameters = [one for one in engine.module.parameters() if not one.ds_persist]
        self._names = {module: name for name, module in engine.module.named_modules()}
        self._last = f"model.layers.{layers - 1}"
        self.backward = False
        self.most: dict[str, int] = {}

    def fetched(self, module: Any) -> None:
        name = self._names.get(module, "")
        here = [one.ds_numel for one in self._parameters if one.ds_status != ZeroParamStatus.NOT_AVAILABLE]
        if name == "lm_head":
            moment = "loss"
        elif name == "model.embed_tokens" and self.backward:
            moment = "embedding"
        elif name.startswith("model.layers.") and not self.backward:
            moment = "forward"
        elif name.startswith("model.layers."):
            moment = "last_layer" if f"{name}.".startswith(f"{self._last}.") else "other_layers"
        else:
            return
        self.most[moment] = max(self.most.get(moment, 0), sum(here))


def main() -> None:
    folder = Path(sys.argv[1])
    configs = {file.stem: from_dict(json.loads(file.read_text())) for file in sorted(folder.glob("*.json"))}
    operators.load(select(next(iter(configs.values()))), say=lambda text: None)
    deepspeed.init_distributed(
        "gloo", auto_mpi_discovery=False, init_method=f"file://{folder}/store", rank=0, world_size=1, verbose=False
    )
    stock = PartitionedParameterCoordinator.fetch_sub_module
    for name, config in configs.items():
        run = select(config)
        network = model.build(run, torch.device("cpu"))
        checkpointing.install(config, network, torch.device("cpu"))
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        engine, *_ = deepspeed.initialize(model=network, model_parameters=trained, config=run.deepspeed)
        watch = Watch(engine, config.model.num_layers)

        def fetch(coordinator: Any, module: Any, forward: bool, watch: Watch = watch) -> None:
            stock(coordinator, module, forward)
            watch.fetched(module)

        for step in range(3):
            PartitionedParameterCoordinator.fetch_sub_module = fetch if step == 2 else stock
            tokens = data.batch(config, 0, step, 0)
            loss = engine(input_ids=tokens, labels=tokens).loss
            watch.backward = True
            engine.backward(loss)
            watch.backward = False
            engine.step()
        print(f"GATHERED {json.dumps({name: watch.most})}", flush=True)
        engine.destroy()
    os._exit(0)  # gloo's threads may abort at a usual exit


if __name__ == "__main__":
    main()
