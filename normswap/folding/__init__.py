"""Exact rewrites that make an affine vanish from an ONNX graph, one per file.

`Affine` is what they work on, and `fold` (decide.py) tries them in order:

    into_producer     into the linear layer right before it, whatever its scale
    into_consumers    into all that reads it
    stream_shift      its scale into all that reads it, its shift into what comes before it
    threshold         through a ReLU, which becomes a maximum, into all that reads that
    into_producers    into all that it is computed from
    scale_alone       its scale, so that an Add remains
    remainder         what is left: one BatchNormalization, or a Mul and an Add

All but the first and the last are changes of basis (`basis.py`): one pass over the graph with a rule for each operator (`operators.py`).

Importing this package imports onnx_ir: do it inside a function.
"""

from __future__ import annotations

from normswap.folding.affine import Affine, Constants, note_precise
from normswap.folding.decide import Fate, fold, taps

__all__ = ["Affine", "Constants", "Fate", "fold", "note_precise", "taps"]
