"""What the truth is, and probes at which there is none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import LARGER, ROWS, Linear, Net, Raises, Saturates, X, compared, onnx_file, verify
from onnx import TensorProto
from torch import Tensor, nn

import normswap
from fixtures.nets import randomise
from normswap.errors import UsageError
from normswap.parity.judge import compare, judge
from normswap.parity.limits import FLOOR
from normswap.parity.reference import Key


@pytest.mark.parametrize(
    "asks",
    [
        lambda m, y: y / 3,
        lambda m, y: (y.float() / 3).float(),
        lambda m, y: (y / 3).to(torch.float32),
        lambda m, y: torch.mul(y.half(), torch.ones((), dtype=torch.float32) / 3),
        lambda m, y: torch.cat([y.type(torch.float32)[:, :3] / 3, y.to(dtype=torch.float32)[:, 3:] / 3], 1),
    ],
)
def test_the_judge_is_the_reference_in_float64(asks: Callable[[Any, Tensor], Any]) -> None:
    """Also if its code asks for float32 by name."""
    judgement = judge(Net(asks), (X,), {})
    truth = judgement.truths[Key("example", "output")].value
    expected = Net(lambda m, y: y / 3).double().eval()(X.double())
    assert truth.dtype == torch.float64
    torch.testing.assert_close(truth, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    "norm",
    [
        nn.RMSNorm(6),
        nn.RMSNorm(6, elementwise_affine=False),
        lambda x: nn.functional.rms_norm(x, (6,)),
        lambda x: torch.rms_norm(x, [6], eps=None),
        lambda x: torch.ops.aten.rms_norm.default(x, [6]),
    ],
)
def test_an_eps_that_torch_takes_from_the_dtype_is_the_models(norm: Callable[[Tensor], Tensor]) -> None:
    """RMSNorm without an eps takes the machine epsilon of its input: in float64 that would be another function, for small inputs."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = copy.deepcopy(norm)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)

    x = torch.randn(5, 6) * 1e-4
    for dtype, eps in ((torch.float32, 2.0**-23), (torch.float64, 2.0**-52)):
        wide = x.to(dtype).double()
        truth = judge(Normed().to(dtype), (x.to(dtype),), {}).truths[Key("example", "output")]
        expected = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
        torch.testing.assert_close(truth.value, expected, rtol=1e-12, atol=0)
        assert truth.noise < 1e-6


def test_an_eps_that_is_given_stays() -> None:
    class Normed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.rms_norm(x, (6,), eps=0.5)

    x = torch.randn(5, 6)
    truth = judge(Normed(), (x,), {}).truths[Key("example", "output")].value
    torch.testing.assert_close(truth, x.double() / (x.double().square().mean(-1, keepdim=True) + 0.5).sqrt(), rtol=1e-12, atol=0)


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, 60) * 2


def test_a_probe_that_the_reference_refuses_is_dropped_and_named() -> None:
    parity = compared(FixedBatch())
    assert parity
    assert parity.probes == ("example",)
    assert [text.partition(":")[0] for text in parity.dropped] == ["batch 1", "batch 3", "batch 1 x 0.001", "batch 1 x 1000"]
    assert all("RuntimeError: shape '[2, 60]' is invalid" in text for text in parity.dropped)
    assert parity.forward_passes == 4


def test_a_reference_that_cannot_run_on_the_example() -> None:
    with pytest.raises(UsageError, match=r"^the model cannot run on the example inputs: RuntimeError: no batch of 2") as error:
        compared(Raises())
    assert error.value.hint is not None
    assert "--input" in error.value.hint


class OnlyFloat32(nn.Module):
    """Stands for a layer with kernels of its own, as quantised ones are: float64 is refused."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is not torch.float32:
            raise RuntimeError("only float32")
        return x * self.factor


def test_a_reference_that_cannot_run_in_float64_is_judged_in_its_own_dtype() -> None:
    parity = compared(OnlyFloat32(), OnlyFloat32())
    assert parity
    assert parity.max_rel == 0
    assert parity.outputs[0].tolerance == FLOOR[torch.float32]
    assert parity.dropped == ("float64, so judged in its own dtype: RuntimeError: only float32",)
    assert not compared(OnlyFloat32(), OnlyFloat32(1 + 1e-5))


class ByPrecision(nn.Module):
    """Returns another shape in float64, at the given batch."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch

    def forward(self, x: Tensor) -> Tensor:
        third = torch.tensor(1.0).to(x) / 3
        return x[:, :1] if len(x) == self.batch and third.double() == 1 / 3 else x


@pytest.mark.parametrize("batch", [2, 3])
def test_shapes_that_depend_on_rounding_are_named_and_float64_decides(batch: int) -> None:
    parity = compared(ByPrecision(batch))
    assert parity
    probe = {2: "example", 3: "batch 3"}[batch]
    assert parity.unjudged == (
        f"output at the probe {probe!r}: its shape is ({batch}, 1, 5, 4) in float64 and ({batch}, 3, 5, 4) in the model's own dtype",
    )
    assert not compared(ByPrecision(batch), ByPrecision(1))


def test_an_onnx_reference_is_judged_in_float64(tmp_path: Path) -> None:
    path = onnx_file(tmp_path / "a.onnx")
    judgement = judge(path, (ROWS,), {})
    truth = judgement.truths[Key("example", "#0")].value
    weight = torch.arange(6).view(3, 2).sub(2).div(7).double()
    torch.testing.assert_close(truth, ROWS.double() @ weight * 2 + 1, rtol=1e-15, atol=1e-15)
    assert judgement.truths[Key("example", "#0")].dtype == torch.float32
    assert judgement.precision.dtype == torch.float32
    for candidate in (path, Linear()):
        assert compare(judgement, candidate)
    for other in (onnx_file(tmp_path / "b.onnx", gain=2.002), Linear(2.002)):
        assert not compare(judgement, other)


def test_a_half_precision_onnx_reference_has_the_limits_of_float16(tmp_path: Path) -> None:
    path = onnx_file(tmp_path / "a.onnx", dtype=TensorProto.FLOAT16)
    assert verify(path, path, (ROWS,), {})
    assert judge(path, (ROWS,), {}).precision.dtype == torch.float16


def test_what_is_left_at_large_inputs_is_held_to_what_the_output_reaches(tmp_path: Path) -> None:
    conversion = normswap.convert(randomise(Saturates(), 2).eval(), LARGER)
    export = normswap.export_onnx(conversion, path=tmp_path / "m.onnx")
    assert export.parity is not None
    assert export.parity
    judgement = conversion.judgement
    large, example = (judgement.truths[Key(name, "output")] for name in ("batch 1 x 1000", "example"))
    assert float(large.value.max()) < 1e-6
    assert large.scale_floor == pytest.approx(
        1e-3 * max(float(judgement.truths[Key(p, "output")].value.max()) for p in ("example", "batch 1", "batch 3"))
    )
    assert large.scale_floor <= example.scale_floor
