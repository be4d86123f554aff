"""A saved fast tokenizer: the folder's files, the token that ends a document, and whether its ids fit the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldft import files
from ldft.errors import ConfigError
from ldft.training.text import utf8

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_TOKENIZER = "tokenizer.json"
_SETTINGS = "tokenizer_config.json"
# Where the text of the end token stands, and where only its id does; the first that has one counts.
_TEXTS = (_SETTINGS, "special_tokens_map.json")
_IDS = ("generation_config.json", "config.json")
# Files of tokenizers without a tokenizer.json.
_SLOW = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "tiktoken.model", "vocab.json")


@dataclass(frozen=True, slots=True)
class Loaded:
    tokenizer: Tokenizer
    end: int | None
    """Id of the token that ends a document; None if no file names one."""

    vocab_size: int
    """Ids below it have an embedding."""

    beyond: bool
    """Whether special tokens lie beyond it. They must not occur in the data."""

    def check(self, ids: list[int], place: str) -> None:
        """Raise ConfigError if an id has no embedding."""
        if self.beyond and ids and (highest := max(ids)) >= self.vocab_size:
            raise ConfigError(
                "data.tokenizer",
                f"{place}, holds {self.tokenizer.id_to_token(highest)!r}, id {highest}, beyond model.vocab_size="
                f"{self.vocab_size}; take it out, or use the tokenizer of this model",
            )


def load(folder: str, vocab_size: int) -> Loaded:
    """The tokenizer of a folder, cutting and padding nothing. Raises ConfigError if it is damaged or does not fit the model."""
    from tokenizers import Tokenizer

    path = files.named(files.named(folder, "data.tokenizer") / _TOKENIZER, "data.tokenizer")
    if not path.is_file():
        raise _missing(path.parent, folder)
    stored = read_object(path)
    with usable(f"{path} cannot be used", "save it with the tokenizers installed here, or update them"):
        tokenizer = Tokenizer.from_file(str(path))
    # A tokenizer saved after training a classifier cuts every text at its length, or pads it.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    end = _end(path.parent, tokenizer)
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    # Special tokens occur only where the text spells them, e.g. <image>, so each document is checked for them instead.
    special = {token["id"] for token in stored.get("added_tokens") or [] if token["special"]}
    used = max([number for number in ids if number not in special] + [-1 if end is None else end])
    if used >= vocab_size:
        raise ConfigError(
            "data.tokenizer",
            f"{folder} has ids up to {used} ({tokenizer.id_to_token(used)!r}), model.vocab_size is {vocab_size}; use the "
            "tokenizer of this model",
        )
    return Loaded(tokenizer, end, vocab_size, max(ids) >= vocab_size)


@contextmanager
def usable(problem: str, fix: str) -> Iterator[None]:
    """Turn what tokenizers raises about its file or a text into a ConfigError of this problem and fix."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:  # tokenizers raises no class of its own; any other is a bug
            raise
        text = " ".join(str(error).split())[:150]
        raise ConfigError("data.tokenizer", f"{problem} ({text}); {fix}") from None


def settings(folder: Path) -> dict[str, Any]:
    """What tokenizer_config.json holds; nothing if there is none. Raises ConfigError if it is damaged."""
    return _object_if_there(folder / _SETTINGS)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ConfigError with the line if it is not one."""
    try:
        text = path.read_text(encoding="utf-8")
        if other := utf8.other_content(text[:100].encode()):
            raise ConfigError("data.tokenizer", f"{path} is {other}")
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ConfigError(
            "data.tokenizer",
            f"{path}, line {error.lineno}, is not JSON ({error.msg}); fix it or save the tokenizer again",
        ) from None
    except (ValueError, RecursionError):  # not UTF-8, half a surrogate pair, or integers or nesting without end
        raise ConfigError("data.tokenizer", f"{path} is damaged; save the tokenizer again") from None
    except OSError as error:
        raise ConfigError("data.tokenizer", f"cannot read {path} ({error.strerror}); make it readable") from None
    if not isinstance(value, dict):
        raise ConfigError("data.tokenizer", f"{path} holds no JSON object; save the tokenizer again")
    return value


def _missing(path: Path, folder: str) -> ConfigError:
    if path.name == _TOKENIZER or path.is_file():
        return ConfigError("data.tokenizer", f"'{folder}' is a file; name the folder that holds {_TOKENIZER}")
    if not path.is_dir():
        return ConfigError(
            "data.tokenizer",
            f"no {_TOKENIZER} in '{folder}', which is no folder here; name a local one (hf download <model> --local-dir)",
        )
    if slow := [name for name in _SLOW if (path / name).is_file()]:
        return ConfigError(
            "data.tokenizer",
            f"no {_TOKENIZER} in '{folder}', only {slow[0]}; convert it with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)",
        )
    return ConfigError("data.tokenizer", f"no {_TOKENIZER} in '{folder}'; name the folder of a saved fast tokenizer")


def _end(folder: Path, tokenizer: Tokenizer) -> int | None:
    """The id of the token that ends a document: the tokenizer's, else the model's. Raises ConfigError if it is no token."""
    for name in _TEXTS:
        end = _object_if_there(folder / name).get("eos_token")
        end = end.get("content") if isinstance(end, dict) else end
        if not end:
            continue
        number = _id(end, folder, tokenizer) if isinstance(end, str) else None
        if number is None:
            raise ConfigError(
                "data.tokenizer",
                f"eos_token {json.dumps(end)} of {folder / name} is no token of {_TOKENIZER}; correct it",
            )
        return number
    for name in _IDS:
        number = _object_if_there(folder / name).get("eos_token_id")
        # Of several ids the first ends a text; the others end a turn of a conversation.
        number = number[0] if isinstance(number, list) and number else number
        if type(number) is int and number >= 0:
            return number
    return None


def _object_if_there(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _id(token: str, folder: Path, tokenizer: Tokenizer) -> int | None:
    """The id of a token by the tokenizer, or by the older files that list tokens added to it."""
    number: int | None = tokenizer.token_to_id(token)
    if number is not None:
        return number
    listed = settings(folder).get("added_tokens_decoder")
    for key, added in listed.items() if isinstance(listed, dict) else ():
        if isinstance(added, dict) and added.get("content") == token and str(key).isdecimal():
            return int(key)
    number = _object_if_there(folder / "added_tokens.json").get(token)
    return number if type(number) is int else None
