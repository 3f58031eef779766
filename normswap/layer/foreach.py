"""Tensors of many layers as one tensor, so that an optimizer step runs each operator once for all layers and not once per layer.

A single tensor stays as it is: it keeps its shape, and may be a DTensor (a part that FSDP keeps here), which cannot be stacked with others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

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
    parts = torch.split(stacked, [math.prod(each.shape[axis:]) for each in like], axis)
    return [part if each.dim() == axis + 1 else part.view(each.shape) for part, each in zip(parts, like, strict=True)]


def expand(numbers: Tensor, like: Sequence[Tensor], axis: int = 0) -> Tensor:
    """`numbers`, one along `axis` for each tensor of `like`, each repeated for all values of its tensor: of the shape of `stack(like)`."""
    if len(like) == 1:
        return numbers
    each = zip(numbers.unbind(axis), like, strict=True)
    return torch.cat([number[..., None].expand(*t.shape[:axis], math.prod(t.shape[axis:])) for number, t in each], axis)


def group_by(items: Iterable[Item], key: Callable[[Item], Hashable]) -> list[list[Item]]:
    """The items in lists with equal keys, in the order in which each key first occurs."""
    found: dict[Hashable, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return list(found.values())
