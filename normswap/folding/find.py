r"""The affines of any ONNX graph: BatchNormalization in inference mode, and chains of Mul, Div, Add, Sub with constants; and its other
norms, each with the reason why it is no affine.

    BatchNormalization    s = scale / sqrt(var + epsilon),  t = B - mean * s
    a chain               s <- s * k, t <- t * k for a Mul; t <- t + k for an Add; likewise Div and Sub

The Add of a bias after a MatMul is part of that layer, and no affine. Neither is arithmetic on values with less than two axes, nor the gain
of a norm that is written in operators, by which runtimes know the norm: they compute all of it in one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

import numpy as np
import onnx_ir as ir

from normswap.folding.affine import Affine, Array, Constants, only_use
from normswap.folding.linear import FLOATS

ELEMENTWISE = ("Mul", "Div", "Add", "Sub")
SPARE = 1 << 16  # bytes of shared weights that may be stored a second time to fold a single product or sum, which is no norm
PARAMETERS = ("scale", "bias", "mean", "variance")  # inputs 1 to 4 of a BatchNormalization
EPSILON = float(np.float32(1e-5))  # of a BatchNormalization that has none: an attribute is a float32, in a file in float64, too
NORM = re.compile(r"norm(?!al(?!iz))|^lrn$", re.IGNORECASE)  # LayerNormalization, SkipLayerNorm, LRN; not RandomNormal
PER_SAMPLE = (
    "its statistics are those of each input, so it cannot be folded: to be rid of it, convert the model that the file was made from with "
    "`normswap convert --approximate`"
)
NO_RANK = (
    "its rank is not known, as nothing around it tells the shape of its input: give the inputs of the file their sizes "
    "(`onnx.tools.update_model_dims`), and write it again with `onnx.shape_inference.infer_shapes`"
)
TRAINING = "it is in training mode, so it normalizes by the statistics of each batch: export the model again in eval mode (`model.eval()`)"


def affines(graph: ir.Graph, constants: Constants) -> list[Affine]:
    """The affines of the graph, in its order."""
    done = {each for node in graph.all_nodes() for each in gain_of(node, constants)}
    result = []
    for node in graph.all_nodes():
        if node in done:
            continue
        chain = list(_chain(node, constants))
        if chain:
            done.update(chain)
            result.append(affine_of(chain, constants))
    return result


def gain_of(div: ir.Node, constants: Constants) -> list[ir.Node]:
    """The gain of a norm that is written in operators: the Mul with a constant behind the Div of d / sqrt(mean(d^2) + eps).

    If d is a difference, x - mean(x), it is a LayerNorm, and the Add of a bias behind the Mul is its part, too.
    """
    if div.op_type != "Div" or div.domain != "" or div.inputs[0] is None:
        return []
    d, square = div.inputs[0], _made_by(div.inputs[1], "Sqrt", "Add", "ReduceMean")
    power = None if square is None else square.inputs[0]
    by = None if power is None else power.producer()
    if by is None or by.op_type not in ("Pow", "Mul") or by.inputs[0] is not d or (by.op_type == "Mul" and by.inputs[1] is not d):
        return []
    found: list[ir.Node] = []
    centred = d.producer()
    for op_type in ("Mul", "Add") if centred is not None and centred.op_type == "Sub" else ("Mul",):
        value = found[-1].outputs[0] if found else div.outputs[0]
        reader = next(iter(value.consumers()), None)
        if not only_use(value) or reader is None or reader.op_type != op_type or _place(reader, constants) is None:
            break
        found.append(reader)
    return found


def _made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node with the last of these types on the way back from a value through nodes of these types."""
    node = None
    given = [value]
    for op_type in op_types:
        makers = [each.producer() for each in given if each is not None]
        node = next((maker for maker in makers if maker is not None and maker.op_type == op_type), None)
        given = [] if node is None else list(node.inputs)
    return node


def is_norm(node: ir.Node) -> bool:
    return NORM.search(node.op_type) is not None


def others(model: ir.Model, affines: Collection[Affine], constants: Constants, reason: str | None = None) -> list[tuple[ir.Node, str]]:
    """Each norm of the model, in its graph or in a function, that is part of no affine, and why. reason: the same one for all."""
    part = {node for affine in affines for node in affine.nodes}
    calls = set(model.functions)
    found = []
    for node in model.graph.all_nodes():
        if is_norm(node) and node not in part and node.op_identifier() not in calls:
            found.append((node, reason or _why(node, constants)))
    for function in model.functions.values():
        where = (
            f"it is inside the function {function.domain}::{function.name}, which stays as it is, as a runtime may know it by its name: "
        )
        for node in function.all_nodes():
            if is_norm(node) and node.op_identifier() not in calls:
                found.append((node, reason or f"{where}`onnx.inliner.inline_local_functions` turns it into an ordinary part of the graph"))
    return found


def _why(node: ir.Node, constants: Constants) -> str:
    """Why a norm is no affine, and what to do."""
    if node.op_type != "BatchNormalization" or node.domain != "":
        return PER_SAMPLE if node.domain in ("", "com.microsoft") else f"it is an operator of {node.domain} that folding does not know"
    if _trains(node, constants.opset):
        return TRAINING
    for name, value in zip(PARAMETERS, node.inputs[1:], strict=False):
        array = constants.of(value)
        if value is None or array is None:
            what = "is missing" if value is None else constants.why_not(value)
            ending = ": leave it out of the inputs of the file" if "caller may replace" in what else ""
            return f"its {name} is not a constant: {'it' if value is None else value.name} {what}{ending}"
        if array.ndim != 1:
            return f"its {name} has {array.ndim} dimensions, so it is not one number per channel"
    x, y = node.inputs[0], node.outputs[0]
    if y.shape is None:
        return NO_RANK
    if x is None or y.dtype is None or y.dtype.numpy().name not in FLOATS:
        return "the type of its output is not known, or not a floating-point type"
    return "it has no axis of channels" if len(y.shape) < 2 else "its statistics do not have one number for each channel of its input"


def _trains(node: ir.Node, opset: int) -> bool:
    """Whether a BatchNormalization is in training mode. Before opset 14 it was if it had a second output, read or not."""
    return bool(node.attributes.get_int("training_mode", 0)) or (opset < 14 and any(value.name for value in node.outputs[1:]))


def _chain(node: ir.Node, constants: Constants) -> Iterator[ir.Node]:
    """`node` and the nodes after it, as long as each is an affine and alone reads the output of the one before."""
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
    """The axes along which the constants of a node vary, counted from the last."""
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
        shapes = {None if (array := constants.of(value)) is None else array.shape for value in node.inputs[1:]}
        channels = y.shape[1] if isinstance(y.shape[1], int) else None
        return not _trains(node, constants.opset) and len(node.inputs) == 5 and len(shapes) == 1 and shapes <= {(channels,)}
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
    """The index of the input that is not constant, if the other one is."""
    known = [constants.of(value) is not None for value in node.inputs]
    return known.index(False) if sum(known) == 1 else None


def affine_of(chain: list[ir.Node], constants: Constants) -> Affine:
    """The affine that nodes compute of which each alone reads the output of the one before, named after the first."""
    y = chain[-1].outputs[0]
    assert y.shape is not None
    rank, size = len(y.shape), None
    scale, shift = np.ones((1,) * rank), np.zeros((1,) * rank)
    with np.errstate(all="ignore"):  # an affine with numbers that are not finite is not folded
        for node in chain:
            k, t, spread = _step(node, rank, constants)
            scale, shift = scale * k, shift * k + t
            size = spread if node is chain[0] else size
    index = 0 if chain[0].op_type == "BatchNormalization" else _place(chain[0], constants) or 0
    spare = SPARE if len(chain) == 1 and chain[0].op_type != "BatchNormalization" else None
    return Affine(str(chain[0].name or chain[0].outputs[0].name), tuple(chain), scale, shift, index, size, spare=spare)


def _step(node: ir.Node, rank: int, constants: Constants) -> tuple[Array, Array, Array | None]:
    """(scale, shift, the root mean square of the input if it is known) of one node."""
    if node.op_type == "BatchNormalization":
        vectors = []
        for value in node.inputs[1:]:
            array = constants.of(value)
            assert array is not None
            vectors.append(array.astype(np.float64).reshape(1, -1, *(1,) * (rank - 2)) if rank > 1 else array.astype(np.float64))
        weight, bias, mean, var = vectors
        factor = weight / np.sqrt(var + node.attributes.get_float("epsilon", EPSILON))
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
