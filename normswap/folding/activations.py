r"""How an affine moves through an activation (Relu, LeakyRelu, PRelu, Abs, Neg): what each allows of v = a v' + c on its two sides.

    operator                    scales           shifts        is rewritten to
    Relu                        a_y = a_x >= 0   c_y = c_x     max(x', -c / a), itself if c = 0
    LeakyRelu, PRelu, Abs       a_y = a_x >= 0   all 0         itself
    Neg                         a_y = a_x        c_y = -c_x    itself

Relu: for a > 0, max(a x' + c, 0) = a max(x', -c / a) + c. For a = 0 the result is the constant max(c, 0), which is then c_y.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from normswap.folding.affine import Array, Constants, called
from normswap.folding.basis import Basis, Change, Conflict, Rule, need_positive, same_on_both_sides


def _relu(node: ir.Node, change: Change) -> None:
    x, y = change.bases.slot(node, 0), node.outputs[0]
    basis = change.of(x) if change.fixed(x) else change.of(y)
    need_positive(basis.scale, node)
    if basis.shift.any() and not change.thresholds:
        raise Conflict(f"{called(node)} is next to it, which a shift would move")
    if basis.shift.any() and change.bases.constants.opset < 8:
        raise Conflict(f"{called(node)} would become a maximum with a number per channel, which opset {change.bases.constants.opset} lacks")
    if basis.shift.any() and not change.bases.spatial_thresholds and basis.rank == 4:
        raise Conflict(f"{called(node)} would become a maximum, which takes longer in onnxruntime on a CPU than the norm does")
    if change.fixed(x):
        shift = np.where(basis.scale == 0, np.maximum(basis.shift, 0.0), basis.shift)
        change.set(y, basis.shifted(shift))
    else:
        if not basis.scale.all():
            raise Conflict(f"{called(node)} would be divided by 0")
        change.set(x, basis)


def threshold_of(basis: Basis) -> Array:
    """The constant in max(x', constant) that a ReLU of a shifted x becomes: -c / a, and anything where a = 0."""
    return np.where(basis.scale == 0, 0.0, -basis.shift / np.where(basis.scale == 0, 1.0, basis.scale))


def _leaky(node: ir.Node, basis: Basis, constants: Constants) -> None:
    """The condition of LeakyRelu, PRelu and Abs."""
    if node.op_type == "PRelu" and constants.of(node.inputs[1]) is None:
        raise Conflict(f"{called(node)} is next to it, whose slope depends on the input")
    need_positive(basis.scale, node)
    if basis.shift.any():
        raise Conflict(f"{called(node)} is next to it, which a shift would move")


def _neg(node: ir.Node, change: Change) -> None:
    x, y = change.bases.slot(node, 0), node.outputs[0]
    basis = change.of(x) if change.fixed(x) else change.of(y)
    change.set(y if change.fixed(x) else x, basis.shifted(-basis.shift))


RULES: dict[str, Rule] = {"Relu": _relu, "Neg": _neg, **dict.fromkeys(("LeakyRelu", "PRelu", "Abs"), same_on_both_sides(_leaky))}
