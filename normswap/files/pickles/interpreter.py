"""The interpreter: what a pickle would make, without a thought to whether it may."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Mapping
from typing import IO, Any

from normswap.files.pickles.descriptions import Call, Dict, Global, List, Object, Storage, Tuple
from normswap.models.torch_private import PYTHON2_MODULES, PYTHON2_NAMES

MAX_PICKLE = 16 << 20  # bytes of program, weights not counted; the largest of all torchvision and timm models has under 2 MB


class Broken(Exception):
    """Not a whole pickle."""


class UnknownOpcode(Exception):
    """An instruction that torch's weights-only unpickler does not have."""


class Interpreter:
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
        makes_dict = isinstance(func, Global) and func.path in ("collections.OrderedDict", "collections.Counter")
        self.make(Dict() if makes_dict and isinstance(args, Tuple) and not args.items else Call(func, args))

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
