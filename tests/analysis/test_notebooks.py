"""Notebooks run, on the committed rows and on a user's folder; the committed rows are real and tell nothing private."""

from __future__ import annotations

import json
import random
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest

from ldft import results
from ldft.config import Config
from ldft.config.checkpointing import CheckpointingMode
from multirun_analysis import cells, load, publish, published
from multirun_analysis.notebooks import FOLDER, NOTEBOOKS, execute
from tests import synthetic_samples

REPOSITORY = FOLDER.parent
DATA = FOLDER / "data"


def _outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def _shown(notebook: nbformat.NotebookNode) -> str:
    parts = []
    for output in _outputs(notebook):
        data = output.get("data", {})
        parts += [output.get("text", ""), data.get("text/plain", ""), data.get("text/html", "")]
    return "\n".join(parts)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_executes_on_the_committed_rows_within_a_minute(name: str) -> None:
    start = time.monotonic()
    notebook = execute(name)
    assert time.monotonic() - start < 60
    shown = _shown(notebook)
    df = load(DATA)
    assert f"{len(df)} rows, {df.ok.sum()} ok" in shown and "Error" not in re.sub("ConfigError", "", shown)
    committed = nbformat.read(FOLDER / name, as_version=4)
    assert "".join(c.source for c in committed.cells) == "".join(c.source for c in notebook.cells)
    # What a forge shows is what the code makes of these rows now.
    assert _shown(committed) == shown
    assert sum("image/png" in output.get("data", {}) for output in _outputs(committed)) >= 1


def test_the_notebook_runs_on_another_folder_by_one_variable(rows) -> None:
    for policy, speed in (("default", 1.0), ("striped", 0.5)):
        rows.add(policy=policy, iteration_s=[speed, speed * 1.01, speed * 0.99])
    rows.add(policy="cxl_aware", status="oom_host")
    shown = _shown(execute("analysis.ipynb", results=rows.folder))
    assert "3 rows, 2 ok" in shown and "striped" in shown and "host OOM" in shown and "compared: numa" in shown


def test_committed_rows_are_of_this_history_and_of_a_clean_tree() -> None:
    df = load(DATA)
    assert len(df) == 45 and df.status.value_counts().to_dict() == {"ok": 39, "invalid": 5, "interrupted": 1}
    assert (~df.git_dirty.astype(bool)).all()
    inside = subprocess.run(["git", "-C", REPOSITORY, "rev-parse", "--git-dir"], capture_output=True, check=False)
    if inside.returncode:
        pytest.skip("not a git checkout: the history is not at hand")
    shallow = subprocess.run(
        ["git", "-C", REPOSITORY, "rev-parse", "--is-shallow-repository"], capture_output=True, text=True, check=True
    )
    if shallow.stdout.strip() == "true":
        pytest.skip("a shallow clone: the history is not at hand")
    for commit in df.git_commit.unique():
        found = subprocess.run(["git", "-C", REPOSITORY, "merge-base", "--is-ancestor", commit, "HEAD"], check=False)
        assert found.returncode == 0, f"{commit} is no ancestor of HEAD: publish rows of this history"


def test_committed_rows_are_measurements() -> None:
    df = load(DATA)
    ok = df[df.ok]
    assert (ok.tokens_per_s > 0).all() and ok.iteration_s.map(len).eq(ok["cfg.train.iterations"]).all()
    phases = ok.forward_median_s + ok.backward_median_s + ok.step_median_s
    assert (phases <= 1.1 * ok.iteration_median_s).all()
    assert (cells(df).failure != "").sum() == 6
    # Four times as long a sequence of the same cell takes longer, on one machine.
    for _, cell in ok[ok.variant != "plan=fastest"].groupby(["model", "variant"]):
        times = cell.groupby("seq_len_tokens").iteration_median_s.median()
        assert times.sort_index().is_monotonic_increasing, times


def test_nothing_committed_names_a_machine_or_a_path() -> None:
    table = results.read_table(DATA)
    for text in [str(table.to_pylist())] + [(FOLDER / name).read_text() for name in NOTEBOOKS]:
        found = publish.PATH.search(text)
        assert not found, found
    assert {host for row in table.to_pylist() for host in row["hosts"]} == {publish.HOST}


def test_what_the_published_tables_imply_is_what_was_worked_out_by_hand() -> None:
    table = published.training()
    by = table.set_index(["model", "num_gpus", "seq_len_tokens"]).need_gib.dropna()
    assert by["llama3_8b", 1, 128000] == pytest.approx(180.8, abs=0.1)
    assert by["llama3_1b", 8, 16384] == pytest.approx(183, abs=0.5)
    assert by["qwen2_5_14b", 7, 128000] == pytest.approx(685, abs=0.7)
    assert table.host_over_need.min() == pytest.approx(1.15, abs=0.01)
    steps = published.optimizer_steps()
    large = steps[steps.elements >= 67e6]
    for weight in (1, 2, 3, 4):
        error = large[f"w1_{weight}_predicted"] / large[f"w1_{weight}"] - 1
        assert error.abs().max() < 0.08


def test_our_rows_join_the_published_ones_only_where_they_compare(rows) -> None:
    def inputs_stay(config: Config) -> None:
        config.checkpointing.mode = CheckpointingMode.gpu

    rows.add(parameters=8_030_000_000, peak_host_gib=170.0, config=inputs_stay)
    rows.add(parameters=1_000_000, peak_host_gib=0.5, tokens=2048)
    rows.add(parameters=8_030_000_000, status="oom_host", tokens=4096)
    ours = published.comparable(load(rows.folder))
    assert len(ours) == 1 and ours.host_over_need.iloc[0] == pytest.approx(170 / (20 * 8.03e9 / 2**30))
    figure = published.host_memory(load(rows.folder))
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[-1] == "tiny 1k default, ours"
    assert len(labels) == len(published.training().dropna(subset=["need_gib"])) + 1


@pytest.fixture
def publishable(rows) -> Callable[..., Path]:
    """A results folder whose rows can be published, but for what is given."""

    def add(**columns: Any) -> Path:
        rows.add(samples=synthetic_samples.whole_run(random.Random(1), 40), **{"hosts": ["example"], **columns})
        return rows.folder

    return add


def test_published_rows_and_traces_are_the_same_but_for_their_folders_name(publishable, tmp_path: Path) -> None:
    def there(config: Config) -> None:
        config.results.dir = str(tmp_path / "results")

    folder, data = publishable(config=there), tmp_path / "data"
    (data / "old").mkdir(parents=True)
    assert publish.publish(folder, data) == 1 and not (data / "old").exists()
    before, after = (load(one).iloc[0] for one in (folder, data))
    assert after["cfg.results.dir"] == json.loads(after["config_json"])["results"]["dir"] == "results"
    for name in ("run_id", "iteration_s", "tokens_per_s", "started_at", "peak_host_gib"):
        assert np.array_equal(after[name], before[name]), name
    assert Path(after["trace_file"]).read_bytes() == Path(before["trace_file"]).read_bytes()


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"git_dirty": True}, "git_dirty"),
        ({"hosts": ["example", "gpu17"]}, "rows of gpu17"),
        ({"error_message": "cannot read /home/someone/model"}, "/home/someone"),
    ],
)
def test_rows_that_name_a_machine_or_changed_code_are_not_published(
    publishable, capsys, columns: dict[str, Any], said: str
) -> None:
    assert publish.main([str(publishable(**columns))]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and captured.out == ""
