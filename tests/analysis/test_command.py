"""`python -m multirun_analysis`: odd folders give a sensible table or one clear line, never a traceback."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pyarrow as pa
import pytest

from multirun_analysis.__main__ import main


def _run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    return code, captured.out, captured.err


def test_two_schema_versions_make_one_table(rows, capsys) -> None:
    rows.add(tokens=1024, without=("cfg.checkpointing.mode", "mfu", "nodes"), iteration_s=[1.0, 1.0, 1.0])
    rows.add(tokens=2048, newer={"later_column_gib": (pa.float64(), 3.0)}, iteration_s=[1.0, 1.0, 1.0])
    code, out, _ = _run(capsys, rows.folder)
    assert code == 0 and "2 rows: 2 ok" in out
    assert "1k" in out and "2k" in out and "1024" in out and "2048" in out
    assert (rows.folder / "figures" / "throughput.png").stat().st_size > 10_000
    assert (rows.folder / "figures" / "throughput.svg").read_text().startswith("<?xml")


def test_a_price_gives_what_tokens_cost(rows, capsys) -> None:
    rows.add(tokens=3600, iteration_s=[1.0, 1.0, 1.0], device_type="cuda")
    _, out, _ = _run(capsys, rows.folder, "--no-figures")
    assert "GPU h/1e9 tokens" in out and "cost" not in out
    code, out, _ = _run(capsys, rows.folder, "--no-figures", "--price", "2.50")
    assert code == 0 and "cost/1e9 tokens at 2.5/h" in out
    assert f"{2.5e9 / 3600**2:.0f}" in out.replace(",", "")


@pytest.mark.parametrize("price", ["0", "-1", "nan", "inf", "two"])
def test_a_price_that_is_none_is_one_line(rows, capsys, price: str) -> None:
    rows.add()
    with pytest.raises(SystemExit) as ended:
        main([str(rows.folder), f"--price={price}"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and f"{price}: use a number above 0, e.g. 2.50" in said


def test_an_unreadable_file_is_named_and_the_rest_is_shown(rows, capsys) -> None:
    rows.add(tokens=1024)
    rows.add(tokens=2048).write_bytes(b"PAR1 torn")
    code, out, err = _run(capsys, rows.folder, "--no-figures")
    assert code == 0 and "1 row: 1 ok" in out and "1k" in out
    assert "unreadable" in err and "row.parquet" in err


def test_only_failed_rows_say_why(rows, capsys) -> None:
    rows.add(tokens=1024, status="oom_host")
    rows.add(tokens=2048, status="timeout")
    rows.add(tokens=4096, status="invalid")
    code, out, _ = _run(capsys, rows.folder)
    assert code == 0 and "3 rows" in out and "host OOM" in out and "timeout" in out
    assert "made to be timeout [see the log]" in out  # brackets in a message are no markup
    assert "no figure speedup: nothing to compare" in out
    assert (rows.folder / "figures" / "throughput.png").exists()


def test_a_length_of_nothing_is_counted_and_drawn_nowhere(rows, capsys) -> None:
    rows.add(tokens=1024)
    rows.add(tokens=0, status="invalid")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # of an axis that begins at 0, on a logarithmic scale
        code, out, err = _run(capsys, rows.folder)
    assert code == 0 and "2 rows: 1 ok, 1 invalid" in out and err == ""


def test_a_single_row_is_enough(rows, capsys) -> None:
    rows.add(tokens=1024, iteration_s=[0.5, 0.5, 0.5])
    code, out, _ = _run(capsys, rows.folder)
    assert code == 0 and "1 row: 1 ok" in out and "2048" in out


def test_no_rows_is_one_line(tmp_path: Path, capsys) -> None:
    code, out, err = _run(capsys, tmp_path)
    assert (code, err) == (0, "") and out == f"no rows in {tmp_path}; python -m ldft writes one per run\n"


def test_a_folder_that_is_not_there_is_one_line(capsys) -> None:
    code, out, err = _run(capsys, "no-such-folder")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "no-such-folder is not a folder" in err


def test_a_baseline_that_is_not_there_is_one_line(rows, capsys) -> None:
    rows.add(policy="default")
    rows.add(policy="striped")
    code, out, err = _run(capsys, rows.folder, "--baseline", "local_only")
    assert (code, out) == (2, "") and "no row has numa=local_only; use one of default, striped" in err


def test_figures_that_cannot_be_written_are_one_line(rows, tmp_path, capsys) -> None:
    rows.add()
    (tmp_path / "file").write_text("")
    code, _, err = _run(capsys, rows.folder, "--out", tmp_path / "file")
    assert code == 2 and err.count("\n") == 1 and "choose another --out" in err


def test_long_tables_are_cut_and_say_so(rows, capsys) -> None:
    for tokens in range(1024, 1024 + 50):
        rows.add(tokens=tokens)
    _, out, _ = _run(capsys, rows.folder, "--no-figures")
    assert "10 more lines; --all shows them" in out and "1073" not in out
    _, out, _ = _run(capsys, rows.folder, "--no-figures", "--all")
    assert "1073" in out


def test_diff_of_folders_prints_changes(new_rows, capsys) -> None:
    a, b = new_rows("a"), new_rows("b")
    a.add(iteration_s=[1.0, 1.01, 0.99, 1.0])
    b.add(iteration_s=[0.5, 0.51, 0.49, 0.5])
    a.add(tokens=4096)
    b.add(tokens=4096, status="oom_host")
    code, out, _ = _run(capsys, "diff", a.folder, b.folder)
    assert code == 0 and "faster" in out and "ok -> oom_host" in out and "2.000" in out
    code, out, _ = _run(capsys, "diff", new_rows("c").folder, new_rows("d").folder)
    assert code == 0 and "neither folder has a row" in out


def test_diff_as_a_gate_refuses_what_is_slower_with_confidence_or_lost(new_rows, capsys) -> None:
    before, same, slower, lost = (new_rows(name) for name in "abcd")
    steady, slow = [1.0, 1.01, 0.99, 1.0], [1.06, 1.07, 1.05, 1.06]
    for tokens in (1024, 2048, 4096):
        before.add(tokens=tokens, iteration_s=steady)
        same.add(tokens=tokens, iteration_s=steady[::-1])
        slower.add(tokens=tokens, iteration_s=slow if tokens == 2048 else steady)
    lost.add(tokens=1024, iteration_s=steady)
    lost.add(tokens=2048, status="oom_host")
    code, out, _ = _run(capsys, "diff", before.folder, same.folder, "--fail-below", "0.97")
    assert code == 0 and "refused: 0 of 3 cells (--fail-below 0.97)" in out
    code, out, _ = _run(capsys, "diff", before.folder, slower.folder, "--fail-below", "0.97")
    assert code == 1 and "refused: " in out and "2k" in out and ": slower: b/a 0.943, " in out
    assert "refused: 1 of 3 cells" in out
    assert _run(capsys, "diff", before.folder, slower.folder, "--fail-below", "0.9")[0] == 0
    code, out, _ = _run(capsys, "diff", before.folder, lost.folder, "--fail-below", "0.97")
    assert code == 1 and ": ok -> oom_host" in out and ": only in a" in out and "refused: 2 of 3 cells" in out
    # What was not compared does not pass: nothing in common, and one iteration a side.
    assert _run(capsys, "diff", new_rows("e").folder, same.folder, "--fail-below", "0.97")[0] == 1
    for rows in (one := new_rows("f"), other := new_rows("g")):
        rows.add(iteration_s=[1.0])
    code, out, _ = _run(capsys, "diff", one.folder, other.folder, "--fail-below", "0.97")
    assert "1 have one iteration a side, which gives no interval" in out
    for value in ("0", "1.5", "x"):
        with pytest.raises(SystemExit, match="2"):
            _run(capsys, "diff", before.folder, same.folder, "--fail-below", value)
        err = capsys.readouterr().err
        fix = "use a ratio above 0 and up to 1, e.g. 0.97; see python -m multirun_analysis diff --help"
        assert err == f"ldft: --fail-below: {value}: {fix}\n"


def test_the_module_runs_as_a_command_without_torch(rows) -> None:
    rows.add()
    code = "import sys, multirun_analysis.__main__ as m; m.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code, str(rows.folder), "--no-figures"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "1 row: 1 ok" in done.stdout, done.stderr
