"""Refusals beside wrong values: of this machine, of files and folders, of other commands; and what a bug looks like."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from ldft import environment, results
from ldft.results import __main__
from ldft.runner import parent
from ldft.sweep import status
from tests.config.conftest import CLI


def test_wrong_values_leave_an_invalid_row_and_wrong_composition_none(ldft: CLI) -> None:
    done = ldft("train.iterations=2")
    assert done.row.status == "invalid" and done.row.error_message in done.stderr
    assert done.row["cfg.train.iterations"] == 2
    ldft("model=foo")
    assert len(done.rows) == 1


def test_more_ranks_than_gpus_and_old_gpus_are_refused(ldft: CLI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "gpus", lambda: ("a GPU",))
    monkeypatch.setattr(environment, "driver", lambda: None)
    monkeypatch.setattr(environment, "compute_capability", lambda: (7, 5))
    monkeypatch.setattr(environment, "gpu_memory_gib", lambda: 80.0)
    done = ldft("launch.device=cuda", "launch.num_ranks=2")
    assert (done.exit_code, done.stderr) == (
        2,
        "ldft: launch.num_ranks: 2 ranks, a GPU for each, 1 visible; use at most 1\n",
    )
    done = ldft("train.precision=bf16")
    assert (
        done.exit_code == 2
        and "train.precision: bf16 needs" in done.stderr
        and "this one has 7.5; use fp16" in done.stderr
    )


def test_a_bug_says_internal_error_and_keeps_its_traceback(ldft: CLI, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("injected")

    monkeypatch.setattr(parent, "_run_ranks", broken)
    done = ldft("model=nano")
    assert done.exit_code == 1 and "internal error" in done.stderr and "Traceback" not in done.stderr
    assert done.row.status == "error" and done.row.error_type == "ZeroDivisionError"
    log = done.results_dir / done.row.log_path
    assert "injected" in log.read_text() and str(log) in done.stderr

    # Outside any attempt the log lies where the command was given.
    monkeypatch.setattr(parent, "run", broken)
    done = ldft("model=nano")
    assert done.exit_code == 1 and done.stderr.count("\n") == 1 and "internal error" in done.stderr
    assert "injected" in Path("ldft-internal-error.log").read_text()


def test_an_unwritable_folder_is_refused(ldft: CLI, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere; /proc stands in above")
    (tmp_path / "locked").mkdir(mode=0o555)
    done = ldft(f"results.dir={tmp_path}/locked")
    assert done.exit_code == 2 and "results.dir: cannot write in" in done.stderr


GLOBAL = "# @package _global_\n"


OVERRIDE = "defaults:\n  - override /model: nano\n"


# What a file of the user's own holds -> what the line must say. All but the last few are this machine's defaults.
WRONG_FILES = {
    (
        "local/default",
        "system: box1\n",
    ): "F: Hydra reads its keys as keys of local; make '# @package _global_' its first line",
    ("local/default", OVERRIDE): "F: Hydra reads its keys as keys of local; make '# @package _global_' its first line",
    ("local/default", ""): "F: Hydra reads its keys as keys of local; make '# @package _global_' its first line",
    (
        "local/default",
        f"{GLOBAL}model: nano\n",
    ): "model: nano in F is an option; write '- override /model: nano' in its",
    ("local/default", f"{GLOBAL}seq_len: 4096\n"): "seq_len: 4096 in F is an option; write '- override /seq_len: 4096'",
    ("local/default", f"{GLOBAL}train: 3\n"): "train: 3 in F does not fit; give a key below it, of micro_batch_size",
    ("local/default", f"{GLOBAL}model:\n"): "model: nothing in F does not fit; give an option (model=...) or a key",
    ("local/default", f"{GLOBAL}- a\n"): "F: holds a list; write keys and values",
    (
        "local/default",
        f"{GLOBAL}train: {{iteration: 7}}\n",
    ): "train.iteration: no such key (in F); did you mean train.ite",
    ("local/default", f"{GLOBAL}resultz: {{dir: x}}\n"): "resultz: no such key (in F); did you mean results?",
    (
        "local/default",
        f"{GLOBAL}launch: {{num_ranks: two}}\n",
    ): "launch.num_ranks: 'two' in F does not fit; give a whole",
    (
        "local/default",
        GLOBAL + OVERRIDE.replace("/", ""),
    ): "F: model has no slash; write '- override /model: <option>' in",
    (
        "local/default",
        GLOBAL + OVERRIDE.replace("override /", ""),
    ): "F: model has no slash; write '- override /model: <op",
    ("local/default", GLOBAL + OVERRIDE.replace("model", "mdel")): "F: mdel: no such group; did you mean model?",
    (
        "local/default",
        GLOBAL + OVERRIDE.replace("override ", ""),
    ): "model: a config file chooses it a second time; write '- ove",
    ("model/mine", "famly: llama\n"): "model.famly: no such key (in F); did you mean model.family?",
    ("model/mine", "- family\n"): "model: ['family'] in F does not fit; give an option (model=...) or a key below it",
}


@pytest.mark.parametrize(("file", "text"), WRONG_FILES)
def test_a_mistake_in_a_config_file_is_one_line_that_names_it(file: str, text: str, ldft: CLI, tmp_path: Path) -> None:
    path = tmp_path / "conf" / f"{file}.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    typed = ["model=mine"] if file == "model/mine" else []
    done = ldft("launch.num_ranks=1", *typed, "--config-dir", str(tmp_path / "conf"))
    expected = WRONG_FILES[file, text].replace("F", f"{file}.yaml", 1)
    assert done.exit_code == 2 and done.stderr.startswith(f"ldft: {expected}"), done.stderr
    assert done.stderr.count("\n") == 1 and not done.results_dir.exists()


@pytest.mark.parametrize("variable", ["TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME", "HOME"])
def test_a_cache_that_cannot_be_written_is_refused(variable: str, ldft: CLI, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "/proc/nowhere")
    done = ldft("model=nano", "optimizer.fused_step=false", "launch.device=cpu")
    assert done.exit_code == 2 and done.row.status == "invalid"
    assert done.stderr.startswith("ldft: TORCH_EXTENSIONS_DIR: cannot write in /proc/nowhere"), done.stderr
    assert "set this variable to a folder" in done.stderr and done.stderr.count("\n") == 1


def test_the_home_folder_is_known_in_any_value(ldft: CLI, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    done = ldft("results.dir=~/a folder/r", "train.iterations=1", "model.weights=pretrained", "model.path=~/weights")
    assert done.exit_code == 2 and "~" not in done.stderr and results.read(tmp_path / "home" / "a folder" / "r").size
    row = results.read(tmp_path / "home" / "a folder" / "r").iloc[0]
    assert row["cfg.model.path"] == f"{tmp_path}/home/weights"


def test_rows_of_invalid_runs_can_be_read_back(ldft: CLI) -> None:
    for value in ("0", "1"):
        ldft(f"seq_len.tokens={value}")
    rows = results.read(ldft("seq_len.tokens=-1").results_dir)
    assert list(rows.status) == ["invalid"] * 3 and rows.run_id.nunique() == 3


def test_other_commands_refuse_a_folder_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for main, arguments in ((status.main, ()), (__main__.main, ("export", "--csv")), (__main__.main, ("compact",))):
        monkeypatch.setattr(sys, "argv", ["ldft", *arguments, "/proc/nowhere"])
        assert main() == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("ldft: /proc/nowhere is not a folder; name") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("typed", "note"),
    {
        "numa.local_budget_gib=10": "note: numa.local_budget_gib=10 has no effect with numa=default",
        "numa=local_only numa.cxl_budget_gib=10": "note: numa.cxl_budget_gib=10 has no effect with numa=local_only",
        "offload=none numa.roles.momentum.nodes=[0]": "note: numa.roles: no momentum in host memory here",
        "numa.roles.momentum.nodes=[0]": "",
    }.items(),
)
def test_what_changes_nothing_is_noted(typed: str, note: str, ldft: CLI) -> None:
    """In a sweep over policies the same keys hold for all of them: no error."""
    done = ldft("dry_run=true", "model=nano", *typed.split())
    notes = [line for line in done.stdout.splitlines() if line.startswith("note: ")]
    assert done.exit_code == 0 and len(notes) == bool(note) and all(line.startswith(note) for line in notes)
