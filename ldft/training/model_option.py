"""`python -m ldft.model FOLDER_OR_ID`: writes the option file of a model from its Hugging Face config.json to standard output."""

from __future__ import annotations

import re
import sys
from argparse import RawDescriptionHelpFormatter
from dataclasses import fields
from typing import Any

import yaml

from ldft import files
from ldft.config import ModelConfig
from ldft.errors import LdftError
from ldft.terminal import Parser
from ldft.training import config_json

# In every file, even with their default values: what tells one model from another.
_ALWAYS = (
    "name", "family", "num_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "rope_theta", "tie_word_embeddings",
)  # fmt: skip
_WIDTH = 130
_DESCRIPTION = """\
Print the ldft option of a model, made from its Hugging Face config.json.

Write the output to a file to use the model by a name of your own:
  python -m ldft.model ~/models/Qwen3-8B > conf/local/model/mine.yaml
  python -m ldft model=mine

To run a model without a file of its own: python -m ldft model=from_hf model.path=~/models/Qwen3-8B
"""


def option(model: ModelConfig, comment: list[str]) -> str:
    """The text of an option file: comment lines, then the keys in their usual order."""
    default, lines = ModelConfig(), [f"# {line}" for line in comment]
    for key in (field.name for field in fields(ModelConfig)):
        value = getattr(model, key)
        if key in _ALWAYS or value != getattr(default, key):
            lines.append(_line(key, value))
    return "\n".join(lines) + "\n"


def _line(key: str, value: Any) -> str:
    style = None if isinstance(value, dict | list) else False  # None: a list or dict of plain values in one line
    text = yaml.safe_dump({key: value}, default_flow_style=style, width=_WIDTH, sort_keys=False, allow_unicode=True)
    return str(text).rstrip("\n")


def _text(source: config_json.ConfigJson, name: str) -> str:
    """The option of a config.json, with the number of parameters that transformers builds from it."""
    from ldft.training.hf_import import convert

    imported = convert(source)
    published = f"published as {imported.model.hf_id}" if imported.model.hf_id else f"from {source.where}"
    comment = [f"{imported.model.family}, {published}: {imported.parameters:,} parameters."]
    imported.model.name = name or imported.model.name
    return option(imported.model, comment + [f"{note[0].upper()}{note[1:]}." for note in imported.said])


def main() -> int:
    """Returns the exit code: 0, or 2 if there is no such file or ldft cannot build its model."""
    parser = Parser(prog="python -m ldft.model", description=_DESCRIPTION, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "model",
        metavar="FOLDER_OR_ID",
        help="a folder with a config.json, or organisation/name on the Hugging Face hub",
    )
    parser.add_argument("--name", default="", help="the name in rows and tables (default: made from the folder or id)")
    arguments = parser.parse_args()
    where = arguments.model
    try:
        on_hub = not files.named(where, "model.path").exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", where) is not None
        print(_text(config_json.read("" if on_hub else where, where if on_hub else ""), arguments.name), end="")
    except LdftError as error:
        print(f"ldft: {error}", file=sys.stderr)
        return 2
    return 0
