"""What Hydra merges without a word: a mapping on the command line into the one that is there, so that an empty one does nothing and
a rotary embedding of another type keeps parameters that nobody wrote; and `???` in a file, which it drops.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from ldft.config.root import FROM_FILE, refuse_missing
from ldft.errors import ConfigError

_ROPE, _EXTRA = "model.rope_scaling", "model.extra"
# Hydra's own, in which each value on the command line and each file ends.
_stock_apply = ConfigLoaderImpl._apply_overrides_to_config
_stock_load = ConfigLoaderImpl._load_single_config
_stock_read = ConfigRepository.load_config


def install(sections: tuple[str, ...]) -> None:
    """Let Hydra replace such mappings, and refuse such files and those that are not UTF-8. sections: keys with an open set of keys
    below them."""

    def apply(overrides: list[Override], tree: DictConfig) -> None:
        for override in overrides:
            if override.key_or_group in sections and not override.is_delete():
                _make_way(override.key_or_group, override.value(), tree)
            _stock_apply([override], tree)

    def load(self: ConfigLoaderImpl, default: Any, repo: Any) -> Any:
        found = _stock_load(self, default, repo)
        if not (default.config_path or "").startswith("hydra/"):
            refuse_missing(OmegaConf.to_container(found.config), where=f" in {default.config_path}.yaml")
        return found

    def read(self: ConfigRepository, config_path: str) -> Any:
        try:
            return _stock_read(self, config_path)
        except UnicodeDecodeError as error:
            folder = next(source.path for source in self.get_sources() if source.is_config(config_path))
            raise ConfigError(
                f"{folder}/{config_path.removesuffix('.yaml')}.yaml",
                f"not UTF-8 (byte {error.start}); save it as UTF-8, or name another option",
            ) from None

    ConfigRepository.load_config = read
    ConfigLoaderImpl._apply_overrides_to_config = staticmethod(apply)
    ConfigLoaderImpl._load_single_config = load


def _make_way(key: str, given: Any, tree: DictConfig) -> None:
    """Take out of the tree what the given mapping replaces. Raises ConfigError if that is not known yet."""
    if not isinstance(given, dict):
        return  # the typed tree says what is wrong
    there: Any = OmegaConf.to_container(OmegaConf.select(tree, key))
    model: Any = OmegaConf.to_container(tree.model)
    left: Any = _left(there, given) if key == _ROPE or not given else there
    if not given and FROM_FILE in model.values():
        if key == _EXTRA:
            raise ConfigError(key, "{} would leave the keys of config.json; give those that are to change")
        left = {"rope_type": "default"} if key == _ROPE else left  # an empty one would be filled from the file
    if left != there:
        OmegaConf.update(tree, key, left, merge=False)


def _left(there: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What stays of a mapping when `given` comes: nothing if that is empty or of another type, or only one is by layer type."""
    if not given or _by_layer(there) != _by_layer(given):
        return {}
    if _by_layer(there):
        return {
            name: _left(value, given[name]) if isinstance(given.get(name), Mapping) else value
            for name, value in there.items()
        }
    return there if _kind(given) in (None, _kind(there)) else {}


def _by_layer(rope: Mapping[str, Any]) -> bool:
    return any(isinstance(value, Mapping) for value in rope.values())


def _kind(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type"))
