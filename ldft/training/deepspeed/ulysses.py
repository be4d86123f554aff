"""Sequences that several ranks share (launch.sequence_parallel): attention through DeepSpeed's UlyssesSPAttentionHF.

Its own registration replaces a kernel of transformers for the whole process. Here the wrapper gets a name of its own, and wraps
ldft's kernels as well. It discards masks, so windows are refused (preflight/sequence_parallel.py); positions make causality right.
Rotary embeddings see the length of the whole sequence, by which some choose their angles.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ldft.config import Config, rope
from ldft.preflight import sequence_parallel
from ldft.training import attention_kernels, observation
from ldft.training.deepspeed.layout import TESTED, UnknownLayoutError


def groups(config: Config) -> Any:
    """What DeepSpeed asks for its groups of ranks, made at the first call; None if each rank has sequences of its own. Needs the
    process group."""
    size = config.launch.sequence_parallel
    if size == 1:
        return None
    parallel_state_sp, _ = _of_deepspeed()
    if parallel_state_sp._SEQUENCE_PARALLEL_GROUP is None:
        parallel_state_sp.initialize_sequence_parallel(size)
    return parallel_state_sp


def _of_deepspeed() -> tuple[Any, Any]:
    """Its groups of ranks, and the class around attention; imported only by who shares sequences. Raises UnknownLayoutError."""
    try:
        from deepspeed.runtime.sequence_parallel import parallel_state_sp
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        parallel_state_sp._SEQUENCE_PARALLEL_GROUP  # noqa: B018 - is it there?
    except (ImportError, AttributeError) as error:
        raise UnknownLayoutError(
            f"DeepSpeed {deepspeed.__version__}: {error}, where ldft finds what shares sequences (tested with {TESTED}); install "
            "deepspeed==0.19.8, or see docs/upgrading_deepspeed.md"
        ) from None
    return parallel_state_sp, UlyssesSPAttentionHF


def register(kernel: str, config: Config) -> str:
    """Make transformers know an attention that exchanges heads for tokens around this kernel. Returns its name."""
    attention_kernels.register(kernel)
    model, size = config.model, config.launch.sequence_parallel
    _, wrapper = _of_deepspeed()
    shared = wrapper(
        attn=_core(kernel),
        batch_size=config.train.micro_batch_size,
        attn_head_count=model.num_attention_heads,
        attn_head_size=model.head_dim,
        kv_head_count=model.num_key_value_heads,
        num_hidden_layers=model.num_layers,
        process_group=groups(config).get_sequence_parallel_group(),
        local_seq_length=config.seq_len.tokens // size,
        global_seq_length=config.seq_len.tokens,
    )

    def forward(module: torch.nn.Module, query: Any, key: Any, value: Any, mask: Any, **named: Any) -> Any:
        return shared(module, query, key, value, None, **named)

    name = sequence_parallel.attention_name(kernel, config)
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, lambda *_, **__: None)
    return name


def show_whole_length(model: PreTrainedModel, config: Config) -> None:
    """Let rotary embeddings choose their angles by the length of the sequence. transformers takes the last position that it sees,
    which is another one on each rank."""
    kinds = {parameters["rope_type"] for parameters in config.model.rope_parameters().values()}
    if kinds & set(rope.BY_LENGTH):
        for module, _ in observation.rotary_embeddings(model):
            module.forward = _seeing(module.forward, config.seq_len.tokens - 1)


def _seeing(forward: Callable[..., Any], last: int) -> Callable[..., Any]:
    """The forward of a rotary embedding, with the last position of the sequence behind a rank's own."""

    def whole(x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **named: Any) -> Any:
        positions = torch.nn.functional.pad(position_ids, (0, 1), value=last)
        # Contiguous, because Liger's kernel counts on it.
        return tuple(one[:, :-1].contiguous() for one in forward(x, positions, *args, **named))

    return whole


def _core(kernel: str) -> Any:
    """The kernel's function. That of flash-attn looks up its own name in the module's config, where now stands the wrapper's."""
    function = ALL_ATTENTION_FUNCTIONS[kernel]
    if not kernel.startswith("flash_attention"):
        return function

    def flash(module: torch.nn.Module, *tensors: Any, **named: Any) -> Any:
        alike = SimpleNamespace(
            is_causal=getattr(module, "is_causal", True), config=SimpleNamespace(_attn_implementation=kernel)
        )
        return function(alike, *tensors, **named)

    return flash
