"""Copies of a model that share, convert or replace what they are told to, and keep every other identity.

All surgery goes through `copy.deepcopy` and its memo: whatever is put into the memo takes the place of the object wherever the model
refers to it, whether as a child under any number of names, in a list, or as the owner of a bound method. One object stays one object.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

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


def own_tensors(model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, Any], str, Tensor]]:
    """(module, its dictionary, name, tensor) of every registered parameter and buffer, under every module that holds it once."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    yield module, tensors, name, tensor


def shadow(model: M) -> M:
    """A copy in eval mode that shares the parameters and has buffers of its own: safe to trace and run, cheap in memory."""
    memo: dict[int, Any] = {id(p): p for p in model.parameters()}
    copied = copy_with(model, memo)
    copied.eval()
    return copied


def converted(model: M, convert: Callable[[Tensor], Tensor]) -> M:
    """A copy in eval mode whose parameters and buffers went through `convert`, each made once: no second set of weights exists."""
    memo: dict[int, Any] = {}
    for _, _, _, tensor in own_tensors(model):
        if id(tensor) not in memo:
            new = convert(tensor.detach())
            new = new.clone() if new.data_ptr() == tensor.data_ptr() else new
            memo[id(tensor)] = nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new
    copied = copy_with(model, memo)
    copied.eval()
    return copied


def to_float64(tensor: Tensor) -> Tensor:
    """float64 of a floating tensor, complex128 of a complex one, and any other as it is."""
    if tensor.is_floating_point():
        return tensor.double()
    return tensor.to(torch.complex128) if tensor.is_complex() else tensor


def carry(source: nn.Module, target: nn.Module) -> None:
    """Hooks and the training flag of `source`, onto `target`. The dictionaries are copies: removing a hook here leaves it there."""
    target.training = source.training
    for name in HOOKS:
        setattr(target, name, copy.copy(getattr(source, name)))
