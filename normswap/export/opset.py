"""The opset in which an ONNX file is written: DEFAULT_OPSET, or NEWER_OPSET if the model calls what is one operator only from there on."""

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
NEWER_OPSET = 23  # has Attention and RMSNormalization; from 24 on, most operators that only move values have no CUDA kernel yet
# What is one operator from NEWER_OPSET on.
_CALLS = (torch.ops.aten.scaled_dot_product_attention, torch.ops.aten.rms_norm)
_FUNCTIONS = (F.scaled_dot_product_attention, F.rms_norm, torch.rms_norm, *_CALLS, *(call.default for call in _CALLS))


class _Watch(TorchFunctionMode):
    """Sees every call of `_FUNCTIONS`; nn.MultiheadAttention makes one of attention, too, as it takes no fused path under a mode."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        # A mode does not see inside multi_head_attention_forward, which calls scaled_dot_product_attention unless need_weights is set.
        inside = func is F.multi_head_attention_forward and not kwargs.get("need_weights", True)
        self.seen |= inside or func in _FUNCTIONS
        return func(*args, **kwargs)


def calls_newer(model: nn.Module | ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether one forward pass of a copied model calls attention or rms_norm of torch. Errors are ignored: the export will raise them."""
    if isinstance(model, ExportedProgram):
        return any(node.target in _FUNCTIONS for node in model.graph.nodes)
    watch = _Watch()
    with quiet(), warnings.catch_warnings(record=True), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")  # the export runs it again, and shows them
        forward(model, args, kwargs, within=watch)
    return watch.seen


def newer_if_better(make: Callable[[int], Made], without_kernel: Callable[[Made], Sequence[Missing]]) -> tuple[Made, int, str | None]:
    """The file in NEWER_OPSET, unless torch cannot write it there, or more nodes would lack a CUDA kernel than in DEFAULT_OPSET.

    make: writes the file in an opset. without_kernel: the nodes of a file without a CUDA kernel.
    Returns (the file, its opset, why that is not NEWER_OPSET or None).
    """
    try:
        made = make(NEWER_OPSET)
    except ExportError as error:
        why, made = f"torch cannot write the model in opset {NEWER_OPSET}: {error.message.partition(': ')[2]}", make(DEFAULT_OPSET)
    else:
        missing = without_kernel(made)
        if not missing:
            return made, NEWER_OPSET, None
        other = make(DEFAULT_OPSET)
        if len(without_kernel(other)) >= len(missing):
            return made, NEWER_OPSET, None
        lost = Counter(node.op for node in missing) - Counter(node.op for node in without_kernel(other))
        why, made = f"in opset {NEWER_OPSET}, {' and '.join(sorted(lost))} would be without a CUDA kernel", other
    return made, DEFAULT_OPSET, f"opset {DEFAULT_OPSET}: {why}"
