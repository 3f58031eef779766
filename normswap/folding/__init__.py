"""Exact rewrites that make an affine vanish from an ONNX graph. May import nothing else of normswap; `export` alone imports it.

`fold` (decide.py) tries the rewrites for each `Affine` in order: into the linear layer right before it (into_producer.py), then into what
reads it or what it is computed from (ways.py). What is left becomes one BatchNormalization, or a Mul and an Add (write.py). The rewrites of
ways.py are changes of basis (basis.py): one pass over the graph with a rule for each operator (operator_rules.py).

Importing this package imports onnx_ir: do it inside a function.
"""

from __future__ import annotations

from normswap.folding.affine import Affine, Constants, note_precise
from normswap.folding.decide import Outcome, fold

__all__ = ["Affine", "Constants", "Outcome", "fold", "note_precise"]
