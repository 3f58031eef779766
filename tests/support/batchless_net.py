"""A small net with one BatchlessNorm, its data and its training loop, for the tests of what an optimizer does to statistics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import normswap
from normswap.layer.batchless_norm import BatchlessNorm

SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW
ACCUMULATED = r"more backward passes have reached .* Say normswap\.attach\(model, accumulate=\.\.\.\)"


class Net(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm = BatchlessNorm(3, aux=options.pop("aux", "auto"), **options)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).mean(2))  # type: ignore[no-any-return]

    def loss(self, x: Tensor) -> Tensor:
        loss = self(x).square().mean()
        return loss + normswap.aux_loss(self) if self.norm.aux == "explicit" else loss


def batches(mean: float | Tensor, std: float | Tensor, n: int = 300, size: int = 16) -> Iterator[Tensor]:
    """n of them; mean and std of every channel, or one number for all of them."""
    mean, std = (torch.as_tensor(value).view(-1, 1) for value in (mean, std))
    generator = torch.Generator().manual_seed(5)
    for _ in range(n):
        yield torch.randn(size, 3, 8, generator=generator) * std + mean


def train(net: Net, optimizer: torch.optim.Optimizer, data: Iterator[Tensor]) -> None:
    for x in data:
        optimizer.zero_grad()
        net.loss(x).backward()
        optimizer.step()


def statistics(net: Net) -> tuple[Tensor, Tensor]:
    mean, std = net.norm.statistics()
    return mean.detach().clone(), std.detach().clone()


def assert_tracks(net: Net, mean: float | Tensor, std: float | Tensor) -> None:
    """In every channel."""
    m, s = statistics(net)
    assert bool(((m - mean).abs() < 0.1 * std).all())
    assert bool(((s - std).abs() < 0.1 * std).all())


def one_step(
    net: Net, *, k: int = 1, scaler: Any = None, optimizer: Any = None, clip: Any = False, unscale: bool = False, to_none: bool = True
) -> None:
    optimizer = optimizer or SGD(net.parameters(), lr=0.0)
    (x,) = batches(3.0, 2.0, 1)
    for part in x.chunk(k):
        loss = net.loss(part) / k
        (loss if scaler is None else scaler.scale(loss)).backward()
    if unscale:
        scaler.unscale_(optimizer)
    if clip:
        torch.nn.utils.clip_grad_norm_(net.head.parameters() if clip == "head" else net.parameters(), 1.0)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=to_none)
