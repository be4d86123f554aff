"""Conversations: the ids of transformers' apply_chat_template, and the assistant's tokens as it masks them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ldft.config import Config
from ldft.errors import ConfigError
from ldft.training.text import documents, packing
from tests.training.text.conftest import config_of, refusal, write_jsonl

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<think>", "</think>"]
# A conversation in the form of ChatML, with the assistant's turn (G begins and E ends it) marked or not.
CHATML = """{{- bos_token }}{% for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}G{{ m.content }}{{- '<|im_end|>\\n' }}E
{%- else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
MARKED = CHATML.replace("G", "{% generation %}").replace("E\n", "{% endgeneration %}\n")
# Its blocks begin and end within words.
WITHIN = """{% for m in messages %}{% if m.role == 'assistant' %}
{{- 'Y' }}{% generation %}{{ 'es? It i' }}{% endgeneration %}{{ 's.' }}
{%- else %}{{ m.content }}{% endif %}{% endfor %}"""
PLAIN = CHATML.replace("G", "").replace("E\n", "\n")
# Ends what has no prompt with the end token, as Phi 3 does.
PHI = """{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""
# Shows thinking in the last turn alone, empty if there is none, as Qwen 3 does.
QWEN = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% set parts = m.content.split('</think>\\n\\n') %}
{%- if m.role == 'assistant' and loop.last %}
{{- (parts[0] if parts | length > 1 else '<think>\\n\\n') + '</think>\\n\\n' }}{% endif %}
{{- parts[-1] + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# Prompts for thinking that it then leaves out, as DeepSeek R1 does.
R1 = """{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}
{%- if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"""

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is it so?\n"},
    {"role": "assistant", "content": "Yes \N{GRINNING FACE}"},
    {"role": "user", "content": "Yes?"},
    {"role": "assistant", "content": "It is, caf\N{LATIN SMALL LETTER E WITH ACUTE} and all."},
]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    """A byte-level BPE as most models have, its offsets without the leading space."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = [message["content"] for message in TALK] * 3 + ["user assistant system\n"]
    made.train_from_iterator(words, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    made.add_special_tokens(SPECIAL)
    return made


@pytest.fixture
def folder(trained: Tokenizer, tmp_path: Path) -> Callable[..., Path]:
    """Save the tokenizer with a chat template."""

    def save(template: str | None) -> Path:
        whole = PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<s>", eos_token="</s>")
        whole.chat_template = template
        whole.save_pretrained(tmp_path / "tokenizer")
        return tmp_path / "tokenizer"

    return save


def config(path: Path, tokenizer: Path, loss: str = "all", **others: Any) -> Config:
    made = config_of(path, tokenizer, "chat", loss=loss, **others)
    made.model.vocab_size = 512
    return made


def encode(path: Path, tokenizer: Path, loss: str = "all", **others: Any) -> list[tuple[list[int], list[bool] | None]]:
    source = packing.Source.of(config(path, tokenizer, loss, **others))
    encoder, _ = packing.encoder(source)
    return [encoder(document) for document in documents.read(source.path, source.column, chat=True)]


def text_of(ids: list[int], kept: list[bool] | None, tokenizer: Path) -> str:
    assert kept is not None and len(kept) == len(ids)
    whole: Tokenizer = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    return whole.decode([number for number, keep in zip(ids, kept, strict=True) if keep], skip_special_tokens=False)


@pytest.mark.parametrize("template", [MARKED, PLAIN, PHI, QWEN, R1], ids=["marked", "plain", "phi", "qwen", "r1"])
def test_ids_are_those_of_apply_chat_template(template: str, folder: Callable[..., Path], tmp_path: Path) -> None:
    tokenizer = folder(template)
    reference = AutoTokenizer.from_pretrained(tokenizer)
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": TALK}, {"messages": TALK[1:3]}, {"messages": TALK[:1]}])
    for (ids, kept), talk in zip(encode(path, tokenizer), (TALK, TALK[1:3], TALK[:1]), strict=True):
        assert ids == reference.apply_chat_template(talk, return_dict=False) and kept is None


@pytest.mark.parametrize("template", [MARKED, WITHIN], ids=["marked", "within"])
def test_the_mask_is_that_of_transformers_where_the_template_marks_turns(
    template: str, folder: Callable[..., Path], tmp_path: Path
) -> None:
    tokenizer = folder(template)
    reference = AutoTokenizer.from_pretrained(tokenizer)
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": TALK}, {"messages": TALK[:2]}])
    found = encode(path, tokenizer, "assistant")
    for (ids, kept), talk in zip(found, (TALK, TALK[:2]), strict=True):
        masked = reference.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
        assert ids == masked["input_ids"] and kept == [bool(one) for one in masked["assistant_masks"]]
    answers = [f"{TALK[n]['content']}<|im_end|>\n" for n in (2, 4)] if template == MARKED else ["Yes? It is"] * 2
    assert text_of(*found[0], tokenizer) == "".join(answers) and not any(found[1][1] or [])


@pytest.mark.parametrize(
    ("template", "before", "closing", "last"),
    [
        (PLAIN, "", "<|im_end|>\n", "<|im_end|>\n"),
        (PHI, "", "<|im_end|>\n", "<|im_end|>\n</s>"),
        (QWEN, "<think>\n\n</think>\n\n", "<|im_end|>\n", "<|im_end|>\n"),
        (R1, "", "</s>", "</s>"),
    ],
    ids=["plain", "phi", "qwen", "r1"],
)
def test_without_marks_the_turns_are_what_they_add(
    template: str, before: str, closing: str, last: str, folder: Callable[..., Path], tmp_path: Path
) -> None:
    tokenizer = folder(template)
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": TALK}])
    ((ids, kept),) = encode(path, tokenizer, "assistant")
    assert text_of(ids, kept, tokenizer) == f"{TALK[2]['content']}{closing}{before}{TALK[4]['content']}{last}"


def test_thinking_that_the_template_leaves_out_of_earlier_turns_is_not_looked_for(
    folder: Callable[..., Path], tmp_path: Path
) -> None:
    tokenizer = folder(QWEN)
    answers = ["<think>\nOne.\n</think>\n\nYes.", "<think>\nTwo.\n</think>\n\nNo."]
    talk = [
        TALK[1],
        {"role": "assistant", "content": answers[0]},
        TALK[3],
        {"role": "assistant", "content": answers[1]},
    ]
    ((ids, kept),) = encode(write_jsonl(tmp_path / "x.jsonl", [{"messages": talk}]), tokenizer, "assistant")
    assert text_of(ids, kept, tokenizer) == f"Yes.<|im_end|>\n{answers[1]}<|im_end|>\n"


def test_parquet_gives_what_jsonl_does(folder: Callable[..., Path], tmp_path: Path) -> None:
    """Structs have every key of every message: null where JSON has none."""
    template = "{% for m in messages %}{{ m | tojson(sort_keys=true) }}{% endfor %}"
    tokenizer = folder(template + "{{ tools | tojson if tools else 'no tools' }}")
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": "b"}}]
    rows: list[dict[str, Any]] = [
        {"messages": [TALK[1], {"role": "assistant", "calls": calls}], "tools": [{"type": "function"}]},
        {"messages": [TALK[1], TALK[2]], "tools": None},
        {"messages": []},
        {"messages": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    jsonl = write_jsonl(tmp_path / "x.jsonl", rows)
    packed = [
        packing.pack(packing.Source.of(config(path, tokenizer)), 1, 300) for path in (tmp_path / "x.parquet", jsonl)
    ]
    assert packed[0].tokens.tolist() == packed[1].tokens.tolist()
    text = text_of(list(packed[0].tokens[0]), [True] * 300, tokenizer)
    assert json.dumps(calls, sort_keys=True) in text and "no tools" in text and "null" not in text
    assert packed[0].documents_skipped == packed[1].documents_skipped == 2
    # Tools as the text of a list, which spares parquet from unifying them.
    (spelled,) = documents.read(
        write_jsonl(tmp_path / "y.jsonl", [{"messages": TALK, "tools": '[{"type": "f"}]'}]), "messages", chat=True
    )
    assert spelled.tools == [{"type": "f"}]


@pytest.mark.parametrize(
    ("messages", "says"),
    {
        '"hello"': 'has a string as "messages", not a list of messages; data=text trains on text',
        '{"role": "user"}': 'has an object as "messages", not a list',
        '["hello"]': "message 1 of 1, is a string; write an object with role and content",
        '[{"role": "user"}]': "message 1 of 1, has no content; every message needs role and content",
        '[{"content": "a"}]': "message 1 of 1, has no role",
        '[{"role": null, "content": "a"}]': "message 1 of 1, has no role",
        '[{"from": "human", "value": "a"}]': "has from and value (ShareGPT); rename them to role and content",
        '[{"role": "user", "content": [{"type": "text", "text": "a"}]}]': "has a list as content, not text",
        '[{"role": "user", "content": 5}]': "has a number as content, not text",
        '[{"role": 1, "content": "a"}]': "has a number as role, not text",
        r'[{"role": "user", "content": "\udc00"}]': r"holds \udc00, half of a surrogate pair",
        '[{"role": "user", "content": "a"}], "tools": "{"': 'has "tools" that are not JSON',
        '[{"role": "user", "content": "a"}], "tools": ["f"]': 'has "tools" that are no list of objects',
    }.items(),
)
def test_a_wrong_conversation_is_refused_with_its_line(
    messages: str, says: str, folder: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "x.jsonl").write_text(f'{{"messages": {messages}}}\n')
    made = config(tmp_path / "x.jsonl", folder(PLAIN))
    with pytest.raises(ConfigError) as raised:
        encode(tmp_path / "x.jsonl", Path(made.data.tokenizer))
    assert f"{tmp_path}/x.jsonl, line 1, " in str(raised.value) and says in str(raised.value)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "data.tokenizer: F cannot render conversations (no chat template); add chat_template.jinja"),
        ("{% if %}", "data.tokenizer: F: its chat template is broken in line 1 ("),
        ("{{ raise_exception('system\nfirst') }}", "line 1, is refused by the chat template (system first)"),
        ("{{ nothing.at.all }}", "is refused by the chat template ('nothing' is undefined)"),
        ("{{ 'a' + 5 }}", "is refused by the chat template (can only concatenate str"),
        ("{{ '\\ud800' }}", "is refused by the chat template ('utf-8' codec can't encode character"),
        ("{{ 'a' * 10**18 }}", "is refused by the chat template (MemoryError)"),
        ("{{ 1 / 0 }}", "is refused by the chat template (division by zero)"),
    ],
    ids=str,
)
def test_a_template_that_fails_is_one_line(
    template: str | None, says: str, folder: Callable[..., Path], tmp_path: Path
) -> None:
    tokenizer = folder(template)
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": TALK}])
    with pytest.raises(ConfigError) as raised:
        encode(path, tokenizer)
    line = str(raised.value)
    assert says.replace("F", str(tokenizer)) in line and "\n" not in line


@pytest.mark.parametrize("talk", [TALK, TALK[1:3], TALK[2:4]], ids=["several turns", "one turn", "no prompt"])
def test_turns_that_cannot_be_told_apart_are_refused(
    talk: list[dict[str, str]], folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Every message depends on the number of messages; or the assistant speaks first in a template that needs a message."""
    tokenizer = folder(
        f"{{{{ messages[0].role }}}}{PLAIN}"
        if talk[0]["role"] == "assistant"
        else "{% for m in messages %}{{ messages | length ~ m.content }}{% endfor %}"
    )
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": talk}])
    number = 1 + [message["role"] for message in talk].index("assistant")
    with pytest.raises(ConfigError) as raised:
        encode(path, tokenizer, "assistant")
    assert str(raised.value).startswith(
        f"data.loss: assistant: {path}, line 1, message {number}: the chat template does not show where the turn begins and ends"
    )


def test_the_template_is_found_where_transformers_finds_it(folder: Callable[..., Path], tmp_path: Path) -> None:
    tokenizer = folder(PLAIN)
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": TALK, "tools": [{"type": "function"}]}])
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (tokenizer / "chat_template.jinja").unlink(missing_ok=True)
    named = [{"name": "default", "template": "default"}, {"name": "tool_use", "template": "tools"}]
    for template, text in (("one", "one"), (named, "tools")):
        (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
        ((ids, _),) = encode(path, tokenizer)
        assert text_of(ids, [True] * len(ids), tokenizer) == text
    # The form in which older files give special tokens.
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": {"content": "</s>"}}))
    (tokenizer / "chat_template.jinja").write_text("file{{ eos_token }}")
    ((ids, _),) = encode(path, tokenizer)
    assert text_of(ids, [True] * len(ids), tokenizer) == "file</s>"


def test_suffix_column_and_loss_are_checked(folder: Callable[..., Path], tmp_path: Path, words: Path) -> None:
    tokenizer = folder(PLAIN)
    (tmp_path / "x.txt").write_text("a")
    assert "x.txt' holds no conversations; name a .jsonl, .parquet" in refusal(tmp_path / "x.txt", tokenizer, "chat")
    path = write_jsonl(tmp_path / "x.jsonl", [{"talk": TALK}])
    with pytest.raises(ConfigError, match=r'line 1, has no "messages" \(it has talk\); use data\.column'):
        encode(path, tokenizer)
    assert len(encode(path, tokenizer, column="talk")) == 1
    with pytest.raises(ConfigError, match=r"data\.loss: assistant: data=text has no assistant; use data=chat"):
        config_of(path, words, "text", loss="assistant").data.validate()
    pq.write_table(pa.table({"messages": ["a"], "talk": [TALK]}), tmp_path / "x.parquet")
    made = config(tmp_path / "x.parquet", tokenizer)
    with pytest.raises(ConfigError, match=r"messages of .* holds string, not lists of .*; use data\.column=talk"):
        encode(tmp_path / "x.parquet", Path(made.data.tokenizer))


def test_a_template_that_is_no_text_is_refused(folder: Callable[..., Path], tmp_path: Path) -> None:
    tokenizer = folder(None)
    file = tokenizer / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": 5}))
    with pytest.raises(
        ConfigError, match=r"cannot render conversations \(chat_template is no text\); add chat_template.jinja"
    ):
        encode(write_jsonl(tmp_path / "x.jsonl", [{"messages": TALK}]), tokenizer)
