"""Checkpoints of families whose tensors transformers renames, stacks or ties: loaded as from_pretrained loads them, bit for bit."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from ldft.config import Config, Weights
from ldft.errors import ConfigError
from ldft.preflight.selection import select
from ldft.training import data, model
from tests.conftest import Done, compose, long
from tests.training.test_pretrained import CPU, one_whole_at_a_time, process_group  # noqa: F401

EXPERTS = ("model.num_experts=4", "model.num_experts_per_token=2")
# More than ten, so that their order as numbers is not that as text.
NARROW = ("model.num_experts=12", "model.num_experts_per_token=2", "model.expert_intermediate_size=32")
LATENT = (
    "{n_group:1,topk_group:1,first_k_dense_replace:1,q_lora_rank:16,kv_lora_rank:16,qk_nope_head_dim:8,qk_rope_head_dim:8,"
    "v_head_dim:16}"
)
# Family -> its further keys, and what its published tensors are called (a pattern that some of them must match).
FAMILIES: dict[str, tuple[tuple[str, ...], str]] = {
    "llama": ((), r"mlp\.up_proj\.weight"),
    "qwen2": ((), r"q_proj\.bias"),
    "gemma3_text": (("model.sliding_window=16",), r"pre_feedforward_layernorm"),
    "mixtral": (EXPERTS, r"block_sparse_moe\.experts\.3\.w1\.weight"),
    "qwen3_moe": (NARROW, r"mlp\.experts\.11\.gate_proj\.weight"),
    "phimoe": (EXPERTS, r"block_sparse_moe\.experts\.3\.w1\.weight"),
    "granitemoe": (EXPERTS, r"block_sparse_moe\.input_linear\.weight"),
    "deepseek_v3": (
        (*NARROW, "model.num_key_value_heads=4", f"model.extra={LATENT}"),
        r"mlp\.experts\.11\.gate_proj\.weight",
    ),
}
# Type in the files, train.precision.
COMBINATIONS = [("fp32", "bf16"), ("bf16", "fp32"), ("fp16", "bf16")]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@cache
def composed(family: str, *overrides: str) -> Config:
    return compose(
        "model=nano", "model.vocab_size=128", f"model.family={family}", *FAMILIES[family][0],
        "launch.device=cpu", "kernels.liger=off", "offload=none", *overrides,
    )  # fmt: skip


def built(family: str, *overrides: str, path: Path | None = None) -> PreTrainedModel:
    """A model, drawn or read from a folder."""
    config = deepcopy(composed(family, *overrides))
    if path:
        config.model.weights, config.model.path = Weights.pretrained, str(path)
    return model.build(select(config), CPU)


def saved(family: str, path: Path, dtype: str = "fp32", **options: Any) -> PreTrainedModel:
    """Save a random model of a family as transformers publishes it; every element, norms included, is drawn."""
    network = built(family, "train.precision=fp32")
    torch.manual_seed(3)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.normal_()
    network.to(DTYPES[dtype]).save_pretrained(path, **options)
    return network


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_bit_for_bit_as_from_pretrained(family: str, tmp_path: Path) -> None:
    for number, (stored, wanted) in enumerate(COMBINATIONS):
        folder = tmp_path / str(number)
        saved(family, folder, stored, max_shard_size="60KB")
        assert any(re.search(FAMILIES[family][1], name) for name in tensors(folder)), sorted(tensors(folder))
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[wanted]).state_dict()
        network = built(family, f"train.precision={wanted}", path=folder)
        for name, tensor in network.state_dict().items():
            # transformers keeps a few in fp32 against the precision asked for; DeepSpeed casts them all.
            expected = reference[name].to(tensor.dtype)
            assert torch.equal(tensor, expected), (name, stored, wanted)
            assert tensor.dtype == DTYPES[wanted]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "granitemoe"])
def test_names_as_in_memory_load_too(family: str, tmp_path: Path) -> None:
    network = saved(family, tmp_path / "published")
    (tmp_path / "memory").mkdir()
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()
               if name != "lm_head.weight"}, tmp_path / "memory" / "model.safetensors")  # fmt: skip
    for folder in ("published", "memory"):
        loaded = built(family, "train.precision=fp32", path=tmp_path / folder).state_dict()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_under_zero_3_one_parameter_is_whole_and_experts_are_the_same(
    family: str,
    process_group: None,  # noqa: F811
    tmp_path: Path,
) -> None:
    network = saved(family, tmp_path / "saved")
    with one_whole_at_a_time() as sizes:
        split = built(family, "offload=full", "train.precision=fp32", path=tmp_path / "saved")
    assert set(sizes) == {1}
    expected = network.state_dict()
    for name, tensor in split.state_dict(keep_vars=True).items():
        with deepspeed.zero.GatheredParameters(tensor) if isinstance(tensor, torch.nn.Parameter) else torch.no_grad():
            assert torch.equal(tensor, expected[name]), name


def rewritten(path: Path, change: Any) -> None:
    """Change the tensors of a folder of one file."""
    file = path / "model.safetensors"
    save_file(change(load_file(file)), file)


def test_the_text_part_of_a_multimodal_checkpoint_loads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = saved("gemma3_text", tmp_path)
    plain = tensors(tmp_path)
    for outer in ("language_model.model.", "model.language_model."):
        vision = {f"vision_tower.vision_model.encoder.layers.{n}.mlp.fc1.weight": torch.ones(2) for n in range(5)}
        rewritten(
            tmp_path,
            lambda _, outer=outer, vision=vision: (
                {name.replace("model.", outer, 1): plain[name] for name in plain} | vision
            ),
        )
        caplog.clear()
        with caplog.at_level(logging.WARNING, "ldft"):
            loaded = built("gemma3_text", "train.precision=fp32", path=tmp_path).state_dict()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in network.state_dict().items())
        told = [record.getMessage() for record in caplog.records if record.name.startswith("ldft")]
        assert len(told) == 1 and "are ignored: vision_tower." in told[0] and told[0].endswith("and 2 more")


def line(family: str, path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        built(family, *overrides, path=path)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def renamed(old: str, new: str) -> Any:
    return lambda held: {re.sub(old, new, name): tensor for name, tensor in held.items()}


def added(**more: torch.Tensor) -> Any:
    return lambda held: held | {name.replace("__", "."): tensor for name, tensor in more.items()}


def without(pattern: str) -> Any:
    return lambda held: {name: tensor for name, tensor in held.items() if not re.search(pattern, name)}


@pytest.mark.parametrize(
    ("family", "change", "says"),
    [
        ("llama", renamed("^", "policy."), "its names begin with 'policy.': the model was saved inside another"),
        ("llama", renamed(r"norm\.weight", "norm.gamma"), "an old name; rename gamma to weight and beta to bias"),
        ("llama", renamed("^model", "transformer"), "it has no tensor of llama, but transformer.embed_tokens.weight"),
        ("llama", without(r"layers\.1\.mlp\.up"), "has no tensor model.layers.1.mlp.up_proj.weight, which nano needs; choose"),
        ("llama", added(model__layers__1__self_attn__q_norm__weight=torch.ones(16)), "has model.layers.1.self_attn.q_norm.weight, "
         "which nano lacks: it would compute something else; choose the model="),
        ("llama", added(model__layers__0__self_attn__q_proj__bias=torch.ones(64)), "q_proj.bias, which nano lacks"),
        ("llama", added(lm_head__bias=torch.ones(64)), "has lm_head.bias, which nano lacks"),
        ("llama", added(lm_head__weight=torch.ones(128, 64)), "model.tie_word_embeddings: true, but lm_head.weight and "
         "model.embed_tokens.weight differ"),
        ("llama", added(norm__weight=torch.ones(64)), "model.norm.weight and norm.weight are both model.norm.weight of the model"),
        ("qwen2", without("bias"), "has no tensor model.layers.0.self_attn.q_proj.bias, which nano needs; choose the model="),
        ("mixtral", without(r"0\.\w+\.experts\.1\.w3"), "the files lack number 1 of .experts.*.w3.weight, of which "
         "model.layers.0.mlp.experts.gate_up_proj is made"),
        ("mixtral", without(r"0\.\w+\.experts\.3\.w3"), "transformers cannot make model.layers.0.mlp.experts.gate_up_proj of "),
        ("mixtral", without(r"experts\.3\."), "is [3, "),
        ("mixtral", without(r"\.gate\."), "has no tensor model.layers.0.mlp.gate.weight, which nano needs; choose"),
    ],
)  # fmt: skip
def test_names_that_do_not_fit_say_why(family: str, change: Any, says: str, tmp_path: Path) -> None:
    saved(family, tmp_path)
    rewritten(tmp_path, change)
    assert says in line(family, tmp_path)


def test_an_untied_model_of_a_tied_file_and_the_reverse(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    told = line("llama", tmp_path, "model.tie_word_embeddings=false")
    assert "has no tensor lm_head.weight, which nano needs; use model.tie_word_embeddings=true" in told
    # transformers reads a tied model from the output's name alone, and takes a copy for what it is.
    embedding = tensors(tmp_path)["model.embed_tokens.weight"]
    for change in (added(lm_head__weight=embedding.clone()), without("embed_tokens")):
        rewritten(tmp_path, change)
        loaded = built("llama", "train.precision=fp32", path=tmp_path)
        assert (
            torch.equal(loaded.model.embed_tokens.weight, embedding)
            and loaded.lm_head.weight is loaded.model.embed_tokens.weight
        )


def test_a_prefix_that_transformers_adds_or_removes_loads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = saved("llama", tmp_path)
    extra = {"rotary_emb.inv_freq": torch.ones(8), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    for change in (renamed("^model.", ""), renamed("^", "model."), lambda held: held | extra):
        saved("llama", tmp_path)
        rewritten(tmp_path, change)
        with caplog.at_level(logging.WARNING, "ldft"):
            loaded = built("llama", "train.precision=fp32", path=tmp_path).state_dict()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in network.state_dict().items())
        # A layer less is what model.num_layers=1 asks for.
        built("llama", "model.num_layers=1", path=tmp_path)
    assert not [record for record in caplog.records if record.name.startswith("ldft")]


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("-inf"), "infinity")])
def test_one_value_that_is_not_finite_is_named(value: float, kind: str, tmp_path: Path) -> None:
    saved("mixtral", tmp_path)
    bad = "model.layers.1.block_sparse_moe.experts.2.w3.weight"

    def spoil(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        held[bad].view(-1)[-1] = value
        return held

    rewritten(tmp_path, spoil)
    told = line("mixtral", tmp_path)
    assert told.startswith(f"model.path: {bad} in {tmp_path / 'model.safetensors'} contains {kind}: ")


def test_values_beyond_fp16_are_its_fault_not_the_files(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    rewritten(tmp_path, lambda held: held | {"model.norm.weight": torch.full((64,), 7e4)})
    built("llama", "train.precision=bf16", path=tmp_path)
    told = line("llama", tmp_path, "train.precision=fp16")
    assert told.startswith("train.precision: float16 cannot hold model.norm.weight, which has values up to 70000; use")
    assert told.endswith("use train.precision=bf16 or fp32")
    rewritten(tmp_path, lambda held: held | {"model.norm.weight": torch.full((64,), 3.4e38)})
    for precision in ("fp16", "bf16"):  # beyond bf16, too
        assert line("llama", tmp_path, f"train.precision={precision}").endswith("use train.precision=fp32")


def test_config_json_beside_them_is_not_needed(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    (tmp_path / "config.json").unlink()
    built("llama", path=tmp_path)


TWO_RANKS = ("model=nano", "model.vocab_size=128", "model.family=mixtral", *EXPERTS, "kernels.liger=off", "launch.device=cpu",
             "launch.num_ranks=2", "offload=full", "train.precision=fp32", "seq_len.tokens=64", "train.iterations=2",
             "train.warmup_iterations=1", "model.weights=pretrained")  # fmt: skip


def test_two_ranks_under_zero_3_start_from_the_saved_experts(ldft: Callable[..., Done], tmp_path: Path) -> None:
    network = saved("mixtral", tmp_path / "saved", max_shard_size="60KB")
    save_file({"vision_tower.patch.weight": torch.ones(2)}, tmp_path / "saved" / "model-vision.safetensors")
    listing = tmp_path / "saved" / "model.safetensors.index.json"
    owners = json.loads(listing.read_text())["weight_map"] | {"vision_tower.patch.weight": "model-vision.safetensors"}
    listing.write_text(json.dumps({"weight_map": owners}))
    overrides = (*TWO_RANKS, f"model.path={tmp_path / 'saved'}")
    done = ldft(base=overrides)
    assert done.exit_code == 0, done.stdout + done.stderr
    config = compose(*overrides)
    batches = [data.batch(config, 0, 0, rank) for rank in range(2)]
    with torch.no_grad():
        losses = [network.eval()(input_ids=batch, labels=batch).loss.item() for batch in batches]
    assert losses[0] != losses[1]
    assert done.row.loss[0] == pytest.approx(sum(losses) / 2, rel=1e-4)
    told = f"{tmp_path / 'saved'}: tensors that nano does not have are ignored: vision_tower.patch.weight"
    assert told in list(done.row.notes) and done.stdout.count(told) == 1


@long
def test_rank_0_alone_finds_a_nan_and_all_ranks_end(ldft: Callable[..., Done], tmp_path: Path) -> None:
    saved("mixtral", tmp_path / "saved")
    rewritten(tmp_path / "saved", lambda held: held | {"model.norm.weight": torch.full((64,), float("nan"))})
    done = ldft(base=(*TWO_RANKS, f"model.path={tmp_path / 'saved'}"), timeout_s=120)
    assert done.exit_code == 2
    assert done.stderr.startswith("ldft: model.path: model.norm.weight in ") and done.stderr.count("\n") == 1
