r"""What every operator asks of the bases of its inputs and its output, v = a v' + c, and what it computes with v'.

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

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from normswap.folding import einsum, layouts
from normswap.folding.affine import Affine, Array, Constants, called, fits, only_use
from normswap.folding.basis import Bases, Basis, Change, Conflict, Imprecise, Slot, Use, close, rank_of, sizes_of, total
from normswap.folding.linear import FLOATS, Linear, describe, why_not

NONLINEAR = frozenset(
    (
        *(
            "Acos",
            "Acosh",
            "Asin",
            "Asinh",
            "Atan",
            "Atanh",
            "Cos",
            "Cosh",
            "Sin",
            "Sinh",
            "Tan",
            "Tanh",
            "Erf",
            "Exp",
            "Log",
            "Pow",
            "Sqrt",
        ),
        *("Sigmoid", "HardSigmoid", "HardSwish", "Swish", "Gelu", "Mish", "Elu", "Selu", "Celu", "ThresholdedRelu", "Shrink", "Clip"),
        *("Softmax", "LogSoftmax", "Softplus", "Softsign", "Hardmax", "Reciprocal", "Sign", "Floor", "Ceil", "Round", "Mod"),
        *("LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization", "LpNormalization", "LRN"),
        *("QuantizeLinear", "DynamicQuantizeLinear", "ReduceLogSum", "ReduceLogSumExp", "ReduceProd", "ReduceSumSquare", "Attention"),
    )
)
LIMIT = 64.0  # how much larger than a value its shift may be
SHARED = 1 << 20  # bytes from which on a constant with other uses is not stored a second time
REACH = {"float16": 2.0**6, "bfloat16": 2.0**40, "float32": 2.0**40, "float64": 2.0**200}  # how far a stored value may be scaled


def spread(node: ir.Node, change: Change) -> None:
    """Store the other values around `node` as its rule asks, now that one is stored otherwise. Raises Conflict."""
    affine = change.bases.affines.get(node)
    if affine is not None:
        return _affine(affine, change)
    if node in change.bases.undone:
        raise Conflict(f"{change.bases.undone[node].name} is next to it, which was rolled back")
    rule = SPREAD.get(node.op_type) if node.domain == "" else None
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
    """Whether the dtypes hold what the new bases make of the constants. Raises Conflict."""
    affine = change.bases.affines.get(node)
    if affine is not None:
        _keeps_digits(affine, change)
    layer = None if affine is not None else describe(node, change.bases.constants)
    if layer is not None:
        _, _, out_scale, _ = bases = _around(layer, change)
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
        if not fits(np.abs(_threshold(change.of(change.bases.slot(node, 0)))), value.dtype.numpy(), zero_below=True):
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
    """x' = (x - c) / a is computed to so many digits of c: whoever reads it must not need those of a much smaller x."""
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
    _, shift, out_scale, _ = _around(layer, change)
    if layer.border and shift.any():
        raise Conflict(f"{called(node)} sees zeros around its input, which a shift would change")
    if not out_scale.all():
        raise Conflict(f"{called(node)} would be divided by 0")
    if not layer.biased:
        y = node.outputs[0]
        answer = layer.response(shift).reshape((1,) * layer.axis + (-1,) + (1,) * (layer.rank - layer.axis - 1))
        if not change.fixed(y):
            change.set(y, change.of(y).shifted(answer if answer.any() else np.zeros((1,) * layer.rank)))
        elif not close(*np.broadcast_arrays(answer, change.of(y).shift)):
            raise Conflict(f"{called(node)} has no bias to take a shift")


def _around(layer: Linear, change: Change) -> tuple[Array, Array, Array, Array]:
    x = layer.node.inputs[0]
    assert x is not None
    return (
        *change.of(change.bases.slot(layer.node, 0)).along(layer.in_axis, layer.inputs),
        *change.of(layer.node.outputs[0]).along(layer.axis, layer.outputs),
    )


# -- sums ------------------------------------------------------------------------------------------------------------------------------


def _sum(node: ir.Node, change: Change) -> None:
    y = node.outputs[0]
    slots = [change.bases.slot(node, index) for index in range(len(node.inputs))]
    if node.op_type == "Sum" and change.bases.constants.opset < 8 and any(isinstance(slot, Use) for slot in slots):
        raise Conflict(f"{called(node)} adds constants of one size only in opset {change.bases.constants.opset}")
    signs = [1.0, -1.0] if node.op_type == "Sub" else [1.0] * len(slots)
    fixed = [slot for slot in (*slots, y) if change.fixed(slot)]
    rank = rank_of(y)
    scale = _raised(change.of(fixed[0]).scale, rank)
    left = [slot for slot in dict.fromkeys((*slots, y)) if not change.fixed(slot)]
    shifts = [sign * _raised(change.of(slot).shift, rank) for slot, sign in zip(slots, signs, strict=True)]
    missing = total(_raised(change.of(y).shift, rank), *(-shift for shift in shifts))
    for slot in fixed:
        if not close(*np.broadcast_arrays(_raised(change.of(slot).scale, rank), scale)):
            raise Conflict(f"the values that {called(node)} adds would be scaled differently")
    if not left:
        size = max(float(np.abs(array).max()) for array in (change.of(y).shift, *shifts))
        if not np.all(np.abs(missing) <= 1e-12 * size):
            raise Conflict(f"the values that {called(node)} adds would be shifted differently")
        return
    taker = _taker(node, left, change) if missing.any() else None
    for slot in left:
        shift = _raised(change.of(slot).shift, rank)
        if slot is taker:
            shift = total(shift, -missing if slot is y else missing * signs[slots.index(slot)])
        change.set(slot, Basis(*(_lowered(array, slot, node) for array in (scale, shift))))


def _taker(node: ir.Node, left: Sequence[Slot], change: Change) -> Slot:
    """Who is shifted to make up for the others: a constant, what a bias can shift, the result, anything."""
    y = node.outputs[0]
    constants = [slot for slot in left if isinstance(slot, Use)]
    biased = [slot for slot in left if slot is not y and absorbs(slot, change.bases)]
    return next(iter((*constants, *biased, *(slot for slot in left if slot is y), *left)))


def absorbs(slot: Slot, bases: Bases) -> bool:
    """Whether a shift of this value ends in a bias or a constant that nothing else depends on."""
    if isinstance(slot, Use):
        return True
    node = slot.producer()
    if node is None or not only_use(slot):
        return False
    if node in bases.affines:
        return bases.affines[node] not in bases.gone
    layer = describe(node, bases.constants)
    if layer is not None:
        return layer.biased
    if node.domain != "" or not (node.op_type in ("Add", "Sub", "Sum", "Mul") or layouts.moves(node)):
        return False
    operands = range(len(node.inputs)) if node.op_type in ("Add", "Sub", "Sum") else range(1)
    try:
        return any(absorbs(bases.slot(node, index), bases) for index in operands)
    except Conflict:
        return False


def _raised(array: Array, rank: int) -> Array:
    return array.reshape((1,) * (rank - array.ndim) + array.shape)


def _lowered(array: Array, slot: Slot, node: ir.Node) -> Array:
    """`array`, which broadcasts against the result of an elementwise operation, for one of its operands."""
    sizes = sizes_of(slot)
    lead, own = array.shape[: array.ndim - len(sizes)], array.shape[array.ndim - len(sizes) :]
    if isinstance(slot, Use):
        return array  # a constant may grow
    if any(size > 1 for size in lead) or any(a > 1 and s == 1 for a, s in zip(own, sizes, strict=True)):
        raise Conflict(f"{called(node)} repeats a value that would have to differ along the channels")
    return array.reshape(own)


# -- products --------------------------------------------------------------------------------------------------------------------------


def _mul(node: ir.Node, change: Change) -> None:
    slots = [change.bases.slot(node, index) for index in range(2)]
    y, rank = node.outputs[0], rank_of(node.outputs[0])
    values = [change.bases.constants.of(v) for v in node.inputs]
    if values[0] is not None and node.op_type == "Div":
        raise Conflict(f"{called(node)} divides a constant by it")
    where = next((i for i, value in enumerate(values) if value is not None), None)
    if where is None:
        return _product(node, slots, change)
    x, use, value = slots[1 - where], slots[where], values[where]
    assert value is not None
    factor = _raised(value.astype(np.float64), max(rank, value.ndim))
    if node.op_type == "Div":
        factor = 1 / factor
    a_x, a_y = change.of(x), change.of(y)
    if change.fixed(x) and not change.fixed(y):
        # One number for all stays one; a number per channel is as good as any other.
        ratio = change.of(use).scale if value.size > 1 and not change.fixed(use) else np.ones((1,) * rank)
        keep = value.size > 1
        scale = a_y.scale if keep else _raised(a_x.scale, rank) * _raised(ratio, rank)
        change.set(y, Basis(scale, _trimmed(_raised(a_x.shift, rank) * factor)))
    elif change.fixed(y) and not change.fixed(x):
        if not factor.all() and a_y.shift.any():
            raise Conflict(f"{called(node)} multiplies by 0")
        scale = _raised(a_x.scale, rank) if value.size > 1 else a_y.scale
        shift = a_y.shift / np.where(factor == 0, 1.0, factor)
        change.set(x, Basis(_lowered(scale, x, node), _lowered(_trimmed(shift), x, node)))
    a_x, a_y = change.of(x), change.of(y)
    if not close(*np.broadcast_arrays(_raised(a_x.shift, rank) * factor, a_y.shift)):
        raise Conflict(f"{called(node)} would need a shift after it")
    if not (a_x.scale.all() and a_y.scale.all()):
        raise Conflict(f"{called(node)} would be divided by 0")
    needed = a_y.scale / _raised(a_x.scale, rank)
    change.set(use, Basis(1 / needed if node.op_type == "Div" else needed, np.zeros((1,) * needed.ndim)))
    return None


def _trimmed(shift: Array) -> Array:
    return shift if shift.any() else np.zeros((1,) * shift.ndim)


def _product(node: ir.Node, slots: Sequence[Slot], change: Change) -> None:
    y, rank = node.outputs[0], rank_of(node.outputs[0])
    if slots[0] is slots[1]:
        raise Conflict(f"{called(node)} takes it twice")
    if node.op_type == "Div":
        raise Conflict(f"{called(node)} divides two values that depend on the input")
    if any(change.of(slot).shift.any() for slot in (*slots, y)):
        raise Conflict(f"{called(node)} multiplies two values, of which none may be shifted")
    scales = [_raised(change.of(slot).scale, rank) for slot in slots]
    if not change.fixed(y):
        change.set(y, change.of(y).scaled(scales[0] * scales[1]))
    elif not all(change.fixed(slot) for slot in slots):
        # The larger operand takes it: the other is a gate with less axes.
        free = [i for i in range(2) if not change.fixed(slots[i])]
        index = max(free, key=lambda i: sum(size != 1 for size in sizes_of(slots[i])))
        other = scales[1 - index]
        if not other.all():
            raise Conflict(f"{called(node)} would be divided by 0")
        change.set(slots[index], change.of(slots[index]).scaled(_lowered(change.of(y).scale / other, slots[index], node)))
    scales = [_raised(change.of(slot).scale, rank) for slot in slots]
    if not close(*np.broadcast_arrays(scales[0] * scales[1], change.of(y).scale)):
        raise Conflict(f"the values that {called(node)} multiplies would be scaled differently")


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
    if basis.shift.any() and change.bases.blocked and basis.rank == 4:
        raise Conflict(f"{called(node)} would become a maximum, which takes longer in onnxruntime on a CPU than the norm does")
    if change.fixed(x):
        shift = np.where(basis.scale == 0, np.maximum(basis.shift, 0.0), basis.shift)
        change.set(y, basis.shifted(shift))
    else:
        if not basis.scale.all():
            raise Conflict(f"{called(node)} would be divided by 0")
        change.set(x, basis)


def _leaky(node: ir.Node, change: Change) -> None:
    x, y = change.bases.slot(node, 0), node.outputs[0]
    basis = change.of(x) if change.fixed(x) else change.of(y)
    if node.op_type == "PRelu" and change.bases.constants.of(node.inputs[1]) is None:
        raise Conflict(f"{called(node)} is next to it, whose slope depends on the input")
    _positive(basis.scale, node)
    if basis.shift.any():
        raise Conflict(f"{called(node)} is next to it, which a shift would move")
    change.set(y, basis)
    change.set(x, basis)


def _neg(node: ir.Node, change: Change) -> None:
    x, y = change.bases.slot(node, 0), node.outputs[0]
    basis = change.of(x) if change.fixed(x) else change.of(y)
    opposite = basis.shifted(-basis.shift)
    change.set(y if change.fixed(x) else x, opposite)


def _spatial(node: ir.Node, change: Change) -> None:
    """Pooling, Resize: along axes 2 and up."""
    x, y = change.bases.slot(node, 0), node.outputs[0]
    basis = change.of(x) if change.fixed(x) else change.of(y)
    if any(size > 1 for array in (basis.scale, basis.shift) for size in array.shape[2:]):
        raise Conflict(f"{called(node)} works along the axis of the channels")
    if node.op_type in ("MaxPool", "GlobalMaxPool"):
        if len(node.outputs) > 1:
            raise Conflict(f"{called(node)} also gives indices")
        _positive(basis.scale, node)
    if basis.shift.any() and _sees_zeros(node, change.bases.constants):
        raise Conflict(f"{called(node)} sees zeros around its input, which a shift would change")
    change.set(y, basis)
    change.set(x, basis)


def _sees_zeros(node: ir.Node, constants: Constants) -> bool:
    if node.op_type == "AveragePool":
        padded = any(node.attributes.get_ints("pads", ())) or node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
        return bool(node.attributes.get_int("count_include_pad", 0)) and bool(padded or node.attributes.get_int("ceil_mode", 0))
    return False


def _pad(node: ir.Node, change: Change) -> None:
    """Pads of less than 0 cut off; along an axis on which something varies, neither can be."""
    constants, x, y = change.bases.constants, change.bases.slot(node, 0), node.outputs[0]
    rank, (_, amounts, filler, where) = rank_of(y), (*node.inputs, None, None, None)[:4]
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
    basis = change.of(x) if change.fixed(x) else change.of(y)
    padded = {int(axis) % rank for axis, pair in zip(axes, pads.reshape(2, -1).T, strict=True) if pair.any()}
    if any(array.shape[axis] > 1 for array in (basis.scale, basis.shift) for axis in padded):
        raise Conflict(f"{called(node)} works along the axis of the channels")
    if adds and basis.shift.any():
        raise Conflict(f"{called(node)} adds zeros around its input, which a shift would change")
    change.set(y, basis)
    change.set(x, basis)


def _cumsum(node: ir.Node, change: Change) -> None:
    x, y = change.bases.slot(node, 0), node.outputs[0]
    basis, axis = change.of(x) if change.fixed(x) else change.of(y), change.bases.constants.of(node.inputs[1])
    if axis is None or basis.scale.shape[int(axis.reshape(()))] > 1:
        raise Conflict(f"{called(node)} works along the axis of the channels, or one that is not known before")
    if basis.shift.any():
        raise Conflict(f"{called(node)} adds up a shift as often as there are values")
    change.set(y, basis)
    change.set(x, basis)


def _resize(node: ir.Node, change: Change) -> None:
    x = node.inputs[0]
    mode, place = node.attributes.get_string("mode", "nearest"), node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    sizes = None if x is None else sizes_of(x)
    if sizes is None or mode not in ("nearest", "linear") or place == "tf_crop_and_resize" or sizes[1] != sizes_of(node.outputs[0])[1]:
        raise Conflict(f"{called(node)} is next to it, which is not a mean of its input")
    _spatial(node, change)


def _reduce(node: ir.Node, change: Change) -> None:
    """ReduceMean, ReduceSum, ReduceMax, ReduceMin over axes of which nothing varies."""
    x, y = change.bases.slot(node, 0), node.outputs[0]
    rank = rank_of(x)
    given = change.bases.constants.of(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    axes = [int(a) % rank for a in (given if given is not None else node.attributes.get_ints("axes", ()))]
    if not axes:
        raise Conflict(f"{called(node)} reduces all axes, or axes that are not known before")
    kept = bool(node.attributes.get_int("keepdims", 1))
    if change.fixed(x):
        arrays = [change.of(x).scale, change.of(x).shift]
        if any(array.shape[axis] > 1 for array in arrays for axis in axes):
            raise Conflict(f"{called(node)} works along the axis of the channels")
        inside = Basis(*arrays)
        other, moved = y, Basis(*(a if kept else a.reshape([s for i, s in enumerate(a.shape) if i not in axes]) for a in arrays))
    else:
        inside = Basis(*(a if kept else np.expand_dims(a, tuple(axes)) for a in (change.of(y).scale, change.of(y).shift)))
        other, moved = x, inside  # type: ignore[assignment]
    if node.op_type in ("ReduceMax", "ReduceMin"):
        _positive(inside.scale, node)
    if node.op_type == "ReduceSum" and inside.shift.any():
        raise Conflict(f"{called(node)} adds up a shift as often as there are values")
    change.set(other, moved)


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


Spread = Callable[[ir.Node, Change], None]
SPREAD: dict[str, Spread] = {
    **layouts.SPREAD,
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "MatMul"), _linear),
    **dict.fromkeys(("Add", "Sub", "Sum"), _sum),
    **dict.fromkeys(("Mul", "Div"), _mul),
    "Einsum": einsum.spread,
    "Neg": _neg,
    "Relu": _relu,
    **dict.fromkeys(("LeakyRelu", "PRelu", "Abs"), _leaky),
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"), _spatial),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"), _reduce),
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    "Pad": _pad,
    "CumSum": _cumsum,
}


# -- rewriting the graph ---------------------------------------------------------------------------------------------------------------


def write(bases: Bases) -> None:
    """Let every operator compute with values as they are stored. Affines are the caller's."""
    change = Change(bases)
    seen = dict.fromkeys(node for slot, basis in bases.known.items() if not basis.is_identity() for node in _neighbours(slot))
    for node in seen:
        if node in bases.affines:
            continue
        layer = describe(node, bases.constants)
        if layer is not None:
            _write_linear(layer, change)
        elif node.op_type == "Relu" and node.domain == "":
            _write_relu(node, bases)
        for index in range(len(node.inputs)):
            basis = bases.known.get(Use(node, index))
            if basis is not None and not basis.is_identity():
                _write_constant(node, index, basis, bases.constants)


def _neighbours(slot: Slot) -> list[ir.Node]:
    if isinstance(slot, Use):
        return [slot.node]
    producer = slot.producer()
    return [*([] if producer is None else [producer]), *slot.consumers()]


def _write_linear(layer: Linear, change: Change) -> None:
    scale, shift, out_scale, out_shift = _around(layer, change)
    node, constants = layer.node, change.bases.constants
    if (scale == 1).all() and (out_scale == 1).all() and not shift.any() and not out_shift.any():
        return
    dtype = layer.weight.dtype
    assert dtype is not None
    bias = layer.rebased(layer.bias, scale, shift, out_scale, out_shift)
    weight = constants.scaled(layer.weight, layer.weight_factor(scale, out_scale), layer.view)
    assert weight is not None
    node.replace_input_with(1, weight)
    if layer.biased and (bias.any() or layer.bias.any()):
        set_bias(node, constants.bias(layer.weight, bias, dtype.numpy()))


def set_bias(node: ir.Node, bias: ir.Value) -> None:
    """Give a linear layer its input 2."""
    if node.op_type == "MatMul":
        node.op_type = "Gemm"  # the two-dimensional MatMul that has a bias
    if "beta" in node.attributes:
        node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)  # the new bias contains it
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, bias)


def _write_relu(node: ir.Node, bases: Bases) -> None:
    x = node.inputs[0]
    assert x is not None
    basis = bases.of(x)
    if not basis.shift.any():
        return
    assert x.dtype is not None
    node.op_type = "Max"
    node.resize_inputs(2)
    node.replace_input_with(1, bases.constants.add(f"{node.name}_threshold", _threshold(basis).astype(x.dtype.numpy())))


def _threshold(basis: Basis) -> Array:
    """Below which the stored input of a ReLU counts for no more than this: -c / a, and anything where a = 0."""
    return np.where(basis.scale == 0, 0.0, -basis.shift / np.where(basis.scale == 0, 1.0, basis.scale))


def _write_constant(node: ir.Node, index: int, basis: Basis, constants: Constants) -> None:
    value = node.inputs[index]
    array, source = constants.of(value), constants.exact(value)
    assert value is not None
    assert array is not None
    assert source is not None
    stored = (source.astype(np.float64) - basis.shift) / basis.scale
    while stored.ndim > array.ndim and stored.shape[0] == 1:
        stored = stored[0]  # onnxruntime makes a Gemm of a MatMul and an Add only if the bias has one dimension
    node.replace_input_with(index, constants.add(f"{value.name}_folded", stored, array.dtype, wanted=value.name))
