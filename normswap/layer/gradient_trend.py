r"""What BatchNorm's gradient lacks, taken away without a batch: the trend of the gradient over the normalized input.

    z = (x - mean) / std                                          g = dL/dz
    BatchNorm       dL/dx = (g - <g> - z <g z>) / std             < > over the batch: no mean, and no part along z
    here            dL/dx = (g - slope z - level) / std           slope, level: a number per channel each, `trend`

slope and level are the running regression of g on z. They are constant in a step, so still no sample sees another one, and they
learn from what is left, a feedback loop:

    r = g - slope z - level          < > over all samples of the step
    a = (<r z> / max(1, <z^2>), <r>)                  what the trend (slope, level) misses
    trend += RATE a + LENGTH <a, trend> / |trend|^2 trend          < , > and | | over the channels, for slope and level apart

so that over many steps, the gradient lacks what BatchNorm's lacks. The division keeps the loop stable where the statistics lag behind. As
the loss falls, gradients shrink faster than a running average forgets: the length of the trend, which all channels tell together and so
with little noise, is therefore learned faster than where it points to. The gradients of weight and bias are as they were; those of a
coupled producer (`coupling`) are that of r.

They are stored times the number n of elements of the step: where the loss is a mean, g is as small as its samples are many, and n g
does not depend on that. Their gradients, `trend.grad`, are then -n <r z> and -n <r>, which are sums over what passed: micro-batches and
processes add up, and a gradient scaler scales them, as all gradients.

Source: the control of Online Normalization, Chiley et al. arXiv:1905.05894, with a normalised rate and without the order of the samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from normswap.layer import formulas
from normswap.layer.foreach import joined, parted, spread

RATE, LENGTH = 0.1, 0.5


class Lean(NamedTuple):
    """What is taken away of the gradient. trend: as it is stored; it gets the gradient of what is left.

    known: n <t z>, n <t> of what is taken away, t = slope z + level, stacked.
    by_x: what is added to the gradient by x,  by_x[0] (x - mean) + by_x[1] = -t / std.
    """

    trend: Tensor
    known: Tensor
    by_x: Tensor


def lean(trend: Tensor, first: Tensor, second: Tensor, number: Tensor | int, std: Tensor, share: float) -> Lean:
    """first, second: <z>, <z^2>; number: n, how many numbers they are the mean of. share: of the trend that this call is to take away.

    All of the shape of std, which is that of the trend but for the first size.
    """
    own = trend.detach().view(2, *std.shape)
    slope, level = own
    known = torch.stack([torch.addcmul(level * first, slope, second), torch.addcmul(level, slope, first)])
    inverse = 1 / std
    own = own * inverse * (-share / formulas.at_least_one(number))
    return Lean(trend, known * (share * formulas.at_most_one(number)), torch.stack([own[0] * inverse, own[1]]))


def stepped(trend: Tensor, by_trend: Tensor, square: Tensor, pace: float = 1.0, *, each: Sequence[Tensor] = ()) -> Tensor:
    """The trend after one step. by_trend: its gradient; square: <z^2>, in the shape of the statistics; pace: of LENGTH, see `pace_of`.

    each: the trends of several layers, which all of these are `joined` of.
    """
    of = each or [trend]
    missed = -by_trend / torch.stack([square.clamp(min=1), torch.ones_like(square)])

    def over_channels(t: Tensor) -> Tensor:
        return joined([part.sum(tuple(range(1, part.dim())), keepdim=True) for part in parted(t, of, 1)], 1)

    along, length = over_channels(missed * trend), over_channels(trend * trend)
    # An outlier must not make it more than 2.5 times as long, nor turn it around.
    grown = (along / length.clamp(min=torch.finfo(trend.dtype).tiny)).clamp(-1, 3) * (LENGTH * pace)
    return trend + RATE * missed + spread(grown, of, 1) * trend
