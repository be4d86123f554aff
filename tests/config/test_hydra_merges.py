"""Mappings, on the command line or in a file: an empty one and a rotary embedding of another type replace the option's; no value is
missing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hydra_plugins.ldft import search_path
from ldft.config import from_dict, to_dict
from ldft.errors import ConfigError
from ldft.runner import checks
from tests.conftest import Done, compose, compose_afresh
from tests.training.test_published_configs import published

YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
# The beginning of a file of this machine's defaults that chooses a model.
OF_MINE = "# @package _global_\ndefaults:\n  - override /model: mine\n"
GIVEN: dict[str, dict[str, Any]] = {
    "model.rope_scaling={}": {},
    "model.rope_scaling={rope_type:yarn,factor:4.0}": YARN,
    "model.rope_scaling={type:yarn,factor:4.0}": {"type": "yarn", "factor": 4.0},
    "model.rope_scaling={rope_type:default}": {"rope_type": "default"},
    "model.rope_scaling={factor:4.0}": LLAMA3 | {"factor": 4.0},
    "model.rope_scaling={rope_type:llama3,factor:4.0}": LLAMA3 | {"factor": 4.0},
    "model.rope_scaling.factor=4.0": LLAMA3 | {"factor": 4.0},
    "model.rope_scaling={full_attention:{rope_type:yarn,factor:4.0}}": {"full_attention": YARN},
    "model.rope_scaling.full_attention={rope_type:yarn,factor:4.0}": {"full_attention": YARN},
}


@pytest.mark.parametrize("make", [compose, compose_afresh])
@pytest.mark.parametrize("override", GIVEN)
def test_a_rotary_embedding_of_another_type_replaces_the_options(override: str, make: Callable[..., Any]) -> None:
    assert make("model=llama3_1b", override).model.rope_scaling == GIVEN[override]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            "model=llama3_1b model.rope_scaling.rope_type=yarn model.rope_scaling.factor=4",
            "model.rope_scaling.low_freq_factor: 1.0 has no effect with rope_type=yarn; leave it out, or give the parameters of "
            "yarn together, which replaces those of another type: 'model.rope_scaling={rope_type: yarn, factor: 4, "
            "original_max_position_embeddings: 8192}'\n",
        ),
        (
            "model=llama3_1b model.rope_scaling.rope_type=longrope",
            "'model.rope_scaling={rope_type: longrope, short_factor: ..., long_factor: ..., original_max_position_embeddings: "
            "8192, factor: 32.0}'\n",
        ),
        (
            "model=gemma3_4b model.rope_scaling.full_attention.rope_type=default",
            "'model.rope_scaling={full_attention: {rope_type: default, rope_theta: 1000000.0}}'\n",
        ),
        (
            "model=llama3_1b model.rope_scaling.type=yarn",
            "model.rope_scaling.type: 'yarn' contradicts rope_type=llama3; set rope_type alone\n",
        ),
    ],
)
def test_a_type_alone_is_answered_by_the_whole_mapping(words: str, says: str, here: Callable[..., Done]) -> None:
    done = here(*words.split(), "launch.device=cpu", "dry_run=true")
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and done.stderr.endswith(says)
    if override := re.search(r"'(model.rope_scaling=.*)'$", done.stderr):
        model = compose(words.split()[0], override[1].replace("...", "[" + "2," * 31 + "2]")).model
        assert model.rope_parameters()  # what is proposed is accepted


def test_what_comes_later_is_merged_into_it() -> None:
    words = ("model=llama3_1b", "model.rope_scaling={rope_type:yarn,factor:4.0}", "model.rope_scaling.beta_fast=16")
    assert compose(*words).model.rope_scaling == YARN | {"beta_fast": 16}
    by_layer = "model.rope_scaling={full_attention:{rope_type:linear,factor:2.0},sliding_attention:{rope_theta:9.0}}"
    later = "model.rope_scaling={full_attention:{rope_type:yarn,factor:4.0}}"
    expected = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 9.0}}
    assert compose("model=gemma3_4b", by_layer, later).model.rope_scaling == expected


def test_a_layer_type_without_parameters_gets_the_given_ones() -> None:
    words = ("model.rope_scaling.full_attention=null", "model.rope_scaling.full_attention={rope_type:linear,factor:8}")
    rope = compose("model=gemma3_4b", *words).model.rope_scaling
    assert rope["full_attention"] == {"rope_type": "linear", "factor": 8} and rope["sliding_attention"]


@pytest.mark.parametrize("override", [override for override in GIVEN if override.startswith("model.rope_scaling=")])
@pytest.mark.parametrize("where", ["this machine's defaults", "an option of the user's", "a sweep"])
def test_a_file_means_what_the_command_line_means(
    override: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_path, "CONF_DIR", tmp_path)
    folder, mapping = tmp_path / "local", override.partition("=")[2].replace(":", ": ")
    for name in ("model", "sweep", "local"):
        (folder / name).mkdir(parents=True)
    (folder / "model" / "mine.yaml").write_text("defaults: [llama3_1b, _self_]\n")
    (folder / "sweep" / "mine.yaml").write_text("# @package _global_\n")
    if where == "an option of the user's":
        (folder / "model" / "mine.yaml").write_text(f"defaults: [llama3_1b, _self_]\nrope_scaling: {mapping}\n")
    elif where == "a sweep":
        (folder / "sweep" / "mine.yaml").write_text(f"# @package _global_\nmodel:\n  rope_scaling: {mapping}\n")
    words = ["+sweep=mine", "model=mine"]
    if where == "this machine's defaults":
        (folder / "local" / "default.yaml").write_text(f"{OF_MINE}model:\n  rope_scaling: {mapping}\n")
        assert compose_afresh(*words).model.rope_scaling == LLAMA3, "an option that the command names comes later"
        words.pop()
    assert compose_afresh(*words).model.rope_scaling == GIVEN[override]
    # The command line comes last.
    assert compose_afresh(*words, "model.rope_scaling={type:linear,factor:2}").model.rope_scaling == {
        "type": "linear",
        "factor": 2,
    }


def test_an_empty_mapping_in_a_file_replaces_in_every_open_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_path, "CONF_DIR", tmp_path)
    (tmp_path / "local" / "local").mkdir(parents=True)
    mine = tmp_path / "local" / "local" / "default.yaml"
    mine.write_text(OF_MINE.replace("mine", "llama3_1b") + "model:\n  extra: {}\n")
    assert compose_afresh().model.extra == {}
    mine.write_text(OF_MINE.replace("mine", "from_hf") + "model:\n  extra: {}\n")
    with pytest.raises(ConfigError, match=r"^model.extra: \{\} would leave the keys of config.json"):
        compose_afresh()
    mine.write_text(OF_MINE.replace("mine", "gemma2_9b") + "model:\n  extra: {rms_norm_eps: 1.0e-6}\n")
    assert compose_afresh().model.extra == compose("model=gemma2_9b").model.extra | {"rms_norm_eps": 1e-6}


def test_an_option_on_the_command_line_comes_before_keys_of_this_machines_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_path, "CONF_DIR", tmp_path)
    for name in ("local", "sweep"):
        (tmp_path / "local" / name).mkdir(parents=True)
    (tmp_path / "local" / "local" / "default.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: nano\n"
        "checkpointing: {mode: gpu, layers: 1}\noffload: {stage: 2, parameters: none}\nplan: {goal: longest}\n"
    )
    (tmp_path / "local" / "sweep" / "mine.yaml").write_text("# @package _global_\nplan: {goal: leanest}\n")

    def values(*words: str) -> tuple[str, str, int, int, str]:
        found = compose_afresh(*words)
        kept = found.checkpointing
        return found.model.name, kept.mode.name, kept.layers, found.offload.stage, found.plan.goal.name

    assert values() == ("nano", "gpu", 1, 2, "longest")
    # What the option does not set stays.
    assert values("checkpointing=cpu") == ("nano", "cpu", 1, 2, "longest")
    assert values("plan=none", "offload=full", "model=tiny") == ("tiny", "gpu", 1, 3, "none")
    assert values("checkpointing.mode=none") == ("nano", "none", 1, 2, "longest")
    # A sweep's file is named, too, and comes last.
    assert values("+sweep=mine", "plan=none")[-1] == "leanest"


def test_an_empty_mapping_replaces_in_every_open_section() -> None:
    assert compose("model=llama3_1b").model.extra and not compose("model=llama3_1b", "model.extra={}").model.extra
    words = ("offload.deepspeed={zero_optimization:{sub_group_size:7}}", "offload.deepspeed={}")
    assert compose(*words).offload.deepspeed == {}


def test_an_empty_mapping_beside_from_hf(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published("meta-llama/Llama-3.1-8B")))
    words = ("model=from_hf", "launch.device=cpu", f"model.path={tmp_path}")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "none.yaml").write_text("# @package _global_\nmodel:\n  rope_scaling: {}\n")
    in_file = ("+sweep=none", f"hydra.searchpath=[file://{tmp_path}]")
    for config in (compose(*words, "model.rope_scaling={}"), compose_afresh(*words, *in_file)):
        checks.resolve(config)
        assert config.model.rope_parameters()[""] == {"rope_type": "default", "rope_theta": 500000.0}
    with pytest.raises(ConfigError, match=r"^model.extra: \{\} would leave the keys of config.json"):
        compose(*words, "model.extra={}")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.seed=???", "train.seed"),
        ("seq_len.tokens=???", "seq_len.tokens"),
        ("model.name=???", "model.name"),
        ("results.dir=???", "results.dir"),
        ("kernels.liger=???", "kernels.liger"),
        ("model.extra={rms_norm_eps:???}", "model.extra.rms_norm_eps"),
        ("optimizer.betas=[0.1,???]", "optimizer.betas[1]"),
    ],
)
def test_a_mandatory_value_that_is_missing_is_refused(override: str, key: str, here: Callable[..., Done]) -> None:
    done = here("model=nano", "launch.device=cpu", override)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"ldft: {key}: ??? is a mandatory value that nobody gave; give one, ")


def test_a_missing_value_in_a_file_is_refused(tmp_path: Path, here: Callable[..., Done]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("name: mine\nnum_layers: ???\n")
    done = here("--config-dir", str(tmp_path), "model=mine", "launch.device=cpu", "dry_run=true")
    assert done.exit_code == 2 and done.stderr.startswith(
        "ldft: model.num_layers: ??? in model/mine.yaml is a mandatory"
    )
    stored = to_dict(compose("model=nano"))
    stored["train"]["seed"] = "???"
    with pytest.raises(ConfigError, match=r"^train.seed: \?\?\? is a mandatory value"):
        from_dict(stored)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.seed=", "train.seed: empty; give a whole number"),
        ("kernels.liger=", "kernels.liger: empty; give "),
        ("hydra=x", "hydra: 'x' is no option; write hydra.<key>=<value>"),
        ("model=???", "model: '???' does not exist; use one of "),
    ],
)
def test_a_value_that_is_empty_or_no_option_is_named_as_such(
    override: str, says: str, here: Callable[..., Done]
) -> None:
    done = here("launch.device=cpu", override)
    assert done.exit_code == 2 and done.stderr.startswith(f"ldft: {says}") and done.stderr.count("\n") == 1


def test_an_option_that_is_not_utf8_is_named(tmp_path: Path, here: Callable[..., Done]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "bin.yaml").write_bytes(b"name: \xff\xfe\n")
    done = here("--config-dir", str(tmp_path), "model=bin", "launch.device=cpu")
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert (
        done.stderr.startswith("ldft: ")
        and f"{tmp_path}/model/bin.yaml: not UTF-8 (byte 6); save it as UTF-8" in done.stderr
    )
