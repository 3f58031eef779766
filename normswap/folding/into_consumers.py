r"""Fold an affine into everything that reads it.

    y = s x + t,  z = W y + b  =  (W * s) x + (b + W t)

and likewise through whatever lies between, as far as it keeps scale and shift (`operators.py`). Exact if every reader, and every reader of
those, ends in a linear layer; one with zeros around its input only if t = 0. s may be 0 and negative. Nothing before y is changed, so x is
computed as before.
"""

from __future__ import annotations

from normswap.folding.affine import Affine
from normswap.folding.basis import Bases, Change


def attempt(affine: Affine, bases: Bases) -> Change:
    """Raises Conflict where it is not exact."""
    change = Change(bases)
    change.gone.add(affine)
    change.hold(affine.x)
    change.set(affine.y, bases.of(affine.x).then(affine.scale, affine.shift))
    change.run()
    return change
