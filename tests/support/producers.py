"""Producers of every kind, each before a BatchNorm, for the tests of coupling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normswap.layer.producer import outputs_of

F64 = torch.float64

# name -> (producer, shape of its input), pairwise different sizes
PRODUCERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(7, 5), (24, 7)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 4, stride=2, padding=1, dilation=2), (24, 3, 13)),
    "conv2d": (lambda: nn.Conv2d(2, 5, (3, 2), padding=(1, 2), bias=False), (24, 2, 7, 4)),
    "conv2d same": (lambda: nn.Conv2d(2, 5, (4, 3), padding="same", dilation=(1, 2)), (24, 2, 7, 6)),
    "conv2d reflect": (lambda: nn.Conv2d(2, 5, 3, padding=(2, 1), padding_mode="reflect"), (24, 2, 7, 4)),
    "conv2d circular": (lambda: nn.Conv2d(2, 5, 3, padding=(1, 2), padding_mode="circular", stride=(2, 1)), (24, 2, 7, 4)),
    "conv2d replicate": (lambda: nn.Conv2d(2, 5, 3, padding=2, padding_mode="replicate"), (24, 2, 7, 4)),
    "grouped": (lambda: nn.Conv2d(6, 9, 3, padding=1, groups=3, stride=2), (24, 6, 5, 8)),
    "depthwise": (lambda: nn.Conv2d(5, 5, 3, padding=1, groups=5), (24, 5, 4, 7)),
    "patchify": (lambda: nn.Conv2d(3, 5, 4, stride=4), (24, 3, 9, 14)),
    "conv3d": (lambda: nn.Conv3d(2, 5, (1, 3, 2), padding=1), (24, 2, 3, 4, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 5, 3, stride=2, padding=1, output_padding=(1, 0)), (24, 2, 4, 6)),
    "transposed grouped": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=3, groups=2, dilation=2), (24, 4, 7)),
}
KINDS = list(PRODUCERS)


def pair_of(kind: str, **options: Any) -> tuple[nn.Module, Tensor]:
    """(producer -> BatchNorm -> SiLU, in eval mode; an input)"""
    torch.manual_seed(0)
    make, shape = PRODUCERS[kind]
    producer = make()
    norm = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)](outputs_of(producer), **options)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.3, 2)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=F64) + 0.7
    return nn.Sequential(producer, norm, nn.SiLU()).to(F64).eval(), x


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
