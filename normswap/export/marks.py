"""Marks the norms of a model for its ONNX graph: in a copy, each BatchlessNorm leaves one node that says which norm it is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from normswap.errors import ExportError, SwapError
from normswap.export.names import DOMAIN, NO_ONNX
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.layer.formulas import laid_out
from normswap.models.copying import copy_for_running


@dataclass(frozen=True)
class Site:
    """A norm of the copy, and its qualified name."""

    name: str
    norm: BatchlessNorm


class _Mark(BatchlessNorm):
    """A BatchlessNorm that leaves a mark in the graph instead of computing: `number` says which of the sites it is."""

    number: int

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.normswap.onnx_affine(input, self.number))


@functools.cache
def mark_operator() -> Any:
    # A custom operator, as torch.onnx.ops.symbolic forgets the device and the strides, which a later `view` may need.
    _LIBRARY.define("onnx_affine(Tensor x, int site) -> Tensor")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{DOMAIN}::onnx_affine", lambda x, site: laid_out(torch.empty_like(x)), lib=_LIBRARY)
    return torch.ops.normswap.onnx_affine.default


_LIBRARY = torch.library.Library(DOMAIN, "FRAGMENT")  # type: ignore[no-untyped-call]  # the operators exist as long as this object


def copied(model: nn.Module) -> nn.Module:
    try:
        return copy_for_running(model)
    except SwapError as error:
        raise ExportError(error.message, hint=NO_ONNX) from error


def mark(twin: nn.Module) -> tuple[Site, ...]:
    """Let every BatchlessNorm of a copied model leave a mark in its graph. Returns the norms, in the order of their numbers."""
    sites = tuple(Site(name, module) for name, module in twin.named_modules() if isinstance(module, BatchlessNorm))
    for number, site in enumerate(sites):
        # Only the class changes: the module keeps its attributes, children and hooks, and all its names. What a subclass does around
        # BatchlessNorm.forward still happens, as _Mark comes right before BatchlessNorm in the method resolution order.
        cls = type(site.norm)
        site.norm.__class__ = _Mark if cls is BatchlessNorm else type(cls.__name__, (cls, _Mark), {})
        cast(_Mark, site.norm).number = number
    return sites


@functools.cache
def onnx_mark() -> Callable[..., Any]:
    """The translation of a mark for torch.onnx: a node that ONNX does not know, which `fold_norms` replaces."""
    import onnx
    from onnxscript import values

    schema = onnx.defs.OpSchema(
        "Affine",
        DOMAIN,
        1,
        inputs=[onnx.defs.OpSchema.FormalParameter("x", "T")],
        outputs=[onnx.defs.OpSchema.FormalParameter("y", "T")],
        type_constraints=[("T", [f"tensor({t})" for t in ("float16", "bfloat16", "float", "double")], "")],
        attributes=[onnx.defs.OpSchema.Attribute("site", onnx.defs.OpSchema.AttrType.INT)],
    )
    operator = values.Op(values.Opset(DOMAIN, 1), "Affine", schema)
    return lambda x, site: operator(x, site=site)
