"""The largest errors that pass: the numbers of the rule that `judge.py` explains."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

SAME = 1e-9
NOISE_FACTOR = 10
SCALE_SHARE = 1e-3
FLOOR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
CAP = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
CHOICE = 2.0**-50
CHAOS = {torch.float64: 1e-2, torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Limit:
    """For one tensor at one probe: the noise, the largest error that passes, and why the row decides nothing, or None."""

    noise: float
    tolerance: float
    unjudged: str | None = None


@dataclass(frozen=True)
class Precision:
    """The dtypes from which the limits of a model's precision follow.

    dtype: the coarsest of its weights, outputs and compared layers. computed_in: the coarsest that any of its operations returns.
    """

    dtype: torch.dtype
    computed_in: torch.dtype

    @property
    def eps(self) -> float:
        """The relative distance of two neighbouring numbers of `dtype`; rounding moves a number by at most half of it."""
        return torch.finfo(self.dtype).eps

    @property
    def cap(self) -> float:
        return CAP[self.computed_in]

    def limit(self, noise: float) -> Limit:
        """The limit of a candidate's error, where the error of the reference itself is `noise`."""
        if math.isnan(noise):  # no finite value, which the comparison reports
            return Limit(noise, self.cap)
        unjudged = None if noise <= self.cap else f"the original itself is {noise:.1e} away from its float64 run there"
        return Limit(noise, max(NOISE_FACTOR * noise, FLOOR[self.dtype]), unjudged)

    def undecided(self, movement: float, what: str = "original") -> str | None:
        """Why float64 decides nothing, or None. movement: how far an output of `what` moves if its numbers are rounded otherwise."""
        if movement <= CHAOS[self.computed_in]:
            return None
        return f"a choice that rounding decides: the {what} moves by {movement:.1e} of its output when its weights are rounded otherwise"


def coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The floating dtype with the fewest digits among `dtypes`; float32 if there is none."""
    return max(FLOOR.keys() & set(dtypes) or {torch.float32}, key=lambda dtype: torch.finfo(dtype).eps)
