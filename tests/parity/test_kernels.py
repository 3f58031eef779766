"""What torch computes for onnx's evaluator is what onnxruntime computes.

The evaluator's own operators are no measure: at onnx 1.23 they cannot run a grouped ConvTranspose, and pad a MaxPool on the wrong axis.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from normswap.parity.kernels import array_of, kernels, tensor_of


def same(op: str, x: Any, constants: dict[str, Any], **attributes: Any) -> None:
    node = helper.make_node(op, ["x", *constants], ["y"], **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * x.ndim)],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    x = x.astype(np.float32)
    mine = ReferenceEvaluator(model, new_ops=list(kernels())).run(None, {"x": x})[0]
    theirs = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    # Each value is a sum of at most 36 products of numbers of about 1, in float32.
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=36 * 2**-23 * max(1.0, float(np.abs(theirs).max())), strict=True)


def drawn(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).standard_normal(shape)


PLACES = st.lists(st.integers(0, 2), min_size=4, max_size=4)
STEPS = st.lists(st.integers(1, 2), min_size=2, max_size=2)


@settings(max_examples=25, deadline=None)
@given(pads=PLACES, strides=STEPS, dilations=STEPS, groups=st.sampled_from([1, 2]), bias=st.booleans())
def test_conv(pads: list[int], strides: list[int], dilations: list[int], groups: int, bias: bool) -> None:
    constants = {"w": drawn(6, 4 // groups, 3, 2), **({"b": drawn(6)} if bias else {})}
    same("Conv", drawn(2, 4, 9, 8), constants, pads=pads, strides=strides, dilations=dilations, group=groups)


@settings(max_examples=25, deadline=None)
@given(strides=STEPS, groups=st.sampled_from([1, 2]), bias=st.booleans(), pads=st.lists(st.integers(0, 1), min_size=4, max_size=4))
def test_conv_transpose(strides: list[int], groups: int, bias: bool, pads: list[int]) -> None:
    constants = {"w": drawn(4, 6 // groups, 3, 4), **({"b": drawn(6)} if bias else {})}
    same("ConvTranspose", drawn(1, 4, 5, 6), constants, strides=strides, group=groups, pads=pads)


@settings(max_examples=20, deadline=None)
@given(strides=STEPS, pads=st.lists(st.integers(0, 1), min_size=4, max_size=4), whole=st.booleans(), up=st.booleans())
def test_pools(strides: list[int], pads: list[int], whole: bool, up: bool) -> None:
    x = drawn(2, 3, 9, 8)
    same("MaxPool", x, {}, kernel_shape=[3, 2], strides=strides, pads=pads, ceil_mode=int(up))
    same("AveragePool", x, {}, kernel_shape=[3, 2], strides=strides, pads=pads, count_include_pad=int(whole))


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks(rank: int) -> None:
    x, spread = drawn(2, 4, *(5, 6, 7)[:rank]), [1] * rank
    same("Conv", x, {"w": drawn(3, 4, *[2] * rank)}, pads=spread * 2, strides=spread)
    same("MaxPool", x, {}, kernel_shape=[2] * rank)


@pytest.mark.parametrize("name", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_pads_by_name_are_the_evaluators(name: str) -> None:
    same("Conv", drawn(1, 3, 7, 6), {"w": drawn(5, 3, 3, 3)}, auto_pad=name)


@pytest.mark.parametrize(
    ("way", "nearest"), [("asymmetric", "floor"), ("half_pixel", "round_prefer_floor"), ("half_pixel", "round_prefer_ceil")]
)
@pytest.mark.parametrize("scales", [[1, 1, 2, 2], [1, 1, 3, 1], [1, 1, 0.5, 2]])
def test_resize_to_whole_multiples(way: str, nearest: str, scales: list[float]) -> None:
    constants = {"roi": np.zeros(0), "scales": np.array(scales, np.float32)}
    same("Resize", drawn(1, 2, 4, 6), constants, mode="nearest", coordinate_transformation_mode=way, nearest_mode=nearest)


def test_linear_resize_is_the_evaluators() -> None:
    same("Resize", drawn(1, 2, 3, 4), {"roi": np.zeros(0), "scales": np.array([1, 1, 2, 2], np.float32)}, mode="linear")


def test_what_the_evaluator_reversed_is_a_tensor() -> None:
    """numpy calls an array contiguous that is reversed along an axis of size 1, and torch refuses it."""
    for array in (drawn(3, 4)[:, ::-1], drawn(2, 3, 1)[..., ::-1], np.float64(3), np.array(2)):
        np.testing.assert_array_equal(tensor_of(array).numpy(), array)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("op", "attributes", "want"),
    [
        ("Erf", {}, torch.erf),
        ("Gelu", {}, F.gelu),
        ("Gelu", {"approximate": "tanh"}, lambda x: F.gelu(x, approximate="tanh")),
        ("HardSwish", {}, F.hardswish),
    ],
)
def test_an_activation_is_computed_in_the_dtype_of_its_input(op: str, attributes: dict[str, Any], want: Any, dtype: torch.dtype) -> None:
    x = torch.from_numpy(4 * drawn(3, 5)).to(dtype)
    kind = helper.np_dtype_to_tensor_dtype(array_of(x).dtype)
    ends = [helper.make_tensor_value_info(name, kind, [3, 5]) for name in "xy"]
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"], **attributes)], "g", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    (y,) = ReferenceEvaluator(model, new_ops=list(kernels())).run(None, {"x": array_of(x)})
    torch.testing.assert_close(tensor_of(y), want(x.double()).to(dtype), rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_bfloat16_goes_to_numpy_and_back() -> None:
    x = torch.tensor([[1.5, -2.0, 3e38], [0.1, torch.inf, 0.0]], dtype=torch.bfloat16)
    for tensor in (x, x.T, x[:, 1:], x[0, 0]):
        assert array_of(tensor).dtype.name == "bfloat16"
        assert torch.equal(tensor_of(array_of(tensor)), tensor)
    assert array_of(x.float()).dtype == np.float32
