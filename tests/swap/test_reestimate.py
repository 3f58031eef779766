"""BatchNorm statistics from data: with the function kept exactly, or following the data; and the way back to a BatchNorm."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from torch import Tensor, nn
from typer.testing import CliRunner

import normswap
from fixtures.nets import case, randomise
from normswap.cli.app import app
from normswap.errors import SwapError, UsageError
from normswap.layer import formulas
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.swap.calibrate import calibrate


def _net(*, affine: bool = True, eps: float = 1e-3) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8, eps=eps, affine=affine),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 6, 3),
        nn.BatchNorm2d(6),
        nn.Flatten(),
        nn.Linear(6 * 5 * 7, 5),
    )
    return randomise(model, 0).eval()  # type: ignore[return-value]


def _data(*sizes: int, seed: int = 0) -> list[Tensor]:
    x = 2 * torch.randn(sum(sizes), 3, 9, 11, generator=torch.Generator().manual_seed(seed)) + 0.5
    return list(x.split(list(sizes)))


def _moments(model: nn.Sequential, until: int, data: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Of what the layer gets, in float64."""
    with torch.no_grad():
        x = torch.cat([model[:until](batch) for batch in data]).double()
    return x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0).sqrt()


def _norm(model: nn.Module, name: str) -> BatchlessNorm:
    layer = model.get_submodule(name)
    assert isinstance(layer, BatchlessNorm)
    return layer


# -- exact ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", ["log", "abs", "inv"])
def test_exact_has_the_statistics_of_the_data_and_the_same_function(std: str) -> None:
    model, data = _net(), _data(7, 12, 5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    conversion = normswap.convert(model, calibration=data, reestimate="exact", std=std)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert conversion.parity.passed
    assert conversion.drift is None
    assert [s.preserves for s in conversion.plan.swaps] == ["exact", "exact"]
    for name in ("1", "4"):
        mean, deviation = _moments(model, int(name), data)
        layer = _norm(conversion.model, name)
        assert torch.allclose(layer.mean.double(), mean, rtol=1e-5, atol=1e-6)
        assert torch.allclose(layer.statistics(torch.float64)[1], deviation, rtol=1e-5)
        assert not torch.allclose(layer.weight, model.get_submodule(name).weight, rtol=1e-2)  # type: ignore[arg-type]
    assert [(fit.name, fit.how, fit.stratum, fit.samples, fit.kept_channels) for fit in conversion.fits] == [
        ("1", "exact", 1, 24 * 7 * 9, 0),
        ("4", "exact", 1, 24 * 5 * 7, 0),
    ]
    assert all(fit.error < 1e-6 and fit.remarks == () for fit in conversion.fits)


def test_the_formula_with_its_signs() -> None:
    """weight' = weight s1 / s0,  bias' = bias + (m1 - m0) weight / s0, in float64."""
    generator = torch.Generator().manual_seed(0)
    m0, m1, weight, bias, x = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(5))
    s0, s1 = (torch.rand(5, generator=generator, dtype=torch.float64) + 0.2 for _ in range(2))
    weight1, bias1 = formulas.affine_under(*formulas.affine_of(m0, s0, weight, bias), m1, s1)
    assert torch.allclose(weight1, weight * s1 / s0, rtol=1e-14)
    assert torch.allclose(bias1, bias + (m1 - m0) * weight / s0, rtol=1e-13)
    assert torch.allclose(weight1 * (x - m1) / s1 + bias1, weight * (x - m0) / s0 + bias, rtol=1e-12)


def test_exact_in_float64_is_exact() -> None:
    model, data = _net().double(), [batch.double() for batch in _data(9)]
    conversion = normswap.convert(model, calibration=data, reestimate="exact")
    assert conversion.parity.max_rel < 1e-13
    x = data[0][:3]
    assert torch.allclose(conversion.model(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_exact_in_half_precision(dtype: torch.dtype) -> None:
    model, data = _net().to(dtype), [batch.to(dtype) for batch in _data(9, 6)]
    conversion = normswap.convert(model, calibration=data, reestimate="exact")
    assert {fit.how for fit in conversion.fits} == {"exact"}
    assert _norm(conversion.model, "1").mean.dtype == torch.float32


def test_any_split_of_the_data_gives_the_same_layers() -> None:
    one, many = (normswap.convert(_net(), calibration=_data(*sizes), reestimate="exact").model for sizes in ([24], [8, 8, 8]))
    uneven = normswap.convert(_net(), calibration=_data(1, 20, 3), reestimate="exact").model
    for name, tensor in one.state_dict().items():
        for other in (many, uneven):
            assert torch.allclose(tensor, other.state_dict()[name], rtol=1e-5, atol=1e-6), name


def test_a_channel_that_does_not_vary_keeps_what_it_had() -> None:
    model, data = _net(), _data(12)
    with torch.no_grad():
        model[0].weight[2] = 0  # its channel is constant
        model[0].weight[5] *= 1e-9
    conversion = normswap.convert(model, calibration=data, reestimate="exact", coupling="none")
    plain = normswap.convert(model, data[0], coupling="none")
    mine, theirs = _norm(conversion.model, "1"), _norm(plain.model, "1")
    for name, tensor in mine.named_parameters():
        other = dict(theirs.named_parameters())[name]
        assert torch.equal(tensor[[2, 5]], other[[2, 5]]), name
        assert not torch.equal(tensor[[0, 1, 3, 4, 6, 7]], other[[0, 1, 3, 4, 6, 7]])
    assert (conversion.fits[0].kept_channels, conversion.fits[0].flat_channels, conversion.fits[1].kept_channels) == (2, 2, 0)
    assert conversion.fits[0].remarks == ("2 of 8 channels do not vary, and keep the statistics they had",)


def test_without_weight_and_bias_nothing_can_take_it_up() -> None:
    conversion = normswap.convert(_net(affine=False), calibration=_data(12), reestimate="exact")
    fits = {fit.name: fit for fit in conversion.fits}
    assert fits["1"].remarks == ("keeps its statistics: has no weight and bias, which would have to make up for the new statistics",)
    assert (fits["1"].kept_channels, fits["4"].kept_channels) == (8, 0)
    assert torch.equal(_norm(conversion.model, "1").mean, _net(affine=False)[1].running_mean)  # type: ignore[arg-type]


def test_a_shared_weight_stays_as_it_is() -> None:
    model = _net()
    model.append(nn.Sequential(nn.Unflatten(1, (5, 1, 1)), nn.Conv2d(5, 8, 1), nn.BatchNorm2d(8)))
    randomise(model, 3)
    model[7][2].weight = model[1].weight
    conversion = normswap.convert(model, calibration=_data(12), reestimate="exact")
    fits = {fit.name: fit for fit in conversion.fits}
    for name in ("1", "7.2"):
        assert fits[name].remarks[0] == (
            "keeps its statistics: shares a parameter: 1.weight and 7.2.weight are one tensor, so calibration would change all"
        )
    assert fits["4"].remarks == ()


def test_a_layer_that_the_data_do_not_reach() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.aux = _net(), nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.net(x)
            return self.aux(y) if self.training else y  # type: ignore[no-any-return]

    conversion = normswap.convert(randomise(Two(), 0).eval(), calibration=_data(12), reestimate="exact")
    fits = {fit.name: fit for fit in conversion.fits}
    assert fits["aux"].remarks == ("keeps its statistics: no forward pass on the data reaches it",)
    assert fits["net.1"].remarks == ()


@pytest.mark.parametrize("name", ["called_twice", "frozen_batch_norm", "batch_norm_act", "aliased_two_parents", "root_is_norm"])
def test_exact_on_every_kind_of_place(name: str) -> None:
    model, inputs = case(name).make(), case(name).inputs()
    conversion = normswap.convert(model, inputs, calibration=[inputs], reestimate="exact")
    assert conversion.parity.passed
    assert any(fit.kept_channels < fit.channels for fit in conversion.fits)


def test_a_call_is_re_estimated_like_a_layer() -> None:
    model, inputs = case("graph_module_functional").make(), case("graph_module_functional").inputs()
    conversion = normswap.convert(model, inputs, calibration=[inputs], reestimate="exact")
    assert conversion.parity.passed
    assert conversion.fits
    assert all(fit.how == "exact" and fit.kept_channels < fit.channels for fit in conversion.fits)


# -- adapt -----------------------------------------------------------------------------------------------------------------------


def test_adapt_is_what_re_estimation_does() -> None:
    """The data again, layer by layer, through layers that have adapted: the statistics of torch's own BatchNorm with momentum None."""
    model, data = _net(), _data(24)
    conversion = normswap.convert(model, calibration=data, reestimate="adapt", approximate=True)
    oracle = _net()
    for name in (1, 4):
        mean, deviation = _moments(oracle, name, data)
        oracle[name].running_mean.copy_(mean)  # type: ignore[operator,union-attr]
        oracle[name].running_var.copy_(deviation**2)  # type: ignore[operator,union-attr]
        oracle[name].eps = 0.0
        layer = _norm(conversion.model, str(name))
        assert torch.allclose(layer.mean.double(), mean, rtol=1e-5, atol=1e-5)
        assert torch.equal(layer.weight, model[name].weight)  # type: ignore[arg-type]
        assert torch.equal(layer.bias, model[name].bias)  # type: ignore[arg-type]
    x = _data(3, seed=9)[0]
    assert torch.allclose(conversion.model(x), oracle(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(conversion.model(x), model(x), rtol=1e-1, atol=1e-1)
    assert [(fit.how, fit.stratum) for fit in conversion.fits] == [("adapt", 1), ("adapt", 2)]


def test_adapt_reports_the_drift_and_promises_nothing_exact() -> None:
    conversion = normswap.convert(_net(), calibration=_data(24), reestimate="adapt", approximate=True)
    assert conversion.drift is not None
    assert conversion.drift.max_rel > 0.05
    assert conversion.parity.passed  # of the swaps, before the statistics moved
    assert [s.preserves for s in conversion.plan.swaps] == ["approximate", "approximate"]
    with pytest.raises(normswap.ParityError):
        normswap.convert(_net(), calibration=_data(24), reestimate="adapt", max_drift=1e-3)


def test_adapt_to_its_own_statistics_changes_little() -> None:
    """Must not drift: the data on which the statistics were measured."""
    model, data = _net(), _data(24)
    for name in (1, 4):
        mean, deviation = _moments(model, name, data)
        model[name].running_mean.copy_(mean)  # type: ignore[operator,union-attr]
        model[name].running_var.copy_(deviation**2 - model[name].eps)  # type: ignore[operator,union-attr]
    conversion = normswap.convert(model, calibration=data, reestimate="adapt", max_drift=1e-5)
    assert conversion.drift is not None
    assert all(fit.error < 1e-5 for fit in conversion.fits)


def test_adapt_needs_no_weight() -> None:
    conversion = normswap.convert(_net(affine=False), calibration=_data(24), reestimate="adapt", approximate=True)
    assert [fit.kept_channels for fit in conversion.fits] == [0, 0]


# -- together with approximate swaps -----------------------------------------------------------------------------------------


def test_exact_beside_an_approximate_swap() -> None:
    """The BatchNorm after a swapped GroupNorm gets the statistics of what it sees now, and stays the map that it was."""

    def build() -> nn.Sequential:
        torch.manual_seed(2)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6))
        return randomise(model, 0).eval()  # type: ignore[return-value]

    data = _data(24)
    mixed = normswap.convert(build(), calibration=data, approximate=True, reestimate="exact")
    plain = normswap.convert(build(), calibration=data, approximate=True)
    assert torch.allclose(mixed.model(data[0]), plain.model(data[0]), rtol=1e-4, atol=1e-5)
    mean, deviation = _moments(plain.model, 4, data)
    layer = _norm(mixed.model, "4")
    assert torch.allclose(layer.mean.double(), mean, rtol=1e-4, atol=1e-5)
    assert torch.allclose(layer.statistics(torch.float64)[1], deviation, rtol=1e-4)
    assert {fit.name: fit.how for fit in mixed.fits} == {"1": "fit", "4": "exact"}
    assert [s.preserves for s in mixed.plan.swaps] == ["approximate", "exact"]


# -- and back --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"reestimate": "exact"}, {"reestimate": "adapt", "approximate": True}], ids=["exact", "adapt"])
@pytest.mark.parametrize("std", ["log", "abs", "inv"])
def test_revert_is_the_converted_function(options: dict[str, Any], std: str) -> None:
    model, data = _net(), _data(12)
    with torch.no_grad():
        model[0].weight[2] = 0
    conversion = normswap.convert(model, calibration=data, std=std, **options)
    back = normswap.revert(conversion.model)
    assert normswap.verify(conversion.model, back, data[0])
    layer, norm = _norm(conversion.model, "1"), back[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.eps == 1e-3
    _, deviation = layer.statistics(torch.float64)
    varying = [0, 1, 3, 4, 5, 6, 7]
    assert torch.equal(norm.running_mean, layer.mean)  # type: ignore[arg-type]
    assert torch.allclose(norm.running_var.double()[varying], (deviation**2 - 1e-3)[varying], rtol=1e-6)  # type: ignore[union-attr]
    assert torch.equal(norm.running_var[2], model[1].running_var[2])  # type: ignore[index]
    assert torch.equal(norm.weight, layer.weight)  # type: ignore[arg-type]
    assert torch.equal(norm.bias, layer.bias)  # type: ignore[arg-type]


def test_revert_where_the_data_vary_less_than_eps() -> None:
    model, data = _net(eps=0.5), [1e-2 * batch for batch in _data(12)]
    conversion = normswap.convert(model, calibration=data, reestimate="exact")
    back = normswap.revert(conversion.model)
    assert back[1].eps == 0.0
    assert bool((back[1].running_var > 0).all())
    assert normswap.verify(conversion.model, back, data[0])


@pytest.mark.parametrize("options", [{"reestimate": "exact"}, {"reestimate": "adapt", "approximate": True}], ids=["exact", "adapt"])
def test_save_load_revert_export(options: dict[str, Any], tmp_path: Path) -> None:
    conversion = normswap.convert(_net(), calibration=_data(12), **options)
    loaded = normswap.load(normswap.save(conversion, tmp_path / "saved"), _net)
    x = _data(3, seed=4)[0]
    assert isinstance(loaded, nn.Module)
    assert torch.equal(loaded(x), conversion.model(x))
    assert normswap.verify(conversion.model, normswap.revert(loaded), x)
    assert normswap.export_onnx(conversion, path=tmp_path / "m.onnx").residue == ()


# -- what cannot be asked for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reestimate": "exact"}, "statistics are re-estimated from data, and none were given"),
        ({"reestimate": "adapt", "approximate": True}, "statistics are re-estimated from data, and none were given"),
        ({"reestimate": "adapt", "calibration": _data(2)}, "layers that adapt to the data compute something else than the original"),
        ({"reestimate": "keep", "calibration": _data(2)}, "reestimate is 'keep'; expected one of 'exact', 'adapt'"),
    ],
)
def test_what_cannot_be_asked_for(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        normswap.convert(_net(), **options)


def test_data_alone_re_estimate_nothing() -> None:
    conversion = normswap.convert(_net(), calibration=_data(12))
    assert conversion.fits == ()
    assert torch.equal(_norm(conversion.model, "1").mean, _net()[1].running_mean)  # type: ignore[arg-type]


# -- calibration itself: what readers of an output do to it is not the layer's --------------------------------------------


class Parallel(nn.Module):
    """Two norms of one stratum; whoever reads the first one's output works in place."""

    def __init__(self, norm: Callable[[], nn.Module], inplace: bool) -> None:
        super().__init__()
        self.a, self.left, self.right = nn.Conv2d(3, 6, 1), norm(), norm()
        self.act = nn.ReLU(inplace)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.act(self.left(y)) + self.right(y)  # type: ignore[no-any-return]


def test_an_activation_in_place_does_not_spoil_the_fit() -> None:
    models = []
    for inplace in (False, True):
        torch.manual_seed(0)
        models.append(randomise(Parallel(lambda: nn.GroupNorm(2, 6), inplace), 0).eval())
    fits = [normswap.convert(model, calibration=_data(16), approximate=True).fits for model in models]
    assert fits[0] == fits[1]


@pytest.mark.parametrize("inplace", [False, True])
def test_a_layer_with_its_own_activation_is_fitted_before_it(inplace: bool) -> None:
    from timm.layers import GroupNormAct

    torch.manual_seed(0)
    layer = GroupNormAct(6, 2, inplace=inplace)
    acted = randomise(nn.Sequential(nn.Conv2d(3, 6, 1), layer), 0).eval()
    plain = nn.Sequential(acted[0], nn.GroupNorm(2, 6)).eval()
    plain[1].load_state_dict(layer.state_dict())
    with torch.no_grad():
        first = normswap.convert(acted, calibration=_data(16), approximate=True)
        second = normswap.convert(plain, calibration=_data(16), approximate=True)
    assert first.fits[0].error == pytest.approx(second.fits[0].error, rel=1e-5)
    assert torch.allclose(_norm(first.model, "1").weight, _norm(second.model, "1").weight, rtol=1e-5)  # type: ignore[arg-type]


def test_two_layers_that_share_a_weight_cannot_both_be_fitted() -> None:
    model = randomise(Parallel(lambda: nn.GroupNorm(2, 6), False), 0).eval()
    swapped = normswap.convert(model, calibration=_data(16), approximate=True).model
    swapped.right.weight = swapped.left.weight
    with pytest.raises(UsageError, match=r"^left shares a parameter: left.weight and right.weight are one"):
        calibrate(swapped, copy.deepcopy(model), ["left", "right"], _data(16))


# -- the command -----------------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def files(tmp_path: Path) -> Path:
    torch.save(_net(), tmp_path / "net.pt")
    torch.save(_data(12)[0], tmp_path / "data.pt")
    return tmp_path


def test_the_command(files: Path) -> None:
    given = ["convert", files / "net.pt", "--data", files / "data.pt"]
    result = run(*given, "--reestimate", "exact", "-o", files / "exact", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    assert [(fit["name"], fit["how"]) for fit in report["calibration"]] == [("1", "exact"), ("4", "exact")]
    assert "drift" not in report["parities"]
    assert run("verify", files / "net.pt", files / "exact").exit_code == 0
    assert run("revert", files / "exact", "-o", files / "back.pt").exit_code == 0
    assert run("verify", files / "net.pt", files / "back.pt", "--input", "2x3x9x11").exit_code == 0

    result = run(*given, "--reestimate", "adapt", "--approximate", "-o", files / "adapt", "--no-onnx", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    assert [s["preserves"] for s in report["plan"]["swaps"]] == ["approximate", "approximate"]
    assert report["parities"]["drift"]["max_rel"] > 0.05
    assert run("verify", files / "net.pt", files / "adapt").exit_code == 3
    assert run("revert", files / "adapt", "-o", files / "adapted.pt").exit_code == 0
    assert run("verify", files / "adapt", files / "adapted.pt").exit_code == 0


def test_the_command_refuses(files: Path) -> None:
    before = sorted(files.iterdir())
    for options, message in (
        (["--reestimate", "adapt", "--data", files / "data.pt"], "error: layers that adapt to the data compute something else"),
        (["--reestimate", "exact"], "error: statistics are re-estimated from data, and none were given"),
    ):
        result = run("convert", files / "net.pt", *options, "-o", files / "out")
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith(message)
    assert sorted(files.iterdir()) == before


def test_max_drift_holds_adaptation(files: Path) -> None:
    given = ["convert", files / "net.pt", "--data", files / "data.pt", "--reestimate", "adapt", "--max-drift", 1e-4, "-o", files / "out"]
    assert run(*given).exit_code == 3
    assert sorted(path.name for path in (files / "out").iterdir()) == ["report.html", "report.json"]
    assert math.isfinite(json.loads((files / "out" / "report.json").read_text())["parities"]["drift"]["max_rel"])


def test_layers_from_data_have_no_way_back_beside_re_estimated_ones() -> None:
    model = nn.Sequential(*_net()[:5], nn.GroupNorm(3, 6)).eval()
    conversion = normswap.convert(model, calibration=_data(12), approximate=True, reestimate="exact")
    with pytest.raises(SwapError, match=r"^5 cannot be reverted"):
        normswap.revert(conversion.model)
    assert isinstance(normswap.revert(conversion.model, skip=True)[1], nn.BatchNorm2d)
