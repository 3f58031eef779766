r"""How an affine moves through pooling, Resize, Pad, CumSum and Reduce: operators that work along some axes and not along the channels.

    operator                    scales           shifts                                   is rewritten to
    max or min over space       a_y = a_x >= 0   c_y = c_x                                itself
    mean over space             a_y = a_x        c_y = c_x; 0 if it counts a border of    itself
                                                 zeros
    sum over space, CumSum      a_y = a_x        all 0                                    itself
    Resize (nearest, linear)    a_y = a_x        c_y = c_x                                itself
    Pad                         a_y = a_x        c_y = c_x; 0 where zeros are added       itself

Here v = a v' + c for each value, as in `basis.py`.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from normswap.folding.affine import Constants, called
from normswap.folding.basis import Basis, Change, Conflict, Rule, need_positive, rank_of, same_on_both_sides, sizes_of
from normswap.folding.linear import is_padded


def _spatial(node: ir.Node, basis: Basis, constants: Constants) -> None:
    """The condition of pooling and Resize, which work along axes 2 and up."""
    _alike_along(range(2, basis.rank), node, basis)
    if node.op_type in ("MaxPool", "GlobalMaxPool"):
        if len(node.outputs) > 1:
            raise Conflict(f"{called(node)} also gives indices")
        need_positive(basis.scale, node)
    if basis.shift.any() and _sees_zeros(node):
        raise Conflict(f"{called(node)} sees zeros around its input, which a shift would change")


def _sees_zeros(node: ir.Node) -> bool:
    if node.op_type != "AveragePool" or not node.attributes.get_int("count_include_pad", 0):
        return False
    return is_padded(node) or bool(node.attributes.get_int("ceil_mode", 0))


def _alike_along(axes: Iterable[int], node: ir.Node, basis: Basis) -> None:
    if any(array.shape[axis] > 1 for array in (basis.scale, basis.shift) for axis in axes):
        raise Conflict(f"{called(node)} works along the axis of the channels")


def _resize(node: ir.Node, basis: Basis, constants: Constants) -> None:
    x = node.inputs[0]
    mode, place = node.attributes.get_string("mode", "nearest"), node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    sizes = None if x is None else sizes_of(x)
    if sizes is None or mode not in ("nearest", "linear") or place == "tf_crop_and_resize" or sizes[1] != sizes_of(node.outputs[0])[1]:
        raise Conflict(f"{called(node)} is next to it, which is not a mean of its input")
    _spatial(node, basis, constants)


def _pad(node: ir.Node, basis: Basis, constants: Constants) -> None:
    """The condition of Pad. Negative pads cut values off. Along an axis on which the basis varies there may be no pad of either sign."""
    rank, (_, amounts, filler, where) = basis.rank, (*node.inputs, None, None, None)[:4]
    pads = constants.of(amounts) if amounts is not None else np.asarray(node.attributes.get_ints("pads", ()))  # opset 10 has an attribute
    axes = list(range(rank)) if where is None else constants.of(where)
    if pads is None or axes is None or len(pads) != 2 * len(axes):
        raise Conflict(f"{called(node)} depends on the input")
    adds = bool((pads > 0).any()) and node.attributes.get_string("mode", "constant") == "constant"
    zero = node.attributes.get_float("value", 0.0) == 0
    if filler is not None:
        value = constants.of(filler)
        zero = value is not None and not value.any()
    if adds and not zero:
        raise Conflict(f"{called(node)} fills with something else than zeros")
    _alike_along({int(axis) % rank for axis, pair in zip(axes, pads.reshape(2, -1).T, strict=True) if pair.any()}, node, basis)
    if adds and basis.shift.any():
        raise Conflict(f"{called(node)} adds zeros around its input, which a shift would change")


def _cumsum(node: ir.Node, basis: Basis, constants: Constants) -> None:
    axis = constants.of(node.inputs[1])
    if axis is None or basis.scale.shape[int(axis.reshape(()))] > 1:
        raise Conflict(f"{called(node)} works along the axis of the channels, or one that is not known before")
    if basis.shift.any():
        raise Conflict(f"{called(node)} adds up a shift as often as there are values")


def _reduce(node: ir.Node, change: Change) -> None:
    """The rule of ReduceMean, ReduceSum, ReduceMax and ReduceMin, over axes along which no basis varies."""
    x, y = change.bases.slot(node, 0), node.outputs[0]
    rank = rank_of(x)
    given = change.bases.constants.of(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    axes = [int(a) % rank for a in (given if given is not None else node.attributes.get_ints("axes", ()))]
    if not axes:
        raise Conflict(f"{called(node)} reduces all axes, or axes that are not known before")
    kept = bool(node.attributes.get_int("keepdims", 1))
    if change.fixed(x):
        inside = change.of(x)
        _alike_along(axes, node, inside)
        arrays = (inside.scale, inside.shift)
        other, moved = y, Basis(*(a if kept else a.reshape([s for i, s in enumerate(a.shape) if i not in axes]) for a in arrays))
    else:
        inside = Basis(*(a if kept else np.expand_dims(a, tuple(axes)) for a in (change.of(y).scale, change.of(y).shift)))
        other, moved = x, inside  # type: ignore[assignment]
    if node.op_type in ("ReduceMax", "ReduceMin"):
        need_positive(inside.scale, node)
    if node.op_type == "ReduceSum" and inside.shift.any():
        raise Conflict(f"{called(node)} adds up a shift as often as there are values")
    change.set(other, moved)


RULES: dict[str, Rule] = {
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"), same_on_both_sides(_spatial)),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"), _reduce),
    **dict.fromkeys(("Resize", "Upsample"), same_on_both_sides(_resize)),
    "Pad": same_on_both_sides(_pad),
    "CumSum": same_on_both_sides(_cumsum),
}
