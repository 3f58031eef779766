"""Affines into all their readers, through ReLUs, into residual streams: each graph is compared to the one it came from, in float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import pytest
from onnx import parser
from onnx.numpy_helper import from_array
from onnx_ir.passes import common

from normswap.folding import Constants, Outcome, fold
from normswap.folding.find import affines

RNG = np.random.default_rng(6)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape)


def positive(*shape: int) -> np.ndarray:
    return RNG.uniform(0.5, 1.5, shape)


def mixed(*shape: int) -> np.ndarray:
    array = positive(*shape)
    array.reshape(-1)[::2] *= -1
    return array


def holed(*shape: int) -> np.ndarray:
    array = positive(*shape)
    array.reshape(-1)[1] = 0
    return array


def parsed(body: str, constants: Mapping[str, np.ndarray], inputs: str, outputs: str = "double z", opset: int = 20) -> onnx.ModelProto:
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}')
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    model.graph.initializer.extend(from_array(np.asarray(array), name) for name, array in constants.items())
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def folded(proto: onnx.ModelProto) -> tuple[list[Outcome], onnx.ModelProto]:
    """Fold the affines whose name starts with n, as those of norms; others are part of the net."""
    model = ir.from_proto(proto)
    constants = Constants(model.graph)
    found = [affine for affine in affines(model.graph, constants) if str(affine.y.name).startswith("n")]
    names = [value.name for value in model.graph.outputs]
    outcomes = fold(model.graph, found, constants)
    common.RemoveUnusedNodesPass()(model)
    for value, name in zip(model.graph.outputs, names, strict=True):
        value.name = name
    return outcomes, ir.to_proto(model)


def operators(proto: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in proto.graph.node)


def assert_same(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    onnx.checker.check_model(after, full_check=True)
    constants = {i.name for i in before.graph.initializer}
    given = [i for i in before.graph.input if i.name not in constants]
    sizes: list[float] = []
    for factor in (1.0, 100.0, 0.0):
        feeds = {}
        for value in given:
            shape = [d.dim_value or 2 for d in value.type.tensor_type.shape.dim]
            whole = value.type.tensor_type.elem_type == onnx.TensorProto.INT64
            feeds[value.name] = RNG.integers(0, 3, shape) if whole else normal(*shape) * factor
        runs = [onnx.reference.ReferenceEvaluator(proto).run(None, feeds) for proto in (before, after)]
        sizes = sizes or [float(np.abs(want).max()) for want in runs[0]]
        for want, got, size in zip(*runs, sizes, strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * max(float(np.abs(want).max()), size))


def norm(name: str, channels: int, rank: int, scale: np.ndarray | None = None, axis: int = 1) -> dict[str, np.ndarray]:
    shape = [channels if i == axis % rank else 1 for i in range(rank)]
    return {f"{name}_s": (positive(channels) if scale is None else scale).reshape(shape), f"{name}_t": normal(channels).reshape(shape)}


def affine(name: str, x: str, y: str) -> str:
    return f"{y}_scaled = Mul({x}, {name}_s) {y} = Add({y}_scaled, {name}_t)"


IMAGE, CUBE = "double[2,3,7,6] x", "double[2,7,3] x"
A = {"wa": normal(4, 3, 3, 3), "ba": normal(4)}  # 3 to 4 channels, padded where it is used
B = {"wb": normal(5, 4, 3, 3), "bb": normal(5)}
P = {"wp": normal(5, 4, 1, 1), "bp": normal(5)}  # without a border
S = {"ws": normal(4, 4, 3, 3), "bs": normal(4), "wr": normal(4, 4, 3, 3), "br": normal(4)}
N4, N4B = norm("a", 4, 4), norm("b", 4, 4)
STEM = "c = Conv <pads=[1,1,1,1]> (x, wa, ba)"
OUT = "z = Conv <pads=[1,1,1,1]> (r, wb, bb)"
HEAD = {"wl": normal(5, 4), "bl": normal(5)}
L3 = {"w1": normal(3, 4), "b1": normal(4), "w2": normal(3, 5), "b2": normal(5), "w3": normal(3, 6)}
D = {"d1": normal(4, 4), "e1": normal(4), "d2": normal(4, 4), "e2": normal(4), "d3": normal(4, 5), "e3": normal(5)}

# name: (body, constants, inputs, by what each affine went[, outputs])
VANISH: dict[str, tuple] = {
    "into three linears": (
        f"{affine('a', 'x', 'n')} q = MatMul(n, w1) q1 = Add(q, b1) k = MatMul(n, w2) k1 = Add(b2, k) z = Softmax(q1) z1 = Tanh(k1)",
        L3 | norm("a", 3, 3, mixed(3), -1),
        CUBE,
        ["into_consumers"],
        "double z, double z1",
    ),
    "into linears, a zero among the scales": (
        f"{affine('a', 'x', 'n')} q = MatMul(n, w1) z = Add(q, b1)",
        L3 | norm("a", 3, 3, holed(3), -1),
        CUBE,
        ["into_consumers"],
    ),
    "into a gemm, behind a reshape": (
        f"{affine('a', 'x', 'n')} f = Reshape(n, rows) z = Gemm <transB=1, alpha=0.5> (f, w, b1)",
        L3 | {"w": normal(4, 3), "rows": np.array([-1, 3])} | norm("a", 3, 3, mixed(3), -1),
        CUBE,
        ["into_consumers"],
    ),
    "its scale into a padded conv, as the shift is 0": (
        "n = Mul(x, a_s) z = Conv <pads=[1,1,1,1]> (n, wa, ba)",
        A | norm("a", 3, 4, mixed(3)),
        IMAGE,
        ["into_consumers"],
    ),
    "its scale into a transposed conv in groups": (
        "n = Mul(x, a_s) r = Tanh(n) n2 = Mul(r, b_s) z = ConvTranspose <strides=[2,3]> (n2, wt)",
        {"wt": normal(4, 5, 3, 2)} | norm("a", 4, 4) | norm("b", 4, 4),
        "double[2,4,5,6] x",
        [None, "into_consumers"],
    ),
    "into a 1x1 conv in groups": (
        f"{affine('a', 'x', 'n')} z = Conv <group=2> (n, wg, bg)",
        {"wg": normal(6, 2, 1, 1), "bg": normal(6)} | norm("a", 4, 4, mixed(4)),
        "double[2,4,5,6] x",
        ["into_consumers"],
    ),
    "through a mean into a linear": (
        f"{affine('a', 'x', 'n')} p = GlobalAveragePool(n) f = Flatten(p) z = Gemm <transB=1> (f, wl, bl)",
        HEAD | norm("a", 4, 4, mixed(4)),
        "double[2,4,5,6] x",
        ["into_consumers"],
    ),
    "through a flattening into a linear": (
        f"{affine('a', 'x', 'n')} p = MaxPool <kernel_shape=[2,2], pads=[1,1,1,1]> (n) f = Flatten(p) z = Gemm(f, w, bl)",
        HEAD | {"w": normal(4 * 6 * 7, 5)} | norm("a", 4, 4),
        "double[2,4,5,6] x",
        ["into_consumers"],
    ),
    "through a slice and a split": (
        f"{affine('a', 'x', 'n')} u, v = Split <axis=2, num_outputs=2> (n) s = Slice(u, one, two, last) "
        "q = MatMul(s, w1) k = MatMul(v, w3) "
        "q1 = Add(q, b1) k1 = Add(k, b6) z = Softmax(q1) z1 = Tanh(k1)",
        {"w1": normal(2, 4), "b1": normal(4), "w3": normal(3, 6), "b6": normal(6)}
        | {"one": np.array([1]), "two": np.array([3]), "last": np.array([2])}
        | norm("a", 6, 3, mixed(6), -1),
        "double[2,7,6] x",
        ["into_consumers"],
        "double z, double z1",
    ),
    "the first token": (
        f"{affine('a', 'x', 'n')} f = Gather <axis=1> (n, zero) z = Gemm(f, w1, b1)",
        L3 | {"zero": np.array(0)} | norm("a", 3, 3, mixed(3), -1),
        CUBE,
        ["into_consumers"],
    ),
    "through a concatenation": (
        f"{affine('a', 'x', 'n')} r = Tanh(y) j = Concat <axis=1> (n, r) z = Conv(j, wj, bj)",
        {"wj": normal(5, 6, 2, 2), "bj": normal(5)} | norm("a", 4, 4, mixed(4)),
        "double[2,4,5,6] x, double[2,2,5,6] y",
        ["into_consumers"],
    ),
    "pre-activation": (
        f"{STEM} {affine('a', 'c', 'n')} r1 = Relu(n) d = Conv <pads=[1,1,1,1]> (r1, ws, bs) s = Add(c, d) {affine('b', 's', 'n2')} "
        f"r = Relu(n2) {OUT}",
        A | B | S | N4 | N4B,
        IMAGE,
        ["stream_shift", "stream_shift"],
    ),
    "pre-activation, three blocks and a pooled shortcut": (
        f"{STEM} m = MaxPool <kernel_shape=[2,2], strides=[2,2]> (c) {affine('a', 'm', 'n')} r1 = Relu(n) "
        f"d = Conv <pads=[1,1,1,1]> (r1, ws, bs) s = Add(d, m) {affine('b', 's', 'n2')} r2 = Relu(n2) d2 = Conv <pads=[1,1,1,1]> (r2, wr) "
        f"s2 = Add(s, d2) {affine('e', 's2', 'n3')} r = Relu(n3) {OUT}",
        A | B | S | N4 | N4B | norm("e", 4, 4),
        IMAGE,
        ["stream_shift"] * 3,
    ),
    "pre-activation, the stream stored as its negative": (
        f"{STEM} {affine('a', 'c', 'n')} r1 = Relu(n) d = Conv <pads=[1,1,1,1]> (r1, ws, bs) s = Add(c, d) {affine('b', 's', 'n2')} "
        f"r = Relu(n2) {OUT}",
        A | B | S | norm("a", 4, 4, mixed(4)) | norm("b", 4, 4, mixed(4)),
        IMAGE,
        ["stream_shift", "stream_shift"],
    ),
    "a threshold before a 1x1 conv": (
        f"t = Tanh(x) {affine('a', 't', 'n')} r = Relu(n) z = Conv(r, wp, bp)",
        P | N4,
        "double[2,4,5,6] x",
        ["threshold"],
    ),
    "a threshold, zeros among the scales": (
        f"t = Tanh(x) {affine('a', 't', 'n')} r = Relu(n) z = Conv(r, wp)",
        P | norm("a", 4, 4, holed(4)),
        "double[2,4,5,6] x",
        ["threshold"],
    ),
    "a threshold before a mean and a linear": (
        f"t = Tanh(x) {affine('a', 't', 'n')} r = Relu(n) p = ReduceMean <keepdims=0> (r, space) z = Gemm <transB=1> (p, wl, bl)",
        HEAD | N4 | {"space": np.array([2, 3])},
        "double[2,4,5,6] x",
        ["threshold"],
    ),
    "thresholds of a dense block": (
        f"t = Tanh(x) {affine('a', 't', 'n')} r1 = Relu(n) d = Conv(r1, wp, bp) j = Concat <axis=1> (t, d) {affine('b', 'j', 'n2')} "
        f"r2 = Relu(n2) p = AveragePool <kernel_shape=[2,2]> (r2) z = Conv(p, wj)",
        P | N4 | norm("b", 9, 4) | {"wj": normal(3, 9, 1, 1)},
        "double[2,4,5,6] x",
        ["threshold", "threshold"],
    ),
    "into both operands of a sum": (
        f"{STEM} d = Conv <pads=[1,1,1,1]> (x, ws3, bs) s = Add(c, d) {affine('a', 's', 'n')} z = Tanh(n)",
        A | S | {"ws3": normal(4, 3, 3, 3)} | norm("a", 4, 4, mixed(4)),
        IMAGE,
        ["into_producers"],
    ),
    "back through a concatenation and a mean": (
        f"{STEM} d = Conv <pads=[1,1,1,1]> (x, w2, b2) j = Concat <axis=1> (c, d) p = AveragePool <kernel_shape=[2,2]> (j) "
        f"{affine('a', 'p', 'n')} z = Tanh(n)",
        A | {"w2": normal(2, 3, 3, 3), "b2": normal(2)} | norm("a", 6, 4, mixed(6)),
        IMAGE,
        ["into_producers"],
    ),
    "back through a ReLU": (
        f"{STEM} r1 = Relu(c) {affine('a', 'r1', 'n')} z = Tanh(n)",
        A | N4,
        IMAGE,
        ["into_producers"],
    ),
    "back through a gate": (
        f"{STEM} p = GlobalAveragePool(c) q = Conv(p, wg) g = Sigmoid(q) c2 = Conv(x, wc, bc) s = Mul(c2, g) n = Mul(s, a_s) z = Tanh(n)",
        A | {"wg": normal(4, 4, 1, 1), "wc": normal(4, 3, 1, 1), "bc": normal(4)} | norm("a", 4, 4, mixed(4)),
        IMAGE,
        ["into_producers"],
    ),
    "back through a LeakyRelu, scale alone": (
        f"{STEM} r1 = LeakyRelu <alpha=0.2> (c) n = Mul(r1, a_s) z = Tanh(n)",
        A | N4,
        IMAGE,
        ["into_producers"],
    ),
    "a post-norm stream": (
        f"h0 = MatMul(x, w1) h = Add(h0, b1) {affine('a', 'h', 'n')} "
        f"f0 = MatMul(n, d1) f1 = Add(f0, e1) f2 = Gelu(f1) f3 = MatMul(f2, d2) f = Add(f3, e2) s = Add(n, f) {affine('b', 's', 'n2')} "
        f"g0 = MatMul(n2, d2) g1 = Add(g0, e2) g2 = Gelu(g1) g3 = MatMul(g2, d1) g = Add(g3, e1) s2 = Add(g, n2) {affine('e', 's2', 'n3')} "
        "o = MatMul(n3, d3) z = Add(o, e3)",
        L3 | D | norm("a", 4, 3, mixed(4), -1) | norm("b", 4, 3, mixed(4), -1) | norm("e", 4, 3, mixed(4), -1),
        CUBE,
        ["into_producer", "into_consumers", "into_consumers"],
    ),
    "a post-norm stream that is the output": (
        f"e = Gather <axis=0> (table, i) p = Add(e, place) {affine('a', 'p', 'n')} "
        f"f0 = MatMul(n, d1) f1 = Add(f0, e1) f2 = Gelu(f1) f3 = MatMul(f2, d2) f = Add(f3, e2) s = Add(n, f) {affine('b', 's', 'n2')} "
        "z = Identity(n2)",
        D | {"table": normal(9, 4), "place": normal(1, 7, 4)} | norm("a", 4, 3, mixed(4), -1) | norm("b", 4, 3, mixed(4), -1),
        "int64[2,7] i",
        ["into_consumers", "into_producers"],
    ),
    "layer scale in a stream": (
        f"c0 = Conv(x, wp3, bp) {affine('a', 'c0', 'n')} d = Conv(n, wq, bq) g = Mul(d, gamma) s = Add(n, g) {affine('b', 's', 'n2')} "
        "z = Conv(n2, wq, bq)",
        {"wp3": normal(5, 3, 1, 1), "bp": normal(5), "wq": normal(5, 5, 1, 1), "bq": normal(5), "gamma": normal(1, 5, 1, 1)}
        | norm("a", 5, 4, mixed(5))
        | norm("b", 5, 4, mixed(5)),
        IMAGE,
        ["into_producer", "into_consumers"],
    ),
    "resized and added, as in a feature pyramid": (
        f'{affine("a", "x", "n")} u = Resize <mode="nearest"> (n, , twice) z = Conv(u, wp, bp)',
        P | N4 | {"twice": np.array([1, 1, 2, 2], np.float32)},
        "double[2,4,5,6] x",
        ["into_consumers"],
    ),
    "through a change of sign": (
        f"{affine('a', 'x', 'n')} q = Neg(n) z = Conv(q, wp, bp)",
        P | norm("a", 4, 4, mixed(4)),
        "double[2,4,5,6] x",
        ["into_consumers"],
    ),
    "back through a change of sign": (
        f"{STEM} q = Neg(c) {affine('a', 'q', 'n')} z = Tanh(n)",
        A | norm("a", 4, 4, mixed(4)),
        IMAGE,
        ["into_producers"],
    ),
    "through an absolute value, as the shift is 0": (
        "n = Mul(x, a_s) q = Abs(n) z = Conv(q, wp, bp)",
        P | norm("a", 4, 4),
        "double[2,4,5,6] x",
        ["into_consumers"],
    ),
    "through a running sum in space, as the shift is 0": (
        "n = Mul(x, a_s) q = CumSum(n, last) z = Conv(q, wp, bp)",
        P | norm("a", 4, 4, mixed(4)) | {"last": np.array(-1)},
        "double[2,4,5,6] x",
        ["into_consumers"],
    ),
    "its channels into blocks, as DCR": (
        f"{STEM} {affine('a', 'c', 'n')} q = SpaceToDepth <blocksize=2> (n) z = Conv(q, w, b)",
        A | {"w": normal(5, 16, 1, 1), "b": normal(5)} | norm("a", 4, 4, mixed(4)),
        "double[2,3,4,6] x",
        ["into_producer"],
    ),
    "from the channels of blocks": (
        f"{affine('a', 'x', 'n')} q = SpaceToDepth <blocksize=2> (n) z = Conv(q, w, b)",
        {"w": normal(5, 12, 1, 1), "b": normal(5)} | norm("a", 3, 4, mixed(3)),
        "double[2,3,4,6] x",
        ["into_consumers"],
    ),
    "back from blocks in space, as CRD": (
        f'c = Conv(x, w, b) q = DepthToSpace <blocksize=2, mode="CRD"> (c) {affine("a", "q", "n")} z = Tanh(n)',
        {"w": normal(12, 3, 1, 1), "b": normal(12)} | norm("a", 3, 4, mixed(3)),
        "double[2,3,4,6] x",
        ["into_producer"],
    ),
    "back from blocks in space, as DCR": (
        f"c = Conv(x, w, b) q = DepthToSpace <blocksize=2> (c) {affine('a', 'q', 'n')} z = Tanh(n)",
        {"w": normal(12, 3, 1, 1), "b": normal(12)} | norm("a", 3, 4, mixed(3)),
        "double[2,3,4,6] x",
        ["into_producer"],
    ),
    "through blocks that are alike": (
        f"{affine('a', 'x', 'n')} q = DepthToSpace <blocksize=2> (n) z = Conv(q, w, b)",
        {"w": normal(5, 2, 1, 1), "b": normal(5)} | norm("a", 8, 4, np.tile(np.array([0.7, 1.3]), 4)) | {"a_t": np.full((1, 8, 1, 1), 0.4)},
        "double[2,8,3,2] x",
        ["into_consumers"],
    ),
    "repeated along the channels": (
        f"{affine('a', 'x', 'n')} q = Tile(n, twice) z = Conv(q, w, b)",
        {"w": normal(5, 8, 1, 1), "b": normal(5), "twice": np.array([1, 2, 1, 3])} | norm("a", 4, 4, mixed(4)),
        "double[2,4,3,2] x",
        ["into_consumers"],
    ),
    "into a product that an equation names": (
        f'{affine("a", "x", "n")} q = Einsum <equation="ntc,cd->ntd"> (n, e1) z = Add(q, b)',
        {"e1": normal(4, 5), "b": normal(5)} | norm("a", 4, 3, mixed(4), -1),
        "double[2,3,4] x",
        ["into_consumers"],
    ),
    "into the heads of attention": (
        f'{affine("a", "x", "n")} q = Einsum <equation="...c,hcd->...hd"> (n, e1) z = Add(q, b)',
        {"e1": normal(3, 4, 5), "b": normal(3, 5)} | norm("a", 4, 3, mixed(4), -1),
        "double[2,6,4] x",
        ["into_consumers"],
    ),
    "into an equation that names its constant first": (
        f'{affine("a", "x", "n")} q = Einsum <equation="dc, nchw -> ndhw"> (e1, n) z = Add(q, b)',
        {"e1": normal(5, 4), "b": normal(5, 1, 1)} | norm("a", 4, 4, mixed(4)),
        "double[2,4,3,6] x",
        ["into_consumers"],
    ),
    "its scale back into an equation": (
        'q = Einsum <equation="ntc,cz"> (x, e1) n = Mul(q, a_s) z = Tanh(n)',
        {"e1": normal(4, 5)} | norm("a", 5, 3, mixed(5), -1),
        "double[2,1,4] x",
        ["into_producers"],
        "double z",
    ),
    "through an equation that only turns": (
        f'{affine("a", "x", "n")} q = Einsum <equation="nchw->nhwc"> (n) k = MatMul(q, e1) z = Add(k, b)',
        {"e1": normal(4, 5), "b": normal(5)} | norm("a", 4, 4, mixed(4)),
        "double[2,4,3,6] x",
        ["into_consumers"],
    ),
}

STAY: dict[str, tuple] = {
    "channels that become neighbours in space": (
        f"{affine('a', 'x', 'n')} q = DepthToSpace <blocksize=2> (n) z = Conv(q, w)",
        {"w": normal(5, 2, 1, 1)} | norm("a", 8, 4),
        "double[2,8,3,2] x",
        "DepthToSpace puts channels side by side that would have to be scaled or shifted differently",
    ),
    "a shift before an absolute value": (
        f"{affine('a', 'x', 'n')} q = Abs(n) z = Conv(q, wp)",
        P | N4,
        "double[2,4,5,6] x",
        "Abs is next to it, which a shift would move",
    ),
    "a running sum along the channels": (
        f"{affine('a', 'x', 'n')} q = CumSum(n, one) z = Conv(q, wp)",
        P | N4 | {"one": np.array(1)},
        "double[2,4,5,6] x",
        "CumSum works along the axis of the channels",
    ),
    "a running sum of a shift": (
        f"{affine('a', 'x', 'n')} q = CumSum(n, two) z = Conv(q, wp)",
        P | N4 | {"two": np.array(2)},
        "double[2,4,5,6] x",
        "CumSum adds up a shift as often as there are values",
    ),
    "two values that an equation multiplies": (
        f'{affine("a", "x", "n")} q = Einsum <equation="nchw,nchk->nwk"> (n, x) z = Tanh(q)',
        N4,
        "double[2,4,5,6] x",
        "Einsum multiplies values that depend on the input",
    ),
    "an equation that takes a diagonal": (
        f'{affine("a", "x", "n")} q = Einsum <equation="nchh->nch"> (n) z = Conv(q, w)',
        {"w": normal(5, 4, 1)} | N4,
        "double[2,4,5,5] x",
        "Einsum takes a diagonal",
    ),
    "an equation whose constant has no channels": (
        f'{affine("a", "x", "n")} q = Einsum <equation="nchw,wk->nchk"> (n, e1) z = Conv(q, wp)',
        P | N4 | {"e1": normal(6, 3)},
        "double[2,4,5,6] x",
        "Einsum has a constant that does not vary along the channels",
    ),
    "an equation that adds up an axis of its own": (
        f'{affine("a", "x", "n")} q = Einsum <equation="nchw,dc->ndh"> (n, e1) z = Tanh(q)',
        N4 | {"e1": normal(5, 4)},
        "double[2,4,5,6] x",
        "Einsum adds up an axis of its input alone",
    ),
    "an equation that adds up a shift": (
        f'{affine("a", "x", "n")} q = Einsum <equation="nchw->nch"> (n) z = Conv(q, w)',
        {"w": normal(5, 4, 1)} | N4,
        "double[2,4,5,6] x",
        "Einsum adds up a shift as often as there are values",
    ),
    "an equation of three": (
        f'{affine("a", "x", "n")} q = Einsum <equation="nchw,dc,ed->nehw"> (n, e1, e2) z = Tanh(q)',
        N4 | {"e1": normal(5, 4), "e2": normal(3, 5)},
        "double[2,4,5,6] x",
        "Einsum multiplies more than two values",
    ),
    "copies that would have to differ": (
        f"{STEM} q = Tile(c, twice) {affine('a', 'q', 'n')} z = Tanh(n)",
        A | {"twice": np.array([1, 2, 1, 1])} | norm("a", 8, 4, mixed(8)),
        IMAGE,
        "Tile repeats what would have to differ",
    ),
    "a padding along the channels": (
        f"{affine('a', 'x', 'n')} q = Pad(n, more) z = Conv(q, w)",
        {"w": normal(5, 5, 1, 1), "more": np.array([0, 1, 0, 0, 0, 0, 0, 0])} | N4,
        "double[2,4,5,6] x",
        "Pad works along the axis of the channels",
    ),
    "a scan, which may be linear or not": (
        f"{affine('a', 'x', 'n')} q = Compress(n, m) z = Tanh(q)",
        N4 | {"m": np.array([True, False, True])},
        "double[2,4,5,6] x",
        "Compress is next to it, an operator that no fold is known through",
        "double z",
    ),
    "two outputs around it": (f"{affine('a', 'x', 'n')} z = Identity(n)", N4, "double[2,4,5,6] x", "an output of the model"),
    "GELU behind it, an input before it": (f"{affine('a', 'x', 'n')} z = Gelu(n)", N4, "double[2,4,5,6] x", "Gelu"),
    "a shift before a border": (
        f"{affine('a', 'x', 'n')} z = Conv <pads=[1,1,1,1]> (n, wp, bp)",
        P | N4,
        "double[2,4,5,6] x",
        "sees zeros around its input",
    ),
    "a shift before automatic padding": (
        f'{affine("a", "x", "n")} z = Conv <auto_pad="SAME_UPPER"> (n, wb, bb)',
        B | N4,
        "double[2,4,5,6] x",
        "sees zeros around its input",
    ),
    "a shift before a transposed conv": (
        f"{affine('a', 'x', 'n')} z = ConvTranspose(n, wt)",
        {"wt": normal(4, 5, 3, 2)} | N4,
        "double[2,4,5,6] x",
        "sees zeros around its input",
    ),
    "a shift before a mean that counts a border": (
        f"{affine('a', 'x', 'n')} p = AveragePool <kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1> (n) z = Conv(p, wp)",
        P | N4,
        "double[2,4,5,6] x",
        "sees zeros around its input",
    ),
    "a shift before padding": (
        f"{affine('a', 'x', 'n')} p = Pad(n, around) z = Conv(p, wp)",
        P | N4 | {"around": np.array([0, 0, 1, 1, 0, 0, 1, 1])},
        "double[2,4,5,6] x",
        "Pad adds zeros around its input, which a shift would change",
    ),
    "mixed signs before a ReLU": (
        f"t = Tanh(x) {affine('a', 't', 'n')} r = Relu(n) z = Conv(r, wp)",
        P | norm("a", 4, 4, mixed(4)),
        "double[2,4,5,6] x",
        "neither linear nor homogeneous",
    ),
    "mixed signs after a ReLU": (
        f"{STEM} r = Relu(c) {affine('a', 'r', 'n')} z = Tanh(n)",
        A | norm("a", 4, 4, mixed(4)),
        IMAGE,
        "2 of 4 scales are negative",
    ),
    "mixed signs before a max": (
        f"{affine('a', 'x', 'n')} p = MaxPool <kernel_shape=[2,2]> (n) z = Conv(p, wp)",
        P | norm("a", 4, 4, mixed(4)),
        "double[2,4,5,6] x",
        "2 of 4 scales are negative",
    ),
    "a threshold before a border": (
        f"t = Tanh(x) {affine('a', 't', 'n')} r = Relu(n) {OUT}",
        B | N4,
        "double[2,4,5,6] x",
        "sees zeros around its input",
    ),
    "one of two readers is no linear layer": (
        f"{affine('a', 'x', 'n')} z = Conv(n, wp, bp) z1 = Tanh(n)",
        P | N4,
        "double[2,4,5,6] x",
        "Tanh",
        "double z, double z1",
    ),
    "a weight that the caller gives": (
        f"{affine('a', 'x', 'n')} z = Conv(n, w)",
        N4,
        "double[2,4,5,6] x, double[5,4,1,1] w",
        "the weight of Conv, w, is an input of the model",
    ),
    "a weight that the caller may replace": (
        f"{affine('a', 'x', 'n')} z = Conv(n, wp)",
        P | N4,
        "double[2,4,5,6] x, double[5,4,1,1] wp",
        "the weight of Conv, wp, is an input that a caller may replace",
    ),
    "the product with another value, shifted": (
        f"{affine('a', 'x', 'n')} g = Sigmoid(y) m = Mul(n, g) z = Conv(m, wp)",
        P | N4,
        "double[2,4,5,6] x, double[2,4,1,1] y",
        "multiplies two values",
    ),
    "a square": (
        "n = Mul(x, a_s) m = Mul(n, n) z = Conv(m, wp)",
        P | N4,
        "double[2,4,5,6] x",
        "Mul takes it twice",
    ),
    "a sum with an input": (
        f"{affine('a', 'x', 'n')} s = Add(n, y) z = Conv(s, wp)",
        P | N4,
        "double[2,4,5,6] x, double[2,4,5,6] y",
        "an input of the model",
    ),
    "an affine that varies in space": (
        f"{affine('a', 'x', 'n')} z = Conv(n, wp)",
        P | {"a_s": positive(1, 4, 5, 1), "a_t": normal(1, 4, 5, 1)},
        "double[2,4,5,6] x",
        "does not vary along the channels alone",
    ),
    "an affine along the rows of a linear": (
        f"{affine('a', 'x', 'n')} z = MatMul(n, w1)",
        L3 | norm("a", 7, 3),
        CUBE,
        "does not vary along the channels alone",
    ),
    "channels that a reshape mixes": (
        f"{affine('a', 'x', 'n')} f = Reshape(n, other) z = MatMul(f, w1)",
        L3 | norm("a", 3, 3, None, -1) | {"other": np.array([2, 7, 3]), "w1": normal(7, 4)} | {"other": np.array([2, 3, 7])},
        CUBE,
        "does not vary along the channels alone",
    ),
    "a linear without a bias before attention": (
        f"{affine('a', 'x', 'n')} q = MatMul(n, w1) z = Softmax(q)",
        L3 | norm("a", 3, 3, None, -1),
        CUBE,
        "Softmax",
    ),
    "the maximum of the channels": (
        f"{affine('a', 'x', 'n')} p = ReduceMax <keepdims=1> (n, second) z = Tanh(p)",
        N4 | {"second": np.array([1])},
        "double[2,4,5,6] x",
        "along the axis of the channels",
    ),
    "a cubic resize": (
        f'{affine("a", "x", "n")} u = Resize <mode="cubic"> (n, , twice) z = Conv(u, wp, bp)',
        P | N4 | {"twice": np.array([1, 1, 2, 2], np.float32)},
        "double[2,4,5,6] x",
        "not a mean",
    ),
    "ReLU up to 6": (
        f"t = Tanh(x) n = Mul(t, a_s) r = Clip(n, low, high) {OUT}",
        B | N4 | {"low": np.array(0.0), "high": np.array(6.0)},
        "double[2,4,5,6] x",
        "Clip",
    ),
    "a scale of 0 before Tanh, after a sum": (
        f"{STEM} d = Conv <pads=[1,1,1,1]> (x, wa, ba) s = Add(c, d) {affine('a', 's', 'n')} z = Tanh(n)",
        A | norm("a", 4, 4, holed(4)),
        IMAGE,
        "its scale is 0 in 1 of 4 channels",
    ),
    "a sum that repeats what would have to differ": (
        f"t = Tanh(y) {affine('a', 'x', 'n')} s = Add(n, t) z = Conv(s, wp)",
        P | N4,
        "double[2,4,5,6] x, double[2,1,5,6] y",
        "repeats a value",
    ),
    "the next power": (
        f"{affine('a', 'x', 'n')} p = Pow(n, two) z = Conv(p, wp)",
        P | N4 | {"two": np.array(2.0)},
        "double[2,4,5,6] x",
        "Pow",
    ),
    "a shift far larger than the stream": (
        f"{STEM} m = Tanh(c) k = Conv(m, w1) {affine('a', 'k', 'n')} r1 = Relu(n) d = Conv <pads=[1,1,1,1]> (r1, ws, bs) s = Add(k, d) "
        "z = Tanh(s)",
        A | S | {"w1": normal(4, 4, 1, 1), "a_s": np.array([1, 1, 1e-4, 1]).reshape(1, 4, 1, 1), "a_t": positive(1, 4, 1, 1)},
        IMAGE,
        "more than 64 times as large",
    ),
    "a threshold that float64 cannot hold": (
        f"t = Tanh(x) {affine('a', 't', 'n')} r = Relu(n) z = Conv(r, wp)",
        {"wp": normal(5, 4, 1, 1) * 1e9, "a_s": np.full((1, 4, 1, 1), 1e-309), "a_t": positive(1, 4, 1, 1)},
        "double[2,4,5,6] x",
        "the threshold of Relu would overflow",
    ),
    "numbers that are not finite": (
        f"{affine('a', 'x', 'n')} z = Conv(n, wp)",
        P | N4 | {"a_s": np.full((1, 4, 1, 1), np.inf)},
        "double[2,4,5,6] x",
        "not finite",
    ),
}


@pytest.mark.parametrize("case", VANISH)
def test_vanishes(case: str) -> None:
    body, constants, inputs, ways, *outputs = VANISH[case]
    before = parsed(body, constants, inputs, *outputs)
    outcomes, after = folded(before)
    assert [outcome.how or None for outcome in outcomes] == ways, outcomes
    gone = [outcome for outcome in outcomes if outcome.how]
    assert all(outcome.left == () and outcome.reason == "" and outcome.into for outcome in gone)
    own = Counter({"Relu": operators(before)["Relu"], "Max": 0})
    now = operators(after)
    assert now["Relu"] + now["Max"] == own["Relu"]
    expected = operators(before) - Counter(Mul=len(gone), Add=sum(_shifts(before, outcome) for outcome in gone))
    now["Relu"] += now.pop("Max", 0)
    assert +now == +expected
    assert_same(before, after)


def _shifts(proto: onnx.ModelProto, outcome: Outcome) -> int:
    """Whether this affine is a Mul and an Add: outcomes have the name of the first node, or of its output."""
    first = next(node for node in proto.graph.node if outcome.name in (node.name, *node.output))
    return int(first.output[0].endswith(("scaled", "scaled2")))


@pytest.mark.parametrize("case", STAY)
def test_stays(case: str) -> None:
    body, constants, inputs, reason, *outputs = STAY[case]
    before = parsed(body, constants, inputs, *outputs)
    outcomes, after = folded(before)
    assert len(outcomes) == 1
    assert outcomes[0].left
    assert not outcomes[0].how
    assert reason in outcomes[0].reason
    by_channel = "in space" not in case and "finite" not in case and inputs != CUBE
    assert len(outcomes[0].left) == 1 or not by_channel  # BatchNormalization, or what it was
    if "finite" not in case:
        assert_same(before, after)


def test_there_are_as_many_cases_against_as_for() -> None:
    assert len(STAY) >= len(VANISH)
