"""The peer: a plain training script around stock DeepSpeed, as its tutorials have it. Imports nothing of ldft.

    python benchmarks/plain_deepspeed.py CONFIG.json DEEPSPEED.json OUT.json

CONFIG.json and DEEPSPEED.json are a row's `config_json` and `deepspeed_config_json`, so that both have the same settings.
One process a GPU (or one on the CPU); rank variables as torchrun sets them. Rank 0 writes OUT.json.
"""

import json
import os
import sys
import time
from pathlib import Path

for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
    os.environ.setdefault(name, value)
os.environ.setdefault("MASTER_PORT", "29571")

start = time.time()
import deepspeed  # noqa: E402
import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

config = json.loads(Path(sys.argv[1]).read_text())
settings = json.loads(Path(sys.argv[2]).read_text())
cuda = config["launch"]["device"] == "cuda"
rank = int(os.environ["RANK"])
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
if cuda:
    torch.cuda.set_device(device)
deepspeed.init_distributed("nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False)

arch = config["model"]
hf_config = AutoConfig.for_model(
    arch["family"],
    num_hidden_layers=arch["num_layers"],
    rope_parameters={"rope_type": "default", **arch["rope_scaling"], "rope_theta": arch["rope_theta"]},
    use_cache=False,
    **{
        key: arch[key]
        for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    },
    **{key: arch[key] for key in ("vocab_size", "max_position_embeddings", "tie_word_embeddings")},
    **arch["extra"],
)
dtype = torch.bfloat16 if config["train"]["precision"] == "bf16" else torch.float32
partitioned = settings["zero_optimization"]["stage"] == 3
with deepspeed.zero.Init(config_dict_or_path=settings) if partitioned else device:
    model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype, attn_implementation="sdpa")
for module in model.modules():  # the family's usual random weights: speed depends on the numbers, by way of power
    mine = list(module.parameters(recurse=False))
    with deepspeed.zero.GatheredParameters(mine, modifier_rank=0) if partitioned and mine else torch.no_grad():
        model._init_weights(module)
if config["checkpointing"]["mode"] == "gpu":
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
model.train()
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
init_s = time.time() - start

train = config["train"]
shape = (train["micro_batch_size"], config["seq_len"]["tokens"])
torch.manual_seed(1 + rank)
times, steps, losses = [], [], []
for _ in range(train["iterations"]):
    batches = [
        torch.randint(arch["vocab_size"], shape, device=device) for _ in range(train["gradient_accumulation_steps"])
    ]
    torch.distributed.barrier()
    if cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for tokens in batches:
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        step_begin = time.perf_counter()
        engine.step()
        step_s = time.perf_counter() - step_begin
    if cuda:
        torch.cuda.synchronize()
    torch.distributed.barrier()
    times.append(time.perf_counter() - begin)
    steps.append(step_s)
    losses.append(float(loss))
if rank == 0:
    vram = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    out = {"iteration_s": times, "step_s": steps, "loss": losses, "init_s": init_s, "peak_vram_allocated_gib": vram}
    Path(sys.argv[3]).write_text(json.dumps(out))
engine.destroy()
torch.distributed.destroy_process_group()
