"""Decides which objects a pickle may make: reviews every class, every call with its arguments, and every attribute.

A `Reviewer` collects everything that it refuses, so that a message can list it, and imports the names that passed.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import sys
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import nn

from normswap.errors import LoadError, UnsafePickleError, first_line
from normswap.files.pickles.allowed import (
    CODE_CARRIERS,
    CONFIGS,
    DTYPES,
    FLAGS_OF_HOOKS,
    FUNCTIONS,
    HOOKS,
    OBJECTS,
    PLACES,
    STORAGES,
    TENSOR_TYPES,
    VALUE_CLASSES,
)
from normswap.files.pickles.interpreter import PLAIN, Call, Dict, Global, List, Object, Storage, Tuple, endless_nesting, show
from normswap.files.pickles.wrappers import Discarded, Wrapper, stand_in
from normswap.models.spec import is_within


class Reviewer:
    """Reviews the descriptions from one file. `refused` lists what may not be made; `objects` has the classes and functions by name."""

    def __init__(self, trust_packages: Sequence[str] = ()) -> None:
        self.trusted = tuple(trust_packages)
        self.refused: dict[str, None] = {}  # an ordered set
        self.objects: dict[str, Any] = {}

    def refuse(self, what: str) -> None:
        self.refused[what] = None

    def raise_for_refused(self, file: str) -> None:
        """Raise UnsafePickleError if anything was refused."""
        if not self.refused:
            return
        refused = tuple(self.refused)
        listed = "".join(f"\n  {item}" for item in refused[:20]) + (f"\n  ... and {len(refused) - 20} more" if len(refused) > 20 else "")
        raise UnsafePickleError(
            f"{file} is a pickle that wants to run code that nobody vouched for:{listed}",
            hint=_advice(refused, self.trusted),
            wanted=refused,
        )

    # -- names ---------------------------------------------------------------------------------------------------------------------------

    def may_name(self, name: Global) -> bool:
        """Whether the file may use this name, judged by the text alone: nothing is imported."""
        if not name.name.isidentifier() or not all(part.isidentifier() for part in name.module.split(".")):
            return False
        if name.path in _NAMED or stand_in(name.path) is not None:
            return True
        if CONFIGS.fullmatch(name.module) or PLACES.fullmatch(name.module):
            # only names spelled like classes, so that no module is imported for a function
            return self.is_place(name.module, configs=True) and name.name.lstrip("_")[:1].isupper()
        return self.is_place(name.module)

    def is_place(self, module: str, configs: bool = False) -> bool:
        """Whether classes of layers may come from this module; configs: whether configurations of transformers may, too."""
        if CODE_CARRIERS.fullmatch(module) or "__main__" in module.split("."):
            return False
        if configs and CONFIGS.fullmatch(module):
            return True
        return PLACES.fullmatch(module) is not None or is_within(module, self.trusted)

    def import_named(self, name: Global) -> None:
        """Import the object of a name that passed, and refuse it unless it is a layer, a configuration or on an allowlist."""
        path = name.path
        if path in self.objects or path in _MADE_BY_INTERPRETER | DTYPES | STORAGES | TENSOR_TYPES:
            return
        if path in CALLS and path not in _NOT_ALLOWED_BY_TORCH:
            return
        if (instead := stand_in(path)) is not None:
            self.objects[path] = instead
            return
        top = name.module.partition(".")[0]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # modules whose classes were moved warn on import
                found = getattr(importlib.import_module(name.module), name.name)
        except AttributeError:
            raise LoadError(
                f"the file needs {path}, which the installed {top} does not have", hint=f"install the {top} that it was saved with"
            ) from None
        except Exception as error:  # an import runs the package, which may raise anything
            raise mismatched_torchvision(error) or LoadError(
                f"the file needs {path}, which cannot be imported: {reason(error)}", hint=f"install the {top} that it was saved with"
            ) from error
        known = path in CALLS or path in FUNCTIONS or path in OBJECTS
        if known or self.is_layer_class(found) or _is_config_class(found):
            self.objects[path] = found
        else:
            self.refuse(path)

    def is_layer_class(self, cls: Any) -> bool:
        """Whether it is a class of layers that is defined in an allowed module, not only imported there."""
        if not (isinstance(cls, type) and issubclass(cls, nn.Module) and self.is_place(cls.__module__)):
            return False
        return not any(CODE_CARRIERS.fullmatch(base.__module__) for base in cls.__mro__)

    # -- everything that a program makes -------------------------------------------------------------------------------------------------

    def review(self, made: Sequence[Any], root: Any) -> None:
        """Refuse what may not be made. root: the description of the object in the pickle.

        Nothing is imported before all names have passed, and nothing else is reviewed before all imported objects have passed.
        """
        names = [thing for thing in made if isinstance(thing, Global)]
        for name in names:
            if not self.may_name(name):
                self.refuse(name.path)
        if self.refused:
            return
        for name in names:
            self.import_named(name)
        if self.refused:
            return
        if not _may_be_value(root):
            self.refuse(show(root))
        for thing in made:
            if isinstance(thing, Storage):
                self.review_storage(thing)
        for thing in made:
            if isinstance(thing, Object):
                self.review_object(thing)
            elif isinstance(thing, Call):
                self.review_call(thing)
        for thing in made:  # after the calls, which mark the functions in their arguments that were reviewed with them
            if isinstance(thing, Dict):
                self.review_dict(thing)
            elif isinstance(thing, Tuple | List):
                reviewed = thing.reviewed if isinstance(thing, Tuple) else ()
                for index, item in enumerate(thing.items):
                    if index not in reviewed and not _may_be_value(item):
                        self.refuse(f"{show(item)} as a value")
        if not self.refused and (nesting := endless_nesting(made)) is not None:
            raise LoadError(f"the file holds {nesting}", hint="save model.state_dict() and use --arch")

    def review_storage(self, storage: Storage) -> None:
        match storage.persistent_id:
            case Tuple(items=["storage", Global() as kind, str(key), str(), int(numel), *view]) if (
                kind.path in STORAGES and numel >= 0 and view in ([], [None])
            ):
                storage.persistent_id.reviewed = (1,)
                storage.key, storage.numel, storage.itemsize = key, numel, _itemsize(kind.name)
            case Tuple(items=["module", *_]):  # the form before torch 1.6: a class together with its source text
                raise LoadError(
                    "a whole model in the file format of torch before 1.6 cannot be read safely",
                    hint="torch.load it and save it again with torch.save(model, path), or save model.state_dict() and use --arch",
                )
            case _:
                self.refuse(f"the persistent object {show(storage.persistent_id)}")

    def review_call(self, call: Call) -> None:
        may_be_called_with = CALLS.get(call.path)
        if may_be_called_with is None or not isinstance(call.args, Tuple) or not may_be_called_with(call.args):
            self.refuse(f"{show(call.func)}{show(call.args)}")
        elif call.path == "functools.partial":
            call.args.reviewed = (0,)
            for state in call.states:
                match state:
                    case Tuple(items=[func, Tuple(), (Dict() as kwargs), (None | Dict()) as extra]) if (
                        _takes_function(Tuple([func]))
                        and all(isinstance(key, str) for key, _ in kwargs.pairs)
                        and (extra is None or _is_empty(extra))
                    ):
                        state.reviewed = (0,)
                    case _:
                        self.refuse(f"functools.partial with the state {show(state)}")
        elif call.states:
            self.refuse(f"a state for what {call.path} returned")

    def review_dict(self, made: Dict) -> None:
        for key, value in made.pairs:
            if not (_is_key(key) or (isinstance(key, Global) and key.path in DTYPES)):
                self.refuse(f"a dict with the key {show(key)}")
            if not _may_be_value(value):
                self.refuse(f"{show(key)}: {show(value)}")
        for state in made.states:  # of an OrderedDict: state dicts keep their versions there
            if not (isinstance(state, Dict) and all(key == "_metadata" for key, _ in state.pairs)):
                self.refuse(f"attributes of a dict: {show(state)}")

    def review_object(self, made: Object) -> None:
        cls = self.objects.get(made.cls.path) if isinstance(made.cls, Global) else None
        if cls is Discarded and isinstance(made.args, Tuple):
            return  # it keeps nothing, and its arguments are reviewed on their own
        if not isinstance(cls, type) or not (isinstance(made.args, Tuple) and not made.args.items):
            self.refuse(f"{show(made.cls)}.__new__{show(made.args)}")
            return
        for state in made.states:
            if not isinstance(state, Dict) or not all(isinstance(key, str) for key, _ in state.pairs):
                self.refuse(f"{show(made)} with the state {show(state)}")
                continue
            for key, value in state.pairs:
                if not _may_set(cls, key, value):
                    self.refuse(f"{show(made)} with {key} = {show(value)}")


def _is_config_class(cls: Any) -> bool:
    if not (isinstance(cls, type) and CONFIGS.fullmatch(cls.__module__)):
        return False
    return any(base.__module__ == "transformers.configuration_utils" for base in cls.__mro__)


def _may_be_value(thing: Any) -> bool:
    """Whether this may be a value in a model, which a later forward could call."""
    if not isinstance(thing, Global):
        return True  # plain data, or made by this pickle and reviewed on its own
    return thing.path in DTYPES or thing.path in FUNCTIONS or (VALUE_CLASSES.fullmatch(thing.path) is not None)


def _itemsize(storage: str) -> int:
    if storage in ("UntypedStorage", "TypedStorage"):
        return 1
    return int(torch.serialization.StorageType(storage).dtype.itemsize)  # type: ignore[no-untyped-call]


def _may_set(cls: type, key: str, value: Any) -> bool:
    """Whether an instance of `cls` may have this attribute. A callable value is also reviewed on its own; here its role is checked."""
    if key.startswith("__"):
        return False
    if cls is Wrapper and key != "_modules":
        return True  # a Wrapper does not keep it
    if isinstance(inspect.getattr_static(cls, key, None), types.FunctionType | classmethod | staticmethod):
        return False  # forward = ..., and every other method
    if "implementation" in key:  # transformers reads names of attention kernels on the hub from these
        return value is None or (isinstance(value, str) and value.isidentifier())
    if not issubclass(cls, nn.Module):
        return True
    if key in HOOKS and isinstance(value, Dict):
        return all(isinstance(hook, Object) and isinstance(hook.cls, Global) and hook.cls.path in HOOKS[key] for _, hook in value.pairs)
    if key in FLAGS_OF_HOOKS and isinstance(value, Dict):
        return all(item is True for _, item in value.pairs)
    if "hook" in key or key == "_compiled_call_impl":
        return value is None or isinstance(value, bool) or _is_empty(value) or (isinstance(value, Call) and value.path == "builtins.set")
    if key not in ("_parameters", "_buffers", "_modules"):
        return True
    holds = _is_object if key == "_modules" else _is_tensor
    return isinstance(value, Dict) and all(isinstance(name, str) and (item is None or holds(item)) for name, item in value.pairs)


# --- calls: for each function, are these arguments those that torch.save writes? --------------------------------------------------------

MAX_EXPANSION = 1 << 20  # elements of a tensor that repeats its storage (an expanded buffer)


def _is_empty(thing: Any) -> bool:
    return isinstance(thing, Dict) and not thing.pairs and not thing.states


def _is_tensor(thing: Any) -> bool:
    return isinstance(thing, Call) and thing.path in _REBUILD_TENSOR


def _is_object(thing: Any) -> bool:
    return isinstance(thing, Object)


def _is_key(thing: Any) -> bool:
    return isinstance(thing, PLAIN) or (isinstance(thing, Tuple) and all(isinstance(item, PLAIN) for item in thing.items))


def _are_sizes(thing: Any) -> bool:
    return isinstance(thing, Tuple) and all(type(item) is int and item >= 0 for item in thing.items)


def _may_be_attributes_of_tensor(state: Any) -> bool:
    """Whether a state only has plain values under names that a Tensor does not have (not `data`, `grad_fn`, `_backward_hooks`, ...)."""
    return isinstance(state, Dict) and all(
        isinstance(key, str) and not hasattr(torch.nn.Parameter, key) and _is_data(value) for key, value in state.pairs
    )


def _is_data(thing: Any) -> bool:
    """Whether it is plain data, or a shallow list, tuple or dict of it, as torch.export needs for its marks on dynamic axes."""
    if isinstance(thing, Dict):
        return all(_is_key(key) and _is_flat(value) for key, value in thing.pairs)
    return _is_flat(thing)


def _is_flat(thing: Any) -> bool:
    return isinstance(thing, PLAIN) or (isinstance(thing, (Tuple, List)) and all(isinstance(item, PLAIN) for item in thing.items))


def _takes_tensor(args: Tuple) -> bool:
    match args.items:
        case [Storage() as storage, int(offset), Tuple() as size, Tuple() as stride, bool(), hooks, *meta]:
            if not (_are_sizes(size) and _are_sizes(stride) and len(size.items) == len(stride.items) and offset >= 0):
                return False
            if not (hooks is None or _is_empty(hooks)):  # None: torch 0.4
                return False
            if not (meta in ([], [None]) or (len(meta) == 1 and _is_empty(meta[0]))):
                return False
            numel = math.prod(size.items)
            last = offset + sum((n - 1) * step for n, step in zip(size.items, stride.items, strict=True))
            # torch would silently grow the storage to any size that the tensor needs
            return bool(numel == 0 or (last < storage.numel and numel <= max(storage.numel, MAX_EXPANSION)))
    return False


def _takes_plain_tensor(args: Tuple) -> bool:
    """The form before torch 0.4, without a gradient and hooks."""
    return len(args.items) == 4 and _takes_tensor(Tuple([*args.items, False, None]))


def _takes_parameter(args: Tuple) -> bool:
    match args.items:
        case [data, bool(), hooks]:
            return _is_tensor(data) and _is_empty(hooks)
        case [data, bool(), hooks, state]:
            return _is_tensor(data) and _is_empty(hooks) and _may_be_attributes_of_tensor(state)
    return False


def _takes_typed_tensor(args: Tuple) -> bool:
    """_rebuild_from_type_v2(function, type, arguments, state) calls any function it is given: only these two, with the same checks."""
    match args.items:
        case [Global(path=func), Global(path=kind), Tuple() as inner, state]:
            args.reviewed = (0, 1)
            allowed = func in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter") and kind in TENSOR_TYPES
            return bool(allowed and CALLS[func](inner) and _may_be_attributes_of_tensor(state))
    return False


def _takes_keys(args: Tuple) -> bool:
    match args.items:
        case [List(items=items)]:
            return all(_is_key(item) for item in items)
    return False


def _takes_function(args: Tuple) -> bool:
    match args.items:
        case [Global(path=path)]:
            return path in FUNCTIONS or bool(VALUE_CLASSES.fullmatch(path))
    return False


def _takes(*kinds: type) -> Callable[[Tuple], bool]:
    return lambda args: len(args.items) == len(kinds) and all(map(isinstance, args.items, kinds))


CALLS: Mapping[str, Callable[[Tuple], bool]] = {
    "torch._utils._rebuild_tensor": _takes_plain_tensor,
    "torch._utils._rebuild_tensor_v2": _takes_tensor,
    "torch._utils._rebuild_parameter": _takes_parameter,
    "torch._utils._rebuild_parameter_with_state": _takes_parameter,
    "torch._tensor._rebuild_from_type_v2": _takes_typed_tensor,
    "torch.Size": lambda args: len(args.items) == 1 and _are_sizes(args.items[0]),
    "torch.device": lambda args: _takes(str)(args) or _takes(str, int)(args),
    "torch.serialization._get_layout": _takes(str),
    "builtins.set": _takes_keys,
    "builtins.complex": _takes(float, float),
    "_codecs.encode": lambda args: _takes(str, str)(args) and args.items[1] == "latin1",  # how protocol 2 spells bytes
    "functools.partial": _takes_function,
    "timm.layers.format.Format": _takes(str),  # an Enum, by value
}
_NOT_ALLOWED_BY_TORCH = frozenset({"functools.partial", "timm.layers.format.Format"})  # must be added to torch's safe globals
_REBUILD_TENSOR = [path for path in CALLS if "_rebuild_" in path]
_MADE_BY_INTERPRETER = frozenset({"collections.OrderedDict", "collections.Counter"})
_NAMED = frozenset(CALLS) | _MADE_BY_INTERPRETER | FUNCTIONS | OBJECTS | DTYPES | STORAGES | TENSOR_TYPES


# --- messages -------------------------------------------------------------------------------------------------------------------------

_WELL_KNOWN = frozenset({"torch", "torchvision", "timm", "transformers", "normswap", "__main__", "__builtin__"})


def _advice(refused: Sequence[str], trusted: Sequence[str]) -> str:
    """The hint of a refusal: how the file could be loaded all the same."""
    tops = {re.split(r"\W", item)[0] for item in refused}
    by_arch = "save model.state_dict() and load that with --arch"
    if tops == {"__main__"}:
        return f"its class was defined in a script, and scripts are not run here: {by_arch}"
    strangers = sorted(
        top for top in tops if top not in sys.stdlib_module_names and top not in _WELL_KNOWN and top not in trusted and top.isidentifier()
    )
    if strangers and len(strangers) == len(tops):
        flags = " ".join(f"--trust-package {name}" for name in strangers)
        return f"{flags} allows nn.Module classes from there, if you trust that package; or {by_arch}"
    return f"{by_arch}; or, if you trust whoever made this file with everything on this account, --trust"


def reason(error: Exception) -> str:
    """The message of an error of torch, in one line, without the advice that torch adds."""
    return first_line(error).partition("  (Could this error")[0]


def mismatched_torchvision(error: Exception) -> LoadError | None:
    """The error to raise if torchvision is not built for this torch, which its import reports as a missing operator; else None."""
    if "torchvision::" not in str(error):
        return None
    return LoadError(
        f"torchvision {metadata.version('torchvision')} and torch {torch.__version__} are builds that do not fit each other: "
        f"torchvision cannot be imported ({reason(error)})",
        hint="install both from the same place, for example: pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu",
    )
