"""Descriptions of what a pickle makes, in the place of the real things."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Global:
    module: str
    name: str

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Tuple:
    items: list[Any]
    spoken_for: tuple[int, ...] = ()  # positions where a reviewed call takes a function or a class


@dataclass(eq=False)
class List:
    items: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class Dict:
    """A dict, or what OrderedDict() and Counter() make."""

    pairs: list[tuple[Any, Any]] = field(default_factory=list)
    states: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class Object:
    """What `cls.__new__(cls, *args)` makes."""

    cls: Any
    args: Any
    states: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class Call:
    func: Any
    args: Any
    states: list[Any] = field(default_factory=list)

    @property
    def path(self) -> str:
        return self.func.path if isinstance(self.func, Global) else "?"


@dataclass(eq=False)
class Storage:
    """A persistent id: ('storage', class, key, location, number of elements)."""

    pid: Any
    numel: int = 0
    itemsize: int = 1
    key: str = ""


PLAIN = (type(None), bool, int, float, str, bytes)


def show(thing: Any, depth: int = 3) -> str:
    """For the list of what a file wanted: short, and never a repr that the file has a say in."""
    if isinstance(thing, Global):
        return thing.path
    if isinstance(thing, Tuple):
        shown = [show(item, depth - 1) for item in thing.items[:4]] if depth else []
        return f"({', '.join(shown)}{', ...' if len(thing.items) > len(shown) else ''})"
    if isinstance(thing, PLAIN):
        text = ascii(thing)
        return text if len(text) <= 80 else f"{text[:77]}..."
    if isinstance(thing, Object):
        return f"<{show(thing.cls)} object>"
    if isinstance(thing, Call):
        return f"{thing.path}(...)"
    return f"<{type(thing).__name__.strip('_').lower()}>"
