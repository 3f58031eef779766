r"""For the target "cuda": a convolution and its ReLU become onnxruntime's own operator FusedConv, which the file defines.

    com.microsoft::FusedConv(x, W, b) = Relu(Conv(x, W, b))

The file defines FusedConv as a function of that name, so that any runtime can run it; onnxruntime uses its kernel instead. On a CPU
onnxruntime fuses Conv and Relu by itself, as it does other pairs (a Gemm and its Relu, a bias and GELU). On CUDA it no longer makes
FusedConv, but still has the kernel: for two-dimensional convolutions in float32, with a ReLU and nothing else. A file may define a function
only once, so a residual sum, which the kernel could take as a fourth input, stays an Add.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

    from normswap.folding import Constants

DOMAIN, NAME, VERSION = "com.microsoft", "FusedConv", 1
FUSED = f"{DOMAIN}::{NAME}"
INTS = ("dilations", "kernel_shape", "pads", "strides")


def fuse(model: ir.Model) -> int:
    """Fuse every two-dimensional Conv in float32 that a Relu alone reads, define the function, and return how many were fused."""
    from normswap.folding import Constants

    pairs = [pair for node in model.graph.all_nodes() if (pair := _pair(node)) is not None]
    constants = Constants(model.graph)
    for conv, relu in pairs:
        _replace(conv, relu, constants)
    if pairs:
        function = _function(model.opset_imports[""])
        model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = VERSION
    return len(pairs)


def _pair(conv: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    import onnx_ir as ir

    from normswap.folding.affine import only_use

    y = conv.outputs[0]
    if (conv.domain, conv.op_type) != ("", "Conv") or y.dtype != ir.DataType.FLOAT or y.shape is None or len(y.shape) != 4:
        return None
    weight = conv.inputs[1]
    if weight is None or weight.const_value is None or conv.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return None
    relu = next(iter(y.consumers()), None)
    if relu is None or (relu.domain, relu.op_type) != ("", "Relu") or not only_use(y):
        return None
    return conv, relu


def _replace(conv: ir.Node, relu: ir.Node, constants: Constants) -> None:
    import onnx_ir as ir

    from normswap.folding.affine import replace_value

    x, weight, y = conv.inputs[0], conv.inputs[1], relu.outputs[0]
    assert weight is not None
    assert weight.const_value is not None
    size, axes = weight.const_value.shape.numpy(), 2
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    if bias is None:  # the function has no input that may be missing
        bias = constants.add(f"{weight.name}_zeros", np.zeros(size[0], np.float32))
    plain = {"dilations": [1] * axes, "kernel_shape": list(size[2:]), "pads": [0] * 2 * axes, "strides": [1] * axes}
    attributes = [ir.AttrInt64s(name, list(conv.attributes.get_ints(name, plain[name]))) for name in INTS]
    group = ir.AttrInt64("group", conv.attributes.get_int("group", 1))
    fused = ir.Node(DOMAIN, NAME, [x, weight, bias], [ir.AttrString("activation", "Relu"), *attributes, group], name=conv.name)
    value = fused.outputs[0]
    value.shape, value.type = y.shape, y.type
    conv.prepend(fused)
    replace_value(y, value, [conv, relu])


def _function(opset: int) -> ir.Function:
    """FusedConv as a function of operators of ONNX."""
    import onnx
    import onnx_ir as ir

    conv = onnx.helper.make_node("Conv", ["X", "W", "B"], ["sum"])
    for name in (*INTS, "group"):
        kind = onnx.AttributeProto.INT if name == "group" else onnx.AttributeProto.INTS
        conv.attribute.append(onnx.AttributeProto(name=name, ref_attr_name=name, type=kind))
    relu = onnx.helper.make_node("Relu", ["sum"], ["Y"])
    names = ["activation", *INTS, "group"]
    proto = onnx.helper.make_function(
        DOMAIN, NAME, ["X", "W", "B"], ["Y"], [conv, relu], [onnx.helper.make_opsetid("", opset)], attributes=names
    )
    return ir.serde.deserialize_function(proto)
