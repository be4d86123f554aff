"""model=from_hf: a run whose model is that of a config.json, resolved before the run has its identity."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from hydra_plugins.ldft import search_path
from ldft.config import Config, Weights, disagreements, from_dict, run_id, to_dict
from ldft.config.root import FROM_FILE
from ldft.environment import CONF_DIR
from ldft.errors import ConfigError
from ldft.runner import checks, dry_run
from ldft.sweep import plan
from ldft.training.architecture import hf_config
from tests.conftest import Done, compose
from tests.training.test_published_configs import published

LLAMA = "meta-llama/Llama-3.1-8B"
TINY = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str = LLAMA, to: str = "Llama-3.1-8B", **changes: Any) -> Path:
        path = tmp_path / to
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(published(name) | changes))
        return path

    return write


def resolved(*overrides: str) -> Config:
    config = compose("model=from_hf", "launch.device=cpu", *overrides)
    checks.resolve(config)
    config.validate()
    return config


def test_the_published_file_is_the_option(folder: Callable[..., Path]) -> None:
    path = folder()
    config = resolved(f"model.path={path}")
    option = compose("model=llama3_8b", "launch.device=cpu")
    assert hf_config(config.model).to_dict() == hf_config(option.model).to_dict()
    digest = hashlib.sha256((path / "config.json").read_bytes()).hexdigest()
    assert config.asked == {"model": f"from {path}/config.json, sha256 {digest[:16]}", "plan.goal": "auto"}
    assert checks.resolutions(config) == [f"model llama_3_1_8b {config.asked['model']}"]
    # The identity is the model's, wherever its file lies; so the option under this name has it, too.
    option.model.name, option.model.hf_id = config.model.name, ""
    elsewhere = resolved(f"model.path={folder(to='elsewhere/Llama-3.1-8B')}")
    assert run_id(config) == run_id(option) == run_id(elsewhere)
    assert run_id(config) != run_id(resolved(f"model.path={folder(to='other/Llama-3.1-8B', rms_norm_eps=1e-6)}"))


def test_keys_of_the_file_that_the_family_does_not_read_are_in_the_row(folder: Callable[..., Path]) -> None:
    asked = resolved(f"model.path={folder(embedding_multiplier=12)}").asked["model"]
    assert asked.endswith("; transformers does not read these keys of the file: embedding_multiplier")


def test_values_that_are_given_take_the_files_place(folder: Callable[..., Path]) -> None:
    types = ["full_attention", "sliding_attention"] * 16
    path = f"model.path={folder(**{'attention_bias': True, 'rope_theta': 7e5})}"
    model = resolved(path, "model.num_layers=2", "model.name=mine", "model.extra.rms_norm_eps=0.5").model
    assert (model.name, model.num_layers, model.hidden_size, model.rope_theta) == ("mine", 2, 4096, 7e5)
    assert model.extra == {"attention_bias": True, "rms_norm_eps": 0.5}
    assert resolved(path, "model.rope_scaling.factor=2").model.rope_scaling["factor"] == 2
    replaced = resolved(path, "model.rope_scaling={rope_type: linear, factor: 3}").model
    assert replaced.rope_scaling == {"rope_type": "linear", "factor": 3}
    assert resolved(path, "model.family=llama").model.family == "llama"
    with pytest.raises(ConfigError, match=r"^model.family: qwen2, but .*config.json is of llama; leave it out"):
        resolved(path, "model.family=qwen2")
    gemma = f"model.path={folder('google/gemma-2-9b', to='gemma', num_hidden_layers=32, layer_types=types)}"
    assert resolved(gemma, "model.num_layers=6").model.extra["layer_types"] == types[:6]


def test_the_folder_is_kept_for_its_weights_alone(folder: Callable[..., Path]) -> None:
    path = folder()
    assert resolved(f"model.path={path}").model.path == ""
    for name in (path, path / "config.json"):
        model = resolved(f"model.path={name}", "model.weights=pretrained").model
        assert (model.path, model.weights) == (str(path), Weights.pretrained)


def test_an_incomplete_config_is_never_taken_for_a_complete_one(folder: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"^model\.\w+: \${config_json} must be read"):
        compose("model=from_hf", "launch.device=cpu").validate()
    with pytest.raises(ConfigError, match=r"^model.path: empty; name the folder with the model's config.json, or set"):
        resolved()
    # Any option can leave keys to the file.
    config = compose(
        "model=llama3_8b",
        "launch.device=cpu",
        "model.rope_theta=${config_json}",
        f"model.path={folder(rope_theta=3e5)}",
    )
    checks.resolve(config)
    assert (config.model.rope_theta, config.model.name) == (3e5, "llama3_8b")
    again = to_dict(config)
    checks.resolve(config)
    assert to_dict(config) == again


def test_a_sweep_over_files_and_its_dry_run(folder: Callable[..., Path]) -> None:
    paths = [folder(), folder("Qwen/Qwen3-4B", to="Qwen3-4B"), folder(to="copy/Llama-3.1-8B")]
    cells = [["model=from_hf", "launch.device=cpu", f"model.path={path}"] for path in paths]
    planned = plan.make(cells, lambda overrides: OmegaConf.create(to_dict_of(*overrides)), {"model", "model.path"}, 1.0)
    assert [cell.model for cell in planned.cells] == [
        "llama_3_1_8b",
        "qwen3_4b",
    ]  # two files with one model are one cell
    outcome, line = dry_run.summarize(planned.configs[planned.cells[1].run_id])
    assert outcome in ("fits", "does not fit"), line
    broken = folder(to="broken")
    (broken / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"^model.path: .*broken/config.json is not JSON"):
        plan.make(
            [["model=from_hf", "launch.device=cpu", f"model.path={broken}"]],
            lambda overrides: OmegaConf.create(to_dict_of(*overrides)),
            set(),
            1.0,
        )


def to_dict_of(*overrides: str) -> dict[str, Any]:
    """The composed tree as Hydra gives it to a sweep: with ${config_json} where it leaves a value to the file."""
    config = compose(*overrides)
    tree = to_dict(config)
    for key in tree.pop("asked"):
        tree["model"][key.removeprefix("model.")] = FROM_FILE
    return tree


def test_hosts_that_read_the_same_file_agree(folder: Callable[..., Path]) -> None:
    """The other host compares its command before it has read the file."""
    words = ("model=from_hf", "launch.device=cpu", f"model.path={folder(to='tiny', **TINY)}", "model.num_layers=2")
    run = from_dict(to_dict(resolved(*words)))
    assert disagreements(compose(*words), run) == []
    assert disagreements(compose(*words[:3], "model.num_layers=1"), run) == [("model.num_layers", "1", "2")]
    assert "model.hidden_size" in [key for key, *_ in disagreements(compose("model=llama3_1b"), run)]


def test_a_run_records_where_its_model_is_from(folder: Callable[..., Path], ldft: Callable[..., Done]) -> None:
    path = folder(to="tiny", **TINY)
    done = ldft(
        f"model.path={path}",
        "model.num_layers=2",
        "launch.device=cpu",
        base=("model=from_hf", "seq_len.tokens=64", "train.iterations=3", "train.warmup_iterations=1"),
    )
    assert done.exit_code == 0, done.stderr
    row = done.row
    assert (row["cfg.model.name"], row["cfg.model.num_layers"], row["cfg.model.hidden_size"]) == ("tiny", 2, 64)
    digest = hashlib.sha256((path / "config.json").read_bytes()).hexdigest()
    said = f"from {path}/config.json, sha256 {digest[:16]}"
    assert json.loads(row["cfg.asked"])["model"] == said and f"ldft: model tiny {said}\n" in done.stdout
    assert row["parameters"] == 2 * 512 * 64 + 64 + 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96 + 2 * 64)
    assert done.stderr == ""


def test_an_option_in_conf_local_is_used_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "local" / "model").mkdir(parents=True)
    nano = Path(CONF_DIR, "model", "nano.yaml")
    shutil.copy(nano, tmp_path / "local" / "model" / "mine.yaml")
    monkeypatch.setattr(search_path, "CONF_DIR", tmp_path)
    assert compose("model=mine").model == compose("model=nano").model
