r"""Which inputs of an ONNX operator have to lose their mean over an axis, so that its output loses its own.

C v = v - mean of v over one axis, the channels. Of an operator y = f(u, ...) that passes channels through, C y is f(C u, ...): with every
needed input centred and nothing else changed.

    MatMul, Gemm, Conv, Einsum    W <- C W over its output axis, b <- C b, whatever the other input is
    Gather                        the rows of the table, where its axis is another than that of the channels
    Add, Sub, Sum, Mean, Where    all that is added
    Mul, Div                      the operand that has channels, if the other is the same on all of them
    moving values, sums over other axes, pooling ...    their input
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from normswap.folding import layouts
from normswap.folding.affine import Array, Constants
from normswap.folding.basis import Conflict, rank_of, sizes_of
from normswap.folding.linear import FLOATS

Place = tuple[int, int]  # which input of a node, and its axis of channels, counted from 0
Rule = Callable[[ir.Node, int, Constants], list[Place] | None]

METADATA = ("Shape", "Size")


def needed(node: ir.Node, index: int, axis: int, constants: Constants) -> list[Place] | None:
    """The inputs that have to be centred for output `index` of the node to be, on `axis`; None if there are none that do it."""
    rule = _RULES.get(node.op_type) if node.domain == "" else None
    y = node.outputs[index]
    if rule is None or (index > 0 and node.op_type != "Split") or not is_floating(y):
        return None
    try:
        size = sizes_of(y)[axis]
        found = rule(node, axis, constants)
        sizes = [_sizes(node, place, constants)[a] if a >= 0 else None for place, a in found or ()]
    except Conflict:  # a value of unknown shape, or a move that cannot be followed
        return None
    if found is None or not isinstance(size, int) or size < 2 or any(each != size for each in sizes):
        return None
    return found if all(is_floating(node.inputs[place]) for place, _ in found) else None


def is_blind(node: ir.Node, value: ir.Value, axis: int, constants: Constants) -> bool:
    """Whether the outputs of a node do not change when `value`, on every place where the node reads it, is centred."""
    if node.domain != "":
        return False
    if node.op_type in METADATA:
        return True
    if node.op_type == "CastLike":  # its second input gives the type
        return node.inputs[0] is not value
    rank = None if value.shape is None else len(value.shape)
    if rank is None or any(each is value for each in node.inputs[1:]):
        return False
    if node.op_type == "LayerNormalization":
        of_mean = node.outputs[1] if len(node.outputs) > 1 else None  # the second result is the mean that it takes out
        seen = of_mean is not None and bool(of_mean.uses() or of_mean.is_graph_output())
        return node.attributes.get_int("axis", -1) % rank == axis == rank - 1 and not seen
    if node.op_type in ("Softmax", "LogSoftmax"):
        along = node.attributes.get_int("axis", -1 if constants.opset >= 13 else 1) % rank
        return along == axis and (constants.opset >= 13 or axis == rank - 1)  # before opset 13 it was over all axes from there on
    return False


def is_floating(value: ir.Value | None) -> bool:
    return value is not None and value.dtype is not None and value.dtype.numpy().name in FLOATS


def axes_of(node: ir.Node, constants: Constants) -> list[int] | None:
    """The axes of a Reduce operator, as it has them; None if it reduces all, or they are not known."""
    given = node.inputs[1] if len(node.inputs) > 1 else None
    array = constants.of(given)
    if given is not None and array is None:
        return None
    return [int(a) for a in (node.attributes.get_ints("axes", ()) if array is None else array.reshape(-1))] or None


def _sizes(node: ir.Node, place: int, constants: Constants) -> tuple[int | str | None, ...]:
    """The shape of an input. Raises Conflict if it is not known."""
    value = node.inputs[place]
    if value is None:
        raise Conflict("an input is missing")
    array = constants.of(value) if value.shape is None else None
    return sizes_of(value) if array is None else array.shape


def _aligned(node: ir.Node, place: int, axis: int, constants: Constants) -> list[Place] | None:
    """An input that is broadcast to the output, on its axis of channels; None if it is the same on all channels."""
    sizes = _sizes(node, place, constants)
    mine = axis - rank_of(node.outputs[0]) + len(sizes)
    if mine >= 0 and not isinstance(sizes[mine], int):
        raise Conflict("the number of channels is not known")
    return [(place, mine)] if mine >= 0 and sizes[mine] != 1 else None


# --- values that move -------------------------------------------------------------------------------------------------------------------


def _same(node: ir.Node, axis: int, constants: Constants) -> list[Place] | None:
    return [(0, axis)]


def _moved(node: ir.Node, axis: int, constants: Constants) -> list[Place] | None:
    """The axis of the input that has the indices of `axis` of the output."""
    y = node.outputs[0]
    size = sizes_of(y)[axis]
    if not isinstance(size, int):
        return None
    probe = np.arange(size).reshape([size if a == axis else 1 for a in range(rank_of(y))])
    array: Array = layouts.backward(node, probe)
    if array.size != size or (array.reshape(-1) != np.arange(size)).any():
        return None
    return [(0, int(np.argmax(array.shape)))]


def _picked(node: ir.Node, axis: int, constants: Constants) -> list[Place] | None:
    """Gather: the axes of the index stand where the axis was that it picks from."""
    at, made = node.attributes.get_int("axis", 0) % len(_sizes(node, 0, constants)), len(_sizes(node, 1, constants))
    if at <= axis < at + made:
        return None
    return [(0, axis if axis < at else axis - made + 1)]


def _picked_points(node: ir.Node, axis: int, constants: Constants) -> list[Place] | None:
    """GatherND: the last axes of the input stay, which the index does not reach."""
    rank, indices = len(_sizes(node, 0, constants)), _sizes(node, 1, constants)
    if not isinstance(indices[-1], int):
        return None
    mine = axis - rank_of(node.outputs[0]) + rank
    return [(0, mine)] if mine >= node.attributes.get_int("batch_dims", 0) + indices[-1] else None


def _split(node: ir.Node, axis: int, constants: Constants) -> list[Place] | None:
    along = node.attributes.get_int("axis", 0) % rank_of(node.outputs[0])
    return None if along == axis else [(0, axis)]


def _joined(node: ir.Node, axis: int, constants: Constants) -> list[Place] | None:
    along = node.attributes.get_int("axis", 0) % rank_of(node.outputs[0])
    return None if along == axis else [(place, axis) for place in range(len(node.inputs))]


def _padded(node: ir.Node, axis: int, constants: Constants) -> list[Place] | None:
    rank = rank_of(node.outputs[0])
    given = [constants.of(value) for value in node.inputs[1:]]
    if any(array is None and value is not None for array, value in zip(given, node.inputs[1:], strict=True)):
        return None
    pads, fill, where = (*given, None, None, None)[:3]
    pads = np.asarray(node.attributes.get_ints("pads", ())) if pads is None else pads
    axes = list(range(rank)) if where is None else [int(a) % rank for a in where.reshape(-1)]
    number = node.attributes.get_float("value", 0.0) if fill is None else float(fill.reshape(-1)[0])
    if (number != 0 and node.attributes.get_string("mode", "constant") == "constant") or len(pads) != 2 * len(axes):
        return None
    return None if any(pads.reshape(2, -1)[:, i].any() for i, a in enumerate(axes) if a == axis) else [(0, axis)]


def _reduced(node: ir.Node, axis: int, constants: Constants) -> list[Place] | None:
    gone = axes_of(node, constants)
    if gone is None:
        return None
    rank = len(_sizes(node, 0, constants))
    gone = [a % rank for a in gone]
    left = [a for a in range(rank) if node.attributes.get_int("keepdims", 1) or a not in gone]
    return None if left[axis] in gone else [(0, left[axis])]


def _over_places(node: ir.Node, axis: int, constants: Constants) -> list[Place] | None:
    """Pooling and interpolation: the same linear map over space for each channel of (N, C, *space)."""
    outside = node.attributes.get_string("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    return [(0, axis)] if axis == 1 and rank_of(node.outputs[0]) > 2 and not outside else None


# --- sums and products ------------------------------------------------------------------------------------------------------------------


def _added(node: ir.Node, axis: int, constants: Constants) -> list[Place] | None:
    found = [_aligned(node, place, axis, constants) for place in range(len(node.inputs))]
    return None if None in found else [pair for each in found for pair in each or ()]


def _scaled(node: ir.Node, axis: int, constants: Constants) -> list[Place] | None:
    found = [_aligned(node, place, axis, constants) for place in range(2)]
    if node.op_type == "Div" and found[1] is not None:
        return None
    (one,) = [each for each in found if each is not None] if sum(each is not None for each in found) == 1 else [None]
    return one


def _chosen(node: ir.Node, axis: int, constants: Constants) -> list[Place] | None:
    """Where(condition, u, v): the condition is the same on all channels, and so may be zeros."""
    arrays = [constants.of(value) for value in node.inputs]
    if _aligned(node, 0, axis, constants) is not None:
        return None
    found = [[] if a is not None and not a.any() else _aligned(node, place, axis, constants) for place, a in enumerate(arrays) if place > 0]
    return None if None in found else [pair for each in found for pair in each or ()]


def _zeros(node: ir.Node, axis: int, constants: Constants) -> list[Place] | None:
    fill = node.attributes.get("value")
    return [] if fill is None or not fill.as_tensor().numpy().any() else None


def _multiplied(node: ir.Node, axis: int, constants: Constants) -> list[Place] | None:
    left, right = (len(_sizes(node, place, constants)) for place in range(2))
    from_end = axis - rank_of(node.outputs[0])
    if right == 1:  # its only axis is added up
        return [(0, left - 2)] if from_end == -1 and left > 1 else None
    if from_end == -1:
        return [(1, right - 1)]
    return [(0, left - 2)] if from_end == -2 and left > 1 else None


def _gemm(node: ir.Node, axis: int, constants: Constants) -> list[Place] | None:
    turned = node.attributes.get_int("transB" if axis == 1 else "transA", 0)
    places = [(1, 0 if turned else 1) if axis == 1 else (0, 1 if turned else 0)]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = _aligned(node, 2, axis, constants)
        return None if bias is None else [*places, *bias]
    return places


def _convolved(node: ir.Node, axis: int, constants: Constants) -> list[Place] | None:
    if axis != 1 or node.attributes.get_int("group", 1) != 1:
        return None
    bias = [(2, 0)] if len(node.inputs) > 2 and node.inputs[2] is not None else []
    return [(1, 1 if node.op_type == "ConvTranspose" else 0), *bias]


def _by_letters(node: ir.Node, axis: int, constants: Constants) -> list[Place] | None:
    """Einsum: the one term that has the letter of the channels, once."""
    left, arrow, out = node.attributes.get_string("equation").replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or "." in left or out.count(out[axis]) != 1:
        return None
    holders = [place for place, term in enumerate(terms) if out[axis] in term]
    if len(holders) != 1 or terms[holders[0]].count(out[axis]) != 1:
        return None
    return [(holders[0], terms[holders[0]].index(out[axis]))]


_RULES: dict[str, Rule] = {
    # A slice along the channels that keeps their number keeps or reverses them.
    **dict.fromkeys(("Identity", "Neg", "Cast", "CastLike", "Slice"), _same),
    **dict.fromkeys(("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Tile"), _moved),
    "Gather": _picked,
    "GatherND": _picked_points,
    "Split": _split,
    "Concat": _joined,
    "Pad": _padded,
    **dict.fromkeys(("ReduceMean", "ReduceSum"), _reduced),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool", "Resize", "Upsample"), _over_places),
    **dict.fromkeys(("Add", "Sub", "Sum", "Mean"), _added),
    **dict.fromkeys(("Mul", "Div"), _scaled),
    "Where": _chosen,
    "ConstantOfShape": _zeros,
    "MatMul": _multiplied,
    "Gemm": _gemm,
    **dict.fromkeys(("Conv", "ConvTranspose"), _convolved),
    "Einsum": _by_letters,
}
