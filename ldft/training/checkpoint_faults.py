"""Weights that cannot be trained as they are: quantised, cut up by ZeRO-3, or saved from a wrapper. Recognised by the headers of
their files and the JSON files beside them, before anything is read. Imports no torch: the parent uses it too.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ldft.errors import ConfigError
from ldft.training.safetensors_index import Entry

DTYPES = ("F32", "F16", "BF16")
# Masks, positions and counters that old checkpoints keep beside the weights; they may be of any type.
_NOT_WEIGHTS = re.compile(r"(^|\.)(position_ids|masked_bias|(attn|attention|self_attn)\.bias|num_batches_tracked)$")
# What quantisers save beside a weight, or instead of it: names that no model gives to a parameter.
_SCALES = re.compile(
    r"(_scale_inv|\.weight_(global_)?scales?(_2)?|\.weight_zero_point|\.weight_packed|\.qweight|\.qzeros|\.absmax|\.quant_map|"
    r"\.quant_state\.\w+|\.SCB|_proj_(blocks|scales))$"
)
# Files that quantisers write beside config.json.
_QUANTISER_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_UNQUANTISED = (
    "choose the checkpoint that was not quantised, or dequantise it (transformers: from_pretrained, dequantize, "
    "save_pretrained)"
)
# Methods whose weights transformers turns into plain ones while it loads them, and its class for that.
_AT_LOADING = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
# In the names of tensors -> what was saved, and what to save instead.
_WRAPPERS = {
    r"(^|\.)_orig_mod\.": ("a model under torch.compile", "save model._orig_mod"),
    r"(^|\.)(_fsdp_wrapped_module\.|_flat_param)": ("a model under FSDP", "save its full state dict"),
    r"(^|\.)_checkpoint_wrapped_module\.": ("a model inside checkpoint wrappers", "save the model without them"),
    r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.|$)|\.base_layer\.|\.modules_to_save\.": (
        "a model with adapters",
        "save what merge_and_unload returns",
    ),
    r"^base_model\.model\.": ("a PeftModel", "save what merge_and_unload returns"),
    r"^_forward_module\.": ("a model inside Lightning's strategy", "save the module inside"),
    r"^module\.": ("a model inside DistributedDataParallel or DeepSpeed's engine", "save model.module"),
}


def check(path: Path, entries: dict[str, Entry]) -> None:
    """Raise ConfigError if the weights of a folder cannot be trained as they are, and say what was saved wrongly.

    entries: every tensor of the folder, by name.
    """
    _check_quantised(path, entries)
    for name, entry in entries.items():
        if 0 in entry.shape:
            raise ConfigError(
                "model.path",
                f"{name} is {list(entry.shape)} in {entry.file}: saved under ZeRO-3 without gathering its parts; save with "
                "stage3_gather_16bit_weights_on_model_save=true, or convert the checkpoint by its zero_to_fp32.py",
            )
    for pattern, (saved, instead) in _WRAPPERS.items():
        for name in entries:
            if re.search(pattern, name):
                raise ConfigError("model.path", f"{path} has {name}: {saved} was saved; {instead}")
    if entries and all(name.startswith("lm_head.") for name in entries):
        raise ConfigError(
            "model.path",
            f"{path} has only {', '.join(sorted(entries))}: saved under ZeRO-3 without gathering the rest; save with "
            "stage3_gather_16bit_weights_on_model_save=true, or convert the checkpoint by its zero_to_fp32.py",
        )


def unquantised(method: str) -> str:
    """What to do about quantised weights: the fix of an error. method: quant_method of their quantization_config."""
    if method not in _AT_LOADING:
        return _UNQUANTISED
    # In the original format, the plain weights keep the names of quantised ones.
    return (
        f"save a bf16 copy with transformers, from_pretrained(..., quantization_config={_AT_LOADING[method]}(dequantize=True), "
        "dtype='bfloat16') and save_pretrained(..., save_original_format=False), and name its folder"
    )


def _check_quantised(path: Path, entries: dict[str, Entry]) -> None:
    methods = _methods(_config_json(path))
    signs = [f"{name} lies beside them" for name in _QUANTISER_FILES if (path / name).is_file()]
    signs += [f"quantization_config in config.json: {method}" for method in methods]
    other = [
        (name, entry) for name, entry in entries.items() if entry.dtype not in DTYPES and not _NOT_WEIGHTS.search(name)
    ]
    if other and other[0][1].dtype in ("F64", "C64") and not signs:
        name, entry = other[0]
        raise ConfigError(
            "model.path", f"{name} is {entry.dtype} in {entry.file}; save the model in one of {', '.join(DTYPES)}"
        )
    signs += [f"{name} is {entry.dtype}, not one of {', '.join(DTYPES)}" for name, entry in other[:1]]
    signs += [f"{name} is a quantiser's" for name in entries if _SCALES.search(name)][:1]
    if signs:
        raise ConfigError(
            "model.path",
            f"the weights in {path} are quantised ({'; '.join(signs)}); {unquantised(''.join(methods[:1]))}",
        )


def _config_json(path: Path) -> Any:
    """What the config.json beside the weights holds; None if there is none."""
    file = path / "config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (ValueError, RecursionError):
        raise ConfigError("model.path", f"{file} is not JSON; fetch it again") from None


def _methods(config: Any) -> list[str]:
    """Quantisation methods in a config.json, also in the configs of a multimodal model's parts."""
    if not isinstance(config, dict):
        return []
    found = []
    for name in ("quantization_config", "compression_config"):
        if config.get(name):
            settings = config[name] if isinstance(config[name], dict) else {}
            bits = [key.removeprefix("load_in_") for key in ("load_in_8bit", "load_in_4bit") if settings.get(key)]
            found.append(str(settings.get("quant_method") or "".join(bits) or "of an unnamed method"))
    for part in config.values():
        found += _methods(part) if isinstance(part, dict) else []
    return found
