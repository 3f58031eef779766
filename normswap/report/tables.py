"""The tables that commands print on a terminal."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from normswap.errors import shown


class Alarm(str):
    """A cell that says that something is wrong; it is shown in red."""


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Collection[str] = ()) -> Table:
    """A table for a terminal. Cells are plain text: markup and escape sequences in the name of a layer have no effect.

    numbers: the headers of the columns that are aligned to the right and not broken into lines.
    """
    found = Table(box=box.SIMPLE_HEAD)
    for header in headers:
        if header in numbers:
            found.add_column(header, justify="right", no_wrap=True)
        else:
            found.add_column(header, overflow="fold")
    for row in rows:
        found.add_row(*(Text(shown(cell, line=True), style="bold red" if isinstance(cell, Alarm) else "") for cell in row))
    return found
