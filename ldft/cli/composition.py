"""Turns each composition error of Hydra and OmegaConf into one line: key, value, what is allowed, how to fix it."""

from __future__ import annotations

import difflib
import re
import types
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError

from ldft.cli import hydra_merges, hydra_messages
from ldft.config import Config
from ldft.config.root import columns, typed_tree
from ldft.environment import CONF_DIR

# Sections with open key sets, defined outside ldft: new keys need no plus sign.
OPEN = ("offload.deepspeed", "model.extra", "model.rope_scaling", "numa.bandwidth")
# Names from the seed repository and other common names, with ldft's names for them.
_OTHER_NAMES = {
    "model_name": "model", "num_layers": "model.num_layers", "hidden_size": "model.hidden_size",
    "num_gpus": "launch.num_ranks", "system_type": "system", "per_device_train_batch_size": "train.micro_batch_size",
    "batch_size": "train.micro_batch_size", "max_seq_length": "seq_len", "beta_0": "optimizer.betas",
    "beta_1": "optimizer.betas", "num_train_iteration": "train.iterations", "lr": "optimizer.learning_rate",
    "numa_policy": "numa", "device": "launch.device", "timeout": "launch.timeout_s", "gradient_checkpointing": "checkpointing",
    "zero_stage": "offload.stage", "output_dir": "results.dir", "lr_scheduler_type": "optimizer.schedule",
    "warmup_steps": "optimizer.schedule_warmup", "lora_dim": "lora.rank", "liger_kernel": "kernels.liger",
    "attn_implementation": "attention",
}  # fmt: skip
_NOUNS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


@dataclass
class _Sweeper:
    """Hydra's config node for the sweeper: Hydra finds a plugin by its class name."""

    _target_: str = "hydra_plugins.ldft.sweeper.LdftSweeper"
    params: dict[str, Any] = field(default_factory=dict)
    points: list[dict[str, Any]] = field(default_factory=list)


def register() -> None:
    """Register the typed schema (with open sections left open) and the sweeper with Hydra."""
    hydra_merges.install(OPEN)
    schema = typed_tree()
    for path in OPEN:
        OmegaConf.set_struct(OmegaConf.select(schema, path), False)
    ConfigStore.instance().store(name="schema", node=schema)
    ConfigStore.instance().store(group="hydra/sweeper", name="ldft", node=_Sweeper)


def groups() -> dict[str, list[str]]:
    """ldft's config groups and their options, from the files under conf/."""
    found = {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in CONF_DIR.iterdir()
        if folder.is_dir() and folder.name not in ("hydra", "local")
    }
    return {name: found[name] for name in sorted(found)}


def one_line(error: BaseException, overrides: list[str]) -> str:
    """The line for an error from Hydra or OmegaConf; `overrides`: as the user typed them."""
    text = str(error)
    file = re.match(r"In '([^']+)': ", text)
    if isinstance(error, MissingConfigException) and (error.missing_cfg_file or "").startswith("hydra/"):
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        return hydra_messages.no_option(group, option, error.options or [])
    if file and file[1] != "config" and (line := _of_file(file[1], text)):
        return line
    if isinstance(error, MissingConfigException):
        return _missing(error)
    if isinstance(error, OverrideParseException):
        override = getattr(error, "override", "") or next((item for item in overrides if item in text), "")
        return hydra_messages.unparsed(override or " ".join(overrides))
    cause = error.__cause__ if isinstance(error, ConfigCompositionException) and error.__cause__ else error
    path = re.search(r"full_key: (\S+)", str(cause))
    reason = str(cause).splitlines()[0]
    if path and isinstance(cause, InterpolationResolutionError):
        return hydra_messages.interpolation(path[1], _typed(path[1], overrides)[0], reason, _expected(path[1]))
    if path and re.search(r"Key '.*' (?:is not in struct|not in )", str(cause)):
        value = _typed(path[1], overrides)[0] or "..."
        return _unknown_key(path[1], value, f"value {value}")
    if path and path[1].startswith("hydra."):
        return f"{path[1]}: {reason}; see python -m ldft --cfg hydra"
    if path:
        quoted = re.search(r"[Vv]alue '(.*?)'", reason) or re.search(r"[Vv]alue '(.*?)'", text)
        typed, exactly = _typed(path[1], overrides)
        value = typed if exactly or not quoted else quoted[1]
        if not value:
            return f"{path[1]}: empty; give {_expected(path[1])}"
        return f"{path[1]}: '{value}' does not fit; give {_expected(path[1])}"
    if removed := re.search(r"Could not delete from config. '(.+)' does not exist", text):
        return _unknown_key(removed[1], "", "to remove")
    if folder := re.search(r"Additional config directory '(.*)' not found", text):
        return f"--config-dir: {folder[1]} is not a folder; name one whose subfolders are config groups"
    if not_listed := re.search(r"(hydra\.searchpath) must be a list of strings\. Got: (.*)", text):
        return f"{not_listed[1]}: {not_listed[2]} is not a list; write hydra.searchpath=[file:///folder]"
    if no_group := re.search(r"looks like a config group override, but config group '(.+)' does not exist", text):
        return no_option(no_group[1], "")
    if appended := re.search(r"To append to your default list use \+(\w+)=(\S+)", text):
        group, option = appended.groups()
        if group == "hydra":
            return f"hydra: '{option}' is no option; write hydra.<key>=<value> for a key of Hydra's; see python -m ldft --cfg hydra"
        return f"{group}: '{option}' is not in the defaults list, so it needs a plus sign; use +{group}={option}"
    twice = re.match(r"Multiple values for (\w+)\. To override a value use 'override \w+: (.+)'", text)
    if twice:
        return f"{twice[1]}: a config file chooses it a second time; write '- override /{twice[1]}: {twice[2]}' in its defaults"
    if several := re.search(r"Sweep parameters '([^=']+)=(.+)' requires --multirun", text):
        return f"{several[1]}: {several[2]} is a sweep; add -m"
    if chosen := re.match(r"You must specify '(\w+)'", text):
        return no_option(chosen[1], "???")
    ambiguous = re.search(r"Ambiguous value for argument '(.+)'", text)
    if ambiguous:
        key, _, value = ambiguous[1].partition("=")
        listed = f", or write a list as {key}=[{value}]" if get_origin(type_of(key)) is list else ""
        return f"{key}: several values ({value}) are a sweep; add -m{listed}"
    return " ".join(text.split())


def _of_file(file: str, text: str) -> str:
    """The line for a mistake in a config file (an option that the user added, or this machine's defaults); empty if unknown.

    file: group and option, as Hydra names them. text: Hydra's message.
    """
    folder = file.rpartition("/")[0]
    name = f"{file}.yaml"
    if (CONF_DIR / name).exists():
        name = str(CONF_DIR / name)
    path = re.search(r"full_key: (\S+)", text)
    if f"'{folder}' not in" in text or f"@{folder}." in text:
        return f"{name}: Hydra reads its keys as keys of {folder}; make '# @package _global_' its first line"
    if relative := re.search(rf"'{folder}/(\w+)[/@]", text):
        return f"{name}: {relative[1]} has no slash; write '- override /{relative[1]}: <option>' in its defaults"
    if unknown := re.search(r"Could not override '(\w+)'", text):
        return f"{name}: {no_option(unknown[1], '')}"
    if "Cannot merge DictConfig with ListConfig" in text:
        return f"{name}: holds a list; write keys and values, as in 'system: box1'"
    if merged := re.search(r"is not a subclass of (\w+)\. value: (.*)", text):
        key = next((key for key, kind in get_type_hints(Config).items() if kind.__name__ == merged[1]), "")
        if key in groups() and key != folder and re.fullmatch(r"\w+", merged[2]):
            return f"{key}: {merged[2]} in {name} is an option; write '- override /{key}: {merged[2]}' in its defaults"
        return f"{key}: {merged[2]} in {name} does not fit; give {_expected(key)}" if key else ""
    if path and re.search(r"Key '.*' not in ", text):
        return _unknown_key(path[1], "...", f"in {name}")
    if path:
        value = re.search(r"[Vv]alue '(.*?)'", text)
        return f"{path[1]}: {repr(value[1]) if value else 'nothing'} in {name} does not fit; give {_expected(path[1])}"
    return ""


def bad_folder(error: OSError, overrides: list[str]) -> str:
    """The line for a folder of Hydra's (hydra.run.dir, hydra.sweep.dir) that it could not create; empty for another error."""
    for key, _, value in (override.lstrip("+").partition("=") for override in overrides):
        if key.startswith("hydra.") and value and str(error.filename or "").startswith(value.strip("\"'")):
            return f"{key}: cannot create {error.filename} ({error.strerror}); leave it out: ldft writes to results.dir"
    return ""


def bad_yaml(error: yaml.YAMLError) -> str:
    """The line for a file that is not valid YAML."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None:
        return f"a config file is not YAML: {' '.join(str(error).split())}"
    return f"{mark.name}, line {mark.line + 1}: not YAML ({problem}); fix that line"


def _typed(path: str, overrides: list[str]) -> tuple[str, bool]:
    """The value that the user typed for a key, or else for its nearest parent; and whether it was for the key itself."""
    found = ("", "")
    for key, _, value in (override.lstrip("+~").partition("=") for override in overrides):
        if (path == key or path.startswith((f"{key}.", f"{key}["))) and len(key) >= len(found[0]):
            found = key, value
    key, value = found
    return value, bool(key) and path.partition("[")[0] == key


def _missing(error: MissingConfigException) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    group = group.removeprefix("/")
    if not group:
        return f"{error.missing_cfg_file}: no such config file; see python -m ldft --help"
    return no_option(group, option, error.options)


def no_option(group: str, option: str, options: Any = None) -> str:
    """The line for an option that a group does not have."""
    known = groups()
    names = sorted(options) if options else known.get(group, [])
    if not names:
        close = difflib.get_close_matches(group, known, n=1)
        return f"{group}: no such group; {f'did you mean {close[0]}?' if close else 'use ' + ', '.join(known)}"
    if group == "seq_len":
        names.sort(key=lambda name: int(name[:-1]) * {"k": 1, "m": 1024}[name[-1]] if name[:-1].isdigit() else 0)
        if option.isdigit():
            exact = f"{int(option) // 1024}k"
            use = f"seq_len={exact} or " if int(option) % 1024 == 0 and exact in names else ""
            return f"seq_len: {option} is not an option; use {use}seq_len.tokens={option} (options: {', '.join(names)})"
    close = difflib.get_close_matches(option, names, n=1)
    plus = "+" if group == "sweep" else ""
    hint = f"did you mean {plus}{group}={close[0]}? " if close else ""
    return f"{group}: '{option}' does not exist; {hint}use one of {', '.join(names)}"


def _hints(name: str, siblings: list[str], prefix: str) -> str:
    every = [key for key, _ in columns()]
    known = groups()
    if prefix == "" and name.lower() in _OTHER_NAMES:
        return _OTHER_NAMES[name.lower()]
    same = [key for key in every if key.split(".")[-1] == name]
    if same:
        return same[0]
    close = difflib.get_close_matches(name, siblings, n=1)
    if close:
        return f"{prefix}{close[0]}"
    if prefix == "":
        close = difflib.get_close_matches(name, [*known, *(key.split(".")[-1] for key in every)], n=1, cutoff=0.7)
        if close:
            return close[0] if close[0] in known else next(key for key in every if key.split(".")[-1] == close[0])
    return ""


def _unknown_key(path: str, value: str, where: str) -> str:
    if path.startswith("hydra."):
        return f"{path}: Hydra has no such key; see python -m ldft --cfg hydra"
    parent, _, name = path.rpartition(".")
    section = type_of(parent)
    siblings = [f.name for f in fields(section)] if is_dataclass(section) else []
    hint = _hints(name, siblings, f"{parent}." if parent else "")
    if hint in groups() and hint == _OTHER_NAMES.get(name.lower()):
        return f"{path}: no such key; use {hint}={value}"
    if hint:
        return f"{path}: no such key ({where}); did you mean {hint}?"
    known = f"keys of {parent}" if parent else "groups and keys"
    return f"{path}: no such key ({where}); {known}: {', '.join(siblings)}"


def type_of(path: str) -> Any:
    """The declared type of a dotted key of the config; None where there is none."""
    kind: Any = Config
    for part in filter(None, path.split(".")):
        if not is_dataclass(kind):
            return None
        kind = get_type_hints(kind).get(re.sub(r"\[.*", "", part))
    return kind


def _expected(path: str) -> str:
    kind = type_of(path)
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(arg for arg in get_args(kind) if arg is not type(None))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(kind.__members__)}"
    if kind == list[str]:
        return f"a list of strings, as in {path.split('[')[0]}=[a,b]"
    if kind == list[int]:
        return f"a list of whole numbers, as in {path.split('[')[0]}=[0,1]"
    if get_origin(kind) is list:
        return f"a list of numbers, as in {path.split('[')[0]}=[0.9,0.95]"
    if get_origin(kind) is dict:
        return f"keys and values, as in '{path}={{key: value}}' or {path}.key=value"
    if is_dataclass(kind):
        names = ", ".join(f.name for f in fields(kind))
        option = f"an option ({path}=...) or " if path in groups() else ""
        return f"{option}a key below it, of {names}"
    return _NOUNS.get(kind, "another type")
