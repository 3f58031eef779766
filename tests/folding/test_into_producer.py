"""An affine into the layer before it: each graph is compared to the one it came from, in float64 and by onnx's own evaluator."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx.reference
import onnx_ir as ir
import pytest
import torch
from onnx import parser
from onnx.numpy_helper import from_array, to_array
from onnx_ir.passes.common import RemoveUnusedNodesPass

from normswap.folding import Affine, Constants, into_producer

RNG = np.random.default_rng(20260)


def graph(body: str, constants: Mapping[str, np.ndarray], inputs: str = "double[2,3] x", outputs: str = "double y") -> onnx.ModelProto:
    """A model in ONNX's text form, followed by the affine y = h * scale + shift."""
    text = (
        f'<ir_version: 10, opset_import: ["": 20]> g ({inputs}) => ({outputs}) {{ {body} scaled = Mul(h, scale) y = Add(scaled, shift) }}'
    )
    model = parser.parse_model(text)
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    model.graph.initializer.extend(from_array(array, name) for name, array in constants.items())
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def fold(proto: onnx.ModelProto) -> tuple[bool, onnx.ModelProto]:
    model = ir.from_proto(proto)
    add = next(n for n in model.graph if n.outputs[0].name == "y")
    mul = next(n for n in model.graph if n.outputs[0].name == "scaled")
    constants = Constants(model.graph)
    scale, shift = (constants.of(v).astype(np.float64) for v in (mul.inputs[1], add.inputs[1]))
    affine = Affine("norm", (mul, add), scale, shift)
    with np.errstate(all="ignore"):
        done = into_producer.fold(affine, constants, adding=True) is not None
    if done:
        model.graph.outputs[0].name = "y"
    RemoveUnusedNodesPass()(model)
    return done, ir.to_proto(model)


def run(proto: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    onnx.checker.check_model(proto, full_check=True)
    return onnx.reference.ReferenceEvaluator(proto).run(None, dict(feeds))


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape)


def channels(count: int, shape: tuple[int, ...]) -> np.ndarray:
    """As a norm has them: some negative, one zero."""
    array = normal(count) * 3
    array[count // 2] = 0
    return array.reshape(shape)


CONV2D = {"w": normal(4, 3, 3, 2), "b": normal(4), "scale": channels(4, (1, 4, 1, 1)), "shift": channels(4, (1, 4, 1, 1))}
GEMM = {"w": normal(3, 5), "b": normal(5), "scale": channels(5, (1, 5)), "shift": channels(5, (1, 5))}
MATMUL3 = {"w": normal(3, 5), "b": normal(5), "scale": channels(5, (1, 1, 5)), "shift": channels(5, (1, 1, 5))}
IMAGE, ROWS, CUBE = "double[2,3,7,6] x", "double[2,3] x", "double[2,7,3] x"

MUST_FOLD = {
    "conv": ("h = Conv(x, w, b)", CONV2D, IMAGE),
    "conv without bias": ("h = Conv(x, w)", CONV2D, IMAGE),
    "conv padded, strided, dilated": ("h = Conv <pads=[1,0,2,1], strides=[2,1], dilations=[2,1]> (x, w, b)", CONV2D, IMAGE),
    "conv in groups": (
        "h = Conv <group=3> (x, w, b)",
        {"w": normal(6, 1, 3, 2), "b": normal(6), "scale": channels(6, (1, 6, 1, 1)), "shift": channels(6, (1, 6, 1, 1))},
        IMAGE,
    ),
    "conv 1d": (
        "h = Conv(x, w, b)",
        {"w": normal(4, 3, 2), "b": normal(4), "scale": channels(4, (1, 4, 1)), "shift": channels(4, (1, 4, 1))},
        "double[2,3,7] x",
    ),
    "conv 3d": (
        "h = Conv(x, w)",
        {"w": normal(4, 3, 2, 1, 3), "scale": channels(4, (1, 4, 1, 1, 1)), "shift": channels(4, (1, 4, 1, 1, 1))},
        "double[2,3,7,6,5] x",
    ),
    "conv, one number for all channels": ("h = Conv(x, w, b)", CONV2D | {"scale": normal(1, 1, 1, 1), "shift": normal(1, 1, 1, 1)}, IMAGE),
    "conv, one scale but many shifts": ("h = Conv(x, w, b)", CONV2D | {"scale": normal(1, 1, 1, 1)}, IMAGE),
    "conv transpose": (
        "h = ConvTranspose(x, w, b)",
        {"w": normal(3, 4, 3, 2), "b": normal(4), "scale": channels(4, (1, 4, 1, 1)), "shift": channels(4, (1, 4, 1, 1))},
        IMAGE,
    ),
    "gemm": ("h = Gemm(x, w, b)", GEMM, ROWS),
    "gemm without bias": ("h = Gemm(x, w)", GEMM, ROWS),
    "gemm transB": ("h = Gemm <transB=1> (x, w, b)", GEMM | {"w": normal(5, 3)}, ROWS),
    "gemm transA": ("h = Gemm <transA=1> (x, w, b)", GEMM | {"w": normal(2, 5)}, ROWS),
    "gemm alpha, beta": ("h = Gemm <alpha=0.5, beta=-2.0> (x, w, b)", GEMM, ROWS),
    "gemm beta without bias": ("h = Gemm <beta=-2.0> (x, w)", GEMM, ROWS),
    "gemm, one bias for all": ("h = Gemm(x, w, b)", GEMM | {"b": normal(1)}, ROWS),
    "gemm, bias (1, O)": ("h = Gemm <beta=3.0> (x, w, b)", GEMM | {"b": normal(1, 5)}, ROWS),
    "matmul 2d": ("h = MatMul(x, w)", GEMM, ROWS),
    "matmul 3d": ("h = MatMul(x, w)", MATMUL3, CUBE),
    "matmul + bias 3d": ("m = MatMul(x, w) h = Add(m, b)", MATMUL3, CUBE),
    "bias + matmul 3d": ("m = MatMul(x, w) h = Add(b, m)", MATMUL3, CUBE),
    "matmul + bias 2d": ("m = MatMul(x, w) h = Add(m, b)", GEMM, ROWS),
    "one row of weights, many biases": (
        "m = MatMul(x, w) h = Add(m, b)",
        {"w": normal(3, 1), "b": normal(5), "scale": normal(1, 1, 1), "shift": normal(1, 1, 1)},
        CUBE,
    ),
    "weight by a Constant node": (
        "w = Constant <value = double[1,3,1,1] {1.5, -2.0, 0.25}> () h = Conv(x, w)",
        {"scale": normal(1, 1, 1, 1), "shift": normal(1, 1, 1, 1)},
        IMAGE,
    ),
}

MUST_FOLD |= {
    "conv, transposed": (
        "c = Conv(x, w, b) h = Transpose <perm=[0,2,3,1]> (c)",
        CONV2D | {"scale": channels(4, (1, 1, 1, 4)), "shift": channels(4, (1, 1, 1, 4))},
        IMAGE,
    ),
    "conv, flattened": (
        "c = Conv(x, w, b) h = Flatten(c)",
        CONV2D | {"scale": np.repeat(channels(4, (1, 4)), 25, 1), "shift": np.repeat(channels(4, (1, 4)), 25, 1)},
        IMAGE,
    ),
    "matmul + bias 3d, heads apart": (
        "m = MatMul(x, w) c = Add(m, b) r = Reshape(c, heads) h = Transpose <perm=[0,2,1,3]> (r)",
        {"w": normal(3, 10), "b": normal(10), "scale": normal(1, 1, 1, 5), "shift": normal(1, 1, 1, 5), "heads": np.array([0, 7, 2, 5])},
        CUBE,
    ),
}

MUST_NOT_FOLD = {
    "a flattened conv, and an affine that varies in space": (
        "c = Conv(x, w, b) h = Flatten(c)",
        CONV2D | {"scale": normal(1, 100), "shift": normal(1, 100)},
        IMAGE,
    ),
    "heads mixed with rows": (
        "m = MatMul(x, w) c = Add(m, b) h = Reshape(c, mixed)",
        {"w": normal(3, 10), "b": normal(10), "scale": normal(1, 1, 7), "shift": normal(1, 1, 7), "mixed": np.array([2, 10, 7])},
        CUBE,
    ),
    "a transposed conv that something else reads": (
        "c = Conv(x, w, b) h = Transpose <perm=[0,2,3,1]> (c) z = Relu(c)",
        CONV2D | {"scale": channels(4, (1, 1, 1, 4)), "shift": channels(4, (1, 1, 1, 4))},
        IMAGE,
        "double y, double z",
    ),
    "an activation between": ("c = Conv(x, w, b) h = Relu(c)", CONV2D, IMAGE),
    "something else reads the conv": ("h = Conv(x, w, b) z = Relu(h)", CONV2D, IMAGE, "double y, double z"),
    "the product is an output, too": ("h = Conv(x, w, b)", CONV2D, IMAGE, "double y, double scaled"),
    "the conv is an output, too": ("h = Conv(x, w, b)", CONV2D, IMAGE, "double y, double h"),
    "the affine reads it twice": ("c = Conv(x, w, b) h = Add(c, c)", CONV2D, IMAGE),
    "a weight that depends on the input": ("h = Conv(x, k)", CONV2D, f"{IMAGE}, double[4,3,3,2] k"),
    "a bias that depends on the input": ("h = Conv(x, w, k)", CONV2D, f"{IMAGE}, double[4] k"),
    "a weight that the caller may replace": ("h = Conv(x, w, b)", CONV2D, f"{IMAGE}, double[4,3,3,2] w"),
    "an affine that varies in space": ("h = Conv(x, w, b)", CONV2D | {"scale": normal(1, 4, 5, 1)}, IMAGE),
    "an affine along another axis": ("h = Conv(x, w, b)", CONV2D | {"scale": normal(1, 1, 5, 1), "shift": normal(1, 1, 5, 1)}, IMAGE),
    "an affine per sample": ("h = Conv(x, w, b)", CONV2D | {"scale": normal(2, 1, 1, 1)}, IMAGE),
    "a linear's rows": ("m = MatMul(x, w) h = Add(m, b)", MATMUL3 | {"scale": normal(1, 7, 1), "shift": normal(1, 7, 1)}, CUBE),
    "a linear's rows, as many as columns": (
        "m = MatMul(x, w) h = Add(m, b)",
        {"w": normal(3, 7), "b": normal(7), "scale": channels(7, (1, 7, 1)), "shift": channels(7, (1, 7, 1))},
        CUBE,
    ),
    "rows of a gemm": ("h = Gemm(x, w, b)", GEMM | {"scale": normal(2, 1), "shift": normal(2, 1)}, ROWS),
    "a bias per row of a gemm": ("h = Gemm(x, w, b)", GEMM | {"b": normal(2, 1)}, ROWS),
    "a bias per row of a matmul": ("m = MatMul(x, w) h = Add(m, b)", MATMUL3 | {"b": normal(7, 1)}, CUBE),
    "a bias that adds a dimension": (
        "m = MatMul(x, w) h = Add(m, b)",
        MATMUL3 | {"b": normal(1, 1, 1, 5), "scale": channels(5, (1, 1, 1, 5)), "shift": channels(5, (1, 1, 1, 5))},
        CUBE,
    ),
    "an affine that adds a dimension": ("h = Gemm(x, w, b)", GEMM | {"scale": normal(4, 1, 5), "shift": normal(1, 1, 1)}, ROWS),
    "an affine that adds a dimension along the same axis": (
        "h = Gemm(x, w, b)",
        GEMM | {"scale": normal(1, 5, 1), "shift": normal(1, 5, 1)},
        "double[1,3] x",
    ),
    "an affine that multiplies a single channel": (
        "h = Conv(x, w)",
        {"w": normal(1, 3, 3, 2), "scale": normal(1, 4, 1, 1), "shift": normal(1, 4, 1, 1)},
        IMAGE,
    ),
    "a matmul of two inputs": ("h = MatMul(x, k)", GEMM, f"{ROWS}, double[3,5] k"),
    "a weight on the left": ("h = MatMul(w, x)", {"w": normal(5, 2), "scale": normal(1, 3), "shift": normal(1, 3)}, ROWS),
    "a batch of weights": ("h = MatMul(x, w)", MATMUL3 | {"w": normal(2, 3, 5)}, CUBE),
    "a batch of weights, as many rows as columns": ("h = MatMul(x, w)", MATMUL3 | {"w": normal(2, 5, 5)}, "double[2,7,5] x"),
    "a matmul that something else reads": (
        "m = MatMul(x, w) h = Add(m, b) z = Relu(m)",
        MATMUL3,
        CUBE,
        "double y, double z",
    ),
    "an Add of two results": ("m = MatMul(x, w) n = Relu(m) h = Add(m, n)", MATMUL3, CUBE),
    "no producer": ("h = Identity(x)", {"scale": channels(3, (1, 3)), "shift": channels(3, (1, 3))}, ROWS),
    "a scale that is not finite": ("h = Conv(x, w, b)", CONV2D | {"scale": np.full((1, 4, 1, 1), np.inf)}, IMAGE),
    "a shift that is NaN": ("h = Conv(x, w, b)", CONV2D | {"shift": np.full((1, 4, 1, 1), np.nan)}, IMAGE),
    "a scale that leaves float64": ("h = Conv(x, w, b)", CONV2D | {"scale": np.full((1, 4, 1, 1), 1e-310)}, IMAGE),
}


def feeds_of(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    constants = {i.name for i in proto.graph.initializer}
    return {i.name: normal(*(d.dim_value for d in i.type.tensor_type.shape.dim)) for i in proto.graph.input if i.name not in constants}


@pytest.mark.parametrize("case", MUST_FOLD)
def test_folds(case: str) -> None:
    proto = graph(*MUST_FOLD[case])
    feeds = feeds_of(proto)
    done, after = fold(proto)
    assert done
    types = [node.op_type for node in after.graph.node]
    assert "Mul" not in types
    assert types.count("Add") <= case.count("3d") + case.count("matmul + bias 2d") + case.count("many biases")
    for want, got in zip(run(proto, feeds), run(after, feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-13 * np.abs(want).max())


def test_folds_a_transposed_conv_in_groups() -> None:
    # onnx's evaluator cannot run one, so torch does.
    arrays = {"w": normal(6, 5, 3, 2), "b": normal(10), "scale": channels(10, (1, 10, 1, 1)), "shift": channels(10, (1, 10, 1, 1))}
    done, after = fold(graph("h = ConvTranspose <group=2, strides=[2,3]> (x, w, b)", arrays, "double[2,6,7,4] x"))
    assert done
    assert [n.op_type for n in after.graph.node] == ["ConvTranspose"]
    old, new = (
        {k: torch.from_numpy(v.copy()) for k, v in d.items()} for d in (arrays, {i.name: to_array(i) for i in after.graph.initializer})
    )
    x = torch.from_numpy(normal(2, 6, 7, 4))
    want = torch.conv_transpose2d(x, old["w"], old["b"], stride=(2, 3), groups=2) * old["scale"] + old["shift"]
    got = torch.conv_transpose2d(x, new["w_folded"], new["w_folded_bias"], stride=(2, 3), groups=2)
    assert (got - want).abs().max() <= 1e-13 * want.abs().max()


@pytest.mark.parametrize("case", MUST_NOT_FOLD)
def test_does_not_fold(case: str) -> None:
    proto = graph(*MUST_NOT_FOLD[case])
    done, after = fold(proto)
    assert not done
    assert [(n.op_type, list(n.input)) for n in after.graph.node if n.output[0] in ("h", "m", "scaled", "y")] == [
        (n.op_type, list(n.input)) for n in proto.graph.node if n.output[0] in ("h", "m", "scaled", "y")
    ]
    for want, got in zip(run(proto, feeds := feeds_of(proto)), run(after, feeds), strict=True):
        np.testing.assert_array_equal(got, want)


def test_there_are_as_many_cases_against_as_for() -> None:
    assert len(MUST_NOT_FOLD) >= len(MUST_FOLD)


def test_a_shared_weight_is_left_as_it_is() -> None:
    body = "other = Conv(x, w, b) h = Conv(x, w, b) z = Neg(other)"
    proto = graph(body, CONV2D, IMAGE, "double y, double z")
    done, after = fold(proto)
    assert done
    kept = {i.name: to_array(i) for i in after.graph.initializer}
    np.testing.assert_array_equal(kept["w"], CONV2D["w"])
    for want, got in zip(run(proto, feeds := feeds_of(proto)), run(after, feeds), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)


def float_graph(dtype: np.dtype, scale: float, shift: float = 0.5) -> onnx.ModelProto:
    name = {np.float32: "float", np.float16: "float16", ml_dtypes.bfloat16: "bfloat16"}[dtype]
    w = normal(4, 3, 3, 2).astype(dtype)
    both = {"scale": np.full((1, 4, 1, 1), scale).astype(dtype), "shift": np.full((1, 4, 1, 1), shift).astype(dtype)}
    return graph("h = Conv(x, w, b)", {"w": w, "b": normal(4).astype(dtype), **both}, f"{name}[2,3,7,6] x", f"{name} y")


@pytest.mark.parametrize(
    ("dtype", "scale", "folds"),
    [
        (np.float32, 3.0, True),
        (np.float32, 3e38, False),  # overflows
        (np.float32, 1e-40, False),  # subnormal: fewer digits
        (np.float16, 300.0, True),
        (np.float16, 6e4, False),
        (np.float16, 1e-5, False),
        (np.float16, 0.0, True),
    ],
)
def test_the_folded_weight_keeps_the_digits_of_its_dtype(dtype: np.dtype, scale: float, folds: bool) -> None:
    assert fold(float_graph(dtype, scale))[0] is folds


def test_a_shift_beyond_half_precision_is_not_folded() -> None:
    assert not fold(float_graph(np.float16, 1.0, shift=np.inf))[0]


def test_products_are_rounded_once_from_float64() -> None:
    proto = float_graph(np.float32, 1 / 3)
    done, after = fold(proto)
    arrays = {i.name: to_array(i) for i in proto.graph.initializer}
    made = {i.name: to_array(i) for i in after.graph.initializer}
    scale, shift = (arrays[name].reshape(4).astype(np.float64) for name in ("scale", "shift"))
    assert done
    weight = arrays["w"].astype(np.float64) * scale.reshape(4, 1, 1, 1)
    np.testing.assert_array_equal(made["w_folded"], weight.astype(np.float32))
    np.testing.assert_array_equal(made["w_folded_bias"], (arrays["b"].astype(np.float64) * scale + shift).astype(np.float32))


def test_large_weights_are_folded_in_slices_with_the_same_result() -> None:
    weight, scale = RNG.standard_normal((700, 1900), dtype=np.float32), normal(700, 1)
    model = ir.from_proto(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [from_array(weight, "w")])))
    value = Constants(model.graph).scaled(model.graph.initializers["w"], (scale,), weight.shape)
    np.testing.assert_array_equal(value.const_value.numpy(), (weight.astype(np.float64) * scale).astype(np.float32))


def test_the_same_product_is_made_once() -> None:
    weight = normal(4, 3).astype(np.float32)
    model = ir.from_proto(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [from_array(weight, "w")])))
    constants, value, scale = Constants(model.graph), model.graph.initializers["w"], normal(4, 1)
    first, again, other = (constants.scaled(value, (s,), (4, 3)) for s in (scale, scale.copy(), scale + 1))
    assert first is again
    assert first is not other
    assert {"w", "w_folded", "w_folded_1"} == set(model.graph.initializers)
