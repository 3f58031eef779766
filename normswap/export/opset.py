"""The opset in which an ONNX file is written: DEFAULT_OPSET, or ATTENTION_OPSET if the model calls scaled_dot_product_attention."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Container, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

from normswap.models.quiet import quiet
from normswap.models.watching import forward

DEFAULT_OPSET = 20
TORCH_OPSET = 18  # the lowest that torch.onnx.export writes by itself
DOMAIN = "normswap"
NO_ONNX = "`--no-onnx` writes the converted model without an ONNX file"
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


def unused(name: str, taken: Container[str]) -> str:
    """`name`, or the first of `name_1`, `name_2` ... that is not taken."""
    return next(n for n in itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1))) if n not in taken)
