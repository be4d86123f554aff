"""The peer without DeepSpeed: a plain training script with torch's FSDP2, as in its tutorial. Imports nothing from ldft.

    python benchmarks/plain_fsdp2.py CONFIG.json DEEPSPEED.json OUT.json [--attention A] [--liger] [--checkpointing C]

Read from DEEPSPEED.json: optimizer, gradient_clipping, and whether zero_optimization offloads the optimizer; then all states,
gradients and fp32 weights are in pinned host memory (CPUOffloadPolicy) and torch's fused AdamW updates them there. One group per
decoder layer, computation and reduction in train.precision, which is bf16 or fp32. checkpointing: none or gpu (PyTorch's).
benchmarks/plain_common.py says what the rest is.
"""

import os
from contextlib import nullcontext

import plain_common  # first: the time of the start, and the rank variables

# isort: split

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

task = plain_common.setup(__doc__, ("none", "gpu"))
if task.dtype is torch.float16 or task.settings["optimizer"]["type"] != "AdamW":
    raise SystemExit("plain_fsdp2.py trains in bf16 or fp32, with AdamW")
# With offloading, gradients are in host memory, and so their norms are reduced there.
torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if task.cuda else "gloo")
mesh = init_device_mesh(task.device.type, (int(os.environ["WORLD_SIZE"]),))
torch.manual_seed(1)  # FSDP2 takes each rank's part from the rank's own weights
model = plain_common.build(task, torch.float32, task.device)
plain_common.initialise(model, lambda parameters: nullcontext())
if task.checkpointing == "gpu":
    plain_common.checkpoint_on_gpu(model)
model.train()
precision = MixedPrecisionPolicy(param_dtype=task.dtype)
offloaded = task.settings["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
offload = CPUOffloadPolicy(pin_memory=task.cuda) if offloaded else OffloadPolicy()
layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
for module in (*layers, model):
    fully_shard(module, mesh=mesh, mp_policy=precision, offload_policy=offload)
if task.cuda:  # the model was initialised on the GPU, which no training needs
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
given = {name: task.settings["optimizer"]["params"][name] for name in ("lr", "betas", "eps", "weight_decay")}
optimizer = torch.optim.AdamW(model.parameters(), **given, fused=True)
clipping = task.settings["gradient_clipping"]
accumulated = task.config["train"]["gradient_accumulation_steps"]


def step(last: bool) -> None:
    if not last:
        return
    if clipping:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clipping)
    optimizer.step()
    optimizer.zero_grad()


plain_common.train(
    task,
    model,
    forward=lambda tokens: model(input_ids=tokens, labels=tokens).loss,
    backward=lambda loss: (loss / accumulated).backward(),
    step=step,
)
plain_common.leave()
