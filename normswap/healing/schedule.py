"""How long a healing takes, and the learning rate along the way.

f      the share of the budget that is used: of the tokens, or of the minutes, whichever is larger
rate   lr * min(f / WARM_UP, 1) * (1 + cos(pi f)) / 2
"""

from __future__ import annotations

import math
from dataclasses import dataclass

WARM_UP = 0.1


@dataclass(frozen=True)
class Budget:
    """At least one of the two. minutes: of the clock. tokens: positions that count, see `distance.positions`."""

    minutes: float | None = None
    tokens: int | None = None

    def used(self, seconds: float, tokens: int) -> float:
        """The share that is used, from 0 to 1."""
        of_minutes = 0.0 if self.minutes is None else seconds / (60 * self.minutes)
        of_tokens = 0.0 if self.tokens is None else tokens / self.tokens
        return min(max(of_minutes, of_tokens), 1.0)


def factor(used: float) -> float:
    """What the learning rate is multiplied by where this share of the budget is used."""
    return min(used / WARM_UP, 1.0) * (1 + math.cos(math.pi * used)) / 2
