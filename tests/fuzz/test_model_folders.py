"""Damaged weights and config.json: read, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from ldft.config import Config, ModelConfig
from ldft.errors import LdftError
from ldft.runner import checks
from ldft.training import checkpoint_faults, safetensors_index
from ldft.training.architecture import hf_config
from tests.conftest import compose
from tests.fuzz.damage import changed, damaged
from tests.training.test_published_configs import published

PUBLISHED = [
    "meta-llama/Llama-3.1-8B",
    "Qwen/Qwen3-30B-A3B",
    "google/gemma-3-1b-it",
    "microsoft/Phi-3-mini-128k-instruct",
]
INDEX = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("shards")
    save_file({"a": torch.zeros(3, 5), "c": torch.ones(2, dtype=torch.bfloat16)}, folder / "model-1.safetensors")
    save_file({"b": torch.ones(7)}, folder / "model-2.safetensors")
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@given(data=st.data())
def test_damaged_weights(data: st.DataObject, shards: dict[str, bytes], tmp_path: Path) -> None:
    for name, content in shards.items():
        (tmp_path / name).write_bytes(data.draw(damaged(content)) if data.draw(st.booleans()) else content)
    (tmp_path / "model.safetensors.index.json").write_bytes(
        data.draw(changed(INDEX)).encode(errors="surrogateescape")
        if data.draw(st.booleans())
        else json.dumps(INDEX).encode()
    )
    (tmp_path / "config.json").write_bytes(data.draw(changed(published(PUBLISHED[0]))).encode(errors="surrogateescape"))
    try:
        found = safetensors_index.index(safetensors_index.folder(ModelConfig(path=str(tmp_path)), fetch=False))
        checkpoint_faults.check(tmp_path, found)
    except LdftError as error:
        assert str(error) and "\n" not in str(error)


@pytest.mark.parametrize("name", PUBLISHED)
@given(data=st.data())
def test_a_damaged_config(name: str, data: st.DataObject, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(data.draw(changed(published(name))).encode(errors="surrogateescape"))
    config: Config = compose("model=from_hf", f"model.path={tmp_path}", "launch.device=cpu")
    try:
        checks.resolve(config)
        config.validate()
        hf_config(config.model)
    except LdftError as error:
        assert str(error) and "\n" not in str(error)
