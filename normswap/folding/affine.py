"""What the rewrites of this package work on: a per-channel affine in an ONNX graph, and the constants around it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from normswap.folding.computed import compute, tensor_of, why_not

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Affine:
    """y = x * scale + shift, one call of one norm.

    name    the norm's qualified name
    nodes   the nodes that compute y from x, in order; they are removed when y is computed otherwise. index: which input of the first is x
    scale, shift   float64, with as many dimensions as x, and size 1 on each axis along which they do not vary
    size    the root mean square of x, shaped likewise, if the norm's statistics tell it
    wide    the dtype in which the norm computes, if that is wider than the dtype of x
    spare   how many bytes of weights with other readers may be stored a second time to fold it; None: any number
    """

    name: str
    nodes: tuple[ir.Node, ...]
    scale: Array
    shift: Array
    index: int = 0
    size: Array | None = None
    wide: ir.DataType | None = None
    spare: int | None = None

    @property
    def x(self) -> ir.Value:
        value = self.nodes[0].inputs[self.index]
        assert value is not None
        return value

    @property
    def y(self) -> ir.Value:
        return self.nodes[-1].outputs[0]

    def typical(self) -> Array:
        """The root mean square of x, or an estimate from the scale: the output of a norm is about 1."""
        if self.size is not None:
            return self.size
        scale = np.abs(self.scale[self.scale != 0])
        return np.full((1,) * self.scale.ndim, float(np.median(1 / scale)) if scale.size else 0.0)

    def is_private(self) -> bool:
        """Whether nothing else reads x or the values between x and y."""
        return only_use(self.x) and self.is_closed()

    def is_closed(self) -> bool:
        """Whether nothing else reads the values between x and y."""
        return all(only_use(node.outputs[0]) for node in self.nodes[:-1])

    def has_two_names(self) -> bool:
        """Whether y is an output of the graph and x an output or input: a value has one name, so y = x then takes an Identity."""
        return self.y.is_graph_output() and (self.x.is_graph_output() or self.x.is_graph_input())

    def replace_by(self, value: ir.Value) -> None:
        """Let everything that reads y read `value`, and remove what computed y. An output of the graph keeps its name."""
        replace_value(self.y, value, self.nodes)


def replace_value(old: ir.Value, new: ir.Value, nodes: Sequence[ir.Node]) -> None:
    """Let everything that reads `old` read `new`, and remove the nodes, in order, that computed it. An output keeps its name."""
    if old.is_graph_output() and not new.is_graph_output():
        old.name, new.name = new.name, old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    for node in reversed(nodes):
        assert node.graph is not None
        node.graph.remove(node, safe=True)


class Constants:
    """The constants of one graph. A rewrite adds constants and never changes one that is there, as other nodes may read it."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[Any, ...], ir.Value | None] = {}
        self._wanted: dict[ir.Value, str] = {}
        self._taken: set[str | None] | None = None

    def of(self, value: ir.Value | None) -> Array | None:
        """The array that `value` always holds, or None if it depends on the input."""
        if value is None or value.is_graph_input():
            return None
        tensor = tensor_of(value)
        if tensor is None:
            tensor = compute(value, self.of, self.opset)
        return None if tensor is None else tensor.numpy()

    @property
    def opset(self) -> int:
        """The version of ONNX's own operators in the graph."""
        return self._graph.opset_imports.get("", 0)

    def why_not(self, value: ir.Value) -> str:
        """Why `of` gives None, as a clause about the value."""
        pending, seen = [value], set[ir.Value]()
        depends = ""
        while pending:
            current = pending.pop(0)
            seen.add(current)
            if current.is_graph_input():
                default = current.name in self._graph.initializers or current.const_value is not None
                what = "is an input that a caller may replace" if default else "is an input of the model"
                if current is value:
                    return what
                depends = depends or (f"depends on {current.name}, which {what}")
                continue
            if (reason := why_not(current)) is not None and self.of(current) is None:
                return reason if current is value else f"is computed from {current.name}, which {reason}"
            node = current.producer()
            pending += [given for given in (() if node is None else node.inputs) if given is not None and given not in seen]
        return depends or "is not known before the model runs"

    def exact(self, value: ir.Value | None) -> Array | None:
        """The array that `value` was rounded from, if that is known; else as `of`."""
        array = self.of(value)
        return array if array is None or value is None else precise(value, array)

    def add(self, name: str, array: Array, dtype: npt.DTypeLike | None = None, *, wanted: str | None = None) -> ir.Value:
        """A new constant under `name`, or under a name derived from it if that is taken. Equal arrays under one name are one constant.

        dtype: what to round the array to; None: its own. wanted: the name that `restore_names` gives the constant, if it is free then.
        """
        rounded = array if dtype is None else array.astype(dtype)
        key = (name, rounded.dtype, rounded.shape, rounded.tobytes())
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = self._register(name, rounded)
            if rounded.dtype == np.float16:
                note_precise(made, array)
        if wanted is not None:
            self._wanted[made] = wanted
        return made

    def instead(self, value: ir.Value, array: Array, name: str) -> ir.Value:
        """A new constant in the place of `value`, rounded to its dtype; `restore_names` gives it that name, if it is free then."""
        made = self._register(name, array.astype(self._dtype_of(value), copy=False))
        self._wanted[made] = self._wanted.get(value, str(value.name))
        if made.dtype == ir.DataType.FLOAT16:
            note_precise(made, array)
        return made

    def bias(self, weight: ir.Value, array: Array, dtype: npt.DTypeLike) -> ir.Value:
        """A new bias for the layer of `weight`, rounded to `dtype`. Its name is made from the name that the weight had before the fold."""
        name = str(self._wanted.get(weight, weight.name))
        stem, dot, last = name.rpartition(".")
        return self.add(f"{name}_folded_bias", array, dtype, wanted=f"{stem}{dot}bias" if last == "weight" else f"{name}_bias")

    def scaled(self, weight: ir.Value, factors: Sequence[Array], view: Sequence[int]) -> ir.Value | None:
        """weight * factors, computed in float64 and rounded once to the weight's dtype.

        A factor has as many dimensions as `view`, a shape of the weight in which the channels have axes of their own.
        None if the dtype cannot hold the product: an overflow, or a channel so small that its values lose digits.
        """
        key = (id(weight), *(part for factor in factors for part in (factor.shape, factor.tobytes())))
        if key not in self._made:
            array = _scaled(weight, factors, view)
            made = None if array is None else self._register(f"{weight.name}_folded", array.astype(self._dtype_of(weight), copy=False))
            if made is not None:
                self._wanted[made] = self._wanted.get(weight, str(weight.name))
            if made is not None and array is not None and PRECISE in weight.meta:
                note_precise(made, array)  # another norm may be folded into it
            self._made[key] = made
        return self._made[key]

    @staticmethod
    def _dtype_of(value: ir.Value) -> np.dtype[Any]:
        tensor = tensor_of(value)
        assert tensor is not None
        return tensor.dtype.numpy()

    def restore_names(self) -> None:
        """Give each folded constant the name of the constant that it was made from, if that one is gone."""
        taken = set(_names(self._graph))
        for value, name in self._wanted.items():
            if value.name in self._graph.initializers and name not in taken:
                del self._graph.initializers[str(value.name)]
                value.name = name
                taken.add(name)
                self._graph.register_initializer(value)

    def fresh(self, name: str) -> str:
        """`name`, or one derived from it that no value of the graph or of a subgraph has."""
        if self._taken is None:
            self._taken = set(_names(self._graph))
        unique = next(n for n in itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1))) if n not in self._taken)
        self._taken.add(unique)
        return unique

    def _register(self, name: str, array: Array) -> ir.Value:
        unique = self.fresh(name)
        tensor = ir.tensor(array, name=unique)
        value = ir.Value(name=unique, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.register_initializer(value)
        return value


PRECISE = "normswap.precise"


def note_precise(value: ir.Value, array: Array) -> None:
    """Note the array, of the same shape, that a constant was rounded from. Folds are computed from that array."""
    value.meta[PRECISE] = array


def precise(value: ir.Value, array: Array) -> Array:
    """The array that the constant `value` was rounded from, if that is known; else `array`, which is what it holds."""
    found: Array = value.meta.get(PRECISE, array)
    return found


def _names(graph: ir.Graph) -> Iterator[str | None]:
    """The names of the values of a graph, and of the graphs inside it."""
    for value in (*graph.inputs, *graph.initializers.values()):
        yield value.name
    for node in graph:
        for value in node.outputs:
            yield value.name
        for attribute in node.attributes.values():
            inner = [attribute.value] if attribute.type == ir.AttributeType.GRAPH else []
            for subgraph in attribute.value if attribute.type == ir.AttributeType.GRAPHS else inner:
                yield from _names(subgraph)


def _scaled(weight: ir.Value, factors: Sequence[Array], view: Sequence[int]) -> Array | None:
    tensor = tensor_of(weight)
    assert tensor is not None
    array = tensor.numpy().reshape(view)
    if not fits_product(array, *factors):
        return None
    source = precise(weight, array).reshape(view)
    result = np.empty_like(source, np.float32 if PRECISE in weight.meta else array.dtype)
    for part in slices(array):
        piece = source[part].astype(np.float64)
        for factor in factors:
            piece = piece * factor_of(factor, part)
        result[part] = piece
    return result.reshape(tensor.shape.numpy())


def slices(array: Array) -> list[slice]:
    """Slices along axis 0, to be cast to float64 one by one: a whole weight in float64 would be the largest thing in memory."""
    step = max(1, (1 << 20) * len(array) // max(1, array.size))
    return [slice(start, start + step) for start in range(0, len(array), step)]


def factor_of(factor: Array, part: slice) -> Array:
    """The part of a factor that belongs to a part of the array."""
    return factor[part] if len(factor) > 1 else factor


def fits_product(array: Array, *factors: Array) -> bool:
    """Whether the dtype of the array holds its product with the factors: no overflow, and no channel so small that it loses digits."""
    largest: list[Array] = [np.zeros(factor.shape) for factor in factors]
    for part in slices(array):
        piece = np.abs(array[part].astype(np.float64))
        for factor in factors:
            piece = piece * np.abs(factor_of(factor, part))
        for maxima in largest:
            others = tuple(axis for axis in range(maxima.ndim) if maxima.shape[axis] == 1)
            found = piece.max(axis=others, keepdims=True, initial=0.0)
            factor_of(maxima, part)[...] = np.maximum(factor_of(maxima, part), found)
    return all(fits(maxima, array.dtype) for maxima in largest)


def fits(largest: Array, dtype: np.dtype[Any], *, zero_below: bool = False) -> bool:
    """Whether `dtype` holds values of these magnitudes with all its digits; with `zero_below`, tiny values may lose theirs.

    Written so that NaN does not fit.
    """
    info = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    precise = (largest == 0) | (largest >= float(info.tiny)) | zero_below
    return bool(np.all(precise & (largest <= float(info.max))))


def called(node: ir.Node) -> str:
    """A node in a message: its operator and its name."""
    return f"{node.op_type} {node.name}" if node.name else node.op_type


def only_use(value: ir.Value) -> bool:
    """Whether one input of one node is all that reads `value`."""
    return len(value.uses()) == 1 and not value.is_graph_output()
