"""The command that runs a row's config again, under the same run_id: `python -m ldft model=llama3_8b seq_len=32k ...`."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import is_dataclass
from enum import Enum
from functools import cache, reduce
from typing import Any, get_type_hints

import yaml
from hydra.core.override_parser.types import Quote, QuotedString

from ldft.config import Config, Device, columns, to_dict
from ldft.config import run_id as identity
from ldft.config.root import missing_plan
from ldft.environment import CONF_DIR
from multirun_analysis import options

# Where results go, how often memory is read and what belongs to a sweep is the reader's choice; a plan's values are keys of their
# own.
_LEFT_OUT = ("results", "monitor", "sweep", "rerun", "dry_run", "asked", "plan")
# Text that Hydra reads as it stands. Words that it reads as something else are quoted.
_PLAIN = re.compile(r"(?!(?:null|true|false|nan|inf)$)[A-Za-z_][\w./-]*", re.IGNORECASE | re.ASCII)


class NoCommandError(Exception):
    """Its text says why no command gives this config."""


def command(config: dict[str, Any]) -> str:
    """The command line of a resolved config (a row's `config_json`), quoted for a shell. Raises NoCommandError.

    Options stand for what they set; every other value that differs from the defaults has its key.
    """
    return shlex.join(["python", "-m", "ldft", *overrides(config)])


def overrides(config: dict[str, Any]) -> list[str]:
    """The same as a list of overrides, as Hydra takes them."""
    wanted, left_out = _leaves(config), set(_LEFT_OUT)
    if missing_plan(wanted["asked"]):
        left_out.discard("plan")  # no plan was found: only asking for it again ends in the same way
    found, base = [], dict(_leaves({}))
    for group, default in _groups().items():
        if group in left_out:
            continue
        values = {key: value for key, value in wanted.items() if key.startswith(f"{group}.")}
        option = _nearest(group, default, json.dumps(values))
        base |= _option(group, option)
        if option != default:
            found.append(f"{group}={option}")
    for key, value in wanted.items():
        if key.partition(".")[0] not in left_out and value != base[key]:
            if isinstance(value, dict) and _merged(base[key], value) != value:
                raise NoCommandError(f"{key} lacks a value that its option sets; use the version that wrote the row")
            found.append(f"{key}={_as_override(value)}")
    if "plan" in left_out and wanted["launch.device"] == Device.cuda.name:
        found.append("plan=none")  # or plan=auto could choose others
    return found


def gives_run_id(config: dict[str, Any], run_id: str) -> bool:
    """Whether this version of ldft gives the config this run_id; rows from before the identity was settled have others.

    Raises NoCommandError for a value that this version does not have.
    """
    return identity(_typed(Config, config)) == run_id


def _typed(schema: Any, tree: dict[str, Any]) -> Any:
    """The dataclasses of a config's tree, unchecked: ldft.config.from_dict checks every key, and takes ten times as long."""
    hints = _hints(schema)
    values: dict[str, Any] = {}
    for name, value in tree.items():
        hint = hints[name]
        if is_dataclass(hint):
            values[name] = _typed(hint, value)
        elif isinstance(hint, type) and issubclass(hint, Enum):
            if value not in hint.__members__:
                raise NoCommandError(f"this version of ldft has no {name}={value}; use the version that wrote the row")
            values[name] = hint[value]
        else:
            values[name] = value
    return schema(**values)


_hints = cache(get_type_hints)


@cache
def _groups() -> dict[str, str]:
    """The config groups and their default options, in the order of conf/config.yaml."""
    listed = yaml.safe_load((CONF_DIR / "config.yaml").read_text())["defaults"]
    pairs = [next(iter(entry.items())) for entry in listed if isinstance(entry, dict)]
    return {group: option for group, option in pairs if options.configs(group)}


@cache
def _option(group: str, name: str) -> dict[str, Any]:
    """What an option sets: the values of its group's keys."""
    values = _leaves(to_dict(options.configs(group)[name]))
    return {key: value for key, value in values.items() if key.startswith(f"{group}.")}


@cache  # rows of a sweep differ in few groups
def _nearest(group: str, default: str, values: str) -> str:
    """The option that is nearest to a config's values of its group, which are given as JSON."""
    wanted = json.loads(values)

    def distance(name: str) -> tuple[bool, bool, int, bool]:
        differing = {key for key, value in _option(group, name).items() if value != wanted[key]}
        # One that reads values from a file may give others tomorrow; one of the config's own name is what its reader looks for.
        return bool(options.configs(group)[name].asked), f"{group}.name" in differing, len(differing), name != default

    return min(options.configs(group), key=distance)


@cache
def _defaults() -> dict[str, Any]:
    tree = to_dict(Config())

    def value_of(key: str) -> Any:
        return reduce(lambda part, name: part[name], key.split("."), tree)

    return {key: value_of(key) for key, _ in columns()}


def _leaves(tree: dict[str, Any]) -> dict[str, Any]:
    """Every key's value; of a key that is newer than the row, the default, which the run behaved by."""
    found: dict[str, Any] = {}

    def walk(part: dict[str, Any], prefix: str) -> None:
        for name, value in part.items():
            key = prefix + name
            if key in _defaults():
                found[key] = value
            elif isinstance(value, dict):
                walk(value, f"{key}.")
            else:
                raise NoCommandError(f"this version of ldft has no key {key}; use the version that wrote the row")

    walk(tree, "")
    return _defaults() | found


def _merged(base: Any, value: Any) -> Any:
    """What Hydra makes of a dict that is given for a key which holds one."""
    if not isinstance(base, dict) or not isinstance(value, dict):
        return value
    return base | {key: _merged(base.get(key), item) for key, item in value.items()}


def _as_override(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(map(_as_override, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{_as_key(key)}:{_as_override(item)}" for key, item in value.items()) + "}"
    if not isinstance(value, str):
        return repr(value)
    if _PLAIN.fullmatch(value):
        return value
    quoted: str = QuotedString(value.replace("${", "\\${"), Quote.double).with_quotes()
    return quoted


def _as_key(name: str) -> str:
    # Hydra takes no quotes around the keys of a dict, and numbers for numbers.
    if not _PLAIN.fullmatch(name):
        raise NoCommandError(f"the name {name!r} cannot be written on a command line")
    return name
