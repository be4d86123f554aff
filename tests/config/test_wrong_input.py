"""Wrong input: one line on stderr with the key, the value, what is allowed and the fix; exit code 2; no traceback."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.config.conftest import CLI


@pytest.fixture
def files(tmp_path: Path, word_tokenizer: Callable[..., Path]) -> str:
    """A folder of broken and good things."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "broken.json").write_text('{"steps_per_print": 10,\n "bf16": }')
    (folder / "twice.json").write_text('{"steps_per_print": 10, "steps_per_print": 11}')
    (folder / "list.json").write_text("[]")
    (folder / "other_clip.json").write_text('{"gradient_clipping": 1.0}')
    (folder / "good.txt").write_text("a b c")
    (folder / "empty.txt").write_text(" \n \n")
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "keyless.jsonl").write_text('{"content": "a"}\n')
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "fake.parquet").write_text("not parquet")
    pq.write_table(pa.table({"content": ["a"]}), folder / "content.parquet")
    word_tokenizer(" ".join(f"w{number}" for number in range(70))).rename(folder / "tokenizer")
    word_tokenizer("a b c").rename(folder / "small_tokenizer")
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    for name, data in (("cut", b"\0" * 9), ("sharded", b"\0" * 16)):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    (folder / "sharded" / "model.safetensors.index.json").write_text(
        '{"weight_map": {"w": "model-00001-of-00002.safetensors"}}'
    )
    (folder / "bare").mkdir()
    return str(folder)


TEXT = "data=text data.path=$F/good.txt data.tokenizer=$F/small_tokenizer"
# What is typed -> what the line must say, in this order.
WRONG = {
    # composition: an option, a key or a type
    "model=foo": ["model: 'foo' does not exist", "use one of from_hf, gemma2_9b", "tiny"],
    "model=lama3_8b": ["model: 'lama3_8b'", "did you mean model=llama3_8b?"],
    "numa=weighted": ["numa: 'weighted' does not exist", "default"],
    "sweep=smoke": ["sweep: 'smoke' is not in the defaults list, so it needs a plus sign; use +sweep=smoke"],
    "-m sweep=smoke": ["sweep: 'smoke' is not in the defaults list, so it needs a plus sign; use +sweep=smoke"],
    "-m +sweep=smok": ["sweep: 'smok' does not exist; did you mean +sweep=smoke?"],
    "model.layres=2": ["model.layres: no such key (value 2); did you mean model.num_layers?"],
    "train.iteration=7": ["train.iteration: no such key (value 7); did you mean train.iterations?"],
    "numa_policy=bind_0": ["numa_policy: no such key; use numa=bind_0"],
    "batch_size=4": ["batch_size: no such key", "train.micro_batch_size"],
    "learning_rate=4": ["learning_rate: no such key", "optimizer.learning_rate"],
    "offload.stag=2": ["offload.stag: no such key", "offload.stage"],
    "+nonsense=1": ["nonsense: no such key", "groups and keys: model, offload"],
    "seq_len=4096": ["seq_len: 4096 is not an option; use seq_len=4k or seq_len.tokens=4096"],
    "seq_len=5000": ["seq_len: 5000 is not an option; use seq_len.tokens=5000", "1k, 2k, 4k"],
    "seq_len.tokens=4k": ["seq_len.tokens: '4k'", "a whole number"],
    "seq_len.tokens=512,1024": ["seq_len.tokens: several values (512,1024)", "-m"],
    "launch.num_ranks=1.5": ["launch.num_ranks: '1.5'", "a whole number"],
    "train.precision=fp8": ["train.precision: 'fp8'", "one of auto, bf16, fp16, fp32"],
    "optimizer.schedule=cosin": ["optimizer.schedule: 'cosin'", "one of constant, linear, cosine"],
    "optimizer.betas=0.9": ["optimizer.betas: '0.9'", "a list of numbers", "[0.9,0.95]"],
    "numa.roles.momentum.nodes=0": ["numa.roles.momentum.nodes: '0'", "a list of whole numbers", "nodes=[0,1]"],
    "numa.roles.momentum.nodes=[a]": ["numa.roles.momentum.nodes[0]: '[a]'", "whole numbers, as in", "nodes=[0,1]"],
    "numa.roles.momentum={nodes:[0],kind:foo}": ["numa.roles.momentum.kind: 'foo'", "one of default, bind"],
    "numa.bandwidth=fast numa=local_only": ["numa.bandwidth: 'fast'", "keys and values"],
    "model.tie_word_embeddings=maybe": ["model.tie_word_embeddings: 'maybe'", "true or false"],
    "model.num_layers=null": ["model.num_layers: 'null'", "a whole number"],
    "offload.deepspeed=3": ["offload.deepspeed: '3'", "keys and values"],
    "train=3": ["train: '3'", "a key below it, of micro_batch_size"],
    "model": ["model: not of the form key=value"],
    "model=nano -m sweep.budget=-1": ["sweep.budget: -1 is negative"],
    "model=nano -m sweep.repeats=-1": ["sweep.repeats: -1"],
    "model=nano --multi-run": ["command line: there is no option --multi-run; see python -m ldft --help"],
    "--cfg=nothing model=nano": ["command line: argument --cfg/-c: invalid choice: 'nothing'"],
    "=3": ["command line: '=3' has no key"],
    "system={": ["system: cannot read {", "quote"],
    "system=${nowhere}": ["system: Interpolation key 'nowhere' not found", "name a key that exists"],
    # values and combinations
    "train.iterations=2": ["train.warmup_iterations: 2 leaves none of train.iterations=2", "fewer warm-up iterations"],
    "seq_len.tokens=0": ["seq_len.tokens: 0 is too short", "2 or more"],
    "optimizer.learning_rate=-1e-4": ["optimizer.learning_rate: -0.0001 is not positive", "above 0"],
    "optimizer.learning_rate=inf": ["optimizer.learning_rate: inf is not finite", "use a number"],
    "optimizer.weight_decay=nan": ["optimizer.weight_decay: nan is not finite"],
    "optimizer.eps=inf": ["optimizer.eps: inf is not finite"],
    "optimizer.gradient_clipping=inf": ["optimizer.gradient_clipping: inf is not finite"],
    "memory.capacity_gib=inf": ["memory.capacity_gib: inf is not finite"],
    "optimizer.betas=[0.9]": ["optimizer.betas: [0.9] is not two numbers", "[0.9,0.95]"],
    "model=gemma3_1b model.num_layers=10001": ["model.num_layers: 10001 is too large; use at most 10000"],
    "plan.keep=[checkpoint]": ["plan.keep: 'checkpoint' is no group and no key", "checkpointing.layers"],
    "launch.num_ranks=0": ["launch.num_ranks: 0 is too small", "1 or more"],
    "model.num_key_value_heads=3": ["model.num_key_value_heads: 3 does not divide", "use a divisor"],
    "model.family=lama": ["model.family: transformers has no causal language model 'lama'; did you mean", "llama"],
    "model.family=clip": ["model.family: transformers has no causal language model 'clip'; "],
    "model.hidden_size=66": [
        "model.hidden_size: 66 is not a multiple of model.num_attention_heads=8, as transformers' llama",
        "use e.g. 64",
    ],
    "model=tiny model.hidden_size=3 dry_run=true": ["model.hidden_size: 3 is not a multiple", "use e.g. "],
    "model.head_dim=15 dry_run=true": ["model.head_dim: 15 is odd", "use an even number"],
    "offload.stage=2": ["offload.parameters: cpu needs offload.stage=3, not 2", "use none"],
    "offload.stage=4 offload.parameters=none": ["offload.stage: 4 does not exist; use 0, 1, 2 or 3"],
    "model=tiny checkpointing.every=0": ["checkpointing.every: 0", "use 1 to"],
    "model=nano checkpointing.every=3": ["checkpointing.every: 3: the model has 2 layers; use 1 to 2"],
    "model=nano checkpointing.layers=3": ["checkpointing.layers: 3: the model has 2 layers; use 0 to 2, or -1 for all"],
    "checkpointing=none checkpointing.layers=2": ["checkpointing.layers: 2 needs checkpointing=cpu or gpu", "at -1"],
    "checkpointing.layers=0 checkpointing.keep_attention=host": [
        "checkpointing.keep_attention: host needs checkpointed layers",
        "use none",
    ],
    "attention=eager checkpointing.keep_attention=device": [
        "checkpointing.keep_attention: device: the output of eager attention cannot be kept",
        "an attention of sdpa, sdpa_cudnn, flash_attention_2",
    ],
    "checkpointing=none checkpointing.every=2": [
        "checkpointing.every: 2 needs checkpointing=cpu or gpu",
        "leave it at 1",
    ],
    "offload=nvme": ["offload.nvme_path: empty; name a folder on a fast local disk"],
    "offload.nvme_path=$F": ["offload.nvme_path: '", "is not used", "use offload=nvme or leave it out"],
    "offload=nvme offload.nvme_path=$F/good.txt": ["offload.nvme_path: cannot create", "good.txt", "local disk"],
    "offload=nvme offload.nvme_path=/proc/nowhere": ["offload.nvme_path: cannot create /proc/nowhere"],
    "offload=nvme offload.nvme_path=$F model=llama3_70b model.num_layers=8000": [
        "offload.nvme_path: swap files take 1",
        "GiB left; free space",
    ],
    "offload=optimizer offload.optimizer=nvme offload.nvme_path=$F": [
        "offload.optimizer: nvme needs offload.stage=3, not 2"
    ],
    "offload=super_offload": ["offload: super_offload needs launch.device=cuda, not cpu; use full"],
    "offload=zenflow": ["offload: zenflow needs launch.device=cuda, not cpu; use full"],
    "offload=super_offload optimizer=lion": ["optimizer: lion: offload=super_offload supports adamw only"],
    "optimizer.fused_step=true offload=none": ["optimizer.fused_step: true: works in host memory only", "use false"],
    "optimizer.fused_step=true offload=nvme offload.nvme_path=$F": [
        "optimizer.fused_step: true: works in host memory only"
    ],
    "optimizer.fused_step=true offload.deepspeed.zero_optimization.offload_optimizer.ratio=0.5": [
        "optimizer.fused_step: true: with a ratio of 0.5",
        "leave it at null",
    ],
    "optimizer.fused_step=true offload.deepspeed.optimizer.params.adam_w_mode=false": [
        "optimizer.fused_step: true: does not support adam_w_mode"
    ],
    "optimizer.fused_step=true offload.deepspeed.torch_autocast.enabled=true": [
        "optimizer.fused_step: true: torch_autocast scales gradients"
    ],
    "optimizer.fused_step=true offload.deepspeed.zero_force_ds_cpu_optimizer=true": [
        "optimizer.fused_step: true: offload.deepspeed has zero_force_ds_cpu_optimizer"
    ],
    "optimizer.name=sgd": ["optimizer.name: 'sgd' does not exist; use adamw or lion"],
    "train.loss_scale=8 train.precision=bf16": ["train.loss_scale: 8 has no effect with train.precision=bf16", "fp16"],
    "train.precision=fp16 launch.device=cpu": ["train.precision: fp16 needs launch.device=cuda", "bf16 or fp32"],
    "monitor.interval_s=-1": ["monitor.interval_s: -1 is too short", "use 0.05 seconds or more, or 0 for no trace"],
    "monitor.interval_s=1e300": ["monitor.interval_s: 1e+300 is too large; use at most 31622400 seconds (a year)"],
    "launch.timeout_s=1e300": ["launch.timeout_s: 1e+300 is too large; use at most 31622400 seconds (a year)"],
    "memory.capacity_gib=1e300": ["memory.capacity_gib: 1e+300 is too large; use at most 1048576 GiB"],
    "dry_run=true launch.device=cuda memory.vram_gib=80 memory.capacity_gib=1e300": [
        "memory.capacity_gib: 1e+300 is too large"
    ],
    "dry_run=true launch.device=cuda memory.vram_gib=1e300": ["memory.vram_gib: 1e+300 is too large"],
    "numa.cxl_budget_gib=2e6": ["numa.cxl_budget_gib: 2e+06 is too large; use at most 1048576 GiB"],
    "dry_run=true machine=h200 machine.host_gib=1e300": [
        "machine.host_gib: 1e+300 is too large; use at most 1048576 GiB"
    ],
    "dry_run=true machine=h200 machine.link_gb_per_s=1e300": [
        "machine.link_gb_per_s: 1e+300 is too large",
        "1000000 GB/s",
    ],
    "dry_run=true machine=h200 machine.cores=1000000000": ["machine.cores: 1000000000 is too large; use at most 65536"],
    "dry_run=true machine=h200 machine.gpus=100000": ["machine.gpus: 100000 is too large; use at most 1024"],
    "dry_run=true machine=h200 machine.capability=[]": ["machine.capability: [] is not a compute capability", "[9,0]"],
    "numa.bandwidth={node0:{cpu:1e300}}": [
        "numa.bandwidth: node0.cpu: 1e+300; write cpu, h2d and d2h above 0 and up to 1000000"
    ],
    "monitor.interval_s=0.01": ["monitor.interval_s: 0.01 is too short"],
    "monitor.intervall_s=1": ["monitor.intervall_s", "interval_s"],
    "memory.capacity_gib=-1": ["memory.capacity_gib: -1 is negative", "above 0"],
    "numa=roles_0_3 memory.pinning=torch": [
        "memory.pinning: torch's allocator decides where tensors go",
        "exact or none",
    ],
    "numa.roles.momentum.nodes=[0] memory.pinning=torch": [
        "memory.pinning: torch's allocator decides where tensors go"
    ],
    "numa.roles.momentum.nodes=[0,99]": ["numa.roles.momentum.nodes: node 99 does not exist", "choose from those"],
    "numa.roles.momentum.kind=bind": ["numa.roles.momentum.nodes: kind bind needs at least one node"],
    "numa.roles.variance.nodes=[0] numa.roles.variance.weights=[1,2]": [
        "numa.roles.variance.weights: 2 weights for 1 node (0)"
    ],
    "numa.roles.momentum.nodes=[0] offload=nvme offload.nvme_path=$F": [
        "numa.scope: roles cannot be placed with nvme",
        "use a policy of scope process",
    ],
    "numa.roles.moments.nodes=[0]": ["numa.roles.moments: no such key", "did you mean numa.roles.momentum?"],
    "numa.roles.momentum.weights=[2]": [
        "numa.roles.momentum.weights: [2] without nodes; add numa.roles.momentum.nodes"
    ],
    "numa.local_budget_gib=-1": ["numa.local_budget_gib: -1 is negative", "use 0 for all available memory"],
    "numa.local_nodes=[0] numa.cxl_nodes=[0]": ["numa.cxl_nodes: node 0 is also in numa.local_nodes"],
    "numa=local_only numa.local_nodes=[99]": ["numa.local_nodes: node 99 does not exist", "choose from those"],
    "numa=local_only memory.pinning=torch": [
        "memory.pinning: torch's allocator decides where tensors go",
        "exact or none",
    ],
    "numa.bandwidth={node0:{cpu:fast}}": ["numa.bandwidth: node0.cpu: 'fast'", "{cpu:278,h2d:55,d2h:55}", "GB/s"],
    "numa.bandwidth={socket0:{cpu:1}}": ["numa.bandwidth: socket0:", "is not a node entry"],
    "numa.bandwidth={node0:{h2d:55}}": ["numa.bandwidth: node0 has no cpu"],
    "model=llama3_70b": [
        "force: false, and not enough host memory",
        "GiB expected",
        "largest: ",
        "or force=true",
    ],
    "memory.capacity_gib=0.1": [
        "force: false, and not enough host memory",
        "0.1 GiB free by memory.capacity_gib (largest:",
        "or force",
    ],
    "seq_len.tokens=999999999": [
        "GiB expected",
        "largest: device part",
        "use a shorter seq_len or a smaller train.micro",
    ],
    "numa=[0,1]": ["numa: [0,1] is a list, and a group takes one option", "use numa=<option>, or -m numa=a,b"],
    "seq_len=1k,2k": ["seq_len: several values (1k,2k) are a sweep; add -m"],
    "launch.device=cuda": ["launch.device: cuda: no NVIDIA GPU", "launch.device=cpu"],
    "attention=flash": ["attention: 'flash' does not exist", "use one of auto, eager", "sdpa_cudnn"],
    "attention=sdpa_cudnn launch.device=cpu": ["attention.kind: sdpa_cudnn needs launch.device=cuda", "use sdpa"],
    "attention=sdpa model=gemma2_9b": ["attention.kind: sdpa does not support soft caps", "=50)", "use eager"],
    "kernels.liger=true launch.device=cpu": ["kernels.liger: true needs launch.device=cuda, not cpu", "use false"],
    "kernels.liger=1.5": ["kernels.liger: '1.5'", "true or false"],
    "lora.rank=-1": ["lora.rank: -1 is negative", "0 for none"],
    "lora=r16 lora.rank=0": ["lora.rank: 0 contradicts lora=r16", "use lora=none"],
    "lora.alpha=16": ["lora.alpha: 16.0 has no effect without adapters", "lora=r16"],
    "lora=r8 lora.dropout=1": ["lora.dropout: 1 is out of range", "0 to below 1"],
    "lora=r8 lora.target_modules=q_proj": ["lora.target_modules: 'q_proj'", "a list of strings", "[a,b]"],
    "lora=r8 lora.target_modules=[q_projj]": [
        "lora.target_modules: 'q_projj' is not a linear layer of",
        "use q_proj, k_proj",
    ],
    "model.family=phi3 lora=r8 lora.target_modules=[o_proj,q_proj]": [
        "'q_proj' is not a linear",
        "use qkv_proj, o_proj",
    ],
    "lora=r8 lora.target_modules=[wq] dry_run=true": ["lora.target_modules: 'wq'", "down_proj, lm_head"],
    "snapshot=true launch.device=cpu": ["snapshot: true needs launch.device=cuda"],
    # DeepSpeed's keys
    "offload.deepspeed.gradient_cliping=1": ["offload.deepspeed.gradient_cliping", "gradient_clipping"],
    "offload.deepspeed.zero_optimization.sub_group=1": ["zero_optimization.sub_group:", "sub_group_size?"],
    "offload.deepspeed.overlap_comm=true": [
        "offload.deepspeed.overlap_comm",
        "did you mean zero_optimization.overlap_comm?",
    ],
    "offload.deepspeed.zero_optimization.sub_group_size=lots": ['"lots" is not a whole number'],
    "offload.deepspeed.train_batch_size=8": [
        "offload.deepspeed.train_batch_size: 8 contradicts train.micro_batch_size"
    ],
    "offload.deepspeed.zero_optimization.stage=1": ["stage: 1 contradicts offload.stage, which makes it 3"],
    "offload.deepspeed.amp.enabled=true": ["offload.deepspeed.amp", "removed"],
    "offload.deepspeed_file=$F/nowhere.json": ["offload.deepspeed_file: cannot read", "nowhere.json"],
    "offload.deepspeed_file=$F/broken.json": ["offload.deepspeed_file", "broken.json is not JSON (line 2, column 10"],
    "offload.deepspeed_file=$F/twice.json": ["offload.deepspeed_file", "'steps_per_print' twice"],
    "offload.deepspeed_file=$F/list.json": ["offload.deepspeed_file", "not a JSON object"],
    "offload.deepspeed_file=$F/other_clip.json": [
        "offload.deepspeed_file",
        "1.0 contradicts optimizer.gradient_clipping",
    ],
    # files
    "model.weights=pretrained": ["model.path: empty", "name a folder"],
    "model.weights=pretrained model.path=$F/nowhere": ["model.path: '", "nowhere' is not a folder", "*.safetensors"],
    "model.weights=pretrained model.path=$F/bare": ["model.path: no *.safetensors in"],
    "model.weights=pretrained model.path=$F/cut": ["model.path:", "damaged or cut short", "fetch it again"],
    "model.weights=pretrained model.path=$F/sharded": ["model.path:", "lacks model-00001-of-00002.safetensors"],
    "model.path=$F/bare": ["model.path:", "is not read with model.weights=random"],
    "data=text": ["data.path: empty", ".txt, .jsonl or .parquet"],
    "data.path=x.txt": ["data.path: 'x.txt' is not read with data=random"],
    f"{TEXT} data.path=$F/nowhere.txt": ["data.path:", "nowhere.txt' is not a file here"],
    f"{TEXT} data.path=$F/broken.json": ["data.path:", "has an unknown type", ".jsonl"],
    f"{TEXT} data.path=$F/empty.txt": ["data.path:", "empty.txt' contains no text"],
    f"{TEXT} data.path=$F/latin.txt": ["data.path:", "not UTF-8"],
    f"{TEXT} data.path=$F/keyless.jsonl": ["data.column:", 'line 1, has no "text" (it has content)'],
    f"{TEXT} data.path=$F/fake.parquet": ["data.path:", "is not a parquet file"],
    f"{TEXT} data.path=$F/content.parquet": ["data.column:", "no column text (it has content)"],
    f"{TEXT} data.loss=assistant": ["data.loss: assistant: data=text has no assistant; use data=chat"],
    "data.column=text": ["data.column: 'text' is not read with data=random; use data=text or data=chat"],
    f"{TEXT} data=chat": ["data.path:", "good.txt' holds no conversations; name a .jsonl, .parquet"],
    f"{TEXT} data.tokenizer=$F/bare": ["data.tokenizer: no tokenizer.json in"],
    f"{TEXT} data.tokenizer=$F/tokenizer model.vocab_size=64": [
        "data.tokenizer:",
        "ids up to 69",
        "model.vocab_size is 64",
    ],
    "results.dir=": ["results.dir: empty; name a folder"],
    "results.dir= dry_run=true": ["results.dir: empty; name a folder"],
    "results.dir=/proc/nowhere": ["results.dir: cannot create /proc/nowhere", "choose a folder you can write"],
    "results.dir=$F/good.txt": ["results.dir: cannot create", "good.txt"],
}


@pytest.mark.parametrize("typed", WRONG)
def test_wrong_input_is_one_clear_line(typed: str, ldft: CLI, files: str, tmp_path: Path) -> None:
    done = ldft(*typed.replace("$F", files).split())
    line = done.stderr.rstrip("\n")
    assert "\n" not in line and line.startswith("ldft: "), done.stderr
    assert len(line) < 500 and "Traceback" not in done.stdout + line
    at = 0
    for part in WRONG[typed]:
        assert part in line[at:], f"{part!r} not in {line!r}"
        at = line.index(part, at)
    assert done.exit_code == 2
    assert not list((tmp_path / "cwd").iterdir())
