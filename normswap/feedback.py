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

from typing import Any

import torch
from torch import Tensor

from normswap.autograd import signed

RATE, LENGTH = 0.1, 0.5


class _Leaned(torch.autograd.Function):
    """x, unchanged; its gradient less slope x + level."""

    generate_vmap_rule = True

    @staticmethod
    @signed
    def forward(x: Tensor, slope: Tensor, level: Tensor, counted: Tensor | None, scale: Tensor | None) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, slope, level, counted, scale = ctx.saved_tensors
        if scale is not None:
            slope, level = slope * scale, level * scale
        lean = torch.addcmul(level, slope, x)
        if counted is not None:
            lean = torch.where(counted, lean, 0)
        return (gradient - lean).to(x.dtype), None, None, None, None


class _LeanedForward(_Leaned):
    """The same, with a derivative in forward mode: a function that has one cannot be compiled."""

    @staticmethod
    def jvp(ctx: Any, along: Tensor, *_: Tensor | None) -> Tensor:
        return along.view_as(along)


class _Felt(torch.autograd.Function):
    """(scale, shift), unchanged; the trend gets the gradient that -n <r z> and -n <r> are, from those of scale and shift."""

    generate_vmap_rule = True

    @staticmethod
    @signed
    def forward(
        scale: Tensor,
        shift: Tensor,
        trend: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        std: Tensor,
        known: Tensor,
        factor: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return scale.clone(), shift.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, by_scale: Tensor, by_shift: Tensor) -> tuple[Tensor | None, ...]:
        weight, mean, std, known, factor = ctx.saved_tensors
        sums = torch.stack([(by_scale - mean * by_shift) / std, by_shift])
        if weight is not None:
            sums = sums * weight
        shared = [axis for axis, size in enumerate(known.shape) if size == 1]
        if shared:
            sums = sums.sum(shared, keepdim=True)
        return by_scale, by_shift, (known if factor is None else known * factor) - sums, *(None,) * 5


def leaned(x: Tensor, slope: Tensor, level: Tensor, *, counted: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """x, a view. A gradient that comes back to it loses (slope x + level) times scale, where `counted`.

    slope, level: broadcast against x; scale: a scalar that is read in backward, None for 1; counted: bool, None for everywhere.
    """
    function = _Leaned if torch.compiler.is_compiling() else _LeanedForward
    return function.apply(x, slope, level, counted, scale)  # type: ignore[no-any-return, no-untyped-call]


def felt(
    scale: Tensor,
    shift: Tensor,
    trend: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    std: Tensor,
    known: Tensor,
    *,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(scale, shift), fresh. Once their gradients are there, `trend` gets  known factor - (sum of g z, sum of g)  as its own.

    scale, shift, weight (None for 1): one number per channel; mean, std: those of z, broadcast against them. trend, known: (2, the shape
    of mean). factor: as `scale` of `leaned`.
    """
    return _Felt.apply(scale, shift, trend, weight, mean, std, known, factor)  # type: ignore[no-any-return, no-untyped-call]


def stepped(trend: Tensor, by_trend: Tensor, square: Tensor, pace: float = 1.0) -> Tensor:
    """The trend after one step. by_trend: its gradient; square: <z^2>, in the shape of the statistics; pace: of LENGTH, see `pace_of`."""
    missed = -by_trend / torch.stack([square.clamp(min=1), torch.ones_like(square)])
    channels = tuple(range(1, trend.dim()))
    along, length = ((other * trend).sum(channels, keepdim=True) for other in (missed, trend))
    # An outlier must not make it more than 2.5 times as long, nor turn it around.
    grown = (along / length.clamp(min=torch.finfo(trend.dtype).tiny)).clamp(-1, 3)
    return trend + RATE * missed + LENGTH * pace * grown * trend
