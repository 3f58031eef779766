r"""Fold an affine into everything that x is computed from.

    y = s x + t,  x = W u + b + V v + c        y = (W * s) u + (V * s) v + (b + c) * s + t

and likewise through whatever lies between: sums, concatenations, means over space, and a ReLU if s > 0, which becomes a maximum:

    y = s relu(h) + t = max(s h + t, t)

A residual stream is stored in another scale from its beginning to its end by this: in a post-norm transformer, h' = s (h + f(h)) + t, every
layer that reads the stream is multiplied by the product of the scales so far, and every layer that writes it is divided by it.
Exact if s is not 0 and all other readers of what is stored otherwise can follow.
"""

from __future__ import annotations

from normswap.folding.affine import Affine
from normswap.folding.basis import Bases, Change


def attempt(affine: Affine, bases: Bases) -> Change:
    """Raises Conflict where it is not exact."""
    change = Change(bases, thresholds=True)
    change.gone.add(affine)
    change.hold(affine.y)
    change.set(affine.x, bases.of(affine.y).before(affine.scale, affine.shift))
    change.run()
    return change
