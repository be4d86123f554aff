"""data.loss=assistant: whose turns are trained, and one line where a conversation names the assistant otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ldft.errors import ConfigError
from ldft.training.text import check
from tests.training.text.conftest import write_jsonl
from tests.training.text.test_chat import MARKED, PLAIN, TALK, config, encode, folder, text_of, trained

__all__ = ["folder", "trained"]  # fixtures
USER, ANSWER = TALK[1], TALK[2]


def notes(path: Path, tokenizer: Path, loss: str) -> list[str]:
    return check.check(config(path, tokenizer, loss))


def refusal(rows: list[Any], tokenizer: Path, tmp_path: Path) -> str:
    """The line with which the parent refuses these conversations."""
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": row} for row in rows])
    with pytest.raises(ConfigError) as raised:
        notes(path, tokenizer, "assistant")
    return str(raised.value)


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
@pytest.mark.parametrize("role", ["gpt", "Assistant", "model"])
def test_the_assistant_under_another_name_is_refused(
    role: str, template: str, folder: Callable[..., Path], tmp_path: Path
) -> None:
    tokenizer, other = folder(template), {"role": role, "content": "Yes."}
    for talk in ([USER, other], [USER, ANSWER, USER, other]):
        said = refusal([talk], tokenizer, tmp_path)
        assert (
            f"line 1, message {len(talk)}: its role is '{role}', and only turns of 'assistant' are trained; rename"
            in said
        )
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": talk}])
    assert notes(path, tokenizer, "all") == []


def test_a_file_without_the_assistant_names_its_roles(folder: Callable[..., Path], tmp_path: Path) -> None:
    talk = [USER, {"role": "narrator", "content": "So it is."}]
    said = refusal([talk] * 300, folder(PLAIN), tmp_path)
    assert said.startswith("data.loss: assistant: '") and "only the roles 'user', 'narrator'; rename the one" in said
    # One far down is found.
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": one} for one in [talk] * 300 + [[USER, ANSWER]]])
    assert notes(path, folder(PLAIN), "assistant") == []


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
def test_a_turn_of_weight_0_is_not_trained(template: str, folder: Callable[..., Path], tmp_path: Path) -> None:
    tokenizer = folder(template)
    talk = [USER, ANSWER | {"weight": 0}, USER, TALK[4] | {"weight": 1}]
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": talk}])
    ((ids, kept),) = encode(path, tokenizer, "assistant")
    assert text_of(ids, kept, tokenizer) == f"{TALK[4]['content']}<|im_end|>\n"
    assert notes(path, tokenizer, "assistant") == []
    assert notes(path, tokenizer, "all") == [
        "data.loss=all: messages of weight 0 are trained like all others; data.loss=assistant follows their weight"
    ]
    said = refusal([[USER, ANSWER | {"weight": 0.5}]], tokenizer, tmp_path)
    assert "message 2: weight 0.5 is not possible; use 0 or 1" in said


def test_a_conversation_may_begin_with_the_assistant(folder: Callable[..., Path], tmp_path: Path) -> None:
    tokenizer = folder(PLAIN)
    ((ids, kept),) = encode(write_jsonl(tmp_path / "x.jsonl", [{"messages": TALK[2:4]}]), tokenizer, "assistant")
    assert text_of(ids, kept, tokenizer) == f"{ANSWER['content']}<|im_end|>\n"


def test_tools_without_end_are_refused(folder: Callable[..., Path], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": TALK, "tools": "[" * 100_000}])
    with pytest.raises(ConfigError, match='line 1, has "tools" that are nested too deeply; fix them'):
        encode(path, folder(PLAIN))
