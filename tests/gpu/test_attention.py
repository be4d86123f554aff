"""Attention on a GPU: each kind against plain products in fp32, both ways, and that the kernel which ran is the one asked for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv

from ldft.errors import ConfigError
from ldft.preflight import attention
from ldft.preflight.selection import select
from ldft.training import attention_kernels, model
from tests.gpu.machine import allocated, cuda_config, kinds

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

# A part of the kernels' names, as the profiler shows them.
KERNELS = {
    "sdpa_cudnn": "cudnn",
    "flash_attention_2": "flash_fwd",
    "flash_attention_3": "flash",
    "flash_attention_4": "flash",
}


KINDS = (
    [kind for kind in kinds(cuda_config("kernels.liger=false")) if kind != "eager"] if torch.cuda.is_available() else []
)


def run(kind: str, tensors: list[torch.Tensor], gradient: torch.Tensor) -> list[torch.Tensor]:
    """Output (batch, tokens, heads, head_dim) and the gradients of query, key and value."""
    attention_kernels.register(kind)
    query, key, value = (tensor.detach().requires_grad_() for tensor in tensors)
    module = SimpleNamespace(
        num_key_value_groups=query.shape[1] // key.shape[1],
        is_causal=True,
        training=True,
        config=SimpleNamespace(_attn_implementation=kind),
    )
    output, _ = AttentionInterface()[kind](module, query, key, value, None, scaling=query.shape[-1] ** -0.5)
    output.backward(gradient)
    return [output.detach(), query.grad, key.grad, value.grad]


def exact(tensors: list[torch.Tensor], gradient: torch.Tensor) -> list[torch.Tensor]:
    """The same from plain products in fp32."""
    query, key, value = (tensor.detach().float().requires_grad_() for tensor in tensors)
    groups, tokens = query.shape[1] // key.shape[1], query.shape[2]
    scores = query @ repeat_kv(key, groups).transpose(2, 3) * query.shape[-1] ** -0.5
    future = torch.ones(tokens, tokens, dtype=torch.bool, device="cuda").triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    output = (weights @ repeat_kv(value, groups)).transpose(1, 2)
    output.backward(gradient.float())
    return [output.detach(), query.grad, key.grad, value.grad]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("tokens", "heads", "kv_heads"), [(512, 4, 4), (777, 8, 2), (1, 4, 2), (65, 6, 1)])
def test_equals_plain_products_within_bf16(kind: str, head_dim: int, tokens: int, heads: int, kv_heads: int) -> None:
    if head_dim == 256 and kind in ("sdpa_cudnn", "flash_attention_4"):
        pytest.skip("wider than auto takes it; what happens then: test_wide_heads_run_right_or_are_refused")
    if tokens == 1 and kind == "sdpa_cudnn":
        pytest.skip("cuDNN takes no single token: test_what_cudnn_refuses_is_refused_with_its_reason")
    torch.manual_seed(tokens)
    shapes = [(2, heads, tokens, head_dim), (2, kv_heads, tokens, head_dim), (2, kv_heads, tokens, head_dim)]
    # As models make them: (batch, tokens, heads, head_dim) in memory.
    tensors = [torch.randn(b, t, h, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for b, h, t, d in shapes]
    gradient = torch.randn(2, tokens, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    for name, got, want in zip(
        ("output", "dq", "dk", "dv"), run(kind, tensors, gradient), exact(tensors, gradient), strict=True
    ):
        error = ((got.float() - want).norm() / want.norm().clamp(min=1e-6)).item()
        # A token alone attends to itself: gradients of query and key are nothing but rounding.
        assert error < 1e-2 or (tokens == 1 and name in ("dq", "dk") and got.float().abs().max() < 1e-2), (name, error)


def test_wide_heads_run_right_or_are_refused() -> None:
    if "sdpa_cudnn" not in KINDS:
        pytest.skip("no cuDNN attention here")
    tensors = [torch.randn(1, 4, 256, 256, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    gradient = torch.randn(1, 256, 4, 256, device="cuda", dtype=torch.bfloat16)
    try:
        results = run("sdpa_cudnn", tensors, gradient)
    except ConfigError as refused:
        assert "cuDNN refuses this" in str(refused)
        return
    for got, want in zip(results, exact(tensors, gradient), strict=True):
        assert ((got.float() - want).norm() / want.norm()).item() < 1e-2


@pytest.mark.parametrize(
    ("dtype", "tokens", "reason"), [(torch.float32, 64, "dtype"), (torch.bfloat16, 1, "sequence length 1")]
)
def test_what_cudnn_refuses_is_refused_with_its_reason(dtype: torch.dtype, tokens: int, reason: str) -> None:
    tensors = [torch.randn(1, 4, tokens, 64, device="cuda", dtype=dtype) for _ in range(3)]
    with pytest.raises(
        ConfigError, match=rf"attention.kind: sdpa_cudnn: cuDNN refuses this: [^;]*{reason}.*; use sdpa"
    ):
        run("sdpa_cudnn", tensors, torch.randn(1, tokens, 4, 64, device="cuda", dtype=dtype))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in KERNELS])
def test_the_kernel_that_runs_is_the_one_asked_for_also_when_recomputed(kind: str) -> None:
    tensors = [
        torch.randn(1, heads, 1024, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for heads in (8, 2, 2)
    ]
    module = SimpleNamespace(
        num_key_value_groups=4, is_causal=True, training=True, config=SimpleNamespace(_attn_implementation=kind)
    )
    attention_kernels.register(kind)

    def layer(*inputs: torch.Tensor) -> torch.Tensor:
        return AttentionInterface()[kind](module, *inputs, None, scaling=128**-0.5)[0]

    torch.utils.checkpoint.checkpoint(
        layer, *tensors, use_reentrant=False
    ).sum().backward()  # builds what is built once
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        torch.utils.checkpoint.checkpoint(layer, *tensors, use_reentrant=False).sum().backward()
    names = [event.name.lower() for event in seen.events() if event.device_type.name == "CUDA"]
    mine = [name for name in names if KERNELS[kind] in name]
    assert len(mine) >= 2, names  # once in forward, once more in backward
    if kind == "sdpa_cudnn":
        # cuDNN's own names say "flash", too.
        strangers = [name for name in names if any(part in name for part in ("flash", "fmha", "softmax"))]
        assert all(KERNELS[kind] in name for name in strangers), names


def test_fp32_with_grouped_heads_stores_no_scores() -> None:
    """torch's own fall-back for groups in fp32 would: 2 GiB for 8 heads of 8192 tokens."""
    config = cuda_config("model=nano", "model.num_attention_heads=8", "seq_len.tokens=8192", "offload=none",
                         "checkpointing=none", "kernels.liger=false", "train.precision=fp32")  # fmt: skip
    assert config.model.num_key_value_heads < 8
    network = model.build(select(config), torch.device("cuda"))
    peaks = {}
    for name in (network.config._attn_implementation, "sdpa"):
        network.set_attn_implementation(name)
        before = allocated()
        torch.cuda.reset_peak_memory_stats()
        hidden = torch.randn(1, 8192, config.model.hidden_size, device="cuda", requires_grad=True)
        network.model(inputs_embeds=hidden).last_hidden_state.sum().backward()
        peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
    assert peaks["sdpa_repeated_heads"] < 1 < 2 < peaks["sdpa"], peaks


@pytest.mark.parametrize(("tokens", "heads", "kv_heads"), [(512, 4, 4), (777, 8, 2), (1, 4, 2), (65, 6, 1)])
def test_repeated_heads_equal_plain_products_in_fp32(tokens: int, heads: int, kv_heads: int) -> None:
    torch.manual_seed(tokens)
    tensors = [torch.randn(2, tokens, h, 64, device="cuda").transpose(1, 2) for h in (heads, kv_heads, kv_heads)]
    gradient = torch.randn(2, tokens, heads, 64, device="cuda")
    for got, want in zip(run("sdpa_repeated_heads", tensors, gradient), exact(tensors, gradient), strict=True):
        assert (got - want).norm() <= 1e-4 * want.norm() + 1e-4


def test_auto_takes_cudnn_on_hopper() -> None:
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("neither Hopper nor Blackwell")
    assert attention.choose(cuda_config()).name == "sdpa_cudnn"
