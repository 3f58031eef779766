r"""How an affine moves through sums and products (Add, Sub, Mul, Div). Other operators, and the table of all, are in `operator_rules.py`.

With v = a v' + c for each value, as in `basis.py`:

y = x_1 + x_2        all a are equal, and c_y = c_1 + c_2: one of them is shifted to make up for the others
y = k x              a_y = a_x a_k,  c_y = k c_x; the constant is stored as k / a_k
y = x_1 x_2          a_y = a_1 a_2, and no shift
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from normswap.folding import layouts
from normswap.folding.affine import Array, called, only_use
from normswap.folding.basis import Bases, Basis, Change, Conflict, Rule, Slot, Use, close, rank_of, sizes_of, total
from normswap.folding.linear import describe

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
    """Which value is shifted to make up for the others: a constant if possible, else one whose shift ends in a bias, the result, any."""
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
    """`array`, which broadcasts against the result of an elementwise operation, in the shape for one of the operands."""
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
        # A constant of one number stays one number, so the scale moves on to y; a constant with more numbers takes the scale.
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
        # The larger operand takes the scale: the other may be a gate with fewer axes.
        free = [i for i in range(2) if not change.fixed(slots[i])]
        index = max(free, key=lambda i: sum(size != 1 for size in sizes_of(slots[i])))
        other = scales[1 - index]
        if not other.all():
            raise Conflict(f"{called(node)} would be divided by 0")
        change.set(slots[index], change.of(slots[index]).scaled(_lowered(change.of(y).scale / other, slots[index], node)))
    scales = [_raised(change.of(slot).scale, rank) for slot in slots]
    if not close(*np.broadcast_arrays(scales[0] * scales[1], change.of(y).scale)):
        raise Conflict(f"the values that {called(node)} multiplies would be scaled differently")


RULES: dict[str, Rule] = {**dict.fromkeys(("Add", "Sub", "Sum"), _sum), **dict.fromkeys(("Mul", "Div"), _mul)}
