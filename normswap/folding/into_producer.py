r"""Fold an affine into the linear layer that feeds it.

    y = (W x + b) * s + t  =  (W * s) x + (b * s + t)        s, t: one number per output channel of W

Shapes of W: Conv (O, I/g, *k); ConvTranspose (I, O/g, *k), output channel g' * O/g + j; Gemm (K, O), or (O, K) under transB; MatMul (K, O).

Exact if nothing else sees W x + b, if W and b are constants, and if s and t vary along the output channels of W alone. A Linear that is
followed by a BatchNorm1d on (N, L, D) is not such a case: its channels are D, those of the norm are L.

W and b may have other users, so the folded ones are new constants. They are computed in float64 and rounded once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from normswap.folding.affine import Affine, Array, Constants, fits, only_use


@dataclass(frozen=True)
class _Layer:
    """A node that multiplies by a constant weight, its input 1.

    axis, rank   where the output's channels lie, and how many dimensions the output has
    scale_shape  what a scale (channels,) is reshaped to, to multiply the weight ...
    view         ... reshaped to this
    bias         what is added per channel, float64, one number or (channels,)
    adder        the node and the number of its input that add it; without a number, a node that adds it must be made
    """

    node: ir.Node
    axis: int
    rank: int
    scale_shape: tuple[int, ...]
    view: tuple[int, ...]
    bias: Array
    adder: tuple[ir.Node, int | None]


def fold(affine: Affine, constants: Constants) -> bool:
    """Do it if it is exact here, and say whether it was done."""
    node = affine.x.producer()
    describe = {"Conv": _conv, "ConvTranspose": _conv_transpose, "Gemm": _gemm, "MatMul": _matmul, "Add": _matmul_add}
    if node is None or node.domain != "" or node.op_type not in describe or not affine.is_private() or affine.x.dtype != affine.y.dtype:
        return False
    layer = describe[node.op_type](node, constants)
    both = None if layer is None else affine.along(layer.axis, rank=layer.rank, size=math.prod(layer.scale_shape))
    if layer is None or both is None:
        return False
    scale, shift = both
    old = layer.node.inputs[1]
    assert old is not None
    assert old.dtype is not None
    bias = layer.bias * scale + shift
    if not fits(np.abs(bias), old.dtype.numpy(), zero_below=True):
        return False
    weight = constants.scaled(old, scale.reshape(layer.scale_shape), layer.view)
    if weight is None:
        return False
    layer.node.replace_input_with(1, weight)
    result = _set_bias(layer, constants.add(f"{old.name}_folded_bias", bias.astype(old.dtype.numpy())))
    affine.replace_by(result)
    return True


def _set_bias(layer: _Layer, bias: ir.Value) -> ir.Value:
    node, index = layer.adder
    if index is None:
        product = node.outputs[0]
        users = tuple(product.uses())
        add = ir.Node("", "Add", [product, bias], name=f"{node.name}_bias")
        add.outputs[0].shape, add.outputs[0].type = product.shape, product.type
        node.append(add)
        for user, position in users:
            user.replace_input_with(position, add.outputs[0])
        return add.outputs[0]
    if node.op_type == "MatMul":
        node.op_type = "Gemm"  # the two-dimensional MatMul that has a bias
    if "beta" in node.attributes:
        node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)  # the new bias contains it
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    node.replace_input_with(index, bias)
    return node.outputs[0]


def _conv(node: ir.Node, constants: Constants) -> _Layer | None:
    weight, bias = constants.of(node.inputs[1]), _bias(node, constants)
    if weight is None or bias is None:
        return None
    scale_shape = (len(weight), *(1,) * (weight.ndim - 1))
    return _Layer(node, 1, weight.ndim, scale_shape, weight.shape, bias, (node, 2))


def _conv_transpose(node: ir.Node, constants: Constants) -> _Layer | None:
    weight, bias = constants.of(node.inputs[1]), _bias(node, constants)
    if weight is None or bias is None:
        return None
    group = node.attributes.get_int("group", 1)
    inputs, outputs, *kernel = weight.shape
    scale_shape = (group, 1, outputs, *(1,) * len(kernel))
    return _Layer(node, 1, weight.ndim, scale_shape, (group, inputs // group, outputs, *kernel), bias, (node, 2))


def _gemm(node: ir.Node, constants: Constants) -> _Layer | None:
    weight, bias = constants.of(node.inputs[1]), _bias(node, constants)
    if weight is None or bias is None:
        return None
    scale_shape = (len(weight), 1) if node.attributes.get_int("transB", 0) else (1, weight.shape[1])
    return _Layer(node, 1, 2, scale_shape, weight.shape, bias * node.attributes.get_float("beta", 1.0), (node, 2))


def _matmul(node: ir.Node, constants: Constants) -> _Layer | None:
    weight, shape = constants.of(node.inputs[1]), node.outputs[0].shape
    if weight is None or weight.ndim != 2 or shape is None:
        return None
    rank = len(shape)
    return _Layer(node, rank - 1, rank, (1, weight.shape[1]), weight.shape, np.zeros(()), (node, 2 if rank == 2 else None))


def _matmul_add(node: ir.Node, constants: Constants) -> _Layer | None:
    # A Linear on more than two dimensions. The bias may stand on either side.
    for product, index in ((node.inputs[0], 1), (node.inputs[1], 0)):
        matmul = None if product is None else product.producer()
        if product is not None and matmul is not None and matmul.op_type == "MatMul" and matmul.domain == "" and only_use(product):
            layer, bias = _matmul(matmul, constants), _vector(constants.of(node.inputs[index]))
            if layer is not None and bias is not None:
                return replace(layer, bias=bias, adder=(node, index))
    return None


def _bias(node: ir.Node, constants: Constants) -> Array | None:
    """The node's input 2: zero if it has none, None if it is not a constant with one number per channel."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    return np.zeros(()) if value is None else _vector(constants.of(value))


def _vector(array: Array | None) -> Array | None:
    # (channels,), or with ones in front of it; a bias that varies along another axis is None.
    if array is None or array.size != (array.shape or (1,))[-1]:
        return None
    return array.reshape(-1).astype(np.float64)
