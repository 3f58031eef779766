"""The opset in which an ONNX file is written: DEFAULT_OPSET, or ATTENTION_OPSET if the model calls scaled_dot_product_attention."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

from normswap.errors import ExportError
from normswap.export.cuda import Missing
from normswap.models.quiet import quiet
from normswap.models.watching import forward

Made = TypeVar("Made")

DEFAULT_OPSET = 20
TORCH_OPSET = 18  # the lowest that torch.onnx.export writes by itself
ATTENTION_OPSET = 23  # from 24 on, most operators that only move values have no CUDA kernel yet
_CALL = torch.ops.aten.scaled_dot_product_attention


class _Watch(TorchFunctionMode):
    """Sees every call of scaled_dot_product_attention; nn.MultiheadAttention makes one too, as it takes no fused path under a mode."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        # A mode does not see inside multi_head_attention_forward, which calls scaled_dot_product_attention unless need_weights is set.
        inside = func is F.multi_head_attention_forward and not kwargs.get("need_weights", True)
        self.seen |= inside or func in (F.scaled_dot_product_attention, _CALL, _CALL.default)
        return func(*args, **kwargs)


def attends(model: nn.Module | ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether one forward pass of a copied model calls scaled_dot_product_attention. Errors are ignored: the export will raise them."""
    if isinstance(model, ExportedProgram):
        return any(node.target is _CALL.default for node in model.graph.nodes)
    watch = _Watch()
    with quiet(), warnings.catch_warnings(record=True), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")  # the export runs it again, and shows them
        forward(model, args, kwargs, within=watch)
    return watch.seen


def with_attention(make: Callable[[int], Made], without_kernel: Callable[[Made], Sequence[Missing]]) -> tuple[Made, int, str | None]:
    """The file in the opset that has Attention, unless torch cannot write it there, or more other nodes would lack a CUDA kernel.

    make: writes the file in an opset. without_kernel: the nodes of a file without a CUDA kernel.
    Returns (the file, its opset, why that is not ATTENTION_OPSET or None).
    """
    try:
        made = make(ATTENTION_OPSET)
    except ExportError as error:
        why, made = f"torch cannot write attention as one operator: {error.message.partition(': ')[2]}", make(DEFAULT_OPSET)
    else:
        missing = without_kernel(made)
        if not missing:
            return made, ATTENTION_OPSET, None
        other = make(DEFAULT_OPSET)
        if len(without_kernel(other)) >= len(missing):
            return made, ATTENTION_OPSET, None
        lost = Counter(node.op for node in missing) - Counter(node.op for node in without_kernel(other))
        why, made = f"in opset {ATTENTION_OPSET}, {' and '.join(sorted(lost))} would be without a CUDA kernel", other
    return made, DEFAULT_OPSET, f"opset {DEFAULT_OPSET}: {why}"
