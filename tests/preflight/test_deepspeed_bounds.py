"""DeepSpeed keys at the edge of what can be used: values that change nothing are taken, the next one is refused."""

from __future__ import annotations

from typing import Any

import pytest

from ldft.config import Config, Device
from ldft.errors import ConfigError
from ldft.preflight import deepspeed_keys, deepspeed_refused
from tests.conftest import compose


def nested(key: str, value: Any) -> dict[str, Any]:
    *sections, name = key.split(".")
    tree = {name: value}
    for section in reversed(sections):
        tree = {section: tree}
    return tree


def check(key: str, value: Any, config: Config | None = None) -> None:
    """As a file of this key alone."""
    values = deepspeed_keys.cleaned(nested(key, value), "offload.deepspeed")
    settings = {"zero_optimization": {}, "optimizer": {"params": {}}} | values
    settings["optimizer"] = {"params": {}} | settings["optimizer"]
    deepspeed_refused.check(config or compose("model=nano", "launch.device=cpu"), values, settings, "offload.deepspeed")


@pytest.mark.parametrize(
    ("key", "taken", "refused"),
    [
        ("tensor_parallel.autotp_size", [0, 1], 2),
        ("tensor_parallel.tp.tp_size", [1], 2),
        ("pipeline", [{}], {"stages": 1}),
        *(
            (key, [False], True)
            for key in (
                "expert_parallel.enabled",
                "hybrid_engine.enabled",
                "compile.deepcompile",
                "compile.autoep_non_moe",
                "data_efficiency.enabled",
                "data_efficiency.data_sampling.enabled",
                "data_efficiency.data_sampling.curriculum_learning.enabled",
                "data_efficiency.data_routing.enabled",
                "data_efficiency.data_routing.random_ltd.enabled",
                "autotuning.enabled",
                "weight_quantization.enabled",
                "zero_optimization.legacy_stage1",
                "zero_optimization.zero_quantized_weights",
                "zero_optimization.zero_quantized_nontrainable_weights",
                "zero_optimization.zero_quantized_gradients",
            )
        ),
        ("zero_optimization.zero_hpz_partition_size", [0, 1], 2),
        ("gradient_predivide_factor", [1.0, 1], 2),
        ("prescale_gradients", [False], True),
        ("gradient_allreduce_op", ["mean"], "sum"),
        ("managed_gradient_accumulation", [True, False], None),  # one micro-batch
        # 1122624 parameters in two layers: DeepSpeed divides by one more than the modules.
        ("zero_optimization.stage3_module_granularity_threshold", [0, 374208], 374209),
        ("data_types.param_dtype", ["bf16", "bfloat16"], "fp16"),
        ("data_types.grad_accum_dtype", ["bf16", "fp32"], None),
        ("aio.use_gds", [False], True),
    ],
)
def test_what_changes_nothing_is_taken(key: str, taken: list[Any], refused: Any) -> None:
    for value in taken:
        check(key, value)
    if refused is not None:
        with pytest.raises(ConfigError, match=rf"^offload\.deepspeed\.{key}(\.stages)?: "):
            check(key, refused)


def test_a_threshold_that_takes_the_whole_model_is_of_zero_3_alone() -> None:
    two = compose("model=nano", "launch.device=cpu", "offload=optimizer")
    check("zero_optimization.stage3_module_granularity_threshold", 10**8, two)
    # Frozen weights count as those that are trained.
    check(
        "zero_optimization.stage3_module_granularity_threshold",
        374208,
        compose("model=nano", "launch.device=cpu", "lora=r8"),
    )


def test_the_largest_number_is_what_torch_can_count() -> None:
    assert deepspeed_keys.cleaned({"steps_per_print": 2**63 - 1}, "") == {"steps_per_print": 2**63 - 1}
    with pytest.raises(ConfigError, match=r"9\.22e\+18 is too large; use at most 9\.2e\+18"):
        deepspeed_keys.cleaned({"steps_per_print": 2**63}, "")


def test_limits_are_part_of_the_range_or_not() -> None:
    for key, taken, refused, said in (
        ("zero_optimization.reduce_bucket_size", 1, 0, "> 0"),
        ("zero_optimization.stage3_param_persistence_threshold", 0, -1, ">= 0"),
        ("zero_optimization.offload_optimizer.ratio", 1, 1.5, "<= 1"),
        ("zero_optimization.offload_optimizer.ratio", 0, -0.5, ">= 0"),
        ("zero_optimization.zenflow.topk_ratio", 0.5, 1, "< 1"),
        ("zero_optimization.zenflow.topk_ratio", 0.5, 0, "> 0"),
    ):
        assert deepspeed_keys.cleaned(nested(key, taken), "") == nested(key, taken)
        with pytest.raises(ConfigError, match=f"{refused} is out of range; use a number {said}$"):
            deepspeed_keys.cleaned(nested(key, refused), "")


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("zero_optimization.stag", "did you mean zero_optimization.stage, which is offload.stage in ldft?"),
        ("zero_optimization.overlap_com", "did you mean zero_optimization.overlap_comm?"),
        ("overlap_comm", "did you mean zero_optimization.overlap_comm?"),
        ("fp16.nothing_alike", "use one of auto_cast, "),
        ("tensor_parallel.nothing_alike", "use one of "),
        ("zero_optimization.nothing_alike", "see https://www.deepspeed.ai/docs/config-json/"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(key: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        deepspeed_keys.cleaned(nested(key, 1), "offload.deepspeed")
    assert str(caught.value).startswith(f"offload.deepspeed.{key}: DeepSpeed has no such key; {said}")


def test_a_key_that_ldft_sets_may_say_the_same() -> None:
    ours = {"optimizer.type": "AdamW", "bf16.enabled": True, "zero_optimization.stage": 3}

    def same(key: str, value: Any) -> None:
        deepspeed_keys.check_owned(nested(key, value), ours, "offload.deepspeed")

    same("optimizer.type", "adamw")
    same("bf16.enabled", True)
    same("fp16.enabled", False)  # what ldft does not set may be switched off
    same("steps_per_print", 3)
    for key, value, owner, said in (
        ("optimizer.type", "lion", "optimizer", ', which makes it "AdamW"'),
        ("bf16.enabled", False, "train.precision", ", which makes it true"),
        ("fp16.enabled", True, "train.precision", ""),
        ("scheduler.type", "WarmupLR", "optimizer.schedule", ""),
        ("zero_optimization.stage", 2, "offload.stage", ", which makes it 3"),
    ):
        with pytest.raises(ConfigError, match=rf" contradicts {owner}{said}; leave it out here and set that key$"):
            same(key, value)


def test_parameters_of_adamw_are_none_of_lions() -> None:
    lion = compose("model=nano", "launch.device=cpu", "optimizer=lion", "offload=optimizer")
    check("optimizer.params.fp32_optimizer_states", True, lion)
    for name in ("torch_adam", "adam_w_mode"):
        with pytest.raises(ConfigError, match=f"{name}: is a parameter of AdamW, and optimizer.name is lion"):
            check(f"optimizer.params.{name}", True, lion)
    check("optimizer.params.torch_adam", True, compose("model=nano", "launch.device=cpu", "memory.pinning=torch"))
    check("optimizer.params.adam_w_mode", True)


@pytest.mark.parametrize("name", ["maximize", "differentiable"])
def test_torchs_adamw_takes_what_is_switched_off(name: str) -> None:
    config, params = compose("model=nano", "launch.device=cpu", "offload=none"), f"optimizer.params.{name}"
    settings = {"zero_optimization": {}, "optimizer": {"params": {"torch_adam": True, name: False}}}
    deepspeed_refused.check(config, nested(params, False), settings, "offload.deepspeed")
    with pytest.raises(ConfigError, match=rf"^offload\.deepspeed\.{params}: true: "):
        check(params, True, config)


def test_zero_plus_plus_runs_on_gpus() -> None:
    config = compose("model=nano", "launch.num_ranks=4")
    config.launch.device = Device.cuda
    check("zero_optimization.zero_quantized_weights", True, config)
    check("aio.use_gds", True, config)
    config.offload.stage = 2
    with pytest.raises(ConfigError, match=r"zero_quantized_weights: true: ZeRO\+\+ needs offload\.stage=3, not 2"):
        check("zero_optimization.zero_quantized_weights", True, config)
