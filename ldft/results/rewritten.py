"""Rows that another program has written again: pandas, polars or DuckDB change types on the way, and this changes them back.

What they do: pandas turns maps into lists of pairs, integers with nulls into floats, and adds its index as a column; polars turns
maps into lists of structs and uses the large variants of strings and lists; a column without any value loses its type.
"""

from __future__ import annotations

import math
import re
from typing import Any

import pyarrow as pa

# The index that pandas adds as a column.
_INDEX = re.compile(r"__index_level_\d+__")


def restored(table: pa.Table, target: pa.Schema) -> pa.Table:
    """The table with the types of `target` where it has the same columns; other columns stay, pandas' index goes.

    Raises ArrowInvalid, with the column's name, if a column holds something else than ldft writes.
    """
    for name in [name for name in table.column_names if _INDEX.fullmatch(name)]:
        table = table.drop_columns([name])
    for position, field in enumerate(table.schema):
        index = target.get_field_index(field.name)
        kind = target.field(index).type if index >= 0 else field.type
        if field.type == kind:
            continue
        if not _fits(field.type, kind):
            raise pa.ArrowInvalid(f"column {field.name} has the type {field.type}, not {kind}: ldft did not write it")
        values = [_value(value, kind) for value in table.column(position).to_pylist()]
        table = table.set_column(position, target.field(index), pa.array(values, type=kind))
    return table


def differs(found: pa.Schema, target: pa.Schema) -> bool:
    """Whether a file has another type than `target` in a column of the same name."""
    return any(field.name in target.names and field.type != target.field(field.name).type for field in found)


def writer(schema: pa.Schema, created_by: str) -> str:
    """The program that wrote a parquet file, as far as the file says, for messages: pandas, DuckDB, Polars, or empty."""
    if b"pandas" in (schema.metadata or {}):
        return "pandas"
    return next((name for name in ("DuckDB", "Polars") if name.lower() in created_by.lower()), "")


def _fits(source: pa.DataType, target: pa.DataType) -> bool:
    """Whether every value of the type `source` that a rewritten row can hold has its place in the type `target`."""
    types = pa.types
    if types.is_null(source):
        return True
    if types.is_dictionary(source):
        return _fits(source.value_type, target)
    if types.is_map(target):
        if types.is_map(source):
            return _fits(source.key_type, target.key_type) and _fits(source.item_type, target.item_type)
        if not _is_list(source):
            return False
        pair = source.value_type
        if types.is_struct(pair):
            parts = [field.type for field in pair]
            return len(parts) == 2 and _fits(parts[0], target.key_type) and _fits(parts[1], target.item_type)
        return types.is_null(pair) or (_is_list(pair) and _fits(pair.value_type, target.item_type))
    if _is_list(target):
        return _is_list(source) and _fits(source.value_type, target.value_type)
    if types.is_struct(target):
        theirs = {field.name: field.type for field in source} if types.is_struct(source) else {}
        return bool(theirs) and all(_fits(theirs[field.name], field.type) for field in target if field.name in theirs)
    same = (
        (types.is_boolean, types.is_boolean),
        (types.is_timestamp, types.is_timestamp),
        (_is_text, _is_text),
        (_is_number, _is_number),
    )
    return any(of_source(source) and of_target(target) for of_source, of_target in same)


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    checks = (
        types.is_list,
        types.is_large_list,
        types.is_list_view,
        types.is_large_list_view,
        types.is_fixed_size_list,
    )
    return any(check(kind) for check in checks)


def _is_text(kind: pa.DataType) -> bool:
    return any(check(kind) for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _is_number(kind: pa.DataType) -> bool:
    return any(check(kind) for check in (pa.types.is_integer, pa.types.is_floating))


def _value(value: Any, kind: pa.DataType) -> Any:
    """A Python value as the type has it."""
    if value is None or (isinstance(value, float) and math.isnan(value) and not pa.types.is_floating(kind)):
        return None
    if pa.types.is_map(kind):
        pairs = (tuple(pair.values()) if isinstance(pair, dict) else tuple(pair) for pair in value)
        return [(_value(key, kind.key_type), _value(item, kind.item_type)) for key, item in pairs]
    if _is_list(kind):
        return [_value(one, kind.value_type) for one in value]
    if pa.types.is_struct(kind):
        return {field.name: _value(value.get(field.name), field.type) for field in kind}
    if pa.types.is_integer(kind):
        if value != int(value):
            raise pa.ArrowInvalid(f"{value} is not a whole number")
        return int(value)
    return value
