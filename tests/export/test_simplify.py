"""normswap/export/simplify.py: the graph gets shorter, its function stays, and what only looks alike is left alone."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from normswap.export.simplify import norms_stay, simplify

GENERATOR = np.random.default_rng(0)


def f(*shape: int) -> np.ndarray[Any, Any]:
    return GENERATOR.standard_normal(shape).astype(np.float32)


def i(*numbers: int) -> np.ndarray[Any, Any]:
    return np.array(numbers, np.int64)


def made(nodes: str, inputs: str = "float[n,4,6,8] x", outputs: str = "float[n,a,b,c] y", **constants: Any) -> onnx.ModelProto:
    text = f'<ir_version: 10, opset_import: ["" : 20]> g ({inputs}) => ({outputs}) {{ {nodes} }}'
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in constants.items())
    for number, node in enumerate(proto.graph.node):
        node.name = f"{node.op_type}_{number}"
    return proto


def run(proto: onnx.ModelProto, **feeds: Any) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)  # type: ignore[no-any-return]


def shortened(proto: onnx.ModelProto, **feeds: Any) -> Counter[str]:
    """The operators that are left; the outputs are the same, and so are their names."""
    model = ir.from_proto(proto)
    simplify(model)
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    assert [value.name for value in after.graph.output] == [value.name for value in proto.graph.output]
    for got, want in zip(run(after, **feeds), run(proto, **feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    return Counter(node.op_type for node in after.graph.node)


X = {"x": f(3, 4, 6, 8)}
SWAPPED = "s = Shape(x)  l = Slice(s, m1, far)  k = Slice(s, m2, m1)  h = Slice(s, low, m2)  p = Concat<axis=0>(m1, k, l)"
BACK = "r = Reshape(x, p)  t = Transpose<perm=[0, 2, 1]>(r)  q = Concat<axis=0>(h, l, k)  u = Reshape(t, q)  y = Relu(u)"
ENDS = {"m1": i(-1), "m2": i(-2), "far": i(2**62), "low": i(-(2**62))}


def test_what_torch_makes_of_a_transposition_is_one() -> None:
    assert shortened(made(f"{SWAPPED} {BACK}", **ENDS), **X) == {"Transpose": 1, "Relu": 1}


def test_two_unknown_sizes_stay_computed() -> None:
    found = shortened(made(f"{SWAPPED} {BACK}", "float[n,4,w,8] x", **ENDS), **X)
    assert found["Reshape"] == 2
    assert found["Shape"] >= 1


@pytest.mark.parametrize(
    ("between", "perm", "after"),
    [((-1, 6, 8), (0, 2, 1), (-1, 4, 48)), ((-1, 8, 6), (0, 2, 1), (-1, 4, 6, 8)), ((-1, 6, 8), (1, 0, 2), (-1, 4, 8, 6))],
    ids=["other rank", "other axes", "other permutation"],
)
def test_other_reshapes_around_a_transpose_stay(between: tuple[int, ...], perm: tuple[int, ...], after: tuple[int, ...]) -> None:
    outputs = "float[n,a,b] y" if len(after) == 3 else "float[n,a,b,c] y"
    proto = made(f"r = Reshape(x, p)  t = Transpose<perm={list(perm)}>(r)  y = Reshape(t, q)", outputs=outputs, p=i(*between), q=i(*after))
    assert shortened(proto, **X) == {"Reshape": 2, "Transpose": 1}


def test_a_reshape_to_the_same_shape_goes() -> None:
    assert shortened(made("r = Reshape(x, p)  y = Relu(r)", p=i(-1, 4, 6, 8)), **X) == {"Relu": 1}


def test_a_reshape_to_another_shape_stays() -> None:
    assert shortened(made("r = Reshape(x, p)  y = Relu(r)", p=i(-1, 6, 4, 8)), **X) == {"Reshape": 1, "Relu": 1}


def test_a_reshape_that_gives_an_output_its_name_stays() -> None:
    assert shortened(made("y = Reshape(x, p)", p=i(-1, 4, 6, 8)), **X) == {"Reshape": 1}


NESTED = "a = Relu(x)  b = Neg(x)  h = Concat<axis=1>(a, b)  c = Abs(x)"


def test_a_concat_of_a_concat_is_one() -> None:
    assert shortened(made(f"{NESTED}  y = Concat<axis=1>(c, h, x)"), **X)["Concat"] == 1


@pytest.mark.parametrize(
    ("last", "outputs"),
    [
        ("d = Concat<axis=1>(c, c)  y = Concat<axis=2>(h, d)", "float[n,a,b,c] y"),
        ("z = Concat<axis=1>(c, h)  y = Softplus(h)", "float[n,a,b,c] y, float[n,d,b,c] z"),
        ("y = Concat<axis=1>(c, h)", "float[n,a,b,c] y, float[n,d,b,c] h"),
    ],
    ids=["another axis", "read twice", "an output"],
)
def test_other_concats_stay(last: str, outputs: str) -> None:
    proto = made(f"{NESTED}  {last}", outputs=outputs)
    assert shortened(proto, **X)["Concat"] == Counter(node.op_type for node in proto.graph.node)["Concat"]


POOL = "y = AveragePool<kernel_shape=[2, 2], strides=[2, 2]>(h)"
POINT = {"w": f(5, 4, 1, 1), "b": f(5)}


def order(proto: onnx.ModelProto) -> list[str]:
    model = ir.from_proto(proto)
    simplify(model)
    shortened(proto, **X)
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize(
    ("pool", "weights"),
    [
        (POOL, POINT),
        ("y = AveragePool<kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]>(h)", POINT),
        ("y = AveragePool<kernel_shape=[2, 3], strides=[2, 3], ceil_mode=1>(h)", POINT),
        ("y = AveragePool<kernel_shape=[2, 2], strides=[2, 2], count_include_pad=1>(h)", POINT),
    ],
    ids=["transition", "padded, not counted", "ceil", "nothing to count"],
)
def test_averages_are_taken_before_a_pointwise_convolution(pool: str, weights: dict[str, Any]) -> None:
    assert order(made(f"h = Conv(x, w, b)  {pool}", **weights)) == ["AveragePool", "Conv"]


def test_so_it_is_with_groups_and_without_a_bias() -> None:
    assert order(made(f"h = Conv<group=2>(x, w)  {POOL}", w=f(6, 2, 1, 1))) == ["AveragePool", "Conv"]


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [
        (f"h = Conv(x, w, b)  {POOL}", {"w": f(5, 4, 3, 3), "b": f(5)}),
        (f"h = Conv<strides=[2, 2]>(x, w, b)  {POOL}", POINT),
        (f"h = Conv<pads=[1, 1, 1, 1]>(x, w, b)  {POOL}", POINT),
        (f"k = Conv(x, w, b)  h = Relu(k)  {POOL}", POINT),
        ("h = Conv(x, w, b)  y = AveragePool<kernel_shape=[2, 2]>(h)", POINT),
        ("h = Conv(x, w, b)  y = AveragePool<kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], count_include_pad=1>(h)", POINT),
        ("h = Conv(x, w, b)  y = MaxPool<kernel_shape=[2, 2], strides=[2, 2]>(h)", POINT),
        ("h = Conv(x, w, b)  y = AveragePool<kernel_shape=[5, 5], strides=[1, 2]>(h)", {"w": f(1, 4, 1, 1), "b": f(1)}),
    ],
    ids=[
        "3x3",
        "strided",
        "padded",
        "a ReLU between",
        "as many averages",
        "zeros are counted",
        "a maximum",
        "more to add than to multiply",
    ],
)
def test_other_pools_stay_where_they_are(nodes: str, weights: dict[str, Any]) -> None:
    proto = made(nodes, **weights)
    assert order(proto) == [node.op_type for node in proto.graph.node]


def test_a_convolution_that_something_else_reads_stays_before_the_pool() -> None:
    proto = made(f"h = Conv(x, w, b)  {POOL}  z = Relu(h)", outputs="float[n,a,b,c] y, float[n,a,d,e] z", **POINT)
    assert order(proto) == ["Conv", "AveragePool", "Relu"]


def test_a_part_of_a_table_is_taken_before() -> None:
    proto = made("g = Gather(t, k)  y = Add(x, g)", "float[n,5] x", "float[n,5] y", t=f(9000, 5), k=np.array(7))
    assert shortened(proto, x=f(3, 5)) == {"Add": 1}


def test_a_table_is_not_blown_up() -> None:
    many = GENERATOR.integers(0, 2000, 9001)
    proto = made("g = Gather(t, k)  y = Add(x, g)", "float[n,5] x", "float[9001,5] y", t=f(2000, 5), k=many)
    assert shortened(proto, x=f(1, 5)) == {"Gather": 1, "Add": 1}


def test_a_table_that_depends_on_the_input_stays() -> None:
    proto = made("g = Gather(x, k)  y = Relu(g)", "float[n,5] x", "float[a,5] y", k=i(1, 0))
    assert shortened(proto, x=f(3, 5)) == {"Gather": 1, "Relu": 1}


@pytest.mark.parametrize(("axis", "shape"), [(1, (2, 3)), (-1, (1, 6)), (0, (3, 2))])
def test_gather_elements_of_constants_is_a_constant(axis: int, shape: tuple[int, int]) -> None:
    picks = GENERATOR.integers(0, 4 if axis else 2, shape)
    proto = made(f"g = GatherElements<axis={axis}>(t, k)  y = Add(x, g)", "float[1,1] x", "float[a,b] y", t=f(4, 6), k=picks)
    assert shortened(proto, x=f(1, 1)) == {"Add": 1}


def test_a_graph_with_nothing_to_shorten_stays() -> None:
    proto = made("h = Conv(x, w, b)  k = Relu(h)  y = Concat<axis=1>(k, x)", **POINT)
    assert order(proto) == ["Conv", "Relu", "Concat"]


def test_outputs_that_nothing_computes_stay() -> None:
    outputs = "float[n,4,6,8] x, float[n,a,b,c] y, float[5] k"
    proto = made("r = Reshape(x, p)  y = Relu(r)", outputs=outputs, p=i(-1, 4, 6, 8), k=f(5))
    model = ir.from_proto(proto)
    simplify(model)
    assert [value.name for value in (*model.graph.inputs, *model.graph.outputs)] == ["x", "x", "y", "k"]
    assert [node.op_type for node in model.graph] == ["Relu"]
    assert "k" in model.graph.initializers


def test_a_norm_after_a_convolution_stays_if_asked() -> None:
    norm = {name: f(5) for name in "stm"} | {"v": f(5) ** 2}
    proto = made("h = Conv(x, w, b)  k = BatchNormalization(h, s, t, m, v)  y = Relu(k)", **POINT, **norm)
    counts = []
    for stays in (norms_stay, lambda model: contextlib.nullcontext()):
        model = ir.from_proto(proto)
        with stays(model):
            simplify(model)
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        counts.append(Counter(node.op_type for node in model.graph))
    assert counts == [{"Conv": 1, "BatchNormalization": 1, "Relu": 1}, {"Conv": 1, "Relu": 1}]
