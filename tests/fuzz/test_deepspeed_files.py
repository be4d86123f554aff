"""Random DeepSpeed files: a config that DeepSpeed takes, or one line."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from ldft.errors import LdftError
from ldft.preflight import deepspeed_config, deepspeed_keys
from ldft.preflight.resolved import resolve
from tests.conftest import compose
from tests.fuzz.damage import changed, json_values

# As users have them.
FILE = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 16},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": "auto"},
    },
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_num_steps": 10}},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": 0.5e8,
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 1.0,
    "train_micro_batch_size_per_gpu": 1,
    "steps_per_print": 2000,
    "wall_clock_breakdown": False,
    "tensorboard": {"enabled": False, "output_path": "x"},
    "activation_checkpointing": {"partition_activations": False},
    "aio": {"block_size": 1048576, "queue_depth": 8},
    "comms_logger": {"enabled": False},
}
KNOWN = sorted({name for key, _ in deepspeed_keys.flat(FILE) for name in key.split(".")})
invented = st.dictionaries(
    st.sampled_from(KNOWN),
    st.one_of(json_values, st.dictionaries(st.sampled_from(KNOWN), json_values, max_size=3)),
    max_size=4,
)


@given(text=changed({key: FILE[key] for key in FILE if key not in ("scheduler", "fp16")}))
def test_a_file(text: str, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    _build(f"offload.deepspeed_file={file}")


@given(text=invented.flatmap(changed))
def test_a_file_of_random_keys(text: str, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    _build(f"offload.deepspeed_file={file}")


def _build(override: str) -> None:
    config = compose("model=nano", "launch.device=cpu", override)
    try:
        settings = deepspeed_config.build(config)
        resolve(config, deepspeed=settings)
    except LdftError as error:
        assert str(error) and "\n" not in str(error)
