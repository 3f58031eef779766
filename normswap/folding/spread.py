r"""How an affine moves through an operator (a ReLU, a sum, a pooling): what each asks of the bases of its inputs and output, v = a v' + c.

    operator                    scales                      shifts                          is rewritten to
    linear (linear.py)          any; none 0 at the output   any; 0 at the input if some     W a_x / a_y,  (b + W c_x - c_y) / a_y
                                                            outputs see a border of zeros
    MatMul without a bias       the same                    c_y = W c_x                     W a_x / a_y
    Einsum with a constant      the same (einsum.py)        c_y = W c_x                     W a_x / a_y
    Neg                         a_y = a_x                   c_y = -c_x                      itself
    Add, Sub, Sum               all equal                   c_y = c_1 + c_2 (minus)         itself; a constant k to (k - c_k) / a_k
    Mul, Div by a constant k    a_y = a_x a_k               c_y = k c_x                     itself; k to k / a_k
    Mul of two values           a_y = a_1 a_2               all 0                           itself
    Relu                        a_y = a_x >= 0              c_y = c_x                       max(x', -c / a), itself if c = 0
    LeakyRelu, PRelu, Abs       a_y = a_x >= 0              all 0                           itself
    max or min over space       a_y = a_x >= 0              c_y = c_x                       itself
    mean over space             a_y = a_x                   c_y = c_x; 0 if it counts a     itself
                                                            border of zeros
    sum over space, CumSum      a_y = a_x                   all 0                           itself
    Resize (nearest, linear)    a_y = a_x                   c_y = c_x                       itself
    Pad                         a_y = a_x                   c_y = c_x; 0 where zeros are    itself
                                                            added
    moving values (layouts.py)  moved likewise              moved likewise                  itself
    the affine y = s x + t      any; none 0 at y            any                             s a_x / a_y,  (s c_x + t - c_y) / a_y
      if it is gone             a_y = s a_x                 c_y = s c_x + t                 nothing
    anything else               1                           0                               itself

Relu: for a > 0, max(a x' + c, 0) = a max(x', -c / a) + c. For a = 0 the result is the constant max(c, 0), which is then c_y.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir

from normswap.folding import einsum, elementwise, layouts
from normswap.folding.affine import Affine, Array, Constants, called, fits
from normswap.folding.basis import Basis, Change, Conflict, Imprecise, Rule, Use, give_shift, rank_of, sizes_of
from normswap.folding.linear import FLOATS, Linear, describe, is_padded, why_not

NONLINEAR = frozenset(
    (
        *("Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Cos", "Cosh", "Sin", "Sinh", "Tan", "Tanh"),
        *("Erf", "Exp", "Log", "Pow", "Sqrt"),
        *("Sigmoid", "HardSigmoid", "HardSwish", "Swish", "Gelu", "Mish", "Elu", "Selu", "Celu", "ThresholdedRelu", "Shrink", "Clip"),
        *("Softmax", "LogSoftmax", "Softplus", "Softsign", "Hardmax", "Reciprocal", "Sign", "Floor", "Ceil", "Round", "Mod"),
        *("LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization", "LpNormalization", "LRN"),
        *("QuantizeLinear", "DynamicQuantizeLinear", "ReduceLogSum", "ReduceLogSumExp", "ReduceProd", "ReduceSumSquare", "Attention"),
    )
)
LIMIT = 64.0  # how much larger than a value its shift may be
SHARED = 1 << 20  # bytes from which on a constant with other uses is not stored a second time
REACH = {"float16": 2.0**6, "bfloat16": 2.0**40, "float32": 2.0**40, "float64": 2.0**200}  # how far a stored value may be scaled


def run(change: Change) -> Change:
    """Run the rules until every operator keeps its own. Raises Conflict."""
    while change.queue:
        node = change.queue.popleft()
        change.nodes[node] = None
        spread(node, change)
    for node in change.nodes:
        check(node, change)
    return change


def spread(node: ir.Node, change: Change) -> None:
    """Set the other bases around `node` by its rule, after one of them has changed. Raises Conflict."""
    affine = change.bases.affines.get(node)
    if affine is not None:
        return _affine(affine, change)
    if node in change.bases.kept:
        raise Conflict(f"{change.bases.kept[node].name} is next to it, which was rolled back")
    rule = RULES.get(node.op_type) if node.domain == "" else None
    if rule is None:
        raise Conflict(f"{called(node)} is next to it, {_what_it_is(node)}")
    return rule(node, change)


def _what_it_is(node: ir.Node) -> str:
    if node.domain != "":
        return f"an operator of {node.domain} that folding does not know"
    if node.op_type == "Dropout":
        return "which drops values, or gives a mask that something reads"
    return "which is neither linear nor homogeneous" if node.op_type in NONLINEAR else "an operator that no fold is known through"


def check(node: ir.Node, change: Change) -> None:
    """Raise Conflict if a constant that the new bases change does not fit its dtype."""
    affine = change.bases.affines.get(node)
    if affine is not None:
        _keeps_digits(affine, change)
    layer = None if affine is not None else describe(node, change.bases.constants)
    if layer is not None:
        _, _, out_scale, _ = bases = around(layer, change)
        dtype = layer.weight.dtype
        assert dtype is not None
        reach = REACH[dtype.numpy().name]
        if not np.all((np.abs(out_scale) <= reach) & (np.abs(out_scale) >= 1 / reach)):
            raise Conflict(f"the output of {called(node)} would be scaled by up to {_extreme(out_scale):.0e}")
        if not layer.holds(*bases):
            raise Conflict(f"the weight of {called(node)} would overflow or lose digits")
    if node.op_type == "Relu" and affine is None:
        value = node.inputs[0]
        assert value is not None
        assert value.dtype is not None
        if not fits(np.abs(threshold_of(change.of(change.bases.slot(node, 0)))), value.dtype.numpy(), zero_below=True):
            raise Conflict(f"the threshold of {called(node)} would overflow")
    for index in range(len(node.inputs)):
        use = Use(node, index)
        if use in change.new:
            array = change.bases.constants.of(node.inputs[index])
            assert array is not None
            basis = change.new[use]
            with np.errstate(all="ignore"):
                stored = (array.astype(np.float64) - basis.shift) / basis.scale
            if array.dtype.name not in FLOATS or not fits(np.abs(stored), array.dtype, zero_below=True):
                raise Conflict(f"a constant of {called(node)} would overflow")
            value = node.inputs[index]
            assert value is not None
            if array.nbytes >= SHARED and len(value.uses()) > 1 and not basis.is_identity():
                raise Conflict(f"{value.name} is large and used elsewhere, too")


def _keeps_digits(affine: Affine, change: Change) -> None:
    """Raise Imprecise if the shift c is much larger than x: then x' = (x - c) / a has few digits left for x."""
    new = change.new.get(affine.x)
    if new is None or change.bases.of(affine.x).agrees(new):
        return
    if not np.all(np.abs(new.shift) <= LIMIT * affine.typical()):
        raise Imprecise(f"the shift is more than {LIMIT:.0f} times as large as what it shifts")


def _extreme(scale: Array) -> float:
    smallest = float(np.abs(scale).min())
    return max(float(np.abs(scale).max()), 1 / smallest if smallest else np.inf)


# -- linear layers -------------------------------------------------------------------------------------------------------------------


def _linear(node: ir.Node, change: Change) -> None:
    layer = describe(node, change.bases.constants)
    if layer is None:
        raise Conflict(why_not(node, change.bases.constants))
    _, shift, out_scale, _ = around(layer, change)
    if layer.border and shift.any():
        raise Conflict(f"{called(node)} sees zeros around its input, which a shift would change")
    if not out_scale.all():
        raise Conflict(f"{called(node)} would be divided by 0")
    if not layer.biased:
        give_shift(node, layer.response(shift).reshape((1,) * layer.axis + (-1,) + (1,) * (layer.rank - layer.axis - 1)), change)


def around(layer: Linear, change: Change) -> tuple[Array, Array, Array, Array]:
    return (
        *change.of(change.bases.slot(layer.node, 0)).along(layer.in_axis, layer.inputs),
        *change.of(layer.node.outputs[0]).along(layer.axis, layer.outputs),
    )


# -- homogeneous functions -------------------------------------------------------------------------------------------------------------


def _positive(scale: Array, node: ir.Node) -> None:
    if (scale < 0).any():
        count = int(np.count_nonzero(scale < 0))
        raise Conflict(f"{called(node)} is next to it and {count} of {scale.size} scales are negative")


def _relu(node: ir.Node, change: Change) -> None:
    x, y = change.bases.slot(node, 0), node.outputs[0]
    basis = change.of(x) if change.fixed(x) else change.of(y)
    _positive(basis.scale, node)
    if basis.shift.any() and not change.thresholds:
        raise Conflict(f"{called(node)} is next to it, which a shift would move")
    if basis.shift.any() and change.bases.constants.opset < 8:
        raise Conflict(f"{called(node)} would become a maximum with a number per channel, which opset {change.bases.constants.opset} lacks")
    if basis.shift.any() and not change.bases.spatial_thresholds and basis.rank == 4:
        raise Conflict(f"{called(node)} would become a maximum, which takes longer in onnxruntime on a CPU than the norm does")
    if change.fixed(x):
        shift = np.where(basis.scale == 0, np.maximum(basis.shift, 0.0), basis.shift)
        change.set(y, basis.shifted(shift))
    else:
        if not basis.scale.all():
            raise Conflict(f"{called(node)} would be divided by 0")
        change.set(x, basis)


def _neg(node: ir.Node, change: Change) -> None:
    x, y = change.bases.slot(node, 0), node.outputs[0]
    basis = change.of(x) if change.fixed(x) else change.of(y)
    change.set(y if change.fixed(x) else x, basis.shifted(-basis.shift))


# -- one basis on both sides -----------------------------------------------------------------------------------------------------------

Ask = Callable[[ir.Node, Basis, Constants], None]


def _same(ask: Ask) -> Rule:
    """The rule of an operator whose input and output have one basis, if `ask` raises no Conflict about it."""

    def rule(node: ir.Node, change: Change) -> None:
        x, y = change.bases.slot(node, 0), node.outputs[0]
        basis = change.of(x) if change.fixed(x) else change.of(y)
        ask(node, basis, change.bases.constants)
        change.set(y, basis)
        change.set(x, basis)

    return rule


def _alike_along(axes: Iterable[int], node: ir.Node, basis: Basis) -> None:
    if any(array.shape[axis] > 1 for array in (basis.scale, basis.shift) for axis in axes):
        raise Conflict(f"{called(node)} works along the axis of the channels")


def _leaky(node: ir.Node, basis: Basis, constants: Constants) -> None:
    """The condition of LeakyRelu, PRelu and Abs."""
    if node.op_type == "PRelu" and constants.of(node.inputs[1]) is None:
        raise Conflict(f"{called(node)} is next to it, whose slope depends on the input")
    _positive(basis.scale, node)
    if basis.shift.any():
        raise Conflict(f"{called(node)} is next to it, which a shift would move")


def _spatial(node: ir.Node, basis: Basis, constants: Constants) -> None:
    """The condition of pooling and Resize, which work along axes 2 and up."""
    _alike_along(range(2, basis.rank), node, basis)
    if node.op_type in ("MaxPool", "GlobalMaxPool"):
        if len(node.outputs) > 1:
            raise Conflict(f"{called(node)} also gives indices")
        _positive(basis.scale, node)
    if basis.shift.any() and _sees_zeros(node):
        raise Conflict(f"{called(node)} sees zeros around its input, which a shift would change")


def _sees_zeros(node: ir.Node) -> bool:
    if node.op_type != "AveragePool" or not node.attributes.get_int("count_include_pad", 0):
        return False
    return is_padded(node) or bool(node.attributes.get_int("ceil_mode", 0))


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
        _positive(inside.scale, node)
    if node.op_type == "ReduceSum" and inside.shift.any():
        raise Conflict(f"{called(node)} adds up a shift as often as there are values")
    change.set(other, moved)


def threshold_of(basis: Basis) -> Array:
    """The constant in max(x', constant) that a ReLU of a shifted x becomes: -c / a, and anything where a = 0."""
    return np.where(basis.scale == 0, 0.0, -basis.shift / np.where(basis.scale == 0, 1.0, basis.scale))


# -- the affines themselves ------------------------------------------------------------------------------------------------------------


def _affine(affine: Affine, change: Change) -> None:
    if not change.is_gone(affine):
        if not change.of(affine.y).scale.all():
            raise Conflict(f"{affine.name} would be divided by 0")
        return
    x, y = affine.x, affine.y
    if change.fixed(x):
        change.set(y, change.of(x).then(affine.scale, affine.shift))
    else:
        change.set(x, change.of(y).before(affine.scale, affine.shift))


RULES: dict[str, Rule] = {
    **layouts.RULES,
    **elementwise.RULES,
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "MatMul"), _linear),
    "Einsum": einsum.spread,
    "Neg": _neg,
    "Relu": _relu,
    **dict.fromkeys(("LeakyRelu", "PRelu", "Abs"), _same(_leaky)),
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"), _same(_spatial)),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"), _reduce),
    **dict.fromkeys(("Resize", "Upsample"), _same(_resize)),
    "Pad": _same(_pad),
    "CumSum": _same(_cumsum),
}
