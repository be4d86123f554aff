"""The peer: a plain training script with stock DeepSpeed, as in its tutorials. Imports nothing from ldft.

    python benchmarks/plain_deepspeed.py CONFIG.json DEEPSPEED.json OUT.json [--attention A] [--liger] [--checkpointing C]

DEEPSPEED.json is the config for `deepspeed.initialize`; benchmarks/plain_common.py says what the rest is. checkpointing: none, gpu
(PyTorch's), seed (benchmarks/seed_checkpointing.py), deepspeed (DeepSpeed's own function, as `activation_checkpointing` in
DEEPSPEED.json says; with `cpu_checkpointing`, release 0.19.8 copies layer inputs on a stream of its own; needs a GPU), alst (the
same, and DeepSpeed's TiledMLP in as many tiles as its example: tokens by hidden size). With a `sequence_parallel_size` in
DEEPSPEED.json, ranks share sequences as in DeepSpeed's tutorial on Ulysses.
"""

import math
from contextlib import nullcontext
from functools import partial

import plain_common  # first: the time of the start, and the rank variables

# isort: split

import deepspeed
import torch
import torch.distributed.nn.functional
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
sharing, length = task.settings.get("sequence_parallel_size", 1), task.config["seq_len"]["tokens"]
mpu = None
if sharing > 1:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model,
        core_attn_implementation=model.config._attn_implementation,
        sequence_parallel_size=sharing,
        micro_batch_size=task.config["train"]["micro_batch_size"],
        seq_length=length,
        seq_length_is_variable=False,
    )
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=task.settings, mpu=mpu)
if task.checkpointing in ("deepspeed", "alst"):
    # `deepspeed.initialize` does not do this: the model's own code must call the function.
    deepspeed.checkpointing.configure(None, deepspeed_config=task.settings)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module._gradient_checkpointing_func = deepspeed.checkpointing.checkpoint
            module.gradient_checkpointing = True


def forward(tokens: torch.Tensor) -> torch.Tensor:
    """The loss of whole sequences, or, as in the tutorial, of this rank's part, weighted with its tokens."""
    if mpu is None:
        whole_loss: torch.Tensor = engine(input_ids=tokens, labels=tokens).loss
        return whole_loss
    part = length // sharing
    mine = slice(mpu.get_sequence_parallel_rank() * part, (mpu.get_sequence_parallel_rank() + 1) * part)
    positions = torch.arange(length, device=tokens.device).expand_as(tokens)[:, mine]
    labels = torch.nn.functional.pad(tokens, (0, 1), value=-100)[:, 1:][:, mine].contiguous()
    loss = engine(input_ids=tokens[:, mine], position_ids=positions, labels=tokens[:, mine], shift_labels=labels).loss
    group = mpu.get_sequence_parallel_group()
    losses = torch.distributed.nn.functional.all_gather(loss, group=group)
    counts = torch.distributed.nn.functional.all_gather((labels != -100).sum(), group=group)
    total: torch.Tensor = torch.stack([one * count for one, count in zip(losses, counts, strict=True)]).sum()
    return total / torch.stack([*counts]).sum()


plain_common.train(
    task,
    model,
    forward=forward,
    backward=engine.backward,
    step=lambda last: engine.step(),
)
engine.destroy()
plain_common.leave()
