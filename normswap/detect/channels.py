"""Which values have to lose their mean over an axis, so that the result of an operator loses its own.

C v = v - mean of v over one axis, the channels. Of an operator y = f(u, ...) that passes channels through, C y is f(C u, ...): with every
named operand centred and nothing else changed. `needed` names those operands: of a sum, both; of a product with a matrix, its columns.

    W u + b    W <- C W over its output axis, b <- C b, whatever u is         (Linear, convolutions without groups, embeddings)
    a u        C u, if a has size 1 on the axis                               (a scale for each sample or position)
    moved      C u, where the axis goes with the values                       (views, transpositions, slices, sums over other axes ...)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from normswap.models.recording import Op, Value

Pair = tuple[Value, int]  # a value, and its axis of channels, counted from 0

SAME = frozenset({"clone", "alias", "detach", "_to_copy", "contiguous", "neg", "lift_fresh", "to", "positive"})
ZEROS = frozenset({"zeros", "zeros_like", "new_zeros"})


def needed(op: Op, index: int, axis: int) -> list[Pair] | None:
    """The pairs that have to be centred for result `index` of the operator to be, on `axis`; None if there are none that do it."""
    if op.name in SAME:
        pairs = [(op.inputs[0], axis)] if len(op.inputs) == 1 and op.inputs[0].shape == op.outputs[index].shape else None
    elif op.name in ZEROS:
        pairs = []
    else:
        try:
            pairs = _RULES[op.name](op, index, axis) if op.name in _RULES else None
        except (IndexError, TypeError, ValueError):  # the operator has arguments of another form than its usual overload
            pairs = None
    size = op.outputs[index].shape[axis]
    if pairs is None or not all(v.floating and -1 < a < len(v.shape) and v.shape[a] == size for v, a in pairs):
        return None
    return pairs


def is_blind(op: Op, value: Value, axis: int) -> bool:
    """Whether the results of an operator do not change when `value`, on every place where it is read, is centred."""
    if op.name == "native_layer_norm":
        x, shape = op.args[0], op.args[1]
        of_mean = op.outputs[1]  # the second result is the mean that it takes out
        seen = of_mean.uses or of_mean.is_output
        return x is value and len(shape) == 1 and axis == len(value.shape) - 1 and not seen and all(w is not value for w in op.args[2:4])
    if op.name in ("_softmax", "_log_softmax"):
        return int(op.args[1]) % len(value.shape) == axis
    if op.name in ("var", "std"):
        dims = _argument(op, 1, "dim")
        return isinstance(dims, (list, tuple)) and len(dims) == 1 and int(dims[0]) % len(value.shape) == axis
    return op.name in ("zeros_like", "empty_like", "ones_like", "full_like", "new_zeros", "new_empty", "new_ones", "new_full")


def _argument(op: Op, number: int, name: str, default: Any = None) -> Any:
    return op.args[number] if number < len(op.args) else op.kwargs.get(name, default)


# --- values that move -------------------------------------------------------------------------------------------------------------------


def _viewed(op: Op, index: int, axis: int) -> list[Pair] | None:
    source, result = op.inputs[0], op.outputs[index].shape
    found = _same_axis(result, source.shape, axis)
    return None if found is None else [(source, found)]


def _same_axis(shape: Sequence[int], other: Sequence[int], axis: int) -> int | None:
    """The axis of `other`, the same values in another shape, that has the indices of `axis` of `shape`; None if no single axis has."""
    if shape[axis] == 1:
        return None
    before = math.prod(shape[:axis])
    return next((a for a, size in enumerate(other) if size == shape[axis] and math.prod(other[:a]) == before), None)


def _permuted(op: Op, index: int, axis: int) -> list[Pair] | None:
    source = op.inputs[0]
    order = list(range(len(source.shape)))
    if op.name == "permute":
        order = [int(d) % len(order) for d in op.args[1]]
    elif op.name in ("transpose", "t"):
        a, b = (int(op.args[1]), int(op.args[2])) if op.name == "transpose" else (0, len(order) - 1)
        order[a], order[b] = order[b], order[a]
    return [(source, order[axis])]


def _expanded(op: Op, index: int, axis: int) -> list[Pair] | None:
    return _aligned(op.inputs[0], op.outputs[index], axis)


def _aligned(operand: Value, result: Value, axis: int) -> list[Pair] | None:
    """The pair of an operand that is broadcast to the result; None if it is the same on all channels."""
    mine = axis - len(result.shape) + len(operand.shape)
    return [(operand, mine)] if mine >= 0 and operand.shape[mine] == result.shape[axis] else None


def _unsqueezed(op: Op, index: int, axis: int) -> list[Pair] | None:
    new = int(op.args[1]) % len(op.outputs[index].shape)
    return None if axis == new else [(op.inputs[0], axis - (axis > new))]


def _squeezed(op: Op, index: int, axis: int) -> list[Pair] | None:
    return _viewed(op, index, axis)


def _selected(op: Op, index: int, axis: int) -> list[Pair] | None:
    gone = int(op.args[1]) % len(op.inputs[0].shape)
    return [(op.inputs[0], axis + (axis >= gone))]


def _along(number: int, name: str, default: int | None = 0) -> Callable[[Op, int, int], list[Pair] | None]:
    """The rule for an operator that cuts, joins or reorders its inputs along one axis, which must not be that of the channels."""

    def rule(op: Op, index: int, axis: int) -> list[Pair] | None:
        along = _argument(op, number, name, default)
        rank = len(op.outputs[index].shape)
        dims = along if isinstance(along, (list, tuple)) else [along]
        if not dims or any(d is None or int(d) % rank == axis for d in dims):
            return None
        data = op.args[0]
        return [(v, axis) for v in (data if isinstance(data, (list, tuple)) else [data])]

    return rule


def _stacked(op: Op, index: int, axis: int) -> list[Pair] | None:
    new = int(_argument(op, 1, "dim", 0)) % len(op.outputs[index].shape)
    return None if axis == new else [(v, axis - (axis > new)) for v in op.args[0]]


def _unbound(op: Op, index: int, axis: int) -> list[Pair] | None:
    gone = int(_argument(op, 1, "dim", 0)) % len(op.inputs[0].shape)
    return [(op.inputs[0], axis + (axis >= gone))]


def _padded(op: Op, index: int, axis: int) -> list[Pair] | None:
    pads, value = op.args[1], _argument(op, 2, "value", 0)
    place = len(op.inputs[0].shape) - 1 - axis  # pads come in pairs, from the last axis
    if value != 0 or any(pads[2 * place : 2 * place + 2]):
        return None
    return [(op.inputs[0], axis)]


def _repeated(op: Op, index: int, axis: int) -> list[Pair] | None:
    source, times = op.inputs[0], op.args[1]
    return None if times[axis] != 1 else _aligned(source, op.outputs[index], axis)


def _reduced(op: Op, index: int, axis: int) -> list[Pair] | None:
    source = op.inputs[0]
    dims = _argument(op, 1, "dim")
    if dims is None:
        return None
    gone = {int(d) % len(source.shape) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    if not gone:
        return None
    kept = _argument(op, 2, "keepdim", False)
    left = [a for a in range(len(source.shape)) if kept or a not in gone]
    return None if left[axis] in gone else [(source, left[axis])]


def _over_places(op: Op, index: int, axis: int) -> list[Pair] | None:
    """Pooling and interpolation: the same linear map over space for each channel of (N, C, *space)."""
    rank = len(op.outputs[index].shape)
    return [(op.inputs[0], axis)] if axis == 1 and rank > 2 else None


# --- sums and products ------------------------------------------------------------------------------------------------------------------


def _added(op: Op, index: int, axis: int) -> list[Pair] | None:
    pairs: list[Pair] = []
    for operand in op.args[:2]:
        found = _aligned(operand, op.outputs[index], axis) if isinstance(operand, Value) else None
        if found is None:
            return None
        pairs += found
    return pairs


def _scaled(op: Op, index: int, axis: int) -> list[Pair] | None:
    result = op.outputs[index]
    found = [_aligned(v, result, axis) if isinstance(v, Value) else None for v in op.args[:2]]
    if op.name.startswith("div") and (len(op.args) > 2 or op.kwargs.get("rounding_mode") is not None or found[1] is not None):
        return None
    (pairs,) = [each for each in found if each is not None] if sum(each is not None for each in found) == 1 else [None]
    return pairs


def _chosen(op: Op, index: int, axis: int) -> list[Pair] | None:
    """where(condition, u, v), masked_fill(u, mask, 0): the condition is the same on all channels."""
    result = op.outputs[index]
    if op.name == "where":
        condition, *values = op.args
    else:
        condition, values = op.args[1], [op.args[0]]
        if isinstance(op.args[2], Value) or op.args[2] != 0:
            return None
    if len(values) > 2 or not isinstance(condition, Value) or _aligned(condition, result, axis) is not None:
        return None
    pairs: list[Pair] = []
    for value in values:
        found = _aligned(value, result, axis) if isinstance(value, Value) else None
        if found is None:
            return None
        pairs += found
    return pairs


def _multiplied(op: Op, index: int, axis: int) -> list[Pair] | None:
    """(b +) A M: the channels on the last axis are those of M, on the one before those of A."""
    result = op.outputs[index]
    summed = op.name in ("addmm", "baddbmm", "addmv")
    bias, left, right = (op.args[0] if summed else None, *op.args[summed : 2 + summed])
    rank = len(result.shape)
    if axis < rank - 2:
        return None
    pairs = [(right, axis) if axis == rank - 1 else (left, axis)]
    if isinstance(bias, Value):
        found = _aligned(bias, result, axis)
        if found is None or op.kwargs.get("beta", 1) == 0:
            return None
        pairs += found
    return pairs


def _convolved(op: Op, index: int, axis: int) -> list[Pair] | None:
    _, weight, bias, _, _, _, transposed, _, groups = op.args[:9]
    if axis != 1 or groups != 1:
        return None
    return [(weight, 1 if transposed else 0), *([(bias, 0)] if isinstance(bias, Value) else [])]


def _mixed(op: Op, index: int, axis: int) -> list[Pair] | None:
    """lerp(u, v, w) = (1 - w) u + w v: w is the same on all channels."""
    result, weight = op.outputs[index], op.args[2]
    if isinstance(weight, Value) and _aligned(weight, result, axis) is not None:
        return None
    pairs = [_aligned(operand, result, axis) for operand in op.args[:2]]
    return None if None in pairs else [pair for pair_of in pairs for pair in pair_of or ()]


def _picked(op: Op, index: int, axis: int) -> list[Pair] | None:
    """u[:, i, j]: one or more tensors pick places along other axes than that of the channels."""
    source, picks, rank = op.args[0], op.args[1], len(op.outputs[index].shape)
    at = [a for a, pick in enumerate(picks) if pick is not None]
    sizes = [len(picks[a].shape) for a in at]
    gone, made = at, max(sizes)
    if len(at) == 1 and len(source.shape) - 1 + made != rank:  # a mask, which is as many axes as it has
        gone, made = list(range(at[0], at[0] + sizes[0])), 1
    left = [a for a in range(len(source.shape)) if a not in gone]
    if len(left) + made != rank:
        return None
    start = sum(a < gone[0] for a in left) if gone == list(range(gone[0], gone[-1] + 1)) else 0  # picks that are apart come first
    layout = [*left[:start], *[None] * made, *left[start:]]
    found = layout[axis]
    return None if found is None else [(source, found)]


def _bagged(op: Op, index: int, axis: int) -> list[Pair] | None:
    mode = _argument(op, 4, "mode", 0)
    return [(op.args[0], 1)] if index == 0 and axis == 1 and mode in (0, 1) else None  # sums and means


def _looked_up(op: Op, index: int, axis: int) -> list[Pair] | None:
    return [(op.args[0], 1)] if axis == len(op.outputs[index].shape) - 1 else None


_RULES: dict[str, Callable[[Op, int, int], list[Pair] | None]] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten"), _viewed),
    **dict.fromkeys(("permute", "transpose", "t"), _permuted),
    **dict.fromkeys(("expand", "broadcast_to"), _expanded),
    "unsqueeze": _unsqueezed,
    "squeeze": _squeezed,
    "select": _selected,
    "slice": _along(1, "dim"),
    "cat": _along(1, "dim"),
    "split": _along(2, "dim"),
    "split_with_sizes": _along(2, "dim"),
    "index_select": _along(1, "dim"),
    "roll": _along(2, "dims", None),
    "flip": _along(1, "dims", None),
    "stack": _stacked,
    "unbind": _unbound,
    "constant_pad_nd": _padded,
    "repeat": _repeated,
    **dict.fromkeys(("mean", "sum"), _reduced),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"), _over_places),
    **dict.fromkeys(("upsample_nearest2d", "upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_bicubic2d"), _over_places),
    **dict.fromkeys(("add", "add_", "sub", "sub_"), _added),
    **dict.fromkeys(("mul", "mul_", "div", "div_"), _scaled),
    **dict.fromkeys(("where", "masked_fill"), _chosen),
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm"), _multiplied),
    "convolution": _convolved,
    "embedding": _looked_up,
    "index": _picked,
    **dict.fromkeys(("_embedding_bag", "_embedding_bag_forward_only"), _bagged),
    **dict.fromkeys(("lerp", "lerp_"), _mixed),
}
