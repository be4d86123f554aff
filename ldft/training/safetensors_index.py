"""Safetensors folders: which file contains each tensor, read from the files' headers only. Imports no torch: the parent uses it
too.

The format (https://huggingface.co/docs/safetensors): 8 bytes length, a JSON header, then the tensors without gaps.
"""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from ldft import files
from ldft.config import ModelConfig
from ldft.errors import ConfigError
from ldft.terminal import plural

_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "*quant*_config.json"]
# Mistral publishes the same weights twice, once under its own names; Meta keeps the originals in a folder.
_NOT_FROM_HUB = ["consolidated*", "original/*"]
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
}  # fmt: skip
# What lies under a name of weights after a failed download, or was given that name: first bytes, lower case -> what it is and
# the fix.
_OTHER_CONTENT = {
    b"version https://git-lfs": "a git-lfs pointer to the weights; run git lfs pull",
    b"<": "a web page that a download saved in their place; fetch it again, logged in if the model is gated",
    b"{": "a JSON text, as a server answers when it refuses a download; fetch it again, logged in if the model is gated",
    b"pk\x03\x04": "a PyTorch file under another name; save the model with save_pretrained",
    b"\x80": "a PyTorch file under another name; save the model with save_pretrained",
    b"gguf": "a GGUF file under another name; fetch the original weights",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """Location and kind of a tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As the header names it: F32, BF16, F8_E4M3, ..."""


def folder(model: ModelConfig, *, fetch: bool) -> Path:
    """The folder of model.weights=pretrained: model.path, else the hub's, which `fetch` downloads into its cache.

    Raises ConfigError if there is none.
    """
    if model.path:
        path = files.named(model.path, "model.path")
        if not path.is_dir():
            raise ConfigError("model.path", f"'{model.path}' is not a folder; name one with *.safetensors files")
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                model.hf_id, allow_patterns=_HUB_FILES, ignore_patterns=_NOT_FROM_HUB, local_files_only=not fetch
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            "model.weights",
            f"cannot fetch {model.hf_id} from the hub ({reason}); download it and set model.path to its folder",
        ) from None


def index(path: Path) -> dict[str, Entry]:
    """Every tensor in a folder by name. Raises ConfigError if there is none, or a file is missing or damaged."""
    listing = path / "model.safetensors.index.json"
    owners = _owners(listing) if listing.is_file() else {}
    found: dict[str, Entry] = {}
    for file in _listed(path, set(owners.values())) if owners else _unlisted(path):
        for name, entry in _header(file).items():
            if name in found:
                other = found[name].file.name
                raise ConfigError("model.path", f"{name} is in {other} and in {file}; remove the file that is stale")
            found[name] = entry
    for name, owner in owners.items():
        if name not in found or found[name].file.name != owner:
            raise ConfigError(
                "model.path", f"{path / owner} has no tensor {name}, which {listing} promises; fetch it again"
            )
    return found


def _owners(listing: Path) -> dict[str, str]:
    """Tensor -> shard, from an index file."""
    damaged = ConfigError("model.path", f"{listing} is damaged; fetch it again")
    try:
        owners = json.loads(listing.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise damaged from None
    if not isinstance(owners, dict) or not owners or not all(isinstance(owner, str) for owner in owners.values()):
        raise damaged
    return owners


def _listed(path: Path, names: set[str]) -> list[Path]:
    """The shards of an index."""
    here = {file.name for file in path.glob("*.safetensors")}
    if missing := sorted(names - here):
        raise ConfigError(
            "model.path", f"{path} lacks {missing[0]} of its {plural(len(names), 'shard')}; fetch it again"
        )
    if "model.safetensors" in here - names:
        raise ConfigError(
            "model.path", f"{path} has model.safetensors and the index of other files; remove what is stale"
        )
    return [path / name for name in sorted(names)]


def _unlisted(path: Path) -> list[Path]:
    """The files of a folder without an index."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ConfigError("model.path", f"no *.safetensors in {path}; save the model with save_pretrained")
    if path / "model.safetensors" in files:
        return [path / "model.safetensors"]
    usable = [file for file in files if not file.name.startswith(("adapter_", "consolidated"))]
    if not usable:
        raise ConfigError(
            "model.path",
            f"{path} has only {files[0].name}, an adapter or weights under their trainer's own names; use a folder with "
            "model*.safetensors (a LoRA adapter is merged by merge_and_unload)",
        )
    for file in usable:
        if shard := _SHARD.fullmatch(file.name):
            stem, number, count = shard.groups()
            wanted = {f"{stem}-{part:0{len(number)}}-of-{count}.safetensors" for part in range(1, int(count) + 1)}
            return _listed(path, wanted)
    return usable


def _header(file: Path) -> dict[str, Entry]:
    """The tensors of a file. Raises ConfigError if it is something else or damaged, also if it is cut short."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            start = opened.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            plausible = 2 <= length <= min(size - 8, _LONGEST_HEADER)
            text = opened.read(length if plausible else 64)
    except OSError as error:
        raise ConfigError("model.path", f"cannot read {file} ({error.strerror}); fetch it again") from None
    if not plausible:
        content = (start + text).lstrip().lower()
        for first, kind in _OTHER_CONTENT.items():
            if content.startswith(first):
                raise ConfigError("model.path", f"{file} contains no weights, it is {kind}")
    entries = _entries(file, text, size - 8 - length) if plausible else None
    if entries is None:
        raise ConfigError("model.path", f"{file} is damaged or cut short ({size} bytes); fetch it again")
    return entries


def _entries(file: Path, text: bytes, data: int) -> dict[str, Entry] | None:
    """The tensors of a header before `data` bytes; None if it breaks the format."""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        parts = sorted((entry["data_offsets"][0], entry["data_offsets"][1], name) for name, entry in header.items())
        entries = {name: Entry(file, tuple(entry["shape"]), entry["dtype"]) for name, entry in header.items()}
        end = 0
        for start, stop, name in parts:
            entry = entries[name]
            bits = _BITS.get(entry.dtype)
            if start != end or stop < start or min(entry.shape, default=0) < 0:
                return None
            if bits is not None and math.prod(entry.shape) * bits != 8 * (stop - start):
                return None
            end = stop
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return None
    return entries if end == data else None
