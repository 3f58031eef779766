r"""A limit on how large one sample may become while the statistics lag behind, in train mode.

    z = (x - mean) / std
    y = weight z f + bias       f = min(1, LIMIT / sqrt(<z^2>))       < > over all channels and places of one sample

with the gradient through f. What lies on the axes before that of the channels is one sample after the other. After a step the statistics of
a layer are late, the input of the next layer is too large, and its own are late as well: in a deep network that multiplies from layer to
layer. Here no layer passes on more than LIMIT, at once and not some steps later, and a sample still sees itself only. Where the statistics
fit, <z^2> is about 1, and only an unusual sample is held. Before the first step nothing is late, and none is held; nor is any in eval mode.

Source: the layer scaling of Online Normalization, Chiley et al. arXiv:1905.05894, as a limit, so that it is not there where it is not
needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from normswap.layer import formulas

LIMIT = 1.2


class Held(NamedTuple):
    """factor: f of each sample, with the sizes of the axes of samples and 1 elsewhere. pull: what df is along z dz, summed: 0 where f is 1.

    first, second: the `formulas.sums` of each sample, which the gradients by mean and std ask for.
    """

    factor: Tensor
    pull: Tensor
    first: Tensor | None
    second: Tensor | None


def held(x: Tensor, mean: Tensor, std: Tensor, samples: Sequence[int], counted: Tensor | None = None) -> tuple[Held, formulas.Sums]:
    """What is held of each sample, and the `formulas.sums` of x over all samples.

        f = LIMIT / sqrt(<z^2>) where that is below 1,  df = -f / <z^2> <z dz>

    x: any shape, any float dtype; mean, std: as many dimensions, broadcast against it. samples: the axes along which x has one sample after
    the other. counted: bool, broadcast against x; None for everywhere. Differentiable in x.
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
    square = formulas.over(second / std.square(), others) / size
    large = square.clamp(min=LIMIT**2)
    factor = LIMIT * large.rsqrt()
    pull = (square > LIMIT**2) * factor / (large * -size)
    return Held(factor, pull, first, second), (formulas.over(first, samples), formulas.over(second, samples), number)


def gradients(by_factor: Tensor, held: Held, std: Tensor, samples: Sequence[int]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(what x - mean is multiplied by in the gradient by x, the gradients by mean, by std) of a function of f.

        by x     by_f df/dx = by_f pull (x - mean) / std^2          by mean     the sum of -that          by std     of -z of that

    None where the sums of the samples are not there.
    """
    bend = by_factor * held.pull / std.square()
    if held.first is None or held.second is None:
        return bend, None, None
    return bend, -formulas.over(bend * held.first, samples), -formulas.over(bend * held.second, samples) / std
