"""Tensors of many layers as one: what is stacked can be unstacked, and a single one stays as it is."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from normswap.layer.foreach import expand, group_by, stack, unstack

Shape = tuple[int, ...]
SHAPES = st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=4)


def numbered(shapes: list[Shape]) -> list[Tensor]:
    return [100.0 * n + torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape) for n, shape in enumerate(shapes)]


@given(SHAPES, st.sampled_from([0, 1]))
def test_unstack_is_the_inverse_of_stack(shapes: list[Shape], axis: int) -> None:
    tensors = numbered([(2, *shape) if axis else shape for shape in shapes])
    whole = stack(tensors, axis)
    assert whole.numel() == sum(t.numel() for t in tensors)
    assert whole.shape[:axis] == tensors[0].shape[:axis]
    for found, expected in zip(unstack(whole, tensors, axis), tensors, strict=True):
        assert torch.equal(found, expected)


def test_a_single_one_stays_as_it_is() -> None:
    (only,) = numbered([(3, 2)])
    assert stack([only]) is only
    assert unstack(only, [only])[0] is only
    number = torch.tensor(7.0)
    assert expand(number, [only]) is number


@given(SHAPES.filter(lambda shapes: len(shapes) > 1), st.sampled_from([0, 1]))
def test_a_number_is_expanded_over_its_own_part(shapes: list[Shape], axis: int) -> None:
    tensors = numbered([(2, *shape) if axis else shape for shape in shapes])
    numbers = torch.arange(2.0 * len(tensors)).view(2, -1) if axis else torch.arange(float(len(tensors)))
    for number, part in zip(numbers.unbind(axis), unstack(expand(numbers, tensors, axis), tensors, axis), strict=True):
        assert torch.equal(part, number.view((*number.shape, *(1,) * (part.dim() - axis))).expand_as(part))


def test_groups_keep_the_order() -> None:
    assert group_by("abcacb", lambda letter: letter) == [["a", "a"], ["b", "b"], ["c", "c"]]
    assert group_by([], lambda item: item) == []
