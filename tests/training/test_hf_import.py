"""Reading a Hugging Face config.json: what becomes of its values, and one line for each file that ldft cannot use.

That published files give the published models: test_published_configs.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import CONFIG_MAPPING

from ldft.config import AttentionKind, ModelConfig
from ldft.errors import ConfigError
from ldft.preflight import families
from ldft.training import config_json, hf_import, model_option, verification
from ldft.training.architecture import hf_config
from tests.conftest import compose
from tests.training.test_published_configs import published

LLAMA, QWEN, PHI, GEMMA = (
    "meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-7B", "microsoft/Phi-4-mini-instruct", "google/gemma-3-4b-it",
)  # fmt: skip
Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Write a published config.json with changes (None takes a key out) and return its folder."""

    def write(name: str = LLAMA, **changes: Any) -> Path:
        values = published(name) | changes
        path = tmp_path / name.rpartition("/")[2]
        path.mkdir(exist_ok=True)
        kept = {key: value for key, value in values.items() if value is not None or key not in changes}
        (path / "config.json").write_text(json.dumps(kept))
        return path

    return write


def read(path: Path) -> hf_import.Imported:
    return hf_import.convert(config_json.read(str(path), ""))


def refusal(path: Path | str, hf_id: str = "") -> str:
    with pytest.raises(ConfigError) as error:
        hf_import.convert(config_json.read(str(path), hf_id))
    assert "\n" not in str(error.value)
    return str(error.value)


WRONG_VALUES: list[tuple[str, dict[str, Any], str]] = [
    (LLAMA, {"model_type": None}, "it has no model_type"),
    (LLAMA, {"model_type": "lama"}, "has no model_type 'lama'; did you mean"),
    (LLAMA, {"model_type": 7}, "has no model_type '7'"),
    (LLAMA, {"model_type": "baichuan_x", "auto_map": {"AutoConfig": "x.Y"}}, "its code is in the repository (auto_map)"),
    (LLAMA, {"model_type": "clip", "rope_scaling": None, "rope_theta": None}, "no causal language model for model_type=clip"),
    (LLAMA, {"model_type": "bert"}, "bert has no rotary position embedding, is_decoder=false"),
    (LLAMA, {"model_type": "gpt2"}, "gpt2 has no"),
    (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification is not a causal"),
    (LLAMA, {"architectures": ["XverseForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling_xverse.XverseForCausalLM"}},
     "architectures=XverseForCausalLM is no class of transformers' for model_type=llama; its code is in the repository (auto_map)"),
    (LLAMA, {"architectures": None, "auto_map": {"AutoModelForCausalLM": "modeling_xverse.XverseForCausalLM"}},
     "auto_map=XverseForCausalLM is no class of transformers' for model_type=llama"),
    (LLAMA, {"architectures": ["MistralForCausalLM"]}, "architectures=MistralForCausalLM is no class of transformers' for model"),
    (LLAMA, {"architectures": ["LLaMAForCausalLM"], "quantization_config": {}}, ""),
    (LLAMA, {"hidden_act": "swiglu_x"}, "transformers cannot build this llama (KeyError: 'swiglu_x')"),
    (LLAMA, {"hidden_size": 32 * 10**17, "head_dim": None}, "transformers cannot build this llama (RuntimeError"),
    (LLAMA, {"is_encoder_decoder": True}, "llama is an encoder-decoder"),
    (LLAMA, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config (fp8): the weights are quantised"),
    (LLAMA, {"quantization_config": {"quant_method": "mxfp4"}}, "=Mxfp4Config(dequantize=True), dtype='bfloat16')"),
    (LLAMA, {"quantization_config": {"quant_method": "gptq"}}, "choose the checkpoint that was not quantised, or dequantise it"),
    (LLAMA, {"quantization_config": {}}, ""),
    (LLAMA, {"compression_config": {"format": "x"}}, "compression_config: the weights are quantised"),
    (LLAMA, {"hidden_size": None}, "it has no hidden_size; fetch the whole file"),
    (LLAMA, {"num_hidden_layers": None, "vocab_size": None}, "it has no num_hidden_layers, vocab_size"),
    (LLAMA, {"hidden_size": "4096"}, "transformers refuses it (Field 'hidden_size' expected int"),
    (LLAMA, {"num_hidden_layers": 0}, "num_hidden_layers=0: ldft needs one positive whole number"),
    (LLAMA, {"num_hidden_layers": 2**63}, "num_hidden_layers=9223372036854775808 is too large; correct it, with at most 10000"),
    (GEMMA, {"text_config": {"model_type": "gemma3_text", "num_hidden_layers": 10001}}, "num_hidden_layers=10001 is too"),
    (LLAMA, {"num_attention_heads": -32}, "num_attention_heads=-32: ldft needs one positive"),
    (LLAMA, {"num_attention_heads": 0}, "config.json: "),
    (LLAMA, {"num_key_value_heads": 5}, "model.num_key_value_heads: 5 does not divide"),
    (LLAMA, {"rope_scaling": "llama3"}, "config.json: "),
    (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": "eight"}}, "config.json: "),
    (LLAMA, {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "'spiral' does not exist"),
    (LLAMA, {"rope_theta": -1.0}, "model.rope_theta: -1 is not positive"),
    (LLAMA, {"tie_word_embeddings": "yes"}, "config.json: "),
    (GEMMA, {"model_type": "gemma3n"}, "config.json: "),
    (GEMMA, {"text_config": {"model_type": "gemma3_text", "quantization_config": {"quant_method": "awq"}}}, "(awq)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "expected"), WRONG_VALUES)
def test_a_wrong_value_is_one_line_that_names_file_and_key(
    folder: Folder, name: str, changes: dict[str, Any], expected: str
) -> None:
    path = folder(name, **changes)
    if not expected:  # an empty section says nothing
        assert read(path).model.num_layers == 32
        return
    said = refusal(path)
    assert said.startswith(f"model.path: {path}/config.json: ") and expected in said, said


WRONG_FILES: dict[bytes, str] = {
    b"": "is not JSON",
    b"{": "is not JSON",
    b"\xff\xfe{}": "is not JSON",
    b"[]": "holds a list, not a JSON object",
    b"null": "holds null, not a JSON object",
    b'"llama"': "holds a text, not a JSON object",
    b"17": "holds a number, not a JSON object",
    b"[" * 100_000: "is not JSON",
    b"version https://git-lfs.github.com/spec/v1\n": "is not JSON",
    b"{}": "it has no model_type",
}


@pytest.mark.parametrize("content", WRONG_FILES, ids=lambda content: content[:12])
def test_a_file_that_is_no_config_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert WRONG_FILES[content] in refusal(tmp_path)


def test_folders_without_a_config_say_what_to_name_instead(tmp_path: Path) -> None:
    assert "does not exist; name the folder" in refusal(tmp_path / "none")
    assert "model.hf_id=Qwen/Qwen3-8B for the hub" in refusal("Qwen/Qwen3-8B")
    assert "name a folder written by save_pretrained" in refusal(tmp_path)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "config.json").touch()
    assert "name a folder in it that has one: inner" in refusal(tmp_path)
    for name, advice in (("x.gguf", "GGUF"), ("params.json", "original format"), ("adapter_config.json", "an adapter")):
        (tmp_path / name).touch()
        assert advice in refusal(tmp_path), name
    assert "is a file; name the folder" in refusal(tmp_path / "x.gguf")
    assert refusal("").startswith("model.path: empty; name the folder")


def test_the_hub_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    said = refusal("", "Qwen/Qwen3-8B")
    assert said.startswith("model.hf_id: Qwen/Qwen3-8B is not in the cache") and "HF_HUB_OFFLINE" in said
    assert "is not an id of the hub" in refusal("", "a/b/c")
    cached = tmp_path / "models--Qwen--Qwen3-8B"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    snapshot = cached / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(published("Qwen/Qwen3-8B")))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    found = config_json.read("", "Qwen/Qwen3-8B")
    assert (found.name, hf_import.convert(found).model.hf_id) == ("qwen3_8b", "Qwen/Qwen3-8B")
    assert config_json.read(str(snapshot), "").name == "qwen3_8b"  # of a folder in the hub's cache, too


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        (LLAMA, {"rope_scaling": None}, {"rope_scaling": {}}),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 4}}, {"rope_scaling": {"rope_type": "linear", "factor": 4}}),
        (LLAMA, {"num_key_value_heads": None}, {"num_key_value_heads": 32}),
        (LLAMA, {"head_dim": 64}, {"head_dim": 64}),
        (LLAMA, {"rms_norm_eps": 1e-6, "attention_bias": True}, {"extra": {"attention_bias": True}}),
        (LLAMA, {"initializer_range": 0.01}, {"extra": {"rms_norm_eps": 1e-5, "initializer_range": 0.01}}),
        (LLAMA, {"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
        (QWEN, {}, {"sliding_window": 0, "extra": {}}),
        (
            QWEN,
            {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 14},
            {"sliding_window": 4096, "extra": {"max_window_layers": 14}},
        ),
        (QWEN, {"use_sliding_window": True}, {"sliding_window": 0, "extra": {}}),  # from layer 28 on: there is none
        ("mistralai/Mistral-7B-Instruct-v0.3", {"sliding_window": 4096}, {"sliding_window": 4096}),
        ("mistralai/Mixtral-8x7B-v0.1", {}, {"num_experts": 8, "num_experts_per_token": 2, "router_aux_loss": 0.0, "extra": {}}),
        ("mistralai/Mixtral-8x7B-v0.1", {"output_router_logits": True}, {"router_aux_loss": 0.02}),
        ("Qwen/Qwen3-30B-A3B", {}, {"num_experts": 128, "expert_intermediate_size": 768, "extra": {"norm_topk_prob": True}}),
    ],
)  # fmt: skip
def test_values_arrive_under_their_keys(
    folder: Folder, name: str, changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    model = read(folder(name, **changes)).model
    assert {key: getattr(model, key) for key in expected} == expected


def test_what_is_left_out_is_said(folder: Folder) -> None:
    found = read(folder(PHI))
    assert found.unused == ["full_attn_mod", "interpolate_factor"] and found.notes == []


def test_keys_that_the_family_does_not_read_are_named(folder: Folder) -> None:
    found = read(folder(LLAMA, embedding_multiplier=12, rotary_pct=0.5))
    assert found.unused == ["embedding_multiplier", "rotary_pct"]
    assert found.said == ["transformers does not read these keys of the file: embedding_multiplier, rotary_pct"]
    assert read(folder(LLAMA, partial_rotary_factor=0.5)).unused == []  # it moves this one for every family
    neox = json.loads(CONFIG_MAPPING["gpt_neox"]().to_json_string(use_diff=False)) | {"rotary_pct": 0.25}
    path = folder(LLAMA)
    (path / "config.json").write_text(json.dumps(neox))
    assert read(path).unused == []  # its constructor reads it


@pytest.mark.parametrize(
    ("key", "value"),
    [("rms_norm_eps", 0.5), ("hidden_act", "gelu"), ("attention_bias", True), ("rope_parameters", {"rope_theta": 7.0})],
)
def test_what_ldft_would_build_otherwise_is_refused(
    folder: Folder, key: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if ldft lost this field on its way from the file to the model."""

    def lossy(model: ModelConfig) -> Any:
        built = hf_config(model)
        setattr(built, key, getattr(built, key) | value if isinstance(value, dict) else value)
        return built

    monkeypatch.setattr(hf_import, "hf_config", lossy)
    said = refusal(folder())
    assert f"{key}=" in said and "ldft cannot build this llama, it would have" in said


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "minicpm3"])
def test_a_head_whose_parts_are_rotated_apart_is_as_wide_as_both(family: str, tmp_path: Path) -> None:
    small = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
             "num_key_value_heads": 4, "vocab_size": 128, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
             "q_lora_rank": 24, "kv_lora_rank": 24}  # fmt: skip
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 1,
        "topk_group": 1,
    }
    kind = CONFIG_MAPPING[family]
    values = small | ({} if family == "minicpm3" else experts)
    (tmp_path / "config.json").write_text(json.dumps(json.loads(kind(**values).to_json_string(use_diff=False))))
    config = compose("model=nano", "launch.device=cpu", "seq_len.tokens=64")
    config.model = read(tmp_path).model
    assert config.model.head_dim == 24
    families.check(config.model, ())
    verification.check(verification.outline(hf_config(config.model), config.model), config, AttentionKind.sdpa)
    config.model.head_dim = 8
    with pytest.raises(
        ConfigError, match=r"^model.head_dim: 8, but .* of qk_nope_head_dim and qk_rope_head_dim \(16 \+ 8\); use 24"
    ):
        families.check(config.model, ())


@pytest.mark.parametrize(("beside", "inside", "tied"), [({}, {}, False), ({"tie_word_embeddings": True}, {}, True),
                                                        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, False),
                                                        ({}, {"tie_word_embeddings": True}, True)])  # fmt: skip
def test_the_tie_of_a_text_model_inside_another(
    beside: dict[str, bool], inside: dict[str, bool], tied: bool, tmp_path: Path
) -> None:
    """Mistral Small 3.1 names none: the text model that transformers makes of it is untied, its whole model's class is tied."""
    text = published("mistralai/Mistral-Nemo-Base-2407")
    text.pop("tie_word_embeddings", None)
    values = {
        "model_type": "mistral3",
        "text_config": text | inside,
        "vision_config": {"model_type": "pixtral"},
    } | beside
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read(tmp_path).model.tie_word_embeddings is tied


@pytest.mark.parametrize(
    ("family", "refused"),
    [
        ("deepseek_v3", ""),
        ("falcon_h1", ""),
        ("internlm3", ""),
        ("gpt_neox", ""),
        ("gemma4", "the layers of gemma4_text differ in shape"),
        ("phi4_multimodal", "audio_config, vision_config"),
        ("zamba2", ""),  # its code reads attention_head_dim, which its class does not declare
        ("mamba", "mamba has no"),
    ],
)
def test_a_family_that_nobody_tried_is_the_same_or_refused(family: str, refused: str, tmp_path: Path) -> None:
    values = json.loads(CONFIG_MAPPING[family]().to_json_string(use_diff=False))
    (tmp_path / "config.json").write_text(json.dumps(values))
    if refused:
        assert refused in refusal(tmp_path)
    else:
        assert read(tmp_path).model.family == family


def test_the_command_prints_an_option(folder: Folder, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["ldft.model", str(folder(PHI)), "--name", "mine"])
    assert model_option.main() == 0
    text = capsys.readouterr().out
    assert "3,836,021,760 parameters" in text and "full_attn_mod" in text
    model = read(folder(PHI)).model
    model.name = "mine"
    assert ModelConfig(**yaml.safe_load(text)) == model
    monkeypatch.setattr("sys.argv", ["ldft.model", str(folder() / "nothing")])
    assert model_option.main() == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("ldft: model.path: ") and err.count("\n") == 1
