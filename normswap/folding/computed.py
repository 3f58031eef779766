r"""Constants that a graph computes from others: a transposed weight, a cast from half precision, a part of another constant, g v / |v|.

Each is computed when `Constants.of` asks for it, by onnx's own evaluator and in the dtypes of the graph. The graph stays as it is: a weight
that no fold changes is stored as it was. A folded weight becomes a constant, and the nodes that computed it go if nothing else reads them.

A quantised weight (DequantizeLinear) is left alone, as a runtime computes with what is stored; so is one that would make the file much
larger: by more than LIMIT bytes on top of 4 times what it is computed from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]

LIMIT = 1 << 24
MOVES = ("Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Gather", "Split", "Concat", "Expand", "Tile")
ELEMENTWISE = (
    *("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Sum", "Mean", "Where", "Equal", "Not", "Clip"),
    *("Neg", "Abs", "Sqrt", "Exp", "Log", "Reciprocal", "Cast", "CastLike"),
)
REDUCES = ("ReduceL1", "ReduceL2", "ReduceSum", "ReduceSumSquare", "ReduceMean", "ReduceMax", "ReduceMin")
OTHERS = ("ConstantOfShape", "Shape", "Size", "MatMul", "Gemm")
KNOWN = frozenset((*MOVES, *ELEMENTWISE, *REDUCES, *OTHERS))
_COMPUTED, _WHY = "normswap.computed", "normswap.why"


def tensor_of(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of a constant: its own, that of its Constant node, or the one that `compute` has made."""
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        tensor = value.meta.get(_COMPUTED)
    return tensor


def compute(value: ir.Value, of: Callable[[ir.Value], Array | None], opset: int) -> ir.TensorProtocol | None:
    """The tensor that the value's node computes from constants. None if an input is no constant, or the node is none of those above.

    of: the array of a constant.
    """
    node = value.producer()
    if node is None or _COMPUTED in value.meta:
        found: ir.TensorProtocol | None = value.meta.get(_COMPUTED)
        return found
    for output in node.outputs:
        output.meta[_COMPUTED] = None
    if why_not(value) is not None:
        return None
    arrays = [None if given is None else of(given) for given in node.inputs]
    if any(array is None and given is not None for array, given in zip(arrays, node.inputs, strict=True)):
        return None
    more = _growth(node, arrays)
    if more > LIMIT:
        value.meta[_WHY] = f"is computed in the file, and would make it {more / 2**20:.0f} MiB larger as a constant"
        return None
    results = _evaluated(node, arrays, opset)
    if results is None:
        value.meta[_WHY] = f"is computed by {node.op_type} in a form that onnx's evaluator does not know"
        return None
    for output, array in zip(node.outputs, results, strict=True):
        output.meta[_COMPUTED] = ir.tensor(array, name=output.name)
    return compute(value, of, opset)


def why_not(value: ir.Value) -> str | None:
    """Why the node that gives the value is never computed here, as a clause about the value; None if its inputs decide that."""
    node = value.producer()
    if node is None:
        return None
    if _WHY in value.meta:
        return str(value.meta[_WHY])
    if node.domain == "" and node.op_type == "DequantizeLinear":
        return "is quantised, which stays as it is"
    if node.domain != "" or node.op_type not in KNOWN or any(a.is_ref() for a in node.attributes.values()):
        return f"is the output of {node.op_type}"
    return None


def _growth(node: ir.Node, arrays: Sequence[Array | None]) -> int:
    """How many bytes the node's output has beyond 4 times the bytes of its inputs, found without computing it."""
    given = [array for array in arrays if array is not None]
    if node.op_type == "ConstantOfShape":
        sizes = [int(size) for size in given[0].reshape(-1)]
        fill = node.attributes.get("value")
        width = 4 if fill is None else fill.as_tensor().nbytes
    elif node.op_type in ("Expand", "Tile"):
        data, other = given
        shape = (1,) * (other.size - data.ndim) + data.shape
        sizes = [a * int(b) if node.op_type == "Tile" else max(a, int(b)) for a, b in zip(shape, other.reshape(-1), strict=False)]
        width = data.itemsize
    elif node.op_type in ELEMENTWISE and len(given) > 1:
        sizes, width = list(np.broadcast_shapes(*(array.shape for array in given))), max(array.itemsize for array in given)
    else:
        return 0
    return max(0, math.prod(sizes) * width - 4 * sum(array.nbytes for array in given))


def _evaluated(node: ir.Node, arrays: Sequence[Array | None], opset: int) -> Sequence[Array] | None:
    """The outputs of a node by onnx's evaluator; None if it cannot compute them."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    proto = ir.serde.serialize_node(node)
    feeds = {str(given.name): array for given, array in zip(node.inputs, arrays, strict=True) if given is not None}
    for index, output in enumerate(proto.output):
        proto.output[index] = output or f"unused_{index}"
    inputs, outputs = ([onnx.ValueInfoProto(name=name) for name in names] for names in (feeds, proto.output))
    graph = onnx.helper.make_graph([proto], "constant", inputs, outputs)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    try:
        with np.errstate(all="ignore"):
            return [np.asarray(array) for array in ReferenceEvaluator(model).run(None, feeds)]
    except Exception:  # a type, or a form of the operator, that the evaluator does not know
        return None
