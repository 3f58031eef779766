"""The judge: whether what a pickle would make may be made."""

from __future__ import annotations

import importlib
import inspect
import types
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from normswap.errors import LoadError
from normswap.files.pickles.allowed import (
    CODE_CARRIERS,
    CONFIGS,
    DTYPES,
    FUNCTIONS,
    HOOK,
    OBJECTS,
    PLACES,
    STORAGES,
    TENSOR_TYPES,
    VALUE_CLASSES,
)
from normswap.files.pickles.calls import CALLS, NOT_TORCHS, is_empty, is_key, is_object, is_partial, is_tensor
from normswap.files.pickles.descriptions import Call, Dict, Global, List, Object, Storage, Tuple, expansion, show
from normswap.files.pickles.messages import mismatched_torchvision, reason
from normswap.files.pickles.wrappers import Aside, Wrapper, stand_in

_PASSIVE = frozenset({"collections.OrderedDict", "collections.Counter"})  # made by the interpreter itself
_NAMED = frozenset(CALLS) | _PASSIVE | FUNCTIONS | OBJECTS | DTYPES | STORAGES | TENSOR_TYPES


class Judge:
    def __init__(self, trust_packages: Sequence[str]) -> None:
        self.trusted = tuple(trust_packages)
        self.wanted: dict[str, None] = {}  # an ordered set
        self.objects: dict[str, Any] = {}  # what the reviewed names are, by path

    def refuse(self, what: str) -> None:
        self.wanted[what] = None

    def is_place(self, module: str, configs: bool = False) -> bool:
        if CODE_CARRIERS.fullmatch(module) or "__main__" in module.split("."):
            return False
        if configs and CONFIGS.fullmatch(module):
            return True
        return PLACES.fullmatch(module) is not None or any(module == pkg or module.startswith(f"{pkg}.") for pkg in self.trusted)

    def may_name(self, name: Global) -> bool:
        """By the words alone: nothing is imported here."""
        if not name.name.isidentifier() or not all(part.isidentifier() for part in name.module.split(".")):
            return False
        if name.path in _NAMED or stand_in(name.path) is not None:
            return True
        if CONFIGS.fullmatch(name.module) or PLACES.fullmatch(name.module):
            # a class, by its looks: spares an import to find out that it is a function
            return self.is_place(name.module, configs=True) and name.name.lstrip("_")[:1].isupper()
        return self.is_place(name.module)

    def learn(self, name: Global) -> None:
        """Import what a passed name means, and see that it is what such a name should mean."""
        path = name.path
        if path in self.objects or path in _PASSIVE | DTYPES | STORAGES | TENSOR_TYPES:
            return None
        if path in CALLS and path not in NOT_TORCHS:
            return None
        if (instead := stand_in(path)) is not None:
            self.objects[path] = instead
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
                f"the file needs {path}, which cannot be imported: {reason(error)}", hint=f"install the {top} that it was saved with"
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
        return not any(CODE_CARRIERS.fullmatch(base.__module__) for base in cls.__mro__)

    def is_config(self, cls: Any) -> bool:
        if not (isinstance(cls, type) and CONFIGS.fullmatch(cls.__module__)):
            return False
        return any(base.__module__ == "transformers.configuration_utils" for base in cls.__mro__)

    def may_be_value(self, thing: Any) -> bool:
        if not isinstance(thing, Global):
            return True  # plain, or made by this pickle and judged for itself
        return thing.path in DTYPES or thing.path in FUNCTIONS or (VALUE_CLASSES.fullmatch(thing.path) is not None)

    def judge(self, made: Sequence[Any], root: Any) -> None:
        names = [thing for thing in made if isinstance(thing, Global)]
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
            self.refuse(show(root))
        for thing in made:
            if isinstance(thing, Storage):
                self.storage(thing)
        for thing in made:
            if isinstance(thing, Object):
                self.object(thing)
            elif isinstance(thing, Call):
                self.call(thing)
        for thing in made:  # after the calls, which say which functions in their arguments are spoken for
            if isinstance(thing, Dict):
                self.dict(thing)
            elif isinstance(thing, Tuple | List):
                spoken_for = thing.spoken_for if isinstance(thing, Tuple) else ()
                for index, item in enumerate(thing.items):
                    if index not in spoken_for and not self.may_be_value(item):
                        self.refuse(f"{show(item)} as a value")
        if not self.wanted and (bomb := expansion(made)) is not None:
            raise LoadError(f"the file holds {bomb}", hint="save model.state_dict() and use --arch")

    def storage(self, thing: Storage) -> None:
        match thing.pid:
            case Tuple(items=["storage", Global() as kind, str(key), str(), int(numel), *view]) if (
                kind.path in STORAGES and numel >= 0 and view in ([], [None])
            ):
                thing.pid.spoken_for = (1,)
                thing.key, thing.numel, thing.itemsize = key, numel, _itemsize(kind.name)
            case Tuple(items=["module", *_]):  # the form before torch 1.6: a class together with its source text
                raise LoadError(
                    "a whole model in the file format of torch before 1.6 cannot be read safely",
                    hint="torch.load it and save it again with torch.save(model, path), or save model.state_dict() and use --arch",
                )
            case _:
                self.refuse(f"the persistent object {show(thing.pid)}")

    def call(self, thing: Call) -> None:
        check = CALLS.get(thing.path)
        if check is None or not isinstance(thing.args, Tuple) or not check(thing.args):
            return self.refuse(f"{show(thing.func)}{show(thing.args)}")
        if thing.path == "functools.partial":
            thing.args.spoken_for = (0,)
            for state in thing.states:
                match state:
                    case Tuple(items=[func, Tuple(), (Dict() as kwargs), (None | Dict()) as extra]) if (
                        is_partial(Tuple([func]))
                        and all(isinstance(key, str) for key, _ in kwargs.pairs)
                        and (extra is None or is_empty(extra))
                    ):
                        state.spoken_for = (0,)
                    case _:
                        self.refuse(f"functools.partial with the state {show(state)}")
        elif thing.states:
            self.refuse(f"a state for what {thing.path} returned")
        return None

    def dict(self, thing: Dict) -> None:
        for key, value in thing.pairs:
            if not (is_key(key) or (isinstance(key, Global) and key.path in DTYPES)):
                self.refuse(f"a dict with the key {show(key)}")
            if not self.may_be_value(value):
                self.refuse(f"{show(key)}: {show(value)}")
        for state in thing.states:  # of an OrderedDict: state dicts keep their versions there
            if not (isinstance(state, Dict) and all(key == "_metadata" for key, _ in state.pairs)):
                self.refuse(f"attributes of a dict: {show(state)}")

    def object(self, thing: Object) -> None:
        cls = self.objects.get(thing.cls.path) if isinstance(thing.cls, Global) else None
        if cls is Aside and isinstance(thing.args, Tuple):
            return None  # which keeps nothing: what it is told has been judged for itself
        if not isinstance(cls, type) or not (isinstance(thing.args, Tuple) and not thing.args.items):
            return self.refuse(f"{show(thing.cls)}.__new__{show(thing.args)}")
        for state in thing.states:
            if not isinstance(state, Dict) or not all(isinstance(key, str) for key, _ in state.pairs):
                self.refuse(f"{show(thing)} with the state {show(state)}")
                continue
            for key, value in state.pairs:
                if not _may_set(cls, key, value):
                    self.refuse(f"{show(thing)} with {key} = {show(value)}")
        return None


def _resolve(name: Global) -> Any:
    """Only for names that have passed: imports what they name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old homes of moved classes say so
        return getattr(importlib.import_module(name.module), name.name)


def _itemsize(storage: str) -> int:
    if storage in ("UntypedStorage", "TypedStorage"):
        return 1
    return int(torch.serialization.StorageType(storage).dtype.itemsize)  # type: ignore[no-untyped-call]


def _may_set(cls: type, key: str, value: Any) -> bool:
    """Whether an instance may have this attribute. Its value, if it can be called, has been reviewed; here is what it stands for."""
    if key.startswith("__"):
        return False
    if cls is Wrapper and key != "_modules":
        return True  # which it does not keep
    if isinstance(inspect.getattr_static(cls, key, None), types.FunctionType | classmethod | staticmethod):
        return False  # forward = ..., and every other method
    if "implementation" in key:  # transformers reads names of attention kernels on the hub from these
        return value is None or (isinstance(value, str) and value.isidentifier())
    if not issubclass(cls, nn.Module):
        return True
    if key == "_forward_pre_hooks" and isinstance(value, Dict):
        return all(isinstance(hook, Object) and isinstance(hook.cls, Global) and hook.cls.path == HOOK for _, hook in value.pairs)
    if key == "_forward_pre_hooks_with_kwargs" and isinstance(value, Dict):
        return all(item is True for _, item in value.pairs)
    if "hook" in key or key == "_compiled_call_impl":
        return value is None or isinstance(value, bool) or is_empty(value) or (isinstance(value, Call) and value.path == "builtins.set")
    if key not in ("_parameters", "_buffers", "_modules"):
        return True
    holds = is_object if key == "_modules" else is_tensor
    return isinstance(value, Dict) and all(isinstance(name, str) and (item is None or holds(item)) for name, item in value.pairs)
