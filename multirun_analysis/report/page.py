"""The page: one HTML file with its style, its scripts, plotly and the rows inside, which asks the network for nothing."""

from __future__ import annotations

import html
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd

from ldft import files
from ldft.errors import ResultsError
from multirun_analysis import rows, style
from multirun_analysis.report.cells import cells

# In the order in which they are read: each uses what stands in those before it.
_SCRIPTS = ("text", "state", "filters", "overview", "table", "details", "charts", "speed", "memory", "figures", "main")
_STYLES = ("base", "filters", "tables", "details", "narrow")


def write(df: pd.DataFrame, path: Path, source: str, price: float | None = None) -> None:
    """Write the report of loaded rows. source: what the reader is told that the rows are from. price: of one GPU for one hour, as
    the page begins with; the reader may change it.

    Raises ResultsError if plotly is not installed, OSError if the file cannot be written.
    """
    text = page(df, source, price)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as file:
        file.write(text.encode(errors="replace"))  # a folder's name need not be UTF-8


def page(df: pd.DataFrame, source: str, price: float | None = None) -> str:
    """The report as text; the same rows give the same text."""
    parts = {
        "title": html.escape(f"ldft report: {source}"),
        "style": "\n".join(_source(f"{name}.css") for name in _STYLES),
        "plotly": _plotly(),
        "data": embedded(_data(df) | {"price": price}),
        "script": "\n".join(_source(f"{name}.js") for name in _SCRIPTS),
    }
    # In one pass, so that nothing in the rows is taken for a place to fill.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _source("page.html"))


def embedded(data: Any) -> str:
    """JSON that no text in it can end early or turn into markup, wherever in a page it stands."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _data(df: pd.DataFrame) -> dict[str, Any]:
    return {
        "rows": len(df),
        "from": str(df["started_at"].min())[:10],
        "to": str(df["started_at"].max())[:10],
        "commits": rows.versions_of(df),
        "node_colours": style.NODES,
        "cells": cells(df),
    }


def _source(name: str) -> str:
    return resources.files("multirun_analysis.report").joinpath(name).read_text(encoding="utf-8")


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ResultsError("the report needs plotly, which is not installed; run: pip install 'plotly>=6'") from None
    library: str = get_plotlyjs()
    return library
