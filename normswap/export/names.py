"""Names that several steps of an export share: the domain of our own nodes, names that are not taken yet, and the hint on --no-onnx."""

from __future__ import annotations

import itertools
from collections.abc import Container

DOMAIN = "normswap"
NO_ONNX = "`--no-onnx` writes the converted model without an ONNX file"


def unused(name: str, taken: Container[str]) -> str:
    """`name`, or the first of `name_1`, `name_2` ... that is not taken."""
    return next(n for n in itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1))) if n not in taken)
