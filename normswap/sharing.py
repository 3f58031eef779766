"""Copies of a model that share, convert or replace what they are told to, and keep every other identity.

All surgery goes through `copy.deepcopy` and its memo: whatever is put into the memo takes the place of the object wherever the model
refers to it, whether as a child under any number of names, in a list, or as the owner of a bound method. One object stays one object.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normswap.errors import SwapError

M = TypeVar("M", bound=nn.Module)

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


def copy_with(model: M, memo: dict[int, Any]) -> M:
    """`copy.deepcopy(model, memo)`, with the reason and a way out when the model cannot be copied."""
    try:
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError, ValueError) as error:
        raise SwapError(
            f"{type(model).__name__} cannot be copied: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            hint="copy.deepcopy(model) must work; a tensor of an earlier forward pass that a module keeps is the usual cause: "
            "delete it, or convert before the first forward pass",
        ) from error


def shadow(model: M, of_buffers: Callable[[Tensor], Tensor] = torch.clone) -> M:
    """A copy in eval mode that shares the parameters and has buffers of its own: safe to trace and run, cheap in memory."""
    memo: dict[int, Any] = {id(p): p for p in model.parameters()}
    memo.update((id(b), of_buffers(b.detach())) for b in model.buffers() if not is_lazy(b))
    copied = copy_with(model, memo)
    copied.eval()
    return copied


def to_float64(tensor: Tensor) -> Tensor:
    """A copy: in float64 if it is floating, in complex128 if it is complex, else in its own dtype."""
    wide = torch.float64 if tensor.is_floating_point() else torch.complex128 if tensor.is_complex() else tensor.dtype
    return tensor.to(wide, copy=True)


def carry(source: nn.Module, target: nn.Module) -> None:
    """Hooks and the training flag of `source`, onto `target`. The dictionaries are copies: removing a hook here leaves it there."""
    target.training = source.training
    for name in HOOKS:
        setattr(target, name, copy.copy(getattr(source, name)))
