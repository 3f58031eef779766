"""Batches of token ids from text files, for models of transformers: in another order in each epoch, in nearly equal lengths.

A tokenizer that pads makes a sample of each paragraph, and sorts some thousand of them by length before it cuts batches, so that there is
little padding. One that does not, like GPT-2's, gets all text in one piece, which is cut into samples of the same length.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from normswap.errors import LoadError, UsageError, first_line

ENDINGS = (".txt", ".md")
WINDOW = 4096  # paragraphs that are sorted by length together
_EMPTY_LINE = re.compile(r"\n\s*\n")
TOKENS = 1024  # of a batch: as many steps as pay
HELD_OUT = 128  # samples


def files_below(path: Path, endings: Collection[str]) -> list[Path]:
    """The file, or those in a directory and below it, by name, whose names end so."""
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [p for p in found if p.suffix.lower() in endings and p.is_file()]


def text_files(path: Path) -> list[Path]:
    """The text file, or those in a directory and below it, by name."""
    return files_below(path, ENDINGS)


def tokenizer_of(directory: str) -> Any:
    """The tokenizer that transformers saved in a directory."""
    hint = "give the directory that tokenizer.save_pretrained(DIRECTORY) wrote: --tokenizer DIRECTORY"
    try:
        import transformers
    except ImportError as error:
        raise UsageError("data that are text need transformers", hint="pip install transformers") from error
    if not Path(directory).is_dir():
        raise UsageError(f"{directory} is not a directory with a tokenizer", hint=hint)
    try:
        return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers raises anything
        raise LoadError(f"{directory} has no tokenizer that transformers can read: {first_line(error)}", hint=hint) from error


def paragraphs_of(files: Iterable[Path]) -> Iterator[str]:
    """What empty lines part in text files, each with single spaces."""
    for file in files:
        text = file.read_text(encoding="utf-8-sig", errors="replace")
        if "\0" in text:
            raise UsageError(
                f"{file} is no text in UTF-8: it holds zero bytes", hint=f"iconv -f UTF-16 -t UTF-8 {file.name}, or leave it out"
            )
        for part in _EMPTY_LINE.split(text):
            if part.strip():
                yield " ".join(part.split())


class Texts:
    """The samples of some text files, again and again. `held_out` has some that `__iter__` does not.

    paragraphs: as `paragraphs_of` reads them. length: tokens of a sample at most. held_out: samples; at most a tenth of all.
    """

    def __init__(self, paragraphs: Iterable[str], tokenizer: Any, *, length: int = 128, held_out: int = HELD_OUT) -> None:
        self.tokenizer, self.length, self.epoch = tokenizer, length, 0
        texts = list(dict.fromkeys(paragraphs))
        random.Random(0).shuffle(texts)
        self.pads = tokenizer.pad_token_id is not None
        samples = texts if self.pads else self._pieces(texts)
        aside = min(held_out, len(samples) // 10)
        if aside < min(held_out, 1):
            raise UsageError(
                f"the text makes {len(samples)} different samples; expected at least 10",
                hint="give more text; empty lines part the samples",
            )
        self._held_out, self._samples = samples[:aside], samples[aside:]

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next `__iter__`, as PyTorch's samplers have it."""
        self.epoch = epoch

    @property
    def held_out(self) -> list[dict[str, Any]]:
        return list(self._batches(self._held_out))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        order = random.Random(self.epoch)
        samples = order.sample(self._samples, len(self._samples))
        for window in _parts(samples, WINDOW):
            batches = list(self._batches(window))
            order.shuffle(batches)
            yield from batches

    def _batches(self, samples: Sequence[Any]) -> Iterator[dict[str, Any]]:
        """The samples in batches of at most TOKENS positions, the short ones first."""
        if not self.pads:
            for part in _parts(samples, max(1, TOKENS // self.length)):
                yield dict(self.tokenizer.pad({"input_ids": part}, padding=False, return_tensors="pt"))
            return
        rows = self.tokenizer(list(samples), truncation=True, max_length=self.length)
        names = list(rows)
        batch: list[int] = []
        for number in sorted(range(len(samples)), key=lambda i: len(rows["input_ids"][i])):
            if batch and len(rows["input_ids"][number]) * (len(batch) + 1) > TOKENS:
                yield dict(self.tokenizer.pad({name: [rows[name][i] for i in batch] for name in names}, return_tensors="pt"))
                batch = []
            batch.append(number)
        if batch:
            yield dict(self.tokenizer.pad({name: [rows[name][i] for i in batch] for name in names}, return_tensors="pt"))

    def _pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """All text in one piece, cut into samples of `length` tokens."""
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        ids = list(itertools.chain.from_iterable([*row, *end] for row in self.tokenizer(list(texts))["input_ids"]))
        return [ids[i : i + self.length] for i in range(0, len(ids) - self.length + 1, self.length)]


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
