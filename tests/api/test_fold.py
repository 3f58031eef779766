"""What the public `fold_onnx` takes; what it folds is in tests/export/test_any_file.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from onnx_text import CONV, NORM3, model_of, saved, tensor

import normswap
from normswap.errors import UsageError

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
