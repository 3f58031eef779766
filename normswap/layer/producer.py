"""The producer of a norm: the conv or linear whose output the norm normalizes, as rows of filters, and the mean of its input.

    x = W u + b        u  what one output reads of the producer's input: a patch, 0 where it is padding
    a                  the input mean: the mean of each channel of the producer's input, which stands for that of u at each position
                       of the kernel, so that mean(x) is about <W, a> + b (padding makes the difference)

Shapes: W as `filters` (outputs, inputs per group * kernel positions), one row per output channel; a (input channels,).
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
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


def inputs_of(producer: Any) -> int:
    """The number of input channels of a producer: the size of its input mean."""
    return int(producer.in_features if isinstance(producer, nn.Linear) else producer.in_channels)


def filters(producer: Any, dtype: torch.dtype, of: Tensor | None = None) -> Tensor:
    """The weight of a producer, or `of` in its shape, as one row per output channel, in `dtype`; differentiable."""
    weight: Tensor = (producer.weight if of is None else of).to(dtype)
    if isinstance(producer, TRANSPOSED):  # (I, O/g, *k)
        groups, positions = producer.groups, math.prod(producer.kernel_size)
        weight = whole(weight).reshape(groups, producer.in_channels // groups, -1, positions).transpose(1, 2)
    return weight.reshape(outputs_of(producer), -1)


def response(rows: Tensor, input_mean: Tensor, groups: int) -> Tensor:
    """<W, a> for each output channel, of the rows of W."""
    input_mean = spread(input_mean, rows.shape[1], groups)
    if groups == 1 and not is_part(rows):
        # The fastest, as it writes nothing of the size of W. Autocast would round the result on a GPU, and the mean moves by this result.
        with without_autocast(rows.device.type):
            return torch.mv(rows, input_mean.flatten())
    rows, input_mean = whole(rows) if groups > 1 else rows, whole(input_mean)
    return (rows.view(groups, -1, rows.shape[1]) * input_mean.view(groups, 1, -1)).sum(2).flatten()


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """A context without autocast. To enter torch's takes as long as ten operators, so it is entered only where autocast is on."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def spread(input_mean: Tensor, size: int, groups: int) -> Tensor:
    """The input mean in the shape of a row, (groups, size): each number once for each position of the kernel. What is so already, stays."""
    per_group = input_mean.view(groups, -1, 1)
    return per_group.expand(-1, -1, size // per_group.shape[1]).contiguous().view(groups, size)


# --- the input mean ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def channel_mean(producer: Any, u: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean of each channel of the producer's input u, over samples and places: (input channels,).

    mask: as `normswap.masked` takes it. Its axes after the samples count where they have the sizes of u. The result is float32, or float64
    if u is. For an empty u it is 0.
    """
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    u = u.detach()
    channel = u.dim() - 1 - rank(producer)
    if mask is not None and u.dim() > rank(producer) + 1:
        u = u.movedim(channel, -1)
        same = [m == size for m, size in zip(mask.shape, u.shape[:-1], strict=False)]
        known = same.index(False) if False in same else len(same)  # a stride may have changed the other sizes
        mask = mask if known == mask.dim() else mask.flatten(known).any(-1)
        mask = mask.view(*mask.shape, *(1,) * (u.dim() - mask.dim())).expand(*u.shape[:-1], 1)
        return torch.where(mask, u, 0).flatten(0, -2).sum(0, dtype=dtype) / mask.sum().clamp(min=1)
    # A sum over the last axis and then one over the first are the fastest on a CPU.
    behind = u.flatten(channel + 1).sum(-1, dtype=dtype) if channel < u.dim() - 1 else u
    total = behind.flatten(0, -2).sum(0, dtype=dtype) if behind.dim() > 1 else behind.to(dtype)
    return total / max(u.numel() // max(u.shape[channel], 1), 1)
