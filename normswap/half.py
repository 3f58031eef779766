"""A model in float16, and what its weights were before: folds are computed from those, in float64, and rounded once.

The graph is that of the model as `model.half()` would run it, so what its code computes in float32 on purpose stays in float32. A constant
of that graph which is a parameter, or the transpose of one, rounded to float16 is known by its bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normswap.errors import ExportError
from normswap.sharing import copy_with, set_eval

if TYPE_CHECKING:
    import onnx_ir as ir

A = TypeVar("A")
LARGEST = float(torch.finfo(torch.float16).max)


def to_half(tensor: Tensor) -> Tensor:
    """A copy: in float16 if it is floating, else in its own dtype."""
    return tensor.to(torch.float16, copy=True) if tensor.is_floating_point() else tensor.clone()


def arguments(given: A) -> A:
    """Arguments of a model, their floats in float16."""
    halved: A = pytree.tree_map_only(Tensor, to_half, given)
    return halved


def halved(model: nn.Module) -> nn.Module:
    """A copy in eval mode with parameters and buffers in float16. Raises ExportError if one of them is too large for it."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.numel():
            finite = tensor.detach()[tensor.detach().isfinite()]
            largest = float(finite.abs().max()) if finite.numel() else 0.0
            if largest > LARGEST:
                raise ExportError(
                    f"{name} holds {largest:.3g}, and the largest number of float16 is {LARGEST:.0f}",
                    hint="write this model in float32, without --fp16",
                )
    memo: dict[int, Any] = {id(p): nn.Parameter(to_half(p.detach()), requires_grad=False) for p in model.parameters()}
    memo.update((id(b), to_half(b.detach())) for b in model.buffers())
    return set_eval(copy_with(model, memo))


def remember(graph: ir.Graph, precise: nn.Module) -> None:
    """Note at every constant of a graph in float16 what it was rounded from, if that is a parameter of `precise` or its transpose."""
    from normswap.folding import note_precise

    known = _by_bytes(precise)
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype.numpy() == np.float16:
            source = known.get(_key(tensor.numpy()))
            if source is not None:
                note_precise(value, source)


def _by_bytes(model: nn.Module) -> Mapping[tuple[Any, ...], np.ndarray[Any, Any]]:
    found: dict[tuple[Any, ...], np.ndarray[Any, Any]] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float16:
            array = parameter.detach().to("cpu", torch.promote_types(parameter.dtype, torch.float32)).numpy()
            for form in (array, array.T) if array.ndim == 2 else (array,):
                with np.errstate(over="ignore"):
                    found.setdefault(_key(form.astype(np.float16)), form)
    return found


def _key(array: np.ndarray[Any, Any]) -> tuple[Any, ...]:
    return array.shape, hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()
