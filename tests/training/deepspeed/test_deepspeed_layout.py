"""A DeepSpeed that renamed something is refused in one line, before anything is measured."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ldft.preflight.resolved import resolve
from ldft.training import model
from ldft.training.deepspeed import arena_hooks, engine, fused_step, layout, role_memory
from tests.conftest import compose
from tests.training.test_pretrained import process_group  # noqa: F401

ENGINES = {
    "stage 3": (("offload=full",), layout.STAGE_3 + layout.STAGE_3_PARAMETERS + layout.STAGE_3_OPTIMIZER),
    "stage 2": (("offload=optimizer",), layout.STAGE_1_AND_2 + layout.STAGE_1_AND_2_OPTIMIZER),
}


@contextmanager
def optimizer(*overrides: str) -> Iterator[Any]:
    """The optimizer of a live engine."""
    run = resolve(compose("model=nano", "launch.device=cpu", "train.precision=bf16", *overrides))
    arenas = role_memory.arenas_of(run, 0)
    network = model.build(run, torch.device("cpu"), arenas)
    built = engine.build(run, network, arenas)
    yield built.optimizer
    built.destroy()


def without(gone: str) -> Callable[[Any, str], Any]:
    """An object's lookup of attributes, as if `gone` had been renamed."""

    def look_up(self: Any, name: str) -> Any:
        if name == gone:
            raise AttributeError(name)
        return object.__getattribute__(self, name)

    return look_up


def test_this_deepspeed_is_known_and_each_name_that_is_renamed_is_told(
    process_group: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for overrides, names in ENGINES.values():
        with optimizer(*overrides) as of:
            layout.require_known_layout(of)
            assert layout.names(of) == names
            for name in names:
                with monkeypatch.context() as patch, pytest.raises(layout.UnknownLayoutError) as told:
                    patch.setattr(type(of), "__getattribute__", without(name), raising=False)
                    layout.require_known_layout(of)
                line = str(told.value)
                assert f"{type(of).__name__}.{name}, " in line and layout.TESTED in line and "\n" not in line


@pytest.mark.parametrize(
    ("stage", "names"),
    [
        (3, "STAGE_3"),
        (3, "STAGE_3_BUILDING"),
        (3, "STAGE_3_OF_PARAMETERS"),
        (2, "STAGE_1_AND_2"),
        (1, "STAGE_1_AND_2_OF_PARAMETERS"),
    ],
)
def test_a_name_that_deepspeeds_code_does_not_mention_is_told_before_a_model_is_built(
    monkeypatch: pytest.MonkeyPatch, stage: int, names: str
) -> None:
    layout.require_known_names(stage)
    monkeypatch.setattr(layout, names, (*getattr(layout, names), "name_of_another_release"))
    with pytest.raises(layout.UnknownLayoutError, match=r"\.name_of_another_release, .*upgrading_deepspeed\.md$"):
        layout.require_known_names(stage)
    layout.require_known_names(0)


def test_every_attribute_that_is_read_of_deepspeeds_optimizers_and_parameters_is_listed() -> None:
    listed = {name for key, names in vars(layout).items() if key.startswith("STAGE_") for name in names}
    listed |= {*arena_hooks.METHODS, *fused_step.NEEDED}
    # torch's, ldft's and CPUAdam's own optimizers; and what a fallback follows.
    others = {"state", "moments", "fp32_optimizer_states", "device", "grad"} | {
        "__class__",
        "updates",
        "_tasks",
        "_parameters",
        "norm_groups",
    }
    found = set()
    for path in Path(layout.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            if isinstance(node.value, ast.Name) and node.value.id == "optimizer":
                found.add(node.attr)
            if re.match("ds_|_hp_|partition_numel", node.attr):
                found.add(node.attr)
    assert len(found) > 20 and found - others <= listed


def test_the_document_of_upgrades_exists_and_names_the_file() -> None:
    text = (Path(__file__).parents[3] / "docs" / "upgrading_deepspeed.md").read_text()
    assert "ldft/training/deepspeed/layout.py" in text and layout.TESTED in text
