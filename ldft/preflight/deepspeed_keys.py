"""Checks the user's DeepSpeed keys (offload.deepspeed, offload.deepspeed_file): they must exist, have the right type, and not
contradict ldft's.

DeepSpeed ignores most unknown keys, so a run with a misspelt key would measure something else."""

from __future__ import annotations

import difflib
import json
import math
import operator
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from ldft.errors import ConfigError, shown

# DeepSpeed keys that ldft sets, and the ldft key to use. A prefix covers everything below it.
OWNED = {
    "train_batch_size": "train.micro_batch_size, train.gradient_accumulation_steps and launch.num_ranks",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "gradient_clipping": "optimizer.gradient_clipping",
    "bf16.enabled": "train.precision",
    "fp16.enabled": "train.precision",
    "fp16.loss_scale": "train.loss_scale",
    "optimizer.type": "optimizer",
    "optimizer.params.lr": "optimizer.learning_rate",
    "optimizer.params.weight_decay": "optimizer.weight_decay",
    "optimizer.params.betas": "optimizer.betas",
    "optimizer.params.eps": "optimizer.eps",
    "optimizer.params.max_grad_norm": "optimizer.gradient_clipping",
    "scheduler": "optimizer.schedule",
    "sequence_parallel_size": "launch.sequence_parallel",
    "zero_optimization.stage": "offload.stage",
    "zero_optimization.cpu_offload": "offload.optimizer",
    "zero_optimization.cpu_offload_param": "offload.parameters",
    "zero_optimization.cpu_offload_use_pin_memory": "memory.pinning",
    "zero_optimization.offload_param.device": "offload.parameters",
    "zero_optimization.offload_param.pin_memory": "memory.pinning",
    "zero_optimization.offload_optimizer.device": "offload.optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "offload.nvme_path",
    "zero_optimization.offload_param.nvme_path": "offload.nvme_path",
    "zero_optimization.offload_optimizer.pin_memory": "memory.pinning",
    "activation_checkpointing": "checkpointing",
}
_NOUNS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a string",
    "strings": "a list of strings",
    "numbers": "a list of numbers",
}
_COMPARE = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
_LARGEST = 2**63 - 1  # what torch can count


@cache
def known() -> dict[str, Any]:
    """deepspeed_keys.json: made from the installed release by scripts/deepspeed_keys.py."""
    found: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text())
    return found


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; an empty section counts as a leaf."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _hint(name: str, section: dict[str, Any], path: str) -> str:
    close = difflib.get_close_matches(name, section, n=1, cutoff=0.6)
    if close:
        key = f"{path}{close[0]}"
        return f"did you mean {key}{f', which is {OWNED[key]} in ldft' if key in OWNED else ''}?"
    elsewhere = [key for key, _ in flat(known()["keys"]) if key.split(".")[-1] == name]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    if len(section) <= 12:
        return f"use one of {', '.join(sorted(section))}"
    return "see https://www.deepspeed.ai/docs/config-json/"


def _typed(value: Any, kind: str | list[str], key: str) -> Any:
    """The value converted to DeepSpeed's type, a kind of deepspeed_keys.json; raises ConfigError if it has another type or is
    out of range."""
    if isinstance(kind, list):
        if isinstance(value, str) and value.lower() in kind:
            return value.lower()
        raise ConfigError(key, f"{shown(value)} does not exist; use one of {', '.join(kind)}")
    name, *limits = kind.split(" ")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and not math.isfinite(value):
        raise ConfigError(key, f"{value} is not finite; use a number")
    if name == "int" and number and value == int(value):
        value = int(value)  # 1e5 is a float to JSON, YAML and Hydra
        if abs(value) > _LARGEST:
            raise ConfigError(key, f"{value:.3g} is too large; use at most {_LARGEST:.2g}")
    good = {
        "any": True,
        "bool": isinstance(value, bool),
        "str": isinstance(value, str),
        "int": isinstance(value, int) and number,
        "float": number,
        "strings": isinstance(value, list) and all(isinstance(one, str) for one in value),
        "numbers": isinstance(value, list) and all(type(one) in (int, float) and math.isfinite(one) for one in value),
    }
    if not good[name]:
        raise ConfigError(key, f"{shown(value)} is not {_NOUNS[name]}; DeepSpeed needs {_NOUNS[name]} here")
    for sign, limit in zip(limits[::2], limits[1::2], strict=True):
        if not _COMPARE[sign](value, float(limit)):
            raise ConfigError(key, f"{shown(value)} is out of range; use a number {sign} {limit}")
    return value


def where(origin: str, key: str) -> str:
    """How errors name a DeepSpeed key. origin: `offload.deepspeed`, or `offload.deepspeed_file: <name>`."""
    return f"{origin}.{key}" if origin == "offload.deepspeed" else f"{origin}: {key}"


def cleaned(values: dict[str, Any], origin: str) -> dict[str, Any]:
    """A user's DeepSpeed config, checked against the known keys, without the values null and "auto", which leave the choice to
    ldft.

    origin: the name that errors show: offload.deepspeed or the file.
    """

    def section(tree: dict[str, Any], keys: dict[str, Any], path: str) -> dict[str, Any]:
        anywhere = keys.get("*")  # this section's names are valid at any depth
        names = dict.fromkeys(anywhere, "any") if anywhere else keys
        done: dict[str, Any] = {}
        for name, value in tree.items():
            key = where(origin, f"{path}{name}")
            if name in known()["removed"].get(path.rstrip("."), ()):
                raise ConfigError(key, f"DeepSpeed {known()['deepspeed']} has removed this key; leave it out")
            if name not in names:
                raise ConfigError(key, f"DeepSpeed has no such key; {_hint(name, names, path)}")
            if value is None or value == "auto":
                continue
            kind = keys if anywhere and isinstance(value, dict) else names[name]
            if not isinstance(kind, dict):
                done[name] = _typed(value, kind, key)
            elif isinstance(value, dict):
                done[name] = section(value, kind, f"{path}{name}.")
            else:
                raise ConfigError(key, f"{shown(value)} is not a section; write it as {{key: value}}")
        return done

    return section(values, known()["keys"], "")


def check_owned(values: dict[str, Any], ours: dict[str, Any], origin: str) -> None:
    """Raise ConfigError if a user's DeepSpeed config contradicts what ldft sets. Equal values are allowed.

    ours: dotted key -> the value that ldft sets; ldft does not set keys that are missing there.
    """
    for key, value in flat(values):
        owner = next((name for name in OWNED if key == name or key.startswith(name + ".")), None)
        if owner is None or value == ours.get(key) or not (value or key in ours):
            continue
        if isinstance(value, str) and isinstance(ours.get(key), str) and value.lower() == ours[key].lower():
            continue
        said = f", which makes it {json.dumps(ours[key])}" if key in ours else ""
        text = f"{shown(value)} contradicts {OWNED[owner]}{said}; leave it out here and set that key"
        raise ConfigError(where(origin, key), text)
