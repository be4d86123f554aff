"""A run's config from a command line, as `python -m ldft` would have it. Imports neither numpy nor torch, since a memory policy
applies only to what starts later."""

from __future__ import annotations

from collections.abc import Sequence

from hydra import compose, initialize_config_dir

from ldft.cli import composition
from ldft.config import Config, from_dict
from ldft.environment import CONF_DIR
from ldft.runner import checks


def without_plan(overrides: Sequence[str]) -> list[str]:
    """The same with plan=none unless they ask for a plan: what is compared must not depend on what was measured before."""
    asked = any(text.partition("=")[0].partition(".")[0] == "plan" for text in overrides)
    return [*([] if asked else ["plan=none"]), *overrides]


def resolved_config(overrides: list[str]) -> Config:
    """The config of these overrides, without a plan unless they ask for one, resolved for this machine and checked. Raises
    ConfigError."""
    composition.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
        config = from_dict(compose("config", overrides=without_plan(overrides)))
    checks.resolve(config)
    config.validate()
    return config
