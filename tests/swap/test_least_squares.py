"""Ridge regression from sums, against torch.linalg.lstsq on the same rows."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from normswap.swap.least_squares import LEAST, RIDGES, Joint, Map, Sums, best, best_jointly, solve


def _rows(seed: int, n: int, i: int, o: int, *, shift: float = 0.0, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """Rows u far from 0, and v of a linear map of them."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(n, i, generator=generator) @ torch.randn(i, i, generator=generator) + shift
    v = u @ torch.randn(i, o, generator=generator) + noise * torch.randn(n, o, generator=generator) + shift / 3
    return u.double(), v.double()


def _sums(u: Tensor, v: Tensor, sizes: tuple[int, ...], *, centred: bool = True) -> Sums:
    sums = Sums.at(u[: sizes[0]], v[: sizes[0]], centred=centred)
    for part in zip(u.split(sizes), v.split(sizes), strict=True):
        sums.add(*part)
    return sums


def _reference(u: Tensor, v: Tensor, ridge: float, *, centred: bool) -> Map:
    """The same by rows: the ridge as rows of their own."""
    u, v = u.double(), v.double()
    mean_u, mean_v = (t.mean(0) * centred for t in (u, v))
    u, v = u - mean_u, v - mean_v
    weight = (ridge * u.square().sum(0).mean()).sqrt()
    rows = torch.cat([u, weight * torch.eye(u.shape[1], dtype=u.dtype)]), torch.cat([v, v.new_zeros(u.shape[1], v.shape[1])])
    matrix = torch.linalg.lstsq(*rows).solution
    return Map(matrix, mean_v - mean_u @ matrix)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.sampled_from(RIDGES), st.booleans(), st.sampled_from([0.0, 5.0]))
def test_the_map_is_that_of_the_rows(seed: int, ridge: float, centred: bool, shift: float) -> None:
    u, v = _rows(seed, 47, 5, 3, shift=shift)
    expected = _reference(u, v, ridge, centred=centred)
    for sizes in ((47,), (20, 20, 7), (1, 46)):
        found = solve(_sums(u, v, sizes, centred=centred), ridge)
        torch.testing.assert_close(found.matrix, expected.matrix, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.offset, expected.offset, rtol=1e-9, atol=1e-9)


def test_what_a_map_leaves_is_the_sum_over_the_rows() -> None:
    u, v = _rows(1, 31, 4, 6, shift=2.0)
    other = Map(torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), torch.arange(6).double())
    rows = v - u @ other.matrix
    assert other.left(_sums(u, v, (13, 18))) == pytest.approx(float((rows - other.offset).square().sum()))
    without = Map(other.matrix, torch.zeros(6, dtype=torch.float64))
    assert without.left(_sums(u, v, (13, 18), centred=False)) == pytest.approx(float(rows.square().sum()))


def test_float32_rows_far_from_0_keep_their_digits() -> None:
    u, v = _rows(8, 60, 5, 3, shift=300.0)
    expected, found = solve(_sums(u, v, (60,)), 1e-3), solve(_sums(u.float(), v.float(), (60,)), 1e-3)
    torch.testing.assert_close(found.matrix, expected.matrix, rtol=1e-3, atol=1e-3)  # 300 has 5 digits left in float32


def test_sums_over_two_parts_are_those_of_the_whole() -> None:
    u, v = _rows(3, 40, 3, 2, shift=1.0)
    whole, parts = _sums(u, v, (40,)), _sums(u, v, (40,)).empty()
    parts.add(u[:11], v[:11])
    rest = parts.empty()
    rest.add(u[11:], v[11:])
    both = parts + rest
    assert both.count == whole.count
    for name in ("u", "v", "uu", "uv", "vv"):
        torch.testing.assert_close(getattr(both, name), getattr(whole, name), rtol=1e-5, atol=1e-5)


def test_nothing_is_fitted_to_noise() -> None:
    """v has nothing to do with u: no ridge leaves less of the held-out rows than B = 0."""
    generator = torch.Generator().manual_seed(4)
    u, v = torch.randn(60, 20, generator=generator), torch.randn(60, 7, generator=generator)
    fit, held_out = _sums(u[:48], v[:48], (48,)), _sums(u[:48], v[:48], (48,)).empty()
    held_out.add(u[48:], v[48:])
    assert best(fit, held_out, Map.none(fit).left(held_out)) is None


def test_a_map_that_is_there_is_found() -> None:
    u, v = _rows(5, 200, 6, 3)
    fit, held_out = _sums(u[:160], v[:160], (160,)), _sums(u[:160], v[:160], (160,)).empty()
    held_out.add(u[160:], v[160:])
    found = best(fit, held_out, Map.none(fit).left(held_out))
    assert found is not None
    assert found.left(held_out) < 0.02 * Map.none(fit).left(held_out)


def _joint(n: int, noise: float, by_u: float, seed: int = 6) -> tuple[Joint, Joint, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    u, x = torch.randn(n, 4, generator=generator) + 1, torch.randn(n, 3, generator=generator)
    s, d = torch.tensor([2.0, -0.7, 0.0]), torch.randn(4, 3, generator=generator) * by_u
    x[:, 2] = 1.5  # constant
    y = s * x + u @ d + noise * torch.randn(n, 3, generator=generator) + 3
    k = n - n // 5
    fit = Joint.at(u[:k], x[:k], y[:k])
    held_out = fit.empty()
    fit.add(u[:k], x[:k], y[:k])
    held_out.add(u[k:], x[k:], y[k:])
    return fit, held_out, s, d


def test_scale_and_map_are_found_together() -> None:
    fit, held_out, s, d = _joint(400, 0.01, 1.0)
    found = best_jointly(fit, held_out)
    assert found is not None
    torch.testing.assert_close(found[1][:2], s[:2].double(), rtol=0.01, atol=0.01)
    torch.testing.assert_close(found[0].matrix[:, :2], d[:, :2].double(), rtol=0.02, atol=0.02)
    assert found[1][2] == math.inf  # a constant x: nothing that is divided by s may reach the weight


def test_without_anything_in_u_the_line_stays() -> None:
    fit, held_out, _, _ = _joint(40, 1.0, 0.0)
    assert best_jointly(fit, held_out) is None


def test_u_does_not_stand_in_for_x() -> None:
    """x is u itself but for a little noise: s would fall to 0, and W + D / s would explode."""
    generator = torch.Generator().manual_seed(7)
    u = torch.randn(300, 3, generator=generator)
    x = u + 0.3 * torch.randn(300, 3, generator=generator)
    fit = Joint.at(u, x, u)
    fit.add(u, x, u)
    alone, found = fit.solve(None)[1], fit.solve(1e-4)[1]
    torch.testing.assert_close(found, alone)
    assert float(alone.min()) > LEAST
