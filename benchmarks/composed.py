"""A run's config from a command line, as `python -m ldft` would have it. Imports neither numpy nor torch, since a memory policy
applies only to what starts later."""

from __future__ import annotations

from hydra import compose, initialize_config_dir

from ldft.cli import composition
from ldft.config import Config, from_dict
from ldft.environment import CONF_DIR
from ldft.runner import checks


def resolved_config(overrides: list[str]) -> Config:
    """The config of these overrides, resolved for this machine and checked. Raises ConfigError."""
    composition.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
        config = from_dict(compose("config", overrides=overrides))
    checks.resolve(config)
    config.validate()
    return config
