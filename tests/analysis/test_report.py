"""`python -m multirun_analysis report`: what the page holds, whatever is in the rows; how long it takes; errors in one line."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ldft import results
from multirun_analysis import load
from multirun_analysis.__main__ import main
from multirun_analysis.report import over_time
from multirun_analysis.report.cells import cells
from multirun_analysis.report.page import embedded, page
from tests.analysis.conftest import node, settings
from tests.synthetic_samples import whole_run

REPOSITORY = Path(__file__).resolve().parents[2]
REAL = REPOSITORY / "multirun_analysis" / "data"
# Ends a script, opens a tag, names a place of the template, breaks a line of JavaScript, and half a surrogate pair.
ODD = "</script><script>alert(1)</script> <!-- <img src=x onerror=alert(2)> {{plotly}} \u2028 & 'x' \"y\" ü 👍"


def held(text: str) -> dict[str, Any]:
    """The data of a page, as a browser reads it: up to the first end of the script that holds it."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script', text, re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_real_rows_become_one_file(tmp_path, capsys) -> None:
    out = tmp_path / "new" / "report.html"
    assert main(["report", str(REAL), "--out", str(out)]) == 0
    df = load(REAL)
    size = out.stat().st_size / 2**20
    assert capsys.readouterr().out == f"{out}: {len(df)} rows, {size:.1f} MiB; open it in a browser\n"
    text = out.read_text()
    assert text.startswith("<!doctype html>") and "{{" not in text.split("<script>")[0]
    data = held(text)
    assert data["rows"] == len(df) and sum(len(cell["runs"]) for cell in data["cells"]) == len(df)
    best = df.loc[df["tokens_per_s"].idxmax()]
    (found,) = [cell for cell in data["cells"] if cell["id"] == best.run_id]
    for name, value in (("tokens_per_s", best.tokens_per_s), ("peak_vram_gib", best.peak_vram_gib), ("mfu", best.mfu)):
        assert found[name] == pytest.approx(value, rel=1e-4), name
    assert (found["model"], found["tokens"]) == (best.model, best.seq_len_tokens)
    refused = df[df["failure"] == "does not fit"]
    messages = {cell["id"]: cell["runs"][0]["message"] for cell in data["cells"] if cell["failure"] == "does not fit"}
    assert messages == dict(zip(refused["run_id"], refused["error_message"], strict=True)) and messages
    assert page(df, "data") == page(load(REAL), "data")  # the same rows, the same file


def test_every_real_row_of_the_benchmarks_has_its_cell() -> None:
    files = sorted((REPOSITORY / "benchmarks" / "results").glob("*.parquet"))
    whole = [file for file in files if {"config_json", "cfg.model.name"} <= set(pq.read_schema(file).names)]
    assert len(whole) > 5
    for file in whole:
        df = load(file)
        found = cells(df)
        assert sum(len(cell["runs"]) for cell in found) == len(df), file.name
        assert all(run["command"].startswith("python -m ldft ") for cell in found for run in cell["runs"])
        times = [entry for cell in found for entry in cell["times"]]
        assert len(times) == 4 * df.loc[df["predicted_iteration_s"].notna(), "run_id"].nunique(), file.name


def test_text_of_rows_is_never_markup(rows) -> None:
    rows.add(status="error", error_message=ODD, error_type=ODD, notes=[ODD], log_path=ODD, system=ODD, gpus=[ODD])
    rows.add(model=ODD, policy=ODD, cpu=ODD, tokens=2048)
    text = page(load(rows.folder), ODD + "\udce9")
    data = held(text)
    words = json.dumps(data["cells"])
    assert json.dumps(ODD)[1:-1] in words and data["cells"][0]["model"] in (ODD, "tiny")
    assert "alert(2)>" not in text and "<script>alert" not in text
    assert "<h1>ldft report: &lt;/script&gt;" in text
    assert not set("<>&") & set(embedded({"a": ODD}))


def test_what_is_missing_stays_missing(rows) -> None:
    rows.add(tokens=1024, tokens_per_s=None, iteration_s=[1.0], peak_host_gib=None, versions=None, git_commit=None)
    rows.add(tokens=2048, status="error", error_message=None, config_json=None, started_at=None)
    first, second = cells(load(rows.folder))
    assert first["status"] == "ok" and first["tokens_per_s"] is None and first["peak_host_gib"] is None
    assert first["runs"][0]["environment"]["versions"] is None and first["runs"][0]["environment"]["commit"] is None
    run = second["runs"][0]
    assert run["message"] is None and run["command"] is None and run["started"] is None
    assert run["command_note"] == "no command: the row does not hold its complete config"
    json.loads(embedded([first, second]))  # no NaN, which is no JSON


def test_repeats_are_one_cell_and_refused_rows_are_cells_too(rows) -> None:
    for seed, speed in enumerate((1.0, 2.0, 4.0)):
        rows.add(seed=seed, iteration_s=[speed] * 3, nodes=[node(0, speed), node(2, 1.0)])
    rows.add(seed=3, status="oom_host")
    rows.add(seed=4, status="timeout")
    rows.add(seed=4, attempt=2)  # the failure before it no longer counts
    rows.add(policy="mistyped", status="invalid", error_type="ConfigError")
    rows.add(tokens=0, status="invalid", error_type="ConfigError")
    rows.add(tokens=2048, status="invalid", error_type="DoesNotFitError")
    found = cells(load(rows.folder))
    assert [(cell["tokens"], cell["policy"], cell["status"], len(cell["runs"])) for cell in found] == [
        (1024, "default", "ok", 5),
        (2048, "default", "invalid", 1),
        (1024, "mistyped", "invalid", 1),
        (0, "default", "invalid", 1),
    ]
    first = found[0]
    assert first["failure"] == "host OOM 1/5" and first["nodes"] == [["node 0", 2.0], ["node 2", 1.0]]
    assert [run["attempt"] for run in first["runs"]] == [2, 1, 1, 1, 1]  # the newest first
    assert [cell["refused_for_memory"] for cell in found] == [False, True, False, False]


def test_nodes_of_several_hosts_are_not_one(rows) -> None:
    rows.add(nodes=[node(0, 1.0), node(0, 2.0) | {"host": "other"}])
    assert cells(load(rows.folder))[0]["nodes"] == [["h node 0", 1.0], ["other node 0", 2.0]]


def test_settings_and_options_are_those_that_differ(rows) -> None:
    rows.add(**settings("checkpointing=cpu"))
    rows.add(**settings("checkpointing=none", "train.micro_batch_size=2"))
    rows.add(**settings("checkpointing=none", "train.micro_batch_size=4", "model=nano"))
    found = {cell["variant"]: cell for cell in cells(load(rows.folder))}
    cell = found["checkpointing=none micro_batch_size=2"]
    assert cell["options"] == {"checkpointing": "checkpointing=none", "train.micro_batch_size": "micro_batch_size=2"}
    assert cell["config"] == {"checkpointing.mode": "none", "train.micro_batch_size": "2"}


def test_a_trace_is_drawn_in_few_points_that_keep_its_peak(rows) -> None:
    samples = whole_run(random.Random(1))
    path = rows.add(samples=samples, peak_host_gib=300.0)
    broken = rows.add(tokens=2048, samples=samples, peak_host_gib=200.0)
    (broken.parent / "trace.parquet").write_bytes(b"PAR1 torn")
    good, bad = cells(load(rows.folder))
    trace = good["trace"]
    assert [name for name, _ in trace["nodes"]] == [f"node {number}" for number in range(4)]
    assert len(trace["seconds"]) == len(trace["nodes"][0][1]) <= 120
    seconds, vram = trace["vram"]
    assert len(seconds) == len(vram) <= 120
    used = [rank.device.vram_used or 0 for one in samples for run in one.runs for rank in run.ranks if rank.device]
    assert max(vram) == pytest.approx(max(used) / 2**30, rel=1e-3)
    assert "cannot read" in bad["trace"]["problem"] and path.exists()


def test_what_a_cpu_does_not_have_is_not_made_up(rows) -> None:
    rows.add()
    (found,) = cells(load(rows.folder))
    assert found["peak_vram_gib"] is None and found["mfu"] is None


def test_no_more_traces_than_there_is_time_for(rows, monkeypatch) -> None:
    monkeypatch.setattr(over_time, "MOST_TRACES", 1)
    samples = whole_run(random.Random(1))
    rows.add(samples=samples, peak_host_gib=1.0)
    rows.add(tokens=2048, samples=samples, peak_host_gib=2.0)
    assert [cell["trace"] is None for cell in cells(load(rows.folder))] == [True, False]


def test_a_thousand_rows_take_seconds(tmp_path) -> None:
    """In one file, as a sweep leaves them."""
    one = results.read_table(REAL)
    parts = []
    batches = 1000 // len(one) + 1
    for batch in range(batches):
        changed: dict[str, list[Any]] = {
            "run_id": [f"{batch:04d}{name[4:]}" for name in one["run_id"].to_pylist()],
            "cfg.train.micro_batch_size": [batch + 1] * len(one),
        }
        part = one
        for name, values in changed.items():
            field = one.schema.field(name)
            part = part.set_column(one.schema.get_field_index(name), field, pa.array(values, field.type))
        parts.append(part)
    folder = tmp_path / "results"
    folder.mkdir()
    pq.write_table(pa.concat_tables(parts), folder / "rows-1.parquet")
    begin = time.process_time()  # of this process alone: other tests may run beside it
    assert main(["report", str(folder)]) == 0
    assert time.process_time() - begin < 10
    assert (folder / "report.html").stat().st_size < 10e6
    assert len(held((folder / "report.html").read_text())["cells"]) == batches * len(one)


def test_what_cannot_be_done_is_one_line(rows, tmp_path, capsys, monkeypatch) -> None:
    def line(*words: object) -> str:
        assert main(["report", *map(str, words)]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        return captured.err

    assert "no rows in" in line(rows.folder)
    assert str(tmp_path / "nowhere") in line(tmp_path / "nowhere")
    rows.add()
    taken = tmp_path / "taken"
    taken.write_text("")
    assert "choose another --out" in line(rows.folder, "--out", taken / "report.html")
    assert "choose another --out" in line(rows.folder, "--out", tmp_path)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert line(rows.folder) == (
        "multirun_analysis: the report needs plotly, which is not installed; run: pip install 'plotly>=6'\n"
    )
    assert not (rows.folder / "report.html").exists()
    with pytest.raises(SystemExit) as ended:
        main(["report", "--nothing"])
    assert ended.value.code == 2 and "python -m multirun_analysis report --help" in capsys.readouterr().err


def test_plotly_is_imported_for_a_report_only() -> None:
    code = "import sys; sys.modules['plotly'] = None; from multirun_analysis.__main__ import main; sys.exit(main(sys.argv[1:]))"
    line = [sys.executable, "-c", code, str(REAL), "--no-figures"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
