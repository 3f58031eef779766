r"""Rewrites the graph, once all is decided: operators get their new constants, and what is left of an affine becomes nodes.

What is left is one BatchNormalization, or a Mul and an Add, and less where its scale is 1 or its shift 0:

    y = (x - 0) / sqrt(var + epsilon) * scale + shift        var + epsilon = 1 without rounding: epsilon = 2^-16

BatchNormalization takes its channels from axis 1 alone, and has no bfloat16 kernel on CUDA. One number for all channels is no norm. In half
precision both are computed in float32 between two casts.
"""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir

from normswap.folding.activations import threshold_of
from normswap.folding.affine import Affine, Array, Constants
from normswap.folding.basis import Bases, Basis, Change, Conflict, Slot, Use
from normswap.folding.linear import Linear, describe
from normswap.folding.operator_rules import around

EPSILON = 2.0**-16


def write_operators(bases: Bases) -> None:
    """Let every operator compute with the stored values v'. The caller writes the affines."""
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
    scale, shift, out_scale, out_shift = around(layer, change)
    node, constants = layer.node, change.bases.constants
    if (scale == 1).all() and (out_scale == 1).all() and not shift.any() and not out_shift.any():
        return
    dtype = layer.weight.dtype
    assert dtype is not None
    bias = layer.rebased(shift, out_scale, out_shift)
    weight = constants.scaled(layer.weight, layer.weight_factor(scale, out_scale), layer.view)
    assert weight is not None
    node.replace_input_with(1, weight)
    if layer.biased and (bias.any() or layer.bias.any()):
        set_bias(node, constants.bias(layer.weight, bias, dtype.numpy()))


def set_bias(node: ir.Node, bias: ir.Value) -> None:
    """Give a linear layer this bias, its input 2."""
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
    node.replace_input_with(1, bases.constants.add(f"{node.name}_threshold", threshold_of(basis).astype(x.dtype.numpy())))


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


# -- what is left of an affine ------------------------------------------------------------------------------------------------------------


def scale_and_shift(affine: Affine, x: Basis, y: Basis) -> tuple[Array, Array]:
    """The affine that computes y' from x', where x and y are stored in other bases."""
    if x.is_identity() and y.is_identity():
        return affine.scale, affine.shift
    return affine.scale * x.scale / y.scale, (affine.scale * x.shift + affine.shift - y.shift) / y.scale


def batch_normalizes(affine: Affine) -> bool:
    """Whether a BatchNormalization can compute it."""
    return _channels(affine, affine.scale, affine.shift) is not None and affine.x.dtype != ir.DataType.BFLOAT16


def write_remainder(affine: Affine, scale: Array, shift: Array, constants: Constants, names: set[str]) -> tuple[str, ...]:
    """Compute y = x * scale + shift with as few operators as possible, and return their types. Nodes that do so already stay."""
    as_it_is = scale is affine.scale and shift is affine.shift
    dtype = affine.x.dtype
    assert dtype is not None
    wide = affine.wide or dtype
    size = _channels(affine, scale, shift)
    steps: list[tuple[str, list[ir.Value], list[ir.Attr]]] = []
    if size is not None and (scale != 1).any() and shift.any() and dtype != ir.DataType.BFLOAT16:
        arrays = {"scale": scale, "shift": shift}
        numbers = {f"{affine.name}.{key}": np.broadcast_to(array.reshape(-1), (size,)) for key, array in arrays.items()}
        numbers |= {"no_mean": np.zeros(size), "unit_variance": np.full(size, 1 - EPSILON)}
        values = [constants.add(key, array.astype(wide.numpy())) for key, array in numbers.items()]
        steps.append(("BatchNormalization", values, [ir.AttrFloat32("epsilon", EPSILON)]))
    else:
        if (scale != 1).any():
            steps.append(("Mul", [constants.add(f"{affine.name}.scale", scale.astype(wide.numpy()))], []))
        if shift.any():
            steps.append(("Add", [constants.add(f"{affine.name}.shift", shift.astype(wide.numpy()))], []))
    left = tuple(op_type for op_type, _, _ in steps)
    if not steps and affine.has_two_names():
        steps = [("Identity", [], [])]
    if as_it_is and all(node.domain == "" for node in affine.nodes) and len(affine.nodes) <= len(steps):
        return tuple(node.op_type for node in affine.nodes)
    if steps and dtype != wide:
        steps = [("Cast", [], [ir.AttrInt64("to", wide)]), *steps, ("Cast", [], [ir.AttrInt64("to", dtype)])]
    value = affine.x
    for op_type, others, attributes in steps:
        plain = f"{affine.name}.{op_type}"
        name = next(n for n in itertools.chain([plain], (f"{plain}_{i}" for i in itertools.count(1))) if n not in names)
        names.add(name)  # onnxruntime wants each node to have a name of its own
        node = ir.Node("", op_type, [value, *others], attributes, name=name)
        affine.nodes[0].prepend(node)
        value = node.outputs[0]
        value.name = constants.fresh(f"{name}_output")
        value.shape = affine.y.shape
        value.type = ir.TensorType(ir.DataType(attributes[0].as_int()) if op_type == "Cast" else wide)
    affine.replace_by(value)
    return left


def _channels(affine: Affine, scale: Array, shift: Array) -> int | None:
    """The number of channels, if scale and shift vary along axis 1 alone. One number for all channels is no norm."""
    shape = affine.x.shape
    if scale.size == shift.size == 1 and shape is not None and len(shape) > 1 and shape[1] != 1:
        return None
    if shape is None or len(shape) < 2 or not isinstance(shape[1], int) or scale.ndim != len(shape):
        return None
    try:
        Basis(scale, shift).along(1, shape[1])
    except Conflict:
        return None
    return shape[1]
