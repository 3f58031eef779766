"""What the public `fold_onnx` takes; what it folds is in tests/export/test_any_file.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_text import CONV, NORM, NORM3, model_of, saved, tensor

import normswap
from normswap.api import fold as api_fold
from normswap.errors import UsageError
from normswap.export.verified import comparisons

X = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file that runs at one size only, and does not say at which."""
    body = "h = BatchNormalization(x, s, t, m, v) k = Conv(h, w) f = Flatten(k) y = MatMul(f, q)"
    proto = model_of(body, *CONV, *NORM3, tensor("q", 168, 5), inputs="float[b,3,height,width] x")
    return saved(tmp_path / "in.onnx", proto)


@pytest.mark.parametrize("inputs", [X, (X,), ["2x3x9x8"], ("2x3x9x8",)], ids=["tensor", "tuple", "specs", "tuple of specs"])
def test_inputs_are_tensors_or_specs(inputs: Any, source: Path) -> None:
    result = normswap.fold_onnx(source, source.parent / "out.onnx", inputs=inputs)
    assert result.changed
    assert result.parity
    assert result.path == source.parent / "out.onnx"
    assert "BatchNormalization" not in result.nodes


@pytest.mark.parametrize("inputs", [None, [], 3.0], ids=["none", "no specs", "number"])
def test_inputs_that_are_none(inputs: Any, source: Path) -> None:
    with pytest.raises(UsageError, match=r"does not say how large its inputs are|example inputs are a tensor"):
        normswap.fold_onnx(str(source), str(source.parent / "out.onnx"), inputs=inputs)
    assert [path.name for path in source.parent.iterdir()] == ["in.onnx"]


# -- sizes that the file does not say ------------------------------------------------------------------------------------------------------


def test_axes_of_one_name_get_one_size(tmp_path: Path) -> None:
    """The state of an LSTM has the batch on its second axis."""
    body = "h = Conv(x, w, c) k = BatchNormalization(h, s, t, m, v) u = Transpose<perm = [1, 0, 2, 3]>(z) y = Add(k, u)"
    proto = model_of(body, *CONV, *NORM, inputs="float[b,3,height,width] x, float[4,b,1,1] z")
    result = normswap.fold_onnx(saved(tmp_path / "in.onnx", proto), tmp_path / "out.onnx")
    assert result.parity
    assert "BatchNormalization" not in result.nodes


@pytest.mark.parametrize("sizes", ["6,5", "height,width"])
def test_a_file_that_runs_at_a_batch_of_one_alone(sizes: str, tmp_path: Path) -> None:
    body = "h = Conv(x, w, c) k = BatchNormalization(h, s, t, m, v) q = Squeeze(k, first) p = Abs(q) y = Unsqueeze(p, first)"
    first = numpy_helper.from_array(np.array([0]), "first")
    proto = model_of(body, *CONV, *NORM, first, inputs=f"float[b,3,{sizes}] x")
    result = normswap.fold_onnx(saved(tmp_path / "in.onnx", proto), tmp_path / "out.onnx")
    assert result.parity
    assert "BatchNormalization" not in result.nodes


# -- random numbers ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["RandomNormalLike", "RandomUniformLike"])
def test_a_file_that_draws_random_numbers_says_so_at_once(op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime draws others where the operator has another place in the graph; no search among the folds can help."""
    body = f"h = Conv(x, w, c) k = BatchNormalization(h, s, t, m, v) g = Sigmoid(k) r = {op}(g) y = Add(g, r)"
    source = saved(tmp_path / "in.onnx", model_of(body, *CONV, *NORM))
    tried = list[object]()
    monkeypatch.setattr(api_fold, "comparisons", lambda *a, **b: tried.append(a) or comparisons(*a, **b))
    result = normswap.fold_onnx(source, tmp_path / "out.onnx", inputs=["2x3x6x5"])
    assert not result.changed
    assert {site.reason for site in result.sites} == {
        f"rolled back: the file draws random numbers ({op}), so no two runs of it can be compared"
    }
    assert len(tried) <= 1
    assert (tmp_path / "out.onnx").read_bytes() == source.read_bytes()


# -- outputs that are no tensors of numbers, and operators that onnxruntime has not ------------------------------------------------------


def test_texts_and_sequences_are_compared_too(tmp_path: Path) -> None:
    """The labels of a classifier, say."""
    body = "h = Conv(x, w, c) y = BatchNormalization(h, s, t, m, v) q = SequenceConstruct(y, x) z = Identity(names)"
    names = helper.make_tensor("names", TensorProto.STRING, [2], [b"cat", b"dog"])
    proto = model_of(body, *CONV, *NORM, names)
    proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.STRING, [2]))
    proto.graph.output.append(helper.make_tensor_sequence_value_info("q", TensorProto.FLOAT, None))
    result = normswap.fold_onnx(saved(tmp_path / "in.onnx", proto), tmp_path / "out.onnx", inputs=["2x3x6x5"])
    assert result.parity
    assert "BatchNormalization" not in result.nodes
    assert [row.name for row in result.parity.outputs] == ["#0", "#1", "#2[0]", "#2[1]"]


def test_a_convolution_in_float64_is_run_by_the_evaluator(tmp_path: Path) -> None:
    wide = (numpy_helper.from_array(numpy_helper.to_array(t).astype(np.float64), t.name) for t in (*CONV, *NORM))
    proto = model_of("h = Conv(x, w, c) y = BatchNormalization(h, s, t, m, v)", *wide, inputs="double[b,3,6,5] x")
    proto.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    result = normswap.fold_onnx(saved(tmp_path / "in.onnx", proto), tmp_path / "out.onnx")
    assert result.parity
    assert result.nodes == {"Conv": 1}


def test_a_file_in_bfloat16_is_run_by_the_evaluator(tmp_path: Path) -> None:
    narrow = (helper.make_tensor(t.name, TensorProto.BFLOAT16, t.dims, numpy_helper.to_array(t).ravel()) for t in (*CONV, *NORM))
    proto = model_of("h = Conv(x, w, c) y = BatchNormalization(h, s, t, m, v)", *narrow, inputs="bfloat16[b,3,6,5] x", imports='"": 22')
    proto.graph.output[0].type.tensor_type.elem_type = TensorProto.BFLOAT16
    result = normswap.fold_onnx(saved(tmp_path / "in.onnx", proto), tmp_path / "out.onnx")
    assert result.parity
    assert result.nodes == {"Conv": 1}
    assert normswap.verify(tmp_path / "in.onnx", tmp_path / "out.onnx")
