"""The noise of the reference and of a runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comparing import Net, compared
from torch import nn

import normswap
from fixtures.nets import randomise
from normswap.parity.limits import CAP


def test_the_error_of_the_reference_itself_is_what_a_candidate_may_use_ten_times() -> None:
    cancels = Net(lambda m, y: (y + 100) - 100)
    parity = compared(cancels)
    assert parity
    assert all(d.tolerance == pytest.approx(min(10 * d.noise, CAP[torch.float32])) for d in parity.outputs)


@pytest.mark.parametrize("seed", range(4))
def test_a_sum_of_many_equal_numbers_is_the_runtimes_noise(tmp_path: Path, seed: int) -> None:
    """onnxruntime adds 50,176 equal numbers one after the other; so it does in the original."""
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ]
    model = randomise(nn.Sequential(*layers), seed).eval()
    export = normswap.export_onnx(normswap.convert(model), path=tmp_path / "m.onnx")
    assert export.comparisons.passed
    assert not export.residue
