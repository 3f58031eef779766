"""Copies of a model, in which chosen parts are shared, converted or replaced, and what was one object stays one object.

All copies are made by `copy.deepcopy` with a memo: an object in the memo takes the place of the original wherever the model refers to it,
as a child under any number of names, in a list, or as the owner of a bound method.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedBuffer, is_lazy
from torch.overrides import TorchFunctionMode

from normswap.errors import SwapError, first_line
from normswap.models.torch_private import DYNAMO, HOOKS, base_of_view

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


def copy_with(model: T, memo: dict[int, Any], what: str | None = None) -> T:
    """`copy.deepcopy(model, memo)`. Raises SwapError with a hint if the model cannot be copied; `what`: its name in the message."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    for buffer in (b for module in modules for b in module._buffers.values() if b is not None):
        if is_lazy(buffer):  # deepcopy can copy an UninitializedParameter, but not an UninitializedBuffer
            memo.setdefault(id(buffer), cast(Any, UninitializedBuffer)(False, buffer.device, buffer.dtype))
    try:
        with _WithoutHistory(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")  # torch's, of the pytree spec in an exported program's module
            copied = copy.deepcopy(model, memo)
        for module in modules:
            if isinstance(module, fx.GraphModule) and isinstance(memo.get(id(module)), fx.GraphModule):
                _restore_attributes(module, memo[id(module)], memo)
        return copied
    except (RuntimeError, TypeError, AttributeError, NotImplementedError, ValueError, AssertionError) as error:
        raise SwapError(
            f"{what or type(model).__name__} cannot be copied: {first_line(error)}",
            hint="convert the model before fully_shard wraps it"
            if "FSDP" in str(error)
            else "copy.deepcopy(model) must work; a lock, a file or a generator that a module keeps is the usual cause: "
            "delete it, or give its class a __deepcopy__",
        ) from error


class _WithoutHistory(TorchFunctionMode):
    """Lets deepcopy copy tensors that are not leaves (a module's cache of biases, say), which torch refuses to copy.

    The copies are detached; weight_norm and caches compute such tensors anew. The copy of a view of a parameter is a view of that
    parameter's copy, so it changes with the parameter and passes gradients to it.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            source, memo = args
            copied = _view_of_copy(source, memo)
            if copied is None:
                detached = source.detach()
                memo.setdefault(id(memo), []).append(detached)  # keep it alive, as deepcopy does: its id is a key of the memo
                copied = copy.deepcopy(detached, memo)
            memo[id(source)] = copied
            return copied
        return func(*args, **(kwargs or {}))


def _view_of_copy(source: Tensor, memo: dict[int, Any]) -> Tensor | None:
    base = base_of_view(source)
    if base is None or not base.is_leaf or base.dtype != source.dtype:
        return None
    copied = copy.deepcopy(base, memo)
    if (copied.shape, copied.stride(), copied.dtype) != (base.shape, base.stride(), base.dtype):  # the memo has a replacement for the base
        return None
    return copied.as_strided(source.shape, source.stride(), source.storage_offset() - base.storage_offset() + copied.storage_offset())


def _restore_attributes(source: fx.GraphModule, target: fx.GraphModule, memo: dict[int, Any]) -> None:
    """Give `target` what GraphModule.__deepcopy__ forgets: attributes that somebody set on the object."""
    for name, value in source.__dict__.items():
        if name not in target.__dict__:
            target.__dict__[name] = copy.deepcopy(value, memo)


def copy_for_running(
    model: M,
    of_buffers: Callable[[Tensor], Tensor] = torch.clone,
    of_parameters: Callable[[nn.Parameter], nn.Parameter] = lambda parameter: parameter,
) -> M:
    """A copy in eval mode that shares the parameters and has buffers of its own: safe to trace and run, cheap in memory.

    of_buffers, of_parameters: make the copy's tensors. Lazy parameters are not shared, as a forward pass gives them a shape.
    """
    memo: dict[int, Any] = {id(p): of_parameters(p) for p in model.parameters() if not is_lazy(p)}
    memo.update((id(b), of_buffers(b.detach())) for b in model.buffers() if not is_lazy(b))
    return set_eval(copy_with(model, memo))


def shared_parameters(model: nn.Module) -> dict[int, list[str]]:
    """id -> names, of each parameter that has more than one name, as several modules share it."""
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(f"{prefix}.{name}" if prefix else name)
    return {key: several for key, several in names.items() if len(several) > 1}


def unclear_names(model: nn.Module) -> dict[int, str]:
    """id -> why get_submodule cannot find a module by its qualified name: the name of a child has a dot, which `setattr` allows."""
    if not any("." in name for module in model.modules() for name, _ in module._modules.items()):
        return {}
    named = list(model.named_modules(remove_duplicate=False))
    found: dict[int, str] = {}
    for name, module in named:
        if len({id(other) for other_name, other in named if other_name == name}) > 1:
            found[id(module)] = f"shares the name {name} with another module, as there is a child whose own name has a dot in it"
        elif _named(model, name) is not module:
            found[id(module)] = f"cannot be found by its name {name}, as there is a child whose own name has a dot in it"
    return found


def _named(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def on_meta(model: nn.Module) -> list[str]:
    """The names of the parameters and buffers that are on the meta device, and so have no values."""
    return [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]


def uncompiled() -> AbstractContextManager[Any]:
    """A context in which code wrapped by torch.compile runs uncompiled, so that hooks and modes see it and nothing is compiled.

    If dynamo has not been imported, nothing is compiled, and importing it would take seconds.
    """
    return torch.compiler.set_stance("force_eager") if DYNAMO in sys.modules else nullcontext()


def set_eval(model: M) -> M:
    """`model.eval()`, also for an exported program's module, whose mode was fixed by the export and whose flags have no effect."""
    try:
        return model.eval()
    except NotImplementedError:
        for module in model.modules():
            module.training = False
        return model


def to_float64(tensor: Tensor) -> Tensor:
    """A copy in float64 if the tensor is floating, in complex128 if it is complex, else in its own dtype."""
    dtype = torch.float64 if tensor.is_floating_point() else torch.complex128 if tensor.is_complex() else tensor.dtype
    return tensor.to(dtype, copy=True)


def copy_hooks(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the hooks and the training flag of `source`. The dictionaries of hooks are copied, so each module can drop its own.

    The hook objects are shared; code that puts `target` into a copy of a model copies them through the memo.
    """
    target.training = source.training
    for name in HOOKS:
        setattr(target, name, copy.copy(getattr(source, name)))
