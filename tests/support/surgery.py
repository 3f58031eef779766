"""What the tests of surgery share: swap without the judge, and the error of what came out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

import normswap
from fixtures.nets import randomise
from normswap.models.copying import copy_for_running
from normswap.swap.apply import swap

IMAGE = (3, 4, 9, 7)  # N, C, H, W


def swapped(model: nn.Module, *inputs: Tensor, std: str = "log", **options: Any) -> Any:
    """`convert` without its judge; Any, so that a test may reach into the model."""
    return swap(model, normswap.plan(model, inputs, **options), std=std)


def error(model: nn.Module, candidate: nn.Module, *inputs: Tensor) -> float:
    """max|candidate - model| / max|model| in eval mode."""
    with torch.no_grad():
        reference, found = copy_for_running(model)(*inputs), copy_for_running(candidate)(*inputs)
    assert reference.shape == found.shape
    assert reference.dtype == found.dtype
    return float((reference - found).abs().max() / reference.abs().max())


class Net(nn.Module):
    """conv and norm, and a forward given as a function of (self, x)."""

    def __init__(self, norm: nn.Module, run: Callable[[Any, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 5, 3)
        self.norm = norm
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.run(self, x) if self.run else self.norm(self.conv(x)))


def net(norm: nn.Module | None = None, run: Callable[[Any, Tensor], Tensor] | None = None) -> Any:
    return randomise(Net(norm or nn.BatchNorm2d(5), run), 7).eval()


def untraceable(run: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """The same forward behind control flow on the data, so that the walk has to find what fx would."""
    return lambda self, x: run(self, x) if float(x.detach().abs().max()) < 1e9 else x
