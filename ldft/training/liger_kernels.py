"""Liger Kernel on one model: fused norms, rotary embedding and MLP by Liger's own patches, and a fused linear cross-entropy.

Liger patches instances, but also permanently replaces names in transformers' modules, which later models in the process would use.
ldft restores these names, and binds the rotary embedding, which depends on them, to the instance.

The loss is computed inside lm_head's own forward. Liger computes it outside, from lm_head.weight; but under ZeRO-3 that weight,
tied to the embedding or not, exists only while lm_head runs, gathered by its module's hooks.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

from ldft.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast

_ROPE = "apply_rotary_pos_emb"


def apply(model: PreTrainedModel) -> int:
    """Patch this model only. Returns the number of its modules that run Liger's kernels; raises ConfigError if none does."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    source = sys.modules[type(model).__module__]
    before = dict(vars(source))
    MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type](
        model=model, cross_entropy=False, fused_linear_cross_entropy=False
    )
    rope = vars(source)[_ROPE]
    vars(source).update(before)
    bind_rope(model, rope)
    bind_loss(model)
    count = count_modules(model)
    if not count:
        raise ConfigError("kernels.liger", f"true: nothing in {type(model).__name__} was patched; use false")
    return count


def count_modules(model: PreTrainedModel) -> int:
    """Number of the model's modules whose forward is Liger's or runs Liger's kernels."""
    functions = [
        getattr(vars(module).get("forward"), "__func__", None) for module in model.modules() if module is not model
    ]
    return sum(function.__module__.startswith(("liger_kernel.", __name__)) for function in functions if function)


def bind_rope(model: PreTrainedModel, rope: Any) -> None:
    """Give each attention module a copy of its class's forward with Liger's rotary embedding in its globals."""
    for module in model.modules():
        code = getattr(type(module).forward, "__code__", None)
        if code is None or _ROPE not in code.co_names:
            continue
        stock = type(module).forward
        function = types.FunctionType(
            code, {**stock.__globals__, _ROPE: rope}, stock.__name__, stock.__defaults__, stock.__closure__
        )
        function.__kwdefaults__, function.__module__ = stock.__kwdefaults__, __name__
        module.forward = types.MethodType(function, module)


def bind_loss(model: PreTrainedModel) -> None:
    """Make the model, in training with labels, return its loss without logits; lm_head computes the loss chunk by chunk."""
    import torch
    from liger_kernel.transformers.model.loss_utils import LigerForCausalLMLoss
    from transformers.modeling_outputs import CausalLMOutputWithPast

    softcap = getattr(model.config, "final_logit_softcapping", None)

    def loss(head: torch.nn.Linear, hidden: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        if labels is None:
            return torch.nn.functional.linear(hidden, head.weight, head.bias)
        fused: torch.Tensor = LigerForCausalLMLoss(
            hidden, head.weight, labels, hidden_size=hidden.shape[-1], final_logit_softcapping=softcap
        )
        return fused

    def forward(
        whole: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **others: Any
    ) -> CausalLMOutputWithPast:
        if labels is None or not whole.training:
            return type(whole).forward(whole, input_ids=input_ids, labels=labels, **others)
        hidden = whole.base_model(input_ids=input_ids, **others).last_hidden_state
        return CausalLMOutputWithPast(loss=whole.lm_head(hidden, labels))

    model.lm_head.forward = types.MethodType(loss, model.lm_head)
    model.forward = types.MethodType(forward, model)
