"""How a model is called with its example inputs, as JSON: dicts and lists, tensors by their number, and plain values.

A model that is called with tensors alone needs none of it. Anything else that an argument may be, a dataclass say, cannot be recorded.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

DEPTH = 20
_CONTAINERS: dict[Any, str] = {dict: "dict", list: "list", tuple: "tuple"}


class NotRecordable(Exception):
    """An argument is of a class that the recipe has no word for."""


def recorded(value: Any, tensors: list[Tensor], depth: int = DEPTH) -> dict[str, Any]:
    """`value` as JSON; its tensors are added to `tensors`, whose places in it are their numbers. Raises NotRecordable."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    kind = _CONTAINERS.get(type(value))
    if kind is None and _is_plain(value):
        return {"value": value}
    if kind is None or depth == 0 or (kind == "dict" and not all(isinstance(key, str) for key in value)):
        raise NotRecordable
    if kind == "dict":
        return {kind: {key: recorded(item, tensors, depth - 1) for key, item in value.items()}}
    return {kind: [recorded(item, tensors, depth - 1) for item in value]}


def is_recorded(value: Any, tensors: int, depth: int = DEPTH) -> bool:
    """Whether `recorded` can have written this, of at most so many tensors."""
    if not isinstance(value, dict) or len(value) != 1:
        return False
    ((kind, inner),) = value.items()
    match kind:
        case "tensor":
            return type(inner) is int and 0 <= inner < tensors
        case "value":
            return _is_plain(inner)
        case "dict" if isinstance(inner, dict) and depth:
            return all(is_recorded(item, tensors, depth - 1) for item in inner.values())
        case "list" | "tuple" if isinstance(inner, list) and depth:
            return all(is_recorded(item, tensors, depth - 1) for item in inner)
    return False


def rebuilt(value: Any, tensors: list[Tensor]) -> Any:
    """What `recorded` wrote, with these tensors."""
    ((kind, inner),) = value.items()
    match kind:
        case "tensor":
            return tensors[inner]
        case "value":
            return inner
        case "dict":
            return {key: rebuilt(item, tensors) for key, item in inner.items()}
    return (list if kind == "list" else tuple)(rebuilt(item, tensors) for item in inner)


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, str)) or (type(value) is int and abs(value) < 2**63) or _is_finite(value)


def _is_finite(value: object) -> bool:
    return type(value) is float and math.isfinite(value)
