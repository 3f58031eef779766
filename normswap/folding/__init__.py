"""Exact rewrites that make an affine vanish from an ONNX graph: this room imports nothing of ours, and `export` alone imports it.

`Affine` is what they work on, and `fold` (decide.py) tries them in order: into the linear layer right before it (into_producer.py), into
what reads it or what it is computed from (ways.py), and what is left is one BatchNormalization, or a Mul and an Add (write.py). All but the
first and the last are changes of basis (basis.py): one pass over the graph with a rule for each operator (spread.py).

Importing this package imports onnx_ir: do it inside a function.
"""

from __future__ import annotations

from normswap.folding.affine import Affine, Constants, note_precise
from normswap.folding.decide import Outcome, fold

__all__ = ["Affine", "Constants", "Outcome", "fold", "note_precise"]
