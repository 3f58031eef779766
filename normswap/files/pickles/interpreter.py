"""Runs the program of a pickle symbolically: it makes descriptions of the objects that an unpickler would make.

`review` decides whether these objects may be made.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

from normswap.models.torch_private import PYTHON2_MODULES, PYTHON2_NAMES

# --- descriptions ---------------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Global:
    """A class or function, by its name."""

    module: str
    name: str

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Tuple:
    """A tuple. Its items at the positions `reviewed` are functions or classes that a reviewed call takes as its arguments."""

    items: list[Any]
    reviewed: tuple[int, ...] = ()


@dataclass(eq=False)
class List:
    """A list."""

    items: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class Dict:
    """A dict, or what OrderedDict() and Counter() make, and OrderedDict([[key, value], ...]), as Python 2 pickled it."""

    pairs: list[tuple[Any, Any]] = field(default_factory=list)
    states: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class Object:
    """The object that `cls.__new__(cls, *args)` would make."""

    cls: Any
    args: Any
    states: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class Call:
    """The object that `func(*args)` would return."""

    func: Any
    args: Any
    states: list[Any] = field(default_factory=list)

    @property
    def path(self) -> str:
        return self.func.path if isinstance(self.func, Global) else "?"


@dataclass(eq=False)
class Storage:
    """The numbers of a tensor, by a persistent id: ('storage', class, key, location, number of elements)."""

    persistent_id: Any
    numel: int = 0
    itemsize: int = 1
    key: str = ""


PLAIN = (type(None), bool, int, float, str, bytes)


def show(thing: Any, depth: int = 3) -> str:
    """A short text for a list of refused objects. It never calls a repr that the file could influence."""
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


DEEPEST, MOST = 100, 1 << 22  # depth of nested values, and number of values inside one


def endless_nesting(made: Iterable[Any]) -> str | None:
    """What is nested so deeply, or so often, that copying or printing it would not end; None if nothing is. Skips objects' attributes."""
    depths: dict[int, int] = {}
    sizes: dict[int, int] = {}
    entered: set[int] = set()
    for root in made:
        stack = [(root, False)]
        while stack:  # not recursive, as the nesting may be too deep for that
            thing, done = stack.pop()
            key, parts = id(thing), _parts(thing)
            if done:
                entered.discard(key)
                depths[key] = 1 + max((depths.get(id(part), 0) for part in parts), default=0)
                sizes[key] = 1 + sum(sizes.get(id(part), 1) for part in parts)
                if depths[key] > DEEPEST or sizes[key] > MOST:
                    return "values inside values, more than normswap reads"
            elif key in entered:
                return "a value that contains itself"
            elif parts and key not in depths:
                entered.add(key)
                stack.append((thing, True))
                stack.extend((part, False) for part in parts)
    return None


def _parts(thing: Any) -> list[Any]:
    if isinstance(thing, Tuple | List):
        return thing.items
    return [part for pair in thing.pairs for part in pair] if isinstance(thing, Dict) else []


# --- the program ----------------------------------------------------------------------------------------------------------------------

MAX_PICKLE = 16 << 20  # bytes of program, weights not counted; the largest of all torchvision and timm models has under 2 MB


class Broken(Exception):
    """Not a whole pickle."""


class UnknownOpcode(Exception):
    """An instruction that torch's weights-only unpickler does not have."""


def _pairs(path: str, args: Any) -> list[tuple[Any, Any]] | None:
    """The items of the dict that a call of this class makes; None if it makes none, or with other arguments than torch.save writes."""
    match path, args:
        case (("collections.OrderedDict" | "collections.Counter"), Tuple(items=[])):
            return []
        case "collections.OrderedDict", Tuple(items=[List(items=pairs)]) if all(isinstance(p, List) and len(p.items) == 2 for p in pairs):
            return [(pair.items[0], pair.items[1]) for pair in pairs]
    return None


class Interpreter:
    """Runs the opcodes of torch's weights-only unpickler, and no others. `made` lists all descriptions in order."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.left = MAX_PICKLE
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.made: list[Any] = []

    def run(self) -> Any:
        try:
            while (opcode := self.read(1)) != pickle.STOP:
                if opcode not in _OPCODES:
                    raise UnknownOpcode
                _OPCODES[opcode](self)
            return self.stack.pop()
        except (IndexError, KeyError, ValueError) as error:  # an empty stack, no such memo, not UTF-8
            raise Broken from error

    def read(self, size: int) -> bytes:
        self.left -= size
        data = self.stream.read(size) if self.left >= 0 else b""
        if len(data) < size:
            raise Broken
        return data

    def line(self) -> str:
        data = self.stream.readline(1000)
        if not data.endswith(b"\n"):
            raise Broken
        return data[:-1].decode("utf-8")

    def uint4(self) -> int:
        return int(struct.unpack("<I", self.read(4))[0])

    def make(self, thing: Any) -> None:
        self.made.append(thing)
        self.stack.append(thing)

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def proto(self) -> None:
        if self.read(1) != b"\x02":
            raise UnknownOpcode

    def global_(self) -> None:
        module, name = self.line(), self.line()
        # Python 2 names, translated as torch translates them
        if (module, name) in PYTHON2_NAMES:
            module, name = PYTHON2_NAMES[module, name]
        else:
            module = PYTHON2_MODULES.get(module, module)
        self.make(Global(module, name))

    def newobj(self) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        self.make(Object(cls, args))

    def reduce(self) -> None:
        args, func = self.stack.pop(), self.stack.pop()
        pairs = _pairs(func.path, args) if isinstance(func, Global) else None
        self.make(Call(func, args) if pairs is None else Dict(pairs))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, Object | Call | Dict):
            raise Broken
        target.states.append(state)

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], List):
            raise Broken
        self.stack[-1].items.extend(items)

    def set_items(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], Dict) or len(items) % 2:
            raise Broken
        self.stack[-1].pairs.extend(zip(items[::2], items[1::2], strict=True))

    def tuple_(self, size: int) -> None:
        items = [self.stack.pop() for _ in range(size)]
        self.make(Tuple(items[::-1]))

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def unicode(self) -> None:
        self.stack.append(str(self.read(self.uint4()), "utf-8", "surrogatepass"))


_OPCODES: Mapping[bytes, Callable[[Interpreter], None]] = {
    pickle.PROTO: Interpreter.proto,
    pickle.GLOBAL: Interpreter.global_,
    pickle.NEWOBJ: Interpreter.newobj,
    pickle.REDUCE: Interpreter.reduce,
    pickle.BUILD: Interpreter.build,
    pickle.BINPERSID: lambda i: i.make(Storage(i.stack.pop())),
    pickle.APPEND: lambda i: i.extend([i.stack.pop()]),
    pickle.APPENDS: lambda i: i.extend(i.pop_mark()),
    pickle.SETITEM: lambda i: i.set_items([i.stack.pop(-2), i.stack.pop()]),
    pickle.SETITEMS: lambda i: i.set_items(i.pop_mark()),
    pickle.MARK: Interpreter.mark,
    pickle.TUPLE: lambda i: i.make(Tuple(i.pop_mark())),
    pickle.TUPLE1: lambda i: i.tuple_(1),
    pickle.TUPLE2: lambda i: i.tuple_(2),
    pickle.TUPLE3: lambda i: i.tuple_(3),
    pickle.EMPTY_TUPLE: lambda i: i.tuple_(0),
    pickle.EMPTY_LIST: lambda i: i.make(List()),
    pickle.EMPTY_DICT: lambda i: i.make(Dict()),
    pickle.NONE: lambda i: i.stack.append(None),
    pickle.NEWTRUE: lambda i: i.stack.append(True),
    pickle.NEWFALSE: lambda i: i.stack.append(False),
    pickle.BININT: lambda i: i.stack.append(struct.unpack("<i", i.read(4))[0]),
    pickle.BININT1: lambda i: i.stack.append(i.read(1)[0]),
    pickle.BININT2: lambda i: i.stack.append(struct.unpack("<H", i.read(2))[0]),
    pickle.BINFLOAT: lambda i: i.stack.append(struct.unpack(">d", i.read(8))[0]),
    pickle.LONG1: lambda i: i.stack.append(pickle.decode_long(i.read(i.read(1)[0]))),
    pickle.BINUNICODE: Interpreter.unicode,
    pickle.SHORT_BINSTRING: lambda i: i.stack.append(str(i.read(i.read(1)[0]), "utf-8")),
    pickle.BINGET: lambda i: i.get(i.read(1)[0]),
    pickle.LONG_BINGET: lambda i: i.get(i.uint4()),
    pickle.BINPUT: lambda i: i.put(i.read(1)[0]),
    pickle.LONG_BINPUT: lambda i: i.put(i.uint4()),
}
