"""What is looked at again before it is called a failure."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from comparing import LARGER, Saturates
from onnx import numpy_helper
from torch import Tensor

import normswap
from fixtures.nets import randomise
from normswap.parity.result import ParityError, raise_for


def test_a_file_that_saturates_is_decided_in_float64(tmp_path: Path) -> None:
    class Low(Saturates):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(self.norm(self.conv(x)).mean((2, 3)) * 1e-3 - 17)

    model = randomise(Low(), 2).eval()
    path = normswap.export_onnx(normswap.convert(model, LARGER), path=tmp_path / "m.onnx").path
    parity = normswap.verify(path, path, LARGER)
    assert parity
    proto = onnx.load(path)
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name == "conv.bias")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) + 30.0, weight.name))
    onnx.save(proto, tmp_path / "faulty.onnx")
    assert not normswap.verify(path, tmp_path / "faulty.onnx", LARGER)
    with pytest.raises(ParityError):
        raise_for(normswap.verify(model, tmp_path / "faulty.onnx", LARGER))
