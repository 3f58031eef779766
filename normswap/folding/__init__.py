"""Exact rewrites that make an affine vanish from an ONNX graph, one per file. They serve `normswap.export` alone.

`Affine` is what they work on. A rewrite is a function (Affine, Constants) -> bool that either changes the graph and returns True, or
leaves everything as it is. `REWRITES` holds them in the order in which they are tried.

Importing this package imports onnx_ir: do it inside a function.
"""

from __future__ import annotations

from collections.abc import Callable

from normswap.folding import into_producer
from normswap.folding.affine import Affine, Constants

REWRITES: tuple[Callable[[Affine, Constants], bool], ...] = (into_producer.fold,)

__all__ = ["REWRITES", "Affine", "Constants"]
