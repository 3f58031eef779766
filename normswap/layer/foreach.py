"""Tensors of many layers as one tensor, so that an optimizer step runs each operator once for all layers and not once per layer.

A single tensor stays as it is: it keeps its shape, and may be a DTensor (a part that FSDP keeps here), which cannot be stacked with others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from normswap.layer.fsdp import is_part

Item = TypeVar("Item")


def stack(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """The tensors concatenated along `axis`, with their later axes flattened into it; their earlier axes have the same sizes."""
    return (
        tensors[0]
        if len(tensors) == 1
        else torch.cat([t if t.dim() == axis + 1 else t.reshape(*t.shape[:axis], -1) for t in tensors], axis)
    )


def unstack(stacked: Tensor, like: Sequence[Tensor], axis: int = 0) -> list[Tensor]:
    """The inverse of `stack`: views of the stacked tensor in the shapes of `like`."""
    if len(like) == 1:
        return [stacked]
    parts = torch.split(stacked, _sizes(like, axis), axis)
    return [part if each.dim() == axis + 1 else part.view(each.shape) for part, each in zip(parts, like, strict=True)]


def expand(numbers: Tensor, like: Sequence[Tensor], axis: int = 0) -> Tensor:
    """`numbers`, one along `axis` for each tensor of `like`, each repeated for all values of its tensor: of the shape of `stack(like)`."""
    if len(like) == 1:
        return numbers
    sizes = _sizes(like, axis)
    return numbers.repeat_interleave(torch.tensor(sizes, device=numbers.device), axis, output_size=sum(sizes))


def total(stacked: Tensor, like: Sequence[Tensor], axis: int = 0) -> Tensor:
    """The sum over each tensor of `like` of what is stacked so: one number along `axis` for each, as `expand` takes them."""
    if is_part(stacked):
        return stacked.sum(list(range(axis, stacked.dim())), keepdim=True)
    lengths, flat = torch.tensor(_sizes(like, axis), device=stacked.device), stacked.reshape(*stacked.shape[:axis], -1)
    found = torch.segment_reduce(flat.movedim(axis, 0), "sum", lengths=lengths).movedim(0, axis)  # each as if it were alone
    return found if len(like) > 1 else found.view(*stacked.shape[:axis], *(1,) * (stacked.dim() - axis))


def _sizes(like: Sequence[Tensor], axis: int) -> list[int]:
    return [math.prod(each.shape[axis:]) for each in like]


def group_by(items: Iterable[Item], key: Callable[[Item], Hashable]) -> list[list[Item]]:
    """The items in lists with equal keys, in the order in which each key first occurs."""
    found: dict[Hashable, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return list(found.values())
