"""Functions that all reports share: for lists of names, figures, lines of text, and values as strict JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from normswap.errors import listed, shown

if TYPE_CHECKING:
    from normswap.detect.sites import Skip, Swap

ROOT = "(the model)"


def by_text(remarks: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Group (text, name of a layer) by text: (text, the names of its layers) for each text."""
    layers: dict[str, list[str]] = {}
    for text, name in remarks:
        layers.setdefault(text, []).append(name or ROOT)
    for text, names in layers.items():
        yield text, listed(names) + (": each" if len(names) > 1 else "")


def figure(value: float | None) -> str:
    """An error in two digits; an empty text for None."""
    return "" if value is None else f"{value:.1e}"


def text_of(lines: Iterable[str]) -> str:
    """Plain text for a terminal. A layer's name can neither start a line of its own nor hold an escape sequence."""
    return "\n".join(shown(line, line=True) for line in lines)


def strict(value: Any) -> Any:
    """`value` in the types of JSON. Floats that JSON does not have become the strings "nan", "inf" and "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if is_dataclass(value):
        return attributes(value, *(field.name for field in fields(value)))
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return value


def attributes(item: object, *names: str) -> dict[str, Any]:
    """Some attributes of an object, under their own names, as strict JSON."""
    return {name: strict(getattr(item, name)) for name in names}


def site_json(decision: Swap | Skip) -> dict[str, Any]:
    """The site of a decision, as strict JSON."""
    return {**attributes(decision, "name", "aliases", "kind", "calls", "producer", "why_no_producer"), "function": decision.site.function}
