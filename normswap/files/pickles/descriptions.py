"""Descriptions of what a pickle makes, in the place of the real things."""

from __future__ import annotations

from collections.abc import Iterable
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


DEEPEST, MOST = 100, 1 << 22  # values inside values, and values that are reached from one


def expansion(made: Iterable[Any]) -> str | None:
    """What is nested too deeply, or so often that copying or showing it would not end; None if nothing is. Objects are not looked into."""
    depths: dict[int, int] = {}
    sizes: dict[int, int] = {}
    open_: set[int] = set()
    for root in made:
        stack = [(root, False)]
        while stack:  # not by recursion: its depth is what is asked for
            thing, done = stack.pop()
            key, parts = id(thing), _parts(thing)
            if done:
                open_.discard(key)
                depths[key] = 1 + max((depths.get(id(part), 0) for part in parts), default=0)
                sizes[key] = 1 + sum(sizes.get(id(part), 1) for part in parts)
                if depths[key] > DEEPEST or sizes[key] > MOST:
                    return "values inside values, more than normswap reads"
            elif key in open_:
                return "a value that contains itself"
            elif parts and key not in depths:
                open_.add(key)
                stack.append((thing, True))
                stack.extend((part, False) for part in parts)
    return None


def _parts(thing: Any) -> list[Any]:
    if isinstance(thing, Tuple | List):
        return thing.items
    return [part for pair in thing.pairs for part in pair] if isinstance(thing, Dict) else []


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
