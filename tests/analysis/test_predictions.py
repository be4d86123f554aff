"""The figure of predictions against measurements, drawn from a table of a few round numbers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from multirun_analysis import style
from multirun_analysis.figures import predictions
from tests.analysis.conftest import artists


def test_ticks_are_few_round_numbers_within_the_axis() -> None:
    assert predictions._ticks(1, 1.5) == [1, 1.5], "the ends count"
    assert predictions._ticks(0.9, 9) == [1, 1.5, 2, 3, 5, 7]
    assert predictions._ticks(0.9, 10) == [1, 2, 5, 10], "with 1.5, 3 and 7 there are seven"
    assert predictions._ticks(0.09, 0.2) == pytest.approx([0.1, 0.15, 0.2])
    assert predictions._ticks(0.5, 2000) == [1, 10, 100, 1000]
    # One round number is too few, and eight powers are too many: a tenth inside of both ends.
    assert predictions._ticks(2.5, 4) == [2.8, 3.6]
    assert predictions._ticks(0.9, 1e7) == [0.99, 9.1e6]


def test_dots_a_line_of_exact_predictions_a_band_of_a_tenth_and_the_worst_cell() -> None:
    cells = [("host", 10.0, 12.0, 1024), ("host", 30.0, 20.0, 2048), ("vram", 1.02, 1.0, 1024)]
    table = pd.DataFrame(cells, columns=["quantity", "predicted", "measured", "seq_len_tokens"])
    table = table.assign(policy="default", variant="", model="a", title=table["quantity"] + " memory")
    table["ratio"] = table["predicted"] / table["measured"]
    figure = predictions._against(table, "memory", "measured", "predicted")
    host, vram = figure.axes
    assert [axes.get_title(loc="left") for axes in (host, vram)] == ["host memory", "vram memory"]
    assert [axes.get_xlabel() for axes in (host, vram)] == ["measured"] * 2
    assert (host.get_ylabel(), vram.get_ylabel(), host.get_xscale(), host.get_yscale()) == (
        "predicted",
        "",
        "log",
        "log",
    )
    found = artists(figure)
    (dots,) = found["host|default"]
    assert (list(dots.get_xdata()), list(dots.get_ydata())) == ([12, 20], [10, 30])
    assert (dots.get_marker(), dots.get_linestyle()) == (style.policy_style("default")[1], "None")
    assert len(found["vram|default"]) == 1
    # From 10 / 1.4 to 30 x 1.4.
    ends = [10 / 1.4, 42.0]
    assert host.get_xlim() == pytest.approx(ends) and host.get_ylim() == pytest.approx(ends)
    exact = host.lines[0]
    assert exact.get_xydata() == pytest.approx(np.array([ends, ends]).T)
    corners = {(round(x, 6), round(y, 6)) for x, y in np.array(host.collections[0].get_paths()[0].vertices)}
    assert corners == {(round(x, 6), round(y, 6)) for x in ends for y in (x / 1.1, x * 1.1)}
    assert [text.get_text() for text in host.get_yticklabels()] == ["10", "15", "20", "30"]
    assert list(host.get_xticks()) == [10, 15, 20, 30] and not len(host.get_xticks(minor=True))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["default"]
    assert figure.get_suptitle().replace("\n", " ") == (
        "Predicted memory is off by 16.7% in the median, 50.0% at the worst (a 2k default, host memory)"
    )
