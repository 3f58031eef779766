"""The formulas of the layer, in float64, against autograd of the formula written out and against the closed forms of docs/method.md."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from normswap.layer import formulas
from normswap.layer.formulas import (
    STD_FORMS,
    TINY,
    Misfit,
    Reduction,
    StdForm,
    affine_of,
    axes_shape,
    gaussian_nll,
    parameter_of,
    std_of,
    std_of_variance,
    variance_of_std,
)

C = 5
ROUNDING = 1e-12  # relative, float64: some hundred operations of 1e-16 each


def data() -> tuple[Tensor, Tensor, Tensor]:
    """x (N, C, L), mean and std (1, C, 1): every channel with its own, none of them the sample's."""
    x = torch.randn(4, C, 7, dtype=torch.float64) * torch.linspace(0.5, 3, C).double().view(1, C, 1) + 2
    mean = torch.linspace(-1, 4, C, dtype=torch.float64).view(1, C, 1)
    std = torch.linspace(0.3, 2.5, C, dtype=torch.float64).view(1, C, 1)
    return x, mean, std


@pytest.mark.parametrize("gauge", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nll_is_the_formula(reduction: Reduction, gauge: bool) -> None:
    x, mean, std = data()
    by_channel = [std[0, c, 0].log() + ((x[:, c] - mean[0, c, 0]) / std[0, c, 0]).square().mean() / 2 for c in range(C)]
    offset = [std[0, c, 0].log() + 0.5 if gauge else torch.zeros(()) for c in range(C)]
    expected = sum(a - b for a, b in zip(by_channel, offset, strict=True))
    expected = expected if reduction == "sum" else expected / C
    torch.testing.assert_close(gaussian_nll(x, mean, std, reduction=reduction, gauge=gauge), expected, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("gauge", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("form", STD_FORMS)
def test_nll_gradients_are_the_closed_forms(form: StdForm, reduction: Reduction, gauge: bool) -> None:
    x, mean, std = data()
    x.requires_grad_()
    mean.requires_grad_()
    p = parameter_of(std, form).requires_grad_()
    loss = gaussian_nll(x, mean, std_of(p, form), reduction=reduction, gauge=gauge)
    by_mean, by_p = torch.autograd.grad(loss, (mean, p), retain_graph=True)

    m = x.detach().mean((0, 2), keepdim=True)
    square = (x.detach() - mean.detach()).square().mean((0, 2), keepdim=True)
    share = C if reduction == "mean" else 1
    expected = {
        "log": (1 - square / std**2) / share,
        "abs": (1 / std - square / std**3) / share,
        "inv": (-std + square / std) / share,  # p = 1/std
    }[form]
    torch.testing.assert_close(by_mean, (-(m - mean) / (share * std**2)).detach(), rtol=ROUNDING, atol=1e-14)
    torch.testing.assert_close(by_p, expected, rtol=1e-11, atol=1e-14)  # TINY = 1e-12 next to std
    assert torch.autograd.grad(loss, x, allow_unused=True) == (None,)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gauge_makes_the_nll_of_a_fit_zero(reduction: Reduction) -> None:
    x, _, _ = data()
    mean, std = x.mean((0, 2), keepdim=True), x.std((0, 2), keepdim=True, correction=0)
    assert abs(gaussian_nll(x, mean, std, reduction=reduction).item()) < ROUNDING
    offset = std.log().mean() + 0.5
    ungauged = gaussian_nll(x, mean, std, reduction=reduction, gauge=False)
    torch.testing.assert_close(ungauged, offset * (C if reduction == "sum" else 1), rtol=ROUNDING, atol=0)


def test_nll_with_shared_statistics_counts_the_pairs() -> None:
    """C is the number of (mean, std) pairs: one pair over all channels is the NLL of one channel with all the values."""
    x, _, _ = data()
    mean, std = torch.tensor(0.5, dtype=torch.float64).view(1, 1, 1), torch.tensor(2.0, dtype=torch.float64).view(1, 1, 1)
    expected = std.log().squeeze() + ((x - 0.5) / 2).square().mean() / 2
    for reduction in ("mean", "sum"):
        torch.testing.assert_close(gaussian_nll(x, mean, std, reduction=reduction, gauge=False), expected, rtol=ROUNDING, atol=0)


def test_nll_of_an_empty_batch_is_zero_and_trains_nothing() -> None:
    _, mean, std = data()
    mean.requires_grad_()
    std.requires_grad_()
    loss = gaussian_nll(torch.zeros(0, C, 7), mean, std)
    loss.backward()
    assert loss.item() == 0
    assert not mean.grad.any()  # type: ignore[union-attr]
    assert not std.grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("x", "statistics", "result"),
    [
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_nll_is_float32_or_wider(x: torch.dtype, statistics: torch.dtype, result: torch.dtype) -> None:
    values, mean, std = data()
    assert gaussian_nll(values.to(x), mean.to(statistics), std.to(statistics)).dtype == result


def test_nll_does_not_overflow_in_half_precision() -> None:
    x = torch.full((2, 1, 3), 60000.0, dtype=torch.float16)
    assert gaussian_nll(x, torch.zeros(1, 1, 1), torch.ones(1, 1, 1), gauge=False).item() == pytest.approx(60000.0**2 / 2, rel=1e-2)


@pytest.mark.parametrize("form", STD_FORMS)
@pytest.mark.parametrize("p", [-2.0, -1e-3, 0.0, 3.0])
def test_std_is_positive_and_finite_whatever_the_parameter(form: StdForm, p: float) -> None:
    std = std_of(torch.tensor(p), form)
    assert 0 < std.item() < math.inf


def test_std_forms() -> None:
    p = torch.tensor([-2.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(std_of(p, "log"), p.exp())
    torch.testing.assert_close(std_of(p, "abs"), torch.tensor([2.0, 0.5], dtype=torch.float64) + TINY, rtol=0, atol=0)
    torch.testing.assert_close(std_of(p, "inv"), 1 / torch.tensor([2.0, 0.5], dtype=torch.float64), rtol=1e-11, atol=0)


def test_std_of_variance_is_computed_in_float64() -> None:
    variance = torch.tensor([1e-12, 1.0, 1e12], dtype=torch.float32)
    std = std_of_variance(variance, 1e-5)
    assert std.dtype == torch.float64
    torch.testing.assert_close(std, torch.tensor([math.sqrt(v + 1e-5) for v in variance.tolist()], dtype=torch.float64), rtol=1e-15, atol=0)


def test_variance_of_std_gives_up_eps_only_where_it_must() -> None:
    std = torch.tensor([1.0, 2.0])
    variance, eps = variance_of_std(std, 1e-3)
    torch.testing.assert_close(variance, torch.tensor([1 - 1e-3, 4 - 1e-3], dtype=torch.float64))
    assert eps == 1e-3
    std = torch.tensor([1e-3, 2.0])  # 1e-6 < eps
    variance, eps = variance_of_std(std, 1e-3)
    assert eps == 0
    torch.testing.assert_close(variance, std.double().square(), rtol=0, atol=0)


@pytest.mark.parametrize("affine", [True, False])
def test_affine_of_is_the_normalization(affine: bool) -> None:
    x, mean, std = data()
    weight, bias = (torch.randn(1, C, 1, dtype=torch.float64) for _ in range(2)) if affine else (None, None)
    scale, shift = affine_of(mean, std, weight, bias)
    z = (x - mean) / std
    torch.testing.assert_close(x * scale + shift, z if weight is None else weight * z + bias, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("sizes", "axes", "ndim", "shape"),
    [
        ((3,), (1,), 2, (1, 3)),
        ((3,), (1,), 5, (1, 3, 1, 1, 1)),
        ((3,), (-1,), 3, (1, 1, 3)),
        ((3, 4), (1, -1), 4, (1, 3, 1, 4)),
        ((), (), 2, (1, 1)),
    ],
)
def test_axes_shape(sizes: tuple[int, ...], axes: tuple[int, ...], ndim: int, shape: tuple[int, ...]) -> None:
    assert axes_shape(sizes, axes, ndim) == shape


@pytest.mark.parametrize(("axes", "ndim"), [((1,), 1), ((-3,), 2), ((2, 1), 3), ((1, -1), 2)])
def test_axes_that_a_tensor_does_not_have(axes: tuple[int, ...], ndim: int) -> None:
    with pytest.raises(ValueError, match="not distinct ascending axes of a"):
        axes_shape((3,) * len(axes), axes, ndim)


# --- the gradients of the statistics -----------------------------------------------------------------------------------------------------


def _misfit_case(*sizes: int, offset: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(5, 3, 4, 2, dtype=torch.float64) * 2 + offset
    return x, torch.randn(sizes, dtype=torch.float64) + offset, torch.rand(sizes, dtype=torch.float64) + 0.3


def misfit(x: Tensor, mean: Tensor, std: Tensor, mask: Tensor | None = None, *, eps: float = 0.0) -> Misfit:
    return formulas.misfit(formulas.sums(x, mean, mask), std, eps=eps)


@pytest.mark.parametrize("sizes", [(1, 3, 1, 1), (1, 3, 4, 1), (1, 1, 1, 1), (5, 3, 4, 2), (1, 1, 4, 1)])
def test_misfit_is_the_two_moments(sizes: tuple[int, ...]) -> None:
    x, mean, std = _misfit_case(*sizes)
    d, r, f = misfit(x, mean, std, eps=1e-3)
    axes = [axis for axis, size in enumerate(sizes) if size == 1]
    m = x.mean(axes, keepdim=True) if axes else x
    square = (x - mean).square().mean(axes, keepdim=True) if axes else (x - mean).square()
    for found, expected in ((d, m - mean), (r, square / std**2 - 1), (f, 1e-3 / std**2)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_misfit_far_from_zero_loses_nothing() -> None:
    """A variance of 1 around a mean of a million: mean(x^2) - mean(x)^2 would have no digit left in float32."""
    x = torch.randn(1000, 2) + 1e6
    d, r, _ = misfit(x, torch.full((1, 2), 1e6), torch.ones(1, 2))
    exact = x.double() - 1e6
    torch.testing.assert_close(d.double(), exact.mean(0, keepdim=True), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(r.double(), exact.square().mean(0, keepdim=True) - 1, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_misfit_of_half_precision_is_taken_in_float32(dtype: torch.dtype) -> None:
    x = (torch.randn(64, 3, 50) + 300).to(dtype)
    found = misfit(x, torch.full((1, 3, 1), 300.0), torch.ones(1, 3, 1))
    wide = misfit(x.float(), torch.full((1, 3, 1), 300.0), torch.ones(1, 3, 1))
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(found, wide, strict=True))


def test_misfit_under_a_mask_is_that_of_what_counts() -> None:
    x, mean, std = _misfit_case(1, 3, 1, 1)
    keep = torch.tensor([True, False, True, False, False]).view(5, 1, 1, 1)
    found = misfit(x, mean, std, keep, eps=1e-3)
    for a, b in zip(found, misfit(x[keep.flatten()], mean, std, eps=1e-3), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("form", STD_FORMS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_raw_gradients_are_those_of_the_nll(form: StdForm, reduction: Any) -> None:
    x, mean, _ = _misfit_case(1, 3, 1, 1)
    mean.requires_grad_()
    parameter = torch.tensor([-0.7, 0.4, 1.3], dtype=torch.float64).view(1, 3, 1, 1).requires_grad_()
    std = formulas.std_of(parameter, form)
    formulas.gaussian_nll(x, mean, std, reduction=reduction).backward()
    how_far = misfit(x, mean, std, eps=1e-3)
    found = formulas.nll_gradients(how_far, std.detach(), parameter.detach(), form, stats="raw", reduction=reduction)
    torch.testing.assert_close(found[0], mean.grad, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found[1], parameter.grad, rtol=1e-11, atol=1e-12)
    expected = formulas.gaussian_nll(x, mean, std, reduction=reduction)
    torch.testing.assert_close(formulas.gaussian_nll_of(how_far.r, reduction=reduction), expected.detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("form", STD_FORMS)
def test_natural_is_raw_times_the_inverse_fisher_information(form: StdForm, sign: int) -> None:
    """In the coordinates of the stored parameter: F = 2 / (dp/dlog std)^2."""
    x, mean, _ = _misfit_case(1, 3, 1, 1)
    parameter = sign * torch.tensor([0.7, 0.4, 1.3], dtype=torch.float64).view(1, 3, 1, 1)
    std = formulas.std_of(parameter, form)
    d, r, _ = misfit(x, mean, std)
    zero = torch.zeros_like(d)
    raw = formulas.nll_gradients(Misfit(d, r, zero), std, parameter, form, stats="raw", reduction="sum")
    natural = formulas.nll_gradients(Misfit(d, r, zero), std, parameter, form, stats="natural")
    slope = formulas.slope_of_log(parameter, form)
    torch.testing.assert_close(natural[0], raw[0] * std**2, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(natural[1], raw[1] * slope**2 / 2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("form", STD_FORMS)
@pytest.mark.parametrize("rate", [0.0, 0.01, 0.1, 0.9])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_a_natural_step_is_the_running_average(form: StdForm, rate: float, offset: float, sign: int) -> None:
    """However far the input is from the statistics: a step to first order would take the exponential of it."""
    x, mean, std = _misfit_case(1, 3, 1, 1, offset=offset)
    mean = mean - offset
    parameter = formulas.parameter_of(std, form) * (1 if form == "log" else sign)
    std = formulas.std_of(parameter, form)
    gradients = formulas.nll_gradients(misfit(x, mean, std, eps=1e-3), std, parameter, form, stats="natural")
    stepped, parameter = formulas.natural_step(mean, parameter, *gradients, form, rate)
    square = (x - mean).square().mean((0, 2, 3), keepdim=True)
    torch.testing.assert_close(stepped, (1 - rate) * mean + rate * x.mean((0, 2, 3), keepdim=True), rtol=1e-11, atol=1e-12)
    after = formulas.std_of(parameter, form).square()
    torch.testing.assert_close(after, (1 - rate) * std**2 + rate * (square + 1e-3), rtol=1e-9, atol=1e-10)


def test_the_slope_is_never_zero() -> None:
    zero = torch.zeros(2)
    assert all(bool((torch.as_tensor(formulas.slope_of_log(zero, form)) != 0).all()) for form in STD_FORMS)
    for form in STD_FORMS:
        p = torch.tensor([-0.7, 0.4], dtype=torch.float64, requires_grad=True)
        (by_p,) = torch.autograd.grad(formulas.std_of(p, form).log().sum(), p)
        torch.testing.assert_close(
            formulas.slope_of_log(p.detach(), form) * torch.ones_like(p), 1 / by_p, rtol=5e-16, atol=0
        )  # one rounding
