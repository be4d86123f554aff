"""Finds and reads the config.json of a Hugging Face model, in a local folder or on the hub. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldft import files
from ldft.errors import ConfigError

NAME = "config.json"


@dataclass(frozen=True, slots=True)
class ConfigJson:
    """A config.json, as read."""

    key: str
    """The key that names it: model.path or model.hf_id."""
    where: str
    """The file or the hub id, for messages."""
    name: str
    """A short name of the model, as ldft's own options have it: llama_3_1_8b for Llama-3.1-8B."""
    sha256: str
    """Of the file's bytes, hexadecimal."""
    values: dict[str, Any] = field(repr=False)

    def refusal(self, problem: str) -> ConfigError:
        """The error for a file that cannot be used."""
        return ConfigError(self.key, f"{self.where}: {problem}")


def read(path: str, hf_id: str) -> ConfigJson:
    """The config.json in the folder `path`, which may also be the file itself; with an empty path, that of `hf_id` on the hub.

    Raises ConfigError if there is none, or if it does not hold a JSON object.
    """
    if not path and not hf_id:
        raise ConfigError(
            "model.path", f"empty; name the folder with the model's {NAME}, or set model.hf_id=<organisation>/<name>"
        )
    file = _local(path) if path else _fetched(hf_id)
    key, where = ("model.path", str(file)) if path else ("model.hf_id", hf_id)
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise ConfigError(key, f"cannot read {where} ({error.strerror}); make it readable") from None
    try:
        values = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(key, f"{where} is not JSON ({' '.join(str(error).split())}); fetch it again") from None
    if not isinstance(values, dict):
        raise ConfigError(key, f"{where} holds {_noun(values)}, not a JSON object; fetch it again")
    return ConfigJson(
        key, where, short_name(file.absolute().parent if path else Path(hf_id)), hashlib.sha256(raw).hexdigest(), values
    )


def short_name(path: Path) -> str:
    """The last part of a path or hub id in lower case, with underscores; of a folder in the hub's cache, the repository's."""
    cached = next((part.rpartition("--")[2] for part in reversed(path.parts) if part.startswith("models--")), "")
    return re.sub(r"[^a-z0-9]+", "_", (cached or path.name).lower()).strip("_") or "model"


def shortened(extra: dict[str, Any], published: int, layers: int) -> dict[str, Any]:
    """model.extra with its lists of one value a layer cut to the number of layers, if that is smaller than the file's."""
    return {
        key: value[:layers] if isinstance(value, list) and len(value) == published > layers else value
        for key, value in extra.items()
    }


def _noun(value: Any) -> str:
    return {list: "a list", str: "a text", type(None): "null"}.get(type(value), "a number")


def _local(path: str) -> Path:
    folder = files.named(path, "model.path")
    if folder.is_file():
        if folder.suffix == ".json":
            return folder
        raise ConfigError("model.path", f"'{path}' is a file; name the folder with the model's {NAME}")
    if not folder.is_dir():
        hub = f", or model.hf_id={path} for the hub" if re.fullmatch(r"[\w.-]+/[\w.-]+", path) else ""
        raise ConfigError("model.path", f"'{path}' does not exist; name the folder with the model's {NAME}{hub}")
    if not files.named(folder / NAME, "model.path").is_file():
        raise ConfigError("model.path", f"'{path}' has no {NAME}; {_advice(folder)}")
    return folder / NAME


def _advice(folder: Path) -> str:
    """What to do about a folder without a config.json."""
    if (folder / "adapter_config.json").is_file():
        return "it holds an adapter; name the folder of the model that the adapter was trained on"
    if (folder / "params.json").is_file():
        return "it has the original format (params.json); use the folder in Hugging Face's format"
    if any(folder.glob("*.gguf")):
        return "it has weights in GGUF; use the folder of the model that they were made from"
    inner = sorted(file.parent.name for file in folder.glob(f"*/{NAME}"))
    if inner:
        return f"name a folder in it that has one: {', '.join(inner[:3])}"
    return "name a folder written by save_pretrained or fetched from the hub"


def _fetched(hf_id: str) -> Path:
    """The file in the hub's cache, fetched if it is not there or was changed; HF_HUB_OFFLINE=1 uses the cache alone."""
    from huggingface_hub import errors, hf_hub_download

    key, use = "model.hf_id", f"or copy its {NAME} here and set model.path"
    try:
        return Path(hf_hub_download(hf_id, NAME))
    except errors.HFValidationError:
        raise ConfigError(key, f"'{hf_id}' is not an id of the hub; write <organisation>/<name>") from None
    except errors.GatedRepoError:
        raise ConfigError(
            key, f"{hf_id} is gated; accept its licence on the hub and log in with hf auth login, {use}"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ConfigError(
            key, f"the hub has no {hf_id}, or it is private; correct it, log in with hf auth login, {use}"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise ConfigError(
            key,
            f"{hf_id} is not in the cache, and the hub is out of reach (network, or HF_HUB_OFFLINE); try again, {use}",
        ) from None
    except errors.EntryNotFoundError:
        raise ConfigError(key, f"{hf_id} has no {NAME} on the hub; use a repository in transformers' format") from None
    except OSError as error:  # the other errors of HTTP and of the cache's disk
        raise ConfigError(
            key, f"cannot fetch {hf_id} ({' '.join(str(error).split())[:200]}); try again, {use}"
        ) from None
