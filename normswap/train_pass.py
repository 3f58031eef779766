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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normswap import coupling, guard, numerics
from normswap.autograd import signed
from normswap.coupling import Coupled
from normswap.feedback import Lean
from normswap.guard import Held

Given = Sequence[tuple[Tensor, Tensor]]  # parameters, and the gradients that they get


class _Tensors(NamedTuple):
    """What a pass takes and backward needs, in the order in which autograd gets them. None for what there is not."""

    x: Any
    mean: Any
    std: Any
    weight: Tensor | None
    bias: Tensor | None
    mask: Tensor | None
    scale: Tensor | None
    factor: Tensor | None  # these four: `guard.Held`
    pull: Any
    first: Any
    second: Any
    rows: Any  # these three: `coupling.Coupled`
    produced: Tensor | None
    input_mean: Any
    trend: Tensor | None  # these three: `feedback.Lean`
    known: Any
    lean: Any


class _Options(NamedTuple):
    """What else it takes. samples: the axes of x that there is a factor each for; coupled: what `coupling.gradients` takes besides."""

    axes: tuple[int, ...]
    shape: tuple[int, ...]
    samples: tuple[int, ...]
    coupled: tuple[int, bool, float] | None


TENSORS, OPTIONS = len(_Tensors._fields), len(_Options._fields)


class _Pass(torch.autograd.Function):
    """Plain tensors in and out, the context set up apart, and no Python state: so torch.compile and torch.func take it as it is.

    `_Tensors`, `_Options`, then parameters, and as many gradients that they are given.
    """

    generate_vmap_rule = True

    @staticmethod
    @signed
    def forward(*inputs: Any) -> Tensor:
        t, shape = _Tensors(*inputs[:TENSORS]), _Options(*inputs[TENSORS:][:OPTIONS]).shape
        weight, bias = (None if each is None else each.view(shape) for each in (t.weight, t.bias))
        return numerics.applied(t.x, *numerics.affine_of(t.mean, t.std, weight, bias), t.factor, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        t, options, pairs = _Tensors(*inputs[:TENSORS]), _Options(*inputs[TENSORS:][:OPTIONS]), inputs[TENSORS + OPTIONS :]
        # Without a weight that is trained, or anything else that is told what came along z, no gradient asks for x.
        asked = (
            ctx.needs_input_grad[_Tensors._fields.index("weight")]
            or t.factor is not None
            or t.trend is not None
            or options.coupled is not None
        )
        # The scale is read in backward, when the loss has been multiplied by it; if it has been changed since, autograd says so.
        ctx.save_for_backward(t.x if asked else None, *t[1:], *pairs[len(pairs) // 2 :])
        ctx.options = options

    @staticmethod
    def backward(ctx: Any, by_y: Tensor | None) -> tuple[Tensor | None, ...]:
        options: _Options = ctx.options
        saved = ctx.saved_tensors  # once, as a checkpoint hands them out once
        t, given = _Tensors(*saved[:TENSORS]), saved[TENSORS:]
        given = given if t.scale is None else [each * t.scale for each in given]
        by: dict[str, Tensor | None] = {} if by_y is None else _backward(t, options, by_y, by_x=ctx.needs_input_grad[0])
        return *(by.get(name) for name in _Tensors._fields), *(None,) * OPTIONS, *given, *(None for _ in given)


def _backward(t: _Tensors, options: _Options, by_y: Tensor, *, by_x: bool) -> dict[str, Tensor | None]:
    """The gradients of y's inputs, for the gradient of y; by_x: whether that by x is asked for."""
    x, mean, std, samples = t.x, t.mean, t.std, options.samples
    g, inverse = by_y.to(numerics.wide(by_y, std)), 1 / std
    weight = None if t.weight is None else t.weight.view(options.shape)
    slope = inverse if weight is None else weight * inverse
    places = [axis for axis in range(g.dim()) if axis not in options.axes and axis not in samples]
    level = numerics.over(g, places)
    by = {"bias": None if t.bias is None else _like(t.bias, numerics.over(level, samples))}
    if x is None:
        return {**by, "x": (g * slope).to(by_y.dtype)}

    along = torch.addcmul(numerics.over(g * x, places), mean, level, value=-1) * inverse
    bend = by_mean = by_std = None
    if t.factor is not None:
        held = Held(t.factor, t.pull, t.first, t.second)
        if _is_differentiated():
            held, _ = guard.held(x, mean, std, samples, t.mask)
        by_factor = numerics.over(along if weight is None else along * weight, options.axes)
        bend, by_mean, by_std = guard.gradients(by_factor, held, std, samples)
        slope = slope * held.factor
        along, level = (numerics.over(each * held.factor, samples) for each in (along, level))
    by["weight"] = None if t.weight is None else _like(t.weight, along)

    lean = t.lean if t.lean is None or t.scale is None else t.lean * t.scale
    if t.trend is not None or options.coupled is not None:
        left = torch.stack([along, level])
        left = (left if weight is None else left * weight).sum_to_size(2, *mean.shape)
        known = t.known if t.known is None or t.scale is None else t.known * t.scale
        left = -left if known is None else known - left
        by["trend"] = None if t.trend is None else left.view(t.trend.shape)
        if options.coupled is not None:
            left = left * inverse
            by_std = left[0] if by_std is None else left[0] + by_std
            by_mean = left[1] if by_mean is None else left[1] + by_mean
            of = t.rows, t.produced, t.input_mean
            by["rows"], by["produced"] = coupling.gradients(by_mean, by_std, mean, std, *of, *options.coupled)
    if by_x:
        by["x"] = _by_x(g, slope, x, mean, bend, lean, t.mask)
    return by


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
        ctx.set_materialize_grads(False)  # so that no tangent is None
        ctx.save_for_forward(*inputs[:TENSORS])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        """Along x, weight and bias."""
        t, by = _Tensors(*ctx.saved_tensors), _Tensors(*tangents[:TENSORS])
        if any(tangent is not None for tangent in (*by._replace(x=None, weight=None, bias=None), *tangents[TENSORS:])):
            raise NotImplementedError("no forward-mode derivative of a BatchlessNorm in train mode by its statistics or its producer")
        shape, samples = ctx.options.shape, ctx.options.samples
        z = (t.x - t.mean) / t.std
        change = torch.zeros_like(z)
        if by.x is not None:
            change = by.x / t.std
            if t.factor is not None:
                turned = change * z if t.mask is None else torch.where(t.mask, change * z, 0)
                bent = t.pull * numerics.over(turned, [axis for axis in range(z.dim()) if axis not in samples])
                change = change * t.factor + z * bent
            change = change if t.weight is None else change * t.weight.view(shape)
        if by.weight is not None:
            change = change + (z if t.factor is None else z * t.factor) * by.weight.view(shape)
        if by.bias is not None:
            change = change + by.bias.view(shape)
        return change.to(t.x.dtype)


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
    tensors = _Tensors(
        x, mean, std, weight, bias, mask, scale, *(held or (None,) * 4), *(coupled or (None,) * 6)[:3], *(lean or (None,) * 3)
    )
    options = _Options(tuple(axes), tuple(shape), tuple(samples), None if coupled is None else coupled[3:])
    return function.apply(*tensors, *options, *(t for t, _ in given), *(by for _, by in given))  # type: ignore[no-any-return, no-untyped-call]
