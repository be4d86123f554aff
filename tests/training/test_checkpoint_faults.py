"""Folders whose weights cannot be trained are refused by headers and config.json, in one line that says what was saved wrongly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, Mxfp4Config

from ldft.config import Config, Weights
from ldft.errors import ConfigError
from ldft.preflight.selection import select
from ldft.runner import checks
from ldft.training import checkpoint_faults, config_json, hf_import, safetensors_index
from tests.conftest import compose

LAYER = "model.layers.0.mlp.up_proj"


def plain() -> dict[str, torch.Tensor]:
    names = ["model.embed_tokens.weight", f"{LAYER}.weight", "model.norm.weight", "lm_head.weight"]
    return {name: torch.full((4, 4), 0.5, dtype=torch.bfloat16) for name in names}


@cache
def composed() -> Config:
    return compose("model=nano", "launch.device=cpu")


def refusal(path: Path) -> str:
    """The line with which the parent refuses a folder of weights."""
    config = deepcopy(composed())
    config.model.weights, config.model.path = Weights.pretrained, str(path)
    with pytest.raises(ConfigError) as refused:
        checks.check_inputs(select(config), fetch=True)
    line = str(refused.value)
    assert "\n" not in line and len(line) < 600
    return line


def test_plain_weights_pass(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        tensors = {name: tensor.to(dtype) for name, tensor in plain().items()}
        # What old releases saved beside the weights, of any type.
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
        tensors["model.embeddings.position_ids"] = torch.arange(8)
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": None}))
        entries = safetensors_index.index(tmp_path)
        checkpoint_faults.check(tmp_path, entries)
        assert {name: entry.shape for name, entry in entries.items()} == {n: tuple(t.shape) for n, t in tensors.items()}


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.int32, "I32"),
        (torch.bool, "BOOL"),
    ],
)
def test_quantised_types_name_the_tensor_and_its_type(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    save_file(plain() | {f"{LAYER}.weight": torch.ones(4, 4).to(dtype)}, tmp_path / "model.safetensors")
    line = refusal(tmp_path)
    assert line.startswith(
        f"model.path: the weights in {tmp_path} are quantised ({LAYER}.weight is {name}, not one of F32"
    )
    assert "choose the checkpoint that was not quantised, or dequantise it" in line


def test_doubles_are_not_called_quantised(tmp_path: Path) -> None:
    save_file(plain() | {"model.norm.weight": torch.ones(4, dtype=torch.float64)}, tmp_path / "model.safetensors")
    assert refusal(tmp_path).startswith("model.path: model.norm.weight is F64 in ")


@pytest.mark.parametrize(
    "scale",
    ["weight_scale_inv", "weight_scale", "weight_scale_2", "qweight", "qzeros", "weight.absmax", "weight.quant_map",
     "weight.quant_state.bitsandbytes__nf4", "SCB", "weight_zero_point", "weight_packed"],
)  # fmt: skip
def test_scales_left_beside_weights_are_refused(tmp_path: Path, scale: str) -> None:
    """The weights themselves were cast to bf16, so that only these tell."""
    save_file(plain() | {f"{LAYER}.{scale}": torch.ones(4)}, tmp_path / "model.safetensors")
    assert f"({LAYER}.{scale} is a quantiser's)" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "fp8"),
        ({"text_config": {"quantization_config": {"quant_method": "mxfp4"}}}, "mxfp4"),
        ({"quantization_config": {"load_in_4bit": True}}, "4bit"),
        ({"compression_config": {"format": "int"}}, "of an unnamed method"),
    ],
)
def test_a_quantization_config_names_its_method(tmp_path: Path, config: dict[str, object], method: str) -> None:
    save_file(plain(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert f"are quantised (quantization_config in config.json: {method});" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (lambda name: f"module.{name}", "inside DistributedDataParallel or DeepSpeed's engine was saved; save model.module"),
        (lambda name: f"_orig_mod.{name}", "under torch.compile was saved; save model._orig_mod"),
        (lambda name: name.replace(".mlp.", "._orig_mod.mlp."), "under torch.compile was saved"),
        (lambda name: f"_fsdp_wrapped_module.{name}", "under FSDP was saved"),
        (lambda name: f"base_model.model.{name}", "a PeftModel was saved; save what merge_and_unload returns"),
        (lambda name: name.replace("up_proj.weight", "up_proj.lora_A.weight"), "adapters was saved; save what merge_and_unload"),
        (lambda name: name.replace("up_proj.weight", "up_proj.base_layer.weight"), "adapters was saved"),
        (lambda name: f"_forward_module.{name}", "Lightning's strategy was saved"),
        (lambda name: name if name.startswith("lm_head") else "", "has only lm_head.weight: saved under ZeRO-3 without"),
    ],
)  # fmt: skip
def test_wrong_saves_are_told_by_their_names(tmp_path: Path, names: Callable[[str], str], says: str) -> None:
    save_file({names(name): tensor for name, tensor in plain().items() if names(name)}, tmp_path / "model.safetensors")
    assert says in refusal(tmp_path)


def test_empty_shapes_are_a_save_under_zero_3(tmp_path: Path) -> None:
    save_file(plain() | {"model.norm.weight": torch.empty(0)}, tmp_path / "model.safetensors")
    line = refusal(tmp_path)
    assert "model.norm.weight is [0] in" in line and "stage3_gather_16bit_weights_on_model_save" in line


def sharded(path: Path) -> Path:
    """Two shards and their index."""
    tensors = plain()
    owners: dict[str, str] = {}
    for number, names in enumerate((list(tensors)[:2], list(tensors)[2:]), 1):
        file = path / f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, file)
        owners |= dict.fromkeys(names, file.name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": owners}))
    return path


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 9976570304\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (LFS, "contains no weights, it is a git-lfs pointer to the weights; run git lfs pull"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "it is a web page that a download saved"),
        (b"\n  <HTML>\n", "it is a web page"),
        (b'{"error": "Access to this model is restricted"}', "it is a JSON text, as a server answers"),
        (b"PK\x03\x04" + b"\0" * 200, "it is a PyTorch file under another name"),
        (b"GGUF\x03\x00\x00\x00" + b"\0" * 200, "it is a GGUF file"),
        (b"", "is damaged or cut short (0 bytes)"),
        (b"\0" * 4096, "is damaged or cut short (4096 bytes)"),
        (b"\x02\0\0\0\0\0\0\0[]", "is damaged or cut short"),
        (b'\x10\0\0\0\0\0\0\0{"a":{"dtype":1}}', "is damaged or cut short"),
    ],
)
def test_what_lies_in_place_of_a_shard_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    file = sharded(tmp_path) / "model-00002-of-00002.safetensors"
    file.write_bytes(content)
    line = refusal(tmp_path)
    assert line.startswith(f"model.path: {file} ") and says in line


def test_any_broken_header_is_refused(tmp_path: Path) -> None:
    """Every byte of the header in turn: either the same tensors, or other names, or a refusal; never another exception."""
    file = tmp_path / "model.safetensors"
    save_file(plain(), file)
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    refused = 0
    for position in range(8 + length):
        for value in b'"9\xff':
            changed = bytes(content[:position]) + bytes([value]) + bytes(content[position + 1 :])
            file.write_bytes(changed)
            try:
                safetensors_index.index(tmp_path)
            except ConfigError as error:
                refused += "damaged or cut short" in str(error)
    assert refused > 2 * length


def test_a_shard_that_is_missing_or_not_the_one_promised(tmp_path: Path) -> None:
    second = sharded(tmp_path) / "model-00002-of-00002.safetensors"
    content = second.read_bytes()
    second.unlink()
    assert "lacks model-00002-of-00002.safetensors of its 2 shards; fetch it again" in refusal(tmp_path)
    second.symlink_to(tmp_path / "blobs" / "gone")
    assert f"cannot read {second} (No such file or directory); fetch it again" in refusal(tmp_path)
    second.unlink()
    save_file({"model.norm.weight": torch.ones(4)}, second)
    assert f"{second} has no tensor lm_head.weight, which" in refusal(tmp_path)
    save_file({"lm_head.weight": torch.ones(4), "model.embed_tokens.weight": torch.ones(4)}, second)
    assert "model.embed_tokens.weight is in model-00001-of-00002.safetensors and in" in refusal(tmp_path)
    second.write_bytes(content)
    listing = tmp_path / "model.safetensors.index.json"
    listing.unlink()  # without its index, the shards' own numbers tell whether all are here
    assert set(safetensors_index.index(tmp_path)) == set(plain())
    second.unlink()
    assert "lacks model-00002-of-00002.safetensors" in refusal(tmp_path)
    for text in ("[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "<html>", LFS.decode(), "\x00"):
        listing.write_text(text)
        assert f"{listing} is damaged; fetch it again" in refusal(tmp_path)


def test_the_files_that_transformers_reads_are_read(tmp_path: Path) -> None:
    save_file(plain(), tmp_path / "consolidated.safetensors")
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    assert "has only adapter_model.safetensors, an adapter or weights under their trainer's own names" in refusal(
        tmp_path
    )
    save_file(plain(), tmp_path / "model.safetensors")
    assert {entry.file.name for entry in safetensors_index.index(tmp_path).values()} == {"model.safetensors"}
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "kept")
    sharded(tmp_path)
    assert "has model.safetensors and the index of other files; remove what is stale" in refusal(tmp_path)


def test_what_the_line_for_mxfp4_advises_gives_weights_that_can_be_trained(tmp_path: Path) -> None:
    """A gpt-oss as it is published: experts in blocks of 32 numbers of 4 bits, with a scale for each block."""
    quantised, plain_folder = tmp_path / "quantised", tmp_path / "plain"
    AutoModelForCausalLM.from_config(
        GptOssConfig(
            num_hidden_layers=1, hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            vocab_size=64, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"],
        )
    ).bfloat16().save_pretrained(quantised)  # fmt: skip
    tensors = load_file(quantised / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.full((experts, outputs, inputs // 32), 127, dtype=torch.uint8)
    save_file(tensors, quantised / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((quantised / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (quantised / "config.json").write_text(json.dumps(config))
    line = refusal(quantised)
    assert "quantization_config=Mxfp4Config(dequantize=True), dtype='bfloat16')" in line
    assert "save_pretrained(..., save_original_format=False), and name its folder" in line
    loaded = AutoModelForCausalLM.from_pretrained(
        quantised, quantization_config=Mxfp4Config(dequantize=True), dtype="bfloat16"
    )
    loaded.save_pretrained(plain_folder, save_original_format=False)
    checkpoint_faults.check(plain_folder, safetensors_index.index(plain_folder))
    assert hf_import.convert(config_json.read(str(plain_folder), "")).model.family == "gpt_oss"
