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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normswap import numerics
from normswap.autograd import signed

LIMIT = 1.2


class _MeanSquare(torch.autograd.Function):
    """<z^2> of each sample, and the sums of the deviations per sample and channel. It saves x as it came, which others save too."""

    generate_vmap_rule = True

    @staticmethod
    @signed
    def forward(
        x: Tensor, mean: Tensor, std: Tensor, counted: Tensor | None, samples: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        first, second, number = numerics.sums(x, mean, counted, kept=samples)
        return _each(second / std.square(), samples) / _each(number, samples).clamp(min=1), first, second, number

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:4], *output[1:])
        ctx.samples = inputs[4]
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, std, counted, first, second, number = ctx.saved_tensors
        slope = 2 * gradient / _each(number, ctx.samples).clamp(min=1) / std.square()
        by_mean, by_std = -(slope * first).sum_to_size(mean.shape), -(slope * second / std).sum_to_size(std.shape)
        by = torch.addcmul(-mean * slope, x, slope)
        return (by if counted is None else torch.where(counted, by, 0)).to(x.dtype), by_mean, by_std, None, None


class _MeanSquareForward(_MeanSquare):
    """The same, with a derivative in forward mode: a function that has one cannot be compiled."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _MeanSquare.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:4], *output[1:])

    @staticmethod
    def jvp(ctx: Any, along: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """Along x; mean and std have no tangent, as those of parameters end at the term (`injection`)."""
        x, mean, std, counted, _, _, number = ctx.saved_tensors
        change = 2 * (x - mean) * along / std.square()
        change = change if counted is None else torch.where(counted, change, 0)
        return _each(change, ctx.samples) / _each(number, ctx.samples).clamp(min=1), None, None, None


def _each(t: Tensor, samples: Sequence[int]) -> Tensor:
    """The sum of each sample, with size 1 on all other axes."""
    return t.sum([axis for axis in range(t.dim()) if axis not in samples], keepdim=True)


def factor(x: Tensor, mean: Tensor, std: Tensor, samples: Sequence[int], counted: Tensor | None = None) -> tuple[Tensor, numerics.Sums]:
    """f of each sample, with the gradients by x, mean and std; and the `numerics.sums` of x over all samples.

    x: any shape, any float dtype; mean, std: as many dimensions, broadcast against it. samples: the axes along which x has one sample after
    the other; f has their sizes, and 1 elsewhere. counted: bool, broadcast against x; None for everywhere.
    """
    function = _MeanSquare if torch.compiler.is_compiling() else _MeanSquareForward
    square, *sums = function.apply(x, mean, std, counted, tuple(samples))  # type: ignore[no-untyped-call]
    first, second, number = (t.sum(list(samples), keepdim=True) if samples else t for t in sums)
    return LIMIT * square.clamp(min=LIMIT**2).rsqrt(), (first, second, number)
