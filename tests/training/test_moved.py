"""Ways of offload in which DeepSpeed moves tensors itself: what is refused, what is noted, what is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldft import swap
from ldft.config import Config, Device
from ldft.errors import ConfigError
from ldft.training import deepspeed_config, moved
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
        "offload=nvme offload.nvme_path=/disk optimizer=lion": "optimizer: lion: offload=nvme knows adamw only",
        "offload.deepspeed.zero_optimization.offload_optimizer.super_offload=true optimizer=lion": "optimizer: lion",
    }.items(),
)
def test_what_deepspeed_cannot_do_is_refused(typed: str, line: str) -> None:
    with pytest.raises(ConfigError, match=f"^{line}"):
        deepspeed_config.build(on_cuda(*typed.split()))


def test_what_sets_figures_apart_is_noted() -> None:
    def notes(*overrides: str) -> str:
        config = on_cuda(*overrides)
        return "; ".join(moved.notes(config, deepspeed_config.build(config)))

    assert "another algorithm: 5% of the columns" in notes("offload=zenflow")
    assert "optimizer.gradient_clipping=0.9" in notes("offload=super_offload")
    assert notes("offload=super_offload", "optimizer.gradient_clipping=0") == notes("offload=full") == ""


def test_shared_memory_that_is_too_small_is_refused_before_anything_runs(tmp_path: Path) -> None:
    config = on_cuda("offload=super_offload", "model=llama3_70b", "model.num_layers=8000")
    with pytest.raises(
        ConfigError, match=r"^offload: super_offload shares \d+\.\d GiB between processes, .* use full$"
    ):
        swap.check(config, deepspeed_config.build(config), shared_memory=tmp_path)


def test_frozen_weights_have_no_optimizer_state_in_swap_files_or_shared_memory() -> None:
    def needs(*overrides: str) -> tuple[float, float]:
        config = on_cuda("model=llama3_70b", "offload.nvme_path=/disk", *overrides)
        settings = deepspeed_config.build(config)
        return moved.swap_bytes(config, settings) / 70.6e9, moved.shared_memory_bytes(config, settings) / 70.6e9

    assert needs("offload=nvme")[0] == pytest.approx(18, rel=0.01)
    assert 2 < needs("offload=nvme", "lora=r16")[0] < 2.1  # all weights, and little else
    full, adapters = (needs("offload=super_offload", "offload.nvme_path=", *more)[1] for more in ([], ["lora=r16"]))
    assert full == pytest.approx(8, rel=0.01) and 0 < adapters < 0.05


def test_swap_files_go_with_their_run_and_with_runs_that_died(tmp_path: Path) -> None:
    config = compose("offload=nvme", f"offload.nvme_path={tmp_path}")
    settings = deepspeed_config.build(config)
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    (tmp_path / f"ldft-swap-{int(child.stdout)}-x").mkdir()
    living = tmp_path / f"ldft-swap-{os.getppid()}-x"
    living.mkdir()
    (tmp_path / "something else").touch()
    with swap.folder(config, settings):
        swap.place(settings)
        folders = {settings["zero_optimization"][name]["nvme_path"] for name in ("offload_param", "offload_optimizer")}
        (made,) = map(Path, folders)
        (made / "file").touch()
        assert made.parent == tmp_path and len(list(tmp_path.iterdir())) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [living.name, "something else"]
    assert swap.VARIABLE not in os.environ
