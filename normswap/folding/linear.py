r"""The layers of an ONNX graph that are linear in their first input, and how they take a change of basis on either side.

    y = W x + b        x = a x' + c,  y = p y' + q        y' = (W a / p) x' + (b + W c - q) / p

a, c: one number per input channel; p, q: one per output channel, no p zero. Exact if W and b are constants. With c unequal to 0 it is
exact only where every output sees the whole kernel, so not at a border of zeros.

Shapes of W: Conv (O, I/g, *k); ConvTranspose (I, O/g, *k), output channel g' * O/g + j; Gemm (K, O), or (O, K) under transB; MatMul (K, O).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from normswap.folding.affine import Array, Constants, called, factor_of, fits, fits_product, only_use, precise, slices
from normswap.folding.computed import tensor_of

FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Linear:
    """A node that multiplies by a constant weight, its input 1.

    rank, axis          dimensions of the output, and which of them are its channels
    in_rank, in_axis    the same of the input
    view                the shape of the weight in which channels have axes of their own
    in_shape, out_shape what a vector over input or output channels is reshaped to, to multiply the view
    factor              what the product is multiplied by (Gemm's alpha)
    bias                what is added per channel, float64, one number or (channels,)
    biased              whether the node itself has a place for a bias
    border              whether some outputs see zeros instead of the input
    """

    node: ir.Node
    weight: ir.Value
    rank: int
    axis: int
    in_rank: int
    in_axis: int
    view: tuple[int, ...]
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    bias: Array
    biased: bool = True
    border: bool = False
    factor: float = 1.0

    @property
    def inputs(self) -> int:
        return math.prod(self.in_shape)

    @property
    def outputs(self) -> int:
        return math.prod(self.out_shape)

    @property
    def copied(self) -> int:
        """How many bytes a new weight adds to the file: 0 if nothing else reads the old one, which then goes."""
        return _array(self.weight).nbytes if len(self.weight.uses()) > 1 else 0

    def response(self, shift: Array) -> Array:
        """W c: what a constant c per input channel adds to each output channel."""
        if not shift.any():
            return np.zeros(self.outputs)
        summed = tuple(axis for axis, size in enumerate(self.out_shape) if size == 1)
        array = precise(self.weight, _array(self.weight)).reshape(self.view)
        spread = shift.reshape(self.in_shape)
        parts = []
        for part in slices(array):
            product = array[part].astype(np.float64) * factor_of(spread, part)
            parts.append(product.sum(axis=summed, keepdims=True))
        total = np.concatenate(parts) if 0 not in summed else np.sum(parts, axis=0)
        return np.asarray(self.factor * total.reshape(self.outputs))

    def rebased(self, shift: Array, out_scale: Array, out_shift: Array) -> Array:
        """The bias in the new bases, (b + W c - q) / p."""
        return np.broadcast_to((self.bias + self.response(shift) - out_shift) / out_scale, (self.outputs,))

    def weight_factor(self, scale: Array, out_scale: Array) -> tuple[Array, Array]:
        """What the view of the weight is multiplied by, in two steps."""
        return scale.reshape(self.in_shape), (1 / out_scale).reshape(self.out_shape)

    def holds(self, scale: Array, shift: Array, out_scale: Array, out_shift: Array) -> bool:
        """Whether the dtype holds the weight and the bias in the new bases."""
        array = _array(self.weight)
        bias = self.rebased(shift, out_scale, out_shift)
        factors = self.weight_factor(scale, out_scale)
        return fits(np.abs(bias), array.dtype, zero_below=True) and fits_product(array.reshape(self.view), *factors)


def describe(node: ir.Node | None, constants: Constants) -> Linear | None:
    """The node as a Linear, if it is one with constant weight and bias."""
    makers = {"Conv": _conv, "ConvTranspose": _conv, "Gemm": _gemm, "MatMul": _matmul}
    if node is None or node.domain != "" or node.op_type not in makers:
        return None
    weight = constants.of(node.inputs[1])
    return makers[node.op_type](node, weight, constants) if weight is not None and weight.dtype.name in FLOATS else None


def why_not(node: ir.Node, constants: Constants) -> str:
    """Why a Conv, ConvTranspose, Gemm or MatMul is no Linear, as a clause."""
    weight, bias = ((*node.inputs, None)[index] for index in (1, 2))
    name = called(node)
    if weight is None:
        return f"{name} has no weight"
    array = constants.of(weight)
    if array is None and node.op_type in ("MatMul", "Gemm"):
        return f"{name} multiplies by {weight.name}, which {constants.why_not(weight)}"
    if array is None:
        return f"the weight of {name}, {weight.name}, {constants.why_not(weight)}"
    if array.dtype.name not in FLOATS:
        return f"the weight of {name} is of type {array.dtype.name}"
    if node.op_type == "MatMul":
        unknown = node.outputs[0].shape is None
        return f"{name} gives a value of unknown rank" if unknown else f"{name} multiplies by a constant of {array.ndim} dimensions"
    if bias is not None and constants.of(bias) is None:
        return f"the bias of {name}, {bias.name}, {constants.why_not(bias)}"
    return f"the bias of {name} varies along more than the channels"


def is_padded(node: ir.Node) -> bool:
    """Whether a convolution or a pool sees anything around its input."""
    return any(node.attributes.get_ints("pads", ())) or node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID")


def _array(value: ir.Value) -> Array:
    tensor = tensor_of(value)
    assert tensor is not None
    return tensor.numpy()


def _conv(node: ir.Node, weight: Array, constants: Constants) -> Linear | None:
    """Conv, whose weight has the channels of the output on axis 0, or ConvTranspose, whose weight has those of the input there."""
    bias = vector_of(node, constants)
    if bias is None:
        return None
    group, transposed = node.attributes.get_int("group", 1), node.op_type == "ConvTranspose"
    first, second, *kernel = weight.shape
    ones, rank = (1,) * len(kernel), weight.ndim
    view, axis_0, axis_1 = weight.shape, (first, 1, *ones), (1, second, *ones)
    if group > 1:
        view = (group, first // group, second, *kernel)
        axis_0, axis_1 = (group, first // group, 1, *ones), (group, 1, second, *ones)
    in_shape, out_shape = (axis_0, axis_1) if transposed else (axis_1, axis_0)
    border = transposed or is_padded(node)  # how many places of a transposed kernel an output sees depends on where it lies
    return Linear(node, _value(node), rank, 1, rank, 1, view, in_shape, out_shape, bias, border=border)


def _gemm(node: ir.Node, weight: Array, constants: Constants) -> Linear | None:
    bias = vector_of(node, constants)
    if bias is None or weight.ndim != 2:
        return None
    transposed = node.attributes.get_int("transB", 0)
    outputs, inputs = weight.shape if transposed else weight.shape[::-1]
    in_shape, out_shape = ((1, inputs), (outputs, 1)) if transposed else ((inputs, 1), (1, outputs))
    in_axis = 0 if node.attributes.get_int("transA", 0) else 1
    bias = bias * node.attributes.get_float("beta", 1.0)
    return Linear(
        node, _value(node), 2, 1, 2, in_axis, weight.shape, in_shape, out_shape, bias, factor=node.attributes.get_float("alpha", 1.0)
    )


def _matmul(node: ir.Node, weight: Array, constants: Constants) -> Linear | None:
    shape = node.outputs[0].shape
    if weight.ndim != 2 or shape is None or len(shape) < 2:
        return None
    rank, (inputs, outputs) = len(shape), weight.shape
    y = node.outputs[0]
    reader = next(iter(y.consumers()), None)
    added = only_use(y) and reader is not None and reader.op_type == "Add" and any(constants.of(v) is not None for v in reader.inputs)
    biased = rank == 2 and not added  # it then becomes a Gemm
    return Linear(node, _value(node), rank, rank - 1, rank, rank - 1, weight.shape, (inputs, 1), (1, outputs), np.zeros(()), biased)


def _value(node: ir.Node) -> ir.Value:
    value = node.inputs[1]
    assert value is not None
    return value


def vector_of(node: ir.Node, constants: Constants) -> Array | None:
    """The node's input 2: zero if it has none, None if it is not a constant with one number per channel."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    return np.zeros(()) if value is None else vector(constants.exact(value))


def vector(array: Array | None) -> Array | None:
    """A bias (channels,) or (1, ..., channels) as a vector in float64; None if it varies along another axis."""
    if array is None or array.size != (array.shape or (1,))[-1]:
        return None
    return array.reshape(-1).astype(np.float64)
