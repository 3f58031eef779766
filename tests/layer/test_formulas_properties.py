"""What holds for all values, searched by hypothesis. The seed is fixed, so a run is repeatable."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from normswap.layer.batchless_norm import BatchlessNorm
from normswap.layer.formulas import STD_FORMS, Reduction, StdForm, gaussian_nll, parameter_of, std_of, std_of_variance, variance_of_std

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40, database=None)
settings.load_profile("repeatable")

forms = st.sampled_from(STD_FORMS)
reductions = st.sampled_from(["mean", "sum"])
stds = st.floats(math.log(1e-6), math.log(1e6)).map(math.exp)
means = st.floats(-1e4, 1e4)
seeds = st.integers(0, 2**31)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(stds, forms, st.sampled_from([(torch.float64, 1e-11), (torch.float32, 1e-5)]))
def test_a_stored_std_comes_back(std: float, form: StdForm, precision: tuple[torch.dtype, float]) -> None:
    """Relative error: the rounding of the dtype, times |log 1e-6| = 14 for `log`; TINY / 1e-6 for the others."""
    dtype, tolerance = precision
    stored = parameter_of(torch.tensor(std, dtype=torch.float64), form).to(dtype)
    assert std_of(stored, form).item() == pytest.approx(std, rel=tolerance)


@given(seeds, st.integers(1, 4), st.integers(2, 5), forms, st.booleans(), st.booleans())
def test_folded_and_affine_map_are_the_formula(seed: int, c: int, ndim: int, form: StdForm, affine: bool, last: bool) -> None:
    layer = BatchlessNorm(c, channel_axis=-1 if last else 1, affine=affine, std=form, dtype=torch.float64)
    parameters = normal(seed, 4, c)
    std = parameters[1].exp()
    with torch.no_grad():
        layer.set_statistics(parameters[0] * 10, std)
        if layer.weight is not None and layer.bias is not None:
            layer.weight.copy_(parameters[2])
            layer.bias.copy_(parameters[3])
    shape = [2] * ndim
    axis = -1 if last else 1
    shape[axis] = c
    x = normal(seed + 1, *shape) * 3
    view = [1] * ndim
    view[axis] = c
    z = (x - (parameters[0] * 10).view(view)) / std.view(view)
    expected = parameters[2].view(view) * z + parameters[3].view(view) if affine else z
    scale, shift = layer.folded(ndim)
    assert scale.dtype == shift.dtype == torch.float64
    tolerance = 1e-10 * float(expected.abs().max() + (10 * parameters[0] / std).abs().max())  # x * scale and shift cancel
    torch.testing.assert_close(x * scale + shift, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=tolerance)
    for ours, theirs in zip(layer.affine_map(), (scale, shift), strict=True):
        torch.testing.assert_close(ours.expand(c), theirs.reshape(c), rtol=1e-12, atol=tolerance)


@given(seeds, means, stds, st.floats(-0.5, 0.5), st.floats(-0.5, 0.5), reductions)
def test_the_nll_is_least_at_the_sample_moments(
    seed: int, mean: float, std: float, by_mean: float, by_std: float, reduction: Reduction
) -> None:
    x = normal(seed, 6, 2, 3) * std + mean
    m, s = x.mean((0, 2), keepdim=True), x.std((0, 2), keepdim=True, correction=0)
    m.requires_grad_()
    log_std = s.log().requires_grad_()
    best = gaussian_nll(x, m, log_std.exp(), reduction=reduction, gauge=False)
    gradients = torch.autograd.grad(best, (m, log_std))
    # x - mean loses |mean| / std of the 16 digits
    lost = 1e-13 * (1 + abs(mean) / std)
    assert all(float((g * scale).abs().max()) <= lost for g, scale in zip(gradients, (s, 1), strict=True))
    other = gaussian_nll(x, m + by_mean * s, (log_std + by_std).exp(), reduction=reduction, gauge=False)
    assert best.item() <= other.item() + lost


@given(seeds, st.integers(1, 4), st.integers(1, 4), forms, reductions)
def test_equal_micro_batches_give_the_gradient_of_the_whole(seed: int, parts: int, size: int, form: StdForm, reduction: Reduction) -> None:
    layer = BatchlessNorm(3, std=form, reduction=reduction, dtype=torch.float64)
    layer.set_statistics(normal(seed, 3), normal(seed + 1, 3).exp())
    x = normal(seed + 2, parts * size, 3, 2)
    parameters = (layer.mean, layer.std_parameter)
    whole = torch.autograd.grad(layer.nll(x), parameters)
    each = [torch.autograd.grad(layer.nll(part) / parts, parameters) for part in x.chunk(parts)]
    for expected, *found in zip(whole, *each, strict=True):
        torch.testing.assert_close(torch.stack(found).sum(0), expected, rtol=1e-12, atol=1e-12)


@given(st.lists(st.floats(0, 1e12), min_size=1, max_size=4), st.sampled_from([0.0, 1e-12, 1e-5, 1e-3, 1.0]))
def test_variance_of_std_undoes_std_of_variance(variances: list[float], eps: float) -> None:
    variance = torch.tensor(variances, dtype=torch.float64)
    std = std_of_variance(variance, eps)
    back, kept = variance_of_std(std, eps)
    assert bool((back >= 0).all())
    assert kept in (eps, 0.0)
    torch.testing.assert_close((back + kept).sqrt(), std, rtol=1e-15, atol=1e-300)
    if kept == eps:  # the rounding of variance + eps
        torch.testing.assert_close(back, variance, rtol=1e-15, atol=1e-15 * max(1.0, eps, max(variances)))


@given(seeds, st.integers(1, 4), forms)
def test_a_sample_does_not_depend_on_its_batch(seed: int, c: int, form: StdForm) -> None:
    layer = BatchlessNorm(c, std=form)
    layer.set_statistics(normal(seed, c), normal(seed + 1, c).exp())
    x = normal(seed + 2, 3, c, 5).float()
    assert all(torch.equal(layer(x)[i : i + 1], layer(x[i : i + 1])) for i in range(3))
