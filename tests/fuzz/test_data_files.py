"""Damaged text, conversations and tokenizers: read, or refused in one line, by the parent and when a rank reads all of it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldft.errors import LdftError
from ldft.training.text import check, packing
from ldft.training.text.packing import Source
from tests.fuzz.damage import changed, damaged, json_values
from tests.training.text.conftest import WORDS, config_of

TEXTS = ["a b c", "d e", "", "f g h i j", "é", None]
CHATS = [
    {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b c"}, {"role": "assistant", "content": "d"}]},
    {"messages": [{"role": "user", "content": "e"}, {"role": "assistant", "content": "f g"}]},
]  # fmt: skip
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"


def jsonl(rows: list[Any]) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def parquet(rows: list[Any], compression: str = "snappy") -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, compression=compression)
    return buffer.getvalue()


TEXT_ROWS = [{"text": text, "id": number} for number, text in enumerate(TEXTS)]
WHOLE = {
    "text.txt": "a b c\n\nd é f\n".encode(),
    "text.jsonl": jsonl(TEXT_ROWS),
    "text.parquet": parquet(TEXT_ROWS),
    "plain.parquet": parquet(TEXT_ROWS, "none"),
    "chat.jsonl": jsonl(CHATS),
    "chat.parquet": parquet(CHATS),
}


@pytest.fixture
def tokenizer(word_tokenizer: Callable[..., Path]) -> Path:
    folder = word_tokenizer(WORDS, end="</s>")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return folder


def try_it(path: Path, tokenizer: Path, kind: str, loss: str = "all") -> None:
    config = config_of(path, tokenizer, kind, loss=loss)
    try:
        config.data.validate()
        check.check(config)
        packing.pack(Source.of(config), 4, 8)
    except LdftError as error:
        assert str(error) and "\n" not in str(error)


@pytest.mark.parametrize("name", WHOLE)
@given(data=st.data())
def test_a_damaged_file(name: str, data: st.DataObject, tokenizer: Path, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(data.draw(damaged(WHOLE[name])))
    kind = "chat" if name.startswith("chat") else "text"
    try_it(file, tokenizer, kind, data.draw(st.sampled_from(["all", "assistant"] if kind == "chat" else ["all"])))


@given(rows=st.lists(st.one_of(json_values, changed(CHATS[0]), changed(TEXT_ROWS[0])), min_size=1, max_size=3))
@pytest.mark.parametrize("kind", ["text", "chat"])
def test_lines_of_other_values(kind: str, rows: list[Any], tokenizer: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    lines = [row if isinstance(row, str) and row[:1] in '[{"' else json.dumps(row) for row in rows]
    file.write_bytes("\n".join(lines).encode(errors="surrogatepass"))
    try_it(file, tokenizer, kind)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@given(data=st.data())
def test_a_damaged_tokenizer(name: str, data: st.DataObject, tokenizer: Path, tmp_path: Path) -> None:
    whole = (tokenizer / name).read_text()
    text = tmp_path / "text.txt"
    text.write_bytes(WHOLE["text.txt"])
    chat = tmp_path / "chat.jsonl"
    chat.write_bytes(WHOLE["chat.jsonl"])
    try:
        (tokenizer / name).write_bytes(data.draw(changed(json.loads(whole))).encode(errors="surrogateescape"))
        try_it(text, tokenizer, "text")
        try_it(chat, tokenizer, "chat", "assistant")
    finally:
        (tokenizer / name).write_text(whole)
