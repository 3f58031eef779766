"""The opset in which an ONNX file is written: DEFAULT_OPSET, or NEWER_OPSET if the model calls what is one operator only from there on, or
computes in bfloat16, which most operators take only there."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

from normswap.errors import ExportError, first_line
from normswap.export.cuda import Missing
from normswap.models.quiet import quiet
from normswap.models.watching import forward, tensors_in

if TYPE_CHECKING:
    import onnx_ir as ir

Made = TypeVar("Made")

DEFAULT_OPSET = 20
NEWER_IR_VERSION = 10  # the lowest IR version of a file in NEWER_OPSET: what torch gives it
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


def wants_newer(model: nn.Module | ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a copied model holds or takes bfloat16, or one forward pass calls attention or rms_norm of torch.

    Errors of the pass are ignored: the export will raise them.
    """
    state = model.state_dict if isinstance(model, ExportedProgram) else model.state_dict()
    if any(tensor.dtype is torch.bfloat16 for tensor in tensors_in((dict(state), args, dict(kwargs)))):
        return True
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
        try:
            other = make(DEFAULT_OPSET)
        except ExportError:  # DEFAULT_OPSET lacks what the model needs: most operators in bfloat16, say
            return made, NEWER_OPSET, None
        if len(without_kernel(other)) >= len(missing):
            return made, NEWER_OPSET, None
        lost = Counter(node.op for node in missing) - Counter(node.op for node in without_kernel(other))
        why, made = f"in opset {NEWER_OPSET}, {' and '.join(sorted(lost))} would be without a CUDA kernel", other
    return made, DEFAULT_OPSET, f"opset {DEFAULT_OPSET}: {why}"


def raise_opset(model: ir.Model) -> str | None:
    """Raise an ONNX model to NEWER_OPSET, in place. Returns why that is not possible, a clause; the model may be half raised then."""
    from onnxscript.version_converter import ConvertVersionPass

    if model.functions:  # the converter would inline them, and a runtime may have a kernel of their name
        return "it has functions: `onnx.inliner.inline_local_functions` makes ordinary parts of the graph of them"
    names = [value.name for value in (*model.graph.inputs, *model.graph.outputs)]
    try:
        with quiet():
            ConvertVersionPass(NEWER_OPSET, fallback=True)(model)
    except Exception as error:  # of the converter, which does not know every operator
        return first_line(error)
    if model.graph.opset_imports.get("") != NEWER_OPSET or names != [value.name for value in (*model.graph.inputs, *model.graph.outputs)]:
        return "ONNX's converter has no rule for one of its operators"
    model.ir_version = max(model.ir_version, NEWER_IR_VERSION)
    return None
