r"""Fold an affine into the linear layer that feeds it.

    y = (W x + b) * s + t  =  (W * s) x + (b * s + t)        s, t: one number per output channel of W

Shapes of W: see `linear.py`. Between the two there may be operators that move values (Transpose, Reshape ...).

Exact if nothing else sees W x + b, if W and b are constants, and if s and t vary along the output channels of W alone. A Linear that is
followed by a BatchNorm1d on (N, L, D) is not such a case: its channels are D, those of the norm are L. s may be 0 and negative.

Other nodes may read W and b, so the folded ones are new constants. They are computed in float64 and rounded once.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from normswap.folding import layouts
from normswap.folding.affine import Affine, Constants, fits, only_use
from normswap.folding.basis import Basis, Conflict
from normswap.folding.linear import Linear, describe, vector
from normswap.folding.write import set_bias


def fold(affine: Affine, constants: Constants, *, adding: bool = False) -> str | None:
    """Fold the affine into the layer before it if that is exact, and return the name of the layer; else None.

    adding: also where the layer has no place for a bias, with an Add after it.
    """
    if not affine.is_private() or affine.x.dtype != affine.y.dtype:
        return None
    value, scale, shift = affine.x, affine.scale, affine.shift
    try:
        while (node := value.producer()) is not None and layouts.moves(node) and node.op_type != "Expand":
            source = node.inputs[0]
            if source is None or not only_use(source):
                return None
            scale, shift = layouts.backward(node, scale), layouts.backward(node, shift)
            value = source
        layer, adder = _layer(node, constants)
        if layer is None or scale.ndim != layer.rank or shift.ndim != layer.rank:
            return None
        scale, shift = Basis(scale, shift).along(layer.axis, layer.outputs)
    except Conflict:
        return None
    if adder is None and not layer.biased and shift.any() and not adding:
        return None
    if affine.spare is not None and layer.copied > affine.spare:
        return None
    bias = layer.bias * scale + shift
    dtype = layer.weight.dtype
    assert dtype is not None
    if not fits(np.abs(bias), dtype.numpy(), zero_below=True):
        return None
    weight = constants.scaled(layer.weight, (scale.reshape(layer.out_shape),), layer.view)
    if weight is None:
        return None
    layer.node.replace_input_with(1, weight)
    if layer.biased or adder is not None or shift.any():
        _set_bias(layer, adder, constants.bias(layer.weight, bias, dtype.numpy()), constants)
    affine.replace_by(affine.x)
    return str(layer.node.name)


def _layer(node: ir.Node | None, constants: Constants) -> tuple[Linear | None, tuple[ir.Node, int] | None]:
    """(the layer, the Add after it and its input that is the layer's bias, if it has one there)."""
    if node is None or node.op_type != "Add" or node.domain != "":
        return describe(node, constants), None
    # A Linear on more than two dimensions. The bias may stand on either side.
    for product, index in ((node.inputs[0], 1), (node.inputs[1], 0)):
        matmul = None if product is None else product.producer()
        if product is not None and matmul is not None and matmul.op_type == "MatMul" and only_use(product):
            layer, bias = describe(matmul, constants), vector(constants.exact(node.inputs[index]))
            if layer is not None and bias is not None:
                return replace(layer, bias=bias), (node, index)
    return None, None


def _set_bias(layer: Linear, adder: tuple[ir.Node, int] | None, bias: ir.Value, constants: Constants) -> None:
    if adder is not None:
        node, index = adder
        node.replace_input_with(index, bias)
    elif layer.biased:
        set_bias(layer.node, bias)
    else:
        product = layer.node.outputs[0]
        users = tuple(product.uses())
        add = ir.Node("", "Add", [product, bias], name=f"{layer.node.name}_bias")
        add.outputs[0].name = constants.fresh(f"{layer.node.name}_bias_output")
        add.outputs[0].shape, add.outputs[0].type = product.shape, product.type
        layer.node.append(add)
        for user, position in users:
            user.replace_input_with(position, add.outputs[0])
