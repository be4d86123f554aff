"""Shared by all tests: the command line in a subprocess, rows read back."""

from __future__ import annotations

import copy
import functools
import gc
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.hydra import Hydra
from omegaconf import DictConfig

from ldft import results
from ldft.cli import command as command_line
from ldft.cli import composition, many
from ldft.config import Config, Precision, from_dict
from ldft.environment import CONF_DIR
from ldft.runner import signals

# Before anything imports DeepSpeed, which would look for an accelerator, and say so, at every start.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
gc.disable()  # until all is imported (pytest_collection_finish)
# Before anything loads OpenMP. Its threads spin while they wait for each other, and several tests at once have more threads than
# there are cores: then most of them spin for one that has no core, and what takes three seconds alone takes a minute.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# A shell that starts the tests in the background lets them, and so what they start, ignore Ctrl-C, which several send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Long runs, and such as repeat a quicker test at full size: `make test` must stay under ten minutes on two cores.
IN_CI = os.environ.get("CI") == "true"
long = pytest.mark.skipif(not IN_CI, reason="long; CI=true make test runs it")


# Files that take longest, in this order; the others take less than a quarter of a minute each. They begin first: a worker
# keeps a file to its end, and the other one must not wait for it when nothing else is left.
LONGEST = (
    "training/deepspeed/test_roles.py",
    "training/deepspeed/test_update_overlap.py",
    "runner/test_failures.py",
    "runner/test_meeting.py",
    "monitor/test_monitor.py",
    "bench/test_bench.py",
    "sweep/test_sweep.py",
    "test_setup.py",
    "test_packaging.py",
    "training/test_sequence_parallel.py",
    "training/test_tiled_mlp.py",
    "runner/test_log_to.py",
    "analysis/test_report_page.py",
    "analysis/test_trackers.py",
    "monitor/test_two_ranks.py",
    "config/test_tree.py",
    "config/test_wrong_input.py",
    "sweep/test_plan.py",
    "training/test_weight_conversion.py",
    "training/test_built_parts.py",
    "runner/test_numa_options.py",
    "runner/test_from_hf.py",
    "planning/test_plans.py",
    "config/test_keys.py",
)
TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in the order of LONGEST, then the others in theirs. pytest-xdist keeps it with --no-loadscope-reorder."""
    place = {TESTS / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported by now stays: without this, each garbage collection looks at a million objects of torch and pytest, and
    tests that end in one (nothing may be left) take ten times as long."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure(config: pytest.Config) -> None:
    """At the end everything is freed, or nanobind would report what is left as leaks."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def loggers_and_signals_stay_as_they_are() -> Iterator[None]:
    """Hydra switches off every logger when the command line runs in this process; later tests read what they log. An agent ignores
    signals at its end, which every process that is started later would inherit."""
    before, handlers = logging.root.level, {one: signal.getsignal(one) for one in signals.SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    logging.root.setLevel(before)
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.disabled = False


@dataclass(slots=True)
class Done:
    """A finished `python -m ldft`."""

    exit_code: int
    stdout: str
    stderr: str
    results_dir: Path

    @property
    def rows(self) -> pd.DataFrame:
        return results.read(self.results_dir)

    @property
    def row(self) -> pd.Series:
        rows = self.rows
        assert len(rows) == 1, f"{len(rows)} rows\n{self.stdout}\n{self.stderr}"
        return rows.iloc[0]


def options(group: str) -> list[str]:
    """The options of a config group."""
    return composition.groups()[group]


def models() -> list[str]:
    """The options of the group model that hold an architecture: all but from_hf, which reads one."""
    return [name for name in options("model") if name != "from_hf"]


def hub_ids() -> dict[str, str]:
    """hf_id of each of them. From the files: composing all of them takes seconds, which every worker would pay at its start."""
    files = {name: yaml.safe_load((CONF_DIR / "model" / f"{name}.yaml").read_text()) for name in models()}
    return {name: values.get("hf_id", "") for name, values in files.items()}


def deepspeed_has_cpu_lion() -> bool:
    """Whether DeepSpeed can run its CPULion without a GPU. From 0.19.8 on it can; before, its vector code was wrong besides."""
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None and spec.submodule_search_locations
    return (Path(spec.submodule_search_locations[0]) / "ops/op_builder/cpu/cpu_lion.py").exists()


def _tree(overrides: list[str]) -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
        return hydra_compose("config", overrides=overrides)


def _typed(tree: DictConfig) -> Config:
    config = from_dict(tree)
    if config.train.precision is Precision.auto:
        config.train.precision = Precision.bf16
    return config


def compose_afresh(*overrides: str) -> Config:
    """`compose`, for tests that change the files it reads."""
    return _typed(_tree(list(overrides)))


# Hydra takes a sixth of a second for one, and many tests begin with the same options of groups, or with all the same.
_composer = many.Composer(_tree)


@functools.cache
def _composed(*overrides: str) -> Config:
    return _typed(_composer(list(overrides)))


def compose(*overrides: str) -> Config:
    """The typed config of a command line, without running it; the caller's own. In bf16 unless it says otherwise: what auto would
    be resolved to depends on the machine."""
    return copy.deepcopy(_composed(*overrides))


# Small enough for a second of training on two cores.
FAST = ("model=nano", "seq_len.tokens=64", "train.iterations=3", "train.warmup_iterations=1")


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a small run with results under tmp_path."""

    def build(*overrides: str, base: tuple[str, ...] = FAST) -> list[str]:
        return [sys.executable, "-m", "ldft", *base, f"results.dir={tmp_path / 'results'}", *overrides]

    return build


@pytest.fixture
def ldft(tmp_path: Path, command: Callable[..., list[str]]) -> Callable[..., Done]:
    """Run a small `python -m ldft` to its end."""

    def run(
        *overrides: str, base: tuple[str, ...] = FAST, env: dict[str, str] | None = None, timeout_s: float = 300
    ) -> Done:
        done = subprocess.run(
            command(*overrides, base=base),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd=tmp_path,
            env=os.environ | (env or {}),
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr, tmp_path / "results")

    return run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """`python -m ldft` in this process: what it refuses starts no rank, so that only the parent's time is paid."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    def run(*overrides: str) -> Done:
        folder = tmp_path / "results"
        arguments = [item for item in overrides]
        if not any(item.startswith("results.dir=") for item in arguments):
            arguments.append(f"results.dir={folder}")
        monkeypatch.setattr(sys, "argv", ["ldft", *arguments])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        capfd.readouterr()
        with monkeypatch.context() as patch:
            if "-m" in overrides or not any("sweep" in item or "hydra" in item for item in overrides):
                # Hydra composes everything once more beforehand, to see whether a file asks for a sweep.
                patch.setattr(Hydra, "get_mode", lambda *_, **__: None)
            code = command_line.main()
        out, err = capfd.readouterr()
        return Done(code, out, err, folder)

    return run


@pytest.fixture
def word_tokenizer(tmp_path: Path) -> Callable[..., Path]:
    """Save a tokenizer whose tokens are the given words, in order; ids from 0, the end token last where there is one."""

    def save(words: str, *, end: str = "") -> Path:
        from tokenizers import Tokenizer, models, pre_tokenizers

        vocabulary = {word: number for number, word in enumerate([*words.split(), *([end] if end else [])])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words.split()[0]))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        folder = tmp_path / f"tokenizer-{len(list(tmp_path.glob('tokenizer-*')))}"
        folder.mkdir()
        tokenizer.save(str(folder / "tokenizer.json"))
        if end:
            (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": end}}))
        return folder

    return save
