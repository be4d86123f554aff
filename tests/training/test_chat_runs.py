"""The example of docs/data.md as a real run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "data.md"
TEMPLATE = """{% for m in messages %}{{ m.role + ' ' + m.content + ' </s> ' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"""


def test_the_documented_conversations_train_on_the_assistants_tokens(
    ldft, tmp_path: Path, word_tokenizer: Callable[..., Path]
) -> None:
    text = DOCUMENT.read_text()
    example = re.search(r"```json\n(.*?)```", text, re.DOTALL)
    command = re.search(r"    python -m ldft (.*data=chat.*)", text)
    assert example and command
    (tmp_path / "chat.jsonl").write_text(example[1] + '{"messages": []}\n{"messages": null}\n')
    folder = word_tokenizer("user assistant Is it so? It is. And now? Now is not.", end="</s>").rename(
        tmp_path / "tokenizer"
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    few = ("train.iterations=3", "train.warmup_iterations=1", "train.gradient_accumulation_steps=2")
    done = ldft(*shlex.split(command[1]), "launch.device=cpu", *few, base=())
    row = done.row
    assert done.exit_code == 0 and row.status == "ok", done.stdout + done.stderr
    # Of 5 + 4 tokens of the first and 4 + 6 of the second conversation the assistant's are 3 and 5, in 19 tokens of each pass.
    stream = ("....." + ".xxx" + "...." + ".xxxxx") * 12
    sequences = [stream[n * 32 : (n + 1) * 32] for n in range(6)]
    assert list(row.loss_tokens) == [sum(one[1:].count("x") for one in sequences[n : n + 2]) for n in (0, 2, 4)]
    assert row.tokens_per_iteration == 64 and row.init_data_s > 0
    assert (row.documents_read, row.documents_skipped, row.sequences_skipped) == (4, 2, 0)
    assert "note: data.path: 2 of 4 documents left out: null or empty" in done.stdout
    assert row["cfg.data.loss"] == "assistant" and row.loss[0] > row.loss[-1]
