"""plan= and python -m ldft.plan on the command line: what is chosen, what stays, what the row and the text say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from ldft.cli import plan_command
from ldft.config import run_id
from ldft.config.root import flatten
from ldft.planning import settled
from ldft.runner import checks
from tests.conftest import Done, compose

THERE = ("machine=h200", "memory.capacity_gib=125", "model=llama3_8b", "seq_len=32k")
# Of a CPU that does a tenth of a TFLOP/s: enough for a plan to be made here.
PROFILE = {
    "bandwidth": {"node0": {"cpu": 20}},
    "devices": {
        f"cpu {precision}": {
            "products_tflops_per_s": 0.1,
            "attention_tflops_per_s": {"64": {"512": [0.1, 0.1]}},
            "memory_gb_per_s": 10.0,
            "peer_gb_per_s": None,
            "launches_beside": 1.0,
        }
        for precision in ("bf16", "fp32")
    },
}


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`python -m ldft.plan` in this process: exit code, output, errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ldft.plan", *arguments])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        capfd.readouterr()
        code = plan_command.main()
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.fixture
def measured(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine that was measured."""
    import socket

    folder = tmp_path / "config" / "ldft" / "hardware"
    folder.mkdir(parents=True)
    (folder / f"{socket.gethostname()}.json").write_text(json.dumps(PROFILE))
    return {"XDG_CONFIG_HOME": str(tmp_path / "config")}


def planned(*overrides: str, keep: tuple[str, ...] = ()) -> list[str]:
    config = compose(*THERE, "plan=fastest", *overrides)
    config.plan.keep += [*keep, *(text.partition("=")[0] for text in overrides)]
    checks.resolve(config)
    settled.check(config)
    return settled.overrides(config)


TWO_SHARE = ("launch.num_ranks=2", "launch.sequence_parallel=2")


def keys(chosen: list[str]) -> set[str]:
    return {text.partition("=")[0] for text in chosen}


def test_what_was_set_stays_and_the_rest_is_chosen() -> None:
    all_of_them = {"checkpointing.mode", "checkpointing.layers", "checkpointing.keep_attention", "offload.gpu_share"}
    assert keys(planned()) == all_of_them
    assert keys(planned("offload.gpu_share=0")) <= all_of_them - {"offload.gpu_share"}
    assert "checkpointing.mode" not in keys(planned("checkpointing=cpu"))
    assert keys(planned("checkpointing.keep_attention=host")) <= all_of_them - {"checkpointing.keep_attention"}
    assert keys(planned("checkpointing.layers=30", "checkpointing.keep_attention=none", "offload.gpu_share=0")) <= {
        "checkpointing.mode"
    }
    assert "offload.stage" not in keys(planned("offload=full", "model=llama3_1b"))
    # Values that need recomputation keep it on.
    for value in (
        "checkpointing.layers=3",
        "checkpointing.every=2",
        "checkpointing.keep_attention=host",
        "kernels.mlp_tiles=4",
    ):
        config = compose(*THERE, "plan=fastest", "machine.vram_gib=2000", value)
        config.plan.keep.append(value.partition("=")[0])
        checks.resolve(config)
        assert config.asked[settled.DONE] == "fastest" and value.endswith(str(flatten(config)[value.partition("=")[0]]))
        assert config.checkpointing.mode.name != "none"
    slow = ["model=llama3_1b", "seq_len=8k", "machine.link_gb_per_s=1", "offload.gpu_share=0"]
    assert "offload.optimizer=none" in planned(*slow)
    assert "offload.optimizer" not in keys(planned(*slow, keep=("offload",)))
    # A value of this machine's defaults that differs from ldft's was set, too.
    config = compose(*THERE, "plan=fastest", "checkpointing.layers=7")
    checks.resolve(config)
    assert config.checkpointing.layers == 7


def test_a_plan_is_recorded_and_made_once_and_its_values_are_the_runs_identity() -> None:
    config = compose(*THERE, "plan=fastest")
    checks.resolve(config)
    assert config.asked["checkpointing.layers"] == "-1" and config.asked[settled.DONE] == "fastest"
    assert checks.resolutions(config)[1].startswith("plan=fastest: offload.gpu_share=")
    by_hand = compose(*THERE, *settled.overrides(config))
    checks.resolve(by_hand)
    assert run_id(by_hand) == run_id(config)
    before = run_id(config)
    config.memory.vram_gib = 30
    checks.resolve(config)
    assert run_id(config) == before


def test_a_run_for_which_there_is_no_plan_is_another_run() -> None:
    config, same = (compose(*THERE, goal, "machine.vram_gib=2", "force=true") for goal in ("plan=fastest", "plan=none"))
    for one in (config, same):
        checks.resolve(one)
    assert "nothing fits" in config.asked[settled.DONE] and run_id(config) != run_id(same)


def test_plans_run_and_their_rows_say_what_was_asked_and_chosen(
    ldft: Callable[..., Done], measured: dict[str, str]
) -> None:
    done = ldft("plan=fastest", "checkpointing=cpu", env=measured)
    assert done.exit_code == 0, done.stderr
    row = done.row
    assert row["cfg.plan.goal"] == "fastest" and row["cfg.checkpointing.mode"] == "cpu"
    asked = json.loads(row["cfg.asked"])
    assert asked["plan.goal"] == "fastest" and asked["checkpointing.keep_attention"] == "none"
    assert row["cfg.checkpointing.keep_attention"] != "none"
    assert pd.isna(row["predicted_iteration_s"]), "on a CPU, times only compare plans"
    assert re.search(r"ldft: plan=fastest: .*checkpointing.keep_attention=(device|host)", done.stdout)


def test_without_rates_there_is_no_plan_but_a_row(
    here: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    done = here("model=nano", "plan=fastest")
    assert done.exit_code == 2 and "measure this machine once with python -m ldft.bench machine" in done.stderr
    assert done.row["status"] == "invalid" and "Traceback" not in done.stderr


def test_a_single_run_may_be_planned_by_default_the_cells_of_a_sweep_are_not(
    here: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = ("model=nano", "train.iterations=0")  # a row without ranks
    row = here(*refused).row
    assert row["cfg.plan.goal"] == "none" and json.loads(row["cfg.asked"])["plan.goal"] == "auto"  # on a CPU
    monkeypatch.setattr(settled, "declined", lambda config: pytest.fail("planned"))
    cells = here("-m", *refused, "train.seed=1,2").rows.iloc[-2:]
    assert list(cells["cfg.plan.goal"]) == ["none", "none"]
    assert not any("plan.goal" in json.loads(asked) for asked in cells["cfg.asked"])


def test_a_run_refuses_a_machine_that_is_not_here(here: Callable[..., Done]) -> None:
    done = here("model=nano", "machine=h200", "launch.device=cpu")
    assert done.exit_code == 2 and "machine: h200 is not this machine; add dry_run=true" in done.stderr


def test_a_dry_sweep_shows_the_cells_of_each_machine(here: Callable[..., Done]) -> None:
    done = here("-m", "dry_run=true", "plan=fastest", "machine=h200,rtx_4090", "model=llama3_1b", "seq_len=8k,512k")
    assert len(re.findall(r"^\[\d/4\] llama3_1b", done.stdout, re.MULTILINE)) == 4
    assert "llama3_1b 8k default machine=rtx_4090: fits: host" in done.stdout


def test_an_answer_has_the_plan_others_what_binds_it_and_a_command_that_gives_it(
    ask: Callable[..., tuple[int, str, str]],
) -> None:
    given = ["model=llama3_8b", "seq_len=128k", "machine=h100_80g", "machine.host_gib=200"]
    code, out, err = ask(*given)
    assert (code, err) == (0, "")
    for part in (
        "by datasheet",
        "chosen",
        "next",
        "memory: VRAM",
        "time: forward",
        "one more GPU",
        "seq_len=64k",
        "run it:",
    ):
        assert part in out, part
    command = out.strip().splitlines()[-1].split()
    assert command[1:3] == ["-m", "ldft"] and "machine=h100_80g" not in command
    assert command[-1] == "plan=none"  # or plan=auto would choose anew there
    chosen = [text for text in command[3:] if text not in given]
    config = compose(*given, *chosen)
    checks.resolve(config)
    config.plan.goal = type(config.plan.goal).fastest
    again = plan_command.resolved_config([*given, *chosen])
    assert settled.overrides(again) == []
    assert run_id(config) == run_id(again)


def test_where_nothing_fits_the_answer_is_what_would_make_it_fit(ask: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = ask("model=llama3_8b", "seq_len=32k", "machine=rtx_4090", "machine.host_gib=64")
    assert code == 1 and "nothing fits: every combination lacks " in out
    fixes = re.findall(r"^  (\S.*?)  +(\d+) tokens/s$", out, re.MULTILINE)
    assert {"64 GiB more of host memory", "lora=r16"} <= {what for what, _ in fixes}, out
    assert [int(speed) for _, speed in fixes] == sorted((int(speed) for _, speed in fixes), reverse=True)


def test_a_map_has_one_line_and_one_row_for_each_cell(ask: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    rows = tmp_path / "deep" / "plans.parquet"
    code, out, _ = ask("-m", "model=llama3_1b,llama3_70b", "seq_len=8k,32k", "machine=h200", "--rows", str(rows))
    found = pd.read_parquet(rows)
    assert code == 0 and len(found) == 4 and out.count("\n") == 5
    assert found["fits"].tolist() == [True] * 4 and (found["tokens_per_s"] > 0).all()
    assert set(found["model"]) == {"llama3_1b", "llama3_70b"} and found["chosen"].iloc[0].tolist()


def test_one_more_gpu_that_cannot_share_the_sequence_does_not_look_like_lack_of_memory(
    ask: Callable[..., tuple[int, str, str]],
) -> None:
    there = ("model=llama3_8b", "seq_len=128k", "machine=h200")
    code, out, _ = ask(*there, "launch.num_ranks=4", "plan.tokens_per_update=131072")
    reason = "5: the model's 32 heads over 8 key heads cannot be shared by so many"
    what = r"^  one more GPU \(same tokens on each\) +not possible: launch.sequence_parallel"
    assert code == 0 and re.search(rf"{what}: {reason}$", out, re.MULTILINE), out
    # Ranks that share sequences come in groups.
    code, out, _ = ask(*there, *TWO_SHARE)
    assert code == 0 and "one more GPU" not in out and re.search(r"^  2 more GPUs .*tokens/s", out, re.MULTILINE), out


def test_why_nothing_is_possible_is_said_to_its_end(ask: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = ask("model=llama3_8b", "seq_len=8k", "machine=h200", "offload=optimizer", *TWO_SHARE)
    assert code == 1 and "launch.sequence_parallel: 2: needs offload.stage=3: " in out
    assert out.splitlines()[0].endswith("; use offload=full")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["model=llama4"], "model: 'llama4' does not exist"),
        (["machine=h300"], "machine: 'h300' does not exist"),
        (["machine=h200", "plan.goal=cheapest"], "plan.goal: 'cheapest' does not fit; give one of auto, none, fastest"),
        (["machine=h200", "machine.host_gib=-1"], "machine.host_gib: -1 is not positive"),
        (["machine=h200", "machine.capability=[9]"], "machine.capability: [9] is not a compute capability"),
        (["machine=h200", "machine.gpu=Radeon"], "machine.gpu: 'Radeon': its peak is not known here"),
        (["machine=h200", "plan.tokens_per_update=-1"], "plan.tokens_per_update: -1 is negative"),
        (["machine=h200", "plan.tokens_per_update=5"], "plan.tokens_per_update: 5 is no multiple of 1024"),
        (
            ["machine=h200", "plan=longest", "seq_len=8k"],
            "plan.goal: longest chooses seq_len, and seq_len.tokens=8192 is set",
        ),
        (
            ["machine=h200", "model=llama3_8b", "seq_len.tokens=131073", *TWO_SHARE],
            "seq_len.tokens: 131073 is not divisible by launch.sequence_parallel=2; use 131072 or 131074\n",
        ),
        (
            [
                *("machine=h200", "model=llama3_8b", "seq_len.tokens=131073"),
                TWO_SHARE[0],
                "plan.tokens_per_update=131073",
            ],
            "seq_len.tokens: 131073 is not divisible by launch.sequence_parallel=2; use 131072 or 131074\n",
        ),
        (
            ["machine=h200", "model=gemma2_9b", "seq_len=2k", *TWO_SHARE],
            "launch.sequence_parallel: 2: soft caps (model.attention_softcap=50) are not shared; use 1\n",
        ),
        (["launch.device=cuda"], "plan.goal: fastest: there is no GPU here; name a machine"),
        (["seq_len=8k,16k"], "seq_len: several values (8k,16k) are a sweep; add -m"),
        (["train.iterations=x"], "train.iterations: 'x' does not fit; give a whole number"),
    ],
)
def test_mistakes_are_one_line(ask: Callable[..., tuple[int, str, str]], arguments: list[str], line: str) -> None:
    code, out, err = ask(*arguments)
    assert code == 2 and err.startswith(f"ldft: {line}") and err.count("\n") == 1 and out == ""


def test_the_command_answers_in_two_seconds(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "ldft.plan", *THERE[:3], "seq_len=128k"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"\| +(torch|deepspeed|transformers|pandas)$", done.stderr, re.MULTILINE)


def test_a_mixture_of_experts_has_a_plan(ask: Callable[..., tuple[int, str, str]]) -> None:
    """Its layers can have no share on the GPU, so none larger than the default is tried."""
    code, out, err = ask("machine=h200", "memory.capacity_gib=700", "model=qwen3_30b_a3b", "seq_len=8k")
    assert code == 0, err
    assert (
        "run it:\n  python -m ldft memory.capacity_gib=700 model=qwen3_30b_a3b seq_len=8k" in out
        and "gpu_share" not in out
    )
