"""Spares Hydra a composition. To learn `hydra.mode`, which a file of conf/sweep/ sets so that `+sweep=` works without -m, Hydra
composes the whole config, and then again to run it. Nearly always nothing can have set the mode, and looking takes a hundredth of
the time."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra

from ldft.environment import CONF_DIR

# What sets the mode in a file, or lets another file be read that may. An enum can be written by name or by number.
_SETS = re.compile(r"\b(?:MULTI)?RUN\b|\bmode\s*:\s*\W?\d|searchpath")
# A defaults list that takes an option of the group sweep.
_TAKES_SWEEP = re.compile(r"^\s*-[^#\n]*\bsweep\b", re.MULTILINE)
_KNOWN = {"hydra", "main", "ldft", "schema"}


def can_be_set(overrides: list[str], providers: set[str]) -> bool:
    """Whether anything may set hydra.mode. False only if nothing does. providers: of Hydra's search path."""
    if not providers <= _KNOWN or any("hydra" in override or "sweep" in override for override in overrides):
        return True
    # Not Path.rglob, which leaves out folders behind links, as conf/local may be.
    for folder, _, names in os.walk(CONF_DIR, followlinks=True):
        for file in (Path(folder, name) for name in names if name.endswith(".yaml")):
            text = file.read_text(encoding="utf-8", errors="replace")
            if (file.parent.name != "sweep" and _SETS.search(text)) or _TAKES_SWEEP.search(text):
                return True
    return False


_composed = Hydra.get_mode


def _mode(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
    providers = {element.provider for element in self.config_loader.get_search_path().get_path()}
    return _composed(self, config_name, overrides) if can_be_set(overrides, providers) else None


def install() -> None:
    """Let Hydra ask here. Call it before `hydra.main`'s function; repeated calls have no effect."""
    Hydra.get_mode = _mode
