"""One line for mistakes in what Hydra itself offers: its own groups (launchers, sweepers, logging), `${...}`, and quoting."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable

# Options of Hydra's groups that come with a plugin, and the plugin's package.
_PLUGINS = {
    "submitit_slurm": "hydra-submitit-launcher",
    "submitit_local": "hydra-submitit-launcher",
    "joblib": "hydra-joblib-launcher",
    "ray": "hydra-ray-launcher",
    "ray_aws": "hydra-ray-launcher",
    "rq": "hydra-rq-launcher",
    "optuna": "hydra-optuna-sweeper",
    "ax": "hydra-ax-sweeper",
    "nevergrad": "hydra-nevergrad-sweeper",
    "colorlog": "hydra-colorlog",
}
_RESOLVERS = "oc.env, oc.decode, oc.select, oc.create, hydra, now"


def no_option(group: str, option: str, options: Iterable[str]) -> str:
    """The line for an option of Hydra's own groups (`hydra/launcher`, `hydra/job_logging`, ...) that does not exist."""
    line = f"{group}: '{option}' does not exist; use one of {', '.join(sorted(options))}"
    package = _PLUGINS.get(option)
    if package is None:
        return line
    if group == "hydra/sweeper":
        return (
            f"{line} (pip install {package} would add it, but ldft's runs return no value to optimise: sweep a grid "
            "with -m, and compare the rows)"
        )
    return f"{line}, or install the package that adds it: pip install {package}"


def interpolation(key: str, typed: str, reason: str, expected: str) -> str:
    """The line for a value with `${...}` that has no result.

    typed: the value as typed, or the empty string if a file has it. reason: OmegaConf's message. expected: what the key takes.
    """
    what = typed or "${...}"
    if missing := re.search(r"Environment variable '(.+?)' not found", reason):
        name = missing[1]
        return f"{key}: the environment variable {name} is not set; set it, or give a default, as in ${{oc.env:{name},value}}"
    if unknown := re.search(r"Unsupported interpolation type (\S+)", reason):
        return f"{key}: {what}: there is no resolver '{unknown[1]}'; use one of {_RESOLVERS}, or quote the text"
    if "Recursive interpolation" in reason:
        return f"{key}: {what} refers to itself; give one of the keys in this circle a value"
    if "${hydra:" in f"{what} {reason}" or "HydraConfig was not set" in reason:
        return (
            f"{key}: {what} has no value here: ldft plans its sweeps before Hydra counts jobs; write the value, "
            "or use ${hydra:runtime.cwd}, ${repeat} or another key"
        )
    if absent := re.search(r"Interpolation key '(.+?)' not found", reason):
        return f"{key}: Interpolation key '{absent[1]}' not found; name a key that exists, or quote the text"
    if "GrammarParseError" in reason:
        return f"{key}: cannot read the text that {what} gives ({reason.rpartition(': ')[2]}); correct it"
    if "Cannot convert 'DictConfig'" in reason or "Cannot convert 'ListConfig'" in reason:
        return f"{key}: {what} is a section or a list; name one key of it, or give {expected}"
    if "Incompatible value 'None'" in reason:
        return f"{key}: {what} has no value; name a key that has one, or give {expected}"
    if value := re.search(r"Value '(.*)' of type", reason):
        return f"{key}: {what} is '{value[1]}', which does not fit; give {expected}"
    return f"{key}: {what}: {reason}; name a key that exists, or quote the text"


def unparsed(override: str) -> str:
    """The line for an override whose value Hydra's grammar cannot read."""
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override}: not of the form key=value; write e.g. model=tiny or train.iterations=5"
    text = value.strip("\"'").replace('"', '\\"')
    quoted = shlex.quote(f'{key}="{text}"')
    return f"{key}: cannot read {value}; quote text with special characters, as in {quoted}"
