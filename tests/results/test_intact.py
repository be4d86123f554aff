"""What a parquet file's table lacks, or holds that its types do not allow."""

from __future__ import annotations

import pyarrow as pa
import pytest

from ldft.results import intact


def test_a_missing_column_and_text_that_is_none_are_found() -> None:
    good = pa.table({"a": [1], "b": ["x"]})
    intact.check(good, "a", "b")
    with pytest.raises(pa.ArrowInvalid, match=r"^it has no columns a, b and c$"):
        intact.check(good, "a", "b", "c")
    ends, bytes_ = pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")
    bad = pa.Array.from_buffers(pa.utf8(), 1, [None, ends, bytes_])
    with pytest.raises(pa.ArrowInvalid, match="UTF8"):
        intact.check(pa.table({"a": bad}), "a")
