r"""The shapes of the values of a graph, as far as anything in the file tells them.

ONNX's own inference comes first, and overrides the shapes that the file stores, which are wrong once somebody has edited the graph. It ends
at an operator of another domain, and at a shape that is computed at run time. There the layers tell more:

    Conv, ConvTranspose     have the rank of their weight, and its channels
    Gemm                    has rank 2
    BatchNormalization      has one shape at both ends, with its channels on axis 1
    LayerNormalization      has one shape at both ends, with the channels of its weight on the last axis, if it is over that
    Slice                   leaves the axes as they are that it does not cut, whatever it cuts off
    Reshape                 has as many axes as its shape has numbers, and those of them that follow from other shapes
    ReLU and the like       have one shape at both ends
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import onnx_ir as ir

from normswap.folding.computed import tensor_of

Size = int | str | None
UNARY = frozenset(
    (
        *("Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Gelu", "Mish", "Clip", "Sigmoid", "HardSigmoid", "HardSwish"),
        *("Tanh", "Erf", "Exp", "Sqrt", "Abs", "Neg", "Softplus", "Softsign", "Identity"),
    )
)
_LONGEST = 16  # numbers in a shape
_FAR = 1 << 30
_ROUNDS = 8  # one gets past one operator of unknown shape on each path; what is behind more of them stays unknown


def infer(model: ir.Model) -> None:
    """Store shape and type at every value where they can be inferred, also at inputs and outputs. The caller may restore those."""
    declared = {}
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape([_known(size) for size in value.shape])
    for node in model.graph.all_nodes():
        for value in node.outputs if node.domain == "" else ():
            declared[value] = value.shape, value.type
            value.shape = None
            if not value.is_graph_output():
                value.type = None
    _rounds(model)
    for value, (shape, kind) in declared.items():
        if value.shape is None and shape is not None:
            value.shape = ir.Shape([_known(size) for size in shape])
        if value.type is None:
            value.type = kind
    _rounds(model)


def _rounds(model: ir.Model) -> None:
    from onnx_ir.passes import common

    for _ in range(_ROUNDS):
        common.ShapeInferencePass(check_type=False, strict_mode=False)(model)
        new = [_by_layer(node) for node in model.graph.all_nodes() if node.domain == ""]
        if not any(new):
            break


def _known(size: int | ir.SymbolicDim) -> int | str | None:
    """The size, or None if it says nothing: -1, or a name that some tools give to every free axis."""
    if isinstance(size, int):
        return size if size >= 0 else None
    name = size.value
    return name if name is not None and re.search(r"[A-Za-z0-9]", name) and name not in ("None", "none", "-1") else None


def _by_layer(node: ir.Node) -> bool:
    """Store the shapes that follow from the operator of a node and from its weight. Returns whether any was new."""
    x, y = (node.inputs[0] if node.inputs else None), node.outputs[0]
    if x is None:
        return False
    if node.op_type in UNARY:
        return _alike(x, y)
    if node.op_type == "Slice":
        sizes, axes = _sizes(x), tensor_of(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else None
        cut = [] if sizes is None or axes is None else [int(a) % len(sizes) for a in axes.numpy().reshape(-1)]
        return bool(cut) and _meet(y, [None if a in cut else size for a, size in enumerate(sizes or ())]) | _same_type(x, y)
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if node.op_type == "Reshape" and weight is not None:
        numbers = _numbers(weight)
        return numbers is not None and _meet(y, _reshaped(node, _sizes(x), numbers)) | _same_type(x, y)
    shape = None if weight is None else _sizes(weight)
    if weight is None or shape is None:
        return False
    if node.op_type == "BatchNormalization":
        rank = len(_sizes(x) or _sizes(y) or ())
        channels = [[None, shape[0], *[None] * (rank - 2)]] if len(shape) == 1 < rank else []
        return _alike(x, y) | any([_meet(value, sizes) for value in (x, y) for sizes in channels])  # noqa: C419  each is to be met
    if node.op_type == "LayerNormalization":
        rank = len(_sizes(x) or _sizes(y) or ())
        channels = (
            [[*[None] * (rank - 1), shape[0]]] if len(shape) == 1 <= rank and node.attributes.get_int("axis", -1) in (-1, rank - 1) else []
        )
        return _alike(x, y) | any([_meet(value, sizes) for value in (x, y) for sizes in channels])  # noqa: C419  each is to be met
    if node.op_type == "Gemm" and len(shape) == 2:
        ins, outs = shape[::-1] if node.attributes.get_int("transB", 0) else shape
        return _meet(x, [None, None if node.attributes.get_int("transA", 0) else ins]) | _meet(y, [None, outs]) | _same_type(weight, x, y)
    if node.op_type in ("Conv", "ConvTranspose") and len(shape) > 2:
        group, (first, second) = node.attributes.get_int("group", 1), shape[:2]
        second = second * group if isinstance(second, int) else None
        ins, outs = (second, first) if node.op_type == "Conv" else (first, second)
        space = [None] * (len(shape) - 2)
        return _meet(x, [None, ins, *space]) | _meet(y, [None, outs, *space]) | _same_type(weight, x, y)
    return False


def _reshaped(node: ir.Node, sizes: Sequence[Size] | None, numbers: Sequence[int | None]) -> list[Size]:
    """The shape after a Reshape: 0 keeps a size, -1 is what is left."""
    copies = sizes is not None and not node.attributes.get_int("allowzero", 0)
    kept = [sizes[i] if sizes is not None and copies and i < len(sizes) else None for i in range(len(numbers))]
    result: list[Size] = [kept[i] if n == 0 else None if n == -1 else n for i, n in enumerate(numbers)]
    known = [size for i, size in enumerate(result) if i != (numbers.index(-1) if -1 in numbers else None)]
    if -1 in numbers and sizes is not None and all(isinstance(size, int) and size > 0 for size in (*sizes, *known)):
        result[numbers.index(-1)] = math.prod(sizes) // math.prod(known)  # type: ignore[arg-type]
    return result


def _numbers(value: ir.Value) -> list[int | None] | None:
    """The numbers in a vector of sizes, as far as they are known before the model runs; None if not even their count is."""
    tensor, node = tensor_of(value), value.producer()
    if tensor is not None:
        plain = tensor.dtype.is_integer() and len(tensor.shape) < 2 and tensor.size <= _LONGEST
        return [int(n) for n in tensor.numpy().reshape(-1)] if plain else None
    found = None
    given = [] if node is None or node.domain != "" else [v for v in node.inputs if v is not None]
    if node is not None and given:
        starts, ends, _, steps = ((None if v is None else _numbers(v)) for v in (*node.inputs[1:], None, None, None, None)[:4])
        if node.op_type == "Shape":
            sizes = _sizes(given[0])
            part = slice(node.attributes.get_int("start", 0), node.attributes.get_int("end", _FAR))
            found = None if sizes is None else [size if isinstance(size, int) else None for size in sizes][part]
        elif node.op_type in ("Identity", "Cast", "Squeeze", "Unsqueeze"):
            found = _numbers(given[0])
        elif node.op_type == "Concat":
            parts = [_numbers(v) for v in given]
            found = None if None in parts else [n for part in parts for n in part or ()]
        elif node.op_type == "Gather" and starts is not None and None not in starts and (data := _numbers(given[0])) is not None:
            found = [data[i or 0] for i in starts] if all(-len(data) <= (i or 0) < len(data) for i in starts) else None
        elif node.op_type == "Slice" and starts and ends and None not in (*starts, *ends) and (data := _numbers(given[0])) is not None:
            step = [1] if len(node.inputs) < 5 or node.inputs[4] is None else steps
            found = None if step is None or step[0] is None else data[starts[0] : ends[0] : step[0]]
    own = _sizes(value)
    count = own[0] if own is not None and len(own) == 1 and isinstance(own[0], int) and own[0] <= _LONGEST else None
    if found is not None and (count is None or len(found) == count):
        return found
    return None if count is None else [None] * count


def _alike(x: ir.Value, y: ir.Value) -> bool:
    return _meet(x, _sizes(y)) | _meet(y, _sizes(x)) | _same_type(x, y)


def _sizes(value: ir.Value) -> list[Size] | None:
    tensor = tensor_of(value) if value.shape is None else None
    shape = value.shape if tensor is None else ir.Shape(tensor.shape.numpy())
    return None if shape is None else [size if isinstance(size, int) else size.value for size in shape]


def _meet(value: ir.Value, sizes: Sequence[Size] | None) -> bool:
    """Store the sizes of a value that were not known yet. Returns whether there were any."""
    if sizes is None:
        return False
    own = _sizes(value)
    if own is None:
        value.shape = ir.Shape(sizes)
        return True
    if len(own) != len(sizes):
        return False
    merged = [known if isinstance(known, int) or not isinstance(new, int) else new for known, new in zip(own, sizes, strict=True)]
    if merged == own:
        return False
    value.shape = ir.Shape(merged)
    return True


def _same_type(*values: ir.Value) -> bool:
    """Give values of unknown type the type of the others. Returns whether there were any."""
    kind = next((value.type for value in values if value.type is not None and value.dtype is not None), None)
    left = [value for value in values if value.type is None or value.dtype is None]
    for value in left if kind is not None else ():
        value.type = kind
    return bool(left) and kind is not None
