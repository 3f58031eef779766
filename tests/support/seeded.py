"""The settings of random searches that draw the same each time: `@settings(max_examples=N, **SEEDED)`."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, Phase

SEEDED: dict[str, Any] = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.generate],
}
