r"""Rewrites that shorten an ONNX graph without changing what it computes: torch writes graphs that are longer than needed.

    a shape that is known up to one size              a constant with -1 in that place
    a part of a constant                              that part
    Reshape, Transpose, Reshape of the two last axes  one Transpose
    Reshape to the shape that it has                  nothing
    Concat of a Concat                                one Concat
    AveragePool of a pointwise convolution            the convolution of the averages, which are fewer

The first two are onnxscript's, which torch runs as well, but without the sizes that ONNX's shape inference finds; the others are here. All
are exact but for the order in which the last one adds up:

    mean(W x + b) = W mean(x) + b        W is 1x1: it does not see neighbours; the mean of b is b

The convolution then multiplies at fewer places: 4 times fewer in the transitions of a DenseNet.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from normswap.models.quiet import quiet

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

_ROUNDS = 8  # far more than are needed: one rewrite may make the next possible
_PICKS = ("Gather", "Slice")  # operators that take a part of a constant
_HIDDEN = "normswap.hidden"


def simplify(model: ir.Model) -> None:
    """Shorten the graph, in place. Its inputs, its outputs and its functions stay as they are, and so does every node of a domain that ONNX
    does not know."""
    from onnx_ir.passes import common
    from onnxscript import optimizer

    with _through(model.graph):
        for _ in range(_ROUNDS):
            before = model.graph.num_nodes()
            with quiet():
                common.ShapeInferencePass(check_type=False, strict_mode=False)(model)
                # Functions are not inlined, as a runtime may have a kernel of their name.
                optimizer.optimize_ir(model, should_fold=lambda node: True if _is_smaller(node) else None, inline=False)
                common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
            _without_allowzero(model)
            changed = [node for node in list(model.graph) if node.domain == "" and node.op_type in _RULES and _RULES[node.op_type](node)]
            common.RemoveUnusedNodesPass()(model)
            if not changed and model.graph.num_nodes() == before:
                break


def _without_allowzero(model: ir.Model) -> None:
    """Take off the attribute of Reshape that onnxscript sets in files of any opset, and that ONNX has from opset 14 on."""
    if model.graph.opset_imports.get("", 0) < 14:
        for node in model.graph.all_nodes():
            numbers = _numbers(node.inputs[1]) if node.op_type == "Reshape" and node.domain == "" else None
            if numbers is not None and numbers.all():  # it tells what a 0 means
                node.attributes.pop("allowzero", None)


@contextlib.contextmanager
def _through(graph: ir.Graph) -> Iterator[None]:
    """Hide outputs of the graph that are inputs or constants, which onnx_ir would rename, with an Identity after them."""
    hidden = {index: value for index, value in enumerate(graph.outputs) if value.producer() is None}
    for index in reversed(hidden):
        del graph.outputs[index]
    try:
        yield
    finally:
        for index, value in hidden.items():
            graph.outputs.insert(index, value)
            if value.const_value is not None and not value.is_graph_input():
                graph.initializers[str(value.name)] = value


@contextlib.contextmanager
def norms_stay(model: ir.Model) -> Iterator[None]:
    """Hide the remaining BatchNormalizations from onnxscript, which would fold them into convolutions all the same, in float32."""
    left = [node for node in model.graph.all_nodes() if node.op_type == "BatchNormalization" and node.domain == ""]
    for node in left:
        node.domain = _HIDDEN
    model.opset_imports[_HIDDEN] = 1
    try:
        yield
    finally:
        for node in left:
            node.domain = ""
        model.opset_imports.pop(_HIDDEN, None)


def _is_smaller(node: ir.Node) -> bool:
    """Whether the node takes a part of a constant: a file that holds that part instead is not larger."""
    data, result = (node.inputs[0] if node.inputs else None), node.outputs[0]
    if node.domain != "" or node.op_type not in _PICKS or data is None or data.const_value is None or result.shape is None:
        return False
    sizes = [size for size in result.shape if isinstance(size, int)]
    return len(sizes) == len(result.shape) and math.prod(sizes) <= data.const_value.size


def _reshape(node: ir.Node) -> bool:
    return _same_shape(node) or _transposition(node)


def _same_shape(node: ir.Node) -> bool:
    """Reshape to the shape that its input has."""
    from normswap.folding.affine import replace_value

    x, y = node.inputs[0], node.outputs[0]
    if x is None or x.shape is None or y.shape is None or y.is_graph_output() or len(x.shape) != len(y.shape):
        return False
    known = [isinstance(a, int) and a == b for a, b in zip(x.shape, y.shape, strict=True)]
    if known.count(False) > 1:  # one unknown size follows from the others, as the number of elements is the same
        return False
    replace_value(y, x, [node])
    return True


def _transposition(node: ir.Node) -> bool:
    """(..., a, b) to (-1, a, b) to (-1, b, a) to (..., b, a): how torch writes a transposition of the last two axes of unknown rank."""
    import onnx_ir as ir

    from normswap.folding.affine import replace_value

    y, middle = node.outputs[0], node.inputs[0]
    transpose = _only(middle, "Transpose")
    first = None if transpose is None else _only(transpose.inputs[0], "Reshape")
    x = None if first is None else first.inputs[0]
    if transpose is None or first is None or x is None or x.shape is None or y.shape is None:
        return False
    source, target, between = list(x.shape), list(y.shape), _numbers(first.inputs[1])
    if list(transpose.attributes.get_ints("perm", ())) != [0, 2, 1] or between is None or len(between) != 3 or len(source) < 3:
        return False
    a, b = source[-2:]
    if not (isinstance(a, int) and isinstance(b, int) and [int(n) for n in between[1:]] == [a, b] and target[-2:] == [b, a]):
        return False
    known = [isinstance(m, int) and m == n for m, n in zip(source[:-2], target[:-2], strict=False)]
    if len(source) != len(target) or known.count(False) > 1:
        return False
    rank = len(source)
    new = ir.Node("", "Transpose", [x], [ir.AttrInt64s("perm", [*range(rank - 2), rank - 1, rank - 2])], name=node.name)
    new.outputs[0].shape, new.outputs[0].type = ir.Shape([*source[:-2], b, a]), y.type
    node.prepend(new)
    replace_value(y, new.outputs[0], [node])
    return True


def _gather_elements(node: ir.Node) -> bool:
    """GatherElements of constants, which ONNX's reference implementation cannot compute in all cases."""
    import numpy as np
    import onnx_ir as ir

    from normswap.folding.affine import replace_value

    data, indices = (_numbers(value) for value in node.inputs)
    y, graph = node.outputs[0], node.graph
    if data is None or indices is None or indices.size > data.size or graph is None or y.is_graph_output():
        return False
    axis = node.attributes.get_int("axis", 0) % data.ndim
    part = data[tuple(slice(None) if i == axis else slice(size) for i, size in enumerate(indices.shape))]
    picked = np.take_along_axis(part, indices, axis)
    value = ir.Value(name=y.name, shape=ir.Shape(picked.shape), type=y.type, const_value=ir.tensor(picked, name=y.name))
    replace_value(y, value, [node])
    graph.register_initializer(value)
    return True


def _concat(node: ir.Node) -> bool:
    """Concat of a Concat along the same axis."""
    import onnx_ir as ir

    from normswap.folding.affine import replace_value

    axis, y = node.attributes.get_int("axis"), node.outputs[0]
    inner = [_only(value, "Concat") for value in node.inputs]
    inner = [n if n is not None and n.attributes.get_int("axis") == axis else None for n in inner]
    if not any(inner):
        return False
    parts = [part for value, n in zip(node.inputs, inner, strict=True) for part in ([value] if n is None else n.inputs)]
    new = ir.Node("", "Concat", parts, [ir.AttrInt64("axis", axis)], name=node.name)
    new.outputs[0].shape, new.outputs[0].type = y.shape, y.type
    node.prepend(new)
    replace_value(y, new.outputs[0], [node])
    return True


def _average_pool(node: ir.Node) -> bool:
    """AveragePool of a pointwise convolution, swapped with it where that leaves less to compute."""
    import onnx_ir as ir

    from normswap.folding.affine import replace_value
    from normswap.folding.linear import is_padded

    y = node.outputs[0]
    conv = _only(node.inputs[0], "Conv")
    weight = None if conv is None else conv.inputs[1]
    if conv is None or weight is None or weight.const_value is None:
        return False
    outputs, inputs, *kernel = weight.const_value.shape.numpy()
    group = conv.attributes.get_int("group", 1)
    strides, kernel_shape = node.attributes.get_ints("strides", ()), node.attributes.get_ints("kernel_shape", ())
    fewer = math.prod(strides)
    plain = all(size == 1 for size in (*kernel, *conv.attributes.get_ints("strides", ()))) and not is_padded(conv)
    inside = not is_padded(node) and node.attributes.get_int("ceil_mode", 0) == 0
    means = inside or node.attributes.get_int("count_include_pad", 0) == 0  # of the input alone, not of zeros around it
    saved = outputs * inputs * (1 - 1 / fewer)  # multiplications at each place of the input
    added = (inputs * group - outputs) * math.prod(kernel_shape) / fewer
    x, pooled = conv.inputs[0], node.inputs[0]
    if x is None or pooled is None or not (plain and means and fewer > 1 and saved > added):
        return False
    pool = ir.Node("", "AveragePool", [x], list(node.attributes.values()), name=node.name)
    later = ir.Node("", "Conv", [pool.outputs[0], *conv.inputs[1:]], list(conv.attributes.values()), name=conv.name)
    if y.shape is not None:
        pool.outputs[0].shape = ir.Shape([y.shape[0], inputs * group, *y.shape[2:]])
    pool.outputs[0].type, later.outputs[0].shape, later.outputs[0].type = x.type, y.shape, y.type
    node.prepend([pool, later])
    replace_value(y, later.outputs[0], [node])
    return True


_RULES = {"Reshape": _reshape, "GatherElements": _gather_elements, "Concat": _concat, "AveragePool": _average_pool}


def _only(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that computes the value, if it is of this type and the value has one reader."""
    from normswap.folding.affine import only_use

    node = None if value is None else value.producer()
    if value is None or node is None or node.domain != "" or node.op_type != op_type:
        return None
    return node if only_use(value) and node.graph is not None else None


def _numbers(value: ir.Value | None) -> np.ndarray | None:
    import onnx_ir as ir

    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()
