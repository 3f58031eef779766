"""Compares each tensor of a candidate at each probe with its truth, and makes one row (a Difference) of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from normswap.parity.limits import Limit
from normswap.parity.measure import NONE, UNKNOWN, error
from normswap.parity.probes import Probe
from normswap.parity.reference import Judgement, Key, Tensors, Truth
from normswap.parity.result import NOTHING_FINITE, Difference

Rows = dict[Key, Difference]
LimitOf = Callable[[Key, Truth], Limit]


@dataclass
class Findings:
    """All that was measured of one candidate.

    function   rows in float64, which decide whether it is the same function
    precision  rows in its own dtype, or in a runtime, which decide whether it is as precise
    failure    why the comparison as a whole failed, or None
    notes      what could not be compared, and why
    undecidable  names of outputs that no row decides, and of which float64 has shown no more than rounding explains
    passes     number of forward passes
    """

    function: Rows = field(default_factory=dict)
    precision: Rows = field(default_factory=dict)
    failure: str | None = None
    notes: list[str] = field(default_factory=list)
    undecidable: set[str] = field(default_factory=set)
    passes: int = 0


def compare_at(judgement: Judgement, probe: Probe, found: Tensors, limit: LimitOf, *, float64: bool = False) -> Rows:
    """A row for each tensor that the reference or the candidate has at a probe. limit: gives the largest error that passes."""
    truths = judgement.truths_at(probe)
    here = {key: value for key, value in found.items() if key.probe == probe.name}
    return {key: _row(key, truths.get(key), here.get(key), limit, float64=float64) for key in dict.fromkeys((*truths, *here))}


def _row(key: Key, truth: Truth | None, value: Tensor | None, limit: LimitOf, *, float64: bool) -> Difference:
    problem: str | None = None
    found = UNKNOWN
    if truth is None or value is None:
        problem = "the reference does not return it" if truth is None else "is missing"
    elif truth.unjudged is not None and not float64:
        found = NONE
    elif value.shape != truth.value.shape:
        problem = f"has the shape {tuple(value.shape)}, expected {tuple(truth.value.shape)}"
    elif value.dtype != (wanted := truth.value.dtype if float64 else truth.dtype):
        problem = f"has the dtype {value.dtype}, expected {wanted}"
    else:
        found = error(value, truth.value, None if float64 else truth.overflow, truth.scale_floor)
        if math.isnan(found.max_rel) and found.non_finite == 0:
            problem = NOTHING_FINITE
    limits = Limit(math.nan, math.nan) if truth is None else limit(key, truth)
    return Difference(
        key.name.rpartition("@")[0] if key.site else key.name,
        key.probe,
        *found,
        noise=limits.noise,
        tolerance=limits.tolerance,
        problem=problem,
        float64=float64,
        unjudged=limits.unjudged,
    )
