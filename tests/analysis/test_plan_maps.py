"""`python -m multirun_analysis plans`: the figure of a map of plans."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from multirun_analysis.__main__ import main
from multirun_analysis.figures import plans
from tests.analysis.conftest import artists


def cell(model: str, tokens: int, speed: float | None, bound: str | None = None) -> dict[str, object]:
    row = {"model": model, "machine": "h200", "rates": "datasheet", "goal": "fastest", "num_ranks": 1, "tokens": tokens}
    return row | {"fits": speed is not None, "tokens_per_s": speed, "bound": bound}


CELLS = [
    cell("a", 8192, 900.0, "arithmetic"),
    cell("a", 32768, 500.0, "link"),
    cell("b", 8192, 90.0, "link"),
    cell("b", 32768, None),
]


def test_each_plan_is_a_point_and_what_does_not_fit_a_cross() -> None:
    figure = plans.plans(pd.DataFrame(CELLS))
    assert not isinstance(figure, str)
    found = artists(figure)
    (point,) = found["a|32768"]
    assert (list(point.get_xdata()), list(point.get_ydata()), point.get_marker()) == ([32768], [500.0], "s")
    assert "b|32768" not in found
    (cross,) = found["none|b|32768"]
    assert list(cross.get_ydata()) == [figure.axes[0].get_ylim()[0]] and cross.get_marker() == "x"
    # Lines, marks of what binds (nothing is bound by the host's update), and the cross.
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["a", "b", "bound by arithmetic", "bound by link", "nothing fits"]
    lines = [line for line in figure.axes[0].lines if not line.get_gid()]
    assert [np.shape(line.get_xydata()) for line in lines] == [(2, 2), (1, 2)]
    assert figure.axes[0].get_yscale() == "log" and figure.axes[0].get_ylabel() == "expected tokens/s"
    assert figure.axes[0].get_title(loc="left") == "1 x h200 (datasheet), fastest"
    assert figure.get_suptitle().replace("\n", " ") == "Of 4 plans 3 fit; the longest is a at 32k tokens on 1 x h200"


def test_the_command_writes_the_figure_beside_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pd.DataFrame(CELLS).to_parquet(tmp_path / "map.parquet")
    assert main(["plans", str(tmp_path / "map.parquet")]) == 0
    assert (tmp_path / "plans.png").stat().st_size > 5000 and (tmp_path / "plans.svg").is_file()
    pd.DataFrame(CELLS[3:]).to_parquet(tmp_path / "none.parquet")
    assert main(["plans", str(tmp_path / "none.parquet")]) == 0
    assert "no figure: nothing fits" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "what"), [("absent.parquet", "no such file"), ("other.parquet", "no column fits")])
def test_another_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, what: str) -> None:
    pd.DataFrame([{"model": "a"}]).to_parquet(tmp_path / "other.parquet")
    assert main(["plans", str(tmp_path / name)]) == 2
    err = capsys.readouterr().err
    assert what in err and err.count("\n") == 1


def test_panels_stand_in_the_order_of_their_machines() -> None:
    figure = plans.plans(pd.DataFrame([CELLS[0] | {"machine": name} for name in ("rtx_4090", "h200")]))
    assert not isinstance(figure, str)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["1 x h200 (datasheet), fastest", "1 x rtx_4090 (datasheet), fastest"]
