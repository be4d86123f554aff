"""Fills the model's keys that are left to its config.json: those with the value `${config_json}`, as in model=from_hf.

It happens in the parent before anything else, so that a run's identity is that of the model it trains, not of a path.
"""

from __future__ import annotations

import copy
from pathlib import Path

from ldft.config import Config, ModelConfig, Weights
from ldft.config.root import FROM_FILE
from ldft.errors import ConfigError
from ldft.training import config_json

ASKED = "model"
"""The key in `asked` under which a filled model says where it is from."""
_imported: dict[str, tuple[ModelConfig, list[str]]] = {}


def fill(config: Config) -> None:
    """Replace every `${config_json}` of the model by the value from its config.json; `asked` then names the file and its hash.

    Keys that were given stay; model.extra and model.rope_scaling are added to the file's. With random weights model.path has then
    served and is emptied. Raises ConfigError if there is no such file, or if ldft cannot build its model.
    """
    open_keys = [key for key, value in config.asked.items() if value == FROM_FILE]
    if not open_keys:
        return
    model = config.model
    source = config_json.read(model.path, model.hf_id)
    found, notes = _read(source)
    family = found.family if "model.family" in open_keys else model.family
    if family != found.family:
        raise ConfigError("model.family", f"{family}, but {source.where} is of {found.family}; leave it out")
    for key in open_keys:
        name = key.removeprefix("model.")
        setattr(model, name, getattr(found, name))
    model.extra = config_json.shortened(found.extra, found.num_layers, model.num_layers) | model.extra
    replaced = {"rope_type", "type"} & model.rope_scaling.keys()
    model.rope_scaling = model.rope_scaling if replaced else found.rope_scaling | model.rope_scaling
    if model.weights is Weights.random:
        model.path = ""
    elif model.path and Path(model.path).expanduser().is_file():  # the file itself was named: the weights lie beside it
        model.path = str(Path(model.path).parent)
    config.asked = {key: value for key, value in config.asked.items() if key not in open_keys}
    config.asked[ASKED] = "; ".join([f"from {source.where}, sha256 {source.sha256[:16]}", *notes])


def _read(source: config_json.ConfigJson) -> tuple[ModelConfig, list[str]]:
    """The model of a file, converted once for all cells of a sweep that use it."""
    from ldft.training import hf_import  # takes seconds, and most runs have an option of ldft's

    key = f"{source.where} {source.sha256}"
    if key not in _imported:
        imported = hf_import.convert(source)
        _imported[key] = imported.model, imported.said
    model, notes = _imported[key]
    return copy.deepcopy(model), notes
