"""Write ldft/preflight/deepspeed_keys.json: every config key that the installed DeepSpeed knows, with its type if it declares one.

    python scripts/deepspeed_keys.py            # write the file
    python scripts/deepspeed_keys.py --check    # fail if the file differs from the installed release

DeepSpeed ignores most keys that it does not know, so ldft keeps its own list, and its parent process never imports DeepSpeed.
A leaf is a type: bool, str, strings (a list), numbers (a list), int or float with their limits (`int >= 0`), a list of the allowed
values, or any if DeepSpeed declares none. {"*": [...]} is a section whose names are valid at any depth.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from deepspeed.runtime import config as ds_config
from deepspeed.runtime import constants
from pydantic import BaseModel

FILE = Path(__file__).resolve().parent.parent / "ldft" / "preflight" / "deepspeed_keys.json"

# Sections that are pydantic models.
MODELS = {
    "zero_optimization": "runtime.zero.config:DeepSpeedZeroConfig",
    "fp16": "runtime.precision_config:DeepSpeedFP16Config",
    "bf16": "runtime.precision_config:DeepSpeedBF16Config",
    "comms_logger": "comm.config:CommsLoggerConfig",
    "tensorboard": "monitor.config:TensorBoardConfig",
    "wandb": "monitor.config:WandbConfig",
    "csv_monitor": "monitor.config:CSVConfig",
    "comet": "monitor.config:CometConfig",
    "compile": "compile.config:CompileConfig",
    "hybrid_engine": "runtime.config:HybridEngineConfig",
    "tensor_parallel": "runtime.tensor_parallel.config:TPTrainingConfig",
    "weight_quantization": "inference.config:WeightQuantConfig",
}
# Sections that DeepSpeed reads key by key, by constants of these names' prefix in one module.
CONSTANTS = {
    "activation_checkpointing": ("runtime.activation_checkpointing.config", "ACT_CHKPT_"),
    "flops_profiler": ("profiling.constants", "FLOPS_PROFILER_"),
    "aio": ("runtime.swap_tensor.constants", "AIO_"),
    "torch_autocast": ("runtime.constants", "TORCH_AUTOCAST_"),
}
# Deep trees with their own module of constants; the names are accepted at any depth.
FLAT = {"autotuning": "autotuning.constants", "data_efficiency": "runtime.data_pipeline.constants"}
# Names at the top level that are constants of deepspeed.runtime.constants. Their type is that of the default in X_DEFAULT; where
# there is none, it is in UNTYPED.
TOP = [
    "TRAIN_BATCH_SIZE", "TRAIN_MICRO_BATCH_SIZE_PER_GPU", "GRADIENT_ACCUMULATION_STEPS", "MANAGED_GRADIENT_ACCUMULATION",
    "STEPS_PER_PRINT", "GRADIENT_CLIPPING", "COMMUNICATION_DATA_TYPE", "SEQ_PARALLEL_COMMUNICATION_DATA_TYPE",
    "PRESCALE_GRADIENTS", "GRADIENT_PREDIVIDE_FACTOR", "GRADIENT_ALLREDUCE_OP", "DISABLE_ALLGATHER", "DUMP_STATE",
    "DISABLE_PYTHON_GC", "VOCABULARY_SIZE", "WALL_CLOCK_BREAKDOWN", "MEMORY_BREAKDOWN", "DATALOADER_DROP_LAST",
    "USE_DATA_BEFORE_EXPERT_PARALLEL", "LOG_LEVEL", "ZERO_ALLOW_UNTESTED_OPTIMIZER", "ZERO_FORCE_DS_CPU_OPTIMIZER",
]  # fmt: skip
_NAMES = {bool: "bool", int: "int", float: "float", str: "str", Path: "str"}
# Types of keys whose default is None or says too little. Read in runtime/config.py and where the value is used.
UNTYPED = {
    "communication_data_type": ["bf16", "fp16", "fp32"],
    "seq_parallel_communication_data_type": ["bf16", "fp16", "fp32"],
    "gradient_allreduce_op": ["mean", "sum"],
    "gradient_accumulation_steps": "int > 0", "steps_per_print": "int > 0", "train_batch_size": "int > 0",
    "train_micro_batch_size_per_gpu": "int > 0", "vocabulary_size": "int > 0",
    "gradient_clipping": "float >= 0", "gradient_predivide_factor": "float > 0",
    "flops_profiler.output_file": "str", "flops_profiler.profile_step": "int > 0", "flops_profiler.top_modules": "int > 0",
    "activation_checkpointing.number_checkpoints": "int > 0",
    "aio.block_size": "int > 0", "aio.queue_depth": "int > 0", "aio.intra_op_parallelism": "int > 0",
    "torch_autocast.lower_precision_safe_modules": "strings", "data_types.keep_in_fp32_modules": "strings",
    "log_level": ["critical", "debug", "error", "info", "warning"],
}  # fmt: skip


def _type(annotation: Any) -> Any:
    """The tree or type name of one pydantic annotation."""
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [_type(kind) for kind in get_args(annotation) if kind is not type(None)]
        return kinds[0] if len(kinds) == 1 else "any"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _model(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return sorted(str(member.value) for member in annotation) if issubclass(annotation, str) else "int"
    item = annotation if annotation is list else get_args(annotation)[0] if get_origin(annotation) is list else None
    if item in (list, str) or get_origin(item) is Literal:
        return "strings"
    return _NAMES.get(annotation, "any")


def _limits(field: Any) -> str:
    """The limits that pydantic checks, as in ` >= 0 <= 1`."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = [(sign, getattr(part, name, None)) for part in field.metadata for name, sign in signs.items()]
    return "".join(f" {sign} {limit:g}" for sign, limit in found if limit is not None)


def _model(model: type[BaseModel]) -> dict[str, Any]:
    tree = {}
    for name, field in model.model_fields.items():
        # Use the alias if there is one: it is the documented name. Two names for one value would let it be set twice.
        kind = _type(field.annotation)
        tree[field.alias or name] = kind + _limits(field) if isinstance(kind, str) else kind
    return tree


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    loaded = importlib.import_module(f"deepspeed.{module}")
    return getattr(loaded, name) if name else loaded


def _constants(module: str, prefix: str) -> list[str]:
    """Names of a module's string constants whose values are key names, not defaults or formats."""
    return [
        name
        for name, value in vars(_load(module)).items()
        if name.isupper() and name.startswith(prefix) and isinstance(value, str) and value.isidentifier()
        and not name.endswith("_DEFAULT")
    ]  # fmt: skip


def _by_default(module: Any, name: str, section: str = "") -> Any:
    """The type of the key that the constant `name` holds."""
    kind = _NAMES.get(type(getattr(module, f"{name}_DEFAULT", None)), "any")
    return UNTYPED.get(section + getattr(module, name), kind)


def _dtypes() -> list[str]:
    return sorted(
        value
        for member in ds_config.DtypeEnum
        for value in member._all_values
        if isinstance(value, str) and "int" not in value
    )


def collect() -> dict[str, Any]:
    """The key tree of the installed release."""
    keys: dict[str, Any] = {getattr(constants, name): _by_default(constants, name) for name in TOP}
    keys |= {section: _model(_load(path)) for section, path in MODELS.items()}
    for section, (module, prefix) in CONSTANTS.items():
        loaded = _load(module)
        keys[section] = {
            getattr(loaded, name): _by_default(loaded, name, f"{section}.") for name in _constants(module, prefix)
        }
    keys["torch_autocast"]["dtype"] = _dtypes()
    keys |= {
        section: {"*": sorted({getattr(_load(module), name) for name in _constants(module, "")})}
        for section, module in FLAT.items()
    }
    throughput = _load("utils.config:DeepSpeedThroughputTimerConfig")
    writing = _load("runtime.model_checkpointing.constants")
    checkpoint: dict[str, Any] = {
        getattr(writing, name): "any" for name in _constants("runtime.model_checkpointing.constants", "CHECKPOINT_")
    }
    checkpoint[constants.CHECKPOINT_TAG_VALIDATION] = sorted(
        mode.lower() for mode in constants.CHECKPOINT_TAG_VALIDATION_MODES
    )
    writer = {"type", *(name for name in checkpoint if name.startswith(("io_", "show_", "data_parallel", "decoupled")))}
    for name in (*writer, "writer"):
        checkpoint.pop(name, None)
    return keys | {
        "optimizer": {
            constants.TYPE: "str",
            constants.LEGACY_FUSION: "bool",
            # Keyword arguments of the optimizer's class; these are AdamW's, with DeepSpeed's own switches.
            constants.OPTIMIZER_PARAMS: {
                "lr": "float", "betas": "numbers", "eps": "float", "weight_decay": "float", constants.MAX_GRAD_NORM: "float",
            } | {
                name: "bool"
                for name in ("amsgrad", "bias_correction", "set_grad_none", ds_config.TORCH_ADAM_PARAM,
                             ds_config.ADAM_W_MODE, "fp32_optimizer_states", "fused", "foreach", "capturable",
                             "maximize", "differentiable")
            },
        },
        "scheduler": {constants.TYPE: "str", constants.SCHEDULER_PARAMS: "any"},
        "data_types": {
            getattr(constants, name): _dtypes() for name in ("GRAD_ACCUM_DTYPE", "PARAM_DTYPE", "BUFFER_DTYPE")
        } | {constants.KEEP_IN_FP32_MODULES: UNTYPED["data_types.keep_in_fp32_modules"]},
        "checkpoint": checkpoint | {
            "writer": {name: "any" for name in sorted(writer)},
            constants.LOAD_UNIVERSAL_CHECKPOINT: "bool",
            constants.USE_NODE_LOCAL_STORAGE_CHECKPOINT: "bool",
            constants.CHECKPOINT_PARALLEL_WRITE: {constants.CHECKPOINT_PARALLEL_WRITE_PIPELINE_STAGE: "bool"},
        },
        "timers": {"throughput": _model(throughput)},
        "pipeline": {name: "any" for name in ds_config.get_pipeline_config({})},
        ds_config.EXPERT_PARALLEL: "any",
        "sequence_parallel_size": "int",
        "datastates_ckpt": "any",
    }  # fmt: skip


def removed() -> dict[str, list[str]]:
    """Keys that DeepSpeed has removed and now refuses, by section ("" is the top level)."""
    return {
        "": sorted(ds_config._REMOVED_TOP_LEVEL_CONFIG_KEYS),
        "zero_optimization": sorted(ds_config._REMOVED_ZERO_CONFIG_KEYS),
    }


def main() -> int:
    from importlib.metadata import version

    found = {"deepspeed": version("deepspeed"), "keys": collect(), "removed": removed()}
    text = json.dumps(found, indent=1, sort_keys=True) + "\n"
    if "--check" in sys.argv:
        same = FILE.read_text() == text
        print(
            "up to date"
            if same
            else f"{FILE.name} differs from DeepSpeed {found['deepspeed']}; run scripts/deepspeed_keys.py"
        )
        return 0 if same else 1
    FILE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
