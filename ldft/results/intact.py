"""Whether a parquet file is as it was written: what reading it raises where it is not, and what is read without an error all the
same. Parquet has no checksum by default, so a changed byte in a column's values or in a name is seen only by its effect."""

from __future__ import annotations

import pyarrow as pa

# Damage shows as any of these: thrift and compression raise OSError, indices IndexError, names UnicodeDecodeError.
DAMAGE = (OSError, pa.ArrowException, IndexError, UnicodeDecodeError)


def check(table: pa.Table, *needed: str) -> None:
    """Raises ArrowInvalid if a needed column lacks, or if values are none of their type's, such as text that is not UTF-8."""
    if not set(needed) <= set(table.column_names):
        raise pa.ArrowInvalid(f"it has no columns {', '.join(needed[:-1])} and {needed[-1]}")
    table.validate(full=True)
