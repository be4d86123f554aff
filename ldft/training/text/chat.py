"""Conversations as token ids, through the tokenizer's own chat template and transformers' rendering of it.

Which tokens the assistant wrote is taken from the template's `{% generation %}` block or, without one, from what each of its turns
adds to the rendered conversation. Imports transformers, but not torch.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldft import files
from ldft.errors import ConfigError
from ldft.training.text import tokenizer_folder

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerFast

    from ldft.training.text.documents import Document

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_ASSISTANT = "assistant"
# What other formats call it. The turns of such a role would not be trained.
_OTHER_NAMES = ("ai", "assistant", "bot", "chatbot", "chatgpt", "gpt", "model")
# Far above any length: transformers warns of texts longer than the model's.
_NO_LIMIT = 1 << 62


class ChatTemplate:
    """The tokenizer of a folder with its chat template."""

    def __init__(self, folder: str) -> None:
        """Raises ConfigError if the folder has no chat template. Its tokenizer.json was checked before."""
        from transformers import PreTrainedTokenizerFast

        self._folder = folder
        path = files.named(folder, "data.tokenizer")
        try:
            # False as to mistral: a tokenizer is used as it was saved, without a warning.
            self._tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
                path, local_files_only=True, model_max_length=_NO_LIMIT, fix_mistral_regex=False, **_described(path)
            )
            if not isinstance(self._tokenizer.get_chat_template(), str):
                raise TypeError("chat_template is no text")
        # What transformers raises for settings that it does not understand.
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            text = "no chat template" if "chat_template is not set" in str(error) else _one_line(error)
            raise ConfigError(
                "data.tokenizer",
                f"{folder} cannot render conversations ({text}); add chat_template.jinja, or use an instruct model's tokenizer",
            ) from None

    def encode(self, document: Document, *, only_assistant: bool) -> tuple[list[int], list[bool] | None]:
        """The ids of a conversation, and for each whether the assistant wrote it; None unless that is asked.

        Raises ConfigError if the template refuses the conversation or hides where the assistant's turns begin or end.
        """
        marked = only_assistant and self._marks(document)
        text, spans = self._render(document, document.content, spans=marked)
        if only_assistant:
            spans = _checked(document, spans) if marked else self._turns(document, text)
        encoding = self._tokenizer(text, add_special_tokens=False)[0]
        return encoding.ids, _within(encoding, spans) if only_assistant else None

    def _template(self, document: Document) -> str:
        return str(self._tokenizer.get_chat_template(tools=document.tools))

    def _marks(self, document: Document) -> bool:
        return bool(_GENERATION.search(self._template(document)))

    def _render(
        self, document: Document, messages: list[dict[str, Any]], *, prompt: bool = False, spans: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of messages, and the (start, end) of the parts in generation blocks, if they are asked for."""
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, found = render_jinja_template(
                conversations=[messages],
                tools=document.tools,
                chat_template=self._template(document),
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=spans,
                **self._tokenizer.special_tokens_map,
            )
            texts[0].encode()  # tokenizers cannot read half a surrogate pair
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                "data.tokenizer",
                f"{self._folder}: its chat template is broken in line {error.lineno} ({error.message}); mend it",
            ) from None
        # The template is a program of the tokenizer's: on data that it does not expect it may raise any of these.
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
            MemoryError,
        ) as error:
            raise ConfigError(
                "data.path",
                f"{document.place}, is refused by the chat template ({_one_line(error)}); change the conversation or the template",
            ) from None
        return texts[0], found[0] if spans else []

    def _turns(self, document: Document, whole: str) -> list[tuple[int, int]]:
        """The (start, end) in the rendered conversation of what each turn of the assistant adds to the messages before it, without
        the prompt that the template would write for it."""
        messages, spans = document.content, []
        for number, message in enumerate(messages):
            _check_role(document, number)
            if message["role"] != _ASSISTANT or not _weight(document, number):
                continue
            before = prompted = after = whole
            try:
                before = self._render(document, messages[:number])[0]
                prompted = self._render(document, messages[:number], prompt=True)[0]
            except ConfigError:
                if number:
                    raise  # else the template refuses to begin without a message
            if number < len(messages) - 1:
                after = self._render(document, messages[: number + 1])[0]
            start = _shared(prompted, whole)
            end = _end_of_turn(whole, start, after, message.get("content", ""), self._tokenizer.eos_token)
            # Without a message before it, only a prompt shows where the turn begins.
            hidden = not number and not (whole.startswith(prompted) and before != prompted)
            if hidden or end is None or not whole.startswith((before, prompted)):
                raise ConfigError(
                    "data.loss",
                    f"assistant: {document.place}, message {number + 1}: the chat template does not show where the turn begins and "
                    "ends; add {% generation %} to the template, or use data.loss=all",
                )
            spans.append((start, end))
        return spans


def _check_role(document: Document, number: int) -> None:
    """Raise ConfigError for a message of the assistant under another name."""
    role = document.content[number]["role"]
    if role != _ASSISTANT and role.strip().lower() in _OTHER_NAMES:
        raise ConfigError(
            "data.loss",
            f"assistant: {document.place}, message {number + 1}: its role is '{role}', and only turns of '{_ASSISTANT}' are "
            f"trained; rename it to {_ASSISTANT}, or use data.loss=all",
        )


def _weight(document: Document, number: int) -> int:
    """OpenAI's weight of a message: 0 for a turn that is not trained. Raises ConfigError for any other than 0 and 1."""
    weight = document.content[number].get("weight", 1)
    if weight not in (0, 1):
        raise ConfigError(
            "data.loss",
            f"assistant: {document.place}, message {number + 1}: weight {weight} is not possible; use 0 or 1",
        )
    return int(weight)


def _checked(document: Document, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans of generation blocks that are trained: one for each turn of the assistant, without those of weight 0."""
    turns = [n for n, message in enumerate(document.content) if message["role"].strip().lower() in _OTHER_NAMES]
    if len(spans) < len(turns):
        for number in turns:
            _check_role(document, number)
    weights = [_weight(document, number) for number in turns]
    if all(weights):
        return spans
    if len(spans) != len(turns):
        raise ConfigError(
            "data.loss",
            f"assistant: {document.place}: the chat template marks {len(spans)} parts for {len(turns)} turns, so weight 0 cannot "
            "be followed; leave such conversations out",
        )
    return [span for span, weight in zip(spans, weights, strict=True) if weight]


def _described(folder: Path) -> dict[str, str]:
    """The special tokens that tokenizer_config.json gives as objects without their type, which transformers refuses."""
    settings = tokenizer_folder.settings(folder)
    tokens = {name: token for name, token in settings.items() if name.endswith("_token") and isinstance(token, dict)}
    return {name: token["content"] for name, token in tokens.items() if "content" in token and "__type" not in token}


def _shared(first: str, second: str) -> int:
    """Number of characters with which both begin."""
    if second.startswith(first):
        return len(first)
    return next(index for index, (one, other) in enumerate(zip(first, second + "\0", strict=False)) if one != other)


def _end_of_turn(whole: str, start: int, after: str, content: str, eos: str | None) -> int | None:
    """Where the turn that begins at `start` ends. after: the messages up to it, rendered alone."""
    if eos and not whole.startswith(after):
        after = after.removesuffix(eos)  # some templates end what has no prompt with it (Phi 3)
    if whole.startswith(after):
        return len(after)
    # Some render a turn otherwise once others follow (Qwen 3 leaves the thinking out). Its answer and closing are the same.
    for answer in (content.strip(), content.rpartition("</think>")[2].strip()):
        at, alone = whole.find(answer, start), after.rfind(answer)
        end = at + len(answer)
        closing = after[alone + len(answer) :]
        if answer and at >= 0 and alone >= 0 and not whole[start:at].strip() and whole.startswith(closing, end):
            return end + len(closing)
    return None


def _within(encoding: Encoding, spans: list[tuple[int, int]]) -> list[bool]:
    """Whether each token lies in a span of characters. Tokens that the tokenizer gives no characters count with their
    neighbours."""
    inside = [False] * len(encoding.ids)
    first = 0
    for start, end in spans:
        touching = []
        for index in range(first, len(inside)):
            begins, ends = encoding.offsets[index]
            if begins >= end:
                break
            if ends > start and ends > begins:
                touching.append(index)
        if touching:
            first = touching[-1]
            inside[touching[0] : first + 1] = [True] * (first + 1 - touching[0])
    return inside


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
