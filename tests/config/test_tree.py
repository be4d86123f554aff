"""The config tree and what the command line says about it: composition, help, completion, dry run, a machine's own defaults."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir

from ldft.cli import composition
from ldft.config import Device, from_dict
from ldft.config.root import FROM_FILE, flatten, typed_tree
from ldft.environment import CONF_DIR
from tests.conftest import FAST, compose, compose_afresh, options

EVERY = sorted(
    (file.parent.name, file.stem) for file in CONF_DIR.glob("*/*.yaml") if file.parent.name not in ("local", "hydra")
)


def say(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ldft", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | (env or {}), check=False)


@pytest.mark.parametrize(("group", "option"), EVERY)
def test_every_file_composes_and_is_valid(group: str, option: str) -> None:
    data = ["data.path=a.jsonl", "data.tokenizer=a"]
    beside = {"text": data, "chat": data, "nvme": ["offload.nvme_path=a"]}.get(option, [])
    plus = "+" if group == "sweep" else ""  # in no defaults list
    config = compose(f"{plus}{group}={option}", "launch.device=cpu", *beside)
    if option == "from_hf":  # complete only with a config.json
        assert {key for key, value in config.asked.items() if value == FROM_FILE} > {"model.name", "model.num_layers"}
        return
    config.validate()
    assert group != "model" or config.model.name == option
    if group == "seq_len":
        assert config.seq_len.tokens == int(option[:-1]) * {"k": 1024, "m": 1024**2}[option[-1]]


def test_defaults_are_what_the_readme_promises() -> None:
    config = compose()
    assert (config.model.name, config.offload.stage, config.data.kind.name) == ("tiny", 3, "random")
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.betas) == (1e-4, 0.01, [0.9, 0.95])
    assert (optimizer.gradient_clipping, config.train.iterations, config.train.warmup_iterations) == (0.9, 5, 2)


def test_a_composed_config_is_the_callers_own() -> None:
    """Tests change theirs; the next one of the same command line is as it was. So is the typed tree that composing starts with."""
    first = compose("model=nano")
    first.train.iterations += 1
    first.optimizer.betas.append(0.5)
    first.offload.deepspeed["steps_per_print"] = 1
    first.asked["model.name"] = "changed"
    again, afresh = compose("model=nano"), compose_afresh("model=nano")
    assert again == afresh != first

    tree = typed_tree()
    tree.model.extra["changed"] = True
    assert typed_tree().model.extra == {} == typed_tree().model.rope_scaling


def test_yaml_of_a_user_reaches_deepspeed_without_a_plus(tmp_path: Path) -> None:
    (tmp_path / "offload").mkdir()
    (tmp_path / "offload" / "mine.yaml").write_text("deepspeed: {zero_optimization: {sub_group_size: 5}}\n")
    composition.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
        overrides = [f"hydra.searchpath=[file://{tmp_path}]", "offload=mine", "offload.deepspeed.aio.block_size=3"]
        config = from_dict(hydra_compose("config", overrides=overrides))
    assert config.offload.deepspeed == {"zero_optimization": {"sub_group_size": 5}, "aio": {"block_size": 3}}


def test_help_names_every_group_option_and_key(tmp_path: Path) -> None:
    done = say("--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    for group in composition.groups():
        assert f"{group}: {', '.join(options(group))}" in done.stdout
    for part in (
        "Examples",
        "python -m ldft model=llama3_8b",
        "iterations: 5",
        "conf/local/default.yaml",
        "ldft --shell-completion",
    ):
        assert part in done.stdout, part
    assert "powered by Hydra" not in done.stdout.lower()


def test_cfg_job_prints_the_composed_config_and_starts_nothing(tmp_path: Path) -> None:
    done = say("--cfg", "job", "model=nano", "seq_len=8k", cwd=tmp_path)
    assert done.returncode == 0 and "tokens: 8192" in done.stdout and "name: nano" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_machines_own_defaults_turn_plans_off_as_documented(tmp_path: Path) -> None:
    line = re.search(r"`(- [^`]*)` among the `defaults`", (CONF_DIR.parent / "docs" / "plan.md").read_text())
    assert line
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "default.yaml").write_text(f"# @package _global_\ndefaults:\n  {line[1]}\n")
    for words, goal in (((), "none"), (("plan=fastest",), "fastest")):
        done = say("--config-dir", str(tmp_path), "--cfg", "job", *words, cwd=tmp_path)
        assert f"goal: {goal}\n" in done.stdout, done.stderr


def test_a_machines_own_defaults_are_taken_and_the_command_line_wins(tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "default.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: nano\nsystem: rack7\ntrain: {iterations: 9}\n"
    )
    done = say("--config-dir", str(tmp_path), "--cfg", "job", "train.iterations=8", cwd=tmp_path)
    assert "system: rack7" in done.stdout and "name: nano" in done.stdout and "iterations: 8" in done.stdout, (
        done.stderr
    )
    ignored = subprocess.run(["git", "check-ignore", "-q", "conf/local/default.yaml"], cwd=CONF_DIR.parent, check=False)
    assert ignored.returncode in (0, 128)  # 128: not a git checkout


def test_tab_completes_options_and_keys(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("ldft")
    (tmp_path / "complete.sh").write_text(
        'eval "$(ldft --shell-completion install=bash)"\n'
        'COMP_LINE="ldft $1"; COMP_POINT=${#COMP_LINE}; COMP_WORDS=(ldft "$1"); COMP_CWORD=1\n'
        "hydra_bash_completion\nprintf '%s\\n' \"${COMPREPLY[@]}\"\n"
    )
    path = f"{script.parent}{os.pathsep}{os.environ['PATH']}"

    def completions(word: str) -> list[str]:
        done = subprocess.run(
            ["bash", "complete.sh", word],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PATH": path},
            check=True,
        )
        return done.stdout.split()

    assert completions("model=llama") == [f"model=llama3_{size}" for size in ("1b", "3b", "70b", "8b")]
    assert completions("train.iter") == ["train.iterations="]


def test_dry_run_says_what_would_run_and_writes_nothing(tmp_path: Path) -> None:
    start = time.monotonic()
    done = say(
        *("model=llama3_8b", "dry_run=true", "launch.device=cpu", "seq_len=32k", "launch.num_ranks=2"),
        "train.precision=bf16",
        cwd=tmp_path,
    )
    took_s = time.monotonic() - start
    assert done.returncode == 0 and done.stderr == ""
    for part in (
        "8,030,261,248 parameters",
        "2 sequences of 32768 tokens = 65,536 tokens",
        "attention: sdpa; Liger Kernel: no; MLP: whole; every weight is trained",
        "update: adamw, by ldft's fused step in host memory",
        "memory policy of the ranks (numa=default): ",
        "process: 737.28 MiB",
        "processes: 2 x",
        "rank 1:",
        "master_weights: 29.92 GiB",  # 4 bytes a parameter, over all ranks
        "compute_weights: 14.96 GiB",
        '"stage3_prefetch_bucket_size": 218112000',
        "row.parquet",
    ):
        assert part in done.stdout, part
    assert not list(tmp_path.iterdir())
    assert took_s < 10, "3 s on an idle machine"
    done = say("dry_run=true", "train.iterations=1", cwd=tmp_path)
    assert done.returncode == 2 and "train.warmup_iterations" in done.stderr and not list(tmp_path.iterdir())


def test_a_dry_run_of_a_sweep_says_of_each_cell_what_would_become_of_it(tmp_path: Path) -> None:
    command = (
        "-m",
        "dry_run=true",
        "memory.capacity_gib=4",
        "launch.device=cpu",
        "seq_len.tokens=16",
        "train.iterations=2",
        "train.precision=bf16",
    )
    done = say(*command, "model=nano,llama3_8b", "train.warmup_iterations=1,5", cwd=tmp_path)
    out = done.stdout.splitlines()
    assert out[0].startswith("ldft: dry run: 4 cells of sweep-") and done.stderr == ""
    said = [line.partition(": ")[0] + line.partition(":")[2].partition(":")[0] for line in out[1:-1]]
    assert said == [
        "[1/4] nano 16 default train.warmup_iterations=1 fits",
        "[2/4] nano 16 default train.warmup_iterations=5 invalid",
        "[3/4] llama3_8b 16 default train.warmup_iterations=1 does not fit",
        "[4/4] llama3_8b 16 default train.warmup_iterations=5 invalid",
    ]
    assert "4.0 GiB free by memory.capacity_gib (largest: master_weights" in out[3]
    assert done.returncode == 2 and out[-1] == "ldft: fits 1, invalid 2, does not fit 1"
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_a_sweep_says_which_cells_have_a_row(tmp_path: Path) -> None:
    line = ("-m", *FAST, "launch.device=cpu", "checkpointing=none", f"results.dir={tmp_path}")
    assert (
        say(*line, "checkpointing.every=1", "train.warmup_iterations=5", cwd=tmp_path).returncode == 1
    )  # a row: invalid
    done = say(*line, "checkpointing.every=1,2", "train.warmup_iterations=1,5", "dry_run=true", cwd=tmp_path)
    said = {
        line.partition(": ")[0].partition("default ")[2]: line.partition(": ")[2] for line in done.stdout.splitlines()
    }
    assert said["train.warmup_iterations=1 checkpointing.every=1"].startswith("fits: host ")
    assert said["train.warmup_iterations=1 checkpointing.every=2"].startswith("skipped: checkpointing.every: 2 needs")
    assert said["train.warmup_iterations=5 checkpointing.every=1"].startswith("invalid: train.warmup_iterations: 5")
    assert [name for name in said if "has a row" in said[name] and "every" in name] == [
        "train.warmup_iterations=5 checkpointing.every=1"
    ]
    assert done.stdout.endswith(", has a row 1\n") and done.returncode == 2


def test_a_file_that_is_no_yaml_is_named_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("name: mine\nfamily: {llama\nnum_layers: 2\n")
    done = say("--config-dir", str(tmp_path), "model=mine", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"ldft: {tmp_path}/model/mine.yaml, line 3: not YAML (expected"), done.stderr
    (tmp_path / "model" / "mine.yaml").write_text("num_layers: two\n")
    done = say("--config-dir", str(tmp_path), "model=mine", cwd=tmp_path)
    assert "model.num_layers: 'two' in model/mine.yaml does not fit; give a whole number" in done.stderr, done.stderr


def test_version_is_ours(tmp_path: Path) -> None:
    assert say("--version", cwd=tmp_path).stdout == f"ldft {metadata.version('ldft')}\n"


def test_the_parent_imports_neither_torch_nor_what_brings_it(tmp_path: Path) -> None:
    code = (
        "import sys; from ldft.cli import command; from ldft.training import safetensors_index, schedule\n"
        "from ldft.training.text import check, packing\n"
        "sys.argv = ['ldft', 'model=llama3_8b', 'dry_run=true']; assert command.main() == 0\n"
        "print([name for name in ('torch', 'transformers', 'deepspeed', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_config_is_importable_without_torch_and_hydra(tmp_path: Path) -> None:
    code = (
        "import sys; import ldft.config; print([name for name in ('torch', 'hydra', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.strip() == "[]"


def test_identity_leaves_out_what_is_not_measured() -> None:
    from ldft.config import run_id

    unmeasured = ("dry_run=true", "launch.timeout_s=5", "results.dir=elsewhere", "memory.vram_gib=9")
    same = compose(*unmeasured, "monitor.interval_s=0.5", "launch.device=cpu")
    same.asked = {"train.precision": "auto"}
    assert run_id(same) == run_id(compose("launch.device=cpu"))
    # Not even their names count: the ids of rows from before a key existed stay.
    hashed = {"version": 1} | {
        key: value
        for key, value in flatten(same).items()
        if key not in ("launch.timeout_s", "memory.vram_gib", "rerun", "dry_run", "force", "asked")
        and key.partition(".")[0] not in ("results", "monitor", "sweep", "plan", "machine")
        and "expert" not in key
        and key
        not in ("model.router_aux_loss", "data.column", "data.loss", "optimizer.overlap_step", "offload.gpu_share")
        and key
        not in ("checkpointing.device_inputs", "kernels.mlp_tiles", "launch.num_hosts", "launch.sequence_parallel")
    }
    assert run_id(same) == hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:12]
    for change in (
        {"launch.device": Device.cuda},
        {"model.num_experts": 4},
        {"model.router_aux_loss": 0.5},
        {"data.column": "a"},
    ):
        other = compose("launch.device=cpu")
        for key, value in change.items():
            setattr(getattr(other, key.partition(".")[0]), key.partition(".")[2], value)
        assert run_id(other) != run_id(same), change


@pytest.mark.parametrize(
    ("overrides", "run", "series"),
    [
        ("launch.device=cpu", "cd4319c6beff", "2b1bd18d4a88"),
        ("model=llama3_8b numa=weighted_0_3 launch.device=cuda seq_len=32k", "81a4cc00e428", "b3640212ad52"),
        ("model=nano launch.device=cpu data=text data.path=a.jsonl data.tokenizer=t", "0308a3997979", "b5105f395cb8"),
    ],
)
def test_identities_of_rows_that_exist_stay(overrides: str, run: str, series: str) -> None:
    from ldft.config import run_id, series_id

    config = compose(*overrides.split())
    assert (run_id(config), series_id(config)) == (run, series)
