"""A layer whose statistics give no std to divide by is kept, with the reason, and the rest of the model is converted."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn

import normswap
from fixtures.nets import randomise

# The layer that stays divides by something else in float64 (infinity against NaN, or a tenth off): the original is no measure of itself.
OTHER_IN_FLOAT64 = ((1e-3, -1e-3), (1e-5, -1e-5 + 1e-12))


class TwoBranches(nn.Module):
    def __init__(self, eps: float, var: float) -> None:
        super().__init__()
        self.dead, self.live = (nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, eps=e)) for e in (eps, 1e-5))
        randomise(self, 3)
        cast(Tensor, self.dead[1].running_var)[2] = var

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.relu(self.dead(x)), torch.relu(self.live(x))


@pytest.mark.parametrize(
    ("eps", "var", "why"),
    [
        (1e-5, -1e-3, "running_var + eps is not positive"),
        (1e-5, -1e-5, "running_var + eps is not positive"),  # 0 in float32, 3e-13 in float64: an old loader subtracted eps
        (1e-3, -1e-3, "running_var + eps is not positive"),
        (0.0, 0.0, "running_var + eps is not positive"),
        (1e-5, -1e-5 + 1e-12, "running_var cancels eps up to rounding"),
        (1e-5, float("nan"), "1 of 5 values of running_var that are not finite"),
    ],
)
def test_a_layer_without_a_std_is_kept_and_the_rest_goes_on(eps: float, var: float, why: str) -> None:
    model = TwoBranches(eps, var).eval()
    x = torch.randn(2, 3, 8, 7, generator=torch.Generator().manual_seed(0))
    plan = normswap.plan(model, x)
    assert [swap.name for swap in plan.swaps] == ["live.1"]
    (skip,) = plan.skips
    assert (skip.name, why in skip.reason) == ("dead.1", True)
    if (eps, var) in OTHER_IN_FLOAT64:
        return
    converted = normswap.convert(model, x).model
    for found, expected in zip(converted(x), model(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize(("eps", "var"), [(1e-5, 0.0), (1e-12, 0.0), (1e-3, -9e-4), (1e-5, 1e-30), (1e-5, 1e30)])
def test_small_and_large_variances_are_swapped(eps: float, var: float) -> None:
    model = TwoBranches(eps, var).eval()
    assert [swap.name for swap in normswap.plan(model, torch.randn(2, 3, 8, 7)).swaps] == ["dead.1", "live.1"]
