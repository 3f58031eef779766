"""An ONNX file in float64."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from comparing import X
from onnx import TensorProto, helper, numpy_helper

from normswap.parity.probes import Probe
from normswap.parity.run_onnx import onnx_float64_runner, onnx_runner


def test_a_convolution_is_widened_too(tmp_path: Path) -> None:
    """onnxruntime has no float64 Conv; the judge of an ONNX file has."""
    weight = torch.randn(4, 3, 2, 2).numpy()
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 5, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4, 4, 3])],
        [numpy_helper.from_array(weight, "w")],
    )
    path = tmp_path / "conv.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    found, _ = onnx_float64_runner(path)(Probe("p", (X.double(),), {}))
    expected = torch.nn.functional.conv2d(X.double(), torch.from_numpy(weight).double())
    torch.testing.assert_close(found["#0"], expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((2, 3, 5, 6), "its input x is n x 3 x 5 x 4, but 2 x 3 x 5 x 6 was given"),
        ((2, 3), "its input x is n x 3 x 5 x 4, but 2 x 3 was given"),
    ],
)
def test_inputs_of_another_shape_are_named_with_both(shape: tuple[int, ...], said: str, tmp_path: Path) -> None:
    """onnxruntime's first line ends with "for the following indices"."""
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 5, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3, 5, 4])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "relu.onnx")
    run = onnx_runner(tmp_path / "relu.onnx", "all")
    assert run(Probe("p", (X,), {}))[0]["#0"].shape == X.shape
    with pytest.raises(ValueError, match=said):
        run(Probe("p", (torch.zeros(shape),), {}))
