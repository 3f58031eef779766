"""The steps of `normswap.export`, one module each, in this order:

marks    a copy of the model with a mark in the place of every norm
graph    the graph that torch makes of it, with the axes that are to be free
norms    the marks are found in that graph, and folded (`normswap.folding`)
finish   names, the opset, and whether it is valid
"""

from __future__ import annotations

import itertools
from collections.abc import Container

DEFAULT_OPSET = 20
TORCH_OPSET = 18  # the lowest that torch.onnx.export writes by itself
DOMAIN = "normswap"
NO_ONNX = "`--no-onnx` writes the converted model without an ONNX file"


def unused(name: str, taken: Container[str]) -> str:
    """`name`, or the first of `name_1`, `name_2` ... that is not taken."""
    return next(n for n in itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1))) if n not in taken)
