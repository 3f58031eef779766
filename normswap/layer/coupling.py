r"""Statistics that are coupled to the weight of the conv or linear (the producer) whose output a norm normalizes.

    x = W u + b                          u  what an output reads of the producer's input (a patch, 0 where it is padding)
    mean = <W, a> + b + offset           a  the mean of u, `input_mean`: one number per input channel and tap of the kernel
    std  = |W| s                         and offset = |W| c, in units of the weight norm ("units"); or std and offset as they are

a, c, s (without units: a, offset, std) stay while W moves. So the gradient by W is centred at the mean input, as BatchNorm's is, and with
units <W, dL/dW> = 0. Still no sample sees another one.

Only mean and std are stored, as in every BatchlessNorm: c = (mean - <W, a> - b) / |W| and s = std / |W| are what they stand for. So

    forward     has the values of mean and std as they are stored, and the gradients of the formulas: `gradients`
    step        once an optimizer has moved W and b, mean and std are moved along: `moved`

and the layer is an ordinary one to everything that reads it. Any input mean gives the same function; it decides the gradient alone.

A filter is dead where std^2 < 2 eps, as most of std is then eps and not |W|: its std and offset have no units.

Shapes: W as "filters" (outputs, inputs per group * taps), row by row what an output channel multiplies; a (input channels, *kernel).

Source: the input mean moves as in CBN, Yao et al. arXiv:2002.05712; the units are those of weight normalization, arXiv:1602.07868.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.layer.foreach import joined, parted
from normswap.layer.formulas import StdForm
from normswap.layer.fsdp import is_part, whole

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TURN, FLOOR = 0.2, 1e-3


class Observer:
    """A forward pre-hook of a producer: tells the norm the mean of the input. An object, so that a copy or a pickle keeps the pair.

    It holds the norm weakly, as the norm holds the producer: a copy of a model that shares parameters with it, left to the garbage
    collector for being a cycle, would go on to take part in the steps of optimizers.
    """

    def __init__(self, norm: Any) -> None:
        self._norm = weakref.ref(norm)

    @property
    def norm(self) -> Any:
        return self._norm()

    def __getstate__(self) -> dict[str, Any]:
        return {"norm": self.norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        norm = state["norm"]
        self._norm = (lambda: None) if norm is None else weakref.ref(norm)  # type: ignore[assignment]

    def __call__(self, producer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = MappingProxyType({})) -> None:
        # torch.ao.quantization moves the hooks of a layer to its quantization-aware one as if they took no keyword arguments.
        norm = self.norm
        if norm is not None and norm.observes:
            u = args[0] if args else kwargs["input"]
            size = args[1] if len(args) > 1 else kwargs.get("output_size")
            norm.run.saw(patch_mean(producer, u, norm.run.mask, size))


def observers(producer: nn.Module) -> dict[int, Observer]:
    return {key: hook for key, hook in producer._forward_pre_hooks.items() if isinstance(hook, Observer)}


def release(producer: nn.Module, norm: object = None) -> None:
    """Take the observer of `norm` off a producer; None: those of every norm that is no longer one of a pair."""
    for key, hook in observers(producer).items():
        if hook.norm is norm or (norm is None and getattr(hook.norm, "producer", None) is not producer):
            del producer._forward_pre_hooks[key]
            producer._forward_pre_hooks_with_kwargs.pop(key, None)


# --- the producer -----------------------------------------------------------------------------------------------------------------------


def rank(producer: nn.Module) -> int:
    """The number of dimensions of its kernel: 0 for a linear."""
    return len(getattr(producer, "kernel_size", ()))


def outputs_of(producer: Any) -> int:
    return int(producer.out_features if isinstance(producer, nn.Linear) else producer.out_channels)


def input_shape(producer: Any) -> tuple[int, ...]:
    """The shape of the input mean."""
    return (producer.in_features,) if isinstance(producer, nn.Linear) else (producer.in_channels, *producer.kernel_size)


def filters(producer: Any, dtype: torch.dtype, of: Tensor | None = None) -> Tensor:
    """The weight, or `of` in its shape, as one row per output channel, in `dtype`; differentiable."""
    weight: Tensor = (producer.weight if of is None else of).to(dtype)
    if isinstance(producer, TRANSPOSED):  # (I, O/g, *k)
        groups, taps = producer.groups, math.prod(producer.kernel_size)
        weight = whole(weight).reshape(groups, producer.in_channels // groups, -1, taps).transpose(1, 2)
    return weight.reshape(outputs_of(producer), -1)


def response(rows: Tensor, input_mean: Tensor, groups: int) -> Tensor:
    """<W, a> for each output channel."""
    if groups == 1 and not is_part(rows):
        # The fastest, as it writes nothing of the size of W. On a GPU autocast would round it; it moves the mean, and so must not be.
        with torch.autocast(rows.device.type, enabled=False):
            return torch.mv(rows, input_mean.flatten())
    rows, input_mean = whole(rows) if groups > 1 else rows, whole(input_mean)
    return (rows.view(groups, -1, rows.shape[1]) * input_mean.reshape(groups, 1, -1)).sum(2).flatten()


def place(producer: nn.Module, input_mean: Tensor) -> tuple[Tensor, Tensor]:
    """(<W, a> + b, |W|) for each output channel."""
    rows = filters(producer, input_mean.dtype)
    return _place(rows, producer.bias, input_mean, getattr(producer, "groups", 1))  # type: ignore[arg-type]


def _place(rows: Tensor, bias: Tensor | None, input_mean: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    moving = response(rows, input_mean, groups)
    return moving if bias is None else moving + bias.to(moving.dtype), torch.linalg.vector_norm(rows, dim=1)


def clip(producers: Sequence[Any], sizes: Sequence[Tensor], reach: float | Tensor) -> None:
    """Shorten the gradient G of each filter W of the producers, in place, to  reach |G| <= TURN max(|W|, FLOOR).

    sizes: |W| per filter, of each; reach: how far the optimizer moves W in the end for one G, lr / (1 - momentum).

    BatchNorm makes up for any step at once, by the next batch. Running statistics need some steps, and what they are late by is
    multiplied from layer to layer. So no filter may turn by more in one step than they can follow.

    Source: adaptive gradient clipping, Brock et al. arXiv:2102.06171, in units of the step instead of the gradient.
    """
    rows = (filters(producer, size.dtype, producer.weight.grad) for producer, size in zip(producers, sizes, strict=True))
    lengths = joined([torch.linalg.vector_norm(each, dim=1) for each in rows])
    factors = (TURN * joined(sizes).clamp(min=FLOOR) / (lengths * reach)).clamp(max=1)
    for producer, factor in zip(producers, parted(factors, sizes), strict=True):
        if isinstance(producer, TRANSPOSED):  # (I, O/g, *k)
            factor = factor.view(producer.groups, -1).repeat_interleave(producer.in_channels // producer.groups, 0)
        gradient = producer.weight.grad
        gradient.mul_(factor.view(*factor.shape, *(1,) * (gradient.dim() - factor.dim())).to(gradient.dtype))


# --- the statistics ---------------------------------------------------------------------------------------------------------------------


class How(NamedTuple):
    """How mean and std depend on the producer, besides by its weight and bias."""

    groups: int
    units: bool
    eps: float


class Coupled(NamedTuple):
    """The producer: its weight as `filters`, its bias, and the mean of its input."""

    rows: Tensor
    bias: Tensor | None
    input_mean: Tensor
    how: How


def coupled_to(producer: nn.Module, input_mean: Tensor, dtype: torch.dtype, *, units: bool, eps: float) -> Coupled:
    bias: Any = producer.bias
    return Coupled(filters(producer, dtype), bias, input_mean.detach().to(dtype), How(getattr(producer, "groups", 1), units, eps))


def written_out(mean: Tensor, std: Tensor, rows: Tensor, bias: Tensor | None, input_mean: Tensor, how: How) -> tuple[Tensor, Tensor]:
    """(mean, std), the values unchanged, as functions of W and b: for derivatives of `gradients`, which are those of this."""
    moving, size = (t.view(mean.shape) for t in _place(rows, bias, input_mean, how.groups))
    return moved(mean, std, std, (moving.detach(), size.detach()), (moving, size), "abs", units=how.units, eps=how.eps)


def gradients(
    by_mean: Tensor, by_std: Tensor, mean: Tensor, std: Tensor, rows: Tensor, bias: Tensor | None, input_mean: Tensor, how: How
) -> tuple[Tensor, Tensor | None]:
    """The gradients by the rows of W and by b, of those by mean and std, one number per channel each.

        by W    by_mean a + (by_mean (mean - <W, a> - b) + by_std std) W / |W|^2        the second term with units, where a filter is alive
        by b    by_mean

    What the size of W costs is two products and two numbers per filter.
    """
    by_mean, by_std, mean, std = (t.flatten() for t in (by_mean, by_std, mean, std))
    by_rows = (by_mean.view(how.groups, -1, 1) * input_mean.reshape(how.groups, 1, -1)).view(rows.shape)
    if how.units:
        moving, size = _place(rows, bias, input_mean, how.groups)
        radial = torch.addcmul(by_std * std, by_mean, mean - moving) * _alive(std, size, how.eps) / _divisor(size).square()
        by_rows = torch.addcmul(by_rows, radial[:, None], rows)
    return by_rows, None if bias is None else by_mean.to(bias.dtype)


# Weights below 1e-15 are none. The number is written out twice: torch.compile(dynamic=True) takes a global float for one that may change,
# and fails on one that the backward passes of two layers read.
def _exists(size: Tensor) -> Tensor:
    return size > 1e-15


def _divisor(size: Tensor) -> Tensor:
    return size.clamp(min=1e-15)


def _alive(std: Tensor, size: Tensor, eps: float) -> Tensor:
    return (std.square() >= 2 * eps) & _exists(size)


def moved(
    mean: Tensor,
    parameter: Tensor,
    std: Tensor,
    before: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor],
    form: StdForm,
    *,
    units: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(mean, p) of the same a, c, s once W and b have changed what `place` gives from `before` to `after`."""
    (old, old_size), (new, new_size) = before, after
    if not units:
        return mean + (new - old), parameter
    alive = _alive(std, old_size, eps) & _exists(new_size)
    ratio = torch.where(alive, new_size / _divisor(old_size), 1.0)
    parameter = parameter + ratio.log() if form == "log" else parameter * ratio if form == "abs" else parameter / ratio
    return mean + (new - old) + (mean - old) * (ratio - 1), parameter


# --- the input mean ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def patch_mean(producer: Any, u: Tensor, mask: Tensor | None = None, output_size: Sequence[int] | None = None) -> Tensor:
    """The mean over samples and outputs of what each tap of the kernel reads of the input u: <W, it> + b is the mean of the output.

    The taps of a kernel read along each axis what no other axis decides, so the sum over samples is summed one axis after the other, for
    each tap over the places that it reads there. Padding, stride and dilation are exact.

    u: as the producer takes it, of any float dtype; mask: as `normswap.masked` takes it. The result is float32, or float64 as u is. Of an
    empty u, 0.
    """
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    dims = rank(producer)
    u = u.detach()
    if dims == 0:
        if mask is not None:
            mask = mask.view(*mask.shape, *(1,) * (u.dim() - mask.dim())).expand(*u.shape[:-1], 1)
            return torch.where(mask, u, 0).flatten(0, -2).sum(0, dtype=dtype) / mask.sum().clamp(min=1)
        return u.reshape(-1, u.shape[-1]).sum(0, dtype=dtype) / max(u.numel() // u.shape[-1], 1)
    if u.dim() == dims + 1:
        u = u[None]
    transposed = isinstance(producer, TRANSPOSED)
    kernel, stride, dilation = producer.kernel_size, producer.stride, producer.dilation
    sizes = u.shape[2:]
    if transposed:
        padding = [(p, p) for p in producer.padding]
        outputs = [
            (size - 1) * s - 2 * p + d * (k - 1) + extra + 1
            for size, s, p, d, k, extra in zip(sizes, stride, producer.padding, dilation, kernel, producer.output_padding, strict=True)
        ]
        if output_size is not None:
            outputs = list(output_size)[-dims:]
    else:
        flat = producer._reversed_padding_repeated_twice  # the last axis first
        padding = [(flat[2 * i], flat[2 * i + 1]) for i in reversed(range(dims))]
        outputs = [
            (size + before + after - d * (k - 1) - 1) // s + 1
            for size, (before, after), s, d, k in zip(sizes, padding, stride, dilation, kernel, strict=True)
        ]
    mode = producer.padding_mode
    count = math.prod(outputs)
    with torch.autocast(u.device.type, enabled=False):
        if mask is not None and mask.dim() > 1:
            return _masked(producer, u.to(dtype), mask, padding, outputs, dtype)
        number = max(len(u), 1) if mask is None else mask.sum().clamp(min=1)
        counted = u if mask is None else torch.where(mask.view(-1, *(1,) * (u.dim() - 1)), u, 0)
        total = counted.sum(0, dtype=dtype)
        if mode != "zeros":
            total = F.pad(total[None], [p for pair in reversed(padding) for p in pair], mode=mode)[0]
            padding = [(0, 0)] * dims
        for axis in range(dims):
            taps = _taps(outputs[axis], kernel[axis], stride[axis], dilation[axis], padding[axis][0], transposed)
            total = torch.stack([total[:, tap].sum(1) for tap in taps], -1)
        mean: Tensor = total / (number * count)
        return mean


def _taps(outputs: int, kernel: int, stride: int, dilation: int, before: int, transposed: bool) -> Iterator[slice]:
    """For each tap, the places of the input along this axis that it reads; before: the zeros there. A slice ends where the input does."""
    for first in range(-before, dilation * kernel - before, dilation):
        late = max(0, -(first // stride))  # the first output, or place of a transposed one, from where on that is a place, or an output
        if transposed:  # a place goes to the output first + place * stride
            yield slice(late, max(0, -((first - outputs) // stride)))
        else:  # an output reads the place first + output * stride
            yield slice(first + late * stride, max(0, first + (outputs - 1) * stride + 1), stride)


def _masked(
    producer: Any, u: Tensor, mask: Tensor, padding: Sequence[tuple[int, int]], outputs: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """`patch_mean` over the outputs where mask is True: the gradient by the weight, of one output channel, of their sum."""
    dims = len(outputs)
    counted = mask.view(len(u), 1, *mask.shape[1:], *(1,) * (dims + 1 - mask.dim())).expand(len(u), 1, *outputs).to(dtype)
    transposed = isinstance(producer, TRANSPOSED)
    if not transposed:
        mode = "constant" if producer.padding_mode == "zeros" else producer.padding_mode
        u = F.pad(u, [p for pair in reversed(padding) for p in pair], mode=mode)
    channels = u.shape[1]
    shape = (channels, 1, *producer.kernel_size) if transposed else (1, channels, *producer.kernel_size)
    _, total, _ = torch.ops.aten.convolution_backward(
        counted,
        u,
        u.new_zeros(shape),
        None,
        list(producer.stride),
        list(producer.padding) if transposed else [0] * dims,
        list(producer.dilation),
        transposed,
        list(producer.output_padding),
        1,
        [False, True, False],
    )
    mean: Tensor = total.reshape(channels, *producer.kernel_size) / counted.sum().clamp(min=1)
    return mean
