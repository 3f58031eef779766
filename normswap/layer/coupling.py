r"""Coupling: statistics that depend on the weight of the producer, the conv or linear whose output a norm normalizes.

    x = W u + b                          u  what one output reads of the producer's input (a patch, 0 where it is padding)
    mean = <W, a> + b + |W| c            a  the mean of each channel of that input, the parameter `input_mean`, see `producer`
    std  = |W| s                         |W|  the norm of each filter, one per output channel

a, c and s stay as they are while W moves. So the gradient by W is centred at the mean input, as BatchNorm's is, and has no part along W:
<W, dL/dW> = 0. Each sample's output still depends on that sample alone.

Only mean and std are stored, as in every BatchlessNorm; c = (mean - <W, a> - b) / |W| and s = std / |W| follow from them. So

    forward     uses mean and std as they are stored, and has the gradients of the formulas: `gradients`
    step        once an optimizer has moved W and b, mean and std are moved along: `moved`

so everything else sees an ordinary BatchlessNorm. The input mean decides the gradient alone: with any input mean the outputs are the same.

A filter is dead where std^2 < 2 eps, as std is then mostly eps and not |W|: its std stays as it is, and so does mean - <W, a> - b.

Source: the input mean moves as in CBN, Yao et al. arXiv:2002.05712; std and c in units of |W| are weight normalization, arXiv:1602.07868.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normswap.layer import foreach
from normswap.layer.formulas import StdForm
from normswap.layer.producer import TRANSPOSED, filters, groups_of, response, spread

TURN, FLOOR = 0.2, 1e-3


# --- the gradients ----------------------------------------------------------------------------------------------------------------------


class Constants(NamedTuple):
    """The numbers that coupled statistics depend on: the groups of the producer, and the eps of the norm's source layer."""

    groups: int
    eps: float


class Coupled(NamedTuple):
    """The producer in one forward pass: its weight as `filters`, its bias, and the mean of its input."""

    rows: Tensor
    bias: Tensor | None
    input_mean: Tensor
    constants: Constants


def coupled_to(producer: nn.Module, input_mean: Tensor, dtype: torch.dtype, *, eps: float) -> Coupled:
    """The producer with its current weight and bias, for one forward pass."""
    bias: Any = producer.bias
    return Coupled(filters(producer, dtype), bias, input_mean.detach().to(dtype), Constants(groups_of(producer), eps))


def gradients(by_mean: Tensor, by_std: Tensor, mean: Tensor, std: Tensor, coupled: Coupled) -> tuple[Tensor, Tensor | None]:
    """The gradients by the rows of W and by b, from the gradients by mean and std, which have one number per channel.

        by W    by_mean a + (by_mean (mean - <W, a> - b) + by_std std) W / |W|^2        the second term where a filter is alive
        by b    by_mean

    Only two of the products have the size of W; the rest is two numbers per filter.
    """
    rows, bias, input_mean, (groups, eps) = coupled
    by_mean, by_std, mean, std = (t.flatten() for t in (by_mean, by_std, mean, std))
    by_rows = (by_mean.view(groups, -1, 1) * spread(input_mean, rows.shape[1], groups)[:, None]).view(rows.shape)
    output_mean, weight_norm = snapshot(rows, bias, input_mean, groups)
    along = torch.addcmul(by_std * std, by_mean, mean - output_mean)
    radial = along * over_square(alive(std, weight_norm, eps), weight_norm)
    by_rows = torch.addcmul(by_rows, radial[:, None], rows)
    return by_rows, None if bias is None else by_mean.to(bias.dtype)


def over_square(alive: Tensor, weight_norm: Tensor) -> Tensor:
    """1 / |W|^2 where a filter is alive, else 0; one number per filter. The factor of W in the gradient by W has it."""
    return alive / _divisor(weight_norm).square()


def written_out(mean: Tensor, std: Tensor, coupled: Coupled) -> tuple[Tensor, Tensor]:
    """(mean, std) with the same values, computed from W and b by operators of torch: so that `gradients` can be differentiated."""
    rows, bias, input_mean, (groups, eps) = coupled
    now = Snapshot(*(t.view(mean.shape) for t in snapshot(rows, bias, input_mean, groups)))
    return moved(mean, std, std, Snapshot(*(t.detach() for t in now)), now, "abs", eps=eps)


# A |W| below 1e-15 counts as 0. The number is written out twice: torch.compile(dynamic=True) takes a global float for one that may change,
# and fails on one that the backward passes of two layers read.
def _exists(weight_norm: Tensor) -> Tensor:
    return weight_norm > 1e-15


def _divisor(weight_norm: Tensor) -> Tensor:
    return weight_norm.clamp(min=1e-15)


def alive(std: Tensor, weight_norm: Tensor, eps: float) -> Tensor:
    """Which filters are not dead."""
    return (std.square() >= 2 * eps) & _exists(weight_norm)


# --- the step ---------------------------------------------------------------------------------------------------------------------------


class Snapshot(NamedTuple):
    """What the statistics depend on at one moment of training: the producer's <W, a> + b and |W|, one number per output channel each."""

    output_mean: Tensor
    weight_norm: Tensor


def snapshot(rows: Tensor, bias: Tensor | None, input_mean: Tensor, groups: int) -> Snapshot:
    answer = response(rows, input_mean, groups)
    return Snapshot(answer if bias is None else answer + bias.to(answer.dtype), torch.linalg.vector_norm(rows, dim=1))


def moved(
    mean: Tensor, parameter: Tensor, std: Tensor, before: Snapshot, after: Snapshot, form: StdForm, *, eps: float
) -> tuple[Tensor, Tensor]:
    """(mean, p) with the same a, c and s after W and b have changed from one snapshot to another. p: the stored parameter of std."""
    lives = alive(std, before.weight_norm, eps) & _exists(after.weight_norm)
    ratio = torch.where(lives, after.weight_norm / _divisor(before.weight_norm), 1.0)
    parameter = parameter + ratio.log() if form == "log" else parameter * ratio if form == "abs" else parameter / ratio
    return mean + (after.output_mean - before.output_mean) + (mean - before.output_mean) * (ratio - 1), parameter


def clip(producers: Sequence[Any], weight_norms: Sequence[Tensor], reach: float | Tensor) -> None:
    """Shorten the gradient G of each filter W of the producers, in place, to  reach |G| <= TURN max(|W|, FLOOR).

    weight_norms: |W| per filter, of each producer. reach: how far the optimizer moves W in the end for one G, lr / (1 - momentum).

    BatchNorm makes up for any step with the next batch. Running statistics need some steps for it, and their errors multiply from layer to
    layer. So no filter may turn by more in one step than the statistics can follow.

    Source: adaptive gradient clipping, Brock et al. arXiv:2102.06171, in units of the step instead of the gradient.
    """
    rows = (filters(producer, norm.dtype, producer.weight.grad) for producer, norm in zip(producers, weight_norms, strict=True))
    lengths = foreach.stack([torch.linalg.vector_norm(each, dim=1) for each in rows])
    factors = (TURN * foreach.stack(weight_norms).clamp(min=FLOOR) / (lengths * reach)).clamp(max=1)
    known = factors.device.type == "cpu" and type(factors) is Tensor  # a GPU is not asked, as the CPU would have to wait for it
    shorter = (factors < 1).nonzero().flatten().tolist() if known else None
    end = 0
    for producer, factor in zip(producers, foreach.unstack(factors, weight_norms), strict=True):
        start, end = end, end + len(factor)
        if shorter is not None and bisect_left(shorter, start) == bisect_left(shorter, end):
            continue
        if isinstance(producer, TRANSPOSED):  # (I, O/g, *k)
            factor = factor.view(producer.groups, -1).repeat_interleave(producer.in_channels // producer.groups, 0)
        gradient = producer.weight.grad
        gradient.mul_(factor.view(*factor.shape, *(1,) * (gradient.dim() - factor.dim())).to(gradient.dtype))
