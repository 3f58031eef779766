"""What a pass of a pair reads per channel, computed for all layers together: between two optimizer steps it stays the same.

    z = alpha x + delta        x: an output of the convolution, see `pair`; alpha and delta are 0 where x does not tell z

Most operators of a layer work on one number per channel, where an operator takes the same time however many there are. So `prepare`
computes the rows of all layers at once, after a step. `of` gives them to a pass, and computes them for a layer whose tensors have changed
since.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normswap.layer import coupling, following, foreach, formulas
from normswap.layer.following import Anchor, Mark, mark
from normswap.layer.fsdp import is_part

STEPS = 16  # z = u / STEPS, where u is an integer from -128 to 127
ENDLESS = 1e10  # stands for |W| of a dead filter, as nothing along W is taken out of its gradient


class Forward(NamedTuple):
    """The rows for the forward pass.

    k, shift            of the convolution
    to_kept, kept_level z as it is kept for backward is to_kept x + kept_level             zero, one: these
    square, level       <z^2> of a sample is the sum of square (<x>, <x^2>) over channels (C, 2), plus level, a scalar; both over C
    """

    k: Tensor
    shift: Tensor
    to_kept: Tensor
    kept_level: Tensor
    zero: Tensor
    one: Tensor
    square: Tensor
    level: Tensor


class Backward(NamedTuple):
    """The rows for the backward pass, which has <x> and <x^2>, h, and p: <G, W> / |W| if the weight is scaled, else the sum of r z.

    k                   of the convolution
    norm, k_norm        |W| of a filter that is alive, else ENDLESS; times k if the weight is scaled
    by_h, by_p          (the sum of r z, -gamma times it, -gamma h), (3, C), is by_h h, plus by_p p in the first two
    by_level, by_first, by_second   (by_mean, by_parameter, of_trend), (3, C), is by_level + by_first <x>, plus by_second <x^2> in the last
                        two: the gradients of the statistics, and what the gradient by the norm's weight has beyond the sum of r z
    inverse             1 over the norm's weight, 0 where it is 0
    trend               (slope, level), (2, C): the trend over -gamma, for z as it is kept
    of_gamma, of_inverse   gamma and 1 over gamma, for z as it is kept         zero, one: these
    a                   the mean input of the producer, see `producer.spread`
    z_level, z_first, z_second   (z^2, z), (C, 2), is z_level + z_first x, plus z_second x^2 in the first
    """

    k: Tensor
    norm: Tensor
    k_norm: Tensor
    by_h: Tensor
    by_p: Tensor
    by_level: Tensor
    by_first: Tensor
    by_second: Tensor
    inverse: Tensor
    trend: Tensor
    of_gamma: Tensor
    of_inverse: Tensor
    zero: Tensor
    one: Tensor
    z_level: Tensor
    z_first: Tensor
    z_second: Tensor
    a: Tensor


class Options(NamedTuple):
    """What the rows depend on besides tensors: the dtype of y, and whether its output is scaled and not its weight, see `pair.is_heavy`."""

    dtype: torch.dtype
    heavy: bool


class Prepared(NamedTuple):
    """The rows of a layer, and what they were computed from."""

    anchor: Anchor
    marks: tuple[Mark, ...]
    options: Options
    forward: Forward
    backward: Backward


def bits(options: Options, dtype: torch.dtype) -> bool:
    """Whether z is kept in 8 bits. dtype: of the statistics."""
    return not options.heavy and dtype != torch.float64


def of(layer: Any, options: Options) -> Prepared:
    """The rows of a layer, for a pass in train mode."""
    anchor = following.anchor_of(layer)
    known: Prepared | None = layer.run.prepared
    if known is not None and known.anchor is anchor and known.options == options and known.marks == _marks(layer):
        return known
    (found,) = _computed([layer], [anchor], options)
    layer.run.prepared = found
    return found


def prepare(layers: Iterable[Any]) -> None:
    """Compute the rows of these layers, as far as they had rows: after a step, for the passes until the next one.

    A layer of which there is a part here gets its rows in its passes, which have the whole.
    """
    had = [layer for layer in layers if layer.run.prepared is not None]
    ready = [layer for layer in had if layer.run.anchor is not None and not is_part(layer.mean)]
    for alike in foreach.group_by(ready, _kind):
        anchors = [layer.run.anchor for layer in alike]
        for layer, found in zip(alike, _computed(alike, anchors, alike[0].run.prepared.options), strict=True):
            layer.run.prepared = found


def _kind(layer: Any) -> tuple[Any, ...]:
    options, bias = layer.run.prepared.options, layer.producer_in_training.bias
    return layer.std, layer._eps, layer.weight is None, layer.trend is None, bias is None, options, following.kind_of(layer.mean)


def _marks(layer: Any) -> tuple[Mark, ...]:
    """Of weight, bias and trend; the anchor has those of the others."""
    return tuple(mark(t) for t in (layer.weight, layer.bias, layer.trend) if t is not None)


@torch.no_grad()
def _computed(layers: list[Any], anchors: list[Anchor], options: Options) -> list[Prepared]:
    """The rows of layers of one kind."""
    first, means = layers[0], [layer.mean for layer in layers]
    mean, parameter = foreach.stack(means), foreach.stack([layer.std_parameter for layer in layers])
    std = formulas.std_of(parameter, first.std)
    inverse_std, dtype = 1 / std, std.dtype
    gamma = torch.ones_like(std) if first.weight is None else foreach.stack([layer.weight for layer in layers])
    zero = torch.zeros_like(std)
    beta = zero if first.bias is None else foreach.stack([layer.bias for layer in layers])
    output_mean, weight_norm = (foreach.stack([getattr(each, name) for each in anchors]) for name in ("output_mean", "weight_norm"))
    producers = [layer.producer_in_training for layer in layers]
    without_bias = mean if producers[0].bias is None else mean - foreach.stack([producer.bias for producer in producers]).to(dtype)
    k, shift = formulas.affine_of(without_bias, std, gamma, beta)
    if options.heavy:
        alpha, delta = formulas.affine_of(without_bias, std, None, None)
    else:
        alpha, delta = _inverse(gamma, beta, options.dtype)
    to_kept, kept_level, unit = alpha, delta, 1.0
    if bits(options, dtype):
        to_kept, kept_level, unit = alpha * STEPS, delta * STEPS, 1 / STEPS
    square, cross, level = alpha.square(), 2 * alpha * delta, delta.square()
    half = torch.ones_like(std) * formulas.slope_of_log(parameter, first.std) * -0.5
    fit = (first._eps * inverse_std.square() - 1) * (alpha != 0) * half
    norm = torch.where(coupling.alive(std, weight_norm, first._eps), weight_norm, ENDLESS)
    inverse = torch.where(gamma == 0, 0, 1 / gamma)
    # the trend over gamma
    slope, base = (zero, zero) if first.trend is None else (foreach.stack([layer.trend for layer in layers], 1) * inverse).unbind(0)
    by_level = -std * delta, torch.addcmul(fit, half, level), torch.addcmul(slope * level, base, delta)
    by_first = -std * alpha, half * cross, torch.addcmul(slope * cross, base, alpha)
    by_second = half * square, slope * square
    lag, of_p, k_norm = (output_mean - mean) * inverse_std, norm * inverse_std, norm * k
    if options.heavy:
        lag, of_p, k_norm = zero, torch.ones_like(std), norm
    by_h, by_p = (lag, -gamma * lag, -gamma), (of_p, -gamma * of_p)
    own = inverse, -slope * unit, -base, gamma * unit, inverse * unit, square
    pairs = torch.stack([cross, square, level, delta, cross, alpha]).view(3, 2, -1).transpose(1, 2).contiguous()
    one, sizes = torch.ones_like(std), [len(each) for each in means]
    rows = torch.stack([k, shift, to_kept, kept_level, zero, one, *by_level, *by_first, *by_second, norm, k_norm, *by_h, *by_p, *own])
    found = []
    parts = (t.split_with_sizes(sizes, 1) for t in (rows, pairs))
    for layer, anchor, r, p, total in zip(layers, anchors, *parts, foreach.total(level, means).unbind(), strict=True):
        of_square, z_level, z_first = p.unbind()
        forward = Forward(r[0], r[1], r[2], r[3], r[4], r[5], of_square, total)
        of_statistics = r[6:9], r[9:12], r[12:14]
        rest = r[24], r[25], r[4], r[5], z_level, z_first, r[26], anchor.spread
        backward = Backward(r[0], r[14], r[15], r[16:19], r[19:21], *of_statistics, r[21], r[22:24], *rest)
        found.append(Prepared(anchor, _marks(layer), options, forward, backward))
    return found


def _inverse(gamma: Tensor, beta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(alpha, delta) with z = alpha y + delta; 0 for a channel whose weight is so small beside its bias that y does not tell z.

    dtype: of y. Its rounding is at most half a unit of z, and that of the sums of y^2 less than <z^2>.
    """
    least = max(2 * torch.finfo(dtype).eps, torch.finfo(gamma.dtype).eps ** 0.5)
    alpha = torch.where(gamma.abs() > least * beta.abs(), 1 / gamma, 0)
    return alpha, -alpha * beta
