"""Values of one column of a parquet file, whose type is checked before a row is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldft.errors import ConfigError
from ldft.training.text import utf8

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_BATCH_ROWS = 64
# Column chunks are read through a buffer of this size, not whole.
_BUFFER_BYTES = 1 << 20


def rows(path: Path, columns: tuple[str, ...], *, chat: bool) -> Iterator[tuple[str, list[Any]]]:
    """(place, values of the columns) of each row. The first column must exist; the others may be missing: None.

    Raises ConfigError if the file is damaged or the column has another type: text (strings, or bytes to be decoded), or with chat
    lists of structs.
    """
    import pyarrow as pa

    start = utf8.head(path)
    if start[:4] == b"PARE":
        raise ConfigError("data.path", f"{path} is encrypted; decrypt it")
    if other := utf8.other_content(start):
        raise ConfigError("data.path", f"{path} is {other}")
    if start[:4] != b"PAR1":
        raise ConfigError("data.path", f"{path} is not a parquet file; name a .txt, .jsonl or .parquet")
    number = 0
    try:
        file = _open(path)
        names = file.schema_arrow.names
        _check_column(path, file.schema_arrow, columns[0], chat)
        present = [name for name in columns if name in names]
        for batch in file.iter_batches(columns=present, batch_size=_BATCH_ROWS):
            found = {name: _values(batch.column(name), path, number) for name in present}
            for values in zip(*found.values(), strict=True):
                number += 1
                by_name = dict(zip(found, values, strict=True))
                yield f"{path}, row {number}", [_without_nulls(by_name.get(name)) for name in columns]
    # Damage shows as any of these: thrift and compression raise OSError, indices IndexError, names and lengths the others.
    except (pa.ArrowException, OSError, IndexError, UnicodeDecodeError) as error:
        raise ConfigError(
            "data.path", f"{path} is damaged after row {number} ({' '.join(str(error).split())[:120]}); write it again"
        ) from None


def _open(path: Path) -> pq.ParquetFile:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES, page_checksum_verification=True)


def _check_column(path: Path, schema: pa.Schema, column: str, chat: bool) -> None:
    names = schema.names
    if column not in names:
        raise ConfigError(
            "data.column",
            f"{path} has no column {column} (it has {', '.join(names) or 'none'}); use data.column=<name> for another",
        )
    if names.count(column) > 1:
        raise ConfigError("data.column", f"{path} has {names.count(column)} columns {column}; rename one of them")
    found = schema.field(column).type
    wanted = "lists of {role, content}" if chat else "text"
    if is_list_of_structs(found) if chat else is_text(found):
        return
    fitting = [name for name in names if names.count(name) == 1 and is_text(schema.field(name).type)]
    if chat:
        fitting = [name for name in names if is_list_of_structs(schema.field(name).type)]
        other = "data=text trains on text" if is_text(found) else ""
    else:
        other = "data=chat trains on conversations" if is_list_of_structs(found) else ""
    fix = f"use data.column={fitting[0]}" if fitting else other or f"write a column of {wanted}"
    raise ConfigError("data.column", f"{column} of {path} holds {str(found)[:100]}, not {wanted}; {fix}")


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type of the values, however they are stored."""
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        return _plain(kind.storage_type)
    return _plain(kind.value_type) if pa.types.is_dictionary(kind) else kind


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold text: strings, bytes, or nothing but nulls."""
    from pyarrow import types

    kind = _plain(kind)
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    return any(test(kind) for test in (*tests, types.is_binary, types.is_large_binary, types.is_binary_view))


def is_list_of_structs(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold conversations."""
    from pyarrow import types

    kind = _plain(kind)
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    return any(test(kind) for test in lists) and types.is_struct(_plain(kind.value_type))


def _values(column: pa.Array, path: Path, before: int) -> list[Any]:
    """The values of a batch; `before` rows were read. Raises ConfigError with the row if a string is not UTF-8."""
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        for number, value in enumerate(column, before + 1):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                raise not_utf8(f"{path}, row {number}", error) from None
        raise
    return values


def not_utf8(place: str, error: UnicodeDecodeError) -> ConfigError:
    """The error for bytes of a row that are not UTF-8."""
    return ConfigError("data.path", f"{place}, is not UTF-8 (byte {error.start} of the value); convert it")


def _without_nulls(value: Any) -> Any:
    """The value without the keys that are null: a struct has every key that any row has, where JSON leaves it out."""
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
