"""What sharing a sequence needs of a model: tokens meet in attention alone. Held against whole sequences, without other processes.

The parts of a sequence are the rows of a batch, and attention joins them. A layer that mixes tokens elsewhere sees each row alone.
"""

from __future__ import annotations

import copy
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ldft.config import Config, ModelConfig, SeqLenConfig
from ldft.preflight.sequence_parallel import FAMILIES
from ldft.training import data, observation
from ldft.training.architecture import hf_config
from ldft.training.deepspeed import ulysses
from tests.conftest import compose

PARTS, TOKENS, HEADS, WIDTH = 2, 48, 4, 16
NAME = "joins_parts"
# Families with layers that have windows unless they are told otherwise: one that is longer than the sequence is none.
WINDOWED = ("cohere2", "exaone4", "gemma3_text", "ministral", "olmo3")
ONE_KEY_HEAD_EACH = ("gpt_neox",)  # as many key heads as query heads


def config_of(family: str, **values: Any) -> Config:
    model = ModelConfig(
        name="x", family=family, num_layers=4, hidden_size=HEADS * WIDTH, intermediate_size=128, num_attention_heads=HEADS,
        num_key_value_heads=HEADS if family in ONE_KEY_HEAD_EACH else 2, head_dim=WIDTH, vocab_size=256,
        max_position_embeddings=512, sliding_window=64 if family in WINDOWED else 0, **values,
    )  # fmt: skip
    return Config(model=model, seq_len=SeqLenConfig(tokens=TOKENS))


def joined(module: Any, query: Any, key: Any, value: Any, mask: Any, **named: Any) -> tuple[torch.Tensor, None]:
    """Attention over the rows of a batch as one sequence, as ulysses.register calls it."""
    wanted = [(PARTS, heads, TOKENS // PARTS, WIDTH) for heads in (HEADS, module.config.num_key_value_heads)]
    assert [query.shape, key.shape, value.shape] == [wanted[0], wanted[1], wanted[1]]
    assert named["position_ids"].flatten().tolist() == list(range(TOKENS))
    assert getattr(module, "is_causal", True) and not named.get("softcap")
    q, k, v = (one.transpose(0, 1).flatten(1, 2)[None] for one in (query, key, value))
    found = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=named.get("scaling"), enable_gqa=True
    )
    return found[0].unflatten(1, (PARTS, -1)).permute(1, 2, 0, 3), None


def built(config: Config, attention: str) -> Any:
    return AutoModelForCausalLM.from_config(hf_config(config.model), attn_implementation=attention).float().eval()


@torch.no_grad()
def difference(config: Config) -> float:
    """Of the logits of a sequence in parts from those of the whole one."""
    AttentionInterface.register(NAME, joined)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    torch.manual_seed(0)
    whole, parts = built(config, "eager"), built(config, NAME)
    for parameter in whole.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.1)
    parts.load_state_dict(copy.deepcopy(whole.state_dict()))
    tokens, positions = (one.view(PARTS, -1) for one in (torch.randint(256, (TOKENS,)), torch.arange(TOKENS)))
    wanted = whole(input_ids=tokens.view(1, -1)).logits
    found = parts(input_ids=tokens, position_ids=positions).logits.reshape(wanted.shape)
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_meet_in_attention_alone(family: str) -> None:
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip("not in this transformers")
    assert difference(config_of(family)) < 3e-6
    assert MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config(config_of(family).model))]._supports_sdpa


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("falcon_h1", {}),
        ("granitemoehybrid", {}),
        ("lfm2", {"layer_types": ["conv", "conv", "conv", "full_attention"]}),
        ("olmo_hybrid", {}),
        ("qwen3_5_text", {}),
    ],
)
def test_a_layer_that_mixes_tokens_elsewhere_is_seen(family: str, extra: dict[str, Any]) -> None:
    assert difference(config_of(family, extra=extra)) > 1e-3 and family not in FAMILIES


def test_the_document_names_these_families() -> None:
    text = (Path(__file__).parents[2] / "docs" / "sequence_parallel.md").read_text()
    found = re.search(r"^These families share sequences: (.*?)\.$", text, re.DOTALL | re.MULTILINE)
    assert found and tuple(re.findall(r"\w+", found[1])) == FAMILIES


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [2.0 + number for number in range(8)],
    "original_max_position_embeddings": 32,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


@pytest.mark.parametrize(
    ("family", "scaling"),
    [
        ("phi3", LONGROPE),
        *((family, one) for family in ("llama", "gemma3_text", "cohere") for one in (LONGROPE, DYNAMIC)),
    ],
)
def test_each_rank_rotates_by_the_length_of_the_whole_sequence(family: str, scaling: dict[str, Any]) -> None:
    config = config_of(family, rope_scaling=scaling)
    config.model.max_position_embeddings = 32  # above it, both types have other angles
    kinds = ["full_attention", "sliding_attention"] if family == "gemma3_text" else [None]
    config.model.extra = {"layer_types": kinds * 2} if len(kinds) == 2 else {}
    shown, plain = built(config, "eager"), built(config, "eager")
    ulysses.show_whole_length(shown, config)
    positions, x = torch.arange(TOKENS)[None], torch.zeros(1, 1, 1)
    seen = 0
    for (module, _), (reference, _) in zip(
        observation.rotary_embeddings(shown), observation.rotary_embeddings(plain), strict=True
    ):
        for kind in kinds:
            further = (kind,) if kind else ()
            alone = reference(x, positions[:, :24], *further)
            whole = reference(x, positions, *further)
            for part in (slice(0, 24), slice(24, 48)):
                for found, wanted in zip(module(x, positions[:, part], *further), whole, strict=True):
                    torch.testing.assert_close(found, wanted[:, part], rtol=0, atol=0)
                    assert found.is_contiguous()
            seen += not torch.equal(alone[0], whole[0][:, :24])
    assert seen, "the length makes a difference"


class Ranks:
    """Ranks as threads of this process, in the place of DeepSpeed's groups."""

    def __init__(self, count: int) -> None:
        self.count, self.local = count, threading.local()
        self._barrier, self._given = threading.Barrier(count, timeout=60), dict[int, Any]()

    def _all(self, mine: Any) -> list[Any]:
        self._given[self.local.rank] = mine
        self._barrier.wait()
        found = [self._given[rank] for rank in range(self.count)]
        self._barrier.wait()
        return found

    def all_to_all(self, group: Any, given: torch.Tensor) -> torch.Tensor:
        return torch.stack([one[self.local.rank] for one in self._all(given)])

    def all_gather(self, into: list[torch.Tensor], mine: torch.Tensor, group: Any) -> None:
        for to, one in zip(into, self._all(mine), strict=True):
            to.copy_(one)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_each_rank_has_the_key_heads_of_its_query_heads(monkeypatch, key_heads: int) -> None:
    """Four ranks, eight heads: with two key heads, the first two ranks need the first."""
    from deepspeed.runtime.sequence_parallel import ulysses_sp

    ranks, size, heads = Ranks(4), 4, 8
    for name, stand_in in (
        ("_dim_zero_all_to_all", ranks.all_to_all),
        ("register_all_to_all_group", lambda group: None),
        ("dist.all_gather", ranks.all_gather),
        ("dist.get_world_size", lambda group: ranks.count),
        ("dist.get_rank", lambda group=None: ranks.local.rank),
    ):
        monkeypatch.setattr(f"{ulysses_sp.__name__}.{name}", stand_in)
    monkeypatch.setattr(ulysses, "groups", lambda config: SimpleNamespace(get_sequence_parallel_group=lambda: "all"))
    config = compose("model=nano", "seq_len.tokens=48", "launch.num_ranks=4", "launch.sequence_parallel=4")
    config.model.num_attention_heads, config.model.num_key_value_heads = heads, key_heads
    torch.manual_seed(0)
    tensors: Any = [torch.randn(1, number, TOKENS, WIDTH) for number in (heads, key_heads, key_heads)]
    wanted = torch.nn.functional.scaled_dot_product_attention(
        tensors[0], tensors[1], tensors[2], is_causal=True, enable_gqa=True
    )
    found: dict[int, torch.Tensor] = {}
    lock = threading.Lock()

    def rank(number: int) -> None:
        ranks.local.rank = number
        with lock:  # each registers under the same name
            forward = AttentionInterface()[ulysses.register("sdpa", config)]
        mine = slice(number * TOKENS // size, (number + 1) * TOKENS // size)
        module: Any = torch.nn.Module()
        module.num_key_value_groups, module.is_causal = heads // key_heads, True
        positions = torch.arange(TOKENS)[None, mine]
        found[number], _ = forward(module, *(one[:, :, mine] for one in tensors), None, position_ids=positions)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = torch.cat([found[number] for number in range(size)], dim=1)
    torch.testing.assert_close(together.reshape(1, TOKENS, heads, WIDTH), wanted.transpose(1, 2))


@pytest.mark.parametrize("rank", range(4))
def test_groups_of_ranks_are_blocks_and_share_the_sequences_of_their_number(monkeypatch, rank: int) -> None:
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    comm = SimpleNamespace(is_initialized=lambda: True, get_world_size=lambda: 4, get_rank=lambda: rank, new_group=list)
    monkeypatch.setattr(parallel_state_sp, "dist", comm)
    for name in ("_SEQUENCE_PARALLEL_GROUP", "_SEQUENCE_DATA_PARALLEL_GROUP"):
        monkeypatch.setattr(parallel_state_sp, name, None)
    config = compose("model=nano", "seq_len.tokens=48", "launch.num_ranks=4", "launch.sequence_parallel=2")
    group = ulysses.groups(config).get_sequence_parallel_group()
    assert group == [[0, 1], [0, 1], [2, 3], [2, 3]][rank]
    whole = data.batch(config, 0, 0, rank // 2)
    assert not torch.equal(whole, data.batch(config, 0, 0, 1 - rank // 2))
    parts = [data.micro_batch(config, 0, 0, one).tokens for one in group]
    assert torch.equal(torch.cat(parts, dim=1), whole)
