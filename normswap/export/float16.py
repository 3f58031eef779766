"""A model in float16, and its weights before rounding: folds are computed from those, in float64, and rounded once.

The graph is that of the model as `model.half()` would run it, so what its code computes in float32 on purpose stays in float32. A constant
of that graph which is a rounded parameter, or the transpose of one, is recognised by its bytes.

Only tensors that the graph reads have to fit in float16, and not the tensors of a norm before it is folded. A variance need not fit,
either: (x - mean) / sqrt(var + eps) * w = (x - mean) / sqrt((var + eps) / 4^k) * w / 2^k, without rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from normswap.errors import ExportError
from normswap.models.copying import copy_with, set_eval
from normswap.models.torch_private import AnyBatchNorm, tree_map_only

if TYPE_CHECKING:
    import onnx_ir as ir

A = TypeVar("A")
LARGEST = float(torch.finfo(torch.float16).max)


def to_half(tensor: Tensor) -> Tensor:
    """A copy of the tensor: in float16 if it is floating, else in its own dtype."""
    return tensor.to(torch.float16, copy=True) if tensor.is_floating_point() else tensor.clone()


def arguments(given: A) -> A:
    """Arguments of a model, with their floating-point tensors in float16."""
    halved: A = tree_map_only(Tensor, to_half, given)
    return halved


def halved(model: nn.Module) -> nn.Module:
    """A copy in eval mode with parameters and buffers in float16. Numbers that are too large for it become infinite, see `check`."""
    memo: dict[int, Any] = {id(p): nn.Parameter(to_half(p.detach()), requires_grad=False) for p in model.parameters()}
    memo.update((id(b), to_half(b.detach())) for b in model.buffers())
    copy = set_eval(copy_with(model, memo))
    originals = dict(model.named_modules())
    for name, module in copy.named_modules():
        if isinstance(module, AnyBatchNorm) and isinstance(originals[name], AnyBatchNorm):
            _rescale(module, originals[name])
    return copy


def _rescale(module: nn.Module, original: nn.Module) -> None:
    """Give a BatchNorm in float16 a smaller variance, and a weight to match, in the channels where float16 does not hold its variance."""
    var, weight, bias = (getattr(original, name) for name in ("running_var", "weight", "bias"))
    if var is None or not bool((var.isfinite() & (var > LARGEST)).any()) or not {"weight", "bias"} <= module._parameters.keys():
        return
    wide, eps = var.detach().double(), float(original.eps)  # type: ignore[arg-type]
    steps = torch.where(wide > LARGEST, ((wide + eps) / LARGEST).log2().div(2).ceil().clamp(min=0), 0.0)
    factor = torch.ones_like(wide) if weight is None else weight.detach().double()
    shift = torch.zeros_like(wide) if bias is None else bias.detach()
    module.running_var = to_half(torch.where(steps > 0, (wide + eps) / 4**steps - eps, wide))
    module.weight, module.bias = (nn.Parameter(to_half(t), requires_grad=False) for t in (factor / 2**steps, shift))


def check(used: Iterable[str], precise: nn.Module, model: nn.Module) -> None:
    """Raise ExportError if a tensor that the graph reads, by its name in `precise`, is too large for float16. model: the halved one."""
    originals, halves = (
        dict((*m.named_parameters(remove_duplicate=False), *m.named_buffers(remove_duplicate=False))) for m in (precise, model)
    )
    for name in sorted(used):
        tensor, half = originals.get(name), halves.get(name)
        if tensor is None or half is None or not half.is_floating_point() or not bool((half.isinf() & tensor.isfinite()).any()):
            continue
        largest = float(tensor.detach()[tensor.detach().isfinite()].abs().max())
        raise ExportError(
            f"{name} holds {largest:.3g}, and the largest number of float16 is {LARGEST:.0f}",
            hint="write this model in float32, without --fp16",
        )


def remember(graph: ir.Graph, precise: nn.Module) -> None:
    """Note at every float16 constant of a graph the array it was rounded from, if that is a parameter of `precise` or its transpose."""
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
