"""Tensors of many layers as one: what is joined comes apart again, and of one nothing is made."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from normswap.layer.foreach import bunched, joined, parted, spread

Shape = tuple[int, ...]
SHAPES = st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=4)


def numbered(shapes: list[Shape]) -> list[Tensor]:
    return [100.0 * n + torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape) for n, shape in enumerate(shapes)]


@given(SHAPES, st.sampled_from([0, 1]))
def test_what_is_joined_comes_apart_again(shapes: list[Shape], kept: int) -> None:
    tensors = numbered([(2, *shape) if kept else shape for shape in shapes])
    whole = joined(tensors, kept)
    assert whole.numel() == sum(t.numel() for t in tensors)
    assert whole.shape[:kept] == tensors[0].shape[:kept]
    for found, expected in zip(parted(whole, tensors, kept), tensors, strict=True):
        assert torch.equal(found, expected)


def test_of_a_single_one_nothing_is_made() -> None:
    (only,) = numbered([(3, 2)])
    assert joined([only]) is only
    assert parted(only, [only])[0] is only
    number = torch.tensor(7.0)
    assert spread(number, [only]) is number


@given(SHAPES.filter(lambda shapes: len(shapes) > 1), st.sampled_from([0, 1]))
def test_a_number_is_spread_over_its_own_part(shapes: list[Shape], kept: int) -> None:
    tensors = numbered([(2, *shape) if kept else shape for shape in shapes])
    numbers = torch.arange(2.0 * len(tensors)).view(2, -1) if kept else torch.arange(float(len(tensors)))
    for number, part in zip(numbers.unbind(kept), parted(spread(numbers, tensors, kept), tensors, kept), strict=True):
        assert torch.equal(part, number.view((*number.shape, *(1,) * (part.dim() - kept))).expand_as(part))


def test_bunches_keep_the_order() -> None:
    assert bunched("abcacb", lambda letter: letter) == [["a", "a"], ["b", "b"], ["c", "c"]]
    assert bunched([], lambda item: item) == []
