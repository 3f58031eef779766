"""What the rewrites of this package work on: a per-channel affine in an ONNX graph, and the constants around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Affine:
    """y = x * scale + shift, one call of one norm.

    name    the norm's qualified name
    x, y    the values in the graph                    nodes   what computes y from x, and is removed when y is computed otherwise
    scale, shift   float64, with as many dimensions as x, size 1 on every axis that shares them
    """

    name: str
    x: ir.Value
    y: ir.Value
    nodes: tuple[ir.Node, ...]
    scale: Array
    shift: Array

    def along(self, axis: int, *, rank: int, size: int) -> tuple[Array, Array] | None:
        """(scale, shift) as vectors of `size` if x has `rank` dimensions and they vary along `axis` alone, else None."""
        both = np.stack(np.broadcast_arrays(self.scale, self.shift))
        channels = both.shape[1:][axis] if both.ndim == rank + 1 else 0
        if channels not in (1, size) or both[0].size != channels:
            return None
        scale, shift = np.broadcast_to(both.reshape(2, channels), (2, size))
        return scale, shift

    def is_private(self) -> bool:
        """Whether nothing else sees x, or anything on the way from x to y."""
        return only_use(self.x) and all(only_use(node.outputs[0]) for node in self.nodes[:-1])

    def replace_by(self, value: ir.Value) -> None:
        """Let everything that reads y read `value`, and remove what computed y."""
        ir.convenience.replace_all_uses_with(self.y, value, replace_graph_outputs=True)
        for node in reversed(self.nodes):
            assert node.graph is not None
            node.graph.remove(node, safe=True)


class Constants:
    """The constants of one graph. What a rewrite needs is added; what is there is never changed, as others may use it."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[Any, ...], ir.Value | None] = {}

    def of(self, value: ir.Value | None) -> Array | None:
        """The array that `value` always is, or None if it depends on the input."""
        if value is None or value.is_graph_input():
            return None
        tensor = ir.convenience.get_const_tensor(value)
        return None if tensor is None else tensor.numpy()

    def add(self, name: str, array: Array) -> ir.Value:
        """A new constant under `name`, or under a name derived from it if that is taken. Equal arrays under one name are one constant."""
        key = (name, array.dtype, array.shape, array.tobytes())
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = self._register(name, array)
        return made

    def scaled(self, weight: ir.Value, scale: Array, view: Sequence[int]) -> ir.Value | None:
        """weight * scale, computed in float64 and rounded once to the weight's dtype.

        `scale` has as many dimensions as `view`, a shape of the weight in which the channels have axes of their own.
        None if the dtype cannot hold the product: an overflow, or a channel so small that its values lose digits.
        """
        key = (id(weight), scale.shape, scale.tobytes())
        if key not in self._made:
            array = _scaled(weight, scale, view)
            self._made[key] = None if array is None else self._register(f"{weight.name}_folded", array)
        return self._made[key]

    def _register(self, name: str, array: Array) -> ir.Value:
        unique, count = name, 1
        while unique in self._graph.initializers:
            unique, count = f"{name}_{count}", count + 1
        tensor = ir.tensor(array, name=unique)
        value = ir.Value(name=unique, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.register_initializer(value)
        return value


def _scaled(weight: ir.Value, scale: Array, view: Sequence[int]) -> Array | None:
    tensor = ir.convenience.get_const_tensor(weight)
    assert tensor is not None
    array = tensor.numpy().reshape(view)
    shared = tuple(axis for axis, size in enumerate(scale.shape) if size == 1)
    highest, lowest = (np.asarray(f(axis=shared, keepdims=True), np.float64) for f in (array.max, array.min))
    if not fits(np.maximum(highest, -lowest) * np.abs(scale), array.dtype):
        return None
    result = np.empty_like(array)
    # In slices: a whole weight in float64 would be the largest thing in memory.
    step = max(1, (1 << 20) * len(array) // max(1, array.size))
    for start in range(0, len(array), step):
        part = slice(start, start + step)
        result[part] = array[part].astype(np.float64) * (scale[part] if len(scale) > 1 else scale)
    return result.reshape(tensor.shape.numpy())


def fits(largest: Array, dtype: np.dtype[Any], *, zero_below: bool = False) -> bool:
    """Whether `dtype` holds values of these magnitudes with all its digits; with `zero_below`, losing those of tiny ones is no loss.

    Written so that NaN does not fit.
    """
    info = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    precise = (largest == 0) | (largest >= float(info.tiny)) | zero_below
    return bool(np.all(precise & (largest <= float(info.max))))


def only_use(value: ir.Value) -> bool:
    """Whether nothing sees `value` but one input of one node."""
    return len(value.uses()) == 1 and not value.is_graph_output()
