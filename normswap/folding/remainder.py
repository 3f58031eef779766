r"""What is left of an affine: one BatchNormalization, or a Mul and an Add, and less where its scale is 1 or its shift 0.

    y = (x - 0) / sqrt(var + epsilon) * scale + shift        var + epsilon = 1 without rounding: epsilon = 2^-16

BatchNormalization takes its channels from axis 1 alone, and has no bfloat16 kernel on CUDA. One number for all channels is
no norm. In half precision both are computed in float32 between two casts.
"""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir

from normswap.folding.affine import Affine, Array, Constants
from normswap.folding.basis import Basis, Conflict

EPSILON = 2.0**-16


def scale_and_shift(affine: Affine, x: Basis, y: Basis) -> tuple[Array, Array]:
    """What computes y' from x'."""
    if x.is_identity() and y.is_identity():
        return affine.scale, affine.shift
    return affine.scale * x.scale / y.scale, (affine.scale * x.shift + affine.shift - y.shift) / y.scale


def batch_normalizes(affine: Affine) -> bool:
    """Whether a BatchNormalization can compute it."""
    return _channels(affine, affine.scale, affine.shift) is not None and affine.x.dtype != ir.DataType.BFLOAT16


def write(affine: Affine, scale: Array, shift: Array, constants: Constants, names: set[str]) -> tuple[str, ...]:
    """Compute y so, with as few operators as there are; their types. What does so already, in as few, is left as it is."""
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
        names.add(name)  # onnxruntime wants them all different
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
