"""Bandwidths of a machine: given in the config, or measured once by `python -m ldft.bench nodes` and looked up by host name.

Both have the same form, in GB/s (1e9 bytes per second):

    {node0: {cpu: 278, h2d: 55.6, d2h: 55.5}, node3: {cpu: 69, h2d: 53.5, d2h: 37.2}, link: {h2d: 55.6, d2h: 55.5}}

cpu is the rate of an optimizer step, h2d and d2h the rates of copies to and from GPUs. Without a GPU, omit h2d and d2h: they
default to cpu. Without link, the link's rate defaults to that of the best node's copies.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldft.errors import ConfigError
from ldft.memory.cost_model import Bandwidths

GB = 1e9
# GB/s, far above any memory: beyond, sums overflow.
_MOST = 1_000_000
KEY = "numa.bandwidth"
_FORM = "{node0:{cpu:278,h2d:55,d2h:55},node3:{cpu:69,h2d:53,d2h:37}}, GB/s"


def profile_path(host: str | None = None) -> Path:
    """Path of a machine's profile, by default this machine's."""
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return folder / "ldft" / "hardware" / f"{host or socket.gethostname()}.json"


def bandwidths(given: Mapping[str, Any]) -> Bandwidths | None:
    """Bandwidths from `numa.bandwidth`, else from this machine's profile; None if there is neither. Raises ConfigError."""
    if given:
        return parse(given, KEY)
    path = profile_path()
    try:
        return parse(json.loads(path.read_text())["bandwidth"], f"{KEY}: {path}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            KEY, f"the profile {path} cannot be read; measure again with python -m ldft.bench nodes"
        ) from None


def parse(given: Mapping[str, Any], key: str) -> Bandwidths:
    """Bandwidths from the form above. Raises ConfigError that names the wrong entry."""
    rates: dict[str, dict[int, float]] = {"cpu": {}, "h2d": {}, "d2h": {}}
    for name, entry in given.items():
        if not isinstance(entry, Mapping) or (name != "link" and not name.removeprefix("node").isdigit()):
            raise ConfigError(key, f"{name}: {entry!r} is not a node entry; write {_FORM}")
        for engine, value in entry.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if engine not in rates or not number or not 0 < value <= _MOST:
                allowed = f"write cpu, h2d and d2h above 0 and up to {_MOST}"
                raise ConfigError(key, f"{name}.{engine}: {value!r}; {allowed}, as in {_FORM}")
        if name == "link":
            continue
        if "cpu" not in entry:
            raise ConfigError(key, f"{name} has no cpu; write {_FORM}")
        for engine, by_node in rates.items():
            by_node[int(name.removeprefix("node"))] = GB * float(entry.get(engine, entry["cpu"]))
    if not rates["cpu"]:
        raise ConfigError(key, f"contains no node; write {_FORM}")
    link = given.get("link", {})
    return Bandwidths(
        cpu=rates["cpu"],
        h2d=rates["h2d"],
        d2h=rates["d2h"],
        link_h2d=GB * float(link["h2d"]) if "h2d" in link else max(rates["h2d"].values()),
        link_d2h=GB * float(link["d2h"]) if "d2h" in link else max(rates["d2h"].values()),
    )
