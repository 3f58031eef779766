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

from normswap.layer import coupling, formulas, sample_limit
from normswap.layer.autograd import signed
from normswap.layer.coupling import Coupled, How
from normswap.layer.gradient_trend import Lean
from normswap.layer.sample_limit import Held

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
    factor: Tensor | None  # these four: `sample_limit.Held`
    pull: Any
    first: Any
    second: Any
    rows: Any  # these three: `coupling.Coupled`
    producer_bias: Tensor | None
    input_mean: Any
    trend: Tensor | None  # these three: `feedback.Lean`
    known: Any
    lean: Any


class _Options(NamedTuple):
    """What else it takes, see `passed`."""

    axes: tuple[int, ...]
    shape: tuple[int, ...]
    samples: tuple[int, ...]
    how: How | None  # of `coupling.Coupled`


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
        return formulas.applied(t.x, *formulas.affine_of(t.mean, t.std, weight, bias), t.factor, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        t, options, pairs = _Tensors(*inputs[:TENSORS]), _Options(*inputs[TENSORS:][:OPTIONS]), inputs[TENSORS + OPTIONS :]
        # Without a weight that is trained, or anything else that is told what came along z, no gradient asks for x.
        asked = (
            ctx.needs_input_grad[_Tensors._fields.index("weight")] or t.factor is not None or t.trend is not None or options.how is not None
        )
        # The scale is read in backward, when the loss has been multiplied by it; if it has been changed since, autograd says so.
        t = t._replace(x=t.x if asked else None)
        t = t if options.how is not None else t._replace(first=None, second=None)  # which may be as large as x
        ctx.save_for_backward(*t, *pairs[len(pairs) // 2 :])
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
    x, samples = t.x, options.samples
    mean, std, held = _differentiable(t, options) if _is_differentiated() else (t.mean, t.std, _held(t))
    g, inverse = by_y.to(formulas.wide(by_y, std)), 1 / std
    weight = None if t.weight is None else t.weight.view(options.shape)
    slope = inverse if weight is None else weight * inverse
    places = [axis for axis in range(g.dim()) if axis not in options.axes and axis not in samples]
    if x is None:  # nor is anything held then
        by_bias = None if t.bias is None else _like(t.bias, formulas.over(g, places))
        return {"x": (g * slope).to(by_y.dtype) if by_x else None, "bias": by_bias}

    level = formulas.over(g, places)
    by = {"bias": None if t.bias is None else _like(t.bias, formulas.over(level, samples))}
    # What does not count may be anything, NaN included; so where no gradient comes to it, none is to come of it.
    product = g * x if t.mask is None else torch.where(g == 0, 0, g * x)
    along = torch.addcmul(formulas.over(product, places), mean, level, value=-1) * inverse
    bend = by_mean = by_std = None
    if held is not None:
        by_factor = formulas.over(along if weight is None else along * weight, options.axes)
        bend, by_mean, by_std = sample_limit.gradients(by_factor, held, std, samples)
        slope = slope * held.factor
        along, level = (formulas.over(each * held.factor, samples) for each in (along, level))
    by["weight"] = None if t.weight is None else _like(t.weight, along)

    lean = t.lean if t.lean is None or t.scale is None else t.lean * t.scale
    if t.trend is not None or options.how is not None:
        left = torch.stack([along, level])
        left = (left if weight is None else left * weight).sum_to_size(2, *mean.shape)
        known = t.known if t.known is None or t.scale is None else t.known * t.scale
        left = -left if known is None else known - left
        by["trend"] = None if t.trend is None else left.view(t.trend.shape)
        if options.how is not None:
            left = left * inverse
            by_std = left[0] if by_std is None else left[0] + by_std
            by_mean = left[1] if by_mean is None else left[1] + by_mean
            by["rows"], by["producer_bias"] = coupling.gradients(by_mean, by_std, mean, std, *_coupled(t), options.how)
    if by_x:
        by["x"] = _by_x(g, slope, x, mean, bend, lean, t.mask)
    return by


def _coupled(t: _Tensors) -> tuple[Tensor, Tensor | None, Tensor]:
    return t.rows, t.producer_bias, t.input_mean


def _held(t: _Tensors) -> Held | None:
    return None if t.factor is None else Held(t.factor, t.pull, t.first, t.second)


def _differentiable(t: _Tensors, options: _Options) -> tuple[Tensor, Tensor, Held | None]:
    """(mean, std, what is held), the values unchanged, as functions of x, W and b: for a derivative of a derivative."""
    mean, std = t.mean, t.std
    if options.how is not None:
        mean, std = coupling.written_out(mean, std, *_coupled(t), options.how)
    held = None if t.factor is None else sample_limit.held(t.x, mean, std, options.samples, t.mask)[0]
    return mean, std, held


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
        mean, std, held = _differentiable(t, ctx.options)
        z = (t.x - mean) / std
        change = torch.zeros_like(z)
        if by.x is not None:
            change = by.x / std
            if held is not None:
                turned = change * z if t.mask is None else torch.where(t.mask, change * z, 0)
                bent = held.pull * formulas.over(turned, [axis for axis in range(z.dim()) if axis not in samples])
                change = change * held.factor + z * bent
            change = change if t.weight is None else change * t.weight.view(shape)
        if by.weight is not None:
            change = change + (z if held is None else z * held.factor) * by.weight.view(shape)
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
    guards, couples, leans = held or (None,) * 4, coupled[:3] if coupled else (None,) * 3, lean or (None,) * 3
    tensors = _Tensors(x, mean, std, weight, bias, mask, scale, *guards, *couples, *leans)
    options = _Options(tuple(axes), tuple(shape), tuple(samples), coupled.how if coupled else None)
    return function.apply(*tensors, *options, *(t for t, _ in given), *(by for _, by in given))  # type: ignore[no-any-return, no-untyped-call]
