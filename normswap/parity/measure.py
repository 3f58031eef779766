"""Measures how far one tensor is from another, and samples the values of tensors that are too large to keep."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

KEPT = 4096  # values of a layer's output that are kept at most


class Error(NamedTuple):
    """How far a candidate's tensor is from the truth.

    non_finite: how many elements are NaN or infinite in only one of the two, or in both but with different values.
    """

    max_abs: float
    max_rel: float
    rel_l2: float
    non_finite: int


UNKNOWN = Error(math.nan, math.nan, math.nan, 0)
NONE = Error(0.0, 0.0, 0.0, 0)


def error(candidate: Tensor, truth: Tensor, overflow: Tensor | None = None, scale_floor: float = 0.0) -> Error:
    """The error of a candidate's tensor, which has the shape of the truth.

        max_abs = max|candidate - truth|     max_rel = max_abs / max(max|truth|, scale_floor)     rel_l2 = |candidate - truth|_2 / |truth|_2

    over the elements that are finite in both; NaN if there are none. overflow: a mask of the elements that are not finite in the
    reference's own dtype although the truth is. There the candidate must not be finite either; where the truth is not finite, it must be
    equal.
    """
    dtype = torch.complex128 if truth.is_complex() else torch.float64
    a, b = candidate.to("cpu", dtype).reshape(-1), truth.to("cpu", dtype).reshape(-1)
    overflows = torch.zeros_like(b, dtype=torch.bool) if overflow is None else overflow.reshape(-1)
    usable = b.isfinite() & ~overflows
    non_finite = int(((a.isfinite() != usable) | ~(usable | overflows | equal(a, b))).sum())
    both = usable & a.isfinite()
    if not bool(both.any()):
        return (NONE if a.numel() == 0 else UNKNOWN)._replace(non_finite=non_finite)
    difference, reference = (a - b)[both], b[both]
    max_abs = difference.abs().max().item()
    scale = max(reference.abs().max().item(), scale_floor)
    return Error(max_abs, ratio(max_abs, scale), ratio(difference.norm().item(), reference.norm().item()), non_finite)


def distance(tensor: Tensor | None, other: Tensor, scale: float | None = None) -> float:
    """The largest difference of two tensors as a share of `scale`, by default the largest value of `other`; never NaN.

    Infinite if their shapes, or the places of their finite elements, differ; 0 if neither has a finite element.
    """
    if tensor is None or tensor.shape != other.shape:
        return math.inf
    found = error(tensor, other)
    if found.non_finite:
        return math.inf
    return 0.0 if math.isnan(found.max_abs) else ratio(found.max_abs, largest(other) if scale is None else scale)


def largest(tensor: Tensor) -> float:
    """The largest finite absolute value of a tensor; 0 if there is none."""
    size = (tensor if tensor.is_complex() else tensor.double()).abs()
    finite = size[size.isfinite()]
    return finite.max().item() if finite.numel() else 0.0


def equal(a: Tensor, b: Tensor) -> Tensor:
    """Whether elements are equal, as a mask; NaN equals NaN."""
    return (a == b) | (a.isnan() & b.isnan())


def ratio(error: float, scale: float) -> float:
    """error / scale; 0 if the error is 0, else infinite if the scale is 0."""
    return 0.0 if error == 0 else error / scale if scale > 0 else math.inf


def sampled(tensor: Tensor) -> Tensor:
    """At most KEPT of a tensor's values, evenly spread. The step is coprime to the size of every axis, so that no channel is left out."""
    flat = tensor.detach().reshape(-1)
    step = max(1, math.ceil(flat.numel() / KEPT))
    while math.gcd(step, flat.numel()) > 1:
        step += 1
    return flat[::step].clone()
