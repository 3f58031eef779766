"""The bytes of an ONNX file that keeps its weights inside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from normswap.errors import UsageError
from normswap.export import file
from normswap.export.file import LARGE, write

RANDOM = np.random.default_rng(0)
TENSORS = {
    "small": numpy_helper.from_array(RANDOM.standard_normal((3, 5)).astype(np.float32), "small"),
    "floats": numpy_helper.from_array(RANDOM.standard_normal((131, 127)).astype(np.float32), "floats"),
    "halves": numpy_helper.from_array(RANDOM.standard_normal((7, 60_001)).astype(np.float16), "halves"),
    "doubles": numpy_helper.from_array(RANDOM.standard_normal(9_001), "doubles"),
    "flags": numpy_helper.from_array(RANDOM.random(70_001) < 0.3, "flags"),
    "bfloat": helper.make_tensor("bfloat", TensorProto.BFLOAT16, (33, 1_001), RANDOM.bytes(66_066), raw=True),
    "half bytes": helper.make_tensor("half bytes", TensorProto.INT4, (140_001,), RANDOM.bytes(70_001), raw=True),
    "words": helper.make_tensor("words", TensorProto.STRING, (2,), [b"a" * 50_000, "\u00fc".encode() * 50_000]),
    "inner": numpy_helper.from_array(RANDOM.standard_normal(20_011).astype(np.float32), "inner"),
}


def model() -> onnx.ModelProto:
    """Each tensor is an output; "inner" is an initializer of a subgraph."""
    inner = helper.make_graph(
        [helper.make_node("Identity", ["inner"], ["out"])], "g", [], [helper.make_tensor_value_info("out", 1, (20_011,))]
    )
    inner.initializer.append(TENSORS["inner"])
    nodes = [helper.make_node("Identity", [name], [f"{name} out"]) for name in TENSORS if name != "inner"]
    nodes.append(helper.make_node("If", ["yes"], ["inner out"], then_branch=inner, else_branch=inner))
    outputs = [helper.make_tensor_value_info(f"{name} out", tensor.data_type, tensor.dims) for name, tensor in TENSORS.items()]
    constants = [tensor for name, tensor in TENSORS.items() if name != "inner"] + [numpy_helper.from_array(np.array(True), "yes")]
    graph = helper.make_graph(nodes, "graph", [], outputs, constants, doc_string="a graph")
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10, producer_name="somebody")
    helper.set_model_props(made, {"key": "value"})
    return made


@pytest.mark.parametrize("external", [None, False, True])
def test_what_was_written_is_what_is_read(external: bool | None, tmp_path: Path) -> None:
    path, expected = tmp_path / "model.onnx", model()
    size = write(ir.from_proto(expected), path, external=external)
    assert size == sum(part.stat().st_size for part in tmp_path.iterdir())
    read = onnx.load(path)
    onnx.checker.check_model(str(path), full_check=True)
    inner = read.graph.node[-1].attribute[0].g.initializer
    got = {tensor.name: tensor for tensor in (*read.graph.initializer, *inner)}
    assert got.keys() == {*TENSORS, "yes"}
    for name, tensor in TENSORS.items():
        assert (got[name].data_type, list(got[name].dims)) == (tensor.data_type, list(tensor.dims)), name
        assert list(got[name].string_data) == list(tensor.string_data), name
        if tensor.data_type != TensorProto.STRING:
            assert numpy_helper.to_array(got[name]).tobytes() == numpy_helper.to_array(tensor).tobytes(), name
    assert [(node.op_type, list(node.input)) for node in read.graph.node] == [
        (node.op_type, list(node.input)) for node in expected.graph.node
    ]
    assert (read.graph.doc_string, read.producer_name, read.metadata_props[0].value) == ("a graph", "somebody", "value")
    assert sorted(part.name for part in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"][: 1 + (external is True)]


def test_a_file_is_the_one_that_protobuf_itself_writes(tmp_path: Path) -> None:
    path, rewritten = tmp_path / "model.onnx", tmp_path / "rewritten.onnx"
    write(ir.from_proto(model()), path)
    onnx.save(onnx.load(path), rewritten)
    assert path.stat().st_size == rewritten.stat().st_size
    assert onnx.load(rewritten) == onnx.load(path)


def test_more_than_a_file_holds_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "INLINE_LIMIT", 3 * LARGE)
    with pytest.raises(UsageError, match="and one ONNX file holds 196608 at most"):
        write(ir.from_proto(model()), tmp_path / "model.onnx", external=False)
    assert not list(tmp_path.iterdir())
    write(ir.from_proto(model()), tmp_path / "model.onnx")
    assert sorted(part.name for part in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
