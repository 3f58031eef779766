"""The trend taken out of the gradient: in the long run the gradient of BatchNorm, and in every single step one without a batch."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.errors import UsageError
from normswap.layer import gradient_trend
from normswap.layer.batchless_norm import BatchlessNorm

F64 = torch.float64
X = torch.randn(6, 2, 7, 5, generator=torch.Generator().manual_seed(1), dtype=F64) + 0.4


def with_trend(*sizes: int, **options: Any) -> BatchlessNorm:
    """A layer of its own, with a trend."""
    torch.manual_seed(0)
    layer = BatchlessNorm(sizes if len(sizes) > 1 else sizes[0], aux="auto", dtype=F64, **options)
    layer.enable_trend()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.3, 1.2)
    return layer


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def written_down(layer: BatchlessNorm, x: Tensor, task: Tensor, counted: Tensor) -> dict[str, Tensor]:
    """The gradients by the formulas. counted: (N, *space), 1 or 0."""
    by: dict[str, Tensor] = {}
    channels = [axis % x.dim() for axis in layer.channel_axis]
    wide, narrow = ([size if axis in channels else 1 for axis, size in enumerate(x.shape)] for _ in range(2))
    for axis in layer.shared_axes:
        narrow[axis % x.dim()] = 1
    mean, std = (t.detach().view(narrow) for t in layer.statistics())
    weight = torch.ones(wide, dtype=F64) if layer.weight is None else layer.weight.detach().view(wide)
    z, g = (x.detach() - mean) / std, task * weight
    n = counted.expand(x.shape).sum() / mean.numel()
    axes = [axis for axis, size in enumerate(narrow) if size == 1]
    slope, level = (t.view(narrow) / n for t in layer.trend.detach())
    term = (slope * z + level) * counted
    by["input"] = (g - term) / std
    by["trend"] = -torch.stack([((g - term) * factor).sum(axes).view(layer.mean.shape) for factor in (z, torch.ones_like(z))])
    if layer.weight is not None:
        outside = [axis for axis in range(x.dim()) if axis not in channels]
        by["weight"], by["bias"] = (task * z).sum(outside), task.sum(outside)
    return by


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"std": "abs"}, {"reduction": "sum"}, {"stats": "raw"}])
@pytest.mark.parametrize(
    ("shape", "sizes", "axes"),
    [
        ((24, 7), (7,), {}),
        ((3, 7, 5), (7,), {}),
        ((3, 5, 7), (7,), {"channel_axis": -1}),
        ((4, 2, 3, 5), (2, 5), {"channel_axis": (1, 3)}),
        ((4, 2, 3, 5), (2, 5), {"channel_axis": (1, 3), "shared_axes": (3,)}),
    ],
)
def test_the_gradient_is_that_of_the_formulas(shape: tuple[int, ...], sizes: tuple[int, ...], axes: Any, options: Any) -> None:
    layer = with_trend(*sizes, **axes, **options)
    x = torch.randn(shape, dtype=F64).requires_grad_()
    task = torch.randn(shape, dtype=F64)
    plain = copy.deepcopy(layer)
    plain.disable_trend()
    y = layer(x)
    close(y, plain(x))
    (y * task).sum().backward()
    expected = written_down(layer, x, task, torch.ones((), dtype=F64))
    assert x.grad is not None
    close(x.grad, expected.pop("input"))
    for name, value in expected.items():
        close(layer.get_parameter(name).grad, value)  # type: ignore[arg-type]
    (plain(x.detach()) * task).sum().backward()
    for name in ("mean", *(name for name in layer._parameters if name.endswith("std"))):
        close(layer.get_parameter(name).grad, plain.get_parameter(name).grad)  # type: ignore[arg-type]


def test_masked() -> None:
    layer, mask = with_trend(2), torch.rand(6, 7, 5, generator=torch.Generator().manual_seed(2)) < 0.6
    x, task = X.clone().requires_grad_(), torch.randn(X.shape, dtype=F64)
    with normswap.masked(layer, mask):
        (layer(x) * task * mask[:, None]).sum().backward()
    expected = written_down(layer, x, task * mask[:, None], mask[:, None].to(F64))
    close(x.grad, expected["input"])  # type: ignore[arg-type]
    close(layer.trend.grad, expected["trend"])  # type: ignore[arg-type]
    layer.zero_grad()
    spoilt = X.masked_fill(~mask[:, None], math.nan).requires_grad_()
    with normswap.masked(layer, mask):
        layer(spoilt)[mask[:, None].expand_as(X)].sum().backward()
    assert spoilt.grad is not None
    assert not spoilt.grad.isnan().any()


def test_in_the_long_run_it_is_the_gradient_of_batch_norm() -> None:
    """On one batch, with statistics that fit it: to all digits."""
    layer, norm = with_trend(2), nn.BatchNorm2d(2, eps=1e-12).to(F64)
    with torch.no_grad():
        layer.set_statistics(X.mean((0, 2, 3)), X.var((0, 2, 3), unbiased=False).sqrt())
        norm.weight.copy_(layer.weight)  # type: ignore[arg-type]
        norm.bias.copy_(layer.bias)  # type: ignore[arg-type]
    task, x, other = torch.randn(X.shape, dtype=F64), X.clone().requires_grad_(), X.clone().requires_grad_()
    step = torch.optim.SGD(normswap.param_groups(layer, lr=0.0))
    (norm(other) * task).sum().backward()
    assert other.grad is not None
    for done in range(300):
        x.grad = None
        step.zero_grad()
        (layer(x) * task).sum().backward()
        step.step()
        assert x.grad is not None
        if done == 0:
            assert (x.grad - other.grad).abs().max() > 0.05
    close(x.grad, other.grad, 1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("far", [1.0, 5.0, 40.0])
def test_it_is_stable_where_the_statistics_lag(far: float) -> None:
    """<z^2> up to 1600: without the division it is multiplied by 1 - .1 * 1600 in each step."""
    layer = with_trend(2)
    layer.set_statistics(X.mean((0, 2, 3)), X.var((0, 2, 3), unbiased=False).sqrt() / far)
    layer.momentum = 0.0
    task = torch.randn(X.shape, dtype=F64)
    step = torch.optim.SGD(normswap.param_groups(layer, lr=0.0))
    left = []
    for _ in range(200):
        step.zero_grad()
        (layer(X) * task).sum().backward()
        step.step()
        left.append(float(layer.trend.grad.abs().max()))  # type: ignore[union-attr]
    assert left[-1] < 1e-6 * left[0]


BY, SQUARE = torch.tensor([[3.0, 4.0, -7.0], [5.0, 6.0, 0.5]], dtype=F64), torch.tensor([0.5, 8.0, 2.0], dtype=F64)
MISSED = torch.tensor([[-3.0, -0.5, 3.5], [-5.0, -6.0, -0.5]], dtype=F64)  # divided by max(1, square), the slopes alone


def test_the_step() -> None:
    trend = torch.tensor([[1.0, 2.0, 0.5], [8.0, -3.0, 2.0]], dtype=F64)
    along = torch.tensor([(-3 - 1 + 1.75) / (1 + 4 + 0.25), (-40 + 18 - 1) / (64 + 9 + 4)], dtype=F64)[:, None]
    for pace in (1.0, 0.3):
        close(gradient_trend.stepped(trend, BY, SQUARE, pace), trend + 0.1 * MISSED + 0.5 * pace * along * trend)


def test_the_first_step_has_no_length_yet() -> None:
    close(gradient_trend.stepped(torch.zeros(2, 3, dtype=F64), BY, SQUARE), 0.1 * MISSED)


@pytest.mark.parametrize(("far", "factor"), [(1e6, 2.5), (-1e6, 0.5)])
def test_an_outlier_neither_turns_the_trend_around_nor_lets_it_explode(far: float, factor: float) -> None:
    trend = torch.tensor([[1.0, 2.0, 0.5], [8.0, -3.0, 2.0]], dtype=F64)
    close(gradient_trend.stepped(trend, -far * trend, torch.ones(3, dtype=F64)) - 0.1 * far * trend, factor * trend, 1e-8)


def test_what_is_no_part_of_the_trend_is_learned_slowly() -> None:
    """At right angles: by RATE alone."""
    trend, by = torch.tensor([[2.0, 0.0], [0.0, 5.0]], dtype=F64), torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=F64)
    close(gradient_trend.stepped(trend, by, torch.ones(2, dtype=F64)), trend - 0.1 * by)


def test_a_trend_that_halves_is_followed_faster_than_it_is_learned() -> None:
    """All of it shrinks by half at once, as gradients do when a loss falls: after three steps less than a tenth of what was is too much."""
    trend = torch.tensor([[3.0, -2.0], [1.0, 4.0]], dtype=F64)
    there = trend / 2
    for _ in range(3):
        trend = gradient_trend.stepped(trend, trend - there, torch.ones(2, dtype=F64))
    assert (trend - there).norm() < 0.1 * there.norm()


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_the_trend_does_not_depend_on_the_size_of_the_batch(batch: int) -> None:
    """As the loss is a mean: the same images again and again."""
    layer = with_trend(2)
    layer(X[:1].repeat(batch, 1, 1, 1)).square().mean().backward()
    expected = with_trend(2)
    expected(X[:1]).square().mean().backward()
    close(layer.trend.grad, expected.trend.grad)  # type: ignore[arg-type]


def test_half_precision() -> None:
    layer = BatchlessNorm(2, aux="auto")
    layer.enable_trend()
    x = X.bfloat16().requires_grad_()
    layer(x).float().sum().backward()
    assert layer.trend.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


# --- where there is none -----------------------------------------------------------------------------------------------------------------


def test_it_starts_from_nothing() -> None:
    layer, plain = BatchlessNorm(2, aux="auto", dtype=F64), BatchlessNorm(2, aux="auto", dtype=F64)
    layer.enable_trend()
    inputs = [X.clone().requires_grad_() for _ in range(2)]
    for each, x in zip((layer, plain), inputs, strict=True):
        each(x).square().sum().backward()
    close(inputs[0].grad, inputs[1].grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["eval", "frozen", "none", "explicit", "no grad", "empty"])
def test_what_does_not_learn_has_none(what: str) -> None:
    layer = with_trend(2)
    plain = copy.deepcopy(layer)
    plain.disable_trend()
    for each in (layer, plain):
        each.train(what != "eval")
        if what in ("none", "explicit"):
            each.aux = what  # type: ignore[assignment]
        if what == "frozen":
            for p in (each.mean, each.std_parameter):
                p.requires_grad_(False)
    x, other = ((X[:0] if what == "empty" else X).clone().requires_grad_() for _ in range(2))
    with torch.set_grad_enabled(what != "no grad"):
        y, expected = layer(x), plain(other)
    close(y, expected)
    if what != "no grad":
        for t in (y, expected):
            t.square().sum().backward()
        close(x.grad, other.grad)  # type: ignore[arg-type]
    assert layer.trend.grad is None or (what == "empty" and not layer.trend.grad.any())


def test_a_scale_that_attach_does_not_know_leaves_the_trend() -> None:
    """What is taken away would be a part in 65536 of it, and the trend would grow without an end."""
    layer = BatchlessNorm(2, aux="auto")
    layer.enable_trend()
    for attached in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
        step = torch.optim.SGD(normswap.param_groups(layer, lr=0.0))
        if attached:
            normswap.attach(layer, scaler=scaler)
        step.zero_grad()
        scaler.scale(layer(X.float()).square().mean()).backward()
        if attached:
            scaler.step(step)
        else:
            with pytest.warns(UserWarning, match="a GradScaler that normswap.attach was not given"):
                scaler.step(step)
        assert bool(layer.trend.any()) == attached


def test_no_layer_but_those_of_a_coupled_conversion_has_one() -> None:
    source = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.MaxPool2d(2), nn.BatchNorm2d(3)).to(F64).eval()
    names = {
        word: [name for name, _ in normswap.convert(source, X, coupling=word, aux=aux).model.named_parameters() if "trend" in name]  # type: ignore[arg-type]
        for word, aux in (("auto", "auto"), ("none", "auto"))
    }
    assert names == {"auto": ["1.trend", "3.trend"], "none": []}
    explicit = normswap.convert(source, X, coupling="auto", aux="explicit").model
    assert not [name for name, _ in explicit.named_parameters() if "trend" in name]


def test_states_with_and_without_fit_each_other() -> None:
    layer, plain = with_trend(2), BatchlessNorm(2, dtype=F64)
    plain.load_state_dict(layer.state_dict())
    other = BatchlessNorm(2, aux="auto", dtype=F64)
    other.enable_trend()
    other.load_state_dict(plain.state_dict())
    assert not other.trend.any()
    other.load_state_dict(layer.state_dict())
    close(other.trend.detach(), layer.trend.detach())


def test_it_cannot_be_traced_in_train_mode() -> None:
    with pytest.raises(UsageError, match="takes a trend out of its gradient cannot be traced in train mode"):
        torch.fx.symbolic_trace(nn.Sequential(with_trend(2)))
    torch.fx.symbolic_trace(nn.Sequential(with_trend(2)).eval())


@pytest.mark.parametrize("shape", [(6, 5, 2), (6, 1, 7), (6,)])
def test_an_input_of_a_wrong_shape_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="BatchlessNorm has 3 channels on axis 1, but its input has the shape"):
        with_trend(3).train()(torch.randn(shape, dtype=F64))
