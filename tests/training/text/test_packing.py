"""Packing: documents end to end, empty ones left out and counted, sequences without a trained token left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ldft.errors import ConfigError
from ldft.training.text import check, packing, utf8
from tests.training.text.conftest import WORDS, config_of, refusal, write_jsonl


def pack(path: Path, tokenizer: Path, sequences: int, length: int) -> packing.Packed:
    return packing.pack(packing.Source.of(config_of(path, tokenizer)), sequences, length)


def test_nulls_and_empty_documents_are_left_out_and_counted_alike(tmp_path: Path, words: Path) -> None:
    texts = ["a b", None, "", "c"]
    write_jsonl(tmp_path / "x.jsonl", [{"text": text} for text in texts])
    pq.write_table(pa.table({"text": texts}), tmp_path / "x.parquet")
    for name in ("x.jsonl", "x.parquet"):
        packed = pack(tmp_path / name, words, 2, 5)
        assert packed.tokens.tolist() == [[0, 1, 10, 2, 10]] * 2
        assert (packed.documents_read, packed.documents_skipped, packed.sequences_skipped) == (4, 2, 0)
        assert packed.trained is None


def test_reading_ends_where_the_run_has_its_tokens(tmp_path: Path, words: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a b"}\n{"text": "c d"}\nno json\n')
    assert pack(path, words, 1, 6).documents_read == 2
    with pytest.raises(ConfigError, match=r"x\.jsonl, line 3, is not JSON"):
        pack(path, words, 1, 7)
    assert "line 3" in refusal(path, words)  # which is among the first that the parent reads


def test_parts_of_a_text_are_one_document(tmp_path: Path, words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.txt").write_text("".join(f"{word}\n" for word in WORDS.split() * 50))
    whole = pack(tmp_path / "x.txt", words, 1, 510)
    assert whole.tokens[0].tolist() == [*list(range(10)) * 50, 10, *range(9)]
    packing.pack.cache_clear()
    monkeypatch.setattr(utf8, "_PIECE_CHARACTERS", 7)
    parts = pack(tmp_path / "x.txt", words, 1, 510)
    assert np.array_equal(parts.tokens, whole.tokens) and parts.documents_read == 1


def test_a_short_file_is_read_again_without_a_seam(tmp_path: Path, words: Path) -> None:
    for text, length in (("a", 7), ("a b c", 2), (WORDS, 5), (WORDS, 64)):
        write_jsonl(tmp_path / "x.jsonl", [{"text": text}])
        packing.pack.cache_clear()
        once = [*range(len(text.split())), 10]
        assert pack(tmp_path / "x.jsonl", words, 9, length).tokens.tolist() == np.resize(once, (9, length)).tolist()


def test_a_text_without_tokens_is_refused(tmp_path: Path, word_tokenizer: Callable[..., Path]) -> None:
    (tmp_path / "blank.txt").write_text("  \n")
    with pytest.raises(ConfigError, match=r"data.path: .*blank.txt' gives no tokens"):
        pack(tmp_path / "blank.txt", word_tokenizer("a b"), 1, 4)


def sequences(marks: str, length: int, count: int) -> tuple[list[int], int]:
    """The first ids of the sequences that are kept, and how many were not, if a file had a token for each mark, x if trained."""
    made = packing._Sequences(count, length, all_trained=False)
    ids, trained = np.arange(len(marks)), np.array([mark == "x" for mark in marks])
    source = packing.Source(Path("F"), "messages", "", 99, True, True)
    made.add(ids, trained)
    if not made.full:
        packing._read_again(made, ids, trained, source)
    return made.tokens[:, 0].tolist(), made.skipped


def test_sequences_without_a_token_to_train_on_are_left_out() -> None:
    assert sequences(".x..x....x..", 4, 2) == ([0, 8], 1)  # in the second the first token alone is trained
    # Ten tokens in fours: the second pass begins in the middle of a sequence.
    assert sequences("......x...", 4, 2) == ([4, 4], 5)
    assert sequences("x", 4, 2) == ([0, 0], 0)


@pytest.mark.parametrize("marks", ["........", "x...x...", "...", ""])
def test_a_file_without_any_is_refused(marks: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.(loss: assistant: 'F' gives no sequence|path: 'F' gives no tokens)"):
        sequences(marks, 4, 1)


def test_documents_without_an_end_token_are_noted(tmp_path: Path, word_tokenizer: Callable[..., Path]) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "a"}])
    (note,) = check.check(config_of(path, word_tokenizer("a b")))
    assert note.startswith("data.tokenizer: no eos_token in the files of")
    assert check.check(config_of(path, word_tokenizer("a b", end="</s>"))) == []
