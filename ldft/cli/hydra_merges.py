"""What Hydra merges without a word: a mapping, on the command line or in a file, into the one that is there, so that an empty one
does nothing and a rotary embedding of another type keeps parameters that nobody wrote; keys of this machine's defaults into an
option that the command names; and `???` in a file, which it drops.
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
_DEFAULTS = "local/default"
# Hydra's own, in which each value on the command line and each file ends.
_stock_apply = ConfigLoaderImpl._apply_overrides_to_config
_stock_compose = ConfigLoaderImpl._compose_config_from_defaults_list
_stock_load = ConfigLoaderImpl._load_single_config
_stock_parse = ConfigLoaderImpl._parse_overrides_and_create_caching_repo
_stock_read = ConfigRepository.load_config


def install(sections: tuple[str, ...]) -> None:
    """Let Hydra replace such mappings, and refuse such files and those that are not UTF-8. sections: keys with an open set of keys
    below them."""
    loaded: list[DictConfig] = []
    """The files of a composition, in the order in which Hydra merges them."""
    named: set[str] = set()
    """What the command sets, groups among it."""

    def parse(self: ConfigLoaderImpl, config_name: str | None, overrides: list[str]) -> Any:
        found = _stock_parse(self, config_name, overrides)
        named.clear()
        named.update(one.key_or_group for one in found[0] if not one.is_sweep_override())
        return found

    def apply(overrides: list[Override], tree: DictConfig) -> None:
        for override in overrides:
            key = override.key_or_group
            given = override.value() if key.startswith(sections) and not override.is_delete() else None
            if isinstance(given, dict) and key.startswith(f"{_ROPE}."):  # of one layer type
                key, given = _ROPE, {key.removeprefix(f"{_ROPE}."): given}
            if isinstance(given, dict) and key in sections:  # else the typed tree says what is wrong
                _set(tree, key, _left(key, _section(tree, key), given, tree))
            _stock_apply([override], tree)

    def compose(self: ConfigLoaderImpl, defaults: list[Any], repo: Any) -> DictConfig:
        loaded.clear()
        tree: DictConfig = _stock_compose(self, _in_order(defaults, named), repo)
        for key in sections:
            found: Any = None
            for given in (_section(one, key) for one in loaded):
                if isinstance(given, dict):
                    found = OmegaConf.to_container(OmegaConf.merge(_left(key, found or {}, given, tree), given))
            if found is not None:
                _set(tree, key, found)
        return tree

    def load(self: ConfigLoaderImpl, default: Any, repo: Any) -> Any:
        found = _stock_load(self, default, repo)
        if not (default.config_path or "").startswith("hydra/"):
            refuse_missing(OmegaConf.to_container(found.config), where=f" in {default.config_path}.yaml")
            if default.config_path != "schema":  # whose empty mappings nobody wrote
                loaded.append(found.config)
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
    ConfigLoaderImpl._parse_overrides_and_create_caching_repo = parse
    ConfigLoaderImpl._apply_overrides_to_config = staticmethod(apply)
    ConfigLoaderImpl._compose_config_from_defaults_list = compose
    ConfigLoaderImpl._load_single_config = load


def _in_order(files: list[Any], named: set[str]) -> list[Any]:
    """The files to merge, with options that the command names behind this machine's defaults: their values count."""
    at = next((number for number, file in enumerate(files) if file.config_path == _DEFAULTS), 0)
    before = files[:at]
    chosen = [file for file in before if (file.config_path or "").partition("/")[0] in named]
    return [*(file for file in before if file not in chosen), *files[at : at + 1], *chosen, *files[at + 1 :]]


def _section(tree: DictConfig, key: str) -> Any:
    found = OmegaConf.select(tree, key)
    return OmegaConf.to_container(found) if OmegaConf.is_config(found) else found


def _set(tree: DictConfig, key: str, value: dict[str, Any]) -> None:
    if value != _section(tree, key):
        OmegaConf.update(tree, key, value, merge=False)


def _left(key: str, there: dict[str, Any], given: Mapping[str, Any], tree: DictConfig) -> dict[str, Any]:
    """What stays of a section when `given` is merged into it. Raises ConfigError if that is not known yet."""
    if not given and FROM_FILE in _section(tree, "model").values():
        if key == _EXTRA:
            raise ConfigError(key, "{} would leave the keys of config.json; give those that are to change")
        if key == _ROPE:
            return {"rope_type": "default"}  # an empty one would be filled from the file
    if key == _ROPE:
        return _left_of_rope(there, given)
    return there if given else {}


def _left_of_rope(there: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Nothing if `given` is empty or of another type, or if only one of them is by layer type."""
    if not given or _by_layer(there) != _by_layer(given):
        return {}
    if _by_layer(there):
        return {
            name: _left_of_rope(value, given[name])
            if isinstance(value, Mapping) and isinstance(given.get(name), Mapping)
            else value
            for name, value in there.items()
        }
    return {**there} if _kind(given) in (None, _kind(there)) else {}


def _by_layer(rope: Mapping[str, Any]) -> bool:
    return any(isinstance(value, Mapping) for value in rope.values())


def _kind(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type"))
