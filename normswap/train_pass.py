"""The forward pass of a layer in train mode, and every gradient that comes of it, in one autograd.Function.

    z = (x - mean) / std
    y = weight z f + bias          f  1, or what `guard` multiplies each sample with

g is the gradient that comes back to y; < > sums over all places of all samples; each module says what its part of this is:

    weight, bias              <g z f>, <g>
    x                         weight f g / std, less the trend over std (`feedback`), and with what comes through f (`guard`)
    trend                     known - weight (<g z f>, <g f>): what is left of the gradient, along z and in the mean
    W, b of the producer      the same over std, as the gradients of std and mean, and with what comes through f (`coupling`)
    the statistics            those that are given: of the NLL, and of the input mean

One function reads x and g as few times as can be, and asks little of autograd: most of a layer's operators have one number per channel to
work on, so that their number is what they take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normswap import coupling, guard, numerics
from normswap.autograd import signed
from normswap.coupling import Coupled
from normswap.feedback import Lean
from normswap.guard import Held

Given = Sequence[tuple[Tensor, Tensor]]  # parameters, and the gradients that they get


class _Pass(torch.autograd.Function):
    """Plain tensors in and out, the context set up apart, and no Python state: so torch.compile and torch.func take it as it is.

    The tensors that are saved for backward, then what is no tensor, then parameters, and as many gradients that they are given.
    """

    generate_vmap_rule = True

    @staticmethod
    @signed
    def forward(
        x: Tensor,
        mean: Tensor,
        std: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        scale: Tensor | None,
        factor: Tensor | None,
        pull: Tensor | None,
        first: Tensor | None,
        second: Tensor | None,
        rows: Tensor | None,
        produced: Tensor | None,
        input_mean: Tensor | None,
        trend: Tensor | None,
        known: Tensor | None,
        lean: Tensor | None,
        axes: tuple[int, ...],
        shape: tuple[int, ...],
        samples: tuple[int, ...],
        coupled: tuple[int, bool, float] | None,
        *pairs: Tensor,
    ) -> Tensor:
        weight = None if weight is None else weight.view(shape)
        bias = None if bias is None else bias.view(shape)
        return numerics.applied(x, *numerics.affine_of(mean, std, weight, bias), factor, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        # The scale is read in backward, when the loss has been multiplied by it; if it has been changed since, autograd says so.
        tensors, (ctx.axes, ctx.shape, ctx.samples, ctx.coupled), pairs = inputs[:17], inputs[17:21], inputs[21:]
        # Without a weight to train nor anything else that is told what came along z, no gradient asks for x.
        asked = tensors[3] is not None or tensors[7] is not None or tensors[14] is not None or ctx.coupled is not None
        ctx.save_for_backward(tensors[0] if asked else None, *tensors[1:], *pairs[len(pairs) // 2 :])

    @staticmethod
    def backward(ctx: Any, by_y: Tensor | None) -> tuple[Tensor | None, ...]:
        x, mean, std, weight, bias, mask, scale, *rest = ctx.saved_tensors
        factor, pull, first, second, rows, produced, input_mean, trend, known, lean, *given = rest
        samples = ctx.samples
        if scale is not None:
            known, lean = (None if t is None else t * scale for t in (known, lean))
            given = [t * scale for t in given]
        if by_y is None:
            return *(None,) * 21, *given, *(None for _ in given)
        g, inverse = by_y.to(numerics.wide(by_y, std)), 1 / std
        w = None if weight is None else weight.view(ctx.shape)
        slope = inverse if w is None else w * inverse
        places = [axis for axis in range(g.dim()) if axis not in ctx.axes and axis not in samples]
        level = numerics.over(g, places)
        by_bias = None if bias is None else _like(bias, numerics.over(level, samples))
        if x is None:
            return (g * slope).to(by_y.dtype), *(None,) * 3, by_bias, *(None,) * 16, *given, *(None for _ in given)

        along = torch.addcmul(numerics.over(g * x, places), mean, level, value=-1) * inverse
        bend = by_mean = by_std = None
        if factor is not None:
            held = Held(factor, pull, first, second)
            if _is_differentiated():
                held, _ = guard.held(x, mean, std, samples, mask)
            by_factor = numerics.over(along if w is None else along * w, ctx.axes)
            bend, by_mean, by_std = guard.gradients(by_factor, held, std, samples)
            slope = slope * held.factor
            along, level = (numerics.over(t * held.factor, samples) for t in (along, level))
        by_weight = None if weight is None else _like(weight, along)

        by_trend = by_rows = by_produced = None
        if trend is not None or ctx.coupled is not None:
            left = torch.stack([along, level])
            left = (left if w is None else left * w).sum_to_size(2, *mean.shape)
            left = -left if known is None else known - left
            by_trend = None if trend is None else left.view(trend.shape)
            if ctx.coupled is not None:
                left = left * inverse
                by_std = left[0] if by_std is None else left[0] + by_std
                by_mean = left[1] if by_mean is None else left[1] + by_mean
                by_rows, by_produced = coupling.gradients(by_mean, by_std, mean, std, rows, produced, input_mean, *ctx.coupled)

        by_x = _by_x(g, slope, x, mean, bend, lean, mask) if ctx.needs_input_grad[0] else None
        own = by_x, None, None, by_weight, by_bias, *(None,) * 6, by_rows, by_produced, None, by_trend, *(None,) * 6
        return *own, *given, *(None for _ in given)


def _like(parameter: Tensor, t: Tensor) -> Tensor:
    return t.view(parameter.shape).to(parameter.dtype)


def _by_x(g: Tensor, slope: Tensor, x: Tensor, mean: Tensor, bend: Tensor | None, lean: Tensor | None, mask: Tensor | None) -> Tensor:
    """g slope, and where `mask` is (bend + lean[0]) (x - mean) + lean[1]."""
    if bend is None and lean is None:
        return (g * slope).to(x.dtype)
    if lean is not None:
        turn = lean[0] if bend is None else lean[0] + bend
        level = torch.addcmul(lean[1], mean, turn, value=-1)
    elif bend is not None:
        turn, level = bend, -mean * bend
    line = torch.addcmul(level, x, turn)
    return torch.addcmul(line if mask is None else torch.where(mask, line, 0), g, slope).to(x.dtype)


class _PassForward(_Pass):
    """The same, with a derivative in forward mode: a function that has one cannot be compiled."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _Pass.setup_context(ctx, inputs, output)
        ctx.set_materialize_grads(False)  # no tangent is None
        ctx.save_for_forward(*inputs[:4], inputs[5], *inputs[7:9])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        """Along x, weight and bias."""
        x, mean, std, weight, mask, factor, pull = ctx.saved_tensors
        along, by_mean, by_std, by_weight, by_bias, *others = tangents
        if any(t is not None for t in (by_mean, by_std, *others)):
            raise NotImplementedError("no forward-mode derivative of a BatchlessNorm in train mode by its statistics or its producer")
        z = (x - mean) / std
        held = z if factor is None else z * factor
        change = torch.zeros_like(z)
        if along is not None:
            change = along / std
            if factor is not None and pull is not None:
                turned = change * z if mask is None else torch.where(mask, change * z, 0)
                samples = ctx.samples
                change = change * factor + z * pull * numerics.over(turned, [a for a in range(x.dim()) if a not in samples])
            change = change if weight is None else change * weight.view(ctx.shape)
        if by_weight is not None:
            change = change + held * by_weight.view(ctx.shape)
        if by_bias is not None:
            change = change + by_bias.view(ctx.shape)
        return change.to(x.dtype)


def _is_differentiated() -> bool:
    """Whether the backward pass is itself differentiated, one way or the other."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def passed(
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    axes: Sequence[int],
    shape: Sequence[int],
    samples: Sequence[int] = (),
    held: Held | None = None,
    coupled: Coupled | None = None,
    lean: Lean | None = None,
    given: Given = (),
    mask: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """y. Once a gradient g comes back to it, all parameters get theirs, those of `given` times the scale, whatever g is.

    mean, std: without a history, broadcast against x; weight, bias: as they are, `shape` in those dimensions. axes: of the channels in x,
    none negative; samples: those of x that `held` has one factor each for. mask: what counts, broadcast against x. scale: a scalar that is
    read in backward, None for 1.
    """
    function = _Pass if torch.compiler.is_compiling() else _PassForward
    tensors = (x, mean, std, weight, bias, mask, scale, *(held or (None,) * 4), *(coupled or (None,) * 6)[:3], *(lean or (None,) * 3))
    options = tuple(axes), tuple(shape), tuple(samples), None if coupled is None else coupled[3:]
    parameters, gradients = ((t for t, _ in given), (by for _, by in given))
    return function.apply(*tensors, *options, *parameters, *gradients)  # type: ignore[no-any-return, no-untyped-call]
