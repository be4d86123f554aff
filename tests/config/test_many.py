"""Composing many configs gives what Hydra gives for each, and reading them what merging every key would give."""

from __future__ import annotations

from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from ldft.cli import command, many
from ldft.config import from_dict
from ldft.config.root import typed_tree
from ldft.environment import CONF_DIR

_ = command  # registers the schema


def load(overrides: list[str]) -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
        return compose("config", overrides=overrides)


def outcome(composer: Any, overrides: list[str]) -> Any:
    """The tree as plain data, unresolved; or the error and its cause."""
    try:
        return OmegaConf.to_container(composer(overrides), resolve=False)
    except Exception as error:
        return type(error), str(error), type(error.__cause__), str(error.__cause__)


@pytest.mark.parametrize(
    ("overrides", "loads"),
    [
        # Only options of groups go through Hydra, and once.
        ("model=nano train.seed=1", "model=nano"),
        (
            "model=nano train.seed=2 optimizer.betas=[0.1,0.2] model.extra={a:1} offload.deepspeed.aio.size=3",
            "model=nano",
        ),
        ("train.seed=2 model=nano train.seed=3", "model=nano"),
        ("+sweep=smoke model=nano train.iterations=7", "+sweep=smoke model=nano"),
        ("model=nano model.vocab_size=${seq_len.tokens}", "model=nano"),
        # What it would refuse, it refuses.
        ("model=nano train.seed=x", "model=nano"),
        ("model=nano train.sede=1", "model=nano"),
        ("model=no_such train.seed=1", "model=no_such"),
        # Anything else is Hydra's as a whole: the order of keys and their parts matters, or files are looked up.
        ("train.seed=2 train={seed:3}", "train.seed=2 train={seed:3}"),
        ("model=nano +model.extra.a=1 model.extra.a=2", "model=nano +model.extra.a=1 model.extra.a=2"),
        ("~checkpointing train.seed=2", "~checkpointing train.seed=2"),
        ("train.seed=1,2", "train.seed=1,2"),
        ("model@data=nano train.seed=2", "model@data=nano train.seed=2"),
        ("hydra.mode=RUN train.seed=2", "hydra.mode=RUN train.seed=2"),
    ],
)
def test_it_gives_what_hydra_gives(overrides: str, loads: str) -> None:
    loaded: list[str] = []

    def noted(words: list[str]) -> DictConfig:
        loaded.append(" ".join(words))
        return load(words)

    words = overrides.split(" ")
    composer = many.Composer(noted)
    assert outcome(composer, words) == outcome(load, words)
    assert loaded == [loads]


def test_each_caller_has_a_tree_of_its_own() -> None:
    composer = many.Composer(load)
    first, again = composer(["model=nano"]), composer(["model=nano", "train.seed=4"])
    first.train.iterations, first.optimizer.betas[0] = 77, 0.5
    third = composer(["model=nano"])
    assert (again.train.seed, third.train.seed) == (4, 0) and third.train.iterations != 77
    assert third.optimizer.betas[0] != 0.5


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"train": {"seed": 0, "precision": "auto"}, "system": ""},
        {"train": {"seed": True}},  # True equals 1, but is no whole number
        {"repeat": 1.0},
        {"optimizer": {"eps": 1, "betas": [0.9, 0.95]}},
        {"offload": {"deepspeed": {"a": {"b": [1, None]}}}, "asked": {"train.seed": "auto"}},
        {"model": {"rope_scaling": {}, "extra": {"x": {}}}, "numa": {"roles": {"momentum": {"nodes": [0]}}}},
        {"train": None},
        {"train": 3},
        {"train": {"sede": 1}},
        {"offload": {"deepspeed": None}},
        {"launch": {"num_ranks": None}},
    ],
    ids=str,
)
def test_reading_merges_what_differs_and_refuses_what_merging_refuses(values: dict[str, Any]) -> None:
    def merged(values: Any) -> Any:
        tree = typed_tree()
        tree.merge_with(values)
        return OmegaConf.to_object(tree)

    def said(function: Any) -> Any:
        try:
            return repr(function(values))
        except Exception as error:
            return type(error), str(error)

    assert said(from_dict) == said(merged)
