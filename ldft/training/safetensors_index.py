"""Safetensors folders: which file contains each tensor, read from the files' headers only. Imports no torch: the parent uses it
too.

The format (https://huggingface.co/docs/safetensors): 8 bytes length, a JSON header, then the tensors without gaps.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from ldft.config import ModelConfig
from ldft.errors import ConfigError

_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json"]


@dataclass(frozen=True, slots=True)
class Entry:
    """Location of a tensor."""

    file: Path
    shape: tuple[int, ...]


def folder(model: ModelConfig, *, fetch: bool) -> Path:
    """The folder of model.weights=pretrained: model.path, else the hub's, which `fetch` downloads into its cache.

    Raises ConfigError if there is none.
    """
    if model.path:
        path = Path(model.path).expanduser()
        if not path.is_dir():
            raise ConfigError("model.path", f"'{model.path}' is not a folder; name one with *.safetensors files")
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model.hf_id, allow_patterns=_HUB_FILES, local_files_only=not fetch))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            "model.weights",
            f"cannot fetch {model.hf_id} from the hub ({reason}); download it and set model.path to its folder",
        ) from None


def index(path: Path) -> dict[str, Entry]:
    """Every tensor in a folder by name. Raises ConfigError if there is none or a file is damaged."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ConfigError("model.path", f"no *.safetensors in {path}; save the model with save_pretrained")
    listing = path / "model.safetensors.index.json"
    if listing.is_file():
        try:
            wanted = set(json.loads(listing.read_text())["weight_map"].values())
        except (json.JSONDecodeError, KeyError, AttributeError):
            raise ConfigError("model.path", f"{listing} is damaged; fetch it again") from None
        missing = sorted(wanted - {file.name for file in files})
        if missing:
            raise ConfigError("model.path", f"{path} lacks {missing[0]} of its {len(wanted)} shards; fetch it again")
        files = [file for file in files if file.name in wanted]
    found: dict[str, Entry] = {}
    for file in files:
        found |= _header(file)
    return found


def _header(file: Path) -> dict[str, Entry]:
    size = file.stat().st_size
    damaged = ConfigError("model.path", f"{file} is damaged or cut short ({size} bytes); fetch it again")
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= size - 8:
            raise damaged
        try:
            header = json.loads(opened.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise damaged from None
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != 8 + length + end:
        raise damaged
    return {name: Entry(file, tuple(entry["shape"])) for name, entry in header.items()}
