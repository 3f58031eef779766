"""The forward pass of a layer in train mode, and every gradient that comes of it, in one autograd.Function.

    z = (x - mean) / std
    y = weight z f + bias          f  1, or the factor of each sample, see `sample_limit`

g is the gradient that comes back to y, and < > sums over all places of all samples. The gradients are, each explained in the module in ( ):

    weight, bias              <g z f>, <g>
    x                         weight f g / std, less the trend over std (`gradient_trend`), and with what comes through f (`sample_limit`)
    trend                     known - weight (<g z f>, <g f>): what is left of the gradient, along z and in the mean
    W, b of the producer      the same over std, as the gradients of std and mean, and with what comes through f (`coupling`)
    the statistics            the gradients that are given: of the NLL, and of the input mean

One function reads x and g as few times as possible, and leaves few operators to autograd: most operators of a layer work on one number per
channel, where an operator takes the same time however many channels there are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normswap.layer import coupling, formulas, sample_limit
from normswap.layer.coupling import Constants, Coupled
from normswap.layer.fsdp import is_part
from normswap.layer.sample_limit import Limit

Given = Sequence[tuple[Tensor, Tensor]]  # parameters, and the gradients that they get
Static = TypeVar("Static", bound=Callable[..., Any])


def signed(forward: Static) -> Static:
    """The `forward` of an autograd.Function with its signature stored: `apply` asks for it at each call, and finding it takes longest."""
    forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return forward


class Tensors(NamedTuple):
    """The tensors of a pass, in the order in which autograd gets them. None for each that does not apply.

    mean, std      detached, broadcast against x; weight, bias: in the shape of the parameters
    mask           where x counts, broadcast against x
    scale          of the loss, a scalar that is read in backward; None for 1
    """

    x: Any
    mean: Any
    std: Any
    weight: Tensor | None
    bias: Tensor | None
    mask: Tensor | None
    scale: Tensor | None
    factor: Tensor | None  # these four: `sample_limit.Limit`
    d_factor: Any
    first: Any
    second: Any
    rows: Any  # these three: `coupling.Coupled`
    producer_bias: Tensor | None
    input_mean: Any
    trend: Tensor | None  # these three: `gradient_trend.TrendTerm`
    known: Any
    trend_by_x: Any


class Options(NamedTuple):
    """The numbers of a pass.

    axes      of the channels in x, none negative; shape: that of weight and bias, to broadcast them against x
    samples   the axes of x that index samples, see `sample_limit`
    coupled   the constants of `coupling.Coupled`, None if the layer is not coupled
    """

    axes: tuple[int, ...]
    shape: tuple[int, ...]
    samples: tuple[int, ...]
    coupled: Constants | None


TENSORS, OPTIONS = len(Tensors._fields), len(Options._fields)


def apply(tensors: Tensors, options: Options, given: Given) -> Tensor:
    """y. When a gradient g comes back to y, all parameters get gradients; those in `given` get theirs times the scale, whatever g is."""
    function = _Pass if torch.compiler.is_compiling() else _PassForward
    return function.apply(*tensors, *options, *(t for t, _ in given), *(by for _, by in given))  # type: ignore[no-any-return, no-untyped-call]


class _Pass(torch.autograd.Function):
    """The pass, as torch.compile and torch.func take it: plain tensors in and out, a `setup_context`, and no Python state.

    Its inputs are the fields of `Tensors`, those of `Options`, then the parameters of `given`, and as many gradients.
    """

    generate_vmap_rule = True

    @staticmethod
    @signed
    def forward(*inputs: Any) -> Tensor:
        t, options = Tensors(*inputs[:TENSORS]), Options(*inputs[TENSORS:][:OPTIONS])
        weight, bias = (None if each is None else each.view(options.shape) for each in (t.weight, t.bias))
        scale, shift = formulas.affine_of(t.mean, t.std, weight, bias)
        if not _is_compiled(t.x, options):
            return formulas.applied(t.x, scale, shift, t.factor, bias)
        if t.factor is not None:
            scale, shift = scale * t.factor, torch.lerp(torch.zeros_like(shift) if bias is None else bias, shift, t.factor)
        return formulas.applied(t.x, *_stored(scale, shift))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        t, options, pairs = Tensors(*inputs[:TENSORS]), Options(*inputs[TENSORS:][:OPTIONS]), inputs[TENSORS + OPTIONS :]
        # x is saved only if something needs the gradient along z: a trained weight, the sample limit, the trend or the producer.
        asked = (
            ctx.needs_input_grad[Tensors._fields.index("weight")]
            or t.factor is not None
            or t.trend is not None
            or options.coupled is not None
        )
        # The scale is saved, not read, as the loss is multiplied by it later. If it is changed before backward, autograd raises an error.
        t = t._replace(x=t.x if asked else None)
        t = t if options.coupled is not None else t._replace(first=None, second=None)  # which may be as large as x
        ctx.save_for_backward(*t, *pairs[len(pairs) // 2 :])
        ctx.options = options

    @staticmethod
    def backward(ctx: Any, by_y: Tensor | None) -> tuple[Tensor | None, ...]:
        options: Options = ctx.options
        saved = ctx.saved_tensors  # read once, as a checkpoint refuses a second time
        t, given = Tensors(*saved[:TENSORS]), saved[TENSORS:]
        given = given if t.scale is None else [each * t.scale for each in given]
        by: dict[str, Tensor | None] = {} if by_y is None else _backward(t, options, by_y, by_x=ctx.needs_input_grad[0])
        return *(by.get(name) for name in Tensors._fields), *(None,) * OPTIONS, *given, *(None for _ in given)


def _backward(t: Tensors, options: Options, by_y: Tensor, *, by_x: bool) -> dict[str, Tensor | None]:
    """The gradients by the inputs of y, by name, for the gradient by y; by_x: whether to compute the one by x."""
    x, samples = t.x, options.samples
    mean, std, limit = _differentiable(t, options) if _is_differentiated() else (t.mean, t.std, _limit(t))
    g, inverse = by_y.to(formulas.wide(by_y, std)), 1 / std
    weight = None if t.weight is None else t.weight.view(options.shape)
    gain = inverse if weight is None else weight * inverse
    places = [axis for axis in range(g.dim()) if axis not in options.axes and axis not in samples]
    if x is None:  # then there is no limit either
        by_bias = None if t.bias is None else _like(t.bias, formulas.over(g, places))
        return {"x": (g * gain).to(by_y.dtype) if by_x else None, "bias": by_bias}

    level = formulas.over(g, places)
    by = {"bias": None if t.bias is None else _like(t.bias, formulas.over(level, samples))}
    # x may be anything where the mask is False, NaN included. So where g is 0 the product has to be 0.
    product = g * x if t.mask is None else torch.where(g == 0, 0, g * x)
    along = torch.addcmul(formulas.over(product, places), mean, level, value=-1) * inverse
    limit_slope = by_mean = by_std = None
    if limit is not None:
        by_factor = formulas.over(along if weight is None else along * weight, options.axes)
        limit_slope, by_mean, by_std = sample_limit.gradients(by_factor, limit, std, samples)
        gain = gain * limit.factor
        along, level = (formulas.over(each * limit.factor, samples) for each in (along, level))
    by["weight"] = None if t.weight is None else _like(t.weight, along)

    trend_by_x = t.trend_by_x if t.trend_by_x is None or t.scale is None else t.trend_by_x * t.scale
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
            by["rows"], by["producer_bias"] = _by_producer(by_mean, by_std, mean, std, _coupled(t, options.coupled))
    if by_x:
        line = _line(mean, limit_slope, trend_by_x)
        if line is not None and _is_compiled(g, options):
            gain, *line = _stored(gain, *line)
        by["x"] = _by_x(g, gain, t, line)
    return by


def _coupled(t: Tensors, constants: Constants) -> Coupled:
    return Coupled(t.rows, t.producer_bias, t.input_mean, constants)


def _limit(t: Tensors) -> Limit | None:
    return None if t.factor is None else Limit(t.factor, t.d_factor, t.first, t.second)


def _differentiable(t: Tensors, options: Options) -> tuple[Tensor, Tensor, Limit | None]:
    """(mean, std, the limit) with the same values, computed from x, W and b, so that the backward pass can be differentiated."""
    mean, std = t.mean, t.std
    if options.coupled is not None:
        mean, std = coupling.written_out(mean, std, _coupled(t, options.coupled))
    limit = None if t.factor is None else sample_limit.limit(t.x, mean, std, options.samples, t.mask)[0]
    return mean, std, limit


def _like(parameter: Tensor, t: Tensor) -> Tensor:
    return t.view(parameter.shape).to(parameter.dtype)


def _line(mean: Tensor, limit_slope: Tensor | None, trend: Tensor | None) -> Sequence[Tensor] | None:
    """(slope, level) of what the gradient by x has besides g gain:  slope x + level = (limit_slope + trend[0]) (x - mean) + trend[1]."""
    if trend is not None:
        slope = trend[0] if limit_slope is None else trend[0] + limit_slope
        return slope, torch.addcmul(trend[1], mean, slope, value=-1)
    return None if limit_slope is None else (limit_slope, -mean * limit_slope)


def _by_x(g: Tensor, gain: Tensor, t: Tensors, line: Sequence[Tensor] | None) -> Tensor:
    """The gradient by x: g gain, and where the mask is slope x + level."""
    if line is None:
        return (g * gain).to(t.x.dtype)
    slope, level = line
    value = torch.addcmul(level, t.x, slope)
    return torch.addcmul(value if t.mask is None else torch.where(t.mask, value, 0), g, gain).to(t.x.dtype)


# --- in compiled graphs -----------------------------------------------------------------------------------------------------------------


def _is_compiled(x: Tensor, options: Options) -> bool:
    """Whether a compiler looks, and there are several places for each number per sample and channel."""
    return torch.compiler.is_compiling() and x.dim() > len({*options.axes, *options.samples})


def _stored(*numbers: Tensor) -> tuple[Tensor, ...]:
    """The same, computed once: inductor would compute a quotient again for each element that it is multiplied with.

    It stores the result of a cumulative sum, here of one summand.
    """
    return torch.stack(torch.broadcast_tensors(*numbers))[None].cumsum(0)[0].unbind()  # type: ignore[no-untyped-call]


def _by_producer(by_mean: Tensor, by_std: Tensor, mean: Tensor, std: Tensor, coupled: Coupled) -> tuple[Tensor, Tensor | None]:
    """`coupling.gradients`. In a compiled graph in one more dimension, so that its loops go along W as it lies in memory."""
    rows, bias, input_mean, (groups, eps) = coupled
    if not torch.compiler.is_compiling() or is_part(rows):
        return coupling.gradients(by_mean, by_std, mean, std, coupled)
    by_mean, by_std, mean, std = (t.flatten() for t in (by_mean, by_std, mean, std))
    a = input_mean.view(groups, 1, -1, 1)
    weight = rows.view(groups, -1, a.shape[2], rows.shape[1] // a.shape[2])  # (groups, outputs, inputs, positions of the kernel)
    output_mean, weight_norm = (weight * a).sum((2, 3)).flatten(), weight.square().sum((2, 3)).sqrt().flatten()
    output_mean = output_mean if bias is None else output_mean + bias.to(output_mean.dtype)
    along = torch.addcmul(by_std * std, by_mean, mean - output_mean)
    radial = along * coupling.over_square(coupling.alive(std, weight_norm, eps), weight_norm)
    level, slope = (t.view(groups, -1, 1, 1) for t in _stored(by_mean, radial))
    return torch.addcmul(level * a, slope, weight).view(rows.shape), None if bias is None else by_mean.to(bias.dtype)


class _PassForward(_Pass):
    """The pass with a derivative in forward mode. It has a class of its own, as torch.compile takes no autograd.Function with a jvp."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _Pass.setup_context(ctx, inputs, output)
        ctx.set_materialize_grads(False)  # the tangent of an input that has none is None then
        ctx.save_for_forward(*inputs[:TENSORS])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        """The derivative along x, weight and bias."""
        t, by = Tensors(*ctx.saved_tensors), Tensors(*tangents[:TENSORS])
        if any(tangent is not None for tangent in (*by._replace(x=None, weight=None, bias=None), *tangents[TENSORS:])):
            raise NotImplementedError("no forward-mode derivative of a BatchlessNorm in train mode by its statistics or its producer")
        shape, samples = ctx.options.shape, ctx.options.samples
        mean, std, limit = _differentiable(t, ctx.options)
        z = (t.x - mean) / std
        change = torch.zeros_like(z)
        if by.x is not None:
            change = by.x / std
            if limit is not None:
                product = change * z if t.mask is None else torch.where(t.mask, change * z, 0)
                d_factor = limit.d_factor * formulas.over(product, [axis for axis in range(z.dim()) if axis not in samples])
                change = change * limit.factor + z * d_factor
            change = change if t.weight is None else change * t.weight.view(shape)
        if by.weight is not None:
            change = change + (z if limit is None else z * limit.factor) * by.weight.view(shape)
        if by.bias is not None:
            change = change + by.bias.view(shape)
        return change.to(t.x.dtype)


def _is_differentiated() -> bool:
    """Whether the backward pass is itself differentiated, in reverse or in forward mode."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0
