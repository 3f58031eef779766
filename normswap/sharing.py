"""Copies of a model that share, convert or replace what they are told to, and keep every other identity.

All surgery goes through `copy.deepcopy` and its memo: whatever is put into the memo takes the place of the object wherever the model
refers to it, whether as a child under any number of names, in a list, or as the owner of a bound method. One object stays one object.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedBuffer, is_lazy
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from normswap.errors import SwapError, first_line

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")

# The attributes in which nn.Module keeps hooks. RemovableHandles of the source stay bound to the source.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def copy_with(model: T, memo: dict[int, Any], what: str | None = None) -> T:
    """`copy.deepcopy(model, memo)`, with the reason and a way out when the model cannot be copied. `what`: how the message calls it."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    for buffer in (b for module in modules for b in module._buffers.values() if b is not None):
        if is_lazy(buffer):  # an UninitializedParameter can be copied, an UninitializedBuffer not
            memo.setdefault(id(buffer), cast(Any, UninitializedBuffer)(False, buffer.device, buffer.dtype))
    for module in modules:
        for hook in module._forward_pre_hooks.values():
            # What such a hook computes is a tensor with a history, which cannot be copied; before it is read it is computed anew.
            name = hook._tensor_name if isinstance(hook, BasePruningMethod) else getattr(hook, "name", "")
            computed = module.__dict__.get(name) if isinstance(hook, (SpectralNorm, WeightNorm, BasePruningMethod)) else None
            if computed is not None:
                memo.setdefault(id(computed), computed.detach().clone())
    try:
        with warnings.catch_warnings():
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
            else "copy.deepcopy(model) must work; a tensor of an earlier forward pass that a module keeps is the usual cause: "
            "delete it, or convert before the first forward pass",
        ) from error


def _restore_attributes(source: fx.GraphModule, target: fx.GraphModule, memo: dict[int, Any]) -> None:
    """Give `target` what GraphModule.__deepcopy__ forgets: attributes that somebody set on the object."""
    for name, value in source.__dict__.items():
        if name not in target.__dict__:
            target.__dict__[name] = copy.deepcopy(value, memo)


def shadow(
    model: M,
    of_buffers: Callable[[Tensor], Tensor] = torch.clone,
    of_parameters: Callable[[nn.Parameter], nn.Parameter] = lambda parameter: parameter,
) -> M:
    """A copy in eval mode that shares the parameters and has buffers of its own: safe to trace and run, cheap in memory.

    of_buffers, of_parameters: what stands for each in the copy. Lazy parameters are not shared: a forward pass gives them a shape.
    """
    memo: dict[int, Any] = {id(p): of_parameters(p) for p in model.parameters() if not is_lazy(p)}
    memo.update((id(b), of_buffers(b.detach())) for b in model.buffers() if not is_lazy(b))
    return set_eval(copy_with(model, memo))


def uncompiled() -> AbstractContextManager[Any]:
    """Runs what torch.compile has wrapped as it was written: hooks and modes see it, and nothing is compiled for one pass.

    Without dynamo nothing is wrapped, and importing it takes seconds.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def set_eval(model: M) -> M:
    """`model.eval()`, also for an exported program's module: its mode was settled by the export, and the flags say nothing."""
    try:
        return model.eval()
    except NotImplementedError:
        for module in model.modules():
            module.training = False
        return model


def to_float64(tensor: Tensor) -> Tensor:
    """A copy: in float64 if it is floating, in complex128 if it is complex, else in its own dtype."""
    wide = torch.float64 if tensor.is_floating_point() else torch.complex128 if tensor.is_complex() else tensor.dtype
    return tensor.to(wide, copy=True)


def carry(source: nn.Module, target: nn.Module) -> None:
    """Hooks and the training flag of `source`, onto `target`. The dictionaries are copies: removing a hook here leaves it there.

    The hooks themselves are still the source's; whoever puts `target` into a copy of a model copies them through its memo.
    """
    target.training = source.training
    for name in HOOKS:
        setattr(target, name, copy.copy(getattr(source, name)))
