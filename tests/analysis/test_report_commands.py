"""The command of a row gives the row's run again: composed by Hydra, it has the row's run_id."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ldft.config import Config, Goal, run_id, to_dict
from multirun_analysis import load
from multirun_analysis.report.cells import cells
from multirun_analysis.report.commands import NoCommandError, command, gives_run_id, overrides
from tests.analysis.conftest import settings
from tests.conftest import compose, models, options

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
BANDWIDTH = "{node0:{cpu:278,h2d:55.5,d2h:55},node3:{cpu:69,h2d:53,d2h:37}}"


def round_trip(*given: str) -> list[str]:
    """The command of what a command line gives, checked to be the same run."""
    config = compose(*given)
    line = command(to_dict(config))
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "ldft"]
    assert run_id(compose(*words[3:])) == run_id(config), line
    assert gives_run_id(to_dict(config), run_id(config))
    return words[3:]


@pytest.mark.parametrize(
    "given",
    [
        ["model=llama3_8b", "offload=optimizer", "seq_len=32k", "train.precision=fp16", "launch.device=cuda"],
        ["model=llama3_8b", "model.num_layers=4", "seq_len.tokens=6000", "train.precision=fp16"],
        ["numa=weighted_0_3", "numa.nodes=[0,1]", "numa.weights=[3,1]", "train.precision=fp16"],
        ["model=gemma3_1b", "numa=optimal", f"numa.bandwidth={BANDWIDTH}", "train.precision=fp32"],
        ["checkpointing.every=2", "checkpointing.keep_attention=host", "lora=r16", "lora.target_modules=[q_proj]"],
        ["optimizer=lion", "optimizer.betas=[0.8,0.95]", "optimizer.eps=1e-12", "kernels.liger=true"],
        ["offload=full", "offload.deepspeed={zero_optimization:{reduce_bucket_size:1000}}"],
        ["data=text", "data.path='/a b/c,d=[e].txt'", "data.tokenizer='it''s'".replace("''", "\\'")],
        ["system='true'"],
        ["system='a \"b\" \\\\ c'"],
        ["system='\\${oc.env:HOME} ü'"],
        ["repeat=3", "train.seed=7", "launch.timeout_s=60.5", "force=true"],
    ],
    ids=lambda given: given[0],
)
def test_the_command_gives_the_same_run(given) -> None:
    found = round_trip(*given)
    if not any("'" in text or "{" in text for text in given):
        assert set(given) <= set(found)  # the options that were chosen, not a list of what they set


@pytest.mark.parametrize(
    "group", ["offload", "numa", "checkpointing", "attention", "optimizer", "lora", "data", "seq_len"]
)
def test_every_option_is_found_again(group) -> None:
    for option in options(group):
        round_trip(f"{group}={option}")


def test_every_model_is_found_again() -> None:
    for name in models():
        given = f"model={name}"
        assert round_trip(given)[:1] == ([] if name == "tiny" else [given]) or name == "tiny"


def test_where_results_go_is_left_to_the_reader() -> None:
    assert round_trip("results.dir=/x", "rerun=all", "monitor.interval_s=5", "train.precision=fp32") == [
        "train.precision=fp32"
    ]


def test_a_plan_that_was_made_is_its_values_and_one_that_was_not_is_asked_for_again() -> None:
    config = compose("plan=fastest", "checkpointing=none")
    config.asked = {"plan.goal": Goal.fastest.name}
    assert overrides(to_dict(config)) == ["checkpointing=none", "train.precision=bf16"]
    config.asked = {"plan.goal": "plan.goal: fastest: nothing fits"}
    assert "plan=fastest" in overrides(to_dict(config))


def test_every_current_real_row_is_found_again() -> None:
    checked = 0
    for file in sorted(BENCHMARKS.glob("*.parquet")):
        if {"config_json", "cfg.model.name"} <= set(pq.read_schema(file).names):
            for row in load(file).to_dict("records"):
                words = shlex.split(command(json.loads(row["config_json"])))
                same = run_id(compose(*words[3:])) == row["run_id"]
                assert same == gives_run_id(json.loads(row["config_json"]), row["run_id"])
                checked += same
    assert checked > 6


def test_what_no_command_can_say_is_said() -> None:
    values = to_dict(Config())
    with pytest.raises(NoCommandError, match=r"no key offload\.later"):
        command(values | {"offload": values["offload"] | {"later": 1}})
    lacking = to_dict(compose("model=llama3_8b"))
    lacking["model"]["extra"] = {}
    with pytest.raises(NoCommandError, match=r"model\.extra lacks a value"):
        command(lacking)
    with pytest.raises(NoCommandError, match="'0' cannot be written"):
        command(values | {"numa": values["numa"] | {"bandwidth": {"0": 1}}})
    with pytest.raises(NoCommandError, match="kind=gone"):
        gives_run_id(values | {"attention": {"kind": "gone"}}, "x")


def test_a_row_says_what_its_command_leaves_out(rows) -> None:
    rows.add(**settings("train.precision=fp32"), numa_policy="interleave:0-3")
    rows.add(**settings("seq_len=2k"), run_id="000000000000")
    inherited, older = (cell["runs"][0] for cell in cells(load(rows.folder)))
    assert inherited["command"] == "python -m ldft train.precision=fp32"
    assert "inherited its memory policy, interleave:0-3" in inherited["command_note"]
    assert "another run_id" in older["command_note"]
