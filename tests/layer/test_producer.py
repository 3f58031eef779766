"""The producer of a norm: its weight as rows of filters, and the mean of its input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from producers import F64, KINDS, close, pair_of
from torch import nn

from normswap.layer.producer import channel_mean, filters, groups_of, inputs_of, response

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")


@pytest.mark.parametrize("kind", KINDS)
def test_the_response_is_the_output_for_a_constant_input(kind: str) -> None:
    """Where a kernel reads no padding; each position of a transposed one reaches another output."""
    model, x = pair_of(kind)
    producer: Any = model[0]  # type: ignore[index]
    rows = filters(producer, F64)
    assert rows.shape == (producer(x).shape[1], producer.weight.numel() // producer(x).shape[1])
    a = torch.randn(inputs_of(producer), dtype=F64, generator=torch.Generator().manual_seed(2))
    found = response(rows, a, groups_of(producer))
    if "transposed" in kind:
        weight = producer.weight.detach()
        per_group = a.view(producer.groups, -1, *(1,) * (weight.dim() - 1))
        close(found, (weight.view(producer.groups, -1, *weight.shape[1:]) * per_group).flatten(3).sum((1, 3)).flatten())
        return
    if kind == "linear":
        u = a
    else:
        size = [d * (k - 1) + 1 for d, k in zip(producer.dilation, producer.kernel_size, strict=True)]
        u = a.view(-1, *(1,) * len(size)).expand(-1, *size)
        producer.padding_mode, producer.padding = "zeros", (0,) * len(size)
    bias = 0 if producer.bias is None else producer.bias
    close(found, producer(u[None]).flatten(1)[0].view(len(found), -1)[:, 0] - bias)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_of_each_channel(kind: str) -> None:
    model, x = pair_of(kind)
    producer: Any = model[0]  # type: ignore[index]
    close(channel_mean(producer, x), x.transpose(0, 1).flatten(1).mean(1))
    close(channel_mean(producer, x[0]), x[:1].transpose(0, 1).flatten(1).mean(1))
    close(channel_mean(producer, x[:0]), torch.zeros(inputs_of(producer), dtype=F64))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "linear"])
@pytest.mark.parametrize("axes", [1, 2, None])
def test_masked(kind: str, axes: int | None) -> None:
    """A mask counts as far as its axes are those of the input; an axis that the producer made longer or shorter is left out."""
    model, x = pair_of(kind)
    producer: Any = model[0]  # type: ignore[index]
    y = producer(x)
    mask = torch.rand((len(y), *y.shape[2:])[:axes], generator=torch.Generator().manual_seed(2)) < 0.6
    same = 1
    while same < mask.dim() and y.shape[1 + same] == x.shape[1 + same]:
        same += 1
    counted = mask if same == mask.dim() else mask.flatten(same).any(-1)
    counted = counted.view(len(x), 1, *counted.shape[1:], *(1,) * (x.dim() - 1 - counted.dim())).expand_as(x)
    spoilt = x.masked_fill(~counted, math.nan)
    expected = x.masked_fill(~counted, 0).transpose(0, 1).flatten(1).sum(1) / counted.transpose(0, 1).flatten(1).sum(1)
    close(channel_mean(producer, spoilt, mask), expected)


def test_masked_linear() -> None:
    x = torch.randn(4, 6, 7, dtype=F64)
    mask = torch.arange(6) < torch.tensor([6, 1, 3, 2])[:, None]
    close(channel_mean(nn.Linear(7, 5), x.masked_fill(~mask[..., None], math.nan), mask), x[mask].mean(0))


def test_half_precision_inputs_are_added_up_in_float32() -> None:
    linear = nn.Linear(3, 2)
    x = torch.full((5000, 3), 1.0, dtype=torch.float16)
    assert channel_mean(linear, x).dtype == torch.float32
    close(channel_mean(linear, x), torch.ones(3), 1e-6)
    conv = nn.Conv2d(1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        mean = channel_mean(conv, torch.full((1, 1, 257, 1), 1.001))
    close(mean, torch.full((1,), 1.001), 1e-6)
