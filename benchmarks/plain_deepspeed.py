"""The peer: a plain training script with stock DeepSpeed, as in its tutorials. Imports nothing from ldft.

    python benchmarks/plain_deepspeed.py CONFIG.json DEEPSPEED.json OUT.json [--attention A] [--liger] [--checkpointing C]

CONFIG.json is ldft's resolved config (a row's `config_json`): model, lengths, numbers of iterations. DEEPSPEED.json is the config
for `deepspeed.initialize`. attention: sdpa (torch's choice), sdpa_cudnn, or a name that transformers knows, e.g.
flash_attention_2. checkpointing: none, gpu (PyTorch's), seed (benchmarks/seed_checkpointing.py).
One process per GPU (or on the CPU); rank variables as set by torchrun. Rank 0 writes OUT.json atomically.
"""

import argparse
import itertools
import json
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
    os.environ.setdefault(name, value)
os.environ.setdefault("MASTER_PORT", "29571")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name in ("config", "deepspeed", "out"):
    parser.add_argument(name, type=Path)
parser.add_argument("--attention", default="sdpa")
parser.add_argument("--liger", action="store_true")
parser.add_argument("--checkpointing", choices=("none", "gpu", "seed"), default="gpu")
options = parser.parse_args()

start = time.time()
import deepspeed  # noqa: E402
import torch  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

config = json.loads(options.config.read_text())
settings = json.loads(options.deepspeed.read_text())
cuda = config["launch"]["device"] == "cuda"
rank = int(os.environ["RANK"])
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
if cuda:
    torch.cuda.set_device(device)
deepspeed.init_distributed("nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False)

arch = config["model"]
if options.liger:  # before building the model, as Liger's README says
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    MODEL_TYPE_TO_APPLY_LIGER_FN[arch["family"]]()
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
dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config["train"]["precision"]]
attention = "sdpa" if options.attention.startswith("sdpa") else options.attention
partitioned = settings["zero_optimization"]["stage"] == 3
with deepspeed.zero.Init(config_dict_or_path=settings) if partitioned else device:
    model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype, attn_implementation=attention)
for module in model.modules():  # the family's usual random weights: values affect power draw, and so speed
    mine = list(module.parameters(recurse=False))
    with deepspeed.zero.GatheredParameters(mine, modifier_rank=0) if partitioned and mine else torch.no_grad():
        model._init_weights(module)
if options.checkpointing == "gpu":
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
model.train()
if options.checkpointing == "seed":
    import seed_checkpointing

    seed_checkpointing.install(model, config["train"]["micro_batch_size"] * config["seq_len"]["tokens"], dtype)
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
init_s = time.time() - start


def mark() -> Any:
    """A time stamp in the order of the device's work; readable after synchronising."""
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def settle() -> None:
    if cuda:
        torch.cuda.synchronize()
    torch.distributed.barrier()


def peak_host_gib() -> float:
    """Peak resident memory, GiB, of this process without file pages."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return (int(fields["VmHWM"].split()[0]) - int(fields["RssFile"].split()[0])) / 2**20


def write(samples: dict[str, Any]) -> None:
    """Collective over all ranks; called after every iteration, so that a run that dies leaves its results so far."""
    here = (peak_host_gib(), torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0)
    everywhere = [here] * int(os.environ["WORLD_SIZE"])
    torch.distributed.all_gather_object(everywhere, here)
    if rank == 0:
        out = samples | {
            "init_s": init_s,
            "peak_host_gib": sum(host for host, _ in everywhere),
            "peak_vram_allocated_gib": [vram for _, vram in everywhere] if cuda else None,
            "linear_weights": sum(
                m.in_features * m.out_features for m in model.modules() if isinstance(m, torch.nn.Linear)
            ),
        }
        options.out.with_suffix(".tmp").write_text(json.dumps(out))
        options.out.with_suffix(".tmp").replace(options.out)


train = config["train"]
shape = (train["micro_batch_size"], config["seq_len"]["tokens"])
torch.manual_seed(1 + rank)
samples: dict[str, Any] = {name: [] for name in ("iteration_s", "forward_s", "backward_s", "step_s", "loss")}
# Around everything, since gradient checkpointing recomputes attention in the backward pass.
with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if options.attention == "sdpa_cudnn" else nullcontext():
    for _ in range(train["iterations"]):
        batches = [
            torch.randint(arch["vocab_size"], shape, device=device) for _ in range(train["gradient_accumulation_steps"])
        ]
        settle()
        begin = time.perf_counter()
        marks = [mark()]
        for tokens in batches:
            loss = engine(input_ids=tokens, labels=tokens).loss
            marks.append(mark())
            engine.backward(loss)
            marks.append(mark())
            engine.step()
            marks.append(mark())
        settle()
        samples["iteration_s"].append(time.perf_counter() - begin)
        parts = [a.elapsed_time(b) / 1e3 if cuda else b - a for a, b in itertools.pairwise(marks)]
        for index, name in enumerate(("forward_s", "backward_s", "step_s")):
            samples[name].append(sum(parts[index::3]))
        samples["loss"].append(float(loss))
        write(samples)
engine.destroy()
torch.distributed.destroy_process_group()
