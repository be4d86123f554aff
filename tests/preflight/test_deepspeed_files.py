"""DeepSpeed config files as users have them: comments, trailing commas, "auto"; and what is wrong in them, with key or line."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import hjson
import pytest

from ldft.config import Config, Device
from ldft.errors import ConfigError
from ldft.preflight import deepspeed_config, deepspeed_file, deepspeed_refused
from ldft.training.deepspeed import engine
from tests.conftest import compose

COMMENTED = """\
// from our trainer
{
  "steps_per_print": 10,  # a hash
  "wall_clock_breakdown": true, /* several
     lines, with "quotes", commas and { braces */
  "zero_optimization": {
    "reduce_bucket_size": 5e6,
    "sub_group_size": 1e9,
    "stage3_prefetch_bucket_size": "auto",  // a choice left to others
  },
  "csv_monitor": {"enabled": false, "job_name": "a # b // c",},
  "scheduler": null,
}
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str | bytes], Path]:
    def save(content: str | bytes) -> Path:
        path = tmp_path / "ds.json"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return save


@cache
def _composed(*overrides: str) -> Config:
    return compose(*overrides)


def settings(path: Path, *overrides: str, device: Device = Device.cpu) -> dict[str, Any]:
    config = copy.deepcopy(_composed(*overrides))
    config.offload.deepspeed_file, config.launch.device = str(path), device
    return deepspeed_config.build(config)


def test_comments_and_trailing_commas_are_read_as_deepspeed_reads_them(write) -> None:
    path = write(COMMENTED)
    assert deepspeed_file.read(path) == hjson.loads(COMMENTED)
    built = settings(path)
    assert built["steps_per_print"] == 10 and built["wall_clock_breakdown"] is True
    assert built["zero_optimization"]["reduce_bucket_size"] == 5_000_000
    assert built["csv_monitor"]["job_name"] == "a # b // c"
    assert (
        built["zero_optimization"]["stage3_prefetch_bucket_size"]
        == settings(write("{}"))["zero_optimization"]["stage3_prefetch_bucket_size"]
    )


@pytest.mark.parametrize("before", [b"\xef\xbb\xbf", b"\r\n", b" \t\n"])
def test_a_byte_order_mark_and_windows_lines_change_nothing(write, before: bytes) -> None:
    text = json.dumps({"steps_per_print": 7, "dump_state": False}, indent=1).replace("\n", "\r\n")
    assert deepspeed_file.read(write(before + text.encode())) == {"steps_per_print": 7, "dump_state": False}


def test_an_all_auto_file_leaves_every_choice_to_ldft(write) -> None:
    auto = {
        "bf16": {"enabled": "auto"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }
    built = settings(write(json.dumps(auto)))
    del built["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    stock = {"zero_optimization": {"reduce_bucket_size": 10_000_000}}  # a file chooses DeepSpeed's sizes, not ldft's
    assert built.keys() == settings(write(json.dumps(stock))).keys()


# What is in the file -> what the line says, in this order.
DAMAGED = {
    "": ["not a JSON object"],
    "[1]": ["not a JSON object"],
    "7": ["not a JSON object"],
    '{"steps_per_print": 10,\n "bf16": }': ["ds.json is not JSON (line 2, column 10"],
    '{"steps_per_print": 10 "dump_state": true}': ["line 1, column 21", "neither a number nor in quotes"],
    '{"steps_per_print": 10\n': ["is not JSON (line 2"],
    '{"a": {\n"dump_state": true,\n "dump_state": false}}': ["line 1, column 7", "'dump_state' twice"],
    '{"dump_state": true, // one\n "dump_state": false}': ["line 1, column 1", "'dump_state' twice"],
    '{"dump_state": tru}': ["'tru}' is neither a number nor in quotes"],
    '{"zero_optimization": {"offload_param": {"device": cpu,}}}': ["line 1, column 52", "'cpu,}}}' is neither"],
    '{"dump_state": true} }': ["line 1, column 22", "Extra data"],
    '{"dump_state": true /* no end': ["a comment or a text in three quotes has no end"],
    '{"csv_monitor": {"job_name": "no end': ["Unterminated string"],
    '{"steps_per_print": 1e999}': ["line 1, column 21: the number is too large"],
    "{" * 5000: ["Found '{' where a key name was expected"],
    '{"a":' * 50_000 + "1": ["nested too deeply"],
    b'{"csv_monitor": {"job_name": "caf\xe9"}}': ["byte 34 is not UTF-8"],
    json.dumps({"dump_state": True}).encode("utf-16"): ["byte 1 is not UTF-8"],
}


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file_is_one_line_with_its_place(write, content: str | bytes) -> None:
    with pytest.raises(ConfigError) as caught:
        deepspeed_file.read(write(content))
    _expect(str(caught.value), ["offload.deepspeed_file: ", *DAMAGED[content]])


def _expect(line: str, parts: list[str]) -> None:
    assert "\n" not in line and len(line) < 400
    at = 0
    for part in parts:
        assert part in line[at:], f"{part!r} not in {line!r}"
        at = line.index(part, at)


# What is in the file -> what the line says after the file's name.
WRONG = {
    '{"zero_optimization": {"reduce_bucket_size": NaN}}': ["zero_optimization.reduce_bucket_size: nan is not finite"],
    '{"zero_optimization": {"sub_group_size": -Infinity, }}': ["zero_optimization.sub_group_size: -inf is not finite"],
    '{"gradient_predivide_factor": Infinity}': ["gradient_predivide_factor: inf is not finite"],
    '{"zero_optimization": {"reduce_bucket_size": -1}}': ["reduce_bucket_size: -1 is out of range; use a number > 0"],
    '{"zero_optimization": {"reduce_bucket_size": 1e30}}': ["reduce_bucket_size: 1e+30 is too large"],
    '{"zero_optimization": {"sub_group_size": "1e9"}}': ['sub_group_size: "1e9" is not a whole number'],
    '{"zero_optimization": {"sub_group_size": 1.5}}': ["sub_group_size: 1.5 is not a whole number"],
    '{"zero_optimization": true}': ["zero_optimization: true is not a section"],
    '{"zero_optimization": {"offload_param": "cpu"}}': ['offload_param: "cpu" is not a section'],
    '{"zero_optimization": {"overlap_comm": "yes"}}': ['overlap_comm: "yes" is not true or false'],
    '{"zero_optimization": {"overlap_comm": 1}}': ["overlap_comm: 1 is not true or false"],
    '{"zero_optimization": {"leaf_module": {"classes": "Mlp"}}}': [
        'leaf_module.classes: "Mlp" is not a list of strings'
    ],
    '{"steps_per_print": [10]}': ["steps_per_print: [10] is not a whole number"],
    '{"steps_per_print": {"a": 1}}': ['steps_per_print: {"a": 1} is not a whole number'],
    '{"aio": {"block_size": "1M"}}': ['aio.block_size: "1M" is not a whole number'],
    '{"communication_data_type": "int8"}': [
        'communication_data_type: "int8" does not exist; use one of bf16, fp16, fp32'
    ],
    '{"communication_data_type": 16}': ["communication_data_type: 16 does not exist"],
    '{"log_level": "loud"}': ['log_level: "loud" does not exist; use one of critical'],
    '{"torch_autocast": {"enabled": true, "dtype": "fp8"}}': ['torch_autocast.dtype: "fp8" does not exist'],
    '{"checkpoint": {"tag_validation": "Maybe"}}': ["checkpoint.tag_validation", "use one of fail, ignore, warn"],
    '{"optimizer": {"params": {"betas": [0.9, null]}}}': [
        "optimizer.params.betas: [0.9, null] is not a list of numbers"
    ],
    '{"optimizer": {"params": {"lr": "1e-4"}}}': ['optimizer.params.lr: "1e-4" is not a number'],
    '{"amp": {"enabled": true}}': ["amp: DeepSpeed", "has removed this key"],
    '{"elasticity": {"enabled": true}}': ["elasticity: DeepSpeed", "has removed this key"],
    '{"sparse_attention": {"mode": "fixed"}}': ["sparse_attention: DeepSpeed", "has removed this key"],
    '{"curriculum_learning": {"enabled": true}}': ["curriculum_learning: DeepSpeed", "has removed this key"],
    '{"activation_checkpointing": {"cpu_checkpointing": true}}': ["true contradicts checkpointing"],
    '{"tensorboard": {"enabled": true}}': ["tensorboard.enabled: true needs the package", "pip install tensorboard"],
    '{"wandb": {"enabled": true}}': ["wandb.enabled: true needs the package wandb", "No module named 'wandb'"],
    '{"comet": {"enabled": true}}': ["comet.enabled: true needs the package comet_ml", "or use false"],
    '{"tensor_parallel": {"autotp_size": 2}}': ["tensor_parallel.autotp_size: 2: each rank of ldft", "leave it out"],
    '{"tensor_parallel": {"tp": {"tp_size": 4}}}': ["tensor_parallel.tp.tp_size: 4: each rank"],
    '{"sequence_parallel_size": 2}': [
        "sequence_parallel_size: 2 contradicts launch.sequence_parallel, which makes it 1"
    ],
    '{"sequence_parallel_size": 0}': [
        "sequence_parallel_size: 0 contradicts launch.sequence_parallel, which makes it 1"
    ],
    '{"pipeline": {"stages": 2}}': ["pipeline.stages: 2: takes effect for a PipelineModule", "leave it out"],
    '{"expert_parallel": {"enabled": true}}': ["expert_parallel.enabled: true: each rank", "leave it out"],
    '{"hybrid_engine": {"enabled": true}}': ["hybrid_engine.enabled: true: alternates"],
    '{"compile": {"deepcompile": true}}': ["compile.deepcompile: true: takes effect in engine.compile()"],
    '{"data_efficiency": {"enabled": true}}': ["data_efficiency.enabled: true: ldft makes its own batches"],
    '{"data_efficiency": {"data_routing": {"random_ltd": {"enabled": true}}}}': ["random_ltd.enabled: true: ldft"],
    '{"data_efficiency": {"data_sampling": {"curriculum_learning": {"enabled": true}}}}': [
        "curriculum_learning.enabled"
    ],
    '{"autotuning": {"enabled": true}}': ["autotuning.enabled: true: runs in DeepSpeed's launcher", "-m"],
    '{"weight_quantization": {"quantized_initialization": {"num_bits": 8}}}': ["quantized_initialization", "inference"],
    '{"checkpoint": {"writer": {"type": "fast"}}}': ["checkpoint.writer.type", "saves no checkpoints"],
    '{"datastates_ckpt": {"host_cache_size": 1}}': ["datastates_ckpt", "saves no checkpoints"],
    '{"zero_optimization": {"zero_hpz_partition_size": 2}}': ["zero_hpz_partition_size: 2: ZeRO++ needs launch.device"],
    '{"zero_optimization": {"zero_quantized_weights": true}}': [
        "zero_quantized_weights: true: ZeRO++ needs",
        "not cpu",
    ],
    '{"zero_optimization": {"zero_quantized_gradients": true}}': ["zero_quantized_gradients: true: ZeRO++"],
    '{"zero_optimization": {"compute_grad_norm": false}}': ["compute_grad_norm: false needs offload.stage=1 or 2"],
    '{"gradient_allreduce_op": "sum"}': ["gradient_allreduce_op: sum is not supported with ZeRO stage 3; use mean"],
    '{"prescale_gradients": true}': ["prescale_gradients: true is not supported with ZeRO-3", "reduce_scatter=false"],
    '{"gradient_predivide_factor": 2}': ["gradient_predivide_factor: 2 is not supported with ZeRO-3"],
    '{"zero_optimization": {"legacy_stage1": true}}': ["zero_optimization.legacy_stage1: true: is not supported"],
    '{"zero_optimization": {"stage3_module_granularity_threshold": 1e8}}': [
        "granularity_threshold: 100000000 takes the whole"
    ],
    '{"data_types": {"param_dtype": "fp32"}}': ["data_types.param_dtype: fp32 contradicts train.precision=bf16"],
    '{"aio": {"use_gds": true}}': ["aio.use_gds: true needs launch.device=cuda"],
    '{"optimizer": {"params": {"amsgrad": true}}}': [
        "optimizer.params.amsgrad: DeepSpeedCPUAdam has no such parameter"
    ],
    '{"optimizer": {"params": {"fused": true}}}': ["optimizer.params.fused: DeepSpeedCPUAdam has no such parameter"],
    '{"optimizer": {"params": {"torch_adam": true}}}': [
        "optimizer.params.torch_adam: true allocates",
        "memory.pinning=torch",
    ],
    '{"optimizer": {"params": {"maximize": true}}}': ["optimizer.params.maximize: true", "maximises the loss"],
    '{"gradient_clipping": 1.0}': [
        "gradient_clipping: 1.0 contradicts optimizer.gradient_clipping, which makes it 0.9"
    ],
    '{"fp8": {"enabled": true}}': ["fp8: DeepSpeed has no such key"],
}


@pytest.fixture
def no_monitors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages of DeepSpeed's monitors are not installed, whether they are or not."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize("content", WRONG)
def test_a_wrong_key_is_one_line_with_key_and_fix(write, no_monitors, content: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(write(content))
    _expect(str(caught.value), ["offload.deepspeed_file: ds.json: ", *WRONG[content]])


def test_monitors_run_where_their_packages_are(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert settings(write('{"tensorboard": {"enabled": true}}'))["tensorboard"]["enabled"] is True


def test_the_same_keys_on_the_command_line_are_named_as_typed_there(write, no_monitors) -> None:
    with pytest.raises(ConfigError, match=r"^offload\.deepspeed\.tensorboard\.enabled: true needs the package"):
        settings(write("{}"), "offload.deepspeed.tensorboard.enabled=true")
    with pytest.raises(ConfigError, match=r"^offload\.deepspeed\.steps_per_print: nan is not finite"):
        settings(write("{}"), "offload.deepspeed.steps_per_print=nan")
    on, off = '{"tensorboard": {"enabled": true}}', "offload.deepspeed.tensorboard.enabled=false"
    assert settings(write(on), off)["tensorboard"]["enabled"] is False


@pytest.mark.parametrize(
    ("content", "overrides", "problem"),
    [
        (
            '{"managed_gradient_accumulation": false}',
            ["train.gradient_accumulation_steps=2"],
            "false updates the weights",
        ),
        ('{"data_types": {"grad_accum_dtype": "fp32"}}', ["offload=none"], "unsupported mix"),
        ('{"prescale_gradients": true}', ["offload=optimizer"], "not supported with ZeRO-2"),
        ('{"zero_optimization": {"compute_grad_norm": false}}', ["offload=optimizer"], "needs the norm"),
    ],
)
def test_keys_that_only_some_runs_can_use(write, content: str, overrides: list[str], problem: str) -> None:
    path = write(content)
    with pytest.raises(ConfigError, match=problem):
        settings(path, *overrides)
    able = ["offload=optimizer", "optimizer.gradient_clipping=0", "offload.stage=1"]
    assert settings(path, *able)


@pytest.mark.parametrize(
    ("content", "overrides", "problem"),
    [
        (
            '{"optimizer": {"params": {"set_grad_none": true}}}',
            [],
            "set_grad_none: torch's AdamW has no such parameter",
        ),
        ('{"optimizer": {"params": {"foreach": true}}}', [], "foreach: `fused` and `foreach` cannot be"),
        ('{"optimizer": {"params": {"amsgrad": true}}}', ["optimizer=lion"], "amsgrad: ldft's Lion has no such"),
        ('{"optimizer": {"params": {"torch_adam": true}}}', ["optimizer=lion"], "torch_adam: is a parameter of AdamW"),
    ],
)
def test_the_optimizer_on_the_device_takes_its_own_parameters(write, content, overrides, problem) -> None:
    with pytest.raises(ConfigError, match=problem):
        settings(write(content), "offload=none", *overrides)
    both = write('{"optimizer": {"params": {"foreach": true, "fused": false, "amsgrad": true}}}')
    assert settings(both, "offload=none")["optimizer"]["params"]["foreach"] is True
    deepspeeds_own = settings(write('{"optimizer": {"params": {"torch_adam": false}}}'), "offload=none")
    assert "fused" not in deepspeeds_own["optimizer"]["params"]


def test_another_update_than_adamws_is_noted(write) -> None:
    built = settings(write('{"optimizer": {"params": {"adam_w_mode": false}}}'))
    assert deepspeed_refused.notes(built) == [
        "offload.deepspeed: optimizer.params.adam_w_mode=false: not the update of AdamW"
    ]


def test_zero_plus_plus_needs_a_gpu_and_ranks_that_its_groups_divide(write) -> None:
    path = write('{"zero_optimization": {"zero_hpz_partition_size": 2}}')
    assert settings(path, "launch.num_ranks=4", device=Device.cuda)["zero_optimization"]["zero_hpz_partition_size"] == 2
    with pytest.raises(ConfigError, match=r"2 does not divide launch.num_ranks=3"):
        settings(path, "launch.num_ranks=3", device=Device.cuda)
    with pytest.raises(ConfigError, match=r"needs offload.stage=3, not 2"):
        settings(path, "offload=optimizer", device=Device.cuda)


def test_folders_that_deepspeed_writes_to_are_created_or_named(write, tmp_path: Path) -> None:
    built = settings(write(json.dumps({"csv_monitor": {"enabled": True, "output_path": f"{tmp_path}/csv"}})))
    engine.check(built)
    assert (tmp_path / "csv").is_dir()
    assert deepspeed_refused.notes(built) == [
        "offload.deepspeed: csv_monitor.enabled: DeepSpeed's own measurements are part of the times of the iterations"
    ]
    profiler = {"flops_profiler": {"enabled": True, "output_file": "/proc/nowhere/flops.txt"}}
    with pytest.raises(
        ConfigError, match=r"flops_profiler.output_file: cannot write /proc/nowhere/flops.txt \(No such"
    ):
        engine.check(settings(write(json.dumps(profiler))))
