r"""The sample limit: in train mode, how large one sample may become while the statistics lag behind.

    z = (x - mean) / std
    y = weight z f + bias       f = min(1, LIMIT / sqrt(<z^2>))       < > over all channels and places of one sample

with the gradient through f. The axes before those of the channels are the axes of samples. After an optimizer step the statistics of a
layer lag behind its input: its output is too large, and so is the input of the next layer, whose statistics lag as well. In a deep network
the factors multiply. With the limit no layer passes on a sample whose z f has a root mean square above LIMIT, at once and not some steps
later, and each sample's output still depends on that sample alone. Where the statistics fit, <z^2> is about 1, and only unusual samples are
limited. There is no limit before the first step, when no statistics lag, and none in eval mode.

Source: the layer scaling of Online Normalization, Chiley et al. arXiv:1905.05894, but as a limit: a sample below it is not scaled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from normswap.layer import formulas

LIMIT = 1.2


class Limit(NamedTuple):
    """The factor of each sample, and what its derivatives need.

    factor     f, with the sizes of the axes of samples and size 1 elsewhere
    d_factor   the derivative of f:  df = d_factor sum(z dz), summed over the sample; 0 where f is 1
    first, second   the `formulas.sums` of each sample, for the gradients by mean and std; None where these are not needed
    """

    factor: Tensor
    d_factor: Tensor
    first: Tensor | None
    second: Tensor | None


def limit(x: Tensor, mean: Tensor, std: Tensor, samples: Sequence[int], counted: Tensor | None = None) -> tuple[Limit, formulas.Sums]:
    """The limit of each sample of x, and the `formulas.sums` of x over all samples.

        f = LIMIT / sqrt(<z^2>) where that is below 1,  df = -f / <z^2> <z dz>

    x: any shape, any float dtype; mean, std: as many dimensions, broadcast against it. samples: the axes of x that index samples.
    counted: bool, where x counts, broadcast against x; None: everywhere. Differentiable in x.
    """
    first, second, number = formulas.sums(x, mean, counted, kept=samples)
    others = [axis for axis in range(x.dim()) if axis not in samples]
    size: Tensor | int  # how many numbers a sample has
    if isinstance(number, Tensor):
        size, number = formulas.over(number, others), formulas.over(number, samples)
    else:
        size = math.prod([x.shape[axis] for axis in others])
        number = number * math.prod([x.shape[axis] for axis in samples])
    size = formulas.at_least_one(size)
    square = formulas.over(second / std.square(), others) / size  # <z^2>
    factor = factor_of(square)
    d_factor = d_factor_of(square, factor, size)
    return Limit(factor, d_factor, first, second), (formulas.over(first, samples), formulas.over(second, samples), number)


def factor_of(square: Tensor) -> Tensor:
    """f = LIMIT / sqrt(<z^2>) where that is below 1, of each sample, from its <z^2>."""
    return LIMIT * square.clamp(min=LIMIT**2).rsqrt()


def d_factor_of(square: Tensor, factor: Tensor, size: Tensor | int) -> Tensor:
    """The derivative of f by z, over z: -f / (<z^2> size) where f is below 1. size: how many numbers a sample has."""
    return (square > LIMIT**2) * factor / (square.clamp(min=LIMIT**2) * -formulas.at_least_one(size))


def gradients(by_factor: Tensor, limit: Limit, std: Tensor, samples: Sequence[int]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients by x, mean and std that come through the factor f, for the gradient by f (`by_factor`).

        by x     slope (x - mean)  with  slope = by_f d_factor / std^2
        by mean  the sum of -slope (x - mean)           by std   the sum of -slope (x - mean)^2 / std

    Returns (slope, by mean, by std); the last two are None if `limit` has no sums of the samples.
    """
    slope = by_factor * limit.d_factor / std.square()
    if limit.first is None or limit.second is None:
        return slope, None, None
    return slope, -formulas.over(slope * limit.first, samples), -formulas.over(slope * limit.second, samples) / std
