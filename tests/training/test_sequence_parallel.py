"""Ranks that share sequences train as one rank with whole sequences does: gradients, their norm, losses and weights."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ldft.config import to_dict
from ldft.errors import CombinationError, ConfigError
from ldft.preflight import sequence_parallel
from ldft.preflight.selection import select
from ldft.runner import checks
from ldft.training.architecture import hf_config
from ldft.training.deepspeed import ulysses
from ldft.training.deepspeed.layout import UnknownLayoutError
from tests import rank_processes
from tests.conftest import IN_CI, compose, long

SCRIPT = Path(__file__).with_name("shared_sequences.py")
COMMON = (
    *("model=nano", "model.vocab_size=512", "seq_len.tokens=96", "launch.device=cpu", "train.precision=fp32"),
    *("offload=full", "memory.pinning=none", "train.iterations=3", "train.warmup_iterations=1"),
    "optimizer.gradient_clipping=0.5",  # active in each iteration
)
CASES = {
    "recomputed from the host": ("checkpointing=cpu",),
    "recomputed": ("checkpointing=gpu", "train.micro_batch_size=2"),
    "nothing recomputed": ("checkpointing=none", "train.gradient_accumulation_steps=2"),
    "attention kept": ("checkpointing=cpu", "checkpointing.keep_attention=host"),
    "two layers at a time": ("checkpointing=gpu", "checkpointing.every=2", "checkpointing.keep_attention=device"),
    "one key head": ("model.num_key_value_heads=1",),
    "tiles": ("checkpointing=gpu", "kernels.mlp_tiles=3"),
    "update beside": ("optimizer.overlap_step=true",),
    "stock update, Lion": ("optimizer=lion", "optimizer.fused_step=false"),
    "nothing offloaded": ("offload=zero3",),
    "adapters": ("lora=r16", "optimizer.gradient_clipping=0.2"),
    "few labels": (),
    # 96 tokens on two ranks: more than the original length together, fewer alone.
    "short and long angles": (
        "model.rope_scaling={rope_type: longrope, original_max_position_embeddings: 64, short_factor: [1,1,1,1,1,1,1,1], "
        "long_factor: [2,3,4,5,6,7,8,9]}",
        "model.max_position_embeddings=512",
    ),
    "angles by length": ("model.rope_scaling={rope_type: dynamic, factor: 2}", "model.max_position_embeddings=64"),
}
# Planted fault -> the case in which it is. Of a window nothing is planted but that it is not refused.
FAULTS = {
    "positions start at 0 on each rank": (),
    "labels shifted within each part": (),
    "each rank's own mean": (),
    "gradients are summed up, not scattered": ("optimizer.fused_step=false",),
    "stage 2": ("offload=optimizer",),
    "a window": ("model.family=mistral", "model.sliding_window=16"),
}


# The others repeat what these test, with further options.
QUICK = (
    "recomputed from the host",
    "few labels",
    "short and long angles",
    "each rank's own mean",
    "labels shifted within each part",
)
if not IN_CI:
    CASES, FAULTS = ({name: words for name, words in one.items() if name in QUICK} for one in (CASES, FAULTS))


def uneven(name: str) -> bool:
    return name in ("few labels", "each rank's own mean")


def trained(folder: Path, ranks: int, cases: dict[str, tuple[str, ...]], *more: str) -> dict[str, Any]:
    """What the ranks of shared_sequences.py found, by case. Faults are planted where there are several ranks."""
    folder.mkdir()
    described = {}
    for name, overrides in cases.items():
        config = compose(*COMMON, *overrides, f"launch.num_ranks={ranks}", *more)
        checks.resolve(config)
        fault = name if ranks > 1 and name in FAULTS else ""
        described[name] = {"config": to_dict(config), "uneven": uneven(name), "fault": fault}
    (folder / "cases.json").write_text(json.dumps(described))
    words = [str(folder / "cases.json"), str(folder / "found.pt")]
    with tempfile.TemporaryDirectory() as rendezvous:
        rank_processes.start_and_wait(SCRIPT, words, folder, ranks=ranks, LDFT_RENDEZVOUS_DIR=rendezvous)
    found: dict[str, Any] = torch.load(folder / "found.pt")
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """By number of ranks that share each sequence."""
    folder, every = tmp_path_factory.mktemp("shared"), CASES | FAULTS
    two = trained(folder / "two", 2, every, "launch.sequence_parallel=2")
    return {1: trained(folder / "one", 1, every), 2: two}


def apart(found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """Largest relative difference of a tensor."""
    assert found.keys() == reference.keys() and found
    return max(float((found[name] - one).norm() / one.norm().clamp(min=1e-12)) for name, one in reference.items())


def differences(found: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    numbers = {name: torch.tensor(found[name], dtype=torch.float64) for name in ("losses", "norms")}
    wanted = {name: torch.tensor(reference[name], dtype=torch.float64) for name in numbers}
    whole = {name: apart(found[name], reference[name]) for name in ("gradients", "weights")}
    return whole | {name: apart({name: numbers[name]}, {name: wanted[name]}) for name in numbers}


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one(results, name: str) -> None:
    reference = results[1][name]
    assert min(reference["norms"]) > (0.2 if name == "adapters" else 0.5), "clipping is active"
    found = differences(results[2][name], reference)
    # What Adam makes of gradients near 0, as the adapters' first ones are, is their noise.
    weights = found.pop("weights")
    assert max(found.values()) < 1e-6 and weights < (1e-5 if name == "adapters" else 1e-6), (found, weights)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(results, name: str) -> None:
    found = differences(results[2][name], results[1][name])
    assert max(found.values()) > 1e-3, found


@long
def test_groups_of_ranks_have_sequences_of_their_own(tmp_path: Path) -> None:
    """Two groups of two, as one rank with two micro-batches."""
    cases: dict[str, tuple[str, ...]] = {"groups": ("checkpointing=cpu",)}
    four = trained(tmp_path / "four", 4, cases, "launch.sequence_parallel=2")["groups"]
    one = trained(tmp_path / "one", 1, cases, "train.gradient_accumulation_steps=2")["groups"]
    found = differences(four, one)
    assert max(found.values()) < 1e-6, found


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("offload=optimizer",), r"launch.sequence_parallel: 2: needs offload.stage=3: .*; use offload=full"),
        (("seq_len.tokens=97",), r"seq_len.tokens: 97 is not divisible by launch.sequence_parallel=2; use 96 or 98"),
        (
            ("model.num_attention_heads=3", "model.num_key_value_heads=3"),
            r"the model's 3 heads over 3 key heads .*; use 1, or launch.num_ranks=3 with launch.sequence_parallel=3$",
        ),
        (
            ("model.num_attention_heads=6", "model.num_key_value_heads=3"),
            r"6 heads over 3 key heads .*; use 1, or .*=3",
        ),
        # First what no number of tokens changes.
        (
            ("seq_len.tokens=97", "model.num_attention_heads=1", "model.num_key_value_heads=1"),
            r"the model's 1 heads over 1 key heads .*; use 1$",
        ),
        (
            (
                "launch.num_ranks=6",
                "launch.sequence_parallel=3",
                "model.num_attention_heads=12",
                "model.num_key_value_heads=4",
            ),
            r"12 heads over 4 key heads .*; use 2$",
        ),
        (("model=gemma2_9b",), r"launch.sequence_parallel: 2: soft caps \(model.attention_softcap=50\) .*; use 1$"),
        (("model.family=lfm2",), r"launch.sequence_parallel: 2: transformers' lfm2 is not known .*; use 1, or a model"),
        (
            ("model.family=qwen3", "+model.extra.layer_types=[full_attention,linear_attention]"),
            r"layers of type linear_attention \(model.extra.layer_types\) are not shared; use 1$",
        ),
        (
            ("model.family=gemma", "+model.extra.use_bidirectional_attention=true"),
            r"attention is causal where .*; use 1, or leave out model.extra.use_bidirectional_attention$",
        ),
        (
            ("model.family=mistral", "model.sliding_window=16"),
            r"launch.sequence_parallel: 2: windows \(model.sliding_window=16\) are not shared; use 1",
        ),
        (
            ("attention=eager", "checkpointing.keep_attention=none"),
            r"attention.kind: eager does not work with .*=2; use one of sdpa,",
        ),
        (
            ("model=qwen3_30b_a3b", "model.num_layers=2"),
            r"launch.sequence_parallel: 2: models with experts are not shared; use 1",
        ),
        (
            ("+offload.deepspeed.zero_optimization.reduce_scatter=false",),
            r"offload.deepspeed.zero_optimization.reduce_scatter: false: gradients would be 2 times too large",
        ),
    ],
)
def test_what_cannot_be_shared_is_one_line(overrides: tuple[str, ...], said: str) -> None:
    config = compose(*COMMON, "launch.num_ranks=2", "launch.sequence_parallel=2", *overrides)
    config.validate()
    with pytest.raises(CombinationError, match=said):
        select(config)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("lora=r16", "lora.dropout=0.1"), "lora.dropout=0.1"),
        (("model.family=seed_oss",), "seed_oss's attention_dropout, seed_oss's residual_dropout"),
        (
            ("model.family=seed_oss", "+model.extra.attention_dropout=0", "+model.extra.residual_dropout=0.2"),
            "model.extra.residual_dropout=0.2",
        ),
        ((), ""),
    ],
)
def test_what_is_dropped_at_random_is_said(overrides: tuple[str, ...], said: str) -> None:
    found = sequence_parallel.notes(compose(*COMMON, "launch.num_ranks=2", "launch.sequence_parallel=2", *overrides))
    assert not sequence_parallel.notes(compose(*COMMON, *overrides))
    assert bool(found) == bool(said) and all(f"launch.sequence_parallel: {said}: " in one for one in found)


def test_families_that_drop_by_themselves_are_known() -> None:
    for family in sequence_parallel.FAMILIES:
        if family in CONFIG_MAPPING:
            values = CONFIG_MAPPING[family]().to_dict()
            dropping = {name for name, value in values.items() if sequence_parallel._drops(name) and value}
            assert dropping - {"classifier_dropout"} == set(sequence_parallel._DROPS.get(family, ()))


def test_the_key_that_deepspeed_reads_depends_on_the_ranks() -> None:
    all_ranks, shared = "communication_data_type", "seq_parallel_communication_data_type"
    for key, read, ranks in (
        (all_ranks, shared, ("launch.num_ranks=2", "launch.sequence_parallel=2")),
        (shared, all_ranks, ()),
    ):
        assert select(compose(*COMMON, *ranks, f"+offload.deepspeed.{read}=bf16")).deepspeed[read] == "bf16"
        said = rf"^offload.deepspeed.{key}: bf16 has no effect with launch.sequence_parallel=\d; set {read}$"
        with pytest.raises(ConfigError, match=said):
            select(compose(*COMMON, *ranks, f"+offload.deepspeed.{key}=bf16"))
        # Both, as in a sweep over the ranks.
        select(compose(*COMMON, *ranks, *(f"+offload.deepspeed.{one}=bf16" for one in (key, read))))


@pytest.mark.parametrize("kernel", ["sdpa", "sdpa_cudnn", "flash_attention_2"])
def test_transformers_builds_a_model_with_each_shared_attention(monkeypatch, kernel: str) -> None:
    """It would look for a kernel of its own behind a name with "flash" in it, and flash-attn may not be here."""
    groups = SimpleNamespace(get_sequence_parallel_group=lambda: None)
    monkeypatch.setattr(ulysses, "groups", lambda config: groups)
    monkeypatch.setattr(ulysses, "_of_deepspeed", lambda: (groups, lambda **named: None))
    config = compose(*COMMON, "launch.num_ranks=2", "launch.sequence_parallel=2")
    name = ulysses.register(kernel, config)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(hf_config(config.model), attn_implementation=name)
    assert network.config._attn_implementation == name


@pytest.mark.parametrize(
    ("module", "name"), [("parallel_state_sp", "_SEQUENCE_PARALLEL_GROUP"), ("ulysses_sp", "UlyssesSPAttentionHF")]
)
def test_a_release_of_deepspeed_that_renamed_something_is_one_line(monkeypatch, module: str, name: str) -> None:
    monkeypatch.delattr(f"deepspeed.runtime.sequence_parallel.{module}.{name}")
    config = compose(*COMMON, "launch.num_ranks=2", "launch.sequence_parallel=2")
    with pytest.raises(
        UnknownLayoutError, match=rf"^DeepSpeed [\d.]+: .*{name}.*; install deepspeed==0.19.8, or see docs/upgrading"
    ):
        ulysses.groups(config)
