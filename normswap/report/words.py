"""Words that several reports share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

ROOT = "(the model)"
LISTED = 3  # names before "and N more"


def by_text(said: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """(text, the names that it was said of), each text once."""
    names: dict[str, list[str]] = {}
    for text, name in said:
        names.setdefault(text, []).append(name or ROOT)
    for text, found in names.items():
        more = f" and {len(found) - LISTED} more: each" if len(found) > LISTED else ": each" if len(found) > 1 else ""
        yield text, ", ".join(found[:LISTED]) + more


def listed(names: list[str]) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
