"""The tables that commands print on a terminal, which break no word at any width.

Where all columns fit, a `Listing` is one table. Where they do not, the long texts (the reasons) go below it, each once; where that is still
too wide, each row is a paragraph of its own.
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from normswap.errors import shown
from normswap.report.words import by_text

REPEATED = "as above"


class Alarm(str):
    """A cell that says that something is wrong; it is shown in red."""


class Good(str):
    """A cell that says that something was measured and is right; it is shown in green."""


@dataclass(frozen=True)
class Listing:
    """Rows of texts under headers; the first column names what a row is about.

    numbers  the headers of the columns that are aligned to the right and not broken into lines
    below    the headers of the columns with long texts
    totals   rows that a line separates from the others
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: Collection[str] = ()
    below: Collection[str] = ()
    totals: tuple[tuple[str, ...], ...] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        columns = list(range(len(self.headers)))
        if _fits(self._natural(columns), width):
            yield self._table(columns, width)
            return
        columns = [column for column in columns if self.headers[column] not in self.below]
        if _fits(self._least(columns), width):
            yield self._table(columns, width)
        else:
            yield from self._paragraphs(columns, width)
        yield from self._texts(width)

    @property
    def row_count(self) -> int:
        return len(self.rows) + len(self.totals)

    def _cells(self, column: int) -> Iterator[str]:
        yield self.headers[column]
        if any(self._repeats(column, row, above) for above, row in zip(self.rows, self.rows[1:], strict=False)):
            yield REPEATED
        yield from (row[column] for row in (*self.rows, *self.totals))

    def _natural(self, columns: Sequence[int]) -> list[int]:
        return [max(len(_shown(cell)) for cell in self._cells(column)) for column in columns]

    def _least(self, columns: Sequence[int]) -> list[int]:
        """The width of the longest word of each column; of its longest cell, if it is one of numbers."""
        widths = self._natural(columns)
        words = [max((len(word) for cell in self._cells(column) for word in _shown(cell).split()), default=0) for column in columns]
        return [widths[i] if self.headers[column] in self.numbers else words[i] for i, column in enumerate(columns)]

    def _table(self, columns: Sequence[int], width: int) -> Table:
        widths, least = self._natural(columns), self._least(columns)
        while not _fits(widths, width):
            widest = max((i for i in range(len(widths)) if widths[i] > least[i]), key=widths.__getitem__)
            widths[widest] -= 1
        found = Table(box=box.SIMPLE_HEAD)
        for column, each in zip(columns, widths, strict=True):
            found.add_column(self.headers[column], justify="right" if self.headers[column] in self.numbers else "left", width=each)
        above: Sequence[str] = ()
        for row in self.rows:
            cells = [REPEATED if self._repeats(column, row, above) else row[column] for column in columns]
            found.add_row(*map(_styled, cells))
            above = row
        for number, row in enumerate(self.totals):
            if number == 0:
                found.add_section()
            found.add_row(*(_styled(row[column]) for column in columns))
        return found

    def _repeats(self, column: int, row: Sequence[str], above: Sequence[str]) -> bool:
        return bool(above) and self.headers[column] in self.below and bool(row[column]) and row[column] == above[column]

    def _paragraphs(self, columns: Sequence[int], width: int) -> Iterator[Text]:
        """Each row as its name, and below it "header cell, header cell ..."."""
        for row in (*self.rows, *self.totals):
            yield from (_line(line) for line in wrapped(f"  {_shown(row[columns[0]])}", width))
            line = Text("   ")
            for column in columns[1:]:
                piece = Text(f" {self.headers[column]} ").append_text(_styled(row[column]))
                if line.plain.strip() and line.cell_len + piece.cell_len > width:
                    yield _whole(line)
                    line = Text("   ")
                line = line.append_text(piece) if row[column] else line
            yield _whole(line)
        yield Text("")

    def _texts(self, width: int) -> Iterator[Text]:
        """What goes below the table: each text once, after the names that it is about."""
        for column, header in enumerate(self.headers):
            told = [(row[column], row[0]) for row in self.rows if header in self.below and row[column]]
            for text, names in by_text(told):
                wrong = any(isinstance(row[column], Alarm) for row in self.rows if row[column] == text)
                about = _shown(names) if names.endswith(": each") else f"{_shown(names)}:"
                for line in wrapped(f"  {header}: {about} {_shown(text)}", width):
                    yield _line(line, "bold red" if wrong else "")


def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers: Collection[str] = (),
    below: Collection[str] = (),
    totals: Iterable[Sequence[str]] = (),
) -> Listing:
    """A Listing. Cells are plain text: markup and escape sequences in the name of a layer have no effect."""
    return Listing(tuple(headers), tuple(map(tuple, rows)), numbers, below, tuple(map(tuple, totals)))


def wrapped(line: str, width: int) -> list[str]:
    """A line of text in lines of at most `width`, broken between words; what follows is indented by four more than the line itself."""
    indent = len(line) - len(line.lstrip(" "))
    return textwrap.wrap(
        line, max(width, indent + 20), subsequent_indent=" " * (indent + 4), break_long_words=False, break_on_hyphens=False
    ) or [""]


def _fits(widths: Sequence[int], width: int) -> bool:
    return sum(widths) + 3 * len(widths) + 1 <= width  # a space on either side of each cell, and one between two columns


def _shown(cell: str) -> str:
    return shown(cell, line=True)


def _styled(cell: str) -> Text:
    style = "bold red" if isinstance(cell, Alarm) else "green" if isinstance(cell, Good) else ""
    return Text(_shown(cell), style=style)


def _line(text: str, style: str = "") -> Text:
    return _whole(Text(text, style=style))


def _whole(line: Text) -> Text:
    """A line that is not broken, even if a word of it is longer than the terminal is wide."""
    line.no_wrap, line.overflow = True, "ignore"
    return line
