"""Parquet: text however it is stored, other types refused by name, damage said with the row."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ldft.errors import ConfigError
from ldft.training.text import documents
from tests.training.text.conftest import contents, refusal, write_jsonl

TEXTS = ["a b", None, "", "\N{GRINNING FACE} c"]


def encoded(texts: list[str | None]) -> list[bytes | None]:
    return [None if text is None else text.encode() for text in texts]


def write(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    "column",
    [
        pa.array(TEXTS),
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS, pa.string_view()),
        pa.array(TEXTS).dictionary_encode(),
        pa.array(encoded(TEXTS)),
        pa.array(encoded(TEXTS), pa.large_binary()),
        pa.array(encoded(TEXTS), pa.binary_view()),
        pa.array(encoded(TEXTS)).dictionary_encode(),
    ],
    ids=lambda column: str(column.type),
)
def test_text_is_read_however_it_is_stored(column: pa.Array, tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", n=[1, 2, 3, 4], text=column)
    jsonl = write_jsonl(tmp_path / "x.jsonl", [{"text": text} for text in TEXTS])
    assert contents(path) == contents(jsonl) == ["a b", None, None, "\N{GRINNING FACE} c"]


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pa.array([["a", "b"]]), "list<element: string>"),
        (pa.array([{"a": "b"}]), "struct<a: string>"),
        (pa.array([5]), "int64"),
        (pa.array([1.5]), "double"),
        (pa.array([True]), "bool"),
        (pa.array([b"0123456789abcdef"], pa.binary(16)), "fixed_size_binary[16]"),
        (pa.array([1], pa.timestamp("us")), "timestamp[us]"),
        (pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string())), "map<string, string"),
        (pa.array([5, 6]).dictionary_encode().slice(0, 1), "int64"),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_another_type_is_refused_by_name_before_a_row_is_read(
    column: pa.Array, kind: str, tmp_path: Path, words: Path
) -> None:
    path = write(tmp_path / "x.parquet", text=column)
    line = refusal(path, words)
    assert line.startswith(f"data.column: text of {path} holds {kind}"), line
    assert line.endswith("not text; write a column of text")
    path = write(tmp_path / "y.parquet", text=column, body=pa.array(["a"]))
    assert refusal(path, words).endswith("use data.column=body")
    assert contents(path, "body") == ["a"]


def test_columns_that_are_missing_double_or_conversations(tmp_path: Path, words: Path) -> None:
    path = write(tmp_path / "x.parquet", content=["a"])
    assert "has no column text (it has content); use data.column=<name>" in refusal(path, words)
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "y.parquet")
    assert "has 2 columns text; rename one" in refusal(tmp_path / "y.parquet", words)
    path = write(tmp_path / "z.parquet", text=[[{"role": "user", "content": "a"}]])
    assert "data=chat trains on conversations" in refusal(path, words)
    for empty in (pa.array([], pa.string()), pa.nulls(3), pa.array(["", None, ""])):
        assert "contains no text" in refusal(write(tmp_path / "e.parquet", text=empty), words)


def not_utf8(count: int) -> pa.Array:
    """`count` rows of a, then one that claims to be a string and is not UTF-8."""
    offsets = pa.array([*range(count + 1), count + 2], pa.int32()).buffers()[1]
    return pa.Array.from_buffers(pa.string(), count + 1, [None, offsets, pa.py_buffer(b"a" * count + b"b\xff")])


@pytest.mark.parametrize("column", [not_utf8(99), pa.array([b"a"] * 99 + [b"b\xff"])], ids=["string", "binary"])
def test_a_row_that_is_not_utf8_is_named(column: pa.Array, tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", text=column)
    with pytest.raises(ConfigError, match=r"x.parquet, row 100, is not UTF-8 \(byte 1 of the value\); convert it"):
        contents(path)


def test_damage_anywhere_is_one_line(tmp_path: Path, words: Path) -> None:
    """Bytes overwritten at random places: in the header, pages, indices and the footer. Read, or refused in one line."""
    path = tmp_path / "x.parquet"
    seen = set()
    for compression in ("snappy", "none"):
        pq.write_table(pa.table({"text": [f"hello world {n}" for n in range(200)]}), path, compression=compression)
        whole = path.read_bytes()
        draw = random.Random(7)
        for turn in range(150):
            damaged = bytearray(whole)
            start = draw.randrange(4, len(whole) - 1)
            count = min(draw.choice([1, 4, 40, 360]), len(whole) - start)
            damaged[start : start + count] = draw.randbytes(count)
            path.write_bytes(damaged if turn % 5 else damaged[:start])
            try:
                contents(path)
            except ConfigError as error:
                assert "\n" not in str(error) and str(path) in str(error)
                seen.add(str(error).split("(")[0].replace(str(path), "F"))
    assert any("F is damaged after row" in line for line in seen), seen
    path.write_bytes(whole[:40] + b"\xff" * 360 + whole[400:])
    assert "is damaged after row" in refusal(path, words)
    path.write_text("not parquet")
    assert "is not a parquet file" in refusal(path, words)
    path.write_bytes(b"")
    assert "is not a parquet file" in refusal(path, words)


def test_a_large_row_group_is_read_as_it_is_asked_for(tmp_path: Path) -> None:
    """One row group of 128 MiB; the first rows need no more than a fraction of it."""
    draw = random.Random(0)
    texts = [draw.randbytes(16 << 10).hex() for _ in range(4096)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "x.parquet", row_group_size=4096, use_dictionary=False)
    before = pa.total_allocated_bytes()
    rows = documents.read(tmp_path / "x.parquet", "text", chat=False)
    first = [next(rows).content for _ in range(100)]
    assert first == texts[:100]
    assert pa.total_allocated_bytes() - before < 48 << 20
