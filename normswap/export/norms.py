"""Finds the norms of a graph, by their marks or as the Mul and Add that torch makes of a BatchlessNorm, and folds them.

Of an RMSNorm in the place of a LayerNorm, which stays, the bias is folded: RMSNormalization has none, as LayerNormalization has.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from normswap.export.fused_conv import FUSED
from normswap.export.marks import Site
from normswap.export.names import DOMAIN
from normswap.export.simplify import simplify
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.layer.rms_norm import RMSNorm
from normswap.models.quiet import quiet

if TYPE_CHECKING:
    import onnx_ir as ir

    from normswap.folding import Affine, Constants, Outcome


UNFOLDED = "nothing is folded here"


def shorten(model: ir.Model, *, marked: bool) -> None:
    """Shorten the graph while its norms are in it. marked: whether the norms are marks, and not a Mul and an Add."""
    from onnx_ir.passes import common
    from onnxscript import optimizer

    if not marked:  # an ExportedProgram: torch does not compute scale and shift in advance for more than a few thousand channels
        with quiet():
            optimizer.fold_constants_ir(model, should_fold=lambda node: True if _norm_around(node) is not None else None)
    simplify(model)
    common.RemoveUnusedNodesPass()(model)


def fold_norms(
    model: ir.Model, sites: Sequence[Site], kept: Mapping[str, str] | None, *, spatial_thresholds: bool, folded: bool = True
) -> tuple[list[Outcome], list[Outcome], Counter[str]]:
    """Fold every norm where that is exact, and the bias of every RMSNorm.

    Returns an Outcome for each norm, one for each such bias (named as the parameter), and the skeleton: the operators without the norms.

    kept: norms that are not folded, by name, and why; if not `folded`, none is. spatial_thresholds: as in `normswap.folding.fold`.
    """
    from onnx_ir.passes import common

    from normswap.folding import Constants, fold

    constants = Constants(model.graph)
    found = [
        (affine, is_norm)
        for node in model.graph.all_nodes()
        for affine, is_norm in ((_marked(node, sites) or _spelled_out(node, constants), True), (_bias_of_rms(node, constants), False))
        if affine is not None
    ]
    affines = [affine for affine, _ in found]
    skeleton = operators(model.graph, {node for affine, is_norm in found if is_norm for node in affine.nodes})
    if not folded:
        kept = {affine.name: UNFOLDED for affine in affines}
    outcomes = fold(model.graph, affines, constants, kept, spatial_thresholds=spatial_thresholds)
    common.RemoveUnusedNodesPass()(model)
    constants.restore_names()
    of_norms, of_biases = ([o for o, (_, is_norm) in zip(outcomes, found, strict=True) if is_norm is wanted] for wanted in (True, False))
    return of_norms, of_biases, skeleton


def operators(graph: ir.Graph, without: Container[ir.Node] = ()) -> Counter[str]:
    return Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in graph.all_nodes() if n not in without)


def alike(operators: Counter[str]) -> Counter[str]:
    """The counts with equal names for equal work: a Max counts as a Relu, a Gemm as a MatMul, a FusedConv as a Conv and a Relu."""
    places = {"Max": ("Relu",), "Gemm": ("MatMul",), FUSED: ("Conv", "Relu")}
    counts: Counter[str] = Counter()
    for name, count in operators.items():
        for plain in places.get(name, (name,)):
            counts[plain] += count
    return counts


def _marked(node: ir.Node, sites: Sequence[Site]) -> Affine | None:
    """The affine that a node normswap::Affine stands for."""
    import onnx_ir as ir

    from normswap.folding import Affine

    x = node.inputs[0] if node.domain == DOMAIN else None
    if x is None:
        return None
    site = sites[node.attributes.get_int("site")]
    assert x.shape is not None
    rank, norm = len(x.shape), site.norm
    scale, shift = (t.cpu().numpy() for t in norm.folded(rank))
    mean, std = (t.detach().expand(norm.mean.shape) for t in norm.statistics(torch.float64))
    size = (mean.square() + std.square()).sqrt().expand(norm.sizes).reshape(scale.shape).cpu().numpy()
    double = norm.mean.dtype == torch.float64 or x.dtype == ir.DataType.DOUBLE
    return Affine(site.name, (node,), scale, shift, size=size, wide=ir.DataType.DOUBLE if double else ir.DataType.FLOAT)


def _spelled_out(node: ir.Node, constants: Constants) -> Affine | None:
    """The affine of a BatchlessNorm in an ExportedProgram, which torch has written as (Cast,) Mul, Add (, Cast), if `node` is its Add."""
    from normswap.folding import Affine
    from normswap.folding.affine import only_use

    name = _norm_around(node)
    if node.op_type != "Add" or name is None:
        return None
    product, shift = _and_constant(node, constants)
    multiply = None if product is None else product.producer()
    if multiply is None or multiply.op_type != "Mul":
        return None
    x, scale = _and_constant(multiply, constants)
    if x is None or x.shape is None:
        return None
    y, nodes, rank, index = node.outputs[0], [multiply, node], len(x.shape), list(multiply.inputs).index(x)
    casts = x.producer(), next(iter(y.consumers()), None)
    if only_use(x) and only_use(y) and all(c is not None and c.op_type == "Cast" and _norm_around(c) == name for c in casts):
        before, after = cast(tuple["ir.Node", "ir.Node"], casts)
        nodes, index = [before, *nodes, after], 0
    scale, shift = (a.astype(np.float64).reshape((1,) * (rank - a.ndim) + a.shape) for a in (scale, shift))
    return Affine(name, tuple(nodes), scale, shift, index, wide=x.dtype)


def _bias_of_rms(node: ir.Node, constants: Constants) -> Affine | None:
    """The affine that adds the bias of an RMSNorm, with the gain where that is an operator of its own (below opset 23)."""
    from normswap.folding.affine import only_use
    from normswap.folding.find import SPARE, affine_of

    name = _norm_around(node, RMSNorm)
    if node.op_type != "Add" or name is None:
        return None
    x, shift = _and_constant(node, constants)
    if x is None or x.shape is None or shift.size == 1:  # eps
        return None
    nodes, gain = [node], x.producer()
    if gain is not None and gain.op_type == "Mul" and _norm_around(gain, RMSNorm) == name and only_use(x):
        before, _ = _and_constant(gain, constants)
        if before is not None and before.shape is not None:
            nodes = [gain, node]
    return replace(affine_of(nodes, constants), name=f"{name}.bias", spare=SPARE)


def _and_constant(node: ir.Node, constants: Constants) -> tuple[ir.Value | None, Any]:
    """(the other input, the constant input as an array) of a node with two inputs; (None, None) if neither is constant."""
    for value, other in (node.inputs, node.inputs[::-1]):
        array = constants.of(other)
        if array is not None:
            return value, array
    return None, None


def _norm_around(node: ir.Node, cls: type = BatchlessNorm) -> str | None:
    """The qualified name of the layer of this class in whose forward torch traced this node, or None."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    classes = node.metadata_props.get("pkg.torch.onnx.class_hierarchy")
    if not scopes or not classes:
        return None
    pairs = zip(ast.literal_eval(scopes), ast.literal_eval(classes), strict=False)
    return next((scope for scope, known in pairs if known.startswith(f"{cls.__module__}.{cls.__name__}")), None)
