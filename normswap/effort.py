"""About how long onnx's evaluator takes for a file, from the sizes of its values: so that it is asked only where it answers soon.

Seconds of one core per value of an output, measured on an AMD EPYC; for those that multiply, per product. The evaluator is numpy where
numpy has the operation, and a loop in Python elsewhere. Which inputs it is asked at must not depend on how busy the machine is, so this is
an estimate and no clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normswap import onnx_file
from normswap.probes import Probe

if TYPE_CHECKING:
    import onnx

PER_VALUE, PER_NODE = 20e-9, 50e-6
PER_PRODUCT = {"Conv": 0.6e-9, "Gemm": 0.6e-9, "MatMul": 0.6e-9, "Attention": 0.6e-9, "ConvTranspose": 180e-9}
PER_TAP = {"MaxPool": 700e-9, "AveragePool": 1200e-9, "LpPool": 1200e-9}  # per value and place in the window
LOOPS = ("GridSample", "RoiAlign", "DeformConv", "NonMaxSuppression", "LSTM", "GRU", "RNN", "Scan", "Loop", "CenterCropPad", "Col2Im")
PER_LOOP = 160e-6


def seconds(path: Path, probes: Sequence[Probe]) -> Iterator[float]:
    """For each probe in turn."""
    import onnx_ir as ir

    proto, _ = onnx_file.skeleton(ir.load(str(path)))
    known: dict[Any, float] = {}
    for probe in probes:
        shapes = tuple(tuple(tensor.shape) for tensor in probe.tensors())
        if shapes not in known:
            known[shapes] = _seconds(proto, shapes)
        yield known[shapes]


def _seconds(proto: onnx.ModelProto, shapes: Sequence[tuple[int, ...]]) -> float:
    import onnx

    sized = onnx.ModelProto()
    sized.CopyFrom(proto)
    for value, shape in zip(sized.graph.input, shapes, strict=False):  # the large constants come after
        dims = value.type.tensor_type.shape.dim
        for dim, size in zip(dims, shape, strict=False):
            dim.dim_value = size
    del sized.graph.value_info[:]
    for output in sized.graph.output:
        output.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(sized, data_prop=True).graph
    sizes = {i.name: tuple(i.dims) for i in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        # What is not known counts as 1: a tensor whose size depends on values is rarely a large one.
        sizes[value.name] = tuple(dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim)
    return sum(_of(node, sizes) for node in graph.node)


def _of(node: onnx.NodeProto, sizes: dict[str, tuple[int, ...]]) -> float:
    values = max((math.prod(sizes.get(name, ())) for name in node.output), default=1)
    first, second = ([sizes.get(name, ()) for name in node.input] + [(), ()])[:2]
    if node.op_type in ("Conv", "ConvTranspose"):
        products = math.prod(second[1:] if node.op_type == "Conv" else (second[:1] + second[2:]))
        return PER_NODE + values * (PER_VALUE + products * PER_PRODUCT[node.op_type])
    if node.op_type in PER_PRODUCT:
        return PER_NODE + values * (PER_VALUE + (first[-1] if first else 1) * PER_PRODUCT[node.op_type])
    if node.op_type in PER_TAP:
        window = next((math.prod(a.ints) for a in node.attribute if a.name == "kernel_shape"), 1)
        return PER_NODE + values * window * PER_TAP[node.op_type]
    return PER_NODE + values * (PER_LOOP if node.op_type in LOOPS else PER_VALUE)
