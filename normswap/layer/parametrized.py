"""Parametrized tensors of torch, put back into plain parameters."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize


def put_back(module: nn.Module, name: str) -> None:
    """Make a parametrized tensor of a module a plain parameter with the value that it has, in place.

    As torch's `remove_parametrizations`, but copies of the module keep theirs, and what is computed without a gradient is a parameter, too.
    """
    # torch removes the tensor from the class that it made for the module, which the copies of the module have in common.
    cls = type(module)
    own = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, own)
    value = cast(Tensor, getattr(module, name))
    trains = any(part.requires_grad for part in cast(Any, module).parametrizations[name].parameters())
    parametrize.remove_parametrizations(module, name)
    # Where torch puts a tensor without a gradient, which is frozen or computed in torch.no_grad().
    module.__dict__.pop(name, None)
    module._buffers.pop(name, None)
    module.register_parameter(name, nn.Parameter(value.detach(), requires_grad=trains))
