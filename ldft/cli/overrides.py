"""Checks the command line before Hydra reads it: mistakes that Hydra takes silently, or reports without saying what to do."""

from __future__ import annotations

import os
import re

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from ldft.cli import composition
from ldft.errors import ConfigError

_KEY = re.compile(r"(?!.*\.\.)[A-Za-z_][\w.\[\]/@:-]*(?<![./])")
# Set for a command that was given --detach.
DETACH = "LDFT_DETACH"
# Hydra's options of which one at most may be given.
_MODES = {
    "run": "--run",
    "multirun": "--multirun",
    "cfg": "--cfg",
    "info": "--info",
    "shell_completion": "--shell-completion",
}


def check_options(options: dict[str, object]) -> None:
    """Raise ConfigError for Hydra's command-line options that contradict each other. options: as Hydra's parser returns them."""
    given = [name for key, name in _MODES.items() if options.get(key)]
    if len(given) > 1:
        raise ConfigError("command line", f"{' and '.join(given)} cannot be combined; use one of them")
    if options.get("resolve") and not (options.get("cfg") or options.get("help")):
        raise ConfigError("command line", "--resolve needs --cfg; use e.g. --cfg job --resolve")
    if options.get("experimental_rerun"):
        raise ConfigError(
            "command line", "--experimental-rerun reads files that ldft does not write; repeat the overrides"
        )
    if options.get("config_path"):
        raise ConfigError(
            "command line",
            "--config-path would replace ldft's own config tree; use --config-dir=FOLDER, which adds a folder to it",
        )


def take_detach(arguments: list[str]) -> None:
    """Move --detach, which Hydra's parser does not know, from the arguments to where the launcher for SLURM finds it."""
    os.environ.pop(DETACH, None)
    while "--detach" in arguments:
        arguments.remove("--detach")
        os.environ[DETACH] = "1"


def refuse_detach() -> None:
    """Raise ConfigError if --detach was asked for where nothing can run on by itself."""
    if DETACH in os.environ:
        raise ConfigError(
            "command line", "--detach is for sweeps as jobs of SLURM; add -m hydra/launcher=slurm, or leave it out"
        )


def refuse_launcher(overrides: list[str]) -> None:
    """Raise ConfigError for a launcher, which a single run would ignore: it would run here and not where it was asked for."""
    if any(re.match(r"hydra[./]launcher\b", key) for key in keys(overrides)):
        raise ConfigError("hydra/launcher", "has no effect on a single run, which runs here; add -m, or leave it out")


def keys(overrides: list[str]) -> list[str]:
    """The groups and keys that these overrides set."""
    return [override.partition("=")[0].lstrip("+~").partition("@")[0] for override in overrides]


def check(overrides: list[str]) -> None:
    """Raise ConfigError for an override that has the wrong form, or that names an option or a key in the wrong way."""
    typed = {key: value for key, _, value in (override.partition("=") for override in overrides)}
    if typed.get("lora.rank") == "0" and "none" not in typed.get("lora", "none").split(","):
        raise ConfigError("lora.rank", f"0 contradicts lora={typed['lora']}; use lora=none, or a rank of 1 or more")
    for override in overrides:
        if not override.isascii() and override.encode("utf-8", "replace").decode() != override:
            raise ConfigError("command line", f"{override!r} is not UTF-8; name the file or the text in UTF-8")
        key, equals, value = override.partition("=")
        _check_key(override, key, bool(equals))
        _check_prefix(key, value)
        _check_option(key, value)


def _check_key(override: str, key: str, has_value: bool) -> None:
    name = key.lstrip("+~")
    if has_value and not name:
        raise ConfigError("command line", f"'{override}' has no key; write key=value, e.g. model=tiny")
    if (has_value or key.startswith("~")) and not _KEY.fullmatch(name):
        raise ConfigError(
            "command line",
            f"'{name}' is not a key; keys are names joined by dots, as in train.iterations=5, without spaces",
        )


def _check_prefix(key: str, value: str) -> None:
    """Hydra's prefixes: `+` adds a key that ldft does not have, `++` adds or replaces one, `~` removes one."""
    name = key.lstrip("+~")
    prefix = key.removesuffix(name)
    group, _, package = name.partition("@")
    if package and group in composition.groups():
        raise ConfigError(name, f"ldft's groups have their own places; use {group}={value or '<option>'}")
    has = name in composition.groups() or composition.type_of(name) is not None
    if not prefix or not has:
        return
    if prefix == "~":
        raise ConfigError(name, f"~ would remove it, and every run needs one; give it another value, as in {name}=...")
    if name == "sweep" and not value.startswith("{"):  # the one group that is not chosen by default
        if prefix == "++":
            raise ConfigError(name, f"++ is not for groups; use +sweep={value}")
        return
    if name in composition.groups() or prefix == "+":
        raise ConfigError(name, f"exists already, so it needs no {prefix}; use {name}={value}")


def _is_text(override: str) -> bool:
    """Whether Hydra reads the value as text; also for what it cannot read at all, which it says itself."""
    try:
        value = OverridesParser.create().parse_override(override).value()
    except HydraException:
        return True
    return value is not None and not isinstance(value, bool | int | float)


def _check_option(key: str, value: str) -> None:
    """Lists, numbers and other values in place of an option's name, which Hydra takes for a bug of its caller."""
    group = key.lstrip("+~").partition("@")[0]
    of_hydra = group.startswith("hydra/")
    if not value or (group not in composition.groups() and not of_hydra):
        return
    if value.startswith("["):
        raise ConfigError(
            group, f"{value} is a list, and a group takes one option; use {group}=<option>, or -m {group}=a,b"
        )
    for option in value.split(","):
        if _is_text(f"{key}={option}"):
            continue
        if of_hydra:
            raise ConfigError(group, f"{option} is no option's name; see python -m ldft --hydra-help")
        _, _, problem = composition.no_option(group, option).partition(": ")
        raise ConfigError(group, problem)
