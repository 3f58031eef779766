"""How far one tensor is from another, and which of its values are kept where a whole tensor is too much."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

KEPT = 4096  # values of a layer's output, at most


class Error(NamedTuple):
    """How far a candidate's tensor is from the truth.

    non_finite: how many elements are NaN or infinite in one of the two only, or not the same that the truth has there.
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

    over the elements that are finite in both; NaN if there are none. overflow: where the reference in its own dtype is not finite although
    the truth is. There the candidate must not be finite either; where the truth itself is infinite or NaN, it must be the same.
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


def distance(tensor: Tensor | None, other: Tensor, scale_floor: float = 0.0) -> float:
    """The max_rel of two tensors, as a number that can always be compared.

    Infinite if they have other shapes, or are finite at other places; 0 if nothing is finite in either.
    """
    if tensor is None or tensor.shape != other.shape:
        return math.inf
    found = error(tensor, other, None, scale_floor)
    return math.inf if found.non_finite else 0.0 if math.isnan(found.max_rel) else found.max_rel


def equal(a: Tensor, b: Tensor) -> Tensor:
    """Element by element; NaN equals NaN."""
    return (a == b) | (a.isnan() & b.isnan())


def ratio(error: float, scale: float) -> float:
    """error / scale, where no error is 0 and any error of a scale of 0 is infinite."""
    return 0.0 if error == 0 else error / scale if scale > 0 else math.inf


def sampled(tensor: Tensor) -> Tensor:
    """At most KEPT of a tensor's values, evenly spread. The step is coprime to every axis, so that no channel is always left out."""
    flat = tensor.detach().reshape(-1)
    step = max(1, math.ceil(flat.numel() / KEPT))
    while math.gcd(step, flat.numel()) > 1:
        step += 1
    return flat[::step].clone()
