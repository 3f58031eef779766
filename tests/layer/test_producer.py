"""The producer of a norm: its weight as rows of filters, and the mean of its input, from which the mean of its output follows."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from producers import F64, KINDS, close, pair_of
from torch import nn

from normswap.layer.coupling import snapshot
from normswap.layer.producer import filters, input_shape, patch_mean

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")


@pytest.mark.parametrize("kind", KINDS)
def test_the_response_to_the_patch_mean_is_the_mean_of_the_output(kind: str) -> None:
    """Padding, stride, dilation and groups are exact."""
    model, x = pair_of(kind)
    y = model[0](x)  # type: ignore[index]
    output_mean, weight_norm = snapshot(model[0], patch_mean(model[0], x))  # type: ignore[index]
    close(output_mean, y.transpose(0, 1).flatten(1).mean(1))
    close(weight_norm.square().sum(), model[0].weight.square().sum())  # type: ignore[index, union-attr, operator]
    rows = filters(model[0], F64)  # type: ignore[index]
    assert rows.shape == (y.shape[1], math.prod(input_shape(model[0])) // getattr(model[0], "groups", 1))  # type: ignore[index]


@pytest.mark.parametrize("transposed", [False, True])
def test_the_patch_mean_of_any_conv(transposed: bool) -> None:
    """Strides beyond the kernel and the input, kernel positions that read padding only: drawn, with a fixed seed."""
    draw = random.Random(0)
    seen = 0
    while seen < 200:
        dims = draw.choice([1, 2])
        kernel, stride, dilation, padding, size = (
            tuple(draw.randint(*r) for _ in range(dims)) for r in ((1, 5), (1, 6), (1, 3), (0, 4), (1, 9))
        )
        options: dict[str, Any] = {"stride": stride, "dilation": dilation, "padding": padding}
        try:
            if transposed:
                options["output_padding"] = tuple(draw.randint(0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True))
                conv: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d)[dims - 1](2, 3, kernel, **options).to(F64)
            else:
                options["padding_mode"] = draw.choice(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"])
                conv = (nn.Conv1d, nn.Conv2d)[dims - 1](2, 3, kernel, **options).to(F64)
            x = torch.randn(draw.randint(1, 3), 2, *size, dtype=F64)
            y = conv(x)
        except (RuntimeError, ValueError):  # a kernel larger than its input, padding larger than what it reflects
            continue
        seen += 1
        output_mean, _ = snapshot(conv, patch_mean(conv, x))
        close(output_mean, y.transpose(0, 1).flatten(1).mean(1))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "linear"])
@pytest.mark.parametrize("axes", [1, 2, None])
def test_masked(kind: str, axes: int | None) -> None:
    model, x = pair_of(kind)
    y = model[0](x)  # type: ignore[index]
    sizes = (len(y), *y.shape[2:])[:axes]
    mask = torch.rand(sizes, generator=torch.Generator().manual_seed(2)) < 0.6
    output_mean, _ = snapshot(model[0], patch_mean(model[0], x, mask))  # type: ignore[index]
    counted = mask.view(len(y), 1, *mask.shape[1:], *(1,) * (y.dim() - 1 - mask.dim())).expand_as(y).to(F64)
    close(output_mean, (y * counted).transpose(0, 1).flatten(1).sum(1) / counted.transpose(0, 1).flatten(1).sum(1))


def test_masked_linear_and_unbatched_inputs() -> None:
    x = torch.randn(4, 6, 7, dtype=F64)
    mask = torch.arange(6) < torch.tensor([6, 1, 3, 2])[:, None]
    spoilt = x.masked_fill(~mask[..., None], math.nan)
    linear, conv = nn.Linear(7, 5).to(F64), nn.Conv1d(6, 5, 3, padding=1).to(F64)
    close(patch_mean(linear, spoilt, mask), x[mask].mean(0))
    close(patch_mean(conv, x[0]), patch_mean(conv, x[:1]))
    spoilt = x.masked_fill(torch.tensor([True, False, True, False])[:, None, None], math.nan)
    close(patch_mean(conv, spoilt, torch.tensor([False, True, False, True])), patch_mean(conv, x[1::2]))


def test_a_transposed_conv_that_is_given_its_output_size() -> None:
    conv = nn.ConvTranspose2d(2, 3, 3, stride=2).to(F64)
    x = torch.randn(4, 2, 5, 6, dtype=F64)
    for size in ([11, 14], [12, 13]):
        output_mean, _ = snapshot(conv, patch_mean(conv, x, output_size=size))
        close(output_mean, conv(x, output_size=size).mean((0, 2, 3)))


def test_half_precision_inputs_are_added_up_in_float32() -> None:
    linear = nn.Linear(3, 2)
    x = torch.full((5000, 3), 1.0, dtype=torch.float16)
    assert patch_mean(linear, x).dtype == torch.float32
    close(patch_mean(linear, x), torch.ones(3), 1e-6)
    conv = nn.Conv2d(1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        mean = patch_mean(conv, torch.full((1, 1, 257, 1), 1.001))
    close(mean, torch.full((1, 1, 1), 1.001), 1e-6)
