"""Tensors of many layers as one, so that a step takes one operator for all of them where it would take one for each.

Of a single one nothing is made: it keeps its shape, and may be a part that FSDP keeps here, which cannot be joined with others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


def joined(tensors: Sequence[Tensor], kept: int = 0) -> Tensor:
    """One after the other along the axis `kept`, with all later ones in it. The axes before that are alike."""
    return tensors[0] if len(tensors) == 1 else torch.cat([t.reshape(*t.shape[:kept], -1) for t in tensors], kept)


def parted(t: Tensor, like: Sequence[Tensor], kept: int = 0) -> list[Tensor]:
    """What `joined` has made one, in the shapes of `like`: views."""
    if len(like) == 1:
        return [t]
    parts = torch.split(t, [math.prod(each.shape[kept:]) for each in like], kept)
    return [part.view(each.shape) for part, each in zip(parts, like, strict=True)]


def spread(numbers: Tensor, like: Sequence[Tensor], kept: int = 0) -> Tensor:
    """One number for each of `like`, `joined`, in all places that its values have when these are."""
    if len(like) == 1:
        return numbers
    each = zip(numbers.unbind(kept), like, strict=True)
    return torch.cat([number[..., None].expand(*t.shape[:kept], math.prod(t.shape[kept:])) for number, t in each], kept)


def bunched(items: Iterable[Item], key: Callable[[Item], Hashable]) -> list[list[Item]]:
    """Those with the same key together, in the order in which the first of them came."""
    found: dict[Hashable, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return list(found.values())
