"""How large an error may be: the numbers of the rule that `judge.py` explains."""

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
    """Of one tensor at one probe: the largest error that passes, the noise that it comes from, and why the row decides nothing, or None."""

    noise: float
    tolerance: float
    unjudged: str | None = None


@dataclass(frozen=True)
class Precision:
    """How precise a model is meant to be.

    dtype: the coarsest of its weights, outputs and compared layers. computed_in: the coarsest that any of its operations returns.
    """

    dtype: torch.dtype
    computed_in: torch.dtype

    @property
    def eps(self) -> float:
        """The relative distance of two neighbouring numbers: a number that was rounded is off by half of it at most."""
        return torch.finfo(self.dtype).eps

    @property
    def cap(self) -> float:
        return CAP[self.computed_in]

    def limit(self, noise: float) -> Limit:
        """Of the precision of a candidate, where the error of the reference itself is `noise`."""
        if math.isnan(noise):  # nowhere finite: the comparison says so
            return Limit(noise, self.cap)
        unjudged = None if noise <= self.cap else f"the original itself is {noise:.1e} away from its float64 run there"
        return Limit(noise, max(NOISE_FACTOR * noise, FLOOR[self.dtype]), unjudged)

    def undecided(self, movement: float) -> str | None:
        """Why float64 decides nothing, if so. movement: how far an output goes when numbers of the model are rounded otherwise."""
        if movement <= CHAOS[self.computed_in]:
            return None
        return f"a choice that rounding decides: the original moves by {movement:.1e} of its output when its weights are rounded otherwise"


def coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Of the floating dtypes among these the one with the fewest digits; float32 if there is none."""
    return max(FLOOR.keys() & set(dtypes) or {torch.float32}, key=lambda dtype: torch.finfo(dtype).eps)
