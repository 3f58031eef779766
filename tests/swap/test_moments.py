"""Streaming moments: any split of the data gives the same numbers, and those are numpy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from normswap.swap.moments import BINS, ELEMENTS, SPAN, Moments, histogram, sample

CHANNELS = 3


def _data(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, CHANNELS, generator=generator, dtype=torch.float64) * torch.tensor([0.01, 1.0, 50.0]) + torch.tensor(
        [100.0, 0.0, -3.0]
    )
    return x, x * torch.tensor([3.0, -2.0, 0.5]) + torch.randn(rows, CHANNELS, generator=generator, dtype=torch.float64)


def _of(x: Tensor, y: Tensor, sizes: list[int]) -> Moments:
    moments = Moments.empty(CHANNELS)
    for part_x, part_y in zip(x.split(sizes), y.split(sizes), strict=True):
        moments.add(part_x, part_y)
    return moments


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 3), st.integers(0, 9))
def test_any_split_gives_the_same_moments(sizes: list[int], seed: int) -> None:
    x, y = _data(sum(sizes), seed)
    split, whole = _of(x, y, sizes), _of(x, y, [sum(sizes)])
    assert split.count == whole.count
    for name in ("mean", "mean_y", "m2", "m3", "m4", "y2", "xy"):
        mine, theirs = getattr(split, name), getattr(whole, name)
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-9 * theirs.abs().max().item()), name


def test_the_statistics_are_numpys() -> None:
    x, y = _data(257, 0)
    moments = _of(x, y, [100, 57, 100])
    assert np.allclose(moments.mean, x.numpy().mean(0), rtol=1e-12)
    assert np.allclose(moments.std, x.numpy().std(0), rtol=1e-12)
    z = (x.numpy() - x.numpy().mean(0)) / x.numpy().std(0)
    assert np.allclose(moments.kurtosis, (z**4).mean(0), rtol=1e-9)


def _fit(moments: Moments) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The line as a map of the normalized x, and its error: y ~ weight * (x - mean) / std + bias."""
    scale, shift = moments.line()
    return scale * moments.std, shift + moments.mean * scale, moments.error(scale, shift)


def test_the_fit_is_the_least_squares_one() -> None:
    x, y = _data(301, 1)
    moments = _of(x, y, [301])
    weight, bias, error = _fit(moments)
    z = ((x - moments.mean) / moments.std).numpy()
    residuals = 0.0
    for channel in range(CHANNELS):
        design = np.stack([z[:, channel], np.ones(len(z))], 1)
        solution, residual, *_ = np.linalg.lstsq(design, y[:, channel].numpy(), rcond=None)
        assert np.allclose([weight[channel], bias[channel]], solution, rtol=1e-9)
        residuals += residual[0]
    assert error == pytest.approx((residuals / (y**2).sum().item()) ** 0.5, rel=1e-9)


def test_an_exact_map_is_fitted_exactly() -> None:
    x, _ = _data(50, 2)
    assert _fit(_of(x, x * 3 - 1, [50]))[2] < 1e-7


def test_a_constant_channel_has_weight_0() -> None:
    x, y = _data(20, 3)
    x[:, 1] = 7.0
    weight, _, error = _fit(_of(x, y, [20]))
    assert weight[1] == 0
    assert weight[0] != 0
    assert np.isfinite(error)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = _data(64, 4)
    whole = _of(x, y, [64])
    monkeypatch.setattr("normswap.swap.moments.CHUNK", 10)
    chunked = _of(x.float(), y.float(), [64])
    assert torch.allclose(chunked.m2, whole.m2, rtol=1e-4)
    assert chunked.count == 64


def test_the_histogram_counts_what_the_layer_normalizes() -> None:
    x, _ = _data(4000, 5)
    kept: list[Tensor] = []
    for part in x.split(50):
        sample(part, kept)
    flat = torch.tensor([False, False, True])
    counts = histogram(kept, x.mean(0), x.std(0), flat)
    rows = torch.cat(kept)
    z = ((rows - x.mean(0)) / x.std(0))[:, :2]
    edges = np.linspace(-SPAN, SPAN, BINS + 1)
    assert len(counts) == BINS
    assert sum(counts) == 2 * len(rows)  # nothing is lost, and the flat channel is left out
    assert np.abs(np.array(counts) - np.histogram(z.clamp(-SPAN, SPAN), edges)[0]).max() <= 2  # float32 may round over an edge
    shifted = histogram(kept, x.mean(0) + 100 * x.std(0), x.std(0), flat)
    assert shifted[0] == sum(shifted)  # beyond the span: all in the bin at the end
    assert histogram(kept, x.mean(0), x.std(0), torch.tensor([True, True, True])) == ()
    assert histogram([], x.mean(0), x.std(0), flat) == ()


def test_the_sample_is_spread_over_a_call_bounded_and_a_copy() -> None:
    kept: list[Tensor] = []
    x = torch.arange(3000.0)[:, None].repeat(1, 64)
    sample(x, kept)
    assert kept[0][0, 0] == 0
    assert kept[0][-1, 0] > 2900
    x.zero_()
    assert kept[0][-1, 0] > 2900
    for _ in range(200):
        sample(torch.ones(3000, 64), kept)
    assert ELEMENTS <= sum(rows.numel() for rows in kept) < 1.1 * ELEMENTS
