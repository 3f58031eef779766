"""Puts the table of a benchmark into its page of the documentation, between two lines that say where it goes."""

from __future__ import annotations

from pathlib import Path


def put(page: Path, begin: str, body: str, end: str) -> None:
    """Replace what is between the lines `begin` and `end` by `body`. Raises RuntimeError if the page has no such lines."""
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise RuntimeError(f"{page.name} has no lines {begin} and {end}; put them where the table goes")
    page.write_text(f"{before}{begin}\n{body}\n{end}{after}", encoding="utf-8")
