"""Tokenizer folders: the end token from whichever file names it, ids that fit the model, and damage in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from ldft.config import DataConfig
from ldft.errors import ConfigError
from ldft.training.text import tokenizer_folder
from tests.training.text.conftest import WORDS, config_of, refusal, write_jsonl

SLOW = (
    "only tokenizer.model; convert it with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
)


@pytest.fixture
def folder(word_tokenizer: Callable[..., Path]) -> Path:
    """Ten words, an ordinary token </s> with id 10, and no file that says that it ends documents."""
    return word_tokenizer(f"{WORDS} </s>")


def write(folder: Path, **files: Any) -> None:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"eos_token": "</s>"}},
        {"tokenizer_config": {"eos_token": {"content": "</s>", "lstrip": False}}},
        {"special_tokens_map": {"eos_token": "</s>"}},
        {"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": {"content": "</s>"}}},
        {"generation_config": {"eos_token_id": 10}},
        {"generation_config": {"eos_token_id": [10, 3]}, "config": {"eos_token_id": 4}},
        {"config": {"eos_token_id": 10}},
        {"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": [10]}},
        {"tokenizer_config": {"eos_token": "</s>"}, "config": {"eos_token_id": 3}},
    ],
    ids=str,
)
def test_the_end_of_a_document_is_found(files: dict[str, Any], folder: Path) -> None:
    assert tokenizer_folder.load(str(folder), 16).end is None
    write(folder, **files)
    assert tokenizer_folder.load(str(folder), 16).end == 10


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"eos_token": "<e>", "added_tokens_decoder": {"12": {"content": "<e>"}}}},
        {"special_tokens_map": {"eos_token": "<e>"}, "added_tokens": {"<e>": 12}},
    ],
    ids=str,
)
def test_an_end_token_that_only_older_files_list_has_their_id(files: dict[str, Any], folder: Path) -> None:
    write(folder, **files)
    assert tokenizer_folder.load(str(folder), 16).end == 12
    with pytest.raises(ConfigError, match=r"has ids up to 12 \(None\), model.vocab_size is 12"):
        tokenizer_folder.load(str(folder), 12)


def test_an_added_end_token_is_found_by_its_text(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    write(folder, special_tokens_map={"eos_token": "<|end|>"})
    assert tokenizer_folder.load(str(folder), 16).end == 11


def test_a_tokenizer_that_cuts_and_pads_reads_whole_texts(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert tokenizer_folder.load(str(folder), 16).tokenizer.encode("a b c d e").ids == [0, 1, 2, 3, 4]


def test_the_highest_id_counts_not_the_number_of_tokens(folder: Path, tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "x.jsonl", [{"text": "a b"}])
    made = json.loads((folder / "tokenizer.json").read_text())
    made["model"]["vocab"]["far"] = 16
    write(folder, tokenizer=made)
    assert f"data.tokenizer: {folder} has ids up to 16 ('far'), model.vocab_size is 16; use the tok" in refusal(
        text, folder
    )
    assert tokenizer_folder.load(str(folder), 17).end is None


def test_an_added_token_beyond_the_vocabulary_is_refused_if_it_can_occur(folder: Path, tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "x.jsonl", [{"text": "a b"}])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([f"<{n}>" for n in range(6)])  # ids 11 to 16
    tokenizer.save(str(folder / "tokenizer.json"))
    # Gemma 3 has <image_soft_token> one beyond its text models' embedding: harmless where no text spells it.
    loaded = tokenizer_folder.load(str(folder), 16)
    loaded.check(loaded.tokenizer.encode("a <4>").ids, "x")
    spelled = write_jsonl(tmp_path / "y.jsonl", [{"text": "a b"}, {"text": "a <5> b"}])
    assert "y.jsonl, line 2, holds '<5>', id 16, beyond model.vocab_size=16; take it out" in refusal(spelled, folder)
    write(folder, tokenizer_config={"eos_token": "<5>"})
    assert "has ids up to 16 ('<5>'), model.vocab_size is 16" in refusal(text, folder)
    (folder / "tokenizer_config.json").unlink()
    tokenizer.add_tokens([AddedToken("more", special=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert "has ids up to 17 ('more'), model.vocab_size is 16" in refusal(text, folder)


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({"tokenizer": "{"}, "tokenizer.json, line 1, is not JSON ("),
        (
            {"tokenizer": "version https://git-lfs.github.com/spec/v1\noid sha256:ab\n"},
            "tokenizer.json is a git-lfs pointer",
        ),
        ({"tokenizer": "[]"}, "tokenizer.json holds no JSON object"),
        ({"tokenizer": {"model": {"type": "Unheard"}}}, "tokenizer.json cannot be used ("),
        ({"tokenizer": {}}, "tokenizer.json cannot be used ("),
        ({"tokenizer": "[" * 100_000}, "tokenizer.json is damaged; save the tokenizer again"),
        ({"tokenizer_config": '{\n"eos_token": "</s>",\n}'}, "tokenizer_config.json, line 3, is not JSON ("),
        ({"tokenizer_config": "[]"}, "tokenizer_config.json holds no JSON object"),
        ({"tokenizer_config": ""}, "tokenizer_config.json, line 1, is not JSON ("),
        ({"special_tokens_map": "{,}"}, "special_tokens_map.json, line 1, is not JSON ("),
        ({"config": '{"eos_token_id": ' + "9" * 5000 + "}"}, "config.json is damaged"),
        ({"tokenizer_config": {"eos_token": "<gone>"}}, 'eos_token "<gone>" of'),
        ({"tokenizer_config": {"eos_token": "\ud800"}}, "tokenizer_config.json is damaged; save"),
        ({"tokenizer_config": {"eos_token": 5}}, "eos_token 5 of"),
        ({"tokenizer_config": {"eos_token": ["</s>"]}}, 'eos_token ["</s>"] of'),
        ({"config": {"eos_token_id": 16}}, "has ids up to 16"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_damage_is_one_line(files: dict[str, Any], line: str, folder: Path, tmp_path: Path) -> None:
    write(folder, **files)
    found = refusal(write_jsonl(tmp_path / "x.jsonl", [{"text": "a"}]), folder)
    assert found.startswith("data.tokenizer: ") and line in found


def test_a_folder_without_a_fast_tokenizer_says_what_it_has(folder: Path, tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "x.jsonl", [{"text": "a"}])
    for name, line in {
        "missing": "which is no folder here; name a local one",
        "meta-llama/Llama-3.2-1B": "which is no folder here; name a local one (hf download",
        str(folder / "tokenizer.json"): "is a file; name the folder that holds tokenizer.json",
    }.items():
        config = config_of(text, folder)
        config.data = DataConfig(kind=config.data.kind, path=str(text), tokenizer=name)
        assert line in refusal(text, Path(name))
    shutil.move(folder / "tokenizer.json", tmp_path / "x.json")
    assert f"no tokenizer.json in '{folder}'; name the folder of a saved fast" in refusal(text, folder)
    (folder / "tokenizer.model").write_bytes(b"\0")
    assert SLOW in refusal(text, folder)


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_text_that_the_tokenizer_cannot_encode_is_named(kind: str, folder: Path, tmp_path: Path) -> None:
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["model"]["unk_token"] = "gone"
    write(folder, tokenizer=stored)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    rows = [{"text": one, "messages": [{"role": "user", "content": one}]} for one in ("a", "z")]
    found = refusal(write_jsonl(tmp_path / "x.jsonl", rows), folder, kind)
    assert (
        "x.jsonl, line 2, cannot be encoded (WordLevel error: Missing [UNK] token from the vocabulary); correct"
        in found
    )


def test_added_tokens_that_are_no_mapping_are_none(words: Path) -> None:
    (words / "tokenizer_config.json").write_text('{"eos_token": "<nowhere>", "added_tokens_decoder": [1]}')
    with pytest.raises(
        ConfigError, match=r"^data.tokenizer: eos_token \"<nowhere>\" of .* is no token of tokenizer.json"
    ):
        tokenizer_folder.load(str(words), 16)
