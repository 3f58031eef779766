"""Approximate swaps: statistics from data, stratum by stratum, and the promise that goes with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from fixtures.nets import randomise
from normswap.cli.convert import ConvertOptions, convert_to_directory
from normswap.errors import UsageError
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.parity.result import ParityError


def _net() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 7, 3),
        nn.BatchNorm2d(7),
        nn.ReLU(),
        nn.Conv2d(7, 6, 3),
        nn.InstanceNorm2d(6, affine=True, eps=1e-2),
        nn.Flatten(),
        nn.Linear(6 * 4 * 5, 9),
        nn.LayerNorm(9),
        nn.Linear(9, 4),
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.kaiming_normal_(parameter)
    randomise(model, 0).eval()
    return model


def _data(*sizes: int, seed: int = 0) -> list[Tensor]:
    x = torch.randn(sum(sizes), 3, 10, 11, generator=torch.Generator().manual_seed(seed))
    return list(x.split(list(sizes)))


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.double() for n, p in model.named_parameters() if n.partition(".")[0] in ("1", "7", "10")}


def test_only_exact_swaps_are_made_unasked() -> None:
    conversion = normswap.convert(_net(), calibration=_data(8))
    assert [s.name for s in conversion.plan.swaps] == ["4"]
    assert [s.kind for s in conversion.plan.skips] == ["group_norm", "instance_norm", "layer_norm"]
    assert all("from the calibration data that you gave, with approximate=True (--approximate)" in s.reason for s in conversion.plan.skips)
    unfed = normswap.plan(_net())
    assert all(s.reason.endswith("with approximate=True and calibration=... (--approximate, --data)") for s in unfed.skips)
    assert conversion.drift is None


def test_all_are_swapped_when_asked_and_the_distance_is_told() -> None:
    model = _net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    conversion = normswap.convert(model, calibration=_data(64), approximate=True)
    assert [(s.name, s.preserves) for s in conversion.plan.swaps] == [
        ("1", "approximate"),
        ("4", "exact"),
        ("7", "approximate"),
        ("10", "approximate"),
    ]
    assert [(fit.name, fit.stratum) for fit in conversion.fits] == [("1", 1), ("7", 2), ("10", 3)]
    for fit in conversion.fits:
        assert sum(fit.histogram[8:24]) > 0.8 * sum(fit.histogram) > 0  # most within 2 standard deviations
    assert all(0 < fit.error < 0.5 for fit in conversion.fits)
    assert conversion.parity
    assert conversion.drift is not None
    assert 1e-3 < conversion.drift.max_rel < 1
    assert not any(isinstance(m, (nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d)) for m in conversion.model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_drift_above_the_limit_is_a_parity_error() -> None:
    drift = normswap.convert(_net(), calibration=_data(64), max_drift=10.0).drift
    assert drift is not None
    with pytest.raises(ParityError, match="is approximate, and further from the original than max_drift") as raised:
        normswap.convert(_net(), calibration=_data(64), max_drift=drift.max_rel / 2)
    assert str(raised.value.hint).startswith("allow more, calibrate on more or other data, or exclude the layers")


def test_batches_of_any_size_give_the_same_layers() -> None:
    """One batch of 64, eight of 8, and unequal ones: the same statistics, to 1e-6."""
    layers = [
        _statistics(normswap.convert(_net().double(), calibration=[b.double() for b in _data(*sizes)], approximate=True).model)
        for sizes in ((64,), (8,) * 8, (1, 40, 3, 20))
    ]
    for other in layers[1:]:
        for name, value in other.items():
            assert torch.allclose(value, layers[0][name], rtol=1e-6, atol=1e-9), name


def test_the_first_layer_has_the_statistics_of_its_input() -> None:
    model, data = _net(), torch.cat(_data(33))
    layer = normswap.convert(model, calibration=[data], approximate=True).model[1]
    assert isinstance(layer, BatchlessNorm)
    with torch.no_grad():
        x = model[0](data).double().movedim(1, -1).reshape(-1, 8)
        y = model[:2](data).double().movedim(1, -1).reshape(-1, 8)
    assert torch.allclose(layer.mean.double(), x.mean(0), rtol=1e-5, atol=1e-6)
    assert torch.allclose(layer.statistics()[1].double(), x.std(0, correction=0), rtol=1e-5)
    z = (x - x.mean(0)) / x.std(0, correction=0)
    assert layer.weight is not None
    assert layer.bias is not None
    assert torch.allclose(layer.weight.double(), (z * y).mean(0), rtol=1e-4, atol=1e-6)
    assert torch.allclose(layer.bias.double(), y.mean(0), rtol=1e-4, atol=1e-6)


class Parallel(nn.Module):
    """Two norms that do not see each other, and one after both; a residual around everything."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.after = nn.LayerNorm(6), nn.LayerNorm(6), nn.LayerNorm(6)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.after(self.left(self.a(x)) * self.right(self.b(x)).sigmoid())  # type: ignore[no-any-return]


def test_layers_that_do_not_feed_each_other_share_a_stratum() -> None:
    model, forwards = randomise(Parallel(), 0).eval(), []
    conversion = normswap.convert(model, calibration=[torch.randn(16, 5, 6)], approximate=True)
    assert {fit.name: fit.stratum for fit in conversion.fits} == {"left": 1, "right": 1, "after": 2}
    del forwards


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(50, 8), nn.LayerNorm(8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.norm(self.embed(input_ids))  # type: ignore[no-any-return]


def test_padding_does_not_count() -> None:
    model = randomise(Tokens(), 0).eval()
    ids = torch.randint(1, 50, (9, 7))
    mask = (torch.arange(7) < torch.randint(2, 7, (9, 1))).long()
    padded = normswap.convert(model, calibration=[{"input_ids": ids * mask, "attention_mask": mask}], approximate=True)
    alone = normswap.convert(model, calibration=[{"input_ids": ids[mask.bool()][None]}], approximate=True)
    assert padded.fits[0].samples == int(mask.sum())
    assert torch.allclose(padded.model.norm.mean, alone.model.norm.mean, atol=1e-6)  # type: ignore[union-attr]
    unmasked = normswap.convert(model, calibration=[{"input_ids": ids * mask}], approximate=True)
    assert not torch.allclose(unmasked.model.norm.mean, alone.model.norm.mean, atol=1e-3)  # type: ignore[union-attr]


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, torch.zeros(len(x))), lambda x: [x, 3]], ids=["tensor", "pair", "list"])
def test_batches_as_data_sets_yield_them(wrap: Any) -> None:
    """(input, label): what the model does not take is not passed."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = _net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)  # type: ignore[no-any-return]

    assert normswap.convert(One().eval(), calibration=[wrap(b) for b in _data(8)], approximate=True).fits


def test_a_generator_may_be_given() -> None:
    assert normswap.convert(_net(), calibration=(b for b in _data(8, 8)), approximate=True).fits[0].samples == 16 * 8 * 9


def test_a_norm_without_running_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, track_running_stats=False)).eval()
    conversion = normswap.convert(model, calibration=_data(32), approximate=True)
    # the whole data is one batch, so the fit is BatchNorm's own map
    assert conversion.fits[0].error < 1e-4


def test_a_tracked_instance_norm_is_exact() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 5, 3), nn.InstanceNorm2d(5, affine=True, track_running_stats=True)), 0).eval()
    conversion = normswap.convert(model, torch.randn(2, 3, 9, 8))
    assert [(s.kind, s.preserves) for s in conversion.plan.swaps] == [("instance_norm", "exact")]
    assert torch.equal(normswap.revert(conversion.model)[1].running_var, model[1].running_var)  # type: ignore[index,arg-type]


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (None, "an approximate swap starts from data, and none were given"),
        ([], "the calibration data hold no batch"),
        ([torch.randn(2, 4, 9, 9)], "cannot run on the example inputs"),
    ],
)
def test_what_cannot_be_calibrated(calibration: Sequence[Tensor] | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        normswap.convert(_net(), calibration=calibration, approximate=True)


def test_save_load_export_and_no_way_back(tmp_path: Path) -> None:
    conversion = normswap.convert(_net(), calibration=_data(16), approximate=True)
    loaded = normswap.load(normswap.save(conversion, tmp_path / "saved"), _net)
    x = _data(5, seed=1)[0]
    assert isinstance(loaded, nn.Module)
    assert torch.equal(loaded(x), conversion.model(x))
    assert normswap.export_onnx(conversion, path=tmp_path / "m.onnx").parity
    with pytest.raises(normswap.NormswapError, match="1, 7, 10 cannot be reverted"):
        normswap.revert(conversion.model)
    assert isinstance(normswap.revert(conversion.model, skip=True)[4], nn.BatchNorm2d)


def test_the_command(tmp_path: Path) -> None:
    torch.save(_net(), tmp_path / "net.pt")
    (tmp_path / "data").mkdir()
    for i, batch in enumerate(_data(6, 5)):
        torch.save(batch, tmp_path / "data" / f"{i}.pt")
    report, directory = convert_to_directory(
        str(tmp_path / "net.pt"), tmp_path / "out", ConvertOptions(data=str(tmp_path / "data"), approximate=True)
    )
    assert [fit["name"] for fit in report.json()["calibration"]] == ["1", "7", "10"]
    assert list(report.parities)[:2] == ["torch", "drift"]
    assert math.isinf(report.parities["drift"].outputs[0].tolerance)
    assert report.verdict.startswith("approximate: outputs moved by ")
    assert (directory / "model.onnx").exists()
    strict = ConvertOptions(data=str(tmp_path / "data"), max_drift=1e-6, onnx=False)
    with pytest.raises(ParityError):
        convert_to_directory(str(tmp_path / "net.pt"), tmp_path / "strict", strict)
    assert sorted(p.name for p in (tmp_path / "strict").iterdir()) == ["report.html", "report.json"]
    assert ">approximate, and too far from the original: outputs moved by " in (tmp_path / "strict/report.html").read_text()
    with pytest.raises(UsageError, match="is no file, no directory and no package"):
        convert_to_directory(str(tmp_path / "net.pt"), tmp_path / "out2", ConvertOptions(data="nowhere", approximate=True))


# -- what of it is bad, in words ----------------------------------------------------------------------------------------------


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def _remarks(x: Tensor) -> tuple[str, ...]:
    (fit,) = normswap.convert(randomise(Sequences(), 0).eval(), calibration=[x], approximate=True).fits
    return fit.remarks


def _even() -> Tensor:
    """Every token of the same size, around 0: there a fixed mean and std do what LayerNorm does."""
    x = torch.randn(64, 9, 8, generator=torch.Generator().manual_seed(0))
    x = x - x.mean(-1, keepdim=True)
    return x / x.square().mean(-1, keepdim=True).sqrt()


def test_good_data_have_no_remark() -> None:
    assert _remarks(_even()) == ()
    assert _remarks(torch.randn(64, 9, 8, generator=torch.Generator().manual_seed(0))) == ()


def test_what_is_bad_is_said() -> None:
    x = _even()
    first = x.clone()
    first[:, 0] *= 12
    assert "position 0 of the sequence is an outlier, 12 times as large as the others" in _remarks(first)
    sizes = x * torch.logspace(-2, 2, 64)[:, None, None]  # of very different size: no fixed std can do
    assert any(remark.startswith("its output is ") and remark.endswith("% away from the original layer's") for remark in _remarks(sizes))
    constant = x.clone()
    constant[..., [1, 4]] = 0.5
    assert "2 of 8 channels do not vary" in _remarks(constant)
    outlier = x.clone()
    outlier[3, 5, 2] = 40
    assert any(remark.startswith("a few outliers make up the variance of a channel (kurtosis ") for remark in _remarks(outlier))
    assert "its statistics rest on 45 values per channel" in _remarks(x[:5])


def test_the_command_shows_it(tmp_path: Path) -> None:
    from click.testing import Result
    from typer.testing import CliRunner

    from normswap.cli.app import app

    torch.save(_net(), tmp_path / "net.pt")
    torch.save(_data(6)[0], tmp_path / "data.pt")
    arguments = ["convert", tmp_path / "net.pt", "--data", tmp_path / "data.pt", "--approximate", "--no-onnx", "-o", tmp_path / "out"]
    result: Result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.stderr
    assert "position 0" in result.stdout
    assert "its statistics rest on 6 values per channel" in result.stdout
    assert "its statistics rest on 6 values per channel" in (tmp_path / "out" / "report.html").read_text()
    exact: Result = CliRunner().invoke(app, [str(a) for a in (*arguments[:4], "--no-onnx", "-o", tmp_path / "exact")])
    assert exact.exit_code == 0
    assert "position 0" not in exact.stdout


def test_an_activation_of_any_customary_name_is_left_out_of_the_fit() -> None:
    """timm calls it `act`, transformers `activation`: the same layer, so the same fit, to what is in front of the activation."""
    from timm.layers.norm_act import GroupNormAct
    from transformers.models.bit.modeling_bit import BitConfig, BitGroupNormActivation

    found = []
    for layer in (GroupNormAct(8, num_groups=2), BitGroupNormActivation(BitConfig(num_groups=2), 8)):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), layer)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            nn.init.normal_(model[0].weight)
        randomise(model, 0).eval()
        conversion = normswap.convert(model, calibration=_data(16), approximate=True)
        found.append((conversion.fits[0].error, conversion.model[1].weight, conversion.model[1].bias))
    assert found[0][0] == pytest.approx(found[1][0])
    torch.testing.assert_close(found[0][1:], found[1][1:])
