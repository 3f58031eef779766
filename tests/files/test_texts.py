"""Batches of token ids from text: nearly equal lengths, another order in each epoch, and samples that are held out."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
import transformers

from normswap.errors import LoadError, UsageError
from normswap.files.texts import TOKENS, Texts, paragraphs_of, text_files, tokenizer_of

WORDS = [f"w{i}" for i in range(200)]


def _tokenizer(*, pads: bool) -> transformers.PreTrainedTokenizerFast:
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]"} if pads else {"eos_token": "[EOS]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", model_max_length=512, **special)


def _paragraphs(count: int) -> list[str]:
    """Each begins with a word of its own pair, and has 3 to 60 words."""
    return [
        " ".join([WORDS[i % 200], WORDS[i // 200], *[WORDS[(i * 7 + k) % 200] for k in range(1 + (i * 13) % 58)]]) for i in range(count)
    ]


def _rows(batches: list[dict]) -> list[tuple[int, ...]]:  # type: ignore[type-arg]
    return [tuple(ids[mask == 1].tolist()) for b in batches for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)]


def test_every_paragraph_is_a_sample_once_and_there_is_little_padding() -> None:
    texts = Texts(_paragraphs(1500), _tokenizer(pads=True), length=32, held_out=50)
    batches, held_out = list(texts), texts.held_out
    rows, aside = _rows(batches), _rows(held_out)
    assert len(rows) == len(set(rows)) == 1450
    assert len(aside) == 50
    assert not set(rows) & set(aside)
    assert max(map(len, rows)) == 32
    assert all(batch["input_ids"].numel() <= TOKENS for batch in batches)
    assert sum(map(len, rows)) > 0.95 * sum(batch["input_ids"].numel() for batch in batches)


def test_the_order_is_that_of_the_epoch() -> None:
    texts = Texts(_paragraphs(400), _tokenizer(pads=True), length=32)
    first = _rows(list(texts))
    assert _rows(list(texts)) == first
    texts.set_epoch(1)
    second = _rows(list(texts))
    assert second != first
    assert sorted(second) == sorted(first)
    assert _rows(list(Texts(_paragraphs(400), _tokenizer(pads=True), length=32))) == first


def test_without_a_padding_token_all_text_is_cut_into_pieces_of_one_length() -> None:
    texts = Texts(_paragraphs(300), _tokenizer(pads=False), length=24)
    batches = [*texts, *texts.held_out]
    assert {batch["input_ids"].shape[1] for batch in batches} == {24}
    assert all(bool((batch.get("attention_mask", batch["input_ids"] * 0 + 1) == 1).all()) for batch in batches)
    words = sum(len(text.split()) + 1 for text in _paragraphs(300))  # and the end of each text
    assert sum(batch["input_ids"].numel() for batch in batches) == words // 24 * 24


def test_paragraphs_are_what_empty_lines_part(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.txt").write_text("w1 w2\nw3\n\n\n  \n\nw4   w5\n")
    (tmp_path / "a.md").write_bytes(b"w6 \xff\n\nw7")
    (tmp_path / "b" / "windows.TXT").write_bytes(b"\xef\xbb\xbfw8\r\n \t\r\nw9\r\n")
    (tmp_path / "c.py").write_text("w10")
    files = text_files(tmp_path)
    assert [file.name for file in files] == ["a.md", "one.txt", "windows.TXT"]
    assert list(paragraphs_of(files)) == ["w6 \N{REPLACEMENT CHARACTER}", "w7", "w1 w2 w3", "w4 w5", "w8", "w9"]
    assert text_files(tmp_path / "c.py") == []


def test_what_is_no_text_in_utf_8_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("w1\n\nw2", encoding="utf-16")
    with pytest.raises(UsageError, match=r"a\.txt is no text in UTF-8: it holds zero bytes"):
        list(paragraphs_of([tmp_path / "a.txt"]))


def test_too_little_text_and_no_tokenizer_are_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the text makes 9 different samples; expected at least 10"):
        Texts(_paragraphs(9), _tokenizer(pads=True))
    assert len(_rows(list(Texts(_paragraphs(9), _tokenizer(pads=True), held_out=0)))) == 9
    with pytest.raises(UsageError, match="missing is not a directory with a tokenizer") as error:
        tokenizer_of(str(tmp_path / "missing"))
    assert "--tokenizer DIRECTORY" in str(error.value.hint)
    with pytest.raises(LoadError, match="has no tokenizer that transformers can read"):
        tokenizer_of(str(tmp_path))
    _tokenizer(pads=True).save_pretrained(tmp_path)
    assert tokenizer_of(str(tmp_path)).pad_token_id == 0
