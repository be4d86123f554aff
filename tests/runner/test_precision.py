"""train.precision=auto: what it stands for on which machine, and that the row has both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ldft import environment
from ldft.config import Device, Precision, run_id
from ldft.runner import checks
from tests.conftest import Done, compose, long

# oneDNN leaves bf16 instructions alone then, on any CPU.
WITHOUT_BF16 = {"ONEDNN_MAX_CPU_ISA": "AVX2"}


def auto(device: Device):
    config = compose("model=nano")
    config.train.precision, config.launch.device = Precision.auto, device
    return config


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((6, 1), "fp32"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((8, 9), "bf16"), ((12, 0), "bf16")],
)
def test_on_gpus_by_generation(capability, expected, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "gpus", lambda: ("a GPU",))
    monkeypatch.setattr(environment, "compute_capability", lambda: capability)
    config = auto(Device.cuda)
    checks.resolve(config)
    assert config.train.precision.name == expected and config.asked == {"train.precision": "auto", "plan.goal": "auto"}
    said, of_plan = checks.resolutions(config)
    assert said.startswith(f"train.precision={expected} (auto; compute capability ")
    assert of_plan.startswith("plan=none (auto; the rates of cuda ")  # nobody measured this machine


@pytest.mark.parametrize(
    ("flags", "native"),
    [
        ("flags\t\t: fpu avx avx2 fma", False),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni", False),
        ("flags\t\t: avx2 avx512f avx512_bf16", True),
        ("flags\t\t: avx2 avx512f amx_bf16 amx_tile", True),
        ("Features\t: fp asimd sve bf16 i8mm", True),
        ("Features\t: fp asimd sve i8mm", False),
        ("", False),
    ],
)
def test_cpus_by_their_flags(flags: str, native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: bf16 in its name\n{flags}\n")
    assert environment.native_bf16(tmp_path / "cpuinfo") is native


@pytest.mark.parametrize("limit", ["AVX2", "avx512_core", "AVX512_CORE_BF16", "AVX10_1_512_AMX", "ALL"])
def test_instructions_that_onednn_may_not_use_do_not_count(limit: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    (tmp_path / "cpuinfo").write_text("flags\t: avx512_bf16 amx_bf16\n")
    assert environment.native_bf16(tmp_path / "cpuinfo") is (limit not in ("AVX2", "avx512_core"))


def test_a_run_has_the_id_of_what_it_was_resolved_to(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, named in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(environment, "native_bf16", lambda native=native: native)
        config = auto(Device.cpu)
        checks.resolve(config)
        assert run_id(config) == run_id(compose("model=nano", "launch.device=cpu", f"train.precision={named}"))
        checks.resolve(config)  # again, where a cell is run that a plan has resolved
        assert config.asked == {"train.precision": "auto", "plan.goal": "auto"}


def test_the_row_and_the_terminal_have_asked_and_resolved(ldft: Callable[..., Done]) -> None:
    done = ldft(env=WITHOUT_BF16)
    assert done.exit_code == 0, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if "train.precision" in line)
    assert "train.precision=fp32 (auto; this CPU has no bf16 instructions)" in line
    assert done.stdout.index(line) < done.stdout.index("importing torch")
    row = done.row
    assert row["cfg.train.precision"] == "fp32"
    assert row["cfg.asked"] == '{"launch.device": "auto", "plan.goal": "auto", "train.precision": "auto"}'
    assert '"bf16": {"enabled": false}' in row.deepspeed_config_json


@long
def test_bf16_by_name_is_obeyed_and_its_price_said(ldft: Callable[..., Done]) -> None:
    done = ldft("train.precision=bf16", "launch.device=cpu", env=WITHOUT_BF16)
    assert done.exit_code == 0, done.stdout + done.stderr
    row = done.row
    assert row["cfg.train.precision"] == "bf16" and row["cfg.asked"] == '{"plan.goal": "auto"}'
    (note,) = row.notes
    assert note.startswith("train.precision=bf16: this CPU has no bf16 instructions") and "50 times" in note
    assert done.stdout.count(note) == 1 and done.stdout.index(note) < done.stdout.index("importing torch")


def test_it_must_not_be_left_to_the_run(ldft: Callable[..., Done]) -> None:
    done = ldft("+asked.x=auto")
    assert done.exit_code == 2 and done.stderr == "ldft: asked: {'x': 'auto'}: ldft fills this key in; leave it out\n"
