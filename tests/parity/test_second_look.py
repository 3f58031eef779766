"""What is looked at again before it is called a failure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from comparing import LARGER, Saturates
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional

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


# --- noise that is small by chance ------------------------------------------------------------------------------------------------------

ROWS_OF_SIX = torch.randn(2, 6, 15, generator=torch.Generator().manual_seed(5))
Function = Callable[[Tensor], Tensor]


class PerSample(nn.Module):
    """What a norm makes of equal numbers is nothing, or one rounding over the square root of eps; another norm takes it for a signal.

    At the flat probe torch has no error at all, by chance, and onnxruntime 1% of the output.
    """

    def __init__(self, before: Function, norm: Function, seed: int, after: Callable[[Tensor, Tensor], Tensor] = lambda x, y: y) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear, self.norm = nn.Linear(6, 8, bias=False), nn.LayerNorm(8)
        self.functions = before, norm, after
        randomise(self, seed).eval()

    def forward(self, x: Tensor) -> Tensor:
        before, norm, after = self.functions
        return after(x, self.norm(self.linear(norm(before(x)).transpose(1, 2))))


def _groups(x: Tensor) -> Tensor:
    return functional.group_norm(x, 2)


@pytest.mark.parametrize(
    ("before", "norm", "seed"),
    [
        (torch.sigmoid, functional.instance_norm, 1),
        (torch.sigmoid, _groups, 0),
        pytest.param(torch.tanh, _groups, 2, marks=pytest.mark.slow),
        pytest.param(torch.cos, _groups, 3, marks=pytest.mark.slow),
    ],
)
def test_a_file_without_a_baseline_has_its_noise_measured_nearby(before: Function, norm: Function, seed: int, tmp_path: Path) -> None:
    model = PerSample(before, norm, seed)
    export = normswap.export_onnx(model, ROWS_OF_SIX, tmp_path / "m.onnx")
    parity = normswap.verify(model, export.path, ROWS_OF_SIX)
    assert parity
    flat = next(text for text in parity.unjudged if "all 3" in text)
    assert flat.startswith("output at the probe 'batch 1, all 3': the original itself is ")


@pytest.mark.parametrize(
    "after",
    [
        lambda x, y: y + 1e-4,
        pytest.param(lambda x, y: y * (1 + 1e-4), marks=pytest.mark.slow),
        pytest.param(lambda x, y: y.half().float(), marks=pytest.mark.slow),
        lambda x, y: torch.where(x.max() == x.min(), y + 0.1, y),  # only where float32 says nothing
        lambda x, y: torch.where(x.max() > 100, y + 1e-3, y),
    ],
)
def test_noise_that_is_large_nearby_hides_no_fault(after: Callable[[Tensor, Tensor], Tensor], tmp_path: Path) -> None:
    faulty = PerSample(torch.sigmoid, _groups, 0, after)
    path = normswap.export_onnx(faulty, ROWS_OF_SIX, tmp_path / "faulty.onnx").path
    assert not normswap.verify(PerSample(torch.sigmoid, _groups, 0), path, ROWS_OF_SIX)


# --- outputs that are nothing but rounding ------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """The same thing in two ways, one minus the other, beside an output of another kind."""

    def __init__(self, difference: Callable[[Twice, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.linear, self.layer_norm, self.batch_norm = nn.Linear(8, 5), nn.LayerNorm(8), nn.BatchNorm1d(8)
        self.difference = difference
        randomise(self, 4).eval()
        self.weight, self.bias = (nn.Parameter(p.detach().clone()) for p in (self.layer_norm.weight, self.layer_norm.bias))

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        return self.linear(x), self.difference(self, x)


def _layer_norms(m: Twice, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, True)
    by_hand = centred / torch.sqrt(centred.square().mean(-1, True) + 1e-5)
    return m.layer_norm(x) - (by_hand * m.weight + m.bias)


def _batch_norms(m: Twice, x: Tensor) -> Tensor:
    norm = m.batch_norm
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return norm(x) - (x * scale + (norm.bias - norm.running_mean * scale))


def _amplified(difference: Tensor) -> Tensor:
    return functional.rms_norm(difference, (8,), eps=1e-5)


NOTHING: dict[str, Callable[[Twice, Tensor], Tensor]] = {
    "two layer norms": _layer_norms,
    "two layer norms, amplified": lambda m, x: _amplified(_layer_norms(m, x)),
    "two batch norms": _batch_norms,
    "two batch norms, amplified": lambda m, x: _amplified(_batch_norms(m, x)),
    "shares that add up to 1": lambda m, x: torch.softmax(x, -1).sum(-1) - 1,
}
ROWS_OF_EIGHT = torch.randn(5, 8, generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize(
    "difference",
    # what is not amplified is, in each, part of what is
    [pytest.param(NOTHING[name], id=name, marks=[pytest.mark.slow] if f"{name}, amplified" in NOTHING else []) for name in NOTHING],
)
def test_an_output_that_is_nothing_but_rounding_passes(difference: Callable[[Twice, Tensor], Tensor], tmp_path: Path) -> None:
    conversion = normswap.convert(Twice(difference), ROWS_OF_EIGHT)
    export = normswap.export_onnx(conversion, path=tmp_path / "m.onnx")
    for parity in (conversion.parity, export.parity, normswap.verify(Twice(difference), export.path, ROWS_OF_EIGHT)):
        assert parity
        assert any(text.startswith("output[1] at the probe 'example': the original itself is ") for text in parity.unjudged)


FAULTS: dict[str, Callable[[Twice, Tensor], Tensor]] = {
    "a tenth": lambda m, x: _amplified(_layer_norms(m, x)) + 0.1,
    "a hundredth of the noise": lambda m, x: _amplified(_layer_norms(m, x)) + 1e-6,
    "before it is amplified": lambda m, x: _amplified(_layer_norms(m, x) + 1e-6),
    "one of the two": lambda m, x: _amplified(m.layer_norm(x)),
    "only at large inputs": lambda m, x: torch.where(x.max() > 100, 1e-3, 0.0) + _amplified(_layer_norms(m, x)),
    "another shape": lambda m, x: _amplified(_layer_norms(m, x))[:, :7],
    "NaN": lambda m, x: _amplified(_layer_norms(m, x)).masked_fill(x == x.max(), torch.nan),
    "float16": lambda m, x: _amplified(m.layer_norm(x).half().float() - m.layer_norm(x)),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_what_is_nothing_but_rounding_hides_no_fault(fault: Callable[[Twice, Tensor], Tensor]) -> None:
    assert not normswap.verify(Twice(NOTHING["two layer norms, amplified"]), Twice(fault), ROWS_OF_EIGHT)


# The others differ for the judge, which is the same for a file, and not for the file.
IN_A_FILE = ("a hundredth of the noise", "only at large inputs", "NaN")


@pytest.mark.parametrize("fault", [pytest.param(name, marks=[] if name in IN_A_FILE else [pytest.mark.slow]) for name in FAULTS])
def test_nor_in_a_file(fault: str, tmp_path: Path) -> None:
    right, faulty = Twice(NOTHING["two layer norms, amplified"]), Twice(FAULTS[fault])
    path = normswap.export_onnx(faulty, ROWS_OF_EIGHT, tmp_path / "faulty.onnx").path
    assert not normswap.verify(right, path, ROWS_OF_EIGHT)


# --- outputs that the last digits of float64 decide ---------------------------------------------------------------------------------------


def _chaos(m: Twice, x: Tensor) -> Tensor:
    return torch.sin(m.batch_norm(x) * 1e16)


def test_an_output_that_rounding_decides_is_named_and_the_others_decide(tmp_path: Path) -> None:
    model = Twice(_chaos)
    conversion = normswap.convert(model, ROWS_OF_EIGHT)
    export = normswap.export_onnx(conversion, path=tmp_path / "m.onnx")
    for parity in (conversion.parity, export.parity):
        assert parity
        assert [d.unjudged is None for d in parity.outputs] == [True, False]
        assert any(text.startswith("output[1] at the probe 'batch 3': a choice that rounding decides: the ") for text in parity.unjudged)


def test_each_output_that_rounding_decides_is_named() -> None:
    model = Twice(lambda m, x: (_chaos(m, x), _chaos(m, x + 1)))
    parity = normswap.verify(model, normswap.convert(model, ROWS_OF_EIGHT).model, ROWS_OF_EIGHT)
    assert parity
    for name in ("output[1][0]", "output[1][1]"):
        assert {text.partition(":")[0] for text in parity.unjudged} >= {f"{name} at the probe {probe!r}" for probe in parity.probes}


CHAOS: list[Callable[[Twice, Tensor], Tensor]] = [
    lambda m, x: _chaos(m, x) * 100,  # more than rounding can make of it
    lambda m, x: _chaos(m, x) + torch.where(x.max() > 100, 50.0, 0.0),  # at one input alone: float64 shows it
    lambda m, x: _chaos(m, x)[:, :7],
    lambda m, x: _chaos(m, x).masked_fill(x == x.max(), torch.nan),
]


@pytest.mark.parametrize("fault", CHAOS)
def test_an_output_that_rounding_decides_hides_no_other_fault(fault: Callable[[Twice, Tensor], Tensor]) -> None:
    assert not normswap.verify(Twice(_chaos), Twice(fault), ROWS_OF_EIGHT)


@pytest.mark.parametrize("fault", [*CHAOS[:2], *(pytest.param(fault, marks=pytest.mark.slow) for fault in CHAOS[2:])])
def test_nor_does_it_in_a_file(fault: Callable[[Twice, Tensor], Tensor], tmp_path: Path) -> None:
    right, faulty = Twice(_chaos), Twice(fault)
    path = normswap.export_onnx(faulty, ROWS_OF_EIGHT, tmp_path / "faulty.onnx").path
    assert not normswap.verify(right, path, ROWS_OF_EIGHT)


def test_a_fault_in_the_output_that_can_be_judged_is_found_beside_one_that_cannot() -> None:
    right, faulty = Twice(_chaos), Twice(_chaos)
    with torch.no_grad():
        faulty.linear.bias[2] += 1e-3
    parity = normswap.verify(right, faulty, ROWS_OF_EIGHT)
    assert not parity
    assert parity.first_bad is not None
    assert [d.passed for d in parity.outputs] == [False, True]
