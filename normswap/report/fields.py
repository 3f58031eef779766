"""Fields of JSON that several reports share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from normswap.detect.sites import Skip, Swap


def strict(value: Any) -> Any:
    """`value` in the types that JSON has."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return value


def site_json(decision: Swap | Skip) -> dict[str, Any]:
    return {
        "name": decision.name,
        "aliases": decision.aliases,
        "kind": decision.kind,
        "calls": decision.calls,
        "producer": decision.producer,
        "function": decision.site.function,
    }
