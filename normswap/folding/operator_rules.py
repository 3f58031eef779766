r"""How an affine moves through an operator (a ReLU, a sum, a pooling): what each asks of the bases of its inputs and output, v = a v' + c.

    operator                    scales                      shifts                          is rewritten to
    linear (linear.py)          any; none 0 at the output   any; 0 at the input if some     W a_x / a_y,  (b + W c_x - c_y) / a_y
                                                            outputs see a border of zeros
    MatMul without a bias       the same                    c_y = W c_x                     W a_x / a_y
    Einsum with a constant      the same (einsum.py)        c_y = W c_x                     W a_x / a_y
    Relu and its like           as in activations.py
    pooling, Resize, Pad        as in spatial.py
    Add, Sub, Sum               all equal                   c_y = c_1 + c_2 (minus)         itself; a constant k to (k - c_k) / a_k
    Mul, Div by a constant k    a_y = a_x a_k               c_y = k c_x                     itself; k to k / a_k
    Mul of two values           a_y = a_1 a_2               all 0                           itself
    moving values (layouts.py)  moved likewise              moved likewise                  itself
    the affine y = s x + t      any; none 0 at y            any                             s a_x / a_y,  (s c_x + t - c_y) / a_y
      if it is gone             a_y = s a_x                 c_y = s c_x + t                 nothing
    Shape, Size                 any                         any                             itself
    anything else               1                           0                               itself

The rules that are shared by several operators, one file for each kind, have their own tables: layouts, elementwise, activations, spatial.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from normswap.folding import activations, einsum, elementwise, layouts, spatial
from normswap.folding.activations import threshold_of
from normswap.folding.affine import Affine, Array, called, fits
from normswap.folding.basis import Change, Conflict, Imprecise, Rule, Use, give_shift
from normswap.folding.channels import METADATA
from normswap.folding.linear import FLOATS, Linear, describe, why_not

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


def _sees_no_number(node: ir.Node, change: Change) -> None:
    """The rule of Shape and Size."""


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
    **activations.RULES,
    **spatial.RULES,
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "MatMul"), _linear),
    "Einsum": einsum.spread,
    **dict.fromkeys(METADATA, _sees_no_number),
}
