"""NaN and infinities: folding moves none of them. What onnxruntime itself does otherwise than torch is the same without norms.

Each case is run on four samples of which one is clean and the others have a NaN, an infinity and a negative infinity in one place. Outputs
are images, so that a place that is not finite but should be (or is, and should not be) shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.onnx_skeletons import NETS, PreActivation, leaves, random_norm, with_norms, without_its_operators
from normswap.export.to_onnx import export
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.parity.probes import Probe
from normswap.parity.run_onnx import LEVELS, onnx_runner

SHAPE = (4, 3, 9, 8)
ODD = (math.nan, math.inf, -math.inf)


class Dense(nn.Module):
    """A norm and its ReLU after a concatenation, before an unpadded convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(torch.cat([x, self.first(x)], 1))))  # type: ignore[no-any-return]


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=-1.0)


class Largest(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.amax((2, 3), keepdim=True)


class Sum(nn.Module):
    """A norm after a sum of two convolutions, and before an activation that is not homogeneous."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.norm = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.norm(self.one(x) + self.other(x))) * x[:, :1]  # type: ignore[no-any-return]


def pre_activation() -> nn.Module:
    model = PreActivation()
    return nn.Sequential(model.stem, model.blocks[:1], model.norm, nn.ReLU(), nn.Conv2d(12, 5, 1))


FOLDS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "into the producer": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3)),
        {"into_producer"},
    ),
    "into the consumer": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 5, 3), nn.GELU("tanh")), {"into_consumers"}),
    "a threshold": (Dense, {"threshold"}),
    "a shift of the stream": (pre_activation, {"into_producer", "stream_shift"}),
    "into all producers": (Sum, {"into_producers"}),
    "what stays": (lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.SiLU(), nn.BatchNorm2d(5), nn.SiLU()), {""}),
}


def odd(shape: tuple[int, ...]) -> Tensor:
    """Samples of which all but the first have something in one place."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    for sample, value in zip(x[1:], ODD, strict=True):
        sample.view(-1)[sample.numel() // 2] = value
    return x


def kinds(x: Tensor) -> Tensor:
    """0 for a number, 1 and -1 for the infinities, 2 for NaN."""
    return torch.where(x.isnan(), 2.0, torch.where(x.isinf(), x.sign(), 0.0))


def outputs(model: nn.Module, path: Path, level: str, shape: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """What the file gives, and the model."""
    x = odd(shape)
    with torch.no_grad():
        want = leaves(model(x))
    return list(onnx_runner(path, level)(Probe("odd", (x,), {}))[0].values()), want


def hold(got: Tensor, want: Tensor) -> None:
    assert torch.equal(kinds(got), kinds(want))
    finite = want.isfinite()
    assert (got - want)[finite].abs().max() <= 1e-4 * want[finite].abs().max()


@pytest.mark.parametrize("case", FOLDS)
def test_no_fold_moves_them(case: str, tmp_path: Path) -> None:
    make, ways = FOLDS[case]
    torch.manual_seed(0)
    model = with_norms(make(), random_norm(signs=False))
    written = export(model, (torch.randn(2, *SHAPE[1:]),), {}, tmp_path / "m.onnx", target="cuda")
    assert {site.how for site in written.sites} == ways
    for level in LEVELS:
        got, want = outputs(model, tmp_path / "m.onnx", level, SHAPE)
        places = [int((kind != 0).sum()) for kind in kinds(want[0])]
        assert places[0] == 0
        assert all(0 < count < want[0][0].numel() for count in places[1:])
        hold(got[0], want[0])


# What follows is onnxruntime's own: the file without norms does it as well.
THEIRS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "the largest of a window ignores NaN": (lambda: nn.MaxPool2d(3, 2), math.nan),
    "the largest of an axis ignores NaN": (Largest, math.nan),
    "an infinity ends at the largest float": (Clamp, math.inf),
    "GELU of an infinity is one, not NaN": (nn.GELU, math.inf),
}
BY_CPU = {"GELU of an infinity is one, not NaN"}  # with AVX-512, and not with AVX2


@pytest.mark.parametrize("case", THEIRS)
def test_what_onnxruntime_does_otherwise_it_does_without_norms(case: str, tmp_path: Path) -> None:
    make, value = THEIRS[case]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), make())
    bare = nn.Sequential(nn.Conv2d(3, 5, 1), make()).eval()
    normed = with_norms(model, random_norm(signs=False))
    sample = 1 if math.isnan(value) else 1 + ODD.index(value)
    differs = {}
    for net, name in ((normed, "normed"), (bare, "bare")):
        export(net, (torch.randn(2, *SHAPE[1:]),), {}, tmp_path / f"{name}.onnx")
        got, want = (kinds(values[0]) for values in outputs(net, tmp_path / f"{name}.onnx", "all", SHAPE))
        differs[name] = not torch.equal(got[sample], want[sample])
        assert not got[0].any()
        assert not want[0].any()
    assert differs["normed"] == differs["bare"]
    assert differs["bare"] or case in BY_CPU


def test_a_weight_that_is_0_forgets_a_negative_infinity(tmp_path: Path) -> None:
    """relu(0 * -inf + t) is NaN, and 0 * max(-inf, 0) + relu(t) is relu(t): the one place where a fold moves anything."""
    torch.manual_seed(0)
    model = with_norms(Dense(), random_norm(signs=False))
    assert isinstance(model.norm, BatchlessNorm)
    assert model.norm.weight is not None
    with torch.no_grad():
        model.norm.weight[1] = 0
    written = export(model, (torch.randn(2, *SHAPE[1:]),), {}, tmp_path / "m.onnx", target="cuda")
    assert [site.how for site in written.sites] == ["threshold"]
    for level in LEVELS:
        got, want = (values[0] for values in outputs(model, tmp_path / "m.onnx", level, SHAPE))
        hold(got[:3], want[:3])
        differs = kinds(got[3]) != kinds(want[3])
        assert bool(differs.any())
        assert bool(want[3][differs].isnan().all())


IMAGES = [name for name, (_, shape) in NETS.items() if len(shape) == 4]


@pytest.mark.slow
@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("name", IMAGES)
def test_every_net(name: str, signs: bool, tmp_path: Path) -> None:
    """Each of their outputs sees the whole image, so what is held is that the clean sample is, and that the others are not."""
    without_its_operators()
    make, (_, *shape) = NETS[name]
    torch.manual_seed(0)
    model = with_norms(make(), random_norm(signs))
    export(model, (torch.randn(2, *shape),), {}, tmp_path / "m.onnx")
    for level in ("disabled", "all"):
        got, want = outputs(model, tmp_path / "m.onnx", level, (4, *shape))
        for a, b in zip(got, want, strict=True):
            assert bool(b[0].isfinite().all())
            assert not bool(b[1:].isfinite().any())
            hold(a, b)
