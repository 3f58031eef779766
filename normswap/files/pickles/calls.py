"""The reviewed calls: for each function, are these arguments those that torch.save writes?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from normswap.files.pickles.allowed import FUNCTIONS, TENSOR_TYPES, VALUE_CLASSES
from normswap.files.pickles.descriptions import PLAIN, Call, Dict, Global, List, Object, Storage, Tuple

MAX_EXPANSION = 1 << 20  # elements of a tensor that repeats its storage (an expanded buffer)


def is_empty(thing: Any) -> bool:
    return isinstance(thing, Dict) and not thing.pairs and not thing.states


def _ints(thing: Any) -> bool:
    return isinstance(thing, Tuple) and all(type(item) is int and item >= 0 for item in thing.items)


def is_tensor(thing: Any) -> bool:
    return isinstance(thing, Call) and thing.path in _TENSOR_CALLS


def is_object(thing: Any) -> bool:
    return isinstance(thing, Object)


def _attributes_of_tensor(state: Any) -> bool:
    """New names with plain values: nothing that a Tensor has already may be replaced (`data`, `grad_fn`, `_backward_hooks`, ...)."""
    return isinstance(state, Dict) and all(
        isinstance(key, str) and not hasattr(torch.nn.Parameter, key) and _is_data(value) for key, value in state.pairs
    )


def _is_data(thing: Any) -> bool:
    """Plain values, and lists, tuples and dicts of such, to the depth that torch.export needs for its marks on dynamic axes."""
    if isinstance(thing, Dict):
        return all(is_key(key) and _is_flat(value) for key, value in thing.pairs)
    return _is_flat(thing)


def _is_flat(thing: Any) -> bool:
    return isinstance(thing, PLAIN) or (isinstance(thing, (Tuple, List)) and all(isinstance(item, PLAIN) for item in thing.items))


def _tensor(args: Tuple) -> bool:
    match args.items:
        case [Storage() as storage, int(offset), Tuple() as size, Tuple() as stride, bool(), hooks, *meta]:
            if not (_ints(size) and _ints(stride) and len(size.items) == len(stride.items) and offset >= 0 and is_empty(hooks)):
                return False
            if not (meta in ([], [None]) or (len(meta) == 1 and is_empty(meta[0]))):
                return False
            numel = math.prod(size.items)
            last = offset + sum((n - 1) * step for n, step in zip(size.items, stride.items, strict=True))
            # torch would grow the storage to fit, to any size and without a word
            return bool(numel == 0 or (last < storage.numel and numel <= max(storage.numel, MAX_EXPANSION)))
    return False


def _parameter(args: Tuple) -> bool:
    match args.items:
        case [data, bool(), hooks]:
            return is_tensor(data) and is_empty(hooks)
        case [data, bool(), hooks, state]:
            return is_tensor(data) and is_empty(hooks) and _attributes_of_tensor(state)
    return False


def _typed_tensor(args: Tuple) -> bool:
    """_rebuild_from_type_v2(function, type, arguments, state) calls any function it is given: only these two, with the same checks."""
    match args.items:
        case [Global(path=func), Global(path=kind), Tuple() as inner, state]:
            args.spoken_for = (0, 1)
            allowed = func in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter") and kind in TENSOR_TYPES
            return bool(allowed and CALLS[func](inner) and _attributes_of_tensor(state))
    return False


def is_key(thing: Any) -> bool:
    return isinstance(thing, PLAIN) or (isinstance(thing, Tuple) and all(isinstance(item, PLAIN) for item in thing.items))


def _set(args: Tuple) -> bool:
    match args.items:
        case [List(items=items)]:
            return all(is_key(item) for item in items)
    return False


def is_partial(args: Tuple) -> bool:
    match args.items:
        case [Global(path=path)]:
            return path in FUNCTIONS or bool(VALUE_CLASSES.fullmatch(path))
    return False


def _plain(*kinds: type) -> Callable[[Tuple], bool]:
    return lambda args: len(args.items) == len(kinds) and all(map(isinstance, args.items, kinds))


CALLS: Mapping[str, Callable[[Tuple], bool]] = {
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
    "functools.partial": is_partial,
    "timm.layers.format.Format": _plain(str),  # an Enum, by value
}
NOT_TORCHS = frozenset({"functools.partial", "timm.layers.format.Format"})  # what torch does not allow by itself
_TENSOR_CALLS = [path for path in CALLS if "_rebuild_" in path]
