"""What is measured again before a difference is called a failure, and that it excuses nothing that is wrong."""

from __future__ import annotations

import copy
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import normswap
from fixtures.nets import randomise
from normswap.parity import second_look
from normswap.parity.judge import SAME, compare, judge
from normswap.parity.result import ParityError

X = torch.randn(2, 3, 11, 9, generator=torch.Generator().manual_seed(4))


def net(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = (nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 5, 3, padding=1), nn.BatchNorm2d(5))
    return randomise(nn.Sequential(*layers), seed).eval()  # type: ignore[return-value]


def fused(model: nn.Sequential) -> nn.Sequential:
    result = copy.deepcopy(model)
    for i in (0, 3):
        result[i], result[i + 1] = fuse_conv_bn_eval(result[i], result[i + 1]), nn.Identity()  # type: ignore[type-var]
    return result


def test_a_conversion_is_held_to_1e_9_although_its_statistics_are_rounded() -> None:
    parity = normswap.convert(net(), X).parity
    rows = [d for d in (*parity.all_outputs, *parity.sites) if d.float64]
    assert {d.tolerance for d in rows} == {SAME}
    assert max(d.max_rel for d in rows) < 1e-13


@pytest.mark.parametrize("eps", [0.0, 1.1e-5])
def test_another_eps_is_another_function_however_little_it_moves(eps: float) -> None:
    """In float32 it is hidden by rounding."""
    reference, candidate = net(), net()
    with torch.no_grad():
        for model in (reference, candidate):
            model[1].running_var.fill_(30.0)  # type: ignore[union-attr]
    candidate[1].eps = eps  # type: ignore[assignment]
    parity = compare(judge(reference, (X,), {}), candidate)
    assert not parity
    assert all(d.passed for d in parity.all_outputs if not d.float64)
    assert any(not d.passed for d in parity.all_outputs if d.float64)


@pytest.mark.parametrize("seed", range(4))
def test_weights_that_were_rounded_are_the_same_function(seed: int) -> None:
    reference, candidate = net(seed), fused(net(seed))
    for a, b in ((reference, candidate), (candidate, reference)):
        parity = compare(judge(a, (X,), {}), b)
        assert parity, parity.outputs
        wide = [d for d in parity.all_outputs if d.float64]
        assert all(SAME < d.tolerance < 1e-5 for d in wide)
    with torch.no_grad():
        candidate[3].weight[2] *= 1 + 1e-4  # type: ignore[index]
    assert not compare(judge(reference, (X,), {}), candidate)


def test_what_the_reference_has_too_was_not_rounded() -> None:
    """A stale weight is one unit in the last place of itself, at most; here it is another number."""
    reference = net()
    candidate = copy.deepcopy(reference)
    with torch.no_grad():
        candidate[3].bias[1] += 3e-7  # type: ignore[index]
    amounts = second_look.rounded_by(candidate, second_look.tensors(reference), 2.0**-23)
    moved = {name for name, tensor in candidate.named_parameters() if amounts(tensor)}
    assert moved == {"3.bias"}


def test_whole_numbers_are_not_nudged() -> None:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0, 0.0], [0.5, 3.0, 0.25]]))
    twin = second_look.nudged(model, lambda tensor: 1e-3)
    changed = (twin.weight != model.weight.double()).tolist()  # type: ignore[operator, union-attr]
    assert changed == [[False, False, False], [True, False, True]]
    assert torch.equal(model.weight[0], torch.tensor([1.0, -2.0, 0.0]))


class Saturates(nn.Module):
    """As a pitch tracker does: nothing of its output is left at large inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(-self.norm(self.conv(x)).square().mean((2, 3)) - 1)


def test_what_is_left_at_large_inputs_is_held_to_what_the_output_reaches(tmp_path: Path) -> None:
    conversion = normswap.convert(randomise(Saturates(), 2).eval(), X)
    export = normswap.export_onnx(conversion, path=tmp_path / "m.onnx")
    assert export.parity is not None
    assert export.parity
    judgement = conversion.judgement
    large, example = (judgement.outputs[name]["output"] for name in ("batch 1 x 1000", "example"))
    assert float(large.value.max()) < 1e-6
    assert large.least == pytest.approx(
        1e-3 * max(float(judgement.outputs[p]["output"].value.max()) for p in ("example", "batch 1", "batch 3"))
    )
    assert large.least <= example.least


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
    assert export.legs.passed
    assert not export.residue


def test_a_file_that_saturates_is_decided_in_float64(tmp_path: Path) -> None:
    class Low(Saturates):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(self.norm(self.conv(x)).mean((2, 3)) * 1e-3 - 17)

    model = randomise(Low(), 2).eval()
    path = normswap.export_onnx(normswap.convert(model, X), path=tmp_path / "m.onnx").path
    parity = normswap.verify(path, path, X)
    assert parity
    proto = onnx.load(path)
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name == "conv.bias")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) + 30.0, weight.name))
    onnx.save(proto, tmp_path / "faulty.onnx")
    assert not normswap.verify(path, tmp_path / "faulty.onnx", X)
    with pytest.raises(ParityError):
        normswap.parity.result.raise_for(normswap.verify(model, tmp_path / "faulty.onnx", X))  # type: ignore[attr-defined]
