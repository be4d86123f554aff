"""The options of config groups by their values in rows: `offload=full` is stage 3 with parameters and optimizer on the CPU."""

from __future__ import annotations

from functools import cache
from typing import Any

import pandas as pd
import yaml

from ldft.cli import composition
from ldft.config import Config, from_dict
from ldft.config.root import flatten
from ldft.environment import CONF_DIR
from multirun_analysis.labels import text


def _files(group: str) -> dict[str, dict[str, Any]]:
    known = composition.groups().get(group, [])
    return {name: yaml.safe_load((CONF_DIR / group / f"{name}.yaml").read_text()) or {} for name in known}


@cache
def configs(group: str) -> dict[str, Config]:
    """Option -> the default config with that option's values; empty if `group` has no options."""
    return {name: from_dict({group: values}) for name, values in _files(group).items()}


@cache
def values_of(group: str) -> dict[str, dict[str, str]]:
    """Option -> {key: value as a label}, for every key that any option of the group sets; empty if `group` has no options."""
    keys = [f"{group}.{key}" for key in dict.fromkeys(key for values in _files(group).values() for key in values)]
    settled = {name: flatten(config) for name, config in configs(group).items()}
    return {name: {key: text(values[key]) for key in keys} for name, values in settled.items()}


def names(texts: pd.DataFrame, group: str) -> pd.Series:
    """The option that matches each row in all keys that options of the group set; empty if none matches."""
    found = pd.Series("", index=texts.index, dtype=object)
    for option, values in values_of(group).items():
        if values and set(values) <= set(texts):
            same = pd.concat([texts[key] == value for key, value in values.items()], axis=1).all(axis=1)
            found = found.mask(same & (found == ""), option)
    return found


@cache
def _defaults() -> tuple[dict[str, str], dict[str, Any]]:
    """Group -> its default option, and key -> its default value."""
    chosen: dict[str, str] = {}
    for entry in yaml.safe_load((CONF_DIR / "config.yaml").read_text())["defaults"]:
        chosen |= entry if isinstance(entry, dict) else {}
    return chosen, flatten(Config())


def default_label(name: str) -> str:
    """How a group or key (`optimizer` for `optimizer.name`) is labelled if it is left at its default."""
    groups, values = _defaults()
    if name in groups:
        return f"{name}={groups[name]}"
    key = f"{name}.name" if f"{name}.name" in values else name
    return f"{name.rpartition('.')[2]}={default_text(key)}"


def default_text(key: str) -> str:
    """A key's default value as a label."""
    return text(_defaults()[1].get(key))
