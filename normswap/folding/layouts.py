r"""How an affine moves through operators that move values without computing new ones (Transpose, Reshape, Concat).

    y[i] = x[m(i)]        a_y[i] = a_x[m(i)],  c_y[i] = c_x[m(i)]

Exact for any a and c. Transpose, Reshape, Flatten, Squeeze, Unsqueeze, Expand, Tile, DepthToSpace, SpaceToDepth and Identity have one input
and one output, and `forward` and `backward` move the arrays a and c, which have size 1 along the axes on which they do not vary. Slice,
Gather and Split take a part; Concat puts parts together. There is a Conflict where a or c varies along an axis whose size is not known, or
whose elements the operator merges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from normswap.folding.affine import Array, called
from normswap.folding.basis import Basis, Change, Conflict, Rule, Slot, rank_of, sizes_of

Sizes = Sequence[int | str | None]


# -- one input, one output -----------------------------------------------------------------------------------------------------------


def forward(node: ir.Node, array: Array) -> Array:
    """An array that broadcasts against the input, moved as the node moves the input: it broadcasts against the output."""
    return _moved(node, array, back=False)


def backward(node: ir.Node, array: Array) -> Array:
    """The converse of `forward`: from the output to the input."""
    return _moved(node, array, back=True)


def moves(node: ir.Node) -> bool:
    return node.domain == "" and node.op_type in _MOVES


def _moved(node: ir.Node, array: Array, *, back: bool) -> Array:
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None
    source, target = sizes_of(x), sizes_of(y)
    if node.op_type == "Transpose":
        order = list(node.attributes.get_ints("perm", ())) or list(range(len(source)))[::-1]
        return np.transpose(array, np.argsort(order) if back else order)
    if node.op_type in ("DepthToSpace", "SpaceToDepth"):
        return _blocks(node, array, into_space=(node.op_type == "DepthToSpace") != back)
    if node.op_type == "Tile":
        return _tiled(node, array, source, target, back=back)
    if node.op_type == "Expand":
        return _narrowed(node, array, source) if back else array.reshape((1,) * (len(target) - len(source)) + array.shape)
    return reshaped(array, target, source) if back else reshaped(array, source, target)


def _narrowed(node: ir.Node, array: Array, source: Sizes) -> Array:
    lead = array.ndim - len(source)
    if any(size > 1 for size in array.shape[:lead]) or any(a > 1 and s == 1 for a, s in zip(array.shape[lead:], source, strict=True)):
        raise Conflict(f"{called(node)} repeats what would have to differ")
    return array.reshape(array.shape[lead:])


def _blocks(node: ir.Node, array: Array, *, into_space: bool) -> Array:
    """`array` where channels become a block of b x b values in space, or the converse: all of one block must have the same basis."""
    if any(size > 1 for axis, size in enumerate(array.shape) if axis != 1):
        raise Conflict(f"{called(node)} moves values that would have to differ in space")
    block = node.attributes.get_int("blocksize") ** 2
    outside = node.op_type == "SpaceToDepth" or node.attributes.get_string("mode", "DCR") == "DCR"  # the block before the channels
    if array.size == 1:
        return array
    if not into_space:
        return np.asarray(np.tile(array, (1, block, 1, 1)) if outside else np.repeat(array, block, 1))
    parts = array.reshape((block, -1) if outside else (-1, block))
    first = parts[:1] if outside else parts[:, :1]
    if (parts != first).any():
        raise Conflict(f"{called(node)} puts channels side by side that would have to be scaled or shifted differently")
    return first.reshape(1, -1, 1, 1)


def _tiled(node: ir.Node, array: Array, source: Sizes, target: Sizes, *, back: bool) -> Array:
    """An array before or after Tile, which repeats it along each axis."""
    for axis, (size, whole) in enumerate(zip(source, target, strict=True)):
        if array.shape[axis] == 1 or (size == whole and size is not None):
            continue
        if not (isinstance(size, int) and isinstance(whole, int)):
            raise Conflict(f"{called(node)} repeats an axis of unknown size")
        parts = array.reshape((*array.shape[:axis], -1, size, *array.shape[axis + 1 :]))
        if back and (parts != parts.take([0], axis)).any():
            raise Conflict(f"{called(node)} repeats what would have to differ")
        array = parts.take(0, axis) if back else np.concatenate([array] * (whole // size), axis)
    return array


_MOVES = {"Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Expand", "Tile", "DepthToSpace", "SpaceToDepth"}


def reshaped(array: Array, source: Sizes, target: Sizes) -> Array:
    """`array`, which broadcasts against the shape `source`, moved as a Reshape moves values from `source` to `target`."""
    groups = _groups(source, target)
    full: list[int] = []
    result: list[int] = []
    for before, after in groups:
        varies = any(array.shape[axis] > 1 for axis in before)
        sizes = [source[axis] for axis in before], [target[axis] for axis in after]
        if varies and not all(isinstance(size, int) for side in sizes for size in side):
            if len(before) == len(after) == 1 and sizes[0] == sizes[1]:
                full.append(array.shape[before[0]])
                result.append(array.shape[before[0]])
                continue
            raise Conflict("a reshape mixes its channels with an axis of unknown size")
        full += sizes[0] if varies else [1] * len(before)  # type: ignore[arg-type]
        result += sizes[1] if varies else [1] * len(after)  # type: ignore[arg-type]
    return _compressed(np.broadcast_to(array, full).reshape(result))


def _compressed(array: Array) -> Array:
    """The array with size 1 along axes on which it does not vary: a reshape may have merged them with the channels."""
    for axis in range(array.ndim):
        first = array.take([0], axis) if array.shape[axis] > 1 else array
        array = first if (array == first).all() else array
    return array


def _groups(source: Sizes, target: Sizes) -> list[tuple[list[int], list[int]]]:
    """Axes before and after a reshape that hold the same elements: from the left, from the right, and one group for what is between."""
    start, ends = 0, (len(source), len(target))
    while start < min(ends) and source[start] == target[start] is not None:
        start += 1
    left = [([axis], [axis]) for axis in range(start)]
    right: list[tuple[list[int], list[int]]] = []
    i, j = ends
    while (found := _last_group(source[start:i], target[start:j])) is not None:
        right.insert(0, (list(range(i - found[0], i)), list(range(j - found[1], j))))
        i, j = i - found[0], j - found[1]
    between = [(list(range(start, i)), list(range(start, j)))] if i > start or j > start else []
    return [*left, *between, *right]


def _last_group(source: Sizes, target: Sizes) -> tuple[int, int] | None:
    """The smallest numbers of axes at the end of both that hold equally many elements."""
    if not source or not target:
        return None
    counts = [1, 1]
    while all(isinstance(size, int) for size in (*source[-counts[0] :], *target[-counts[1] :])):
        a, b = math.prod(source[-counts[0] :]), math.prod(target[-counts[1] :])  # type: ignore[arg-type]
        if a == b:
            return counts[0], counts[1]
        shorter = int(a > b)
        counts[shorter] += 1
        if counts[shorter] > len((source, target)[shorter]):
            return None
    return None


# -- a part of one input -------------------------------------------------------------------------------------------------------------


def take(node: ir.Node, change: Change) -> None:
    """The rule of Slice, Gather and Split."""
    x = change.bases.slot(node, 0)
    outputs = _parts(node, change)
    for y, axis, where, shape in outputs:
        if change.fixed(y) and not change.fixed(x):
            old, new = change.of(x), change.of(y)
            pairs = ((old.scale, new.scale), (old.shift, new.shift))
            change.set(x, Basis(*(_put(node, a, _unshaped(node, b, axis, shape), axis, where, x) for a, b in pairs)))
    if change.fixed(x):
        basis = change.of(x)
        for y, axis, where, shape in outputs:
            change.set(y, Basis(*(_shaped(node, _taken(node, array, axis, where), axis, shape) for array in (basis.scale, basis.shift))))


Part = tuple[Slot, int, "Array | None", "tuple[int, ...] | None"]


def _parts(node: ir.Node, change: Change) -> list[Part]:
    """For each output: (it, the axis along which it is a part, its indices there if they are known, the axes that Gather makes of it)."""
    constant = change.bases.constants.of
    x = change.bases.slot(node, 0)
    rank, sizes = rank_of(x), sizes_of(x)
    y = node.outputs[0]
    if node.op_type == "Slice":
        given = (*node.inputs[1:], None, None, None, None)[:4]
        starts, ends, axes, steps = (None if v is None else constant(v) for v in given)
        computed = any(v is not None and array is None for v, array in zip(given, (starts, ends, axes, steps), strict=True))
        if "starts" in node.attributes:  # before opset 10
            starts, ends = (np.asarray(node.attributes.get_ints(name)) for name in ("starts", "ends"))
            axes = np.asarray(node.attributes.get_ints("axes")) if "axes" in node.attributes else None
        if starts is None or ends is None or computed:
            raise Conflict(f"{called(node)} depends on the input")
        where = range(len(starts)) if axes is None else [int(a) % rank for a in axes]
        strides = np.ones(len(starts), np.int64) if steps is None else steps
        # Leave out the axes that are kept whole.
        cut = [
            (axis, slice(int(s), int(e), int(p)))
            for axis, s, e, p in zip(where, starts, ends, strides, strict=True)
            if not (s == 0 and p == 1 and (e >= 2**31 - 1 or e == sizes[axis]))
        ]
        if len(cut) > 1:
            raise Conflict(f"{called(node)} cuts along several axes")
        if not cut:
            return [(y, 0, None, None)]
        axis, kept = cut[0]
        size = sizes[axis]
        return [(y, axis, np.arange(size)[kept] if isinstance(size, int) else None, None)]
    if node.op_type == "Gather":
        axis, indices = node.attributes.get_int("axis", 0) % rank, constant(node.inputs[1])
        shape = node.inputs[1].shape if node.inputs[1] is not None else None
        if shape is None:
            raise Conflict(f"{called(node)} has an index of unknown shape")
        known = isinstance(sizes[axis], int) and indices is not None
        return [(y, axis, indices.reshape(-1) if known and indices is not None else None, (1,) * len(shape))]
    axis, start, parts = node.attributes.get_int("axis", 0) % rank, 0, list[Part]()
    for output in node.outputs:
        size = sizes_of(output)[axis]
        known = isinstance(size, int) and start >= 0
        parts.append((output, axis, np.arange(start, start + size) if known and isinstance(size, int) else None, None))
        start = start + size if known and isinstance(size, int) else -1
    return parts


def _taken(node: ir.Node, array: Array, axis: int, where: Array | None) -> Array:
    if array.shape[axis] == 1:
        return array
    if where is None:
        raise Conflict(f"{called(node)} picks channels that are not known before")
    return array.take(where, axis)


def _put(node: ir.Node, old: Array, new: Array, axis: int, where: Array | None, x: Slot) -> Array:
    if new.shape[axis] == 1:  # it does not vary along the axis, so the rest of x may have the same
        return new
    size = sizes_of(x)[axis]
    if where is None or not isinstance(size, int):
        raise Conflict(f"{called(node)} picks channels that are not known before")
    common = np.broadcast_shapes(_apart(new, axis), _apart(old, axis))
    result = np.array(np.broadcast_to(old, (*common[:axis], size, *common[axis + 1 :])))
    index = [slice(None)] * result.ndim
    index[axis] = where  # type: ignore[call-overload]
    result[tuple(index)] = new
    return result


def _shaped(node: ir.Node, array: Array, axis: int, shape: tuple[int, ...] | None) -> Array:
    """`array` with the axes that Gather makes of one: none for a single index, several for a matrix of indices."""
    if shape is None or len(shape) == 1:
        return array
    if array.shape[axis] > 1:
        raise Conflict(f"{called(node)} picks channels into several axes")
    return array.reshape((*array.shape[:axis], *shape, *array.shape[axis + 1 :]))


def _unshaped(node: ir.Node, array: Array, axis: int, shape: tuple[int, ...] | None) -> Array:
    if shape is None or len(shape) == 1:
        return array
    picked = array.shape[axis : axis + len(shape)]
    if any(size > 1 for size in picked):
        raise Conflict(f"{called(node)} picks channels into several axes")
    return array.reshape((*array.shape[:axis], 1, *array.shape[axis + len(shape) :]))


# -- parts put together ----------------------------------------------------------------------------------------------------------------


def concat(node: ir.Node, change: Change) -> None:
    """The rule of Concat. If no basis varies along its axis, all parts have the same basis; else each has its own."""
    y = node.outputs[0]
    axis = node.attributes.get_int("axis", 0) % rank_of(y)
    slots = [change.bases.slot(node, index) for index in range(len(node.inputs))]
    if not change.fixed(y):
        given = [change.of(slot) for slot in slots if change.fixed(slot)]
        if not given:
            return
        alike = all(basis.agrees(given[0]) and basis.scale.shape[axis] == basis.shift.shape[axis] == 1 for basis in given)
        if alike:
            change.set(y, given[0])
        else:
            bases, sizes = [change.of(slot) for slot in slots], [sizes_of(slot)[axis] for slot in slots]
            change.set(y, Basis(_joined(node, [b.scale for b in bases], axis, sizes), _joined(node, [b.shift for b in bases], axis, sizes)))
    basis, start = change.of(y), 0
    for slot in slots:
        arrays = []
        size = sizes_of(slot)[axis]
        for array in (basis.scale, basis.shift):
            if array.shape[axis] > 1:
                if not isinstance(size, int) or start < 0:
                    raise Conflict(f"{called(node)} joins parts of unknown sizes")
                array = array.take(np.arange(start, start + size), axis)
            arrays.append(array)
        start = start + size if isinstance(size, int) and start >= 0 else -1
        change.set(slot, Basis(*arrays))


def _joined(node: ir.Node, arrays: Sequence[Array], axis: int, sizes: Sizes) -> Array:
    common = np.broadcast_shapes(*(_apart(array, axis) for array in arrays))
    full = []
    for array, size in zip(arrays, sizes, strict=True):
        if not isinstance(size, int):
            raise Conflict(f"{called(node)} joins parts of unknown sizes")
        full.append(np.broadcast_to(array, (*common[:axis], size, *common[axis + 1 :])))
    return np.concatenate(full, axis)


def _apart(array: Array, axis: int) -> tuple[int, ...]:
    """The shape of the array, but 1 along the axis."""
    return (*array.shape[:axis], 1, *array.shape[axis + 1 :])


def move(node: ir.Node, change: Change) -> None:
    """The rule of Transpose, Reshape and the like."""
    x, y = change.bases.slot(node, 0), node.outputs[0]
    if change.fixed(x):
        basis = change.of(x)
        change.set(y, Basis(forward(node, basis.scale), forward(node, basis.shift)))
    elif change.fixed(y):
        basis = change.of(y)
        change.set(x, Basis(backward(node, basis.scale), backward(node, basis.shift)))


RULES: dict[str, Rule] = {**dict.fromkeys(_MOVES, move), **dict.fromkeys(("Slice", "Gather", "Split"), take), "Concat": concat}
