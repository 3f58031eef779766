"""Read a pickle without letting it run anything: review what it would do, then let torch's weights-only unpickler do exactly that.

A pickle is a program. It is first executed symbolically: the opcodes of torch's weights-only unpickler, and no others, push
descriptions where the real thing would push objects. Then every object that it would make is judged, before one is made:

* a class may be instantiated only as `object.__new__(cls)` plus a dict of attributes - constructors never run - and only if it is
  an nn.Module of a reviewed place in a well-known package (or of a package that the user trusts), or one of OBJECTS;
* a function may be called only if it is one of CALLS, each with a check of its arguments;
* what may lie about as a value, where a later forward could call it, is tensors, plain data, reviewed objects and the pure
  functions FUNCTIONS, or a functools.partial of those; hooks, and attributes that shadow a method, are refused.

Nothing is imported before all names have passed, and then only from the reviewed places. Judging happens when the program has
ended, because it may fill a dict after it has handed it to somebody: contents only grow, so what holds at the end held throughout.
"""

from __future__ import annotations

import importlib
import inspect
import io
import math
import pickle
import pickletools
import re
import struct
import sys
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import torch
from torch import nn

from normswap.errors import LoadError, UnsafePickleError, first_line

MAX_PICKLE = 16 << 20  # bytes of program, weights not counted; the largest of all torchvision and timm models has under 2 MB
MAX_EXPANSION = 1 << 20  # elements of a tensor that repeats its storage (an expanded buffer)

# --- what is reviewed -----------------------------------------------------------------------------------------------------------

# Where nn.Module classes may come from. Importing one of these modules defines classes and does nothing else: no scripts (the
# convert_* files of transformers), no compilers of code (torch.fx, torch.jit, torch.package), nothing quantised. Of transformers,
# not the four families whose forward fetches compiled kernels from the hub.
_PLACES = re.compile(
    r"""torch\.nn\.modules\.[a-z]\w*
    | torchvision\.(models|ops)(\._?[a-z]\w*)*
    | timm\.(models|layers)(\._?[a-z]\w*)*
    | transformers\.(activations|pytorch_utils|modeling_layers|models\.(?!rwkv|yoso|sam3_video|mra\b)\w+\.modeling_\w+)
    | normswap(\.(?!cli)[a-z]\w*)+""",
    re.VERBOSE,
)
_CONFIGS = re.compile(r"transformers\.models\.\w+\.configuration_\w+")
# Never, whatever the user trusts: instances of these carry code of their own.
_CODE_CARRIERS = re.compile(r"torch\.(jit|fx|package|export|ao|_\w+)(\..*)?")
# Classes that may be kept as a value, hence be called with anything: their constructors only make layers.
_VALUE_CLASSES = re.compile(
    r"torch\.nn\.modules\.(activation|batchnorm|instancenorm|normalization|linear|conv|dropout|pooling|flatten)\.\w+"
    r"|timm\.layers\.(norm|norm_act|activations|activations_me|frozen_bn|filter_response_norm|evo_norm)\.\w+"
    r"|timm\.models\.nextvit\.Next(Conv|Transformer)Block"
)

# Functions that a model may keep as an attribute and call: tensor mathematics, harmless with any arguments.
FUNCTIONS = frozenset(
    {"torch._C._nn.gelu", "torch._C._nn.silu", "torch.tanh", "torch.sigmoid", "torch.relu"}
    | {
        f"torch.nn.functional.{name}"
        for name in [
            "celu",
            "elu",
            "gelu",
            "glu",
            "hardshrink",
            "hardsigmoid",
            "hardswish",
            "hardtanh",
            "leaky_relu",
            "logsigmoid",
            "mish",
            "prelu",
            "relu",
            "relu6",
            "rrelu",
            "selu",
            "sigmoid",
            "silu",
            "softmax",
            "softplus",
            "softshrink",
            "softsign",
            "tanh",
            "tanhshrink",
            "layer_norm",
            "group_norm",
            "batch_norm",
            "instance_norm",
            "rms_norm",
            "normalize",
            "dropout",
            "interpolate",
            "max_pool2d",
            "avg_pool2d",
            "adaptive_avg_pool2d",
            "adaptive_max_pool2d",
        ]
    }
    | {"torchvision.ops.boxes.box_iou", "torchvision.models.optical_flow.raft._pass_through_h"}
)

# Plain data that models carry: instantiated without a constructor, filled from a dict of data.
OBJECTS = frozenset(
    {
        "torchvision.models.detection._utils.BoxCoder",
        "torchvision.models.detection._utils.BoxLinearCoder",
        "torchvision.models.detection._utils.Matcher",
        "torchvision.models.detection._utils.SSDMatcher",
        "torchvision.models.detection._utils.BalancedPositiveNegativeSampler",
        "torchvision.models.detection.image_list.ImageList",
        "torchvision.ops.poolers.LevelMapper",
        "timm.models._features.FeatureInfo",
        "transformers.generation.configuration_utils.GenerationConfig",
        "normswap.batchless.Source",
    }
)

_DTYPES = frozenset(str(value) for value in vars(torch).values() if isinstance(value, torch.dtype))
_STORAGES = frozenset(f"{cls.__module__}.{cls.__name__}" for cls in torch._storage_classes)
_TENSOR_TYPES = frozenset({"torch.Tensor", "torch.nn.parameter.Parameter"})
_KNOWN = frozenset({"torch", "torchvision", "timm", "transformers", "normswap", "__main__", "__builtin__"})


# --- descriptions of what a pickle makes --------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Global:
    module: str
    name: str

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class _Tuple:
    items: list[Any]
    spoken_for: tuple[int, ...] = ()  # positions where a reviewed call takes a function or a class


@dataclass(eq=False)
class _List:
    items: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class _Dict:
    """A dict, or what OrderedDict() and Counter() make."""

    pairs: list[tuple[Any, Any]] = field(default_factory=list)
    states: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class _Object:
    """What `cls.__new__(cls, *args)` makes."""

    cls: Any
    args: Any
    states: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class _Call:
    func: Any
    args: Any
    states: list[Any] = field(default_factory=list)

    @property
    def path(self) -> str:
        return self.func.path if isinstance(self.func, _Global) else "?"


@dataclass(eq=False)
class _Storage:
    """A persistent id: ('storage', class, key, location, number of elements)."""

    pid: Any
    numel: int = 0
    itemsize: int = 1
    key: str = ""


_PLAIN = (type(None), bool, int, float, str, bytes)


def _show(thing: Any, depth: int = 3) -> str:
    """For the list of what a file wanted: short, and never a repr that the file has a say in."""
    if isinstance(thing, _Global):
        return thing.path
    if isinstance(thing, _Tuple):
        shown = [_show(item, depth - 1) for item in thing.items[:4]] if depth else []
        return f"({', '.join(shown)}{', ...' if len(thing.items) > len(shown) else ''})"
    if isinstance(thing, _PLAIN):
        text = ascii(thing)
        return text if len(text) <= 80 else f"{text[:77]}..."
    if isinstance(thing, _Object):
        return f"<{_show(thing.cls)} object>"
    if isinstance(thing, _Call):
        return f"{thing.path}(...)"
    return f"<{type(thing).__name__.strip('_').lower()}>"


# --- the interpreter: what happens, without a thought to whether it may --------------------------------------------------------------


class _Broken(Exception):
    """Not a whole pickle."""


class _UnknownOpcode(Exception):
    """An instruction that torch's weights-only unpickler does not have."""


class _Interpreter:
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
                    raise _UnknownOpcode
                _OPCODES[opcode](self)
            return self.stack.pop()
        except (IndexError, KeyError, ValueError) as error:  # an empty stack, no such memo, not UTF-8
            raise _Broken from error

    def read(self, size: int) -> bytes:
        self.left -= size
        data = self.stream.read(size) if self.left >= 0 else b""
        if len(data) < size:
            raise _Broken
        return data

    def line(self) -> str:
        data = self.stream.readline(1000)
        if not data.endswith(b"\n"):
            raise _Broken
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
            raise _UnknownOpcode

    def global_(self) -> None:
        module, name = self.line(), self.line()
        # Python 2 names, translated as torch translates them
        if (module, name) in torch._utils.NAME_MAPPING:
            module, name = torch._utils.NAME_MAPPING[module, name]
        else:
            module = torch._utils.IMPORT_MAPPING.get(module, module)
        self.make(_Global(module, name))

    def newobj(self) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        self.make(_Object(cls, args))

    def reduce(self) -> None:
        args, func = self.stack.pop(), self.stack.pop()
        makes_dict = isinstance(func, _Global) and func.path in ("collections.OrderedDict", "collections.Counter")
        self.make(_Dict() if makes_dict and isinstance(args, _Tuple) and not args.items else _Call(func, args))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, _Object | _Call | _Dict):
            raise _Broken
        target.states.append(state)

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], _List):
            raise _Broken
        self.stack[-1].items.extend(items)

    def set_items(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], _Dict) or len(items) % 2:
            raise _Broken
        self.stack[-1].pairs.extend(zip(items[::2], items[1::2], strict=True))

    def tuple_(self, size: int) -> None:
        items = [self.stack.pop() for _ in range(size)]
        self.make(_Tuple(items[::-1]))

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def unicode(self) -> None:
        self.stack.append(str(self.read(self.uint4()), "utf-8", "surrogatepass"))


_OPCODES: Mapping[bytes, Callable[[_Interpreter], None]] = {
    pickle.PROTO: _Interpreter.proto,
    pickle.GLOBAL: _Interpreter.global_,
    pickle.NEWOBJ: _Interpreter.newobj,
    pickle.REDUCE: _Interpreter.reduce,
    pickle.BUILD: _Interpreter.build,
    pickle.BINPERSID: lambda i: i.make(_Storage(i.stack.pop())),
    pickle.APPEND: lambda i: i.extend([i.stack.pop()]),
    pickle.APPENDS: lambda i: i.extend(i.pop_mark()),
    pickle.SETITEM: lambda i: i.set_items([i.stack.pop(-2), i.stack.pop()]),
    pickle.SETITEMS: lambda i: i.set_items(i.pop_mark()),
    pickle.MARK: _Interpreter.mark,
    pickle.TUPLE: lambda i: i.make(_Tuple(i.pop_mark())),
    pickle.TUPLE1: lambda i: i.tuple_(1),
    pickle.TUPLE2: lambda i: i.tuple_(2),
    pickle.TUPLE3: lambda i: i.tuple_(3),
    pickle.EMPTY_TUPLE: lambda i: i.tuple_(0),
    pickle.EMPTY_LIST: lambda i: i.make(_List()),
    pickle.EMPTY_DICT: lambda i: i.make(_Dict()),
    pickle.NONE: lambda i: i.stack.append(None),
    pickle.NEWTRUE: lambda i: i.stack.append(True),
    pickle.NEWFALSE: lambda i: i.stack.append(False),
    pickle.BININT: lambda i: i.stack.append(struct.unpack("<i", i.read(4))[0]),
    pickle.BININT1: lambda i: i.stack.append(i.read(1)[0]),
    pickle.BININT2: lambda i: i.stack.append(struct.unpack("<H", i.read(2))[0]),
    pickle.BINFLOAT: lambda i: i.stack.append(struct.unpack(">d", i.read(8))[0]),
    pickle.LONG1: lambda i: i.stack.append(pickle.decode_long(i.read(i.read(1)[0]))),
    pickle.BINUNICODE: _Interpreter.unicode,
    pickle.SHORT_BINSTRING: lambda i: i.stack.append(str(i.read(i.read(1)[0]), "utf-8")),
    pickle.BINGET: lambda i: i.get(i.read(1)[0]),
    pickle.LONG_BINGET: lambda i: i.get(i.uint4()),
    pickle.BINPUT: lambda i: i.put(i.read(1)[0]),
    pickle.LONG_BINPUT: lambda i: i.put(i.uint4()),
}


# --- the reviewed calls: for each function, are these arguments those that torch.save writes? -------------------------------------------


def _empty(thing: Any) -> bool:
    return isinstance(thing, _Dict) and not thing.pairs and not thing.states


def _ints(thing: Any) -> bool:
    return isinstance(thing, _Tuple) and all(type(item) is int and item >= 0 for item in thing.items)


def _is_tensor(thing: Any) -> bool:
    return isinstance(thing, _Call) and thing.path in _TENSOR_CALLS


def _is_object(thing: Any) -> bool:
    return isinstance(thing, _Object)


def _attributes_of_tensor(state: Any) -> bool:
    """New names with plain values: nothing that a Tensor has already may be replaced (`data`, `grad_fn`, `_backward_hooks`, ...)."""
    return isinstance(state, _Dict) and all(
        isinstance(key, str) and not hasattr(torch.nn.Parameter, key) and _is_data(value) for key, value in state.pairs
    )


def _is_data(thing: Any) -> bool:
    """Plain values, and lists, tuples and dicts of such, to the depth that torch.export needs for its marks on dynamic axes."""
    if isinstance(thing, _Dict):
        return all(_key(key) and _is_flat(value) for key, value in thing.pairs)
    return _is_flat(thing)


def _is_flat(thing: Any) -> bool:
    return isinstance(thing, _PLAIN) or (isinstance(thing, (_Tuple, _List)) and all(isinstance(item, _PLAIN) for item in thing.items))


def _tensor(args: _Tuple) -> bool:
    match args.items:
        case [_Storage() as storage, int(offset), _Tuple() as size, _Tuple() as stride, bool(), hooks, *meta]:
            if not (_ints(size) and _ints(stride) and len(size.items) == len(stride.items) and offset >= 0 and _empty(hooks)):
                return False
            if not (meta in ([], [None]) or (len(meta) == 1 and _empty(meta[0]))):
                return False
            numel = math.prod(size.items)
            last = offset + sum((n - 1) * step for n, step in zip(size.items, stride.items, strict=True))
            # torch would grow the storage to fit, to any size and without a word
            return bool(numel == 0 or (last < storage.numel and numel <= max(storage.numel, MAX_EXPANSION)))
    return False


def _parameter(args: _Tuple) -> bool:
    match args.items:
        case [data, bool(), hooks]:
            return _is_tensor(data) and _empty(hooks)
        case [data, bool(), hooks, state]:
            return _is_tensor(data) and _empty(hooks) and _attributes_of_tensor(state)
    return False


def _typed_tensor(args: _Tuple) -> bool:
    """_rebuild_from_type_v2(function, type, arguments, state) calls any function it is given: only these two, with the same checks."""
    match args.items:
        case [_Global(path=func), _Global(path=kind), _Tuple() as inner, state]:
            args.spoken_for = (0, 1)
            allowed = func in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter") and kind in _TENSOR_TYPES
            return bool(allowed and CALLS[func](inner) and _attributes_of_tensor(state))
    return False


def _key(thing: Any) -> bool:
    return isinstance(thing, _PLAIN) or (isinstance(thing, _Tuple) and all(isinstance(item, _PLAIN) for item in thing.items))


def _set(args: _Tuple) -> bool:
    match args.items:
        case [_List(items=items)]:
            return all(_key(item) for item in items)
    return False


def _partial(args: _Tuple) -> bool:
    match args.items:
        case [_Global(path=path)]:
            return path in FUNCTIONS or bool(_VALUE_CLASSES.fullmatch(path))
    return False


def _plain(*kinds: type) -> Callable[[_Tuple], bool]:
    return lambda args: len(args.items) == len(kinds) and all(map(isinstance, args.items, kinds))


CALLS: Mapping[str, Callable[[_Tuple], bool]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _typed_tensor,
    "torch.Size": lambda args: len(args.items) == 1 and _ints(args.items[0]),
    "torch.device": lambda args: _plain(str)(args) or _plain(str, int)(args),
    "torch.serialization._get_layout": _plain(str),
    "builtins.set": _set,
    "builtins.complex": _plain(float, float),
    "_codecs.encode": lambda args: _plain(str, str)(args) and args.items[1] == "latin1",  # how protocol 2 spells bytes
    "functools.partial": _partial,
    "timm.layers.format.Format": _plain(str),  # an Enum, by value
}
_NOT_TORCHS = frozenset({"functools.partial", "timm.layers.format.Format"})  # what torch does not allow by itself
_TENSOR_CALLS = [path for path in CALLS if "_rebuild_" in path]
_PASSIVE = frozenset({"collections.OrderedDict", "collections.Counter"})  # made by the interpreter itself


_NAMED = frozenset(CALLS) | _PASSIVE | FUNCTIONS | OBJECTS | _DTYPES | _STORAGES | _TENSOR_TYPES


# --- the judge ------------------------------------------------------------------------------------------------------------------------


def _resolve(name: _Global) -> Any:
    """Only for names that have passed: imports what they name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old homes of moved classes say so
        return getattr(importlib.import_module(name.module), name.name)


class _Judge:
    def __init__(self, trust_packages: Sequence[str]) -> None:
        self.trusted = tuple(trust_packages)
        self.wanted: dict[str, None] = {}  # an ordered set
        self.objects: dict[str, Any] = {}  # what the reviewed names are, by path

    def refuse(self, what: str) -> None:
        self.wanted[what] = None

    def is_place(self, module: str, configs: bool = False) -> bool:
        if _CODE_CARRIERS.fullmatch(module) or "__main__" in module.split("."):
            return False
        if configs and _CONFIGS.fullmatch(module):
            return True
        return _PLACES.fullmatch(module) is not None or any(module == pkg or module.startswith(f"{pkg}.") for pkg in self.trusted)

    def may_name(self, name: _Global) -> bool:
        """By the words alone: nothing is imported here."""
        if not name.name.isidentifier() or not all(part.isidentifier() for part in name.module.split(".")):
            return False
        if name.path in _NAMED:
            return True
        if _CONFIGS.fullmatch(name.module) or _PLACES.fullmatch(name.module):
            # a class, by its looks: spares an import to find out that it is a function
            return self.is_place(name.module, configs=True) and name.name.lstrip("_")[:1].isupper()
        return self.is_place(name.module)

    def learn(self, name: _Global) -> None:
        """Import what a passed name means, and see that it is what such a name should mean."""
        path = name.path
        if path in self.objects or path in _PASSIVE | _DTYPES | _STORAGES | _TENSOR_TYPES:
            return None
        if path in CALLS and path not in _NOT_TORCHS:
            return None
        top = name.module.partition(".")[0]
        try:
            found = _resolve(name)
        except AttributeError:
            raise LoadError(
                f"the file needs {path}, which the installed {top} does not have", hint=f"install the {top} that it was saved with"
            ) from None
        except Exception as error:  # an import runs the package, which may raise anything
            raise mismatched_torchvision(error) or LoadError(
                f"the file needs {path}, which cannot be imported: {_first_line(error)}", hint=f"install the {top} that it was saved with"
            ) from error
        known = path in CALLS or path in FUNCTIONS or path in OBJECTS
        if not (known or self.is_module_class(found) or self.is_config(found)):
            return self.refuse(path)
        self.objects[path] = found
        return None

    def is_module_class(self, cls: Any) -> bool:
        """Really a layer, and really from a reviewed place: a place also holds what it imported from elsewhere."""
        if not (isinstance(cls, type) and issubclass(cls, nn.Module) and self.is_place(cls.__module__)):
            return False
        return not any(_CODE_CARRIERS.fullmatch(base.__module__) for base in cls.__mro__)

    def is_config(self, cls: Any) -> bool:
        if not (isinstance(cls, type) and _CONFIGS.fullmatch(cls.__module__)):
            return False
        return any(base.__module__ == "transformers.configuration_utils" for base in cls.__mro__)

    def may_be_value(self, thing: Any) -> bool:
        if not isinstance(thing, _Global):
            return True  # plain, or made by this pickle and judged for itself
        return thing.path in _DTYPES or thing.path in FUNCTIONS or (_VALUE_CLASSES.fullmatch(thing.path) is not None)

    def judge(self, made: Sequence[Any], root: Any) -> None:
        names = [thing for thing in made if isinstance(thing, _Global)]
        for name in names:
            if not self.may_name(name):
                self.refuse(name.path)
        if self.wanted:
            return
        for name in names:
            self.learn(name)
        if self.wanted:
            return
        if not self.may_be_value(root):
            self.refuse(_show(root))
        for thing in made:
            if isinstance(thing, _Storage):
                self.storage(thing)
        for thing in made:
            if isinstance(thing, _Object):
                self.object(thing)
            elif isinstance(thing, _Call):
                self.call(thing)
        for thing in made:  # after the calls, which say which functions in their arguments are spoken for
            if isinstance(thing, _Dict):
                self.dict(thing)
            elif isinstance(thing, _Tuple | _List):
                spoken_for = thing.spoken_for if isinstance(thing, _Tuple) else ()
                for index, item in enumerate(thing.items):
                    if index not in spoken_for and not self.may_be_value(item):
                        self.refuse(f"{_show(item)} as a value")

    def storage(self, thing: _Storage) -> None:
        match thing.pid:
            case _Tuple(items=["storage", _Global() as kind, str(key), str(), int(numel), *view]) if (
                kind.path in _STORAGES and numel >= 0 and view in ([], [None])
            ):
                thing.pid.spoken_for = (1,)
                thing.key, thing.numel, thing.itemsize = key, numel, _itemsize(kind.name)
            case _Tuple(items=["module", *_]):  # the form before torch 1.6: a class together with its source text
                raise LoadError(
                    "a whole model in the file format of torch before 1.6 cannot be read safely",
                    hint="torch.load it and save it again with torch.save(model, path), or save model.state_dict() and use --arch",
                )
            case _:
                self.refuse(f"the persistent object {_show(thing.pid)}")

    def call(self, thing: _Call) -> None:
        check = CALLS.get(thing.path)
        if check is None or not isinstance(thing.args, _Tuple) or not check(thing.args):
            return self.refuse(f"{_show(thing.func)}{_show(thing.args)}")
        if thing.path == "functools.partial":
            thing.args.spoken_for = (0,)
            for state in thing.states:
                match state:
                    case _Tuple(items=[func, _Tuple(), (_Dict() as kwargs), (None | _Dict()) as extra]) if (
                        _partial(_Tuple([func]))
                        and all(isinstance(key, str) for key, _ in kwargs.pairs)
                        and (extra is None or _empty(extra))
                    ):
                        state.spoken_for = (0,)
                    case _:
                        self.refuse(f"functools.partial with the state {_show(state)}")
        elif thing.states:
            self.refuse(f"a state for what {thing.path} returned")
        return None

    def dict(self, thing: _Dict) -> None:
        for key, value in thing.pairs:
            if not (_key(key) or (isinstance(key, _Global) and key.path in _DTYPES)):
                self.refuse(f"a dict with the key {_show(key)}")
            if not self.may_be_value(value):
                self.refuse(f"{_show(key)}: {_show(value)}")
        for state in thing.states:  # of an OrderedDict: state dicts keep their versions there
            if not (isinstance(state, _Dict) and all(key == "_metadata" for key, _ in state.pairs)):
                self.refuse(f"attributes of a dict: {_show(state)}")

    def object(self, thing: _Object) -> None:
        cls = self.objects.get(thing.cls.path) if isinstance(thing.cls, _Global) else None
        if not isinstance(cls, type) or not (isinstance(thing.args, _Tuple) and not thing.args.items):
            return self.refuse(f"{_show(thing.cls)}.__new__{_show(thing.args)}")
        for state in thing.states:
            if not isinstance(state, _Dict) or not all(isinstance(key, str) for key, _ in state.pairs):
                self.refuse(f"{_show(thing)} with the state {_show(state)}")
                continue
            for key, value in state.pairs:
                if not _may_set(cls, key, value):
                    self.refuse(f"{_show(thing)} with {key} = {_show(value)}")
        return None


def _itemsize(storage: str) -> int:
    if storage in ("UntypedStorage", "TypedStorage"):
        return 1
    return int(torch.serialization.StorageType(storage).dtype.itemsize)  # type: ignore[no-untyped-call]


def _may_set(cls: type, key: str, value: Any) -> bool:
    """Whether an instance may have this attribute. Its value, if it can be called, has been reviewed; here is what it stands for."""
    if key.startswith("__"):
        return False
    if isinstance(inspect.getattr_static(cls, key, None), types.FunctionType | classmethod | staticmethod):
        return False  # forward = ..., and every other method
    if "implementation" in key:  # transformers reads names of attention kernels on the hub from these
        return value is None or (isinstance(value, str) and value.isidentifier())
    if not issubclass(cls, nn.Module):
        return True
    if "hook" in key or key == "_compiled_call_impl":
        return value is None or isinstance(value, bool) or _empty(value) or (isinstance(value, _Call) and value.path == "builtins.set")
    if key not in ("_parameters", "_buffers", "_modules"):
        return True
    holds = _is_object if key == "_modules" else _is_tensor
    return isinstance(value, _Dict) and all(isinstance(name, str) and (item is None or holds(item)) for name, item in value.pairs)


# --- files ------------------------------------------------------------------------------------------------------------------------------


def read(file: IO[bytes], name: str, *, trust_packages: Sequence[str] = ()) -> Any:
    """What `torch.save` put into this file, a zip archive or the older plain form, on the CPU; or why it must not or cannot be read."""
    allowed = review(file, name, trust_packages=trust_packages)
    # torch drops what it was given on leaving the context, so what the caller has allowed before is left out
    present = torch.serialization.get_safe_globals()
    new: list[Any] = [entry for entry in ((found, path) for path, found in allowed.items()) if entry not in present]
    file.seek(0)
    try:
        with torch.serialization.safe_globals(new), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file makes torch raise has no common type
        raise LoadError(f"{name} cannot be read: {_first_line(error)}", hint="it may be damaged: copy or save it again") from error


def review(file: IO[bytes], name: str, *, trust_packages: Sequence[str] = ()) -> dict[str, Any]:
    """The classes and functions that reading this file takes, by the names it uses; UnsafePickleError if one of them may not be used."""
    file.seek(0)
    judge = _Judge(trust_packages)
    if file.read(4) == b"PK\x03\x04":
        archive = open_archive(file, name)
        if not archive.has_record("data.pkl"):
            raise LoadError(f"{name} is a zip archive without a model in it", hint="give a file that torch.save wrote")
        try:
            program = io.BytesIO(archive.get_record("data.pkl"))
        except Exception as error:  # what the reader raises on a damaged archive has no common type
            raise _damaged(name, _first_line(error)) from None
        if len(program.getbuffer()) > MAX_PICKLE:
            raise LoadError(
                f"{name} describes its model in {len(program.getbuffer()) >> 20} MiB, more than the {MAX_PICKLE >> 20} MiB that are read"
            )
        storages = [made for made in _judged(program, judge, name) if isinstance(made, _Storage)]
        for storage in storages:
            record = f"data/{storage.key}"
            held = archive.get_record_size(record) if archive.has_record(record) else 0
            if held < storage.numel * storage.itemsize:
                raise _damaged(name, f"its tensor {storage.key!a} should have {storage.numel * storage.itemsize} bytes, but has {held}")
    else:
        storages = _legacy(file, judge, name)
        claimed = sum({storage.key: storage.numel * storage.itemsize for storage in storages}.values())
        if claimed > (size := _size(file)):
            raise _damaged(name, f"its tensors should have {claimed} bytes, but the whole file has {size}")
    sizes = {storage.key: storage.numel for storage in storages}
    if any(sizes[storage.key] != storage.numel for storage in storages):  # the first would serve all, too small for some
        raise _damaged(name, "it gives one tensor storage two sizes")
    return judge.objects


def _legacy(file: IO[bytes], judge: _Judge, name: str) -> list[_Storage]:
    """The form before torch 1.6: five pickles (magic number, version, system, object, storage keys), then the numbers."""
    file.seek(0)
    if file.read(1) != pickle.PROTO:
        raise not_a_model(name)
    file.seek(0)
    magic, first = _interpreted(file, name)
    if magic != torch.serialization.MAGIC_NUMBER:
        judge.judge(first, magic)
        _raise_wanted(judge, name)
        raise LoadError(f"{name} is a pickle, but not one that torch.save wrote", hint="save the model with torch.save")
    storages: list[_Storage] = []
    for _ in range(4):
        storages += [made for made in _judged(file, judge, name) if isinstance(made, _Storage)]
    return storages


def _judged(stream: IO[bytes], judge: _Judge, name: str) -> list[Any]:
    root, made = _interpreted(stream, name)
    judge.judge(made, root)
    _raise_wanted(judge, name)
    return made


def _interpreted(stream: IO[bytes], name: str) -> tuple[Any, list[Any]]:
    start = stream.tell()
    interpreter = _Interpreter(stream)
    try:
        return interpreter.run(), interpreter.made
    except _Broken:
        raise _damaged(name, "its description of the model breaks off or makes no sense") from None
    except _UnknownOpcode:
        stream.seek(start)
        judge = _Judge(())
        for path in _names_of_any_protocol(stream):
            if not judge.may_name(_Global(*path)):
                judge.refuse(".".join(path))
        _raise_wanted(judge, name)
        raise LoadError(
            f"{name} was written with a pickle protocol other than 2, the one that can be read safely",
            hint="save it again with torch.save(model, path), without pickle_protocol or pickle_module",
        ) from None


def _names_of_any_protocol(stream: IO[bytes]) -> Iterator[tuple[str, str]]:
    """What a pickle names, roughly: for the text of a refusal, never for a decision."""
    strings: list[str] = []
    memo: dict[int, str] = {}
    top = ""
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in ("GLOBAL", "INST"):
                module, _, name = str(argument).partition(" ")
                yield module, name
            elif opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
                yield strings[-2], strings[-1]
            elif opcode.name in ("EXT1", "EXT2", "EXT4"):
                yield "copyreg", f"extension_{argument}"
            if opcode.name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
                memo[len(memo) if argument is None else int(str(argument))] = top
                continue
            if opcode.name in ("GET", "BINGET", "LONG_BINGET"):
                argument = memo.get(int(str(argument)))
            top = argument if isinstance(argument, str) else ""
            if top:
                strings.append(top)
    except Exception:  # garbage past the interesting part
        return


def open_archive(file: IO[bytes], name: str) -> Any:
    """The reader that torch.load itself uses, so that both see the same records of a zip file made to look like two."""
    file.seek(0)
    try:
        archive = torch._C.PyTorchFileReader(file)
        held = sum(archive.get_record_size(record) for record in archive.get_all_records())
    except Exception as error:  # RuntimeError of the reader, OSError of a seek to where it was told to
        if zipfile.is_zipfile(file):
            raise LoadError(
                f"{name} is a zip archive without a model in it", hint="give a file that torch.save or torch.export.save wrote"
            ) from None
        raise _damaged(name, _first_line(error)) from None
    if held > (size := _size(file)):  # torch.save does not compress
        raise _damaged(name, f"its parts unpack to {held} bytes, more than its own {size}")
    return archive


def _size(file: IO[bytes]) -> int:
    position = file.tell()
    size = file.seek(0, io.SEEK_END)
    file.seek(position)
    return size


def _first_line(error: Exception) -> str:
    return first_line(error).partition("  (Could this error")[0]


def _damaged(name: str, why: str) -> LoadError:
    return LoadError(f"{name} is damaged: {why}", hint="copy or save it again")


def not_a_model(name: str) -> LoadError:
    return LoadError(
        f"{name} is not a model file: neither a torch.save archive nor safetensors nor a torch.export program",
        hint="give a .pt, .pth, .pt2 or .safetensors file, or torchvision:NAME, timm:NAME, hf:DIRECTORY or package.module:factory",
    )


def mismatched_torchvision(error: Exception) -> LoadError | None:
    """torchvision of another build than torch fails to import with a message about one of its operators."""
    if "torchvision::" not in str(error):
        return None
    import importlib.metadata as metadata

    return LoadError(
        f"torchvision {metadata.version('torchvision')} and torch {torch.__version__} are builds that do not fit each other: "
        f"torchvision cannot be imported ({_first_line(error)})",
        hint="install both from the same place, for example: pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu",
    )


def _raise_wanted(judge: _Judge, name: str) -> None:
    if not judge.wanted:
        return
    wanted = tuple(judge.wanted)
    listed = "".join(f"\n  {item}" for item in wanted[:20]) + (f"\n  ... and {len(wanted) - 20} more" if len(wanted) > 20 else "")
    raise UnsafePickleError(
        f"{name} is a pickle that wants to run code that nobody vouched for:{listed}", hint=_advice(wanted, judge.trusted), wanted=wanted
    )


def _advice(wanted: Sequence[str], trusted: Sequence[str]) -> str:
    """What to do, if the file is worth it."""
    tops = {re.split(r"\W", item)[0] for item in wanted}
    by_arch = "save model.state_dict() and load that with --arch"
    if tops == {"__main__"}:
        return f"its class was defined in a script, and scripts are not run here: {by_arch}"
    strangers = sorted(
        top for top in tops if top not in sys.stdlib_module_names and top not in _KNOWN and top not in trusted and top.isidentifier()
    )
    if strangers and len(strangers) == len(tops):
        flags = " ".join(f"--trust-package {name}" for name in strangers)
        return f"{flags} allows nn.Module classes from there, if you trust that package; or {by_arch}"
    return f"{by_arch}; or, if you trust whoever made this file with everything on this account, --trust-pickle"
