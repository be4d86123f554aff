"""What the plain training scripts share: their arguments, the model, the timed loop and the file they write. Imports nothing from
ldft.

A script passes its own forward, backward and step to `train`. CONFIG.json is ldft's resolved config (a row's `config_json`): model,
lengths, numbers of iterations. attention: sdpa (torch's choice), sdpa_cudnn, or a name that transformers knows, e.g.
flash_attention_2. One process per GPU (or on the CPU); rank variables as set by torchrun. Rank 0 writes OUT.json atomically, after
every iteration, so that a run that dies leaves its results so far.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

START = time.time()
"""When the script began, before it imports torch: the scripts import this module first."""
for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
    os.environ.setdefault(name, value)
os.environ.setdefault("MASTER_PORT", "29571")

import torch  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Setup:
    """What a script was asked to do, and where it runs."""

    config: dict[str, Any]
    """ldft's resolved config."""
    settings: dict[str, Any]
    """DeepSpeed's config."""
    out: Path
    attention: str
    liger: bool
    checkpointing: str
    device: torch.device

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the computation."""
        return DTYPES[self.config["train"]["precision"]]


def setup(about: str | None, checkpointing: tuple[str, ...]) -> Setup:
    """Read the command line. checkpointing: the ways that the script has; gpu is the default."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for file in ("config", "deepspeed", "out"):
        parser.add_argument(file, type=Path)
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--liger", action="store_true")
    parser.add_argument("--checkpointing", choices=checkpointing, default="gpu")
    options = parser.parse_args()
    config = json.loads(options.config.read_text())
    device = torch.device("cpu")
    if config["launch"]["device"] == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    settings = json.loads(options.deepspeed.read_text())
    return Setup(config, settings, options.out, options.attention, options.liger, options.checkpointing, device)


def build(task: Setup, dtype: torch.dtype, within: AbstractContextManager[Any]) -> PreTrainedModel:
    """The model with weights in `dtype`, made in the context `within`, which says where they lie. Their values are left to
    `initialise`."""
    arch = task.config["model"]
    if task.liger:  # before building the model, as Liger's README says
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

        MODEL_TYPE_TO_APPLY_LIGER_FN[arch["family"]]()
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    hf_config = AutoConfig.for_model(
        arch["family"],
        num_hidden_layers=arch["num_layers"],
        rope_parameters={"rope_type": "default", **arch["rope_scaling"], "rope_theta": arch["rope_theta"]},
        use_cache=False,
        **{key: arch[key] for key in (*sizes, "max_position_embeddings", "tie_word_embeddings")},
        **arch["extra"],
    )
    attention = "sdpa" if task.attention.startswith("sdpa") else task.attention
    with within:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(hf_config, dtype=dtype, attn_implementation=attention)
    return model


def initialise(model: PreTrainedModel, around: Callable[[list[Any]], AbstractContextManager[Any]]) -> None:
    """The family's usual random weights: values affect power draw, and so speed. around: what makes a module's parameters
    writable."""
    for module in model.modules():
        with torch.no_grad(), around(list(module.parameters(recurse=False))):
            model._init_weights(module)


def checkpoint_on_gpu(model: PreTrainedModel) -> None:
    """Let PyTorch recompute every layer in the backward pass; layer inputs stay where they are."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def peak_host_gib() -> float:
    """Peak resident memory, GiB, of this process without file pages."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return (int(fields["VmHWM"].split()[0]) - int(fields["RssFile"].split()[0])) / 2**20


class _Clock:
    """Time stamps in the order of the device's work."""

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda

    def mark(self) -> Any:
        """A time stamp, readable after settling."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def settle(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        torch.distributed.barrier()

    def seconds(self, marks: list[Any]) -> list[float]:
        """Between each time stamp and the next."""
        return [a.elapsed_time(b) / 1e3 if self._cuda else b - a for a, b in itertools.pairwise(marks)]


def _write(task: Setup, samples: dict[str, Any], about: dict[str, Any]) -> None:
    """Collective over all ranks."""
    here = (peak_host_gib(), torch.cuda.max_memory_allocated() / 2**30 if task.cuda else 0.0)
    everywhere = [here] * int(os.environ["WORLD_SIZE"])
    torch.distributed.all_gather_object(everywhere, here)
    if os.environ["RANK"] == "0":
        out = samples | about
        out |= {
            "peak_host_gib": sum(host for host, _ in everywhere),
            "peak_vram_allocated_gib": [vram for _, vram in everywhere] if task.cuda else None,
        }
        task.out.with_suffix(".tmp").write_text(json.dumps(out))
        task.out.with_suffix(".tmp").replace(task.out)


def train(
    task: Setup,
    model: Any,
    forward: Callable[[torch.Tensor], torch.Tensor],
    backward: Callable[[torch.Tensor], Any],
    step: Callable[[bool], Any],
) -> None:
    """The timed iterations, from random tokens.

    forward: the loss of one micro-batch of token ids, [micro-batch, tokens]. step: called after every micro-batch, and told whether
    it is the iteration's last.
    """
    about = {
        "init_s": time.time() - START,
        "linear_weights": sum(
            m.in_features * m.out_features for m in model.modules() if isinstance(m, torch.nn.Linear)
        ),
    }
    train, clock = task.config["train"], _Clock(task.cuda)
    shape = (train["micro_batch_size"], task.config["seq_len"]["tokens"])
    # Ranks that share sequences draw the same ones.
    torch.manual_seed(1 + int(os.environ["RANK"]) // task.settings.get("sequence_parallel_size", 1))
    samples: dict[str, Any] = {name: [] for name in ("iteration_s", "forward_s", "backward_s", "step_s", "loss")}
    # Around everything, since gradient checkpointing recomputes attention in the backward pass.
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if task.attention == "sdpa_cudnn" else nullcontext():
        for _ in range(train["iterations"]):
            batches = [
                torch.randint(task.config["model"]["vocab_size"], shape, device=task.device)
                for _ in range(train["gradient_accumulation_steps"])
            ]
            clock.settle()
            begin = time.perf_counter()
            marks = [clock.mark()]
            for number, tokens in enumerate(batches, 1):
                loss = forward(tokens)
                marks.append(clock.mark())
                backward(loss)
                marks.append(clock.mark())
                step(number == len(batches))
                marks.append(clock.mark())
            clock.settle()
            samples["iteration_s"].append(time.perf_counter() - begin)
            parts = clock.seconds(marks)
            for index, name in enumerate(("forward_s", "backward_s", "step_s")):
                samples[name].append(sum(parts[index::3]))
            samples["loss"].append(float(loss.detach()))
            _write(task, samples, about)


def leave() -> NoReturn:
    """The script's last act: end this process group and this process, without the destructors that run at a usual exit.

    FSDP2 and DeepSpeed keep gloo's groups alive until then, and every second run of two ranks ended with "terminate called without
    an active exception" (torch 2.13, CPU), after all its work.
    """
    torch.distributed.destroy_process_group()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)
