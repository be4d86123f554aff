"""The peer: a plain training script with stock DeepSpeed, as in its tutorials. Imports nothing from ldft.

    python benchmarks/plain_deepspeed.py CONFIG.json DEEPSPEED.json OUT.json [--attention A] [--liger] [--checkpointing C]

DEEPSPEED.json is the config for `deepspeed.initialize`; benchmarks/plain_common.py says what the rest is. checkpointing: none, gpu
(PyTorch's), seed (benchmarks/seed_checkpointing.py), deepspeed (DeepSpeed's own function, as `activation_checkpointing` in
DEEPSPEED.json says; with `cpu_checkpointing`, release 0.19.8 copies layer inputs on a stream of its own; needs a GPU), alst (the
same, and DeepSpeed's TiledMLP in as many tiles as its example: tokens by hidden size).
"""

import math
from contextlib import nullcontext
from functools import partial

import plain_common  # first: the time of the start, and the rank variables

# isort: split

import deepspeed
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

task = plain_common.setup(__doc__, ("none", "gpu", "seed", "deepspeed", "alst"))
deepspeed.init_distributed("nccl" if task.cuda else "gloo", auto_mpi_discovery=False, verbose=False)
partitioned = task.settings["zero_optimization"]["stage"] == 3
where = deepspeed.zero.Init(config_dict_or_path=task.settings) if partitioned else task.device
model = plain_common.build(task, task.dtype, where)
gathered = partial(deepspeed.zero.GatheredParameters, modifier_rank=0)
plain_common.initialise(model, lambda mine: gathered(mine) if partitioned and mine else nullcontext())
if task.checkpointing == "gpu":
    plain_common.checkpoint_on_gpu(model)
model.train()
if task.checkpointing == "seed":
    import seed_checkpointing

    tokens = task.config["train"]["micro_batch_size"] * task.config["seq_len"]["tokens"]
    seed_checkpointing.install(model, tokens, task.dtype)
if task.checkpointing == "alst":
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            mlp = layer.mlp
            weights = [mlp.down_proj.weight, mlp.gate_proj.weight, mlp.up_proj.weight]
            whole = mlp.forward
            mlp.forward = lambda states, mlp=mlp, whole=whole, weights=weights: TiledMLP.apply(
                lambda _, tile: whole(tile), mlp, states, math.ceil(states.shape[-2] / states.shape[-1]), weights
            )
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=task.settings)
if task.checkpointing in ("deepspeed", "alst"):
    # `deepspeed.initialize` does not do this: the model's own code must call the function.
    deepspeed.checkpointing.configure(None, deepspeed_config=task.settings)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module._gradient_checkpointing_func = deepspeed.checkpointing.checkpoint
            module.gradient_checkpointing = True

plain_common.train(
    task,
    model,
    forward=lambda tokens: engine(input_ids=tokens, labels=tokens).loss,
    backward=engine.backward,
    step=lambda last: engine.step(),
)
engine.destroy()
torch.distributed.destroy_process_group()
