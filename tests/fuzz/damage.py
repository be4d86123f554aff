"""Ways in which files come damaged: bytes overwritten, cut or repeated; a value in JSON replaced by another."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 10),
        st.sampled_from([2**31, 2**63, -(2**63), 10**40, 1e308, float("inf"), float("-inf"), float("nan"), 0.5, -1.0]),
        st.sampled_from(
            ["", "auto", "cpu", "none", "null", "<s>", "é", "\ud800", "x" * 300, "1e5", "../..", "/nonexistent"]
        ),
        st.text(max_size=8),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """`whole` after one to three accidents."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(0, len(data) - 1)))
        end = min(len(data), start + draw(st.sampled_from([1, 2, 4, 8, 40, 300, 1 << 20])))
        match draw(st.sampled_from(["overwrite", "zero", "cut", "truncate", "repeat", "insert"])):
            case "overwrite":
                data[start:end] = (
                    draw(st.binary(min_size=end - start, max_size=end - start)) if end - start < 400 else b"\xff" * 9
                )
            case "zero":
                data[start:end] = bytes(end - start)
            case "cut":
                del data[start:end]
            case "truncate":
                del data[start:]
            case "repeat":
                data[start:start] = data[start:end]
            case _:
                data[start:start] = draw(
                    st.sampled_from([b"\0", b"\n", b"\xef\xbb\xbf", b"\xed\xa0\x80", b'"', b"{", b"]", b"NaN"])
                )
    return bytes(data)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in _places(inner, (*path, key)))]


@st.composite
def changed(draw: st.DrawFn, whole: Any) -> str:
    """The text of a JSON value of which one to three values are replaced, removed or renamed."""
    value = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from(_places(value))) or (None,)
        if last is None:
            value = draw(json_values)
            continue
        holder = value
        for key in path:
            holder = holder[key]
        match draw(st.sampled_from(["replace", "replace", "remove", "rename"])):
            case "replace":
                holder[last] = draw(json_values)
            case "rename" if isinstance(holder, dict):
                holder[draw(st.text(max_size=8))] = holder.pop(last)
            case _:
                del holder[last]
    text = json.dumps(value)
    return text if draw(st.integers(0, 9)) else draw(damaged(text.encode())).decode(errors="surrogateescape")
