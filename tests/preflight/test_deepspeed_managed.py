"""Ways of offload in which DeepSpeed moves tensors itself: what is refused, what is noted, what is left behind."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ldft.config import Config, Device
from ldft.errors import ConfigError
from ldft.preflight import deepspeed_config, deepspeed_managed, fit
from ldft.runner import parent, swap_files
from tests.conftest import compose


def on_cuda(*overrides: str) -> Config:
    config = compose(*overrides)
    config.launch.device = Device.cuda
    return config


@pytest.mark.parametrize(
    ("typed", "line"),
    {
        "offload=super_offload offload.stage=2 offload.parameters=none": "offload.stage: super_offload needs 3, not 2",
        "offload=super_offload offload.optimizer=none": "offload.optimizer: super_offload needs cpu, not none",
        # Three: DeepSpeed would train on weights that are not transposed as it believes, without a word.
        "offload=zenflow offload.stage=3": "offload.stage: zenflow needs 1 or 2 here, not 3",
        "offload=zenflow train.gradient_accumulation_steps=2": "train.gradient_accumulation_steps: 2: zenflow accumulates",
        "offload=zenflow train.precision=fp16": "train.precision: fp16: zenflow .* not yet unscaled; use bf16",
        "offload=super_offload train.precision=fp16 optimizer.gradient_clipping=0": "optimizer.gradient_clipping: 0: super_offl",
        "offload=nvme offload.nvme_path=/disk optimizer=lion": "optimizer: lion: offload=nvme supports adamw only",
        "offload.deepspeed.zero_optimization.offload_optimizer.super_offload=true optimizer=lion": "optimizer: lion",
    }.items(),
)
def test_what_deepspeed_cannot_do_is_refused(typed: str, line: str) -> None:
    with pytest.raises(ConfigError, match=f"^{line}"):
        deepspeed_config.build(on_cuda(*typed.split()))


def test_super_offload_unscales_where_it_clips() -> None:
    assert deepspeed_config.build(on_cuda("offload=super_offload", "train.precision=fp16"))["fp16"]["enabled"]


def test_what_sets_figures_apart_is_noted() -> None:
    def notes(*overrides: str) -> str:
        config = on_cuda(*overrides)
        return "; ".join(deepspeed_managed.notes(config, deepspeed_config.build(config)))

    assert "another algorithm: 5% of the columns" in notes("offload=zenflow")
    assert "optimizer.gradient_clipping=0.9" in notes("offload=super_offload")
    assert notes("offload=super_offload", "optimizer.gradient_clipping=0") == notes("offload=full") == ""


def test_shared_memory_that_is_too_small_is_refused_before_anything_runs(tmp_path: Path) -> None:
    config = on_cuda("offload=super_offload", "model=llama3_70b", "model.num_layers=8000")
    with pytest.raises(
        ConfigError, match=r"^offload: super_offload shares \d+\.\d GiB between processes, .* use full$"
    ):
        swap_files.check(config, deepspeed_config.build(config), shared_memory=tmp_path)


def test_frozen_weights_have_no_optimizer_state_in_swap_files_or_shared_memory() -> None:
    def needs(*overrides: str) -> tuple[float, float]:
        config = on_cuda("model=llama3_70b", "offload.nvme_path=/disk", *overrides)
        settings = deepspeed_config.build(config)
        shared = deepspeed_managed.shared_memory_bytes(config, settings)
        return deepspeed_managed.swap_bytes(config, settings) / 70.6e9, shared / 70.6e9

    assert needs("offload=nvme")[0] == pytest.approx(18, rel=0.01)
    assert needs("offload=nvme", "train.precision=fp32")[0] == pytest.approx(20, rel=0.01)
    assert 2 < needs("offload=nvme", "lora=r16")[0] < 2.1  # all weights, and little else
    full, adapters = (needs("offload=super_offload", "offload.nvme_path=", *more)[1] for more in ([], ["lora=r16"]))
    assert full == pytest.approx(8, rel=0.01) and 0 < adapters < 0.05


def nvme(folder: Path) -> tuple[Config, dict[str, Any]]:
    config = compose("offload=nvme", f"offload.nvme_path={folder}")
    return config, deepspeed_config.build(config)


HOLDS_A_FOLDER = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_deepspeed_managed import nvme, swap_files
with swap_files.folder(*nvme(Path(sys.argv[1]))):
    print(os.environ[swap_files.VARIABLE], flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other_run(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process that holds a swap folder, and that folder with a file in it."""
    line = [sys.executable, "-c", HOLDS_A_FOLDER, str(tmp_path), str(Path(__file__).parent)]
    run = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    made = Path(run.stdout.readline().strip())
    (made / "file").touch()
    yield run, made
    run.kill()
    run.communicate()


def test_swap_files_go_with_their_run(tmp_path: Path) -> None:
    config, settings = nvme(tmp_path)
    (tmp_path / "something else").touch()
    with swap_files.folder(config, settings):
        settings = swap_files.placed(settings)
        folders = {settings["zero_optimization"][name]["nvme_path"] for name in ("offload_param", "offload_optimizer")}
        (made,) = map(Path, folders)
        (made / "file").touch()
        assert made.parent == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["something else"]
    assert swap_files.VARIABLE not in os.environ


def test_swap_files_of_a_run_that_was_killed_go_before_the_space_is_looked_at(tmp_path, other_run, monkeypatch) -> None:
    run, left = other_run
    config, settings = nvme(tmp_path)
    # A process in another container is not in this /proc; its lock is visible nevertheless.
    monkeypatch.setattr(os, "getpid", lambda: 1)
    swap_files.prepare(config, settings)
    assert (left / "file").exists(), "its run lives"
    run.kill()
    run.wait()
    free = {True: 0, False: 1 << 40}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[left.exists()]))
    with pytest.raises(ConfigError, match=r"^offload.nvme_path: swap files take"):
        swap_files.check(config, settings)
    assert left.exists(), "a check only looks: dry runs do no more"
    outcome = []

    def look_and_stop(config: Config) -> None:
        outcome.append(left.exists())
        raise ConfigError("here", "far enough")

    monkeypatch.setattr(fit, "check", look_and_stop)
    config.launch.device, config.results.dir = Device.cpu, str(tmp_path / "results")
    assert parent.run(config).row["error_message"] == "here: far enough" and outcome == [False]
    assert not list(tmp_path.glob("ldft-swap-*"))


def test_where_locks_do_not_work_no_swap_folder_is_judged(tmp_path, other_run, monkeypatch) -> None:
    run, left = other_run
    run.kill()
    run.wait()

    def unknown(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", unknown)
        swap_files.prepare(*nvme(tmp_path))
        assert left.exists()
        with swap_files.folder(*nvme(tmp_path)):
            ours = Path(os.environ[swap_files.VARIABLE])
            patch.undo()
            swap_files.prepare(*nvme(tmp_path))  # by somebody whose locks do work
            assert ours.exists() and not left.exists()
    assert not list(tmp_path.iterdir())


def test_a_dry_run_makes_no_folder(tmp_path: Path) -> None:
    config, settings = nvme(tmp_path / "a" / "b")
    swap_files.check(config, settings)
    assert not list(tmp_path.iterdir())
