"""The noise of the reference and of a runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comparing import Net, compared
from onnx_text import CONV, model_of, saved
from torch import nn

import normswap
from fixtures.nets import randomise
from normswap.parity import noise
from normswap.parity.judge import judge
from normswap.parity.limits import CAP
from normswap.parity.probes import Probe, Runner, Values
from normswap.parity.run_onnx import onnx_runner


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


@pytest.mark.parametrize(("moved", "wrong"), [(2e-5, False), (1e-2, True)])
def test_what_optimisations_move_in_a_file_that_only_onnxruntime_runs_is_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: float, wrong: bool
) -> None:
    """A piper voice is 2e-5 from itself where onnxruntime optimises it, and onnx's evaluator cannot run it."""
    proto = model_of("h = Conv(x, w, c) y = com.microsoft.Gelu(h)", *CONV)
    proto.opset_import.add(domain="com.microsoft", version=1)
    path = saved(tmp_path / "in.onnx", proto)
    found = judge(path, (torch.randn(2, 3, 6, 5),), {})
    assert not found.float64

    def optimised(path: Path, level: str) -> Runner:
        run = onnx_runner(path, level)

        def runs(probe: Probe) -> tuple[Values, Values]:
            outputs, inner = run(probe)
            return {name: value + moved * value.abs().max() for name, value in outputs.items()}, inner

        return runs

    monkeypatch.setattr(noise, "onnx_runner", optimised)
    measured = noise.baseline_of(found, path, "all")
    assert max(measured.noise.values()) == pytest.approx(moved, rel=1e-2)
    assert (measured.wrong is not None) is wrong
    assert measured.wrong is None or measured.wrong.endswith("computes something else from the file when it optimises the graph")
