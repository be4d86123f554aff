"""The DeepSpeed config: complete, the seed's where asked for, extended by the user, never by a key that DeepSpeed ignores."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from transformers import get_scheduler

from ldft.config import Config, Device
from ldft.environment import PACKAGE_DIR
from ldft.errors import ConfigError
from ldft.preflight import deepspeed_config, deepspeed_keys, zero_buckets
from ldft.training import schedule
from ldft.training.deepspeed import engine
from tests.conftest import compose, models, options

SEED = {
    "steps_per_print": 10, "train_batch_size": None, "train_micro_batch_size_per_gpu": None, "gradient_clipping": 0.9,
    "prescale_gradients": False, "wall_clock_breakdown": False, "flops_profiler": {"enabled": False},
    "fp16": {"enabled": False, "loss_scale_window": 100, "initial_scale_power": 6, "hysteresis": 1}, "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 3, "overlap_comm": True, "contiguous_gradients": True,
        "offload_param": {"device": "cpu", "pin_memory": True},
        "offload_optimizer": {"device": "cpu", "pin_memory": True, "fast_init": False},
        "load_from_fp32_weights": False, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0,
        "stage3_prefetch_bucket_size": 0, "sub_group_size": 0, "memory_efficient_linear": True,
        "round_robin_gradients": False, "reduce_bucket_size": 1e5,
    },
}  # fmt: skip


def settings(*overrides: str, device: Device = Device.cpu) -> dict:
    config = compose(*overrides)
    config.launch.device = device
    return deepspeed_config.build(config)


def test_the_seeds_file_and_the_seed_option_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "seed.json").write_text(json.dumps(SEED))
    stock = "memory.pinning=torch"
    by_file = settings(f"offload.deepspeed_file={tmp_path}/seed.json", stock, device=Device.cuda)
    assert by_file == settings("offload=seed", stock, device=Device.cuda)
    ours = dict(deepspeed_keys.flat(by_file))
    for key, value in deepspeed_keys.flat(SEED):
        assert value is None or ours[key] == value, key


def test_the_users_keys_win_over_the_file_and_the_file_over_ours(tmp_path: Path) -> None:
    (tmp_path / "base.json").write_text(
        '{"zero_optimization": {"sub_group_size": 1e6, "reduce_bucket_size": 1e6}, "dump_state": true}'
    )
    both = settings(
        f"offload.deepspeed_file={tmp_path}/base.json", "offload.deepspeed.zero_optimization.sub_group_size=7"
    )
    assert both["zero_optimization"]["sub_group_size"] == 7
    assert both["zero_optimization"]["reduce_bucket_size"] == 1_000_000 and both["dump_state"] is True
    assert both["zero_optimization"]["allgather_bucket_size"] == 500_000_000


def on_disk(option: str) -> list[str]:
    return ["offload.nvme_path=/disk"] if option == "nvme" else []


@pytest.mark.parametrize("option", options("offload"))
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_deepspeed_takes_every_option_as_it_is_meant(option: str, precision: str) -> None:
    if (option, precision) == ("zenflow", "fp16"):
        pytest.skip("refused (test_deepspeed_managed.py)")
    values = settings(
        f"offload={option}",
        f"train.precision={precision}",
        "train.micro_batch_size=2",
        *on_disk(option),
        device=Device.cuda,
    )
    engine.check(values)
    taken = DeepSpeedConfig(values)
    assert taken.train_micro_batch_size_per_gpu == 2 and taken.gradient_clipping == 0.9
    assert (taken.bfloat16_config.enabled, taken.float16_config.enabled) == (precision == "bf16", precision == "fp16")
    host = {
        "full": "cpu cpu",
        "seed": "cpu cpu",
        "super_offload": "cpu cpu",
        "optimizer": "none cpu",
        "zenflow": "none cpu",
    }
    on_host = (host | {"nvme": "nvme nvme"}).get(option, "none none").split()
    devices = [part.device for part in (taken.zero_config.offload_param, taken.zero_config.offload_optimizer)]
    assert [str(getattr(device, "value", device)) for device in devices] == on_host


def test_what_zero_keeps_on_the_device_follows_the_size_of_a_layer() -> None:
    layer = 3072 * (2 * 3072 + 2 * 1024 + 3 * 8192 + 2)  # of Llama 3.2 3B
    zero = settings("model=llama3_3b")["zero_optimization"]
    assert (zero["stage3_max_live_parameters"], zero["stage3_max_reuse_distance"]) == (2 * layer, 2 * layer)
    # Less than the embedding, whose gradient must not share a bucket: that one would be copied.
    assert zero["reduce_bucket_size"] == 64_000_000 < 128256 * 3072
    assert settings("model=llama3_8b")["zero_optimization"]["reduce_bucket_size"] == 64_000_000
    assert settings("model=qwen2_5_32b")["zero_optimization"]["reduce_bucket_size"] == 5120 * 27648
    # Layers are fetched whole, one ahead; of the largest models in parts.
    assert zero["stage3_prefetch_bucket_size"] == layer and len(zero["leaf_module"]["name_suffixes"]) == 28
    large = settings("model=llama3_70b")["zero_optimization"]
    assert (large["stage3_prefetch_bucket_size"], "leaf_module" in large) == (50_000_000, False)
    assert zero["contiguous_gradients"] is False
    # Small models are not cut into small buckets, and no model gets more than DeepSpeed would give it.
    assert settings("model=nano")["zero_optimization"]["reduce_bucket_size"] == 5_000_000
    for option in models():
        fitted = settings(f"model={option}")["zero_optimization"]
        assert all(
            5_000_000 <= fitted[name] <= value
            for name, value in zero_buckets.DEFAULTS.items()
            if value > 5_000_000 and name != "stage3_prefetch_bucket_size"
        )


def test_deepspeeds_own_sizes_where_its_user_or_the_device_decides(tmp_path: Path) -> None:
    (tmp_path / "base.json").write_text('{"zero_optimization": {"reduce_bucket_size": 7e6}}')
    by_file = settings(f"offload.deepspeed_file={tmp_path}/base.json")["zero_optimization"]
    assert by_file["stage3_max_live_parameters"] == 1_000_000_000 and by_file["reduce_bucket_size"] == 7_000_000
    taken = DeepSpeedConfig({"train_batch_size": 1, "zero_optimization": {"stage": 3}}).zero_config
    written = settings("offload=zero3")["zero_optimization"]
    for name, value in zero_buckets.DEFAULTS.items():
        assert written[name] == value == getattr(taken, name.removeprefix("stage3_")), name


def test_loss_scaling_is_dynamic_unless_it_is_given() -> None:
    assert settings("train.precision=fp16")["fp16"] | {"loss_scale": 0} == {
        "enabled": True, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2,
        "min_loss_scale": 1,
    }  # fmt: skip
    assert settings("train.precision=fp16", "train.loss_scale=128")["fp16"]["loss_scale"] == 128
    assert settings("offload=seed", "train.precision=fp16")["fp16"]["initial_scale_power"] == 6


def test_the_key_list_is_that_of_the_installed_release() -> None:
    script = PACKAGE_DIR.parent / "scripts" / "deepspeed_keys.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_key_of_ours_is_in_the_list() -> None:
    for option in options("offload"):
        precision = "bf16" if option == "zenflow" else "fp16"
        values = settings(f"offload={option}", f"train.precision={precision}", *on_disk(option), device=Device.cuda)
        assert deepspeed_keys.cleaned(values, "x") == values


def test_deepspeed_would_have_been_silent() -> None:
    """Why the list exists: the release takes this without a word. When it no longer does, so much the better."""
    DeepSpeedConfig(settings() | {"gradient_cliping": 1.0})
    with pytest.raises(
        ConfigError, match=r"did you mean gradient_clipping, which is optimizer.gradient_clipping in ldft"
    ):
        settings("offload.deepspeed.gradient_cliping=1.0")


def test_what_deepspeed_alone_refuses_is_the_users_error_too() -> None:
    with pytest.raises(ConfigError, match=r"^offload.deepspeed: DeepSpeed refuses it: bf16_optimizer_states requires"):
        engine.check(settings("offload.deepspeed.bf16.bf16_optimizer_states=true"))
    halved = "offload.deepspeed.zero_optimization.offload_optimizer.ratio=0.5"
    with pytest.raises(
        ConfigError, match=r"^offload.deepspeed.zero_optimization: DeepSpeed refuses it: .*ZeRO Stage 3"
    ):
        engine.check(settings("offload=optimizer", halved))


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_schedule_is_that_of_transformers(name: str, warmup: int) -> None:
    import torch

    config = Config()
    config.train.iterations = 10
    config.optimizer.schedule = type(config.optimizer.schedule)[name]
    config.optimizer.schedule_warmup = warmup
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler("constant_with_warmup" if name == "constant" else name, optimizer, warmup, 10)
    for update in range(10):
        assert schedule.factor(config, update) == pytest.approx(theirs.get_last_lr()[0]), update
        optimizer.step()
        theirs.step()


def test_linear_layers_are_torchs_where_every_layer_is_recomputed_right_before_its_backward_pass() -> None:
    def early(*overrides: str) -> bool:
        line = ("model=llama3_1b", "launch.device=cuda", "offload=full", "checkpointing=cpu", *overrides)
        return deepspeed_config.build(compose(*line))["zero_optimization"]["memory_efficient_linear"]

    assert not early() and not early("checkpointing=gpu") and not early("lora=r8")
    assert early("checkpointing=none") and early("checkpointing.layers=3") and early("checkpointing.every=2")
    assert early("offload.deepspeed={zero_optimization:{stage3_max_reuse_distance:0}}")
