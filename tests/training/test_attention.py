"""Which attention is chosen for which machine and model, what is refused, and that cuDNN's is never replaced by another."""

from __future__ import annotations

import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, PreTrainedModel

from ldft import environment
from ldft.config import AttentionKind, Config, Device
from ldft.errors import CombinationError, ConfigError
from ldft.preflight import attention
from ldft.preflight.selection import select
from ldft.training import attention_kernels, data, model
from ldft.training.attention_kernels import cudnn
from tests.conftest import compose, options

PLAIN = ("model=nano", "model.vocab_size=64")
HEADS_128, HEADS_256 = ("model=llama3_8b",), ("model=llama3_8b", "model.head_dim=256")
WINDOW = ("model=mistral_nemo_12b", "model.sliding_window=512")
CAPS = ("model=gemma2_9b",)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Set the compute capability (None for a CPU) and the installed packages that the choice sees."""

    def be(capability: tuple[int, int] | None, *packages: str) -> None:
        def distribution(name: str) -> str:
            if name not in packages:
                raise metadata.PackageNotFoundError(name)
            return name

        monkeypatch.setattr(environment, "compute_capability", lambda: capability)
        monkeypatch.setattr(metadata, "distribution", distribution)

    return be


def config_of(device: str, *overrides: str) -> Config:
    config = compose(*overrides)
    config.launch.device = Device[device]
    return config


@pytest.mark.parametrize(
    ("capability", "packages", "overrides", "kind"),
    [
        (None, (), PLAIN, "sdpa"),
        (None, ("flash-attn",), CAPS, "eager"),
        ((9, 0), ("flash-attn",), HEADS_128, "sdpa_cudnn"),
        ((9, 0), ("flash-attn",), ("model=gpt_oss_20b",), "eager"),  # nothing else computes its sinks
        ((10, 0), (), HEADS_128, "sdpa_cudnn"),
        ((9, 0), ("flash-attn",), HEADS_256, "flash_attention_2"),
        ((9, 0), (), HEADS_256, "sdpa"),
        ((9, 0), ("flash-attn",), WINDOW, "flash_attention_2"),
        ((9, 0), (), WINDOW, "sdpa"),
        ((9, 0), (), (*WINDOW, "seq_len.tokens=511"), "sdpa_cudnn"),
        ((9, 0), ("flash-attn",), (*WINDOW, "seq_len.tokens=512"), "flash_attention_2"),
        ((9, 0), ("flash-attn",), CAPS, "flash_attention_2"),
        ((9, 0), (), CAPS, "eager"),
        ((9, 0), ("flash-attn",), (*HEADS_128, "train.precision=fp32"), "sdpa"),
        ((8, 0), ("flash-attn",), HEADS_128, "flash_attention_2"),
        ((8, 0), ("flash-attn-4",), HEADS_128, "sdpa"),
        ((12, 0), (), HEADS_128, "sdpa"),
        ((7, 0), ("flash-attn",), (*HEADS_128, "train.precision=fp16"), "sdpa"),
        ((9, 0), (), (*CAPS, "model.attention_softcap=0"), "eager"),
    ],
)
def test_auto_takes_the_fastest_that_machine_and_model_support(machine, capability, packages, overrides, kind) -> None:
    machine(capability, *packages)
    assert attention.choose(config_of("cuda" if capability else "cpu", *overrides)).name == kind


@pytest.mark.parametrize(
    ("capability", "packages", "overrides", "error", "says"),
    [
        (
            None,
            (),
            ("attention=sdpa_cudnn",),
            CombinationError,
            "sdpa_cudnn needs launch.device=cuda, not cpu; use sdpa",
        ),
        (None, (), ("attention=flash_attention_2",), CombinationError, "needs launch.device=cuda"),
        (
            (9, 0),
            (),
            ("attention=flash_attention_2",),
            ConfigError,
            "needs the package flash-attn, .*pip install 'ldft",
        ),
        ((9, 0), ("flash-attn",), ("attention=flash_attention_3",), ConfigError, "the package flash-attn-3"),
        ((9, 0), ("flash-attn",), ("attention=flash_attention_4",), ConfigError, "pip install --pre flash-attn-4"),
        (
            (7, 5),
            (),
            ("attention=sdpa_cudnn", "train.precision=fp16"),
            ConfigError,
            "8.0 or higher, this one has 7.5; use sdpa",
        ),
        ((8, 6), ("flash-attn-4",), ("attention=flash_attention_4",), ConfigError, "9.0 or higher, this one has 8.6"),
        (
            (9, 0),
            (),
            ("attention=sdpa", *CAPS),
            CombinationError,
            "sdpa does not support soft caps .*=50.; use eager or flash",
        ),
        ((9, 0), (), ("attention=sdpa_cudnn", "train.precision=fp32"), CombinationError, "bf16 or fp16, not fp32"),
        (
            (9, 0),
            (),
            ("attention=sdpa_cudnn", "model.head_dim=20"),
            CombinationError,
            "does not support model.head_dim=20",
        ),
        (
            (9, 0),
            ("flash-attn",),
            ("attention=flash_attention_2", "model.head_dim=264"),
            CombinationError,
            "head_dim=264",
        ),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(machine, capability, packages, overrides, error, says) -> None:
    machine(capability, *packages)
    with pytest.raises(ConfigError, match=f"attention.kind: .*{says}") as caught:
        attention.choose(config_of("cuda" if capability else "cpu", *overrides))
    assert caught.type is error and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["sdpa", "sdpa_cudnn", "flash_attention_2"])
def test_a_kind_that_would_leave_out_sinks_is_refused(machine, kind: str) -> None:
    machine((9, 0), "flash-attn")
    with pytest.raises(CombinationError, match=rf"^attention.kind: {kind} does not compute the attention sinks"):
        attention.choose(config_of("cuda", "model=gpt_oss_20b", f"attention={kind}"))


def test_every_kind_runs_where_all_is_there(machine) -> None:
    machine((9, 0), "flash-attn", "flash-attn-3", "flash-attn-4")
    for kind in AttentionKind:
        if kind is not AttentionKind.auto:
            assert attention.choose(config_of("cuda", *HEADS_128, f"attention={kind.name}")) is kind


def cudnn_model(machine, *overrides: str):
    """A model on the CPU that was told to use cuDNN's attention, and a batch."""
    machine((9, 0))
    config = config_of("cuda", *PLAIN, "offload=none", "attention=sdpa_cudnn", "kernels.liger=false", *overrides)
    return model.build(select(config), torch.device("cpu")), data.batch(config, 0, 0, 0)


def test_where_cudnn_cannot_run_nothing_else_does(machine) -> None:
    network, tokens = cudnn_model(machine)
    with pytest.raises(ConfigError, match=r"attention.kind: sdpa_cudnn: cuDNN refuses this: \S.*; use sdpa"):
        network(input_ids=tokens, labels=tokens)


@pytest.mark.parametrize("window", [0, 16])
def test_cudnn_gets_what_sdpa_gets_and_no_mask_for_a_full_causal_batch(machine, monkeypatch, window) -> None:
    beside = ("model.family=mistral", f"model.sliding_window={window}", "seq_len.tokens=48", "train.micro_batch_size=2")
    network, tokens = cudnn_model(machine, *beside)
    network.eval()
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention

    def note(*arguments, **named):
        calls.append(named)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return real(*arguments, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    monkeypatch.setattr(cudnn, "can_use_cudnn_attention", lambda parameters: True)
    logits = network(input_ids=tokens).logits
    for call in calls:
        assert call["enable_gqa"] and call["is_causal"] == (not window)
        assert (call["attn_mask"] is None) == (not window)
    assert len(calls) == network.config.num_hidden_layers
    network.set_attn_implementation("sdpa")
    torch.testing.assert_close(logits, network(input_ids=tokens).logits, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("tokens", [15, 16, 17])
def test_a_window_counts_where_transformers_makes_sdpa_a_mask(monkeypatch, tokens) -> None:
    window = ("model.family=mistral", "model.sliding_window=16", f"seq_len.tokens={tokens}")
    config = config_of("cpu", *PLAIN, *window, "offload=none", "attention=sdpa")
    network, masks = model.build(select(config), torch.device("cpu")), []
    real = torch.nn.functional.scaled_dot_product_attention

    def note(*arguments, **named):
        masks.append(named.get("attn_mask"))
        return real(*arguments, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    network(input_ids=data.batch(config, 0, 0, 0))
    assert [mask is not None for mask in masks] == [attention.windowed(config)] * network.config.num_hidden_layers


@pytest.mark.parametrize(
    ("capability", "overrides", "repeats"),
    [
        ((7, 0), ("train.precision=fp16",), True),
        ((9, 0), ("train.precision=fp32",), True),
        ((9, 0), ("attention=sdpa",), False),
        ((7, 0), ("train.precision=fp16", "attention=eager"), False),
        ((7, 0), ("train.precision=fp16", "model.num_key_value_heads=4"), False),
        (None, ("train.precision=fp32",), False),
    ],
)
def test_heads_are_repeated_where_the_fused_kernel_takes_no_groups(machine, capability, overrides, repeats) -> None:
    machine(capability)
    config = config_of("cuda" if capability else "cpu", "model=nano", *overrides)
    assert config.model.num_attention_heads == 4
    assert attention.repeats_heads(config, attention.choose(config)) is repeats


@pytest.mark.parametrize("window", [0, 16])
def test_repeated_heads_give_what_groups_give_without_asking_for_groups(machine, monkeypatch, window) -> None:
    beside = ("model.family=mistral", f"model.sliding_window={window}", "seq_len.tokens=48", "train.micro_batch_size=2")
    machine((7, 0))
    config = config_of("cuda", *PLAIN, "offload=none", "kernels.liger=false", "train.precision=fp32", *beside)
    network, tokens = model.build(select(config), torch.device("cpu")), data.batch(config, 0, 0, 0)
    assert network.config._attn_implementation == "sdpa_repeated_heads"
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention

    def note(query, key, value, **named):
        calls.append((query.shape, key.shape, value.shape, named))
        return real(query, key, value, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    logits = network(input_ids=tokens).logits
    for query, key, value, named in calls:
        assert query == key == value and not named.get("enable_gqa")
        assert named["is_causal"] == (not window) and (named["attn_mask"] is None) == (not window)
    assert len(calls) == network.config.num_hidden_layers
    network.set_attn_implementation("sdpa")
    torch.testing.assert_close(logits, network(input_ids=tokens).logits, atol=1e-5, rtol=1e-5)
    assert window or calls[-1][0] != calls[-1][1]  # plain SDPA does ask for groups


def test_of_torchs_reasons_only_those_of_cudnn_are_given() -> None:
    said = ["Memory efficient kernel not used because:", "It is disabled.", "CuDNN attention kernel not used because:",
            "one (Triggered internally at x.cpp:1.)", "two"]  # fmt: skip

    def attend() -> torch.Tensor:
        for text in said:
            warnings.warn(text, stacklevel=1)
        raise RuntimeError("No available kernel.  Aborting execution.")

    assert cudnn._reason(attend) == "one; two"
    said = said[3:]
    assert cudnn._reason(attend) == "one; two"
    said = []
    assert cudnn._reason(attend) == "torch gives no reason"


def test_every_kind_is_known_to_transformers_or_a_registered_kernel_file() -> None:
    folder = Path(attention_kernels.__file__).parent
    assert len(attention_kernels.NAMES) == len([path for path in folder.glob("*.py") if path.stem != "__init__"])
    for name in attention_kernels.NAMES:
        attention_kernels.register(name)
    assert {kind.name for kind in attention.SPECS} <= {"eager", *AttentionInterface()}
    assert {spec.family_flag for spec in attention.SPECS.values() if spec.family_flag} <= set(dir(PreTrainedModel))


def test_every_kind_has_its_spec_and_its_option() -> None:
    kinds = set(AttentionKind) - {AttentionKind.auto}
    assert kinds == attention.SPECS.keys()
    assert {kind.name for kind in AttentionKind} == set(options("attention"))
