r"""The affines of any ONNX graph: BatchNormalization in inference mode, and chains of Mul, Div, Add, Sub with constants.

    BatchNormalization    s = scale / sqrt(var + epsilon),  t = B - mean * s
    a chain               s <- s * k, t <- t * k for a Mul; t <- t + k for an Add; likewise Div and Sub

The bias that a MatMul gets by an Add is part of that layer, and so is no affine. Nor is arithmetic on less than two axes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from normswap.folding.affine import Affine, Array, Constants, only_use
from normswap.folding.linear import FLOATS

ELEMENTWISE = ("Mul", "Div", "Add", "Sub")


def affines(graph: ir.Graph, constants: Constants) -> list[Affine]:
    """In the order of the graph."""
    done: set[ir.Node] = set()
    result = []
    for node in graph.all_nodes():
        if node in done:
            continue
        chain = list(_chain(node, constants))
        if chain:
            done.update(chain)
            result.append(_affine(chain, constants))
    return result


def _chain(node: ir.Node, constants: Constants) -> Iterator[ir.Node]:
    """`node` and what follows it alone, as far as each is an affine."""
    current: ir.Node | None = node
    axes: set[int] = set()
    while current is not None and _is_affine(current, constants):
        own = _axes(current, constants)
        if axes and own and axes != own:
            return  # a sum with an embedding of positions, then a norm: one of them may fold, both together cannot
        axes |= own
        yield current
        y = current.outputs[0]
        readers = list(y.consumers())
        current = readers[0] if only_use(y) and readers[0].graph is current.graph else None


def _axes(node: ir.Node, constants: Constants) -> set[int]:
    """Those that it varies along, from the last."""
    y = node.outputs[0]
    assert y.shape is not None
    if node.op_type == "BatchNormalization":
        return {1 - len(y.shape)}
    arrays = (constants.of(value) for value in node.inputs)
    return {axis - array.ndim for array in arrays if array is not None for axis in range(array.ndim) if array.shape[axis] > 1}


def _is_affine(node: ir.Node, constants: Constants) -> bool:
    y = node.outputs[0]
    if node.domain != "" or y.dtype is None or y.dtype.numpy().name not in FLOATS or y.shape is None or len(y.shape) < 2:
        return False  # one number, or one vector, has no channels: the scale of a quantised layer, say
    if node.op_type == "BatchNormalization":
        used = [value for value in node.outputs if value.uses() or value.is_graph_output()]
        inference = not node.attributes.get_int("training_mode", 0) and len(used) <= 1
        return inference and len(node.inputs) == 5 and all(constants.of(value) is not None for value in node.inputs[1:])
    if node.op_type not in ELEMENTWISE or len(node.inputs) != 2:
        return False
    place = _place(node, constants)
    if place is None or (node.op_type == "Div" and place == 1):
        return False
    x = node.inputs[place]
    if x is None or x.shape is None or len(x.shape) != len(y.shape) or x.dtype != y.dtype:
        return False
    producer = x.producer()
    return not (node.op_type == "Add" and producer is not None and producer.op_type == "MatMul")


def _place(node: ir.Node, constants: Constants) -> int | None:
    """Which input is no constant, if the other is one."""
    known = [constants.of(value) is not None for value in node.inputs]
    return known.index(False) if sum(known) == 1 else None


def _affine(chain: list[ir.Node], constants: Constants) -> Affine:
    y = chain[-1].outputs[0]
    assert y.shape is not None
    rank, size = len(y.shape), None
    scale, shift = np.ones((1,) * rank), np.zeros((1,) * rank)
    with np.errstate(all="ignore"):  # what is not finite is left as it is
        for node in chain:
            k, t, spread = _step(node, rank, constants)
            scale, shift = scale * k, shift * k + t
            size = spread if node is chain[0] else size
    index = 0 if chain[0].op_type == "BatchNormalization" else _place(chain[0], constants) or 0
    return Affine(str(chain[0].name or chain[0].outputs[0].name), tuple(chain), scale, shift, index, size)


def _step(node: ir.Node, rank: int, constants: Constants) -> tuple[Array, Array, Array | None]:
    """(scale, shift, the root mean square of the input if it is known) of one node."""
    if node.op_type == "BatchNormalization":
        vectors = []
        for value in node.inputs[1:]:
            array = constants.of(value)
            assert array is not None
            vectors.append(array.astype(np.float64).reshape(1, -1, *(1,) * (rank - 2)) if rank > 1 else array.astype(np.float64))
        weight, bias, mean, var = vectors
        factor = weight / np.sqrt(var + node.attributes.get_float("epsilon", 1e-5))
        return factor, bias - mean * factor, np.sqrt(mean**2 + var)
    place = _place(node, constants)
    assert place is not None
    array = constants.of(node.inputs[1 - place])
    assert array is not None
    factor = array.astype(np.float64).reshape((1,) * (rank - array.ndim) + array.shape)
    one, none = np.ones((1,) * rank), np.zeros((1,) * rank)
    if node.op_type == "Mul":
        return factor, none, None
    if node.op_type == "Div":
        return 1 / factor, none, None
    if node.op_type == "Add":
        return one, factor, None
    return (one, -factor, None) if place == 0 else (-one, factor, None)
