"""The model: a Hugging Face id and the full architecture, so that random weights need no download."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ldft.config import rope
from ldft.errors import ConfigError

# A list with an entry for each layer is made long before a model is; the deepest published models have some hundred layers.
MOST_LAYERS = 10_000


class Weights(Enum):
    """random: drawn from train.seed; pretrained: safetensors from a local folder (model.path) or the hub (model.hf_id)."""

    random = "random"
    pretrained = "pretrained"


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    name: str = "custom"
    """Short name, kept in the row."""

    hf_id: str = ""
    """Hugging Face hub id under which the architecture was published; empty for ldft's own models."""

    family: str = "llama"
    """Architecture family: the `model_type` of transformers (llama, qwen2, mistral, gemma2, ...)."""

    weights: Weights = Weights.random
    """Initial weights."""

    path: str = ""
    """Folder with the safetensors of model.weights=pretrained; empty fetches model.hf_id from the hub."""

    num_layers: int = 2
    """Decoder layers."""

    hidden_size: int = 64
    """Width of the residual stream, elements."""

    intermediate_size: int = 256
    """Width of the MLP, elements."""

    num_attention_heads: int = 4
    """Query heads."""

    num_key_value_heads: int = 4
    """Key and value heads (fewer than query heads: grouped-query attention)."""

    head_dim: int = 16
    """Width of a head, elements."""

    num_experts: int = 0
    """Routed experts of a mixture-of-experts layer; 0 for a dense model."""

    num_experts_per_token: int = 0
    """Routed experts that compute each token; 0 for a dense model."""

    expert_intermediate_size: int = 0
    """Width of one routed expert's MLP, elements; 0 for model.intermediate_size."""

    router_aux_loss: float = 0.0
    """Coefficient of the router's load-balancing loss, which is added to the loss; 0 for none."""

    vocab_size: int = 256
    """Rows of the token embedding."""

    max_position_embeddings: int = 131072
    """Longest sequence the model was published for, tokens. Longer sequences run, but output quality is not guaranteed."""

    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""

    rope_scaling: dict[str, Any] = field(default_factory=dict)
    """transformers' rope scaling parameters (rope_type, factor, ...), or one such dict for each layer type of a family that reads
    one (full_attention, sliding_attention); empty for none."""

    sliding_window: int = 0
    """Attention window, tokens, of the layers that have one (the family decides which); 0 for no window."""

    attention_softcap: float = 0.0
    """Cap of tanh soft capping on attention scores; 0 for none. SDPA does not support it."""

    logit_softcap: float = 0.0
    """Cap of tanh soft capping on the output logits; 0 for none."""

    tie_word_embeddings: bool = False
    """Whether the output projection is the token embedding."""

    extra: dict[str, Any] = field(default_factory=dict)
    """Further keys of the family's transformers config (norms, activation, scalars), passed through unchanged."""

    def validate(self) -> None:
        for key in ("num_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
                    "head_dim", "vocab_size", "max_position_embeddings"):  # fmt: skip
            if getattr(self, key) < 1:
                raise ConfigError(f"model.{key}", f"{getattr(self, key)} is too small; use 1 or more")
        if self.num_layers > MOST_LAYERS:
            raise ConfigError("model.num_layers", f"{self.num_layers} is too large; use at most {MOST_LAYERS}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                "model.num_key_value_heads",
                f"{self.num_key_value_heads} does not divide model.num_attention_heads={self.num_attention_heads}; "
                "use a divisor",
            )
        if self.head_dim % 2:
            raise ConfigError(
                "model.head_dim",
                f"{self.head_dim} is odd, but rotary position embedding rotates pairs; use an even number",
            )
        for key in ("sliding_window", "attention_softcap", "logit_softcap"):
            if not getattr(self, key) >= 0:
                raise ConfigError(f"model.{key}", f"{getattr(self, key):g} is negative; use 0 for none, or more")
        self._validate_experts()
        if not self.rope_theta > 0:
            raise ConfigError("model.rope_theta", f"{self.rope_theta:g} is not positive; use the base of the family")
        self.rope_parameters()
        if self.weights is Weights.pretrained and not self.path and not self.hf_id:
            raise ConfigError(
                "model.path", f"empty, and {self.name} is not on the hub; name a folder with its safetensors"
            )
        if self.weights is Weights.random and self.path:
            raise ConfigError("model.path", f"'{self.path}' is not read with model.weights=random; use pretrained")

    def _validate_experts(self) -> None:
        for key in ("num_experts", "num_experts_per_token", "expert_intermediate_size", "router_aux_loss"):
            if not getattr(self, key) >= 0:
                raise ConfigError(f"model.{key}", f"{getattr(self, key):g} is negative; use 0 for none, or more")
            if not self.num_experts and getattr(self, key):
                raise ConfigError(
                    f"model.{key}",
                    f"{getattr(self, key):g} has no effect without experts; set model.num_experts, or use 0",
                )
        if self.num_experts and not 1 <= self.num_experts_per_token <= self.num_experts:
            raise ConfigError(
                "model.num_experts_per_token",
                f"{self.num_experts_per_token} of model.num_experts={self.num_experts} is not possible; "
                f"use 1 to {self.num_experts}",
            )

    def rope_parameters(self) -> dict[str, dict[str, Any]]:
        """Parameters of the rotary position embedding as asked for, by layer type: rope.normalised."""
        # In DeepSeek's attention a part of each head is not rotated.
        rotated = self.extra.get("qk_rope_head_dim")
        return rope.normalised(
            self.rope_scaling,
            theta=self.rope_theta,
            head_dim=rotated if isinstance(rotated, int) else self.head_dim,
            original=self.extra.get(rope.ORIGINAL),
            family=self.family,
        )
