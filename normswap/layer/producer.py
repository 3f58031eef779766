"""The producer of a norm: the conv or linear whose output the norm normalizes, as rows of filters, and the mean of its input.

    x = W u + b        u  what one output reads of the producer's input: a patch, 0 where it is padding
    a = mean(u)        the input mean, one number per input channel and position of the kernel, so that mean(x) = <W, a> + b

Shapes: W as `filters` (outputs, inputs per group * kernel positions), one row per output channel; a (input channels, *kernel).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.layer.fsdp import is_part, whole

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PRODUCERS = (*CONVS, *TRANSPOSED, nn.Linear)  # the layers that a norm may follow, and be coupled to


def rank(producer: nn.Module) -> int:
    """The number of dimensions of a producer's kernel: 0 for a linear."""
    return len(getattr(producer, "kernel_size", ()))


def groups_of(producer: nn.Module) -> int:
    """The number of groups of a producer: 1 for a linear."""
    return int(getattr(producer, "groups", 1))


def outputs_of(producer: Any) -> int:
    """The number of output channels of a producer."""
    return int(producer.out_features if isinstance(producer, nn.Linear) else producer.out_channels)


def input_shape(producer: Any) -> tuple[int, ...]:
    """The shape of the input mean of a producer."""
    return (producer.in_features,) if isinstance(producer, nn.Linear) else (producer.in_channels, *producer.kernel_size)


def filters(producer: Any, dtype: torch.dtype, of: Tensor | None = None) -> Tensor:
    """The weight of a producer, or `of` in its shape, as one row per output channel, in `dtype`; differentiable."""
    weight: Tensor = (producer.weight if of is None else of).to(dtype)
    if isinstance(producer, TRANSPOSED):  # (I, O/g, *k)
        groups, positions = producer.groups, math.prod(producer.kernel_size)
        weight = whole(weight).reshape(groups, producer.in_channels // groups, -1, positions).transpose(1, 2)
    return weight.reshape(outputs_of(producer), -1)


def response(rows: Tensor, input_mean: Tensor, groups: int) -> Tensor:
    """<W, a> for each output channel, of the rows of W."""
    if groups == 1 and not is_part(rows):
        # The fastest, as it writes nothing of the size of W. Autocast would round the result on a GPU, and the mean moves by this result.
        with torch.autocast(rows.device.type, enabled=False):
            return torch.mv(rows, input_mean.flatten())
    rows, input_mean = whole(rows) if groups > 1 else rows, whole(input_mean)
    return (rows.view(groups, -1, rows.shape[1]) * input_mean.reshape(groups, 1, -1)).sum(2).flatten()


# --- the input mean ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def patch_mean(producer: Any, u: Tensor, mask: Tensor | None = None, output_size: Sequence[int] | None = None) -> Tensor:
    """The input mean a: over samples and outputs, the mean of what each position of the kernel reads of the producer's input u.

    Which places a position of the kernel reads along one axis does not depend on the other axes. So u is summed over the samples and then
    along one axis after the other, for each position over the places that it reads. Padding, stride and dilation are exact, but
    for a subclass whose own code pads or changes its input: there u counts as it comes, with the padding that the attributes say.

    u: as the producer takes it, of any float dtype; mask: as `normswap.masked` takes it. The result is float32, or float64 if u is. For an
    empty u it is 0.
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
        # At least one: a subclass whose code pads takes inputs that are smaller than its kernel.
        outputs = [
            max((size + before + after - d * (k - 1) - 1) // s + 1, 1)
            for size, (before, after), s, d, k in zip(sizes, padding, stride, dilation, kernel, strict=True)
        ]
    mode = producer.padding_mode
    count = math.prod(outputs)
    with torch.autocast(u.device.type, enabled=False):
        if mask is not None and mask.dim() > 1:
            return _masked(producer, u.to(dtype), mask, padding, outputs)
        number = max(len(u), 1) if mask is None else mask.sum().clamp(min=1)
        counted = u if mask is None else torch.where(mask.view(-1, *(1,) * (u.dim() - 1)), u, 0)
        total = counted.sum(0, dtype=dtype)
        if mode != "zeros":
            total = F.pad(total[None], [p for both in reversed(padding) for p in both], mode=mode)[0]
            padding = [(0, 0)] * dims
        for axis in range(dims):
            start = -padding[axis][0]
            starts = range(start, start + dilation[axis] * kernel[axis], dilation[axis])
            read = [_read_by(first, outputs[axis], stride[axis], transposed) for first in starts]
            total = torch.stack([total[:, places].sum(1) for places in read], -1)
        mean: Tensor = total / (number * count)
        return mean


def _read_by(first: int, outputs: int, stride: int, transposed: bool) -> slice:
    """The places of the input that one position of the kernel reads along one axis. A slice ends where the input does.

    first: the place that it reads for the first output, which is in the padding if negative; of a transposed conv, the output to which it
    adds the first place.
    """
    late = max(0, -(first // stride))  # the first output that reads inside the input; transposed: the first place that reaches an output
    if transposed:  # a place goes to the output first + place * stride
        return slice(late, max(0, -((first - outputs) // stride)))
    return slice(first + late * stride, max(0, first + (outputs - 1) * stride + 1), stride)  # an output reads first + output * stride


def _masked(producer: Any, u: Tensor, mask: Tensor, padding: Sequence[tuple[int, int]], outputs: Sequence[int]) -> Tensor:
    """`patch_mean` over the outputs where the mask is True, computed as a gradient by the weight: that of the sum of these outputs."""
    dims = len(outputs)
    counted = mask.view(len(u), 1, *mask.shape[1:], *(1,) * (dims + 1 - mask.dim())).expand(len(u), 1, *outputs).to(u.dtype)
    transposed = isinstance(producer, TRANSPOSED)
    if not transposed:
        mode = "constant" if producer.padding_mode == "zeros" else producer.padding_mode
        u = F.pad(u, [p for both in reversed(padding) for p in both], mode=mode)
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
