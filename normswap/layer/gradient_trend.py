r"""The gradient trend: the part of a gradient that BatchNorm takes out by its batch, learned over time and taken out without one.

    z = (x - mean) / std                                          g = dL/dz
    BatchNorm       dL/dx = (g - <g> - z <g z>) / std             < > over the batch: no mean, and no part along z
    here            dL/dx = (g - slope z - level) / std           slope, level: a number per channel each, the parameter `trend`

slope and level are the running regression of g on z. They are constant within a step, so a sample still depends on itself alone. They are
learned from what is left of the gradient:

    r = g - slope z - level          < > over all samples of the step
    a = (<r z> / max(1, <z^2>), <r>)                  what the trend (slope, level) misses
    trend += RATE a + LENGTH <a, trend> / |trend|^2 trend          < , > and | | over the channels, for slope and level apart

so that over many steps the gradient lacks what BatchNorm's lacks. The division by max(1, <z^2>) keeps this stable where the statistics lag
behind. As the loss falls, gradients shrink faster than a running average forgets. The length of the trend is therefore learned faster than
its direction: all channels together give the length, with little noise. The gradients of weight and bias do not change; those of a coupled
producer (`coupling`) are computed from r.

The parameter stores the trend times n, the number of elements of the step: where the loss is a mean, g shrinks as n grows, and n g does
not. Its gradient, `trend.grad`, is then -n <r z> and -n <r>: sums over all elements, so that micro-batches and processes add up, and a
gradient scaler scales it like any gradient.

Source: the control of Online Normalization, Chiley et al. arXiv:1905.05894, with a normalised rate and without the order of the samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from normswap.layer import foreach, formulas

RATE, LENGTH = 0.1, 0.5


class TrendTerm(NamedTuple):
    """The term t = slope z + level that one call takes out of the gradient.

    trend   the parameter, as it is stored; its gradient comes from r, which is left of the gradient
    known   n <t z> and n <t>, stacked
    by_x    what is added to the gradient by x:  by_x[0] (x - mean) + by_x[1] = -t / std
    """

    trend: Tensor
    known: Tensor
    by_x: Tensor


def trend_term(trend: Tensor, first: Tensor, second: Tensor, number: Tensor | int, std: Tensor, share: float) -> TrendTerm:
    """The term of one call with the moments first = <z> and second = <z^2> of n = `number` elements.

    share: the part of the trend that this call takes out. All have the shape of std, which is that of the trend but for the first size.
    """
    own = trend.detach().view(2, *std.shape)
    slope, level = own
    known = torch.stack([torch.addcmul(level * first, slope, second), torch.addcmul(level, slope, first)])
    inverse = 1 / std
    own = own * inverse * (-share / formulas.at_least_one(number))
    return TrendTerm(trend, known * (share * formulas.at_most_one(number)), torch.stack([own[0] * inverse, own[1]]))


def stepped(trend: Tensor, by_trend: Tensor, square: Tensor, pace: float = 1.0, *, each: Sequence[Tensor] = ()) -> Tensor:
    """The trend after one step.

    by_trend: its gradient. square: <z^2>, in the shape of the statistics. pace: what LENGTH is multiplied by, see `run.pace_of`. each: the
    trends of several layers, if the other tensors are each a `foreach.stack` over these layers.
    """
    of = each or [trend]
    a = -by_trend / torch.stack([square.clamp(min=1), torch.ones_like(square)])

    along, length = (foreach.total(t, of, 1) for t in (a * trend, trend * trend))
    # An outlier must not make the trend more than 2.5 times as long, nor turn it around.
    growth = (along / length.clamp(min=torch.finfo(trend.dtype).tiny)).clamp(-1, 3) * (LENGTH * pace)
    return trend + RATE * a + foreach.expand(growth, of, 1) * trend
